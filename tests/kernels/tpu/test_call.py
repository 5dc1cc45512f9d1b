"""The kernels as the model calls them: in parts, and what they refuse."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hourjax.kernels.tpu import block_schedule, call
from hourjax.kernels.tpu.tiles import MIB, AttentionTiles, Tiles
from hourjax.parallel.chips import CHIPS
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
  tiles = SMALL._replace(vmem=call.backward_vmem(fits, q.dtype.itemsize))
  assert call.split(tiles, q, k) == (parts, fits)
  out, lse = comparison.forward(*inputs[:3], *SEGMENTS)
  operands = *inputs[:3], *SEGMENTS, *of_caller(out, lse, inputs[3]), inputs[3]
  got = comparison.backward(*operands, tiles=tiles)
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


# By name: bytes of scalar memory, and (query tiles, key tiles) of a part that
# it then holds, forward and backward. All are 3 x 3 tiles.
SCARCE = {
  "queries cut": (112, (2, 3), (3, 1)),
  "keys cut": (60, (3, 1), (3, 1)),
  "one tile of each": (36, (1, 1), (1, 1)),
}
# Segment 1 ends where a tile of keys does, the last tile of keys is padding,
# and no key is of segment 3.
ENDS_AT_A_CUT = (
  runs((1, 16), (2, 14), (3, 6), total=QUERIES),
  runs((1, 256), (2, 200), total=KEYS),
)
CUT_ANYWHERE = (
  np.concatenate([SEGMENTS[0], ENDS_AT_A_CUT[0]]),
  np.concatenate([SEGMENTS[1], ENDS_AT_A_CUT[1]]),
)


def splits(tiles, q, k):
  """Shapes of a part, forward and backward."""
  found = []

  def look(q, k):
    found.append(call.split_forward(tiles, q, k))
    found.append(call.split_backward(tiles, q, k))
    return q

  jax.eval_shape(look, q, k)
  return found


def _scarce(monkeypatch, name, inputs):
  memory, *wanted = SCARCE[name]
  monkeypatch.setattr(call, "SMEM", memory)
  cuts = splits(SMALL, *inputs[:2])
  assert [(x.query_tiles, x.key_tiles) for x in cuts] == wanted


@pytest.mark.parametrize(
  "name",
  [
    pytest.param("queries cut", marks=slow),
    pytest.param("keys cut", marks=slow),
    pytest.param("one tile of each", marks=slow),
  ],
)
def test_little_scalar_memory(monkeypatch, name):
  """In parts, two rows one after the other: exact, and the same bits twice.

  What is never written reads as nan.
  """
  inputs = draw(3, 2, QUERIES, KEYS, 8, 1)
  _scarce(monkeypatch, name, inputs)
  out, lse, *gradients = got = comparison.check(inputs, *CUT_ANYWHERE, key=name)
  blind = ~np.isin(CUT_ANYWHERE[0], [1, 2, 3])
  blind[1] |= CUT_ANYWHERE[0][1] == 3
  assert (lse[blind] == NEVER).all() and (lse[~blind] > NEVER).all()
  assert not out[blind].any() and not gradients[0][blind].any()
  comparison.same(comparison.ours(inputs, *CUT_ANYWHERE, key=name), got)


@slow
def test_parts_of_the_queries_give_the_same_bits(monkeypatch):
  """Forward they are cut first: it is exact."""
  inputs = draw(3, 2, QUERIES, KEYS, 8, 1)
  whole = comparison.forward(*inputs[:3], *CUT_ANYWHERE)
  _scarce(monkeypatch, "queries cut", inputs)
  cut = comparison.forward(*inputs[:3], *CUT_ANYWHERE, key="queries cut")
  comparison.same(cut, whole)


@slow
def test_parts_of_the_keys_give_the_same_bits_of_their_gradients(monkeypatch):
  """Backward they are cut first: dk and dv of a part are all there is."""
  inputs = draw(3, 1, QUERIES, KEYS, 8, 1)
  out, lse = comparison.forward(*inputs[:3], *SEGMENTS)
  operands = *inputs[:3], *SEGMENTS, *of_caller(out, lse, inputs[3]), inputs[3]
  whole = comparison.backward(*operands)
  _scarce(monkeypatch, "keys cut", inputs)
  cut = comparison.backward(*operands, key="keys cut")
  comparison.same(cut[1:], whole[1:])
  np.testing.assert_allclose(cut[0], whole[0], rtol=0, atol=2e-6)


@slow
def test_bfloat16_in_parts(monkeypatch):
  """Nothing is rounded to 8 bits between parts."""
  inputs = [jnp.asarray(x, jnp.bfloat16) for x in draw(9, 1, 40, 700, 8, 1)]
  how = {"out_dtype": jnp.bfloat16}
  whole = comparison.ours(inputs, *SEGMENTS, **how)
  _scarce(monkeypatch, "one tile of each", inputs)
  cut = comparison.ours(inputs, *SEGMENTS, **how, key="bfloat16 in parts")
  for x, y, exact in zip(cut, whole, comparison.expected(inputs, *SEGMENTS)):
    assert x.dtype == y.dtype
    seen = exact > NEVER
    ours, its = (np.asarray(z, np.float64)[seen] - exact[seen] for z in (x, y))
    assert np.square(ours).mean() < 1.2 * np.square(its).mean() + 1e-12


def test_gathered_sums_are_bounded(monkeypatch):
  """Where the queries are in parts, so are the keys: float32 dk and dv."""
  arrays = traced(40, 700, 8, 1, (jnp.float32,) * 3)[:2]
  one_part = splits(SMALL, *arrays)[1]
  fits = one_part._replace(query_tiles=2)
  tiles = SMALL._replace(vmem=call.backward_vmem(fits, 4))
  assert splits(tiles, *arrays)[1] == fits
  monkeypatch.setattr(call, "SUMS", 2 * 8 * 128 * 256)
  # Two tiles would do, but three parts of one tile are alike.
  assert splits(tiles, *arrays)[1] == fits._replace(key_tiles=1)
  assert splits(SMALL, *arrays)[1] == one_part


# --- refusals ---------------------------------------------------------------


def chip_tiles(name):
  """The tiles of a generation for bfloat16."""
  return CHIPS[name].attention_tiles(jnp.bfloat16)


def traced(queries, keys, heads, kv_heads, dtypes=(jnp.bfloat16,) * 3):
  """Abstract q, k, v and segments."""
  shapes = (queries, heads), (keys, kv_heads), (keys, kv_heads)
  arrays = [
    jax.ShapeDtypeStruct((1, *shape, 128), dtype)
    for shape, dtype in zip(shapes, dtypes)
  ]
  ids = [jax.ShapeDtypeStruct((1, n), jnp.int32) for n in (queries, keys)]
  return *arrays, *ids


def refuse(match, *arrays, tiles=SMALL):
  """Both kernels do."""
  number = jax.ShapeDtypeStruct(arrays[0].shape[:3], jnp.float32)

  def forward(*operands):
    return call.forward(
      *operands, tiles=tiles, out_dtype=jnp.float32, interpret=True
    )

  def backward(*operands):
    return call.backward(*operands, tiles=tiles, interpret=True)

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
    tiles=chip_tiles("v5e")._replace(vmem=3 * MIB),
  )


# --- real sizes -------------------------------------------------------------


CHIP_NAMES = ["v5e", "v5p", "v6e", "tpu7x"]
MODELS = [(16, 2), (28, 4)]  # heads and KV heads of 3B and 7B


def kernels(arrays, tiles):
  """(kernels, loops) of the forward pass and of the backward pass."""
  number = jax.ShapeDtypeStruct(arrays[0].shape[:3], jnp.float32)
  forward = functools.partial(call.forward, tiles=tiles, out_dtype=jnp.bfloat16)
  backward = functools.partial(call.backward, tiles=tiles)
  found = []
  for function, more in (
    (forward, ()),
    (backward, (number, number, arrays[0])),
  ):
    names = list(_primitives(jax.make_jaxpr(function)(*arrays, *more).jaxpr))
    found.append((names.count("pallas_call"), names.count("scan")))
  return found


def _primitives(jaxpr):
  """Names of all operations around the kernels."""
  for equation in jaxpr.eqns:
    yield (name := equation.primitive.name)
    if name == "pallas_call":
      continue
    for inner in jax.tree.leaves(
      list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")
    ):
      inner = getattr(inner, "jaxpr", inner)
      if hasattr(inner, "eqns"):
        yield from _primitives(inner)


@pytest.mark.parametrize("heads, kv_heads", MODELS)
@pytest.mark.parametrize("name", CHIP_NAMES)
def test_an_hour_is_one_call(name, heads, kv_heads):
  """Forward and, if need be, again with the running maximum; backward."""
  arrays = traced(9728, 235520, heads, kv_heads)
  for shape in splits(chip_tiles(name), *arrays[:2]):
    assert 0 <= shape.query_tiles * shape.queries - 9728 < shape.queries
    assert shape.key_tiles * shape.keys == 235520
  if (name, heads) in (("v5e", 16), ("v6e", 28)):  # to trace takes long
    assert kernels(arrays, chip_tiles(name)) == [(2, 0), (1, 0)]


# Three questions about two hours, one about six, a day's at another rate.
LONG = [(32768, 524288), (12288, 1572864), (393216, 6291456)]


@pytest.mark.parametrize("queries, keys", LONG)
@pytest.mark.parametrize("name", ["v4", *CHIP_NAMES])
def test_no_length_is_refused(name, queries, keys):
  """One program for all parts, each within the limits."""
  tiles, arrays = chip_tiles(name), traced(queries, keys, 16, 2)
  if name in ("v4", "v5e"):
    (forward, _), (backward, loops) = kernels(arrays, tiles)
    assert (forward, backward) == (2, 1) and loops
  for dtype in (jnp.bfloat16, jnp.float32):
    tiles = CHIPS[name].attention_tiles(dtype)
    shapes = splits(tiles, *(x.update(dtype=dtype) for x in arrays[:2]))
    for shape in shapes:
      assert call.row_scalars(shape) <= call.SMEM
      assert (
        max(shape.query_tiles, shape.key_tiles) <= block_schedule.MOST_TILES
      )
    assert call.forward_vmem(shapes[0], jnp.dtype(dtype).itemsize) <= tiles.vmem
    assert (
      call.backward_vmem(shapes[1], jnp.dtype(dtype).itemsize) <= tiles.vmem
    )


def test_more_tiles_than_a_block_can_name_are_parts():
  tile = Tiles(128, 128, 128, 128)
  tiles = AttentionTiles(tile, tile, 1 << 40)
  most = block_schedule.MOST_TILES
  for queries, keys in ((1, 128 * most + 1), (128 * most + 1, 1)):
    for shape in splits(tiles, *traced(queries, keys, 1, 1)[:2]):
      assert 1 < max(shape.query_tiles, shape.key_tiles) <= most


@pytest.mark.parametrize("heads, kv_heads", MODELS)
@pytest.mark.parametrize("name", CHIP_NAMES)
def test_an_hour_fits_in_one_part(name, heads, kv_heads):
  """3B and 7B: 9,728 queries and 235,520 keys, each key read once."""
  tiles = chip_tiles(name)

  def look(q, k, v):
    parts, shape = call.split(tiles, q, k)
    assert parts == 1 and shape.keys * shape.key_tiles == 235520
    call.check(q, k, v, shape, call.backward_vmem(shape, 2), tiles)
    shape = call._cut(tiles.forward, q, k)
    assert shape.keys * shape.key_tiles == 235520
    call.check(q, k, v, shape, call.forward_vmem(shape, 2), tiles)
    return q

  jax.eval_shape(look, *traced(9728, 235520, heads, kv_heads)[:3])
