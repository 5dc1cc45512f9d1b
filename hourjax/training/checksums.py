"""Checksums of arrays: computed on the devices, the same for any sharding.

Orbax restores a file whose array bytes have changed without a word (measured:
flipped bytes in a data file came back as other numbers). Sums over files would
mean that one host reads back what all hosts wrote; a sum over the arrays costs
one pass over their memory on all devices together.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

_WIDTHS = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}


def named_arrays(tree: Any) -> dict[str, Any]:
  """The leaves of a tree by path, as "trained/decoder/norm/scale"."""
  leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
  return {
    jax.tree_util.keystr(path, simple=True, separator="/"): leaf
    for path, leaf in leaves
  }


def checksums(tree: Any) -> dict[str, int]:
  """A 32-bit sum of every array of a tree, by path.

  Any single changed element changes the sum; other differences, elements that
  changed places among them, go unseen with chance 2^-32. A host needs only its
  own shards.
  """
  named = named_arrays(tree)
  if not named:
    return {}
  sums = np.asarray(_sums(list(named.values())))
  return {path: int(value) for path, value in zip(named, sums)}


@jax.jit
def _sums(arrays):
  return jnp.stack([_sum(x) for x in arrays])


def _sum(x):
  """Sum over i of mix(bits(x[i]) xor i c) modulo 2^32, i counting in C order.

  `mix` is one-to-one, hence the first promise of `checksums`, and scatters
  (without it the signs of two elements could change unseen). Integer sums do
  not depend on their order, hence no dependence on the sharding.
  """
  x = jnp.asarray(x)
  if x.dtype == jnp.bool_:
    x = x.astype(jnp.uint8)
  bits = jax.lax.bitcast_convert_type(x, _WIDTHS[x.dtype.itemsize])
  index = jnp.zeros(x.shape, jnp.uint32)
  for axis in range(x.ndim):
    stride = math.prod(x.shape[axis + 1 :]) % 2**32
    along = jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
    index += along * jnp.uint32(stride)
  mixed = _mix(bits.astype(jnp.uint32) ^ (index * jnp.uint32(0x9E3779B9)))
  return jnp.sum(mixed, dtype=jnp.uint32)


def _mix(x):
  """The last steps of MurmurHash3: shifts and odd factors, both one-to-one."""
  x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
  x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
  return x ^ (x >> 16)
