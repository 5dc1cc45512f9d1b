"""The compiled steps of an answer: encode_memory, read_memory, prefill, decode.

    features  -> encode_memory -> MemoryCache
    prompts   -> read_memory   -> visual tokens that have read the memory
              -> prefill       -> KV cache, one row a prompt
              -> decode        -> answer tokens, one after the other
    next turn -> extend        -> decode

`encode_memory` does not depend on the question, so its result serves all
questions about a memory. Several prompts about one memory lie in one packed
row, distinguished by segment ids; from `prefill` on each has a row of its own.
"""

import functools
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from hourjax.batch import Batch
from hourjax.inference.sampling import RowSampling, sample
from hourjax.models.attention import KeysValues
from hourjax.models.config import ModelConfig
from hourjax.models.layers import layer_callback
from hourjax.models.params import with_params
from hourjax.parallel.rules import constrain

Params = Mapping[str, jax.Array]


class MemoryCache(NamedTuple):
  """Holds what all questions about a memory share, on the devices.

  Attributes:
    keys_values: keys and values [blocks, 1, S, K, C] of the memory tokens, for
      the cross-attention of each MemAug block; None for a model without
      MemAug.
    kept: projected memory tokens that forgetting keeps. Queries start from
      them.
    segment: 1 at a memory token, 0 at padding.
  """

  keys_values: KeysValues | None
  kept: Float[Array, "1 X D"]
  segment: Int[Array, "1 S"]


class DecodeState(NamedTuple):
  """Holds N answers while they are decoded, on the devices.

  Attributes:
    cache: KV cache of the decoder [layers, N, M, K, C].
    length: number of tokens of each row in the cache.
    last_token: newest token of each row; it is not in the cache yet.
    answer: tokens of the answer so far; -1 where there is none yet.
    count: number of tokens in each row of `answer`.
    done: True for rows that have ended, by a stop token or by the limit.
  """

  cache: KeysValues
  length: Int[Array, "N"]
  last_token: Int[Array, "N"]
  answer: Int[Array, "N n"]
  count: Int[Array, "N"]
  done: Bool[Array, "N"]


@functools.partial(jax.jit, static_argnames="config")
def encode_memory(
  params: Params, batch: Batch, *, config: ModelConfig
) -> MemoryCache:
  """Projects the memory of one row to the keys and values that MemAug reads.

  Args:
    params: parameters by path.
    batch: one row with a memory; its `query_source` names the kept tokens.
    config: configuration of the model.
  """
  model = with_params(config, params)
  keys_values, kept = model.encode_memory(batch, batch.query_source)
  return MemoryCache(keys_values, kept, batch.memory_segment)


@functools.partial(jax.jit, static_argnames=("config", "on_layer"))
def read_memory(
  params: Params,
  memory: MemoryCache,
  batch: Batch,
  probe_queries: Int[Array, "1 W"] | None,
  *,
  config: ModelConfig,
  on_layer: Callable[[], None] | None = None,
) -> tuple[Float[Array, "1 T D"], Float[Array, "blocks 1 S"] | None]:
  """Lets the queries of prompts read a memory through MemAug.

  Args:
    params: parameters by path.
    memory: cache of the memory that all prompts ask about.
    batch: one row of prompts; its `query_source` indexes the kept tokens.
    probe_queries: indices of the queries whose attention is returned; -1 is
      padding.
    config: configuration of the model.
    on_layer: called on the host after each layer.

  Returns:
    The queries after MemAug, and the attention that each memory token gets
    from the probe queries in each block (None without probe queries).
  """
  # The segments of the prompts are 1, 2, ...; that of the memory is 1.
  reads = jnp.minimum(batch.query_segment, 1)
  batch = batch._replace(memory_segment=memory.segment, query_reads=reads)
  model = with_params(config, params)
  with layer_callback(on_layer):
    return model.read_memory(
      memory.keys_values, memory.kept, batch, probe_queries
    )


@functools.partial(jax.jit, static_argnames=("config", "capacity", "on_layer"))
def prefill(
  params: Params,
  augmented: Float[Array, "1 T D"] | None,
  batch: Batch,
  start: Int[Array, "N"],
  *,
  config: ModelConfig,
  capacity: int,
  on_layer: Callable[[], None] | None = None,
) -> KeysValues:
  """Fills the decoder's KV cache with the prompts of a packed row.

  Args:
    params: parameters by path.
    augmented: queries as `read_memory` returns them; None for prompts of text
      alone.
    batch: one row of prompts.
    start: position in the row at which each prompt begins.
    config: configuration of the model.
    capacity: length of the cache. What it holds beyond a prompt is undefined.
    on_layer: called on the host after each layer.

  Returns:
    KV cache [layers, N, capacity, K, C], one row a prompt.
  """
  model = with_params(config, params)
  with layer_callback(on_layer):
    packed = model.prefill(augmented, batch)
  index = start[:, None] + jnp.arange(capacity)[None]

  def unpacked(values: Array) -> Array:
    """Copies [layers, 1, L, K, C] to one row a prompt."""
    values = values[:, 0].at[:, index].get(mode="clip")
    return _constrain_cache(values)

  return KeysValues(*map(unpacked, packed))


