"""Causal self-attention on TPU: jax's splash attention, with segments."""

import contextlib
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu import splash_attention as library
from jaxtyping import Array, Float, Int

from hourjax.kernels.constants import LANES, SAVED
from hourjax.kernels.tpu.call import check_dtypes

_BLOCK = {2: 1024, 4: 512}  # positions of a block at most, by bytes of a number


def attention(
  q: Float[Array, "B L H C"],
  k: Float[Array, "B L K C"],
  v: Float[Array, "B L K C"],
  query_segment: Int[Array, "B L"],
  key_segment: Int[Array, "B L"],
  interpret: bool = False,
) -> Float[Array, "B L H C"]:
  """Computes causal grouped-query attention within segments; 0 is padding.

  As `kernels.attention.attention` with causal=True, gradients included. The
  library departs from that in four ways, which are put right here: it does not
  scale the scores; it wants a head dim of 128 lanes and blocks that divide L;
  it lets padding see padding; and it returns the mean of all values for a
  query that sees no key.

  Args:
    q: queries.
    k: keys.
    v: values.
    query_segment: ids of the queries.
    key_segment: ids of the keys.
    interpret: whether to run without a TPU, slowly.

  Returns:
    The output in the dtype of q.

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
def _precise(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  query_segment: jax.Array,
  key_segment: jax.Array,
  interpret: bool,
) -> jax.Array:
  """Calls the library with exact float32 products, in both passes."""
  return _forward(q, k, v, query_segment, key_segment, interpret)[0]


def _forward(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  query_segment: jax.Array,
  key_segment: jax.Array,
  interpret: bool,
) -> tuple[jax.Array, Callable]:
  """Returns the output, and the function that pulls a gradient back."""

  def call(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    return _padded(q, k, v, query_segment, key_segment, interpret)

  with _precision(q.dtype):
    return jax.vjp(call, q, k, v)


def _backward(
  interpret: bool, pull: Callable, d_out: jax.Array
) -> tuple[jax.Array | None, ...]:
  """Returns the gradients of `_precise`'s arrays; ids have none."""
  del interpret
  with _precision(d_out.dtype):
    return *pull(d_out), None, None


_precise.defvjp(_forward, _backward)


def _precision(dtype: jnp.dtype) -> contextlib.AbstractContextManager:
  """Sets the precision of products for as long as the context lasts."""
  exact = dtype == jnp.float32
  return jax.default_matmul_precision("highest" if exact else "default")


def _padded(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  query_segment: jax.Array,
  key_segment: jax.Array,
  interpret: bool,
) -> jax.Array:
  """Calls the library: scaled, heads first, padded to blocks and lanes."""
  length, dim = q.shape[1], q.shape[3]
  block = _block(length, _BLOCK[q.dtype.itemsize])
  extra = -length % block

  def heads_first(x: jax.Array) -> jax.Array:
    widths = ((0, 0), (0, extra), (0, 0), (0, -dim % LANES))
    return jnp.pad(x, widths).swapaxes(1, 2)

  def ids(segment: jax.Array) -> jax.Array:
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
  """Returns the block length that pads least, and of these the largest.

  A sequence of at most half a block is one block.

  Args:
    length: of the sequence.
    most: longest block.
  """
  if length <= most // 2:
    return -(-length // LANES) * LANES
  blocks = range(most // 2, most + 1, LANES)
  return min(blocks, key=lambda block: (-length % block, -block))


class _Causal(library.CausalMask):
  """Describes the library's causal mask, so that it is quick to look through.

  To list its blocks, the library reads each block of the mask, on the CPU, and
  asks whether any or all of it is seen. In a block off the diagonal all
  elements are the same, so that one of them answers for it. To make all of
  them, L x L, takes 8 s for 32,768 positions and 90 s for four times as many.
  """

  def __getitem__(self, index: tuple[slice, slice]) -> np.ndarray:
    queries, keys = index
    if keys.stop - 1 <= queries.start or queries.stop - 1 < keys.start:
      index = (
        slice(queries.start, queries.start + 1),
        slice(keys.start, keys.start + 1),
      )
    return super().__getitem__(index)


def _kernel(length: int, heads: int, block: int, interpret: bool) -> Callable:
  """Returns the library's kernel for sequences of this length."""
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
