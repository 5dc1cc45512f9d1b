"""The Triton kernels, interpreted, against dense float64, and their lowering.

Without a GPU this checks their numbers and that JAX makes Triton's code of
them; not what Triton makes of that code, and not its speed.
"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hourjax.kernels import triton
from tests.kernels.test_attention import dense

# float32 against float64 on numbers of order 1.
ATOL = 2e-5
NAMES = ("out", "dq", "dk", "dv")
REAL_TILES = dict(triton.TILES)
SHAPE = (1, 64, 96, 4, 2)  # several tests share what is compiled for it
slow = pytest.mark.slow


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
  """All different, so that no size can stand for another."""
  sizes = {"forward": (16, 32), "dq": (8, 16), "dkv": (32, 8)}
  for name, size in REAL_TILES:
    tile = triton.Tile(*sizes[name], warps=4, stages=2)
    monkeypatch.setitem(triton.TILES, (name, size), tile)


# To compile takes longer than to run.
jit = functools.partial(
  jax.jit, compiler_options={"xla_backend_optimization_level": 0}
)


@functools.partial(jit, static_argnames="causal")
def call(q, k, v, query_segment, key_segment, d_out, causal=False):
  """(out, dq, dk, dv, lse)"""
  segments = query_segment, key_segment
  how = {"causal": causal, "interpret": True}
  out, lse = triton.forward(q, k, v, *segments, **how)
  delta = (out.astype(jnp.float32) * d_out.astype(jnp.float32)).sum(-1)
  all_lse = jnp.where(lse == -1e30, 1e30, lse)
  gradients = triton.backward(q, k, v, *segments, all_lse, delta, d_out, **how)
  return out, *gradients, lse


def _draw(seed, rows, queries, keys, heads, kv_heads, dim=8):
  """q, k, v, d_out"""
  rng = np.random.default_rng(seed)
  q, k = (rows, queries, heads, dim), (rows, keys, kv_heads, dim)
  return [rng.normal(size=x).astype(np.float32) for x in (q, k, k, q)]


def _segments(*lengths, total):
  """Segments 1, 2, ... of these lengths and padding up to `total`."""
  ids = np.repeat(np.arange(1, len(lengths) + 1), lengths)
  return np.pad(ids, (0, total - len(ids))).astype(np.int32)[None]


def _lse(q, k, query_segment, key_segment, causal):
  q, k = np.asarray(q, np.float64), np.asarray(k, np.float64)
  k = np.repeat(k, q.shape[2] // k.shape[2], axis=2)
  seen = query_segment[:, :, None] == key_segment[:, None]
  seen &= (query_segment > 0)[:, :, None]
  if causal:
    seen &= np.tri(*seen.shape[1:], dtype=bool)
  score = np.einsum("bthc,bshc->bths", q, k) * q.shape[3] ** -0.5
  score = np.where(seen[:, :, None], score, -np.inf)
  top = np.maximum(score.max(-1), -1e30)
  total = np.exp(score - top[..., None]).sum(-1)
  return np.where(total > 0, top + np.log(np.maximum(total, 1e-300)), -1e30)


def _check(inputs, query_segment, key_segment, causal=False, atol=ATOL):
  q, k, v, d_out = inputs
  segments = query_segment, key_segment
  got = call(q, k, v, *segments, d_out, causal=causal)
  expected = dense(q, k, v, *segments, causal, d_out)
  expected = (*expected, _lse(q, k, *segments, causal))
  # rtol for -1e30, which float32 rounds.
  _close((*NAMES, "lse"), got, expected, rtol=1e-6, atol=atol)
  return got


def _close(names, got, expected, rtol=0, atol=ATOL):
  for name, x, reference in zip(names, got, expected, strict=True):
    x = np.asarray(x, np.float64)
    np.testing.assert_allclose(x, reference, rtol, atol, err_msg=name)


# --- numbers ----------------------------------------------------------------


_3B, _7B = (16, 2), (28, 4)


@pytest.mark.parametrize(
  "heads, causal",
  [
    pytest.param(_3B, False, marks=slow),
    (_7B, False),
    pytest.param(_7B, True, marks=slow),
    pytest.param((4, 2), True, marks=slow),
    pytest.param((3, 3), False, marks=slow),
  ],
)
def test_heads(heads, causal):
  segment = _segments(30, 27, total=61)
  _check(_draw(0, 1, 61, 61, *heads), segment, segment, causal)


@pytest.mark.parametrize(
  "queries, keys",
  [
    (1, 1),
    pytest.param(17, 33, marks=slow),
    pytest.param(40, 5, marks=slow),
  ],
)
def test_lengths_off_the_tiles(queries, keys):
  ids = _segments(queries, total=queries), _segments(keys, total=keys)
  _check(_draw(1, 1, queries, keys, 4, 2), *ids)


@slow
@pytest.mark.parametrize("dim", [1, 80])
def test_head_dims(dim):
  ids = _segments(9, total=9), _segments(20, total=20)
  _check(_draw(2, 1, 9, 20, 4, 2, dim), *ids)


@pytest.mark.parametrize("ordered", [True, False])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("seed", range(6))
def test_any_segments(seed, causal, ordered):
  """Also unordered ids, ids that no key has, and a row of padding alone."""
  rng = np.random.default_rng(seed)
  keys = 70 if causal else 101
  query_segment = rng.integers(0, 6, (3, 70), np.int32)
  key_segment = rng.integers(0, 6, (3, keys), np.int32)
  key_segment[key_segment == 3] = 4
  query_segment[1] = 0
  if ordered:
    query_segment.sort(1)
    key_segment.sort(1)
  if causal:
    key_segment = query_segment
  _check(_draw(3, 3, 70, keys, 4, 2), query_segment, key_segment, causal)


def test_large_scores_do_not_overflow():
  q, k, v, d_out = _draw(4, *SHAPE)
  segments = _segments(64, total=64), _segments(96, total=96)
  got = call(q * 100, k * 100, v, *segments, d_out)
  assert all(np.isfinite(x).all() for x in got)
  out = dense(q * 100, k * 100, v, *segments, False, d_out)[0]
  np.testing.assert_allclose(got[0], out, rtol=0, atol=1e-2)


@pytest.mark.parametrize("causal", [False, pytest.param(True, marks=slow)])
def test_bfloat16(causal):
  inputs = [jnp.asarray(x, jnp.bfloat16) for x in _draw(5, 1, 60, 60, 4, 2)]
  segment = _segments(40, 18, total=60)
  out, dq, dk, dv, lse = _check(inputs, segment, segment, causal, atol=0.06)
  assert {x.dtype for x in (out, dk, dv)} == {jnp.dtype(jnp.bfloat16)}
  assert {x.dtype for x in (dq, lse)} == {jnp.dtype(jnp.float32)}


def test_same_bits_twice():
  q, k, v, d_out = _draw(7, *SHAPE)
  ids = _segments(20, 40, total=64), _segments(30, 60, total=96)
  first, second = (call(q, k, v, *ids, d_out) for _ in range(2))
  for x, again in zip(first, second):
    np.testing.assert_array_equal(x, again)


@slow
@pytest.mark.parametrize("dtype, atol", [("float32", ATOL), ("bfloat16", 0.06)])
def test_keys_over_two_devices(dtype, atol):
  """Half of the keys at a time, with the LSE and the output of all.

  Segment 1 lies in the first half, 3 in the second, 2 in both, and queries
  of segment 4 see nothing in either.
  """
  q, k, v, d_out = (jnp.asarray(x, dtype) for x in _draw(8, 1, 60, 90, 4, 2))
  query_segment = _segments(10, 20, 15, 10, total=60)
  key_segment = _segments(30, 31, 20, total=90)
  halves = [(x[:, :45], x[:, 45:]) for x in (k, v, key_segment)]
  memory = [(q, k, v, query_segment, ids) for k, v, ids in zip(*halves)]
  how = {"out_dtype": jnp.float32, "interpret": True}
  forward = jit(functools.partial(triton.forward, **how))
  backward = jit(functools.partial(triton.backward, interpret=True))
  parts = [forward(*half) for half in memory]
  assert (parts[0][0] != parts[0][0].astype(jnp.bfloat16)).any()
  lse = jnp.logaddexp(parts[0][1], parts[1][1])
  out = sum(x * jnp.exp(part - lse)[..., None] for x, part in parts)
  lse = jnp.where(lse < -1e29, 1e30, lse)
  delta = (out * d_out.astype(jnp.float32)).sum(-1)
  gradients = [backward(*half, lse, delta, d_out) for half in memory]
  (dq0, dk0, dv0), (dq1, dk1, dv1) = gradients
  got = out, dq0 + dq1, jnp.hstack([dk0, dk1]), jnp.hstack([dv0, dv1])
  expected = dense(q, k, v, query_segment, key_segment, False, d_out)
  _close(NAMES, got, expected, atol=atol)
  assert not got[0][0, 45:].any() and not got[1][0, 45:].any()


# --- padding ----------------------------------------------------------------


def test_queries_that_see_nothing_get_zeros_and_pass_no_gradient():
  inputs = _draw(9, *SHAPE)
  query_segment = _segments(20, 17, total=64)  # 27 of padding
  key_segment = np.where(_segments(40, total=96) == 1, 2, 0).astype(np.int32)
  out, dq, dk, dv, lse = _check(inputs, query_segment, key_segment)
  blind = query_segment[0] != 2
  assert blind.sum() == 47
  assert not out[0, blind].any() and not dq[0, blind].any()
  assert (lse[0, blind] == np.float32(-1e30)).all()
  assert not dk[0, 40:].any() and not dv[0, 40:].any()
  assert dk[0, :40].all() and dv[0, :40].all()


@pytest.mark.parametrize(
  "dtype, causal",
  [
    pytest.param("float32", False, marks=slow),
    pytest.param("float32", True, marks=slow),
    pytest.param("bfloat16", False),  # as test_bfloat16
    pytest.param("bfloat16", True, marks=slow),
  ],
)
def test_padding_may_hold_anything(dtype, causal):
  """Bit for bit the same with large numbers in all unused places."""
  clean = [jnp.asarray(x, dtype) for x in _draw(10, 1, 60, 60, 4, 2)]
  segment = _segments(9, 36, total=60)
  segment[0, 20:23] = 0
  unused = (segment == 0)[:, :, None, None]
  dirty = [jnp.where(unused, 1e4, x) for x in clean]
  results = [
    call(q, k, v, segment, segment, d_out, causal=causal)
    for q, k, v, d_out in (clean, dirty)
  ]
  for x, reference in zip(*results):
    np.testing.assert_array_equal(x, reference)


# --- tiles ------------------------------------------------------------------


def _looped(query_segment, key_segment, tile, causal=False):
  """[n_q, n_k] booleans, as the query tiles and as the key tiles have it."""
  pair = jnp.asarray(query_segment), jnp.asarray(key_segment)
  n_q, n_k = pair[0].size // tile.query, pair[1].size // tile.key

  def table(by_key, n):
    low, high = triton._ranges(*pair, tile, causal, by_key)[0].T
    at = np.arange(n)
    return np.array((low[:, None] <= at[None]) & (at[None] < high[:, None]))

  return table(False, n_k), table(True, n_q).T


def test_ranges_of_the_docstring():
  query, key = np.array([[1, 1, 1, 2, 0, 0]]), np.array([[1, 1, 2, 2]])
  expected = [[True, False], [True, True], [False, False]]
  for looped in _looped(query, key, triton.Tile(2, 2, 1, 1)):
    np.testing.assert_array_equal(looped, expected)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("ordered", [False, True])
def test_ranges_miss_no_pair_and_are_tight_in_order(ordered, causal):
  rng = np.random.default_rng(0)
  tile = triton.Tile(4, 2, 1, 1)
  for _ in range(20):
    query = rng.integers(0, 9, (1, 24), np.int32)
    key = query if causal else rng.integers(1, 9, (1, 30), np.int32)
    if ordered:
      query.sort(1)
      key.sort(1)
    seen = (key == query.T) & (query.T > 0)
    if causal:
      seen &= np.tri(24, dtype=bool)
    needed = seen.reshape(6, 4, -1, 2).any((1, 3))
    for looped in _looped(query, key, tile, causal):
      assert not (needed & ~looped).any()
      if ordered and causal:
        # Equal ids are neighbours: what is looped over is what is needed.
        np.testing.assert_array_equal(looped, needed)


def test_tiles_of_other_segments_are_not_read():
  """NaN would spread through a product even where the weight is 0."""
  q, k, v, d_out = _draw(11, *SHAPE)
  query_segment = _segments(32, 32, total=64)
  key_segment = _segments(32, 32, 32, total=96)
  k[0, 64:] = v[0, 64:] = np.nan  # segment 3
  out, dq, *_ = call(q, k, v, query_segment, key_segment, d_out)
  assert np.isfinite(out).all() and np.isfinite(dq).all()


# --- lowering for a GPU, without one ----------------------------------------


def _export(function, *shapes):
  # JAX promises no stability of this call between versions; we only look.
  target = jax.export.DisabledSafetyCheck.custom_call("__gpu$xla.gpu.triton")
  export = jax.export.export(
    jax.jit(function), platforms=["cuda"], disabled_checks=[target]
  )
  return export(*shapes).mlir_module()


@pytest.mark.parametrize(
  "keys, heads, causal",
  [
    (235520, _3B, False),
    pytest.param(235520, _7B, False, marks=slow),
    pytest.param(9728, _3B, True, marks=slow),
  ],
)
def test_lowers_for_cuda(monkeypatch, keys, heads, causal):
  monkeypatch.setattr(triton, "TILES", REAL_TILES)
  shape, queries, (heads, kv_heads) = jax.ShapeDtypeStruct, 9728, heads
  q = shape((1, queries, heads, 128), jnp.bfloat16)
  k = shape((1, keys, kv_heads, 128), jnp.bfloat16)
  ids = [shape((1, n), jnp.int32) for n in (queries, keys)]
  stats = [shape((1, queries, heads), jnp.float32)] * 2
  forward = functools.partial(triton.forward, causal=causal)
  backward = functools.partial(triton.backward, causal=causal)
  for module, kernels in (
    (_export(forward, q, k, k, *ids), 1),
    (_export(backward, q, k, k, *ids, *stats, q), 2),
  ):
    assert module.count("custom_call @__gpu$xla.gpu.triton") == kernels
    # Real lengths are whole tiles: nothing is padded, so nothing copied.
    assert not re.findall(r"high = \[[^]]*[1-9]", module)


def test_float32_products_are_not_cut_to_tf32():
  """Which only a GPU would show."""
  x, ids = jnp.ones((1, 8, 2, 16)), jnp.ones((1, 8), jnp.int32)
  stats = jnp.ones((1, 8, 2))
  inputs = (x, x, x, ids, ids)
  exact = "precision=(Precision.HIGHEST, Precision.HIGHEST)"
  for function, others, products in (
    (triton.forward, (), 2),
    (triton.backward, (stats, stats, x), 7),
  ):
    jaxpr = str(jax.make_jaxpr(function)(*inputs, *others))
    assert jaxpr.count("dot_general[") == jaxpr.count(exact) == products


# --- refusals ---------------------------------------------------------------


@pytest.mark.parametrize(
  "keys, dim, dtypes, message",
  [
    (9, 256, ("float32", "float32"), "head dim 256 > 128"),
    (9, 8, ("float32", "bfloat16"), "got float32, bfloat16, bfloat16"),
    (9, 8, ("float16", "float16"), "got float16, float16, float16"),
  ],
)
def test_refusals(keys, dim, dtypes, message):
  q = jax.ShapeDtypeStruct((1, 4, 2, dim), dtypes[0])
  k = jax.ShapeDtypeStruct((1, keys, 1, dim), dtypes[1])
  ids = [jax.ShapeDtypeStruct((1, n), jnp.int32) for n in (4, keys)]
  with pytest.raises(ValueError, match=message):
    jax.eval_shape(triton.forward, q, k, k, *ids)


def test_a_causal_row_of_more_elements_than_an_index_is_refused(monkeypatch):
  """Which takes a million positions; others are computed in parts."""
  monkeypatch.setattr(triton, "_MAX_ELEMENTS", 2 * 64 * 16)
  q = jax.ShapeDtypeStruct((1, 65, 2, 8), jnp.float32)
  k = jax.ShapeDtypeStruct((1, 65, 1, 8), jnp.float32)
  ids = [jax.ShapeDtypeStruct((1, 65), jnp.int32)] * 2
  message = "at most 64 queries of 2 heads, got 65; shard them"
  with pytest.raises(ValueError, match=message):
    jax.eval_shape(
      functools.partial(triton.forward, causal=True), q, k, k, *ids
    )


# --- parts ------------------------------------------------------------------


@pytest.mark.parametrize(
  "dtype, atol",
  [
    pytest.param("float32", ATOL, marks=slow),
    pytest.param("bfloat16", 0.06, marks=slow),
  ],
)
def test_more_elements_than_an_index(monkeypatch, dtype, atol):
  """Three parts of the keys, the last of padding and segment 3, two of q.

  No other test has this shape: what is compiled is compiled with this limit.
  """
  monkeypatch.setattr(triton, "_MAX_ELEMENTS", 2048 + 100)
  inputs = [jnp.asarray(x, dtype) for x in _draw(12, 1, 61, 150, 4, 2)]
  ids = _segments(20, 30, total=61), _segments(64, 64, 9, total=150)
  assert triton._check(*inputs[:3], causal=False) == {"queries": 32, "keys": 64}
  *got, lse = _check(inputs, *ids, atol=atol)
  assert (lse[0, 50:] == np.float32(-1e30)).all()
  assert not got[2][0, 128:].any() and not got[3][0, 128:].any()


@slow
def test_a_day_of_video_lowers_for_cuda(monkeypatch):
  """7B: more elements of keys than an index has numbers for."""
  monkeypatch.setattr(triton, "TILES", REAL_TILES)
  shape, (heads, kv_heads) = jax.ShapeDtypeStruct, _7B
  queries, keys = 9728, 24 * 3600 * 65
  q = shape((1, queries, heads, 128), jnp.bfloat16)
  k = shape((1, keys, kv_heads, 128), jnp.bfloat16)
  ids = [shape((1, n), jnp.int32) for n in (queries, keys)]
  stats = [shape((1, queries, heads), jnp.float32)] * 2
  for function, more, kernels in (
    (triton.forward, (), 1),
    (triton.backward, (*stats, q), 2),
  ):
    module = _export(function, q, k, k, *ids, *more)
    assert module.count("custom_call @__gpu$xla.gpu.triton") == kernels