@functools.partial(jax.jit, static_argnames="capacity")
def take_rows(
  state: DecodeState, rows: Int[Array, "n"], capacity: int
) -> DecodeState:
  """Returns a state of these rows, with a KV cache of this length.

  Args:
    state: of answers.
    rows: which of them, in any order and any number of times.
    capacity: length of the cache, at least that of the state.
  """
  extra = capacity - state.cache.k.shape[2]
  width = ((0, 0), (0, 0), (0, extra), (0, 0), (0, 0))

  def taken(values: Array) -> Array:
    return _constrain_cache(jnp.pad(values[:, rows], width))

  cache = KeysValues(*map(taken, state.cache))
  others = {
    name: value[rows]
    for name, value in state._asdict().items()
    if name != "cache"
  }
  return DecodeState(cache=cache, **others)


@jax.jit
def join(states: list[DecodeState]) -> DecodeState:
  """Returns one state of the rows of several, one after the other.

  Args:
    states: whose caches and answers are of one length.
  """
  if len(states) == 1:
    return states[0]
  cache = KeysValues(
    *(
      _constrain_cache(jnp.concatenate(parts, axis=1))
      for parts in zip(*(state.cache for state in states))
    )
  )
  others = {
    name: jnp.concatenate([getattr(state, name) for state in states])
    for name in DecodeState._fields
    if name != "cache"
  }
  return DecodeState(cache=cache, **others)


@functools.partial(jax.jit, static_argnames="config", donate_argnames="state")
def decode(
  params: Params,
  state: DecodeState,
  sampling: RowSampling,
  stop_tokens: Int[Array, "e"],
  max_tokens: Int[Array, ""],
  num_steps: Int[Array, ""],
  *,
  config: ModelConfig,
) -> DecodeState:
  """Decodes up to `num_steps` tokens more for each row.

  Args:
    params: parameters by path.
    state: answers so far; its buffers are donated.
    sampling: how tokens are chosen.
    stop_tokens: tokens that end an answer; they become part of it.
    max_tokens: longest answer, at most the width of `state.answer`.
    num_steps: most tokens that this call decodes.
    config: configuration of the model.
  """
  model = with_params(config, params)

  def step(carry: tuple[DecodeState, Array]) -> tuple[DecodeState, Array]:
    """Decodes one token of every row that has not ended."""
    now, steps_done = carry
    hidden, new = model.decoder.extend(
      model.decoder.embed_few(now.last_token[:, None]), now.cache, now.length
    )
    logits = constrain(model.logits(hidden[:, 0]), "rows", None)
    token = sample(logits, sampling, now.count)
    # Rows that have ended write out of bounds, which mode="drop" ignores.
    index = jnp.where(now.done, now.answer.shape[1], now.count)
    stops = (token[:, None] == stop_tokens[None]).any(1)
    ended = stops | (now.count + 1 >= max_tokens)
    rows = jnp.arange(len(index))
    added = (~now.done).astype(jnp.int32)
    return DecodeState(
      cache=_insert(now.cache, new, now.length, added),
      length=now.length + added,
      last_token=jnp.where(now.done, now.last_token, token),
      answer=now.answer.at[rows, index].set(token, mode="drop"),
      count=now.count + added,
      done=now.done | ended,
    ), steps_done + 1

  def is_unfinished(carry: tuple[DecodeState, Array]) -> Array:
    """Returns whether there is a step left and a row that has not ended."""
    now, steps_done = carry
    return (steps_done < num_steps) & ~now.done.all()

  return jax.lax.while_loop(is_unfinished, step, (state, jnp.int32(0)))[0]


@functools.partial(jax.jit, static_argnames="config", donate_argnames="state")
def extend(
  params: Params,
  state: DecodeState,
  tokens: Int[Array, "N n"],
  count: Int[Array, "N"],
  *,
  config: ModelConfig,
) -> DecodeState:
  """Appends the next turn's tokens to the KV cache; `decode` then answers it.

  Args:
    params: parameters by path.
    state: answers so far; its buffers are donated. Its `last_token` is not in
      the cache, so `tokens` has to begin with it.
    tokens: tokens to append, padded at the end. The last one that counts
      becomes `last_token`, and is not put into the cache.
    count: number of tokens of each row that count, at least 1.
    config: configuration of the model.
  """
  model = with_params(config, params)
  embedded = model.decoder.embed_few(tokens)
  _, new = model.decoder.extend(embedded, state.cache, state.length)
  last = jnp.take_along_axis(tokens, count[:, None] - 1, axis=1)[:, 0]
  return DecodeState(
    cache=_insert(state.cache, new, state.length, count - 1),
    length=state.length + count - 1,
    last_token=last,
    answer=jnp.full_like(state.answer, -1),
    count=jnp.zeros_like(state.count),
    done=jnp.zeros_like(state.done),
  )


def _insert(
  cache: KeysValues,
  new: KeysValues,
  length: Int[Array, "N"],
  count: Int[Array, "N"],
) -> KeysValues:
  """Writes the first `count` new tokens of each row behind its `length`.

  Row with length 2, count 2 and new tokens x y z: a b . . . -> a b x y .
  """
  # Every place of the cache looks up what it gets, instead of new tokens being
  # sent to places: so each device fills its own part of a cache that is split
  # by position, and nothing of the cache travels.
  place = jnp.arange(cache.k.shape[2])[None] - length[:, None]
  fresh = ((place >= 0) & (place < count[:, None]))[None, :, :, None, None]
  place = jnp.clip(place, 0, new.k.shape[2] - 1)[None, :, :, None, None]

  def inserted(old: Array, values: Array) -> Array:
    found = jnp.take_along_axis(values, place, axis=2)
    return _constrain_cache(jnp.where(fresh, found, old))

  return KeysValues(*map(inserted, cache, new))


def _constrain_cache(values: Array) -> Array:
  """Splits a cache [layers, N, M, K, C] over the mesh."""
  return constrain(values, None, "rows", "positions", "heads", None)
