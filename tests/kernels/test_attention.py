"""Attention against a dense float64 reference written in numpy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hourjax.kernels import reference
from hourjax.kernels.attention import attention

slow = pytest.mark.slow
# float32 against float64 on numbers of order 1.
ATOL = 2e-5


def dense(q, k, v, query_segment, key_segment, causal, d_out):
  """(out, dq, dk, dv) in float64, with all T x S scores at once."""
  q, k, v, d_out = (np.asarray(x, np.float64) for x in (q, k, v, d_out))
  groups, scale = q.shape[2] // k.shape[2], q.shape[3] ** -0.5
  keys, values = (np.repeat(x, groups, axis=2) for x in (k, v))
  allowed = query_segment[:, :, None] == key_segment[:, None, :]
  allowed &= (query_segment > 0)[:, :, None]
  if causal:
    allowed &= np.tri(q.shape[1], k.shape[1], dtype=bool)
  score = np.einsum("bthc,bshc->bhts", q, keys) * scale
  score = np.where(allowed[:, None], score, -np.inf)
  top = score.max(-1, keepdims=True)
  weight = np.exp(score - np.where(np.isfinite(top), top, 0.0))
  total = weight.sum(-1, keepdims=True)
  weight = weight / np.where(total > 0, total, 1.0)
  out = np.einsum("bhts,bshc->bthc", weight, values)
  d_values = np.einsum("bhts,bthc->bshc", weight, d_out)
  d_weight = np.einsum("bthc,bshc->bhts", d_out, values)
  mean = (weight * d_weight).sum(-1, keepdims=True)
  d_score = weight * (d_weight - mean) * scale
  dq = np.einsum("bhts,bshc->bthc", d_score, keys)
  d_keys = np.einsum("bhts,bthc->bshc", d_score, q)

  def grouped(x):
    return x.reshape(*k.shape[:3], groups, -1).sum(3)

  return out, dq, grouped(d_keys), grouped(d_values)


# To compile takes longer than to run, so LLVM optimises nothing.
@functools.partial(
  jax.jit,
  static_argnames=("causal", "tiles"),
  compiler_options={"xla_backend_optimization_level": 0},
)
def _call(q, k, v, query_segment, key_segment, d_out, causal, tiles):
  """As `dense`. `tiles` is only a part of the cache's key."""
  del tiles
  out, pull = jax.vjp(
    lambda q, k, v: attention(
      q, k, v, query_segment, key_segment, causal=causal
    ),
    q,
    k,
    v,
  )
  return out, *pull(d_out)


def ours(*inputs, causal=False, d_out):
  q, k, v, query_segment, key_segment = map(jnp.asarray, inputs)
  tiles = (reference.QUERY_TILE, reference.KEY_TILE)
  return _call(
    q, k, v, query_segment, key_segment, jnp.asarray(d_out), causal, tiles
  )


def _draw(seed, rows, queries, keys, heads, kv_heads, dim=8):
  rng = np.random.default_rng(seed)

  def normal(*shape):
    return rng.normal(size=shape).astype(np.float32)

  return (
    normal(rows, queries, heads, dim),
    normal(rows, keys, kv_heads, dim),
    normal(rows, keys, kv_heads, dim),
    normal(rows, queries, heads, dim),
  )


def _segments(*lengths, total):
  """Segments 1, 2, ... of these lengths and padding up to `total`."""
  ids = np.repeat(np.arange(1, len(lengths) + 1), lengths)
  return np.pad(ids, (0, total - len(ids))).astype(np.int32)[None]


def _check(inputs, query_segment, key_segment, causal, atol=ATOL):
  q, k, v, d_out = inputs
  got = ours(q, k, v, query_segment, key_segment, causal=causal, d_out=d_out)
  expected = dense(q, k, v, query_segment, key_segment, causal, d_out)
  for name, x, reference_ in zip(("out", "dq", "dk", "dv"), got, expected):
    np.testing.assert_allclose(
      np.asarray(x, np.float64), reference_, rtol=0, atol=atol, err_msg=name
    )
  return got


@pytest.fixture
def small_tiles(monkeypatch):
  monkeypatch.setattr(reference, "QUERY_TILE", 8)
  monkeypatch.setattr(reference, "KEY_TILE", 16)


# --- numbers ----------------------------------------------------------------


@pytest.mark.parametrize(
  "heads, causal",
  [
    ((28, 4), False),
    pytest.param((3, 3), True, marks=slow),
    pytest.param((16, 2), False, marks=slow),
    pytest.param((16, 2), True, marks=slow),
    pytest.param((28, 4), True, marks=slow),
    pytest.param((3, 3), False, marks=slow),
  ],
)
def test_heads(small_tiles, heads, causal):
  inputs = _draw(0, 1, 29, 29, *heads)
  segment = _segments(12, 15, total=29)
  _check(inputs, segment, segment, causal)


