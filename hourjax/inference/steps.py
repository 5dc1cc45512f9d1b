"""The steps of an answer, compiled: encode_memory, read_memory, prefill, write, extend.

    features -> encode_memory -> [keys and values of the memory, kept tokens]
    prompts  -> read_memory   -> visual tokens that have read the memory
             -> prefill  -> [keys and values of the prompts], one row a prompt
             -> write    -> tokens, one after the other
    the next turn of a conversation -> extend -> write

What `encode_memory` gives does not depend on what is asked. Several prompts about
one memory lie in one row, told apart by segments; from `prefill` on each has a
row of its own.
"""

import functools
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from hourjax.batch import Batch
from hourjax.inference.sampling import Draw, draw
from hourjax.models.attention import KeysValues
from hourjax.models.config import ModelConfig
from hourjax.models.layers import layers_told
from hourjax.models.params import with_params
from hourjax.parallel.rules import constrain

Params = Mapping[str, jax.Array]


class MemoryCache(NamedTuple):
  """A memory on the devices.

  Attributes:
    known: keys and values [blocks, 1, S, K, C] that MemAug reads, or None
      without MemAug.
    kept: memory tokens that queries start from.
    segment: 1 where there is a memory token, 0 where the row is padded.
  """

  known: KeysValues | None
  kept: Float[Array, "1 X D"]
  segment: Int[Array, "1 S"]


class DecodeState(NamedTuple):
  """N answers being written.

  Attributes:
    cache: the decoder's keys and values [layers, N, M, K, C].
    length: tokens of each row in the cache.
    token: the newest token of each row, which is not in the cache yet.
    written: tokens of the present turn so far; -1 where none is yet.
    count: how many they are.
    done: rows that have ended, by a stop token or by the turn's limit.
  """

  cache: KeysValues
  length: Int[Array, "N"]
  token: Int[Array, "N"]
  written: Int[Array, "N n"]
  count: Int[Array, "N"]
  done: Bool[Array, "N"]


@functools.partial(jax.jit, static_argnames="config")
def encode_memory(
  params: Params, batch: Batch, *, config: ModelConfig
) -> MemoryCache:
  """The memory of one row; its queries say which tokens are kept."""
  model = with_params(config, params)
  known, kept = model.encode_memory(batch, batch.query_source)
  return MemoryCache(known, kept, batch.memory_segment)


@functools.partial(jax.jit, static_argnames=("config", "told"))
def read_memory(
  params: Params,
  memory: MemoryCache,
  batch: Batch,
  watched: Int[Array, "1 W"] | None,
  *,
  config: ModelConfig,
  told: Callable[[], None] | None = None,
) -> tuple[Float[Array, "1 T D"], Float[Array, "blocks 1 S"] | None]:
  """The prompts' queries after MemAug.

  Args:
    params: of the model.
    memory: what they are about.
    batch: a row of prompts whose queries count what is kept.
    watched: queries whose attention is looked at; -1 is none.
    config: of the model.
    told: called on the host after each layer (`layers.layers_told`).

  Returns:
    Queries, and the attention that each memory token gets in each block.
  """
  reads = jnp.minimum(batch.query_segment, 1)  # all prompts, the one memory
  batch = batch._replace(memory_segment=memory.segment, query_reads=reads)
  model = with_params(config, params)
  with layers_told(told):
    return model.read_memory(memory.known, memory.kept, batch, watched)


@functools.partial(jax.jit, static_argnames=("config", "capacity", "told"))
def prefill(
  params: Params,
  augmented: Float[Array, "1 T D"] | None,
  batch: Batch,
  start: Int[Array, "N"],
  *,
  config: ModelConfig,
  capacity: int,
  told: Callable[[], None] | None = None,
) -> KeysValues:
  """A cache [layers, N, capacity, K, C] of the prompts in a row.

  Args:
    params: of the model.
    augmented: of `read_memory`; None for prompts of text alone.
    batch: the row of prompts.
    start: where in the row each prompt begins.
    config: of the model.
    capacity: of the cache; beyond a prompt its content means nothing.
    told: called on the host after each layer.
  """
  model = with_params(config, params)
  with layers_told(told):
    known = model.prefill(augmented, batch)
  index = start[:, None] + jnp.arange(capacity)[None]

  def unpacked(values):
    values = values[:, 0].at[:, index].get(mode="clip")
    return _split(values)

  return KeysValues(*map(unpacked, known))


