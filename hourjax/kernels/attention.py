"""The attention calls of the model, and the choice of their implementation.

`attention` is differentiable attention between whole rows, for training and
prefill. `cached_attention` serves decoding: a few new tokens read a cache.
`key_attention` returns how much attention each key gets.
"""

import functools
import types
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from hourjax.kernels import cudnn, reference, sharded, triton, ulysses
from hourjax.kernels.constants import SAVED
from hourjax.kernels.sharded import Backend, Sharding
from hourjax.kernels.tpu import call as tpu
from hourjax.kernels.tpu.tiles import AttentionTiles

# Implementation -> the platform that it runs on ("": on any).
IMPLEMENTATIONS = {
  "tpu": "tpu",
  "cudnn": "gpu",
  "triton": "gpu",
  "reference": "",
}
_NEVER = -1e30  # the score of a masked key; finite, see constants


class _Options(NamedTuple):
  """Holds the static arguments of a call."""

  causal: bool
  sharding: Sharding | None
  implementation: str
  tiles: AttentionTiles | None


def attention(
  q: Float[Array, "B T H C"],
  k: Float[Array, "B S K C"],
  v: Float[Array, "B S K C"],
  query_segment: Int[Array, "B T"],
  key_segment: Int[Array, "B S"],
  *,
  causal: bool = False,
  sharding: Sharding | None = None,
  implementation: str | None = None,
  tiles: AttentionTiles | None = None,
) -> Float[Array, "B T H C"]:
  """Computes grouped-query attention between positions of the same segment.

  Scores are scaled by C ** -0.5; softmax and accumulation are float32.
  Positions (RoPE) are applied by the caller. A T x S matrix is never built.

  Args:
    q: queries. Head h reads the keys of KV head h // (H / K).
    k: keys.
    v: values.
    query_segment: a query sees the keys whose segment id equals its own.
      0 is padding: such a query sees nothing. Ids are not negative.
    key_segment: ids of the keys; 0 is padding.
    causal: query t also sees only the keys at index s <= t (needs T == S and
      the same ids of both).
    sharding: the mesh and the axes over which rows, heads and memory are
      split; None on one device.
    implementation: a key of `IMPLEMENTATIONS`: "tpu" (our Pallas kernels of
      `kernels.tpu`), "cudnn" (NVIDIA's library), "triton" (our GPU kernels) or
      "reference" (plain JAX). None takes the first on TPU, on GPU the second
      or, for what that cannot do, the third, and the fourth elsewhere.
    tiles: of the TPU kernels, as `hourjax.parallel.chips.attention_tiles`
      returns them. Nothing else reads them.

  Returns:
    The weighted values, in the dtype of q. A query that sees no key gets
    zeros and passes no gradient.

  Raises:
    ValueError: for no queries or keys, H that is not a multiple of K, causal
      with T != S or with the memory split, sizes that the mesh does not
      divide, an unknown implementation or one of another platform, TPU
      kernels without tiles, and what the kernels cannot do
      (`kernels.tpu.call.check`, `kernels.cudnn`, `kernels.triton`).
  """
  _check(q, k, causal, sharding)
  implementation = choose_implementation(implementation, sharding, q)
  options = _Options(causal, sharding, implementation, tiles)
  with jax.named_scope("attention"):
    return _attention(q, k, v, query_segment, key_segment, options)


def choose_implementation(
  name: str | None,
  sharding: Sharding | None = None,
  q: jax.Array | jax.ShapeDtypeStruct | None = None,
) -> str:
  """Returns the implementation that a call uses, a key of `IMPLEMENTATIONS`.

  Args:
    name: what the caller asks for; None leaves it to the platform.
    sharding: of the call, for its mesh.
    q: its queries, or their shape, of which dtype and head dim matter on a
      GPU; None for such as every implementation takes.

  Raises:
    ValueError: for an unknown name, one that another platform runs, or cuDNN
      where it cannot compute the call.
  """
  here = platform(sharding)
  reason = "" if q is None or here != "gpu" else _without_cudnn(q)
  if name is None:
    of_gpu = "triton" if reason else "cudnn"
    return {"tpu": "tpu", "gpu": of_gpu}.get(here, "reference")
  if name not in IMPLEMENTATIONS:
    raise ValueError(
      f"no implementation of attention is called {name!r}; choose"
      f" {', '.join(IMPLEMENTATIONS)}, or none for the platform's own"
    )
  if IMPLEMENTATIONS[name] not in ("", here):
    raise ValueError(
      f"attention's implementation {name!r} runs on {IMPLEMENTATIONS[name]},"
      f" and this program is compiled for {here}; choose 'reference', or none"
      " for the platform's own"
    )
  if name == "cudnn" and reason:
    raise ValueError(f"{reason}; choose 'triton', or none for what fits")
  return name


