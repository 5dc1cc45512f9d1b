"""Answers in SQLite, of one process and of several."""

import asyncio
import os
import sqlite3

import pytest

from hourjax.construction.call_store import CallStore, Reply, Spent
from hourjax.errors import UserError

INFO = {"duration": 60.0}


async def _fill(store, name, state, answers=("a",), plan="plan", key=b"0"):
  """A video with answers and a result."""
  number = await store.add_video(name, 1, 2, "stamp", INFO)
  for place, text in enumerate(answers):
    reply = Reply(text, False, 10, 5, 0.5)
    await store.put_answer(
      number, key + bytes([place]), "caption", "eye", reply
    )
  if state:
    await store.put_result(number, plan, state, {"by": store.path.name})


def test_answers_are_found_again(tmp_path):
  texts = ("short", "long " * 500, "", "Zoë 出口 \ud800", '{"a": 1}')
  with CallStore(tmp_path) as store:
    asyncio.run(_fill(store, "a b/é.mp4", "done", texts))
  with CallStore(tmp_path) as store:
    found = store.answers("a b/é.mp4")
    assert [found[b"0" + bytes([i])].text for i in range(5)] == list(texts)
    assert found[b"0\x00"] == Reply("short", False, 10, 5, 0.5)
    assert not store.answers("other.mp4")
    assert store.spent() == {("caption", "eye"): Spent(5, 50, 25, 2.5)}
    ((name, state, row, result),) = store.results("plan")
    assert (name, state, row.info) == ("a b/é.mp4", "done", INFO)
    assert result == {"by": "calls.sqlite"} and not [*store.results("other")]


def test_one_process_writes_a_file(tmp_path):
  with CallStore(tmp_path), pytest.raises(UserError, match="another process"):
    CallStore(tmp_path)
  with CallStore(tmp_path), CallStore(tmp_path, "calls-0-of-2"):
    pass


def test_foreign_files(tmp_path):
  (tmp_path / "calls.sqlite").write_bytes(b"not a database, but long" * 100)
  with pytest.raises(UserError, match="cannot be read"):
    CallStore(tmp_path)
  newer = tmp_path / "newer"
  newer.mkdir()
  with sqlite3.connect(newer / "calls.sqlite") as other:
    other.execute("PRAGMA user_version=99")
  with pytest.raises(UserError, match="version 99"):
    CallStore(newer)
  # Others' files beside ours are left alone.
  beside = tmp_path / "beside"
  beside.mkdir()
  (beside / "photos.sqlite").write_bytes(b"x")
  (beside / "calls-0-of-2.sqlite").write_bytes(b"x" * 4096)
  with CallStore(beside) as store:
    assert store.others() == {}


def test_what_one_worker_has_done_counts(tmp_path):
  """Failed here and done there is done, in any order of the files."""
  with CallStore(tmp_path) as store:
    asyncio.run(_fill(store, "a.mp4", "failed"))
    asyncio.run(_fill(store, "b.mp4", "done"))
    asyncio.run(_fill(store, "c.mp4", ""))
  with CallStore(tmp_path, "calls-0-of-2") as other:
    asyncio.run(_fill(other, "a.mp4", "done", ("x",), key=b"1"))
    asyncio.run(_fill(other, "b.mp4", "failed"))
    asyncio.run(_fill(other, "c.mp4", "dropped"))
  for label in ("calls", "calls-0-of-2", "calls-1-of-2"):
    with CallStore(tmp_path, label) as store:
      states = {name: state for name, state, _, _ in store.results("plan")}
      assert states == {"a.mp4": "done", "b.mp4": "done", "c.mp4": "dropped"}
      assert {r.text for r in store.answers("a.mp4").values()} == {"a", "x"}
      assert store.spent_by_all()["caption", "eye"].calls == 6


def test_a_worker_that_began_later_is_seen(tmp_path):
  with CallStore(tmp_path, "calls-0-of-2") as first:
    with CallStore(tmp_path, "calls-1-of-2") as second:
      asyncio.run(_fill(second, "a.mp4", "done"))
    assert [name for name, *_ in first.results("plan")] == ["a.mp4"]


def test_videos_and_answers_are_written_at_once(tmp_path):
  """All of it arrives, and is counted, whoever writes meanwhile."""

  async def fill(store):
    videos = [
      _fill(store, f"{i}.mp4", "done", ["x"] * 5, key=bytes([i % 256]))
      for i in range(300)
    ]
    await asyncio.gather(*videos)

  with CallStore(tmp_path) as store:
    asyncio.run(fill(store))
  with CallStore(tmp_path) as store:
    assert len([*store.results("plan")]) == 300
    assert store.spent()["caption", "eye"].calls == 1500
    assert all(len(store.answers(f"{i}.mp4")) == 5 for i in range(300))


def test_a_full_disk_is_told(tmp_path):
  with CallStore(tmp_path) as store:
    store._writer.execute("PRAGMA max_page_count=20")

    async def fill():
      texts = [os.urandom(3000).hex() for _ in range(90)]
      await _fill(store, "a.mp4", "", texts)

    with pytest.raises(OSError, match=r"cannot write .*calls\.sqlite"):
      asyncio.run(fill())


def test_a_cancelled_caller_loses_no_answer(tmp_path):
  async def run(store):
    number = await store.add_video("a.mp4", 1, 2, "stamp", INFO)
    putting = [
      asyncio.create_task(
        store.put_answer(number, bytes([i]), "s", "m", Reply("x"))
      )
      for i in range(50)
    ]
    await asyncio.sleep(0)
    for task in putting:
      task.cancel()
    await asyncio.gather(*putting, return_exceptions=True)
    await store.flush()

  with CallStore(tmp_path) as store:
    asyncio.run(run(store))
    assert len(store.answers("a.mp4")) == 50
