"""Attention in parts gives what one call gives, wherever it is cut."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hourjax.kernels import chunking
from tests.kernels.test_attention import _draw, dense

ATOL = 2e-5  # float32 against float64 on numbers of order 1
NEVER = np.float32(-1e30)
QUERIES, KEYS = 24, 90

# Queries and keys of a part. Cuts fall on ends of segments and within them,
# the last part is full or nearly empty, a part may be one query or key.
CUTS = [
  pytest.param(24, 30, marks=pytest.mark.slow),
  pytest.param(8, 90, marks=pytest.mark.slow),
  (7, 40),
  pytest.param(1, 1, marks=pytest.mark.slow),
]
SEGMENTS = {
  # Segment 1 ends at key 30, 2 is in all parts, no key is of 4, no query of 3.
  "several": ([(1, 8), (2, 9), (4, 3)], [(1, 30), (2, 31), (3, 9)]),
  "one": ([(1, 24)], [(1, 90)]),
  # The first 40 keys are padding and so are the last: parts without any.
  "late": ([(1, 10), (2, 14)], [(0, 40), (2, 20)]),
  "none": ([(1, 24)], [(2, 90)]),
  "out of order": ([(3, 9), (1, 9)], [(1, 20), (3, 30), (1, 20)]),
}


def _ids(runs, total):
  ids = np.repeat(*np.array(runs, np.int32).T)
  return np.pad(ids, (0, total - len(ids)))


def _segments(name):
  """Of two rows: these, and the same backwards."""
  pair = zip(SEGMENTS[name], (QUERIES, KEYS))
  ids = (_ids(runs, total) for runs, total in pair)
  return [np.stack([x, x[::-1]]) for x in ids]


def _weights(q, k, query_segment, key_segment, top, offset=None):
  """float32 [B, K, G, T, S]: exp(score - top), 0 where it is not seen."""
  q = q.reshape(*q.shape[:2], k.shape[2], -1, q.shape[3])
  score = _sum("btkgc,bskc->bkgts", q, k) * q.shape[-1] ** -0.5
  seen = query_segment[:, :, None] == key_segment[:, None]
  seen = seen & (key_segment > 0)[:, None]
  if offset is not None:
    index = jnp.arange(q.shape[1])[:, None] + offset
    seen = seen & (jnp.arange(k.shape[1])[None] <= index)[None]
  seen = seen[:, None, None]
  score = jnp.where(seen, score, NEVER)
  top = score.max(-1) if top is None else _folded(top, k)
  return jnp.where(seen, jnp.exp(score - top[..., None]), 0.0), top


def _folded(x, k):
  """[B, T, H] to [B, K, G, T]."""
  x = x.reshape(*x.shape[:2], k.shape[2], -1)
  return jnp.moveaxis(x, 1, 3)


def _sum(spec, a, b):
  return jnp.einsum(spec, a, b, preferred_element_type=jnp.float32)


def _forward(q, k, v, *segments, out_dtype, offset=None):
  """The contract of `reference.forward`, quick to compile."""
  weight, top = _weights(q, k, *segments, None, offset)
  total = weight.sum(-1)
  safe = jnp.where(total > 0, total, 1.0)
  out = _sum("bkgts,bskc->btkgc", weight.astype(v.dtype), v)
  out = out / jnp.moveaxis(safe, 3, 1)[..., None]
  lse = jnp.where(total > 0, top + jnp.log(safe), NEVER)
  lse = jnp.moveaxis(lse, 3, 1).reshape(q.shape[:3])
  return out.reshape(q.shape).astype(out_dtype), lse


def _backward(q, k, v, *others, grad_dtype, offset=None):
  """That of `reference.backward`."""
  *segments, lse, delta, d_out = others
  weight, _ = _weights(q, k, *segments, lse, offset)
  grouped = (*q.shape[:2], k.shape[2], -1, q.shape[3])
  q_, d_out = q.reshape(grouped), d_out.reshape(grouped)
  d_weight = _sum("btkgc,bskc->bkgts", d_out, v)
  d_score = weight * (d_weight - _folded(delta, k)[..., None])
  d_score, weight = (x.astype(k.dtype) for x in (d_score, weight))
  scale = q.shape[-1] ** -0.5
  dq = _sum("bkgts,bskc->btkgc", d_score, k).reshape(q.shape) * scale
  dk = _sum("bkgts,btkgc->bskc", d_score, q_) * scale
  dv = _sum("bkgts,btkgc->bskc", weight, d_out)
  return dq, dk.astype(grad_dtype), dv.astype(grad_dtype)


# To compile takes longer than to run.
@functools.partial(
  jax.jit,
  static_argnames=("queries", "keys", "causal"),
  compiler_options={"xla_backend_optimization_level": 0},
)
def _ours(
  q, k, v, d_out, query_segment, key_segment, queries, keys, causal=False
):
  """(out, dq, dk, dv, lse)"""
  arrays = q, k, v, query_segment, key_segment
  how = {"queries": queries, "keys": keys, "causal": causal}
  out, lse = chunking.forward(_forward, *arrays, **how, out_dtype=q.dtype)
  delta = (out.astype(jnp.float32) * d_out.astype(jnp.float32)).sum(-1)
  numbers = jnp.where(lse == NEVER, 1e30, lse), delta, d_out
  return out, *chunking.backward(_backward, *arrays, *numbers, **how), lse


def _inputs(dtype=jnp.float32):
  inputs = _draw(0, 2, QUERIES, KEYS, 4, 2, dim=8)
  return [jnp.asarray(x, dtype) for x in inputs]


@pytest.mark.parametrize("queries, keys", CUTS)
@pytest.mark.parametrize("name", SEGMENTS)
def test_float64(name, queries, keys):
  inputs, segments = _inputs(), _segments(name)
  *got, lse = _ours(*inputs, *segments, queries=queries, keys=keys)
  q, k, v, d_out = inputs
  expected = dense(q, k, v, *segments, False, d_out)
  for what, x, y in zip(("out", "dq", "dk", "dv"), got, expected, strict=True):
    np.testing.assert_allclose(x, y, rtol=0, atol=ATOL, err_msg=what)
  shared = segments[0][:, :, None] == segments[1][:, None]
  blind = ~(shared & (segments[0] > 0)[:, :, None]).any(-1)
  whole = _ours(*inputs, *segments, queries=QUERIES, keys=KEYS)
  np.testing.assert_allclose(lse, whole[-1], rtol=2e-6, atol=ATOL)
  assert (lse[blind] == NEVER).all()
  assert not got[0][blind].any() and not got[1][blind].any()


@pytest.mark.parametrize(
  "queries, keys", [(40, 30), pytest.param(7, 90, marks=pytest.mark.slow)]
)
def test_causal(queries, keys):
  """Some parts of the keys lie wholly after a part of the queries."""
  inputs = [jnp.asarray(x) for x in _draw(1, 2, KEYS, KEYS, 4, 2, dim=8)]
  ids = _ids([(1, 30), (2, 31), (3, 9)], KEYS)
  segment = np.stack([ids, ids[::-1]])
  how = {"queries": queries, "keys": keys, "causal": True}
  *got, _ = _ours(*inputs, segment, segment, **how)
  q, k, v, d_out = inputs
  expected = dense(q, k, v, segment, segment, True, d_out)
  for what, x, y in zip(("out", "dq", "dk", "dv"), got, expected, strict=True):
    np.testing.assert_allclose(x, y, rtol=0, atol=ATOL, err_msg=what)


@pytest.mark.slow
@pytest.mark.parametrize("queries, keys", CUTS[:3])
def test_bfloat16(queries, keys):
  """Sums over parts are float32: nothing is rounded more often than in one."""
  inputs, segments = _inputs(jnp.bfloat16), _segments("several")
  got = _ours(*inputs, *segments, queries=queries, keys=keys)
  whole = _ours(*inputs, *segments, queries=QUERIES, keys=KEYS)
  q, k, v, d_out = inputs
  exact = dense(q, k, v, *segments, False, d_out)
  for x, y, reference in zip(got, whole, exact):
    assert x.dtype == y.dtype
    ours, its = (np.asarray(z, np.float64) - reference for z in (x, y))
    assert np.square(ours).mean() < 1.2 * np.square(its).mean()


def test_the_same_bits_twice():
  inputs, segments = _inputs(), _segments("several")
  first, second = (
    _ours(*inputs, *segments, queries=7, keys=40) for _ in range(2)
  )
  for x, y in zip(first, second, strict=True):
    np.testing.assert_array_equal(x, y)


def test_unused_places_may_hold_anything():
  """Not even padding that is cut off, or a part of padding alone, matters."""
  clean, segments = _inputs(), _segments("late")
  unused = [x == 0 for x in (segments[0], segments[1], segments[1])]
  unused.append(unused[0])
  dirty = [
    jnp.where(there[:, :, None, None], 1e4, x)
    for x, there in zip(clean, unused, strict=True)
  ]
  results = (_ours(*x, *segments, queries=7, keys=40) for x in (clean, dirty))
  for x, y in zip(*results, strict=True):
    np.testing.assert_array_equal(x, y)


@pytest.mark.slow
def test_scores_that_rise_from_part_to_part():
  """By more than exp has room for, up and down again."""
  q, k, v, d_out = _inputs()
  steps = np.repeat([0.0, 300.0, -300.0], 30).astype(np.float32)
  q, k = jnp.abs(q), jnp.abs(k) * 0.1 + steps[None, :, None, None] * 0.1
  segments = _segments("one")
  *got, lse = _ours(q, k, v, d_out, *segments, queries=24, keys=30)
  assert all(np.isfinite(x).all() for x in (*got, lse))
  expected = dense(q, k, v, *segments, False, d_out)
  for x, y in zip(got, expected, strict=True):
    scale = max(1.0, np.abs(y).max())
    np.testing.assert_allclose(x, y, rtol=0, atol=2e-3 * scale)


def test_one_part_is_the_call_itself():
  """The arrays as they are: neither padded, nor cut, nor summed."""
  arrays = [jnp.zeros((1, n, 1, 1)) for n in (5, 9, 9)]
  given = arrays[0], arrays[0]
  ids = [jnp.zeros((1, n), int) for n in (5, 9)]

  def forward(*operands, out_dtype):
    assert all(x is y for x, y in zip(operands, (*arrays, *ids), strict=True))
    return given

  how = {"queries": 5, "keys": 9}
  assert chunking.forward(forward, *arrays, *ids, **how, out_dtype=int) is given
  numbers, gradients = arrays[:1] * 3, tuple(arrays)

  def backward(*operands, grad_dtype):
    wanted = (*arrays, *ids, *numbers)
    assert all(x is y for x, y in zip(operands, wanted, strict=True))
    assert grad_dtype == arrays[1].dtype
    return gradients

  assert (
    chunking.backward(backward, *arrays, *ids, *numbers, **how) is gradients
  )


@pytest.mark.parametrize(
  "total, most, step, length",
  [(100, 64, 8, 56), (64, 64, 8, 64), (65, 64, 64, 64), (1, 64, 8, 8)],
)
def test_even_parts(total, most, step, length):
  assert chunking.even_length(total, most, step) == length