def _without_cudnn(q: jax.Array | jax.ShapeDtypeStruct) -> str:
  """Returns why cuDNN cannot attend from these queries, or ""."""
  gpu = jax.default_backend() == "gpu"  # else the program is only lowered
  capability = jax.local_devices()[0].compute_capability if gpu else None
  return cudnn.unsupported(q.dtype, q.shape[3], capability)


def platform(sharding: Sharding | None = None) -> str:
  """Returns the platform that is compiled for: "tpu", "gpu" or "cpu".

  That is the platform of the given mesh, else of the mesh that is set (its
  devices may be of a topology, for compiling without a TPU), else of the
  default device.
  """
  mesh = None if sharding is None else sharding.mesh
  if isinstance(mesh, jax.sharding.Mesh):
    return mesh.devices.flat[0].platform
  device = jax.sharding.get_abstract_mesh().abstract_device
  if device is not None:
    return device.platform
  device = jax.config.values["jax_default_device"]
  if isinstance(device, str):
    return device
  return jax.default_backend() if device is None else device.platform


def backend(
  implementation: str, causal: bool, tiles: AttentionTiles | None = None
) -> Backend:
  """Returns the functions of an implementation.

  Args:
    implementation: a key of `IMPLEMENTATIONS`.
    causal: whether a query sees only the keys up to its own index.
    tiles: of the TPU kernels.

  Raises:
    ValueError: for TPU kernels that lack tiles.
  """
  if implementation == "tpu":
    if tiles is None:
      raise ValueError(
        "the TPU attention kernels need tiles; pass"
        " tiles=hourjax.parallel.chips.attention_tiles(q.dtype)"
      )
    return _with_causal(tpu, causal, tiles=tiles)
  modules: dict[str, types.ModuleType] = {
    "cudnn": cudnn,
    "triton": triton,
    "reference": reference,
  }
  found = _with_causal(modules[implementation], causal)
  return found._replace(takes_out=implementation == "cudnn")


def _with_causal(
  module: types.ModuleType, causal: bool, **others: Any
) -> Backend:
  """Returns a module's functions, with arguments that both of them take."""
  return Backend(
    functools.partial(module.forward, causal=causal, **others),
    functools.partial(module.backward, causal=causal, **others),
  )


def _attention(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  query_segment: jax.Array,
  key_segment: jax.Array,
  options: _Options,
) -> jax.Array:
  sharding = options.sharding
  if not options.causal or sharding is None:
    return _differentiable(q, k, v, query_segment, key_segment, options)
  # After the all-to-all each device has whole sequences of some heads. The part
  # with a custom gradient then has no collective, so it may be differentiated
  # inside of shard_map.
  specs = sharding.specs()
  options = options._replace(sharding=None)

  def local(*arrays: jax.Array) -> jax.Array:
    return _differentiable(*arrays, options)

  call = _shard_map(
    functools.partial(ulysses.causal, local, sharding.sequence),
    sharding,
    (*[specs.q] * 3, *[specs.query_segment] * 2),
    specs.q,
  )
  return call(q, k, v, query_segment, key_segment)


# The custom gradient is defined outside of shard_map. Inside, JAX transposes
# the psum of the forward pass into a second psum, which would count every
# device's gradient as often as there are devices.
@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _differentiable(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  query_segment: jax.Array,
  key_segment: jax.Array,
  options: _Options,
) -> jax.Array:
  return _forward(q, k, v, query_segment, key_segment, options)[0]


