"""Causal self-attention on TPU: jax's splash attention, with segments."""

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention as library
from jaxtyping import Array, Float, Int

LANES = 128
_BLOCK = 1024  # at most
_LEAST = 512  # or the whole length


def attention(
  q: Float[Array, "B L H C"],
  k: Float[Array, "B L K C"],
  v: Float[Array, "B L K C"],
  segment: Int[Array, "B L"],
  interpret: bool = False,
) -> Float[Array, "B L H C"]:
  """Causal grouped-query attention within segments; 0 is padding.

  As `kernels.attention` with causal=True, gradients included. The library
  does not scale, wants lanes of 128 and blocks that divide L, and lets
  padding see padding: all of this is put right here.
  """
  length, dim = q.shape[1], q.shape[3]
  block = _block(length)
  padded = -(-length // block) * block

  def heads_first(x):
    widths = (
      (0, 0),
      (0, padded - length),
      (0, 0),
      (0, -dim % LANES),
    )
    return jnp.pad(x, widths).swapaxes(1, 2)

  scaled = (q.astype(jnp.float32) * dim**-0.5).astype(q.dtype)
  ids = jnp.pad(segment, ((0, 0), (0, padded - length)))
  call = _kernel(padded, q.shape[2], block, interpret)
  exact = "highest" if q.dtype == jnp.float32 else None
  with jax.default_matmul_precision(exact):
    out = jax.vmap(call)(
      heads_first(scaled),
      heads_first(k),
      heads_first(v),
      library.SegmentIds(q=ids, kv=ids),
    )
  out = out.swapaxes(1, 2)[:, :length, :, :dim]
  return jnp.where((segment > 0)[..., None, None], out, 0).astype(q.dtype)


def _block(length: int) -> int:
  """The block that pads least, and of these the largest."""
  blocks = range(_LEAST, _BLOCK + 1, LANES)
  if length <= _LEAST:
    return -(-length // LANES) * LANES
  return min(blocks, key=lambda block: (-length % block, -block))


def _kernel(length: int, heads: int, block: int, interpret: bool):
  mask = library.MultiHeadMask([library.CausalMask((length, length))] * heads)
  # Not the fused backward: it holds a copy of dq for each block of keys.
  sizes = library.BlockSizes(
    block_q=block,
    block_kv=block,
    block_kv_compute=block,
    block_q_dkv=block,
    block_kv_dkv=block,
    block_kv_dkv_compute=block,
    block_q_dq=block,
    block_kv_dq=block,
  )
  return library.make_splash_mha(
    mask,
    block_sizes=sizes,
    head_shards=1,
    q_seq_shards=1,
    residual_checkpoint_name="attention_out",
    interpret=interpret,
  )
