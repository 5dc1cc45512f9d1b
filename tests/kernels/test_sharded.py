"""A memory split over devices gives what one device gives.

The devices are virtual ones of a worker process, whose numbers are compared
here with float64.
"""

import itertools
import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh, Mesh

from hourjax.kernels import ulysses
from hourjax.kernels.attention import attention
from hourjax.kernels.sharded import Sharding
from tests.xla_flags import xla_flags

# float32 against float64 on numbers of order 1.
ATOL = 2e-5

_CASES = [
  {"devices": devices, "order": order, "queries": queries, "kernel": "cpu"}
  for devices, order, queries in itertools.product(
    (1, 2, 4, 8), ("as it is", "round robin", "shuffled"), (False, True)
  )
]
# Rows and heads split as well, and the kernels for TPU, interpreted.
_MESHES = [
  {
    "devices": 8,
    "order": "round robin",
    "queries": True,
    "kernel": "cpu",
    **split,
  }
  for split in (
    {"rows": 2, "heads": 2},
    {"rows": 2, "heads": 1},
    {"rows": 1, "heads": 2},
  )
]
# Self-attention; with 8 devices several compute the same of 4 heads.
_SEQUENCES = [
  {"devices": devices, "order": "", "queries": True, "kernel": "cpu",
   "heads": heads, "sequence": sequence}
  for devices, heads in ((1, 1), (2, 1), (4, 1), (8, 1), (8, 2))
  for sequence in ("whole", "causal")
]  # fmt: skip
_INTERPRETED = [
  {"devices": devices, "order": order, "queries": queries, "kernel": "tpu"}
  for devices, order, queries in (
    (1, "as it is", False),
    (2, "shuffled", True),
    (4, "round robin", False),
    (8, "as it is", True),
  )
] + [
  {"devices": 4, "order": "", "queries": True, "kernel": "tpu",
   "sequence": sequence}
  for sequence in ("whole", "causal")
]  # fmt: skip

# cuDNN's gradients are exact only with the log-sum-exp and the output of all.
_CUDNN = [
  {"devices": 4, "order": "round robin", "queries": True, "kernel": "cudnn",
   "rows": 1, "heads": 1},
  {"devices": 8, "order": "shuffled", "queries": False, "kernel": "cudnn",
   "rows": 2, "heads": 1},
  {"devices": 4, "order": "", "queries": True, "kernel": "cudnn", "heads": 2,
   "sequence": "whole"},
  {"devices": 8, "order": "", "queries": True, "kernel": "cudnn", "heads": 2,
   "sequence": "causal"},
]  # fmt: skip


def _name(case):
  return "-".join(str(value) for value in case.values())


def _errors(cases):
  """Largest difference from float64 of each output, by case."""
  done = subprocess.run(
    [sys.executable, "-m", "tests.kernels.on_devices", json.dumps(cases)],
    env={
      **os.environ,
      "JAX_PLATFORMS": "cpu",
      "XLA_FLAGS": xla_flags(8),
      # Threads of XLA's pool: interpreted devices wait for each other in it.
      "NPROC": "32",
    },
    timeout=600,
    capture_output=True,
    text=True,
  )
  assert not done.returncode, done.stderr[-3000:]
  return json.loads(done.stdout.splitlines()[-1])


_QUICK = [case for case in _CASES if case["devices"] == 4]
_QUICK += _MESHES[:1]
_REST = [c for c in _CASES + _MESHES + _SEQUENCES if c not in _QUICK]


@pytest.fixture(scope="module")
def quick():
  return dict(zip(map(_name, _QUICK), _errors(_QUICK)))


@pytest.fixture(scope="module")
def rest():
  return dict(zip(map(_name, _REST), _errors(_REST)))


@pytest.fixture(scope="module")
def interpreted():
  return dict(zip(map(_name, _INTERPRETED), _errors(_INTERPRETED)))


@pytest.fixture(scope="module")
def through_cudnn():
  return dict(zip(map(_name, _CUDNN), _errors(_CUDNN)))


@pytest.mark.parametrize("case", _QUICK, ids=_name)
def test_float64(quick, case):
  _check(quick[_name(case)])


@pytest.mark.parametrize("case", _CUDNN, ids=_name)
def test_float64_through_cudnn(through_cudnn, case):
  _check(through_cudnn[_name(case)])


@pytest.mark.slow
@pytest.mark.parametrize("case", _REST, ids=_name)
def test_float64_on_other_meshes(rest, case):
  _check(rest[_name(case)])


@pytest.mark.slow
@pytest.mark.parametrize("case", _INTERPRETED, ids=_name)
def test_float64_through_the_tpu_kernels(interpreted, case):
  errors = interpreted[_name(case)]
  assert not errors.pop("races")
  _check(errors)


def _check(errors):
  assert set(errors) == {"out", "dq", "dk", "dv"}
  for name, error in errors.items():
    assert error < ATOL, (name, error)


# --- refusals ---------------------------------------------------------------


def _call(sharding, *, rows=2, queries=8, keys=8, heads=(4, 2), causal=False):
  q = np.zeros((rows, queries, heads[0], 8), np.float32)
  k = np.zeros((rows, keys, heads[1], 8), np.float32)
  query_segment = np.ones((rows, queries), np.int32)
  key_segment = np.ones((rows, keys), np.int32)
  return attention(
    *map(jax.numpy.asarray, (q, k, k, query_segment, key_segment)),
    causal=causal,
    sharding=sharding,
  )


def _mesh(*names):
  return Mesh(np.array(jax.devices()[:1]).reshape([1] * len(names)), names)


def test_an_axis_that_the_mesh_lacks():
  sharding = Sharding(_mesh("data"), memory="seq")
  with pytest.raises(ValueError, match=r"keys over axis 'seq'.* has 'data'"):
    _call(sharding)


def test_causal_attention_is_not_split_over_keys():
  sharding = Sharding(_mesh("seq"), memory="seq")
  with pytest.raises(ValueError, match="splits them over 'seq'"):
    _call(sharding, causal=True)


def test_a_split_sequence_is_one_sequence():
  sharding = Sharding(_mesh("seq"), sequence="seq")
  with pytest.raises(ValueError, match="got 16 keys for 8 queries"):
    _call(sharding, keys=16)


@pytest.mark.parametrize(
  "heads, kv_heads, devices, blocks",
  [
    (16, 2, 4, 4),  # two blocks a KV head
    (16, 2, 64, 16),  # four devices a head
    (28, 4, 4, 4),
    (28, 4, 8, 4),
    (28, 4, 2, 2),  # two KV heads a block
    (12, 2, 4, 4),  # half a group
    (6, 2, 4, 2),
    (7, 7, 3, 1),
  ],
)
def test_blocks_of_heads(heads, kv_heads, devices, blocks):
  assert ulysses.head_blocks(heads, kv_heads, devices) == blocks


@pytest.mark.parametrize(
  "what, axes", [("rows", ("data", "fsdp")), ("keys", ("fsdp",))]
)
def test_sizes_that_do_not_divide(what, axes):
  mesh = AbstractMesh((2, 4), ("data", "fsdp"))
  sharding = Sharding(mesh)
  sharding.check(**{what: (16, axes)})
  with pytest.raises(ValueError, match=f"12 {what} cannot be split evenly"):
    sharding.check(**{what: (12, ("data", "fsdp"))})