def _forward(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  query_segment: jax.Array,
  key_segment: jax.Array,
  options: _Options,
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
  """Returns the output, and what the backward pass needs."""
  sharding = options.sharding
  local: Callable = functools.partial(
    sharded.forward, _backend(options), sharding
  )
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


def _backward(
  options: _Options, saved: tuple[jax.Array, ...], d_out: jax.Array
) -> tuple[jax.Array | None, ...]:
  """Returns the gradients of `_differentiable`'s arrays; ids have none."""
  sharding = options.sharding
  local: Callable = functools.partial(
    sharded.backward, _backend(options), sharding
  )
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


def _backend(options: _Options) -> Backend:
  return backend(options.implementation, options.causal, options.tiles)


def _shard_map(
  function: Callable,
  sharding: Sharding,
  in_specs: tuple[PartitionSpec, ...],
  out_specs: PartitionSpec | tuple[PartitionSpec, ...],
) -> Callable:
  return jax.shard_map(
    function,
    mesh=sharding.mesh,
    in_specs=in_specs,
    out_specs=out_specs,
    # JAX would check which outputs are equal on all devices, and insert
    # collectives of its own; ours are written out in `kernels.sharded`.
    check_vma=False,
  )


def _check(
  q: jax.Array, k: jax.Array, causal: bool, sharding: Sharding | None
) -> None:
  """Raises ValueError for sizes that `attention` does not take."""
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
  implementation: str | None = None,
  tiles: AttentionTiles | None = None,
) -> Float[Array, "B S"]:
  """Returns the attention weights on each key, summed over queries and heads.

  The gradient of attention's output with respect to the values is its
  weights: with the gradient 1 in one channel of every query, that channel of
  dv is the sum that is wanted. So the backward kernels compute it, and no
  T x S matrix is built. A row of the result sums to the number of heads times
  the number of queries that see a key.

  Args:
    q: queries, as for `attention`.
    k: keys, as for `attention`; weights are rounded to their dtype.
    query_segment: ids of the queries.
    key_segment: ids of the keys.
    sharding: as for `attention`.
    implementation: as for `attention`.
    tiles: as for `attention`.

  Returns:
    float32 sums of weights.
  """

  def mixed(values: jax.Array) -> jax.Array:
    return attention(
      q,
      k,
      values,
      query_segment,
      key_segment,
      sharding=sharding,
      implementation=implementation,
      tiles=tiles,
    )

  # The values themselves do not matter to their gradient.
  out, transpose = jax.vjp(mixed, k)
  (d_values,) = transpose(jnp.zeros_like(out).at[..., 0].set(1))
  return d_values[..., 0].astype(jnp.float32).sum(-1)


def cached_attention(
  q: Float[Array, "B n H C"],
  k: Float[Array, "B n K C"],
  v: Float[Array, "B n K C"],
  cached_k: Float[Array, "B S K C"],
  cached_v: Float[Array, "B S K C"],
  length: Int[Array, "B"],
) -> Float[Array, "B n H C"]:
  """Computes causal attention of a few new tokens that follow cached ones.

  New token m sees the first `length` cached tokens and the new ones up to
  itself. A decoder does this for every token that it decodes: little arithmetic
  over much memory, so it is plain JAX. On a mesh the compiler splits it as
  the cache is split, and sums over devices what is small.

  Scores are scaled by C ** -0.5; softmax and sums are float32. Positions
  (RoPE) are applied by the caller. An n x S matrix is built.

  Args:
    q: queries of the new tokens.
    k: keys of the new tokens.
    v: values of the new tokens.
    cached_k: keys of earlier tokens; what lies beyond `length` is ignored.
    cached_v: values of earlier tokens, likewise.
    length: number of cached tokens of each row, 0 or more.

  Returns:
    The weighted values, in the dtype of v.
  """
  rows, new, heads, dim = q.shape
  kv_heads = k.shape[2]
  q = q.reshape(rows, new, kv_heads, heads // kv_heads, dim)
  scale = dim**-0.5
  there = jnp.arange(cached_k.shape[1])[None] < length[:, None]
  earlier = jnp.where(
    there[:, None, None, None], _scores(q, cached_k) * scale, _NEVER
  )
  before = jnp.tril(jnp.ones((new, new), bool))
  own = jnp.where(before[None, None, None], _scores(q, k) * scale, _NEVER)
  # One softmax over both parts, which are never joined: joining would copy
  # the cache for every token.
  top = jnp.maximum(earlier.max(-1), own.max(-1))[..., None]
  earlier, own = jnp.exp(earlier - top), jnp.exp(own - top)
  total = earlier.sum(-1) + own.sum(-1)
  out = _mixed(earlier, cached_v) + _mixed(own, v)
  out = jnp.moveaxis(out / total[..., None], 3, 1)
  return out.reshape(rows, new, heads, dim).astype(v.dtype)


def _scores(q: jax.Array, k: jax.Array) -> jax.Array:
  """Multiplies [B, n, K, G, C] and [B, m, K, C] to float32 [B, K, G, n, m]."""
  return jnp.einsum(
    "bnkgc,bmkc->bkgnm", q, k, preferred_element_type=jnp.float32
  )


def _mixed(weight: jax.Array, v: jax.Array) -> jax.Array:
  """Multiplies [B, K, G, n, m] and [B, m, K, C] to float32 [B, K, G, n, C]."""
  return jnp.einsum(
    "bkgnm,bmkc->bkgnc",
    weight.astype(v.dtype),
    v,
    preferred_element_type=jnp.float32,
  )
