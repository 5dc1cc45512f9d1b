"""The TPU kernels without a TPU: interpreted, beside dense float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import tpu as pltpu

from hourjax.kernels.tpu import call
from hourjax.kernels.tpu.tiles import AttentionTiles, Tiles
from tests.kernels.test_attention import dense

# float32 against float64 on numbers of order 1.
ATOL = 2e-5
NEVER = np.float32(-1e30)  # the log-sum-exp of no key
NAMES = ("out", "lse", "dq", "dk", "dv")

# A tile of keys has chunks, and 8 heads of a group have tiles of 16 queries.
SMALL = AttentionTiles(
  Tiles(128, 256, 128, 128), Tiles(128, 256, 128, 128), 1 << 30
)
# A chunk has several units of rows, and no two sizes are the same.
WIDE = AttentionTiles(
  Tiles(256, 384, 128, 128), Tiles(512, 768, 256, 128), 1 << 30
)

# To compile takes longer than to run.
_jit = functools.partial(
  jax.jit, compiler_options={"xla_backend_optimization_level": 0}
)


def interpret(cores):
  """What is not yet written reads as nan; reads out of bounds raise.

  Two cores take ten times as long as one.
  """
  return pltpu.InterpretParams(detect_races=True, num_cores_or_threads=cores)


@functools.cache
def _compiled(function, key, cores, **how):
  del key
  how["interpret"] = interpret(cores)
  return _jit(functools.partial(function, **how))


def forward(
  q,
  k,
  v,
  *segments,
  tiles=SMALL,
  cores=1,
  out_dtype=jnp.float32,
  causal=False,
  key=None,
):
  """(out, lse). `key` is only a part of the cache's key."""
  how = {"tiles": tiles, "out_dtype": out_dtype, "causal": causal}
  run = _compiled(call.forward, key, cores, **how)
  return run(*map(jnp.asarray, (q, k, v, *segments)))


def backward(q, k, v, *others, tiles=SMALL, cores=1, causal=False, key=None):
  """(dq, dk, dv) from q, k, v, segments, lse, delta, d_out."""
  run = _compiled(call.backward, key, cores, tiles=tiles, causal=causal)
  return run(*map(jnp.asarray, (q, k, v, *others)))


def of_caller(out, lse, d_out):
  """(lse, delta) for `backward`, as whoever calls it makes them."""
  delta = (out.astype(jnp.float32) * jnp.asarray(d_out, jnp.float32)).sum(-1)
  return jnp.where(lse == NEVER, 1e30, lse), delta


def ours(inputs, *segments, out_dtype=jnp.float32, **how):
  """(out, lse, dq, dk, dv) of q, k, v, d_out."""
  q, k, v, d_out = inputs
  out, lse = forward(q, k, v, *segments, out_dtype=out_dtype, **how)
  numbers = of_caller(out, lse, d_out)
  return out, lse, *backward(q, k, v, *segments, *numbers, d_out, **how)


def expected(inputs, *segments, causal=False):
  """As `ours`, in float64."""
  q, k, v, d_out = inputs
  out, *gradients = dense(q, k, v, *segments, causal, d_out)
  return out, dense_lse(q, k, *segments, causal), *gradients


def dense_lse(q, k, query_segment, key_segment, causal=False):
  """Log-sum-exp [B, T, H] in float64; `NEVER` where no key is seen."""
  q, k = np.asarray(q, np.float64), np.asarray(k, np.float64)
  k = np.repeat(k, q.shape[2] // k.shape[2], axis=2)
  seen = query_segment[:, :, None] == key_segment[:, None]
  seen &= (query_segment > 0)[:, :, None]
  if causal:
    seen &= np.tri(q.shape[1], dtype=bool)
  score = np.einsum("bthc,bshc->bths", q, k) * q.shape[3] ** -0.5
  score = np.where(seen[:, :, None], score, -np.inf)
  top = np.maximum(score.max(-1), NEVER)
  total = np.exp(score - top[..., None]).sum(-1)
  return np.where(total > 0, top + np.log(np.maximum(total, 1e-300)), NEVER)


def close(got, reference, atol=ATOL, rtol=0.0):
  """Compares what `ours` and `expected` return."""
  for name, x, y in zip(NAMES, got, reference, strict=True):
    np.testing.assert_allclose(
      np.asarray(x, np.float64), y, rtol=rtol, atol=atol, err_msg=name
    )


def same(got, reference):
  """Bit for bit."""
  for x, y in zip(got, reference, strict=True):
    np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


def check(inputs, *segments, causal=False, **how):
  """`ours`, after a look at `expected`."""
  got = ours(inputs, *segments, causal=causal, **how)
  close(got, expected(inputs, *segments, causal=causal))
  return got


def runs(*pairs, total):
  """Ids [1, total] of (id, length) runs; what is left is padding."""
  ids = np.repeat(*np.array(pairs or [(0, 0)], np.int32).T)[:total]
  return np.pad(ids, (0, total - len(ids)))[None]


def draw(seed, rows, queries, keys, heads, kv_heads, dim=8):
  """q, k, v, d_out in float32."""
  rng = np.random.default_rng(seed)
  q, k = (rows, queries, heads, dim), (rows, keys, kv_heads, dim)
  return [rng.normal(size=x).astype(np.float32) for x in (q, k, k, q)]
