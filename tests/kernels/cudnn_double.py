"""A stand-in for cuDNN's fused attention, on the CPU and in float64.

No GPU is needed to test what surrounds the library: `use_cudnn_double` lets
JAX's primitives for it run on the CPU as cuDNN's documentation describes them
(https://docs.nvidia.com/deeplearning/cudnn/frontend/latest/operations/Attention.html).
It says nothing about what a GPU computes.

Everything is found as the library finds it, in flat buffers by offsets and
lengths; what it would leave unwritten is NaN.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo as library
from jax._src.interpreters import mlir

from hourjax.kernels import attention, cudnn

_BOTH = library.MaskType.PADDING, library.MaskType.PADDING_CAUSAL


def use_cudnn_double(monkeypatch: pytest.MonkeyPatch) -> None:
  """Lets "cudnn" compute on the CPU, float32 too, which shows more errors."""
  monkeypatch.setitem(attention.IMPLEMENTATIONS, "cudnn", "")
  monkeypatch.setattr(cudnn, "DTYPES", (*cudnn.DTYPES, jnp.float32))
  for primitive, function in (
    (library._dot_product_attention_fwd_p, forward),
    (library._dot_product_attention_bwd_p, backward),
  ):
    lowering = mlir.lower_fun(function, multiple_results=True)
    mlir.register_lowering(primitive, lowering, platform="cpu")


def forward(q, k, v, bias, *others, is_training, **options):
  """(out, stats)"""
  assert is_training and not bias.size
  sequences, pages = others[:4], others[4:]
  assert not any(x.size for x in pages)
  rows, length, heads, _ = q.shape
  most = sequences[0].shape[1]
  stats = jax.ShapeDtypeStruct((rows * most, heads, length), np.float32)
  run = functools.partial(_forward, **options)
  results = jax.ShapeDtypeStruct(q.shape, q.dtype), stats
  return list(_called(run, results, q, k, v, *sequences))


def backward(q, k, v, bias, *others, **options):
  """(dq, dk, dv)"""
  assert not bias.size
  sequences, pages, others = others[:4], others[4:6], others[6:]
  assert not any(x.size for x in pages)
  results = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (q, k, v)]
  run = functools.partial(_backward, **options)
  return list(_called(run, results, q, k, v, *sequences, *others))


def _called(function, results, *arrays):
  def on_host(*arrays):
    return function(*map(np.asarray, arrays))

  return jax.pure_callback(on_host, results, *arrays)


def _forward(q, k, v, *sequences, **options):
  out, most = np.full(q.size, np.nan), sequences[0].shape[1]
  stats = np.full((len(q) * most, q.shape[2], q.shape[1]), np.nan)
  flat_q, flat_k, flat_v = map(_flat, (q, k, v))
  for n, at_q, at_k in _sequences(q, k, *sequences):
    score = _scores(flat_q[at_q], flat_k[at_k], **options)
    top = score.max(-1, keepdims=True)
    total = np.exp(score - top).sum(-1, keepdims=True)
    weight = np.exp(score - top) / total
    out[at_q] = np.einsum("hts,shc->thc", weight, flat_v[at_k])
    stats[n, :, : len(at_q)] = (top + np.log(total))[..., 0]
  return out.reshape(q.shape).astype(q.dtype), stats.astype(np.float32)


def _backward(q, k, v, *others, **options):
  sequences, (stats, out, d_out) = others[:4], others[4:]
  assert stats.dtype == np.float32 and np.isfinite(stats).all()
  assert out.dtype == d_out.dtype == q.dtype
  gradients = dq, dk, dv = [np.full(x.size, np.nan) for x in (q, k, v)]
  flat_q, flat_k, flat_v = map(_flat, (q, k, v))
  flat_out, flat_d_out = map(_flat, (out, d_out))
  for n, at_q, at_k in _sequences(q, k, *sequences):
    score = _scores(flat_q[at_q], flat_k[at_k], **options)
    weight = np.exp(score - stats[n, :, : len(at_q), None].astype(np.float64))
    d_o = flat_d_out[at_q]
    delta = (flat_out[at_q] * d_o).sum(-1)
    dv[at_k] = np.einsum("hts,thc->shc", weight, d_o)
    d_weight = np.einsum("thc,shc->hts", d_o, flat_v[at_k])
    d_score = weight * (d_weight - delta.T[..., None]) * options["scale"]
    dq[at_q] = np.einsum("hts,shc->thc", d_score, flat_k[at_k])
    dk[at_k] = np.einsum("hts,thc->shc", d_score, flat_q[at_q])
  shapes = (x.shape for x in (q, k, v))
  return tuple(
    x.reshape(shape).astype(q.dtype) for x, shape in zip(gradients, shapes)
  )


def _flat(x):
  return np.asarray(x, np.float64).reshape(-1)


def _sequences(q, k, q_length, k_length, q_offset, k_offset):
  """Number, and [length, H, C] indices into flat q and k, of each sequence."""
  count = q_length.size
  for x, offset in ((q, q_offset), (k, k_offset)):
    used = offset.reshape(-1)[: count + 1]
    assert used.dtype == np.int32 and used[-1] == x.size
    assert (np.diff(used) >= 0).all() and used[0] >= 0
  for n in range(count):
    both = []
    for x, length, offset in (
      (q, q_length, q_offset),
      (k, k_length, k_offset),
    ):
      (_, _, heads, dim), length = x.shape, length.reshape(-1)[n]
      index = offset.reshape(-1)[n] + np.arange(length * heads * dim)
      assert length >= 0 and (not length or index[-1] < x.size)
      both.append(index.reshape(length, heads, dim))
    # Not written in the documentation, and so not asked of it: one of both 0.
    assert (len(both[0]) > 0) == (len(both[1]) > 0)
    if len(both[0]):
      yield n, *both


def _scores(q, k, *, scale, mask_type, dropout_rate, layout, **options):
  """[H, T, S]; heads are not grouped."""
  assert mask_type in _BOTH and not dropout_rate
  assert layout == library.AttentionLayout.BTNH.value
  assert options.pop("sliding_window_length") is None
  assert set(options) == {"seed", "variadic_args"}
  score = np.einsum("thc,shc->hts", q, k) * scale
  if mask_type is library.MaskType.PADDING_CAUSAL:
    score = np.where(np.tri(*score.shape[1:], dtype=bool), score, -np.inf)
  return score
