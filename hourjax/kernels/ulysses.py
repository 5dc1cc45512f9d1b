"""Causal self-attention over a split sequence: positions become heads.

A device that has all heads of some positions sends them away and gets some
heads of all positions, attends, and sends the results back (DeepSpeed Ulysses,
arXiv 2309.14509). So every device has the same part of the triangle. KV heads
are few: all of them go everywhere, and each device takes those it needs.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp


def causal(
  attend: Callable,
  axis: str | None,
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  query_segment: jax.Array,
  key_segment: jax.Array,
) -> jax.Array:
  """Attention of one device's positions [B, L / n, H, C], within shard_map.

  Args:
    attend: causal attention of whole sequences; may be differentiated.
    axis: of the mesh, over which positions are split in order.
    q, k, v, query_segment, key_segment: the device's part.
  """
  if axis is None or jax.lax.axis_size(axis) == 1:
    return attend(q, k, v, query_segment, key_segment)
  devices = jax.lax.axis_size(axis)
  blocks = head_blocks(q.shape[2], k.shape[2], devices)
  # Where there are fewer blocks than devices, several compute the same one.
  copies = devices // blocks
  q = _to_heads(q, axis, blocks, copies)
  k, v, query_segment, key_segment = (
    jax.lax.all_gather(x, axis, axis=1, tiled=True)
    for x in (k, v, query_segment, key_segment)
  )
  block = jax.lax.axis_index(axis) // copies
  k, v = (_kv_heads(x, block, blocks) for x in (k, v))
  out = attend(q, k, v, query_segment, key_segment)
  return _to_positions(out, axis, copies)


def head_blocks(heads: int, kv_heads: int, devices: int) -> int:
  """Into how many blocks query heads are cut: at most one a device.

  The most that divide the heads and the devices, and whose blocks hold whole
  groups of a KV head or lie within one.
  """
  group = heads // kv_heads
  most = math.gcd(heads, devices)
  fitting = [
    n
    for n in range(1, most + 1)
    if most % n == 0
    and ((heads // n) % group == 0 or group % (heads // n) == 0)
  ]
  return max(fitting)


def _to_heads(x, axis, blocks, copies):
  """[B, L / n, H, C] -> [B, L, H / blocks, C]."""
  rows, length, heads, dim = x.shape
  x = x.reshape(rows, length, blocks, 1, heads // blocks, dim)
  x = jnp.broadcast_to(x, (rows, length, blocks, copies, *x.shape[4:]))
  x = x.reshape(rows, length, blocks * copies * (heads // blocks), dim)
  return jax.lax.all_to_all(x, axis, split_axis=2, concat_axis=1, tiled=True)


def _to_positions(x, axis, copies):
  """The inverse of `_to_heads`; of equal results the first is taken."""
  rows, _, heads, dim = x.shape
  x = jax.lax.all_to_all(x, axis, split_axis=1, concat_axis=2, tiled=True)
  x = x.reshape(rows, x.shape[1], -1, copies, heads, dim)[:, :, :, 0]
  return x.reshape(rows, x.shape[1], -1, dim)


def _kv_heads(x, block, blocks):
  """The KV heads [B, L, k, C] that a block of query heads reads."""
  kv_heads = x.shape[2]
  each = max(1, kv_heads // blocks)
  first = block * kv_heads // blocks
  return jax.lax.dynamic_slice_in_dim(x, first, each, axis=2)
