"""Attention to a cache, and attention by key, against float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hourjax.kernels import attention as calls

# To compile takes longer than to run, so LLVM optimises nothing.
_jit = functools.partial(
  jax.jit, compiler_options={"xla_backend_optimization_level": 0}
)
attention = _jit(calls.attention, static_argnames="causal")
cached_attention = _jit(calls.cached_attention)
key_attention = _jit(calls.key_attention)

RNG = np.random.default_rng(7)


def _normal(*shape):
  return RNG.normal(size=shape)


def _weights(q, k, seen):
  """float64 softmax weights [B, H, n, S]; `seen` is [B, n, S]."""
  groups = q.shape[2] // k.shape[2]
  k = np.repeat(k, groups, axis=2)
  score = np.einsum("bnhc,bshc->bhns", q, k) * q.shape[-1] ** -0.5
  score = np.where(seen[:, None], score, -np.inf)
  top = np.max(score, axis=-1, keepdims=True)
  weight = np.exp(score - np.where(np.isfinite(top), top, 0))
  total = weight.sum(-1, keepdims=True)
  return weight / np.where(total > 0, total, 1)


@pytest.mark.parametrize(
  "rows, new, cached, heads, kv_heads, length",
  [
    (3, 1, 40, 4, 2, [0, 17, 40]),
    (2, 5, 16, 4, 4, [3, 16]),
    (1, 1, 8, 7, 1, [8]),
    (2, 3, 12, 2, 1, [0, 12]),
  ],
)
def test_new_tokens_see_the_cache_and_themselves(
  rows, new, cached, heads, kv_heads, length
):
  q, k = _normal(rows, new, heads, 16), _normal(rows, new, kv_heads, 16)
  v = _normal(rows, new, kv_heads, 16)
  old_k = _normal(rows, cached, kv_heads, 16)
  old_v = _normal(rows, cached, kv_heads, 16)
  length = np.array(length)
  there = np.arange(cached)[None] < length[:, None]
  # What lies beyond a row's length must not matter, whatever it is.
  old_k = np.where(there[..., None, None], old_k, 1e4)
  old_v = np.where(there[..., None, None], old_v, 1e4)
  seen = np.concatenate(
    [
      np.repeat(there[:, None], new, axis=1),
      np.repeat(np.tril(np.ones((new, new), bool))[None], rows, axis=0),
    ],
    axis=2,
  )
  weight = _weights(q, np.concatenate([old_k, k], axis=1), seen)
  values = np.repeat(
    np.concatenate([old_v, v], axis=1), heads // kv_heads, axis=2
  )
  expected = np.einsum("bhns,bshc->bnhc", weight, values)
  arrays = [jnp.asarray(x, jnp.float32) for x in (q, k, v, old_k, old_v)]
  got = cached_attention(*arrays, jnp.asarray(length))
  np.testing.assert_allclose(got, expected, rtol=0, atol=2e-6)


def test_one_by_one_is_causal_attention():
  q, k, v = _normal(1, 9, 4, 8), _normal(1, 9, 2, 8), _normal(1, 9, 2, 8)
  q, k, v = (jnp.asarray(x, jnp.float32) for x in (q, k, v))
  one = jnp.ones((1, 9), jnp.int32)
  expected = attention(q, k, v, one, one, causal=True)
  for n in range(9):
    got = cached_attention(
      q[:, n : n + 1],
      k[:, n : n + 1],
      v[:, n : n + 1],
      k,
      v,
      jnp.array([n]),
    )
    np.testing.assert_allclose(got[:, 0], expected[:, n], rtol=0, atol=1e-6)


@pytest.mark.parametrize(
  "heads, kv_heads",
  [
    (4, 2),
    pytest.param(6, 1, marks=pytest.mark.slow),
    pytest.param(2, 2, marks=pytest.mark.slow),
  ],
)
def test_key_attention_is_summed_weights(heads, kv_heads):
  q, k = _normal(2, 13, heads, 8), _normal(2, 700, kv_heads, 8)
  query = RNG.integers(0, 3, (2, 13))
  key = np.sort(RNG.integers(0, 3, (2, 700)), axis=1)
  seen = (query[:, :, None] == key[:, None]) & (key > 0)[:, None]
  expected = _weights(q, k, seen).sum((1, 2))
  got = key_attention(
    jnp.asarray(q, jnp.float32),
    jnp.asarray(k, jnp.float32),
    jnp.asarray(query, jnp.int32),
    jnp.asarray(key, jnp.int32),
  )
  np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5)
  np.testing.assert_allclose(got.sum(1), heads * (query > 0).sum(1), rtol=1e-5)


def test_scores_of_any_height():
  """The highest takes all, wherever it is, and nothing overflows."""
  q, k, v = _normal(2, 3, 2, 8), _normal(2, 3, 1, 8), _normal(2, 3, 1, 8)
  old_k, old_v = _normal(2, 5, 1, 8), _normal(2, 5, 1, 8)
  q *= 1e4
  # Row 0 has nothing cached, not even in what it must not see.
  old_k[0] = 1e4
  seen = np.ones((2, 3, 8), bool)
  seen[0, :, :5] = False
  seen[:, :, 5:] = np.tril(np.ones((3, 3), bool))
  weight = _weights(q, np.concatenate([old_k, k], axis=1), seen)
  values = np.repeat(np.concatenate([old_v, v], axis=1), 2, axis=2)
  expected = np.einsum("bhns,bshc->bnhc", weight, values)
  assert (weight[1, ..., :5].sum(-1) > 0.5).any()  # of an earlier one
  arrays = [jnp.asarray(x, jnp.float32) for x in (q, k, v, old_k, old_v)]
  got = cached_attention(*arrays, jnp.array([0, 5]))
  np.testing.assert_allclose(got, expected, rtol=0, atol=1e-2)


def test_cache_in_bfloat16():
  arrays = [_normal(2, n, heads, 16) for n, heads in [(1, 4), (1, 2), (1, 2)]]
  arrays += [_normal(2, 300, 2, 16), _normal(2, 300, 2, 16)]
  narrow = [jnp.asarray(x, jnp.bfloat16) for x in arrays]
  length = jnp.array([300, 7])
  got = cached_attention(*narrow, length)
  assert got.dtype == jnp.bfloat16
  wide = cached_attention(*[x.astype(jnp.float32) for x in narrow], length)
  np.testing.assert_allclose(
    got.astype(jnp.float32), wide, rtol=2**-7, atol=2**-7
  )


@pytest.mark.slow
def test_key_attention_in_bfloat16():
  q, k = _normal(1, 64, 8, 8), _normal(1, 300, 2, 8)
  q, k = (jnp.asarray(x, jnp.bfloat16) for x in (q, k))
  one = [jnp.ones((1, n), jnp.int32) for n in (64, 300)]
  seen = np.ones((1, 64, 300), bool)
  wide = [np.asarray(x.astype(jnp.float32), np.float64) for x in (q, k)]
  expected = _weights(*wide, seen).sum((1, 2))
  got = key_attention(q, k, *one)
  assert got.dtype == jnp.float32
  # Sums of each KV head are rounded to 8 bits.
  np.testing.assert_allclose(got, expected, rtol=1e-2)
  np.testing.assert_allclose(got.sum(), 8 * 64, rtol=2e-3)
