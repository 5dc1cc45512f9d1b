"""The one attention call of the model, and who computes it."""
# MERGED hourjax.kernels.shares:
# How much of the attention each key gets.

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from hourjax.kernels import reference, sharded, splash, triton, ulysses
from hourjax.kernels.common import SAVED
from hourjax.kernels.sharded import Sharding
from hourjax.kernels.tpu import call as tpu


class Backend(NamedTuple):
  """Two functions with the contract of `reference.forward`, `.backward`."""

  forward: Callable
  backward: Callable


def attention(
  q: Float[Array, "B T H C"],
  k: Float[Array, "B S K C"],
  v: Float[Array, "B S K C"],
  query_segment: Int[Array, "B T"],
  key_segment: Int[Array, "B S"],
  *,
  causal: bool = False,
  sharding: Sharding | None = None,
) -> Float[Array, "B T H C"]:
  """Grouped-query attention between positions of the same segment.

  Scores are scaled by C ** -0.5; softmax and accumulation are float32.
  Positions (RoPE) are applied by the caller. A T x S matrix is never built.
  On TPU our own kernels compute it (`kernels.tpu`; causal: splash attention),
  on GPU `kernels.triton`, elsewhere `kernels.reference`.

  Args:
    q: queries. Head h reads the keys of KV head h // (H / K).
    k: keys.
    v: values.
    query_segment: a query sees the keys whose segment id equals its own.
      0 is padding: such a query sees nothing. Ids are not negative.
    key_segment: ids of the keys; 0 is padding.
    causal: query t also sees only the keys at index s <= t (needs T == S).
    sharding: the mesh and the axes over which rows, heads and memory are
      split; None on one device.

  Returns:
    In the dtype of q. A query that sees no key gets zeros and passes no
    gradient.

  Raises:
    ValueError: for no queries or keys, H that is not a multiple of K, causal
      with T != S or with the memory split, sizes that the mesh does not
      divide, and what the kernels of this device cannot do
      (`kernels.tpu.call.check`, `kernels.triton`).
  """
  _check(q, k, causal, sharding)
  with jax.named_scope("attention"):
    return _attention(
      q, k, v, query_segment, key_segment, causal, sharding, platform(sharding)
    )


def platform(sharding: Sharding | None = None) -> str:
  """What is compiled for: "tpu", "gpu" or "cpu".

  The devices of the given mesh or of the one that is set (they may be of a
  topology, for compiling without a TPU), else the default device.
  """
  mesh = None if sharding is None else sharding.mesh
  if isinstance(mesh, jax.sharding.Mesh):
    return mesh.devices.flat[0].platform
  device = jax.sharding.get_abstract_mesh().abstract_device
  if device is not None:
    return device.platform
  device = jax.config.jax_default_device
  if isinstance(device, str):
    return device
  return jax.default_backend() if device is None else device.platform


def backend(name: str, causal: bool) -> Backend:
  """Who computes attention on the platform `name`."""
  if name == "tpu":
    if causal:
      raise ValueError("causal attention on TPU is `kernels.splash`")
    return Backend(tpu.forward, tpu.backward)
  if name == "gpu":
    return _with_causal(triton, causal)
  return _with_causal(reference, causal)


def _with_causal(module, causal):
  return Backend(
    functools.partial(module.forward, causal=causal),
    functools.partial(module.backward, causal=causal),
  )


def _attention(q, k, v, query_segment, key_segment, causal, sharding, name):
  if not causal or sharding is None:
    return _computed(
      q, k, v, query_segment, key_segment, causal, sharding, name
    )
  # Each device attends whole sequences: no collective is within what has a
  # gradient of its own, so it may stand inside of shard_map.
  specs = sharding.specs()
  local = functools.partial(_computed, causal=True, sharding=None, name=name)
  call = _shard_map(
    functools.partial(ulysses.causal, local, sharding.sequence),
    sharding,
    (*[specs.q] * 3, *[specs.query_segment] * 2),
    specs.q,
  )
  return call(q, k, v, query_segment, key_segment)


def _computed(q, k, v, query_segment, key_segment, causal, sharding, name):
  if causal and name == "tpu":
    return splash.attention(q, k, v, query_segment, key_segment)
  return _differentiable(
    q, k, v, query_segment, key_segment, causal, sharding, name
  )


