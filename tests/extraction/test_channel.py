import threading
import time

import pytest

from hourjax.extraction.streaming import Channel, ClosedError


def _thread(work):
  thread = threading.Thread(target=work, daemon=True)
  thread.start()
  return thread


def test_items_come_in_order_and_never_more_than_the_capacity():
  channel, held = Channel(3), []

  def put():
    for i in range(50):
      channel.put(i)

  thread = _thread(put)
  for i in range(50):
    held.append(len(channel._items))
    assert channel.get() == i
  thread.join(5)
  assert max(held) <= 3


def test_waiting_is_measured():
  channel = Channel(1)
  _thread(lambda: (time.sleep(0.2), channel.put("late")))
  assert channel.get() == "late"
  assert 0.15 < channel.waited < 2


def test_a_deadline():
  channel = Channel(1)
  with pytest.raises(TimeoutError):
    channel.get(time.monotonic() + 0.05)
  channel.put("there")
  assert channel.get(time.monotonic() - 1) == "there"


@pytest.mark.parametrize("work", ["get", "put"])
def test_closing_wakes_whoever_waits(work):
  channel, woken = Channel(1), []
  if work == "put":
    channel.put(0)

  def wait():
    with pytest.raises(ClosedError):
      channel.get() if work == "get" else channel.put(1)
    woken.append(True)

  thread = _thread(wait)
  time.sleep(0.05)
  channel.close()
  thread.join(5)
  assert woken
  with pytest.raises(ClosedError):
    channel.get()