@pytest.mark.parametrize(
  "queries, keys",
  [
    (31, 5),
    pytest.param(1, 1, marks=slow),
    pytest.param(8, 16, marks=slow),
    pytest.param(9, 17, marks=slow),
    pytest.param(7, 50, marks=slow),
    pytest.param(24, 48, marks=slow),
  ],
)
def test_lengths_off_the_tiles(small_tiles, queries, keys):
  inputs = _draw(1, 1, queries, keys, 4, 2)
  _check(
    inputs,
    _segments(queries, total=queries),
    _segments(keys, total=keys),
    False,
  )


@slow
def test_tiles_of_real_size():
  """More than one tile of queries and of keys, as they are set."""
  queries, keys = reference.QUERY_TILE + 100, reference.KEY_TILE + 300
  inputs = _draw(2, 1, queries, keys, 2, 1)
  _check(
    inputs,
    _segments(300, queries - 350, total=queries),
    _segments(keys // 3, keys // 2, total=keys),
    False,
  )


# Most tests have these shapes, of one row or two, so that few functions are
# compiled. Both lengths are three tiles, the last of which is padded.
_ROWS, _QUERIES, _KEYS = 2, 22, 35


@st.composite
def _any_segments(draw, length, ordered):
  ids = draw(st.lists(st.integers(0, 4), min_size=length, max_size=length))
  if ordered:
    ids = sorted(ids, key=lambda n: n or 99)
  return np.array(ids, np.int32)


@settings(max_examples=25)
@given(data=st.data(), ordered=st.booleans(), causal=st.booleans())
def test_any_segments(data, ordered, causal):
  """Also unordered ids, ids that no key has, and rows of padding alone."""
  keys = _QUERIES if causal else _KEYS
  query_segment, key_segment = (
    np.stack([data.draw(_any_segments(n, ordered)) for _ in range(_ROWS)])
    for n in (_QUERIES, keys)
  )
  if causal:
    key_segment = query_segment
  inputs = _draw(3, _ROWS, _QUERIES, keys, 4, 2)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(reference, "QUERY_TILE", 8)
    patch.setattr(reference, "KEY_TILE", 16)
    _check(inputs, query_segment, key_segment, causal)


def test_rows_are_independent(small_tiles):
  inputs = _draw(4, _ROWS, _QUERIES, _QUERIES, 4, 2)
  segment = np.concatenate(
    [_segments(n, total=_QUERIES) for n in (_QUERIES, 5)]
  )
  got = _check(inputs, segment, segment, True)
  alone = [x[1:] for x in inputs]
  for x, expected in zip(got, _check(alone, segment[1:], segment[1:], True)):
    np.testing.assert_allclose(x[1:], expected, rtol=0, atol=1e-6)


def test_large_scores_do_not_overflow(small_tiles):
  q, k, v, d_out = _draw(5, 1, _QUERIES, _KEYS, 4, 2)
  segments = (_segments(n, total=n) for n in (_QUERIES, _KEYS))
  segments = tuple(segments)
  got = ours(q * 100, k * 100, v, *segments, d_out=d_out)
  for x in got:
    assert np.isfinite(x).all()
  out = dense(q * 100, k * 100, v, *segments, False, d_out)[0]
  np.testing.assert_allclose(got[0], out, rtol=0, atol=1e-2)


@slow
@pytest.mark.parametrize("causal", [False, True])
def test_bfloat16(small_tiles, causal):
  inputs = [jnp.asarray(x, jnp.bfloat16) for x in _draw(6, 1, 40, 40, 4, 2)]
  segment = _segments(30, 8, total=40)
  got = _check(inputs, segment, segment, causal, atol=0.06)
  assert {x.dtype for x in got} == {jnp.dtype(jnp.bfloat16)}


# --- padding ----------------------------------------------------------------


def test_queries_that_see_nothing_get_zeros_and_pass_no_gradient(small_tiles):
  q, k, v, d_out = _draw(7, 1, _QUERIES, _KEYS, 4, 2)
  query_segment = _segments(7, 5, total=_QUERIES)  # 10 of padding
  key_segment = np.where(_segments(28, total=_KEYS) == 1, 2, 0).astype(np.int32)
  out, dq, dk, dv = _check((q, k, v, d_out), query_segment, key_segment, False)
  blind = query_segment[0] != 2
  assert blind.sum() == 17
  assert not out[0, blind].any() and not dq[0, blind].any()
  assert not dk[0, 28:].any() and not dv[0, 28:].any()
  assert dk[0, :28].all() and dv[0, :28].all()


def test_a_row_without_any_key_gives_zeros(small_tiles):
  q, k, v, d_out = _draw(8, 1, _QUERIES, _KEYS, 4, 2)
  nothing = np.zeros((1, _KEYS), np.int32)
  for x in ours(q, k, v, nothing[:, :_QUERIES], nothing, d_out=d_out):
    assert not x.any()


@pytest.mark.parametrize("causal", [pytest.param(False, marks=slow), True])
def test_padding_may_hold_anything(small_tiles, causal):
  """Bit for bit the same with large numbers in all unused places."""
  clean = _draw(9, 1, _QUERIES, _QUERIES, 4, 2)
  segment = _segments(7, 9, total=_QUERIES)
  unused = segment[0] == 0
  dirty = [x.copy() for x in clean]
  for x in dirty[:3]:
    x[0, unused] = 1e4
  dirty[3][0, unused] = 1e4  # the output's gradient
  arguments = {"causal": causal}
  expected = ours(*clean[:3], segment, segment, d_out=clean[3], **arguments)
  got = ours(*dirty[:3], segment, segment, d_out=dirty[3], **arguments)
  for x, reference_ in zip(got, expected):
    np.testing.assert_array_equal(x, reference_)


# --- memory -----------------------------------------------------------------

_T, _S, _HEADS, _KV, _DIM = 1024, 3072, 2, 1, 4


def _largest(jaxpr) -> int:
  """Numbers in the largest value of a jaxpr and of all jaxprs within."""
  largest = 0
  for equation in jaxpr.eqns:
    for variable in equation.outvars:
      largest = max(largest, variable.aval.size)
    for inner in jax.core.jaxprs_in_params(equation.params):
      largest = max(largest, _largest(inner))
  return largest


def _layer(x, memory, segment, memory_segment, weight, causal=False):
  """Attention whose queries, keys and values all need a gradient."""
  q = (x * weight).reshape(1, _T, _HEADS, _DIM)
  k = (memory * weight).reshape(1, -1, _KV, _DIM)
  out = attention(q, k, k, segment, memory_segment, causal=causal)
  return x + out.reshape(1, _T, -1)


@pytest.mark.parametrize("remat", [False, True])
@pytest.mark.parametrize("layers", [0, 3])
@pytest.mark.parametrize("causal", [False, True])
def test_no_matrix_of_queries_by_keys(monkeypatch, causal, layers, remat):
  """Neither forward nor backward, in a scan over layers or alone.

  What does not depend on a scan's carry is hoisted when it is differentiated:
  the masks of all tiles were once kept so, T x S of them.
  """
  monkeypatch.setattr(reference, "QUERY_TILE", 64)
  monkeypatch.setattr(reference, "KEY_TILE", 128)
  keys = _T if causal else _S
  x = jnp.zeros((1, _T, _HEADS * _DIM))
  memory = jnp.zeros((1, keys, _KV * _DIM))
  segment = jnp.ones((1, _T), jnp.int32)
  memory_segment = jnp.ones((1, keys), jnp.int32)

  def layer(x, weight, memory):
    return _layer(x, memory, segment, memory_segment, weight, causal)

  if remat:
    layer = jax.checkpoint(layer)

  def loss(x, memory, weights):
    if not layers:
      return layer(x, weights[0], memory).sum()
    step = lambda x, weight: (layer(x, weight, memory), None)  # noqa: E731
    return jax.lax.scan(step, x, weights)[0].sum()

  weights = jnp.ones(max(layers, 1))
  traced = jax.make_jaxpr(jax.grad(loss, argnums=(0, 1, 2)))(x, memory, weights)
  # Each layer keeps its input and what attention saves; far below T x S.
  allowed = (max(layers, 1) + 1) * 4 * max(x.size, memory.size)
  assert allowed < _T * keys / 3
  assert _largest(traced.jaxpr) <= allowed


# --- refusals ---------------------------------------------------------------


def test_heads_must_be_shared_evenly():
  q, k, v, _ = _draw(0, 1, 4, 4, 3, 2)
  ids = jnp.ones((1, 4), jnp.int32)
  with pytest.raises(ValueError, match="3 query heads cannot share 2 KV"):
    attention(*map(jnp.asarray, (q, k, v)), ids, ids)


def test_causal_needs_as_many_keys_as_queries():
  q, k, v, _ = _draw(0, 1, 4, 6, 2, 2)
  ids = jnp.ones((1, 6), jnp.int32)
  with pytest.raises(ValueError, match="got 6 keys for 4 queries"):
    attention(*map(jnp.asarray, (q, k, v)), ids[:, :4], ids, causal=True)


@pytest.mark.parametrize("queries, keys", [(0, 4), (4, 0)])
def test_nothing_to_attend_with(queries, keys):
  q, k, v, _ = _draw(0, 1, queries, keys, 2, 2)
  ids = jnp.ones((1, 4), jnp.int32)
  with pytest.raises(ValueError, match=f"got {queries} queries and {keys}"):
    attention(*map(jnp.asarray, (q, k, v)), ids[:, :queries], ids[:, :keys])
