"""Causal self-attention on TPU: jax's splash attention, with segments."""

import functools

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention as library
from jaxtyping import Array, Float, Int

from hourjax.kernels.constants import LANES, SAVED
from hourjax.kernels.tpu.call import check_dtypes

_BLOCK = {2: 1024, 4: 512}  # at most, by bytes of a number


def attention(
  q: Float[Array, "B L H C"],
  k: Float[Array, "B L K C"],
  v: Float[Array, "B L K C"],
  query_segment: Int[Array, "B L"],
  key_segment: Int[Array, "B L"],
  interpret: bool = False,
) -> Float[Array, "B L H C"]:
  """Causal grouped-query attention within segments; 0 is padding.

  As `kernels.attention` with causal=True, gradients included. The library
  does not scale, wants lanes of 128 and blocks that divide L, lets padding see
  padding and means over all keys where none is seen: that is put right here.

  Raises:
    ValueError: for dtypes other than bfloat16 and float32, or mixed ones.
  """
  check_dtypes(q, k, v)
  out = _precise(q, k, v, query_segment, key_segment, interpret)
  # A fused comparison, reduced at once: nothing of L x L is kept.
  place = jnp.arange(q.shape[1])
  same = query_segment[:, :, None] == key_segment[:, None]
  seen = (same & (place[:, None] >= place[None])[None]).any(-1)
  seen &= query_segment > 0
  return jnp.where(seen[..., None, None], out, 0).astype(q.dtype)


# The library's products take the precision that is set when they are traced,
# and those of its gradient are traced after the forward pass has returned.
@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _precise(q, k, v, query_segment, key_segment, interpret):
  return _forward(q, k, v, query_segment, key_segment, interpret)[0]


def _forward(q, k, v, query_segment, key_segment, interpret):
  def call(q, k, v):
    return _padded(q, k, v, query_segment, key_segment, interpret)

  with _precision(q.dtype):
    return jax.vjp(call, q, k, v)


def _backward(interpret, pull, d_out):
  del interpret
  with _precision(d_out.dtype):
    return *pull(d_out), None, None


_precise.defvjp(_forward, _backward)


def _precision(dtype):
  exact = dtype == jnp.float32
  return jax.default_matmul_precision("highest" if exact else "default")


def _padded(q, k, v, query_segment, key_segment, interpret):
  """Scaled, heads first, and padded to blocks and lanes."""
  length, dim = q.shape[1], q.shape[3]
  block = _block(length, _BLOCK[q.dtype.itemsize])
  extra = -length % block

  def heads_first(x):
    widths = ((0, 0), (0, extra), (0, 0), (0, -dim % LANES))
    return jnp.pad(x, widths).swapaxes(1, 2)

  def ids(segment):
    return jnp.pad(segment, ((0, 0), (0, extra)))

  scaled = (q.astype(jnp.float32) * dim**-0.5).astype(q.dtype)
  call = _kernel(length + extra, q.shape[2], block, interpret)
  out = jax.vmap(call)(
    heads_first(scaled),
    heads_first(k),
    heads_first(v),
    library.SegmentIds(q=ids(query_segment), kv=ids(key_segment)),
  )
  return out.swapaxes(1, 2)[:, :length, :, :dim]


def _block(length: int, most: int) -> int:
  """The block that pads least, of these the largest; short ones are one."""
  if length <= most // 2:
    return -(-length // LANES) * LANES
  blocks = range(most // 2, most + 1, LANES)
  return min(blocks, key=lambda block: (-length % block, -block))


class _Causal(library.CausalMask):
  """The library's mask, quick to look through.

  To list blocks, the library asks for each whether any or all of it is seen.
  A block off the diagonal is answered for by one element of it: to make them
  all, L x L, takes the processor 8 s for 32,768 positions and 90 s for four
  times as many.
  """

  def __getitem__(self, index):
    queries, keys = index
    if keys.stop - 1 <= queries.start or queries.stop - 1 < keys.start:
      index = (
        slice(queries.start, queries.start + 1),
        slice(keys.start, keys.start + 1),
      )
    return super().__getitem__(index)


def _kernel(length: int, heads: int, block: int, interpret: bool):
  mask = library.MultiHeadMask([_Causal((length, length))] * heads)
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
    residual_checkpoint_name=SAVED[0],
    interpret=interpret,
  )