# Outside of shard_map: inside, the transpose of its psum would count twice.
@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7))
def _differentiable(
  q, k, v, query_segment, key_segment, causal, sharding, name
):
  return _forward(q, k, v, query_segment, key_segment, causal, sharding, name)[
    0
  ]


def _forward(q, k, v, query_segment, key_segment, causal, sharding, name):
  local = functools.partial(sharded.forward, backend(name, causal), sharding)
  if sharding is not None:
    specs = sharding.specs()
    local = _shard_map(
      local,
      sharding,
      (specs.q, specs.k, specs.k, specs.query_segment, specs.key_segment),
      (specs.q, specs.q),
    )
  out, lse = local(q, k, v, query_segment, key_segment)
  out, lse = (checkpoint_name(x, kept) for x, kept in zip((out, lse), SAVED))
  return out, (q, k, v, query_segment, key_segment, out, lse)


def _backward(causal, sharding, name, saved, d_out):
  local = functools.partial(sharded.backward, backend(name, causal), sharding)
  if sharding is not None:
    specs = sharding.specs()
    segments = (specs.query_segment, specs.key_segment)
    local = _shard_map(
      local,
      sharding,
      (specs.q, specs.k, specs.k, *segments, specs.q, specs.q, specs.q),
      (specs.q, specs.k, specs.k),
    )
  return *local(*saved, d_out), None, None


_differentiable.defvjp(_forward, _backward)


def _shard_map(function, sharding, in_specs, out_specs):
  return jax.shard_map(
    function,
    mesh=sharding.mesh,
    in_specs=in_specs,
    out_specs=out_specs,
    check_vma=False,  # the collectives are our own
  )


def _check(q, k, causal, sharding):
  heads, kv_heads = q.shape[2], k.shape[2]
  if heads % kv_heads:
    raise ValueError(
      f"{heads} query heads cannot share {kv_heads} KV heads evenly"
    )
  if not q.shape[1] or not k.shape[1]:
    raise ValueError(
      "attention needs at least one query and one key, got"
      f" {q.shape[1]} queries and {k.shape[1]} keys"
    )
  if causal and q.shape[1] != k.shape[1]:
    raise ValueError(
      "causal attention needs as many keys as queries, got"
      f" {k.shape[1]} keys for {q.shape[1]} queries"
    )
  if sharding is None:
    return
  if sharding.sequence is not None and q.shape[1] != k.shape[1]:
    raise ValueError(
      f"a split sequence needs as many keys as queries, got {k.shape[1]} keys"
      f" for {q.shape[1]} queries; split the memory instead"
    )
  if causal and sharding.memory is not None:
    raise ValueError(
      "causal attention cannot be split over keys, but the sharding splits"
      f" them over {sharding.memory!r}; split the sequence instead"
    )
  sharding.check(
    rows=(q.shape[0], sharding.rows),
    keys=(k.shape[1], sharding.over_keys),
    queries=(q.shape[1], sharding.over_queries),
    **{
      "KV heads": (
        kv_heads,
        () if sharding.heads is None else (sharding.heads,),
      )
    },
  )


def key_attention(
  q: Float[Array, "B T H C"],
  k: Float[Array, "B S K C"],
  query_segment: Int[Array, "B T"],
  key_segment: Int[Array, "B S"],
  *,
  sharding: Sharding | None = None,
) -> Float[Array, "B S"]:
  """Attention weights on each key, summed over queries and heads, float32.

  The gradient of attention's output for the values is its weights: with the
  gradient 1 in one channel of every query, that channel of dv is the sum
  wanted. So the kernels compute it, and no T x S matrix is built. A row sums
  to the heads times the queries that see a key.

  Args:
    q, k, query_segment, key_segment, sharding: as for `attention`. Weights
      are rounded to the dtype of k.
  """

  def mixed(values):
    return attention(
      q, k, values, query_segment, key_segment, sharding=sharding
    )

  # The values themselves do not matter to their gradient.
  out, transpose = jax.vjp(mixed, k)
  (d_values,) = transpose(jnp.zeros_like(out).at[..., 0].set(1))
  return d_values[..., 0].astype(jnp.float32).sum(-1)