@functools.partial(jax.jit, static_argnames="config", donate_argnames="writing")
def write(
  params: Params,
  writing: DecodeState,
  how: Draw,
  stop: Int[Array, "e"],
  limit: Int[Array, ""],
  steps: Int[Array, ""],
  *,
  config: ModelConfig,
) -> DecodeState:
  """Up to `steps` tokens more for each row.

  Args:
    params: of the model.
    writing: used up.
    how: to choose tokens.
    stop: tokens that end an answer; they are written too.
    limit: tokens of a turn, at most the width of `written`.
    steps: tokens of this call.
    config: of the model.
  """
  model = with_params(config, params)

  def step(state):
    now, done_steps = state
    hidden, new = model.decoder.extend(
      model.decoder.embed_few(now.token[:, None]), now.cache, now.length
    )
    logits = constrain(model.logits(hidden[:, 0]), "rows", None)
    token = draw(logits, how, now.count)
    at = jnp.where(now.done, now.written.shape[1], now.count)
    ended = (token[:, None] == stop[None]).any(1) | (now.count + 1 >= limit)
    rows = jnp.arange(len(at))
    going = (~now.done).astype(jnp.int32)
    return DecodeState(
      cache=_cached(now.cache, new, now.length, going),
      length=now.length + going,
      token=jnp.where(now.done, now.token, token),
      written=now.written.at[rows, at].set(token, mode="drop"),
      count=now.count + going,
      done=now.done | ended,
    ), done_steps + 1

  def more(state):
    now, done_steps = state
    return (done_steps < steps) & ~now.done.all()

  return jax.lax.while_loop(more, step, (writing, 0))[0]


@functools.partial(jax.jit, static_argnames="config", donate_argnames="writing")
def extend(
  params: Params,
  writing: DecodeState,
  tokens: Int[Array, "N n"],
  count: Int[Array, "N"],
  *,
  config: ModelConfig,
) -> DecodeState:
  """The next turn of each row, after which `write` goes on.

  Args:
    params: of the model.
    writing: used up; its `token` is not cached, so it has to come first in
      `tokens`.
    tokens: padded at the end; the last one that counts will not be cached.
    count: tokens of each row that count, at least 1.
    config: of the model.
  """
  model = with_params(config, params)
  embedded = model.decoder.embed_few(tokens)
  _, new = model.decoder.extend(embedded, writing.cache, writing.length)
  last = jnp.take_along_axis(tokens, count[:, None] - 1, axis=1)[:, 0]
  return DecodeState(
    cache=_cached(writing.cache, new, writing.length, count - 1),
    length=writing.length + count - 1,
    token=last,
    written=jnp.full_like(writing.written, -1),
    count=jnp.zeros_like(writing.count),
    done=jnp.zeros_like(writing.done),
  )


def _cached(cache, new, length, count):
  """The cache with the first `count` of the new tokens after `length`."""
  # Every place looks up what it gets, instead of tokens being sent to places:
  # so each device fills its own part of a cache that is split by place.
  place = jnp.arange(cache.k.shape[2])[None] - length[:, None]
  fresh = ((place >= 0) & (place < count[:, None]))[None, :, :, None, None]
  place = jnp.clip(place, 0, new.k.shape[2] - 1)[None, :, :, None, None]

  def put(old, values):
    found = jnp.take_along_axis(values, place, axis=2)
    return _split(jnp.where(fresh, found, old))

  return KeysValues(*map(put, cache, new))


def _split(values):
  return constrain(values, None, "rows", "positions", "heads", None)
