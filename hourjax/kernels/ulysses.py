"""Causal self-attention over a split sequence by all-to-all (Ulysses).

DeepSpeed Ulysses (arXiv 2309.14509): each device holds all heads of a part of
the positions. An all-to-all gives it a part of the heads of all positions
instead; it attends to whole sequences, and a second all-to-all sends the
results back. With 2 devices, 4 positions and 2 heads, as position.head:

    device 0   0.0 0.1 1.0 1.1   all-to-all   0.0 1.0 2.0 3.0
    device 1   2.0 2.1 3.0 3.1   ---------->  0.1 1.1 2.1 3.1

So every device works on the same share of the causal triangle, which it would
not if it kept its positions. KV heads are few: all of them are gathered, and
each device uses those that its query heads read.
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
  """Computes one device's part of causal attention, within shard_map.

  Args:
    attend: causal attention of whole sequences; may be differentiated.
    axis: of the mesh, over which n devices split the positions in order.
    q: the device's queries [B, L / n, H, C].
    k: its keys [B, L / n, K, C].
    v: its values [B, L / n, K, C].
    query_segment: ids of its queries [B, L / n].
    key_segment: ids of its keys [B, L / n].

  Returns:
    The output of its positions [B, L / n, H, C].
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
  """Returns into how many blocks the query heads are cut, at most one a device.

  It is the largest number that divides the heads and the devices, and whose
  blocks are whole groups of KV heads or lie within one group. 28 heads of 4 KV
  heads on 16 devices make 4 blocks of 7 heads, each computed by 4 devices.

  Args:
    heads: H.
    kv_heads: K.
    devices: n.
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


def _to_heads(x: jax.Array, axis: str, blocks: int, copies: int) -> jax.Array:
  """Turns [B, L / n, H, C] into [B, L, H / blocks, C], by all-to-all."""
  rows, length, heads, dim = x.shape
  x = x.reshape(rows, length, blocks, 1, heads // blocks, dim)
  x = jnp.broadcast_to(x, (rows, length, blocks, copies, *x.shape[4:]))
  x = x.reshape(rows, length, blocks * copies * (heads // blocks), dim)
  return jax.lax.all_to_all(x, axis, split_axis=2, concat_axis=1, tiled=True)


def _to_positions(x: jax.Array, axis: str, copies: int) -> jax.Array:
  """Inverts `_to_heads`, and keeps the first of `copies` equal results."""
  rows, _, heads, dim = x.shape
  x = jax.lax.all_to_all(x, axis, split_axis=1, concat_axis=2, tiled=True)
  x = x.reshape(rows, x.shape[1], -1, copies, heads, dim)[:, :, :, 0]
  return x.reshape(rows, x.shape[1], -1, dim)


def _kv_heads(x: jax.Array, block: jax.Array, blocks: int) -> jax.Array:
  """Returns the KV heads [B, L, k, C] that a block of query heads reads."""
  kv_heads = x.shape[2]
  each = max(1, kv_heads // blocks)
  first = block * kv_heads // blocks
  return jax.lax.dynamic_slice_in_dim(x, first, each, axis=2)
