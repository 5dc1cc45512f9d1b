"""Attention on the virtual devices of this process, against float64.

  python -m tests.kernels.on_devices '[{"devices": 4, ...}]'

prints the largest error of each output by case, as test_sharded.py wants it.
"""

import functools
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import Mesh, NamedSharding

from hourjax.kernels.attention import attention
from hourjax.kernels.sharded import Sharding
from tests import interpreted
from tests.kernels.cudnn_double import use_cudnn_double
from tests.kernels.test_attention import dense

ROWS, QUERIES, KEYS, HEADS, KV_HEADS, DIM = 2, 24, 320, 4, 2, 16


def main(cases: list[dict]) -> None:
  """Prints a JSON list of the errors of the cases."""
  print(json.dumps([errors(**case) for case in cases]))


def errors(
  devices: int,
  order: str,
  queries: bool,
  kernel: str,
  rows: int = 1,
  heads: int = 1,
  sequence: str = "",
) -> dict[str, float]:
  """Largest differences from the dense computation.

  `sequence` is "" for queries that read a memory, "whole" or "causal" for
  self-attention over a split sequence.
  """
  causal = sequence == "causal"
  if sequence:
    q, k, v, query_segment, key_segment, d_out = _sequence()
  else:
    q, k, v, query_segment, key_segment, d_out = _inputs(devices, order)
  expected = dense(q, k, v, query_segment, key_segment, causal, d_out)
  memory = devices // rows // heads
  mesh = Mesh(
    np.array(jax.devices()[:devices]).reshape(rows, memory, heads),
    ("data", "seq", "tensor"),
  )
  split = {"memory": "seq", "queries": queries}
  if sequence:
    split = {"sequence": "seq"}
  sharding = Sharding(mesh, ("data",), "tensor", **split)
  specs = sharding.specs()
  specs = (specs.q, specs.k, specs.k, specs.query_segment, specs.key_segment)
  arrays = [
    jax.device_put(x, NamedSharding(mesh, spec))
    for x, spec in zip((q, k, v, query_segment, key_segment), specs)
  ]
  d_out = jax.device_put(d_out, arrays[0].sharding)
  with pytest.MonkeyPatch.context() as patch:
    if kernel == "tpu":
      interpreted.use_tpu_kernels(patch)
    if kernel == "cudnn":
      use_cudnn_double(patch)
    got = _compiled(kernel, causal, sharding)(*arrays, d_out)
  found = {
    name: float(np.abs(np.asarray(x, np.float64) - reference).max())
    for name, x, reference in zip(("out", "dq", "dk", "dv"), got, expected)
  }
  if kernel == "tpu":
    found["races"] = interpret_pallas_call.races.races_found
    pltpu.reset_tpu_interpret_mode_state()
  return found


# Cases that differ in the order of the keys alone share a compiled function.
# To compile takes longer than to run, so LLVM optimises nothing.
@functools.cache
def _compiled(kernel: str, causal: bool, sharding: Sharding):
  """A function to (out, dq, dk, dv); of the key, "tpu" is replaced."""

  def run(q, k, v, query_segment, key_segment, d_out):
    call = functools.partial(
      attention,
      query_segment=query_segment,
      key_segment=key_segment,
      causal=causal,
      sharding=sharding,
      implementation="cudnn" if kernel == "cudnn" else None,
    )
    out, pull = jax.vjp(call, q, k, v)
    return out, *pull(d_out)

  options = {"xla_backend_optimization_level": 0}
  return jax.jit(run, compiler_options=options)


def _inputs(devices: int, order: str):
  """Two rows: three segments and padding; one short segment.

  With 8 devices in order, most hold nothing of the second row.
  """
  rng = np.random.default_rng(0)
  shapes = ((QUERIES, HEADS), (KEYS, KV_HEADS), (KEYS, KV_HEADS))
  q, k, v = (
    rng.normal(size=(ROWS, *shape, DIM)).astype(np.float32) for shape in shapes
  )
  d_out = rng.normal(size=q.shape).astype(np.float32)
  query_segment = np.stack([_ids(8, 5, 6), _ids(3)]).astype(np.int32)
  key_segment = np.stack(
    [_ids(90, 120, 80, length=KEYS), _ids(20, length=KEYS)]
  ).astype(np.int32)
  places = np.arange(KEYS)
  if order == "round robin":
    places = places.reshape(-1, devices).T.reshape(-1)
  if order == "shuffled":
    places = rng.permutation(KEYS)
  k, v, key_segment = k[:, places], v[:, places], key_segment[:, places]
  return q, k, v, query_segment, key_segment, d_out


def _sequence():
  """Two rows of self-attention, as in `_inputs`."""
  rng = np.random.default_rng(1)
  shapes = [(HEADS,), (KV_HEADS,), (KV_HEADS,), (HEADS,)]
  q, k, v, d_out = (
    rng.normal(size=(ROWS, KEYS, *shape, DIM)).astype(np.float32)
    for shape in shapes
  )
  segment = np.stack([_ids(90, 120, 80, length=KEYS), _ids(20, length=KEYS)])
  segment = segment.astype(np.int32)
  return q, k, v, segment, segment, d_out


def _ids(*lengths, length=QUERIES):
  ids = np.repeat(np.arange(1, len(lengths) + 1), lengths)
  return np.pad(ids, (0, length - len(ids)))


if __name__ == "__main__":
  jnp.zeros(1)  # wake the devices
  main(json.loads(sys.argv[1]))
