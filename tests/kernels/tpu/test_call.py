"""The kernels as the model calls them: in parts, and what they refuse."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hourjax.kernels.tpu import call
from hourjax.kernels.tpu.tiles import CHIPS, MIB, Chip, Tiles
from tests.kernels.tpu import comparison
from tests.kernels.tpu.comparison import (
  NEVER,
  SMALL,
  draw,
  expected,
  of_caller,
  runs,
)

slow = pytest.mark.slow
QUERIES, KEYS = 40, 700
SEGMENTS = (
  runs((1, 9), (2, 14), (3, 10), (4, 3), total=QUERIES),
  runs((1, 100), (2, 500), (3, 60), total=KEYS),
)


@pytest.mark.slow
def test_keys_in_two_parts():
  """Each part's gradients, by the log-sum-exp over both, add up.

  Segment 1 is in the first part, 3 in the second, 2 in both and 4 in none.
  """
  q, k, v, d_out = inputs = draw(0, 1, QUERIES, KEYS, 8, 1)
  query_segment, key_segment = SEGMENTS
  parts = [
    (q, k[:, part], v[:, part], query_segment, key_segment[:, part])
    for part in (slice(0, 350), slice(350, None))
  ]
  outs, lses = zip(*(comparison.forward(*part) for part in parts))
  for lse, ids in zip(lses, ([1, 2], [2, 3])):
    assert ((lse[0, :, 0] == NEVER) == ~np.isin(query_segment[0], ids)).all()
  lse = jnp.logaddexp(*lses)
  out = sum(x * jnp.exp(y - lse)[..., None] for x, y in zip(outs, lses))
  lse = jnp.where(lse < NEVER / 2, NEVER, lse)
  numbers = of_caller(out, lse, d_out)
  (dq, *first), (more, *second) = (
    comparison.backward(*part, *numbers, d_out) for part in parts
  )
  d_keys = (np.concatenate(x, axis=1) for x in zip(first, second))
  comparison.close((out, lse, dq + more, *d_keys), expected(inputs, *SEGMENTS))


@slow
@pytest.mark.parametrize(
  "dtype, parts", [(jnp.float32, 2), (jnp.float32, 3), (jnp.bfloat16, 2)]
)
def test_queries_in_parts(dtype, parts):
  """Where dq of all queries does not fit; sums over parts stay float32."""
  inputs = [jnp.asarray(x, dtype) for x in draw(1, 1, QUERIES, KEYS, 8, 1)]
  q, k = inputs[:2]
  whole = call.split(SMALL, q, k)
  assert whole[0] == 1 and whole[1].query_tiles == 3
  fits = whole[1]._replace(query_tiles=-(-3 // parts))
  chip = SMALL._replace(vmem=call.backward_vmem(fits, q.dtype.itemsize))
  assert call.split(chip, q, k) == (parts, fits)
  out, lse = comparison.forward(*inputs[:3], *SEGMENTS)
  operands = *inputs[:3], *SEGMENTS, *of_caller(out, lse, inputs[3]), inputs[3]
  got = comparison.backward(*operands, chip=chip)
  reference = comparison.backward(*operands)
  rounding = 2e-6 if dtype == jnp.float32 else 2**-7
  for x, y in zip(got, reference, strict=True):
    assert x.dtype == y.dtype
    x, y = (np.asarray(z, np.float32) for z in (x, y))
    np.testing.assert_allclose(x, y, rtol=rounding, atol=2e-6)


@slow
def test_rows_in_groups(monkeypatch):
  """Three of four rows would fit, and two at a time are taken."""
  inputs = draw(2, 4, QUERIES, 300, 8, 1)
  segments = (
    np.repeat(SEGMENTS[0], 4, 0),
    np.concatenate([runs((1, 20 * n), (2, 70), total=300) for n in range(4)]),
  )
  reference = comparison.ours(inputs, *segments)
  shape = call.split(SMALL, *map(jnp.asarray, inputs[:2]))[1]
  monkeypatch.setattr(call, "SMEM", 3 * call.row_scalars(shape) + 4)
  got = comparison.ours(inputs, *segments, key="groups of two")
  comparison.same(got, reference)


# --- refusals ---------------------------------------------------------------


def traced(queries, keys, heads, kv_heads, dtypes=(jnp.bfloat16,) * 3):
  """Abstract q, k, v and segments."""
  shapes = (queries, heads), (keys, kv_heads), (keys, kv_heads)
  arrays = [
    jax.ShapeDtypeStruct((1, *shape, 128), dtype)
    for shape, dtype in zip(shapes, dtypes)
  ]
  ids = [jax.ShapeDtypeStruct((1, n), jnp.int32) for n in (queries, keys)]
  return *arrays, *ids


def refuse(match, *arrays, chip=SMALL):
  """Both kernels do."""
  number = jax.ShapeDtypeStruct(arrays[0].shape[:3], jnp.float32)

  def forward(*operands):
    return call.forward(
      *operands, chip=chip, out_dtype=jnp.float32, interpret=True
    )

  def backward(*operands):
    return call.backward(*operands, chip=chip, interpret=True)

  with pytest.raises(ValueError, match=match):
    jax.eval_shape(forward, *arrays)
  with pytest.raises(ValueError, match=match):
    jax.eval_shape(backward, *arrays, number, number, arrays[0])


@pytest.mark.parametrize(
  "dtypes",
  [
    ("float16", "float16", "float16"),
    ("bfloat16", "float32", "bfloat16"),
    ("float32", "float32", "bfloat16"),
  ],
)
def test_other_dtypes_are_refused(dtypes):
  match = f"all bfloat16 or all float32, not {', '.join(dtypes)}; cast them"
  refuse(match, *traced(8, 8, 2, 1, dtypes))


def test_too_little_vmem_is_refused():
  refuse(
    r"needs \d+ MiB of VMEM for tiles of 1024 score rows and 1024 keys of head"
    r" dim 128 in bfloat16; 3 MiB are there; take smaller tiles",
    *traced(9728, 235520, 16, 2),
    chip=CHIPS["v5e"]._replace(vmem=3 * MIB),
  )


def test_too_many_tiles_are_refused():
  # Interpreted or not, nothing of this size is made.
  tile = Tiles(128, 128, 128, 128)
  chip = Chip(tile, tile, 1 << 40)
  refuse(
    "at most 8192 tiles of 128 keys in a row, got 8193; shard them",
    *traced(1, 8192 * 128 + 1, 1, 1),
    chip=chip,
  )
  refuse(
    "at most 8192 tiles of 128 queries in a row, got 8193; shard them",
    *traced(8192 * 128 + 1, 1, 1, 1),
    chip=chip,
  )


def test_too_many_visits_of_a_row_are_refused(monkeypatch):
  """3 x 3 visits, 2 x 3 + 3 x 6 ranges: one byte is missing."""
  monkeypatch.setattr(call, "SMEM", 4 * (9 + 6 + 18) - 1)
  arrays = traced(40, 700, 8, 1)
  with pytest.raises(ValueError, match=r"3 x 3 tiles needs 132 bytes .* 131;"):
    jax.eval_shape(
      lambda *x: call.forward(*x, chip=SMALL, out_dtype=jnp.float32), *arrays
    )


# --- real sizes -------------------------------------------------------------


@pytest.mark.parametrize("heads, kv_heads", [(16, 2), (28, 4)])
@pytest.mark.parametrize("name", ["v5e", "v5p", "v6e", "7x"])
def test_an_hour_fits_in_one_part(name, heads, kv_heads):
  """3B and 7B: 9,728 queries and 235,520 keys, each key read once."""
  chip = CHIPS[name]

  def look(q, k, v):
    parts, shape = call.split(chip, q, k)
    assert parts == 1 and shape.keys * shape.key_tiles == 235520
    call.check(q, k, v, shape, call.backward_vmem(shape, 2), chip)
    shape = call._cut(chip.forward, q, k)
    assert shape.keys * shape.key_tiles == 235520
    call.check(q, k, v, shape, call.forward_vmem(shape, 2), chip)
    return q

  jax.eval_shape(look, *traced(9728, 235520, heads, kv_heads)[:3])
