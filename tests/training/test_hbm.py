import types

import jax

from hourjax.training.throughput import hbm

GIB = 2**30


def _device(stats):
  return types.SimpleNamespace(memory_stats=lambda: stats)


def test_the_fullest_device_counts():
  one = _device({"bytes_in_use": 2 * GIB, "peak_bytes_in_use": 5 * GIB})
  two = _device({"bytes_in_use": 3 * GIB, "peak_bytes_in_use": 4 * GIB})
  assert hbm([one, two]) == {"hbm_gib": 3.0, "hbm_peak_gib": 5.0}


def test_what_no_device_knows_is_left_out():
  assert hbm([_device({"bytes_in_use": GIB})]) == {"hbm_gib": 1.0}
  assert hbm([_device(None)]) == hbm([]) == hbm(jax.local_devices()) == {}

  def unable():
    raise NotImplementedError

  assert hbm([types.SimpleNamespace(memory_stats=unable)]) == {}
