"""Word embeddings and cross entropy over a vocabulary split over devices.

Every device has its part of the words, gathered over FSDP for the time of its
use. Devices along `seq` and `tensor` share a row, so each serves all of the
row's positions with its own words.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Num

from hourjax.parallel import collectives as over
from hourjax.parallel.rules import spec

CHUNK = 1024  # label positions whose logits exist at a time
_TABLE = spec("words", "table")
_TOKENS = spec("rows")
_SPLIT = spec("rows", "positions", None)
_WORDS = ("seq", "tensor")
_ROWS = ("data", "fsdp")


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def embed(
  table: Num[Array, "N D"],
  token: Int[Array, "B M"],
  dtype: jax.typing.DTypeLike,
) -> Num[Array, "B M D"]:
  """Word embeddings in `dtype`, or their bits. Ids below 0 read row 0.

  The gradient of the table is summed in float32. M is split over positions.
  """
  function = over.local_shard_map(
    functools.partial(_embed_here, dtype), (_TABLE, _TOKENS), _SPLIT
  )
  return function(table, jnp.maximum(token, 0))


def _embed_here(dtype, table, token):
  table = over.gather(table.astype(dtype), "fsdp", dim=1)
  local = token - over.place(*_WORDS) * table.shape[0]
  there = (local >= 0) & (local < table.shape[0])
  rows = jnp.where(there[..., None], table.at[local].get(mode="clip"), 0)
  return over.scatter_sum(over.total(rows, "tensor"), "seq", dim=1)


def _embed_forward(table, token, dtype):
  like = jnp.zeros((table.shape[0], 0), table.dtype)
  return embed(table, token, dtype), (token, like)


def _embed_backward(dtype, saved, d_rows):
  del dtype
  token, like = saved

  def here(d_rows, token):
    words = like.shape[0] // over.size(*_WORDS)
    d_rows = over.gather(d_rows, "seq", dim=1).astype(jnp.float32)
    local = token - over.place(*_WORDS) * words
    local = jnp.where(local < 0, words, local)
    d_table = jnp.zeros((words, d_rows.shape[-1]), jnp.float32)
    d_table = d_table.at[local].add(d_rows, mode="drop")
    return over.total(over.scatter_sum(d_table, "fsdp", dim=1), "data")

  function = over.local_shard_map(here, (_SPLIT, _TOKENS), _TABLE)
  d_table = function(d_rows, jnp.maximum(token, 0))
  return d_table.astype(like.dtype), None


embed.defvjp(_embed_forward, _embed_backward)


@jax.custom_vjp
def cross_entropy(
  hidden: Float[Array, "B L D"],
  table: Float[Array, "N D"],
  target: Int[Array, "B L"],
) -> Float[Array, ""]:
  """Cross entropy in float32, summed over the positions with a target.

  Only these positions meet the vocabulary, `CHUNK` at a time: of B L x N
  logits no more ever exist, and what padding and visual tokens would cost is
  not spent. Loss and gradients are computed in one pass: three products, and
  nothing is computed again.

  Args:
    hidden: split over rows and positions; its dtype is that of the products.
    table: row n is the output vector of word n.
    target: the word, or below 0 where there is none.
  """
  return token_losses(hidden, table, target).sum()


def token_losses(
  hidden: Float[Array, "B L D"],
  table: Float[Array, "N D"],
  target: Int[Array, "B L"],
) -> Float[Array, "B L"]:
  """Cross entropy of each position; 0 where there is no target.

  As `cross_entropy`, but without a gradient.
  """
  function = over.local_shard_map(
    lambda *parts: _entropy(*parts, gradients=False)[0],
    (_SPLIT, _TABLE, _TOKENS),
    _TOKENS,
  )
  return function(hidden, table, target)


def _entropy_forward(hidden, table, target):
  function = over.local_shard_map(
    functools.partial(_entropy, gradients=True),
    (_SPLIT, _TABLE, _TOKENS),
    (_TOKENS, _SPLIT, _TABLE),
  )
  losses, d_hidden, d_table = function(hidden, table, target)
  return losses.sum(), (d_hidden, d_table)


def _entropy_backward(saved, d_loss):
  d_hidden, d_table = saved
  return (d_loss * d_hidden).astype(d_hidden.dtype), d_loss * d_table, None


cross_entropy.defvjp(_entropy_forward, _entropy_backward)


def _entropy(hidden, table, target, *, gradients):
  """Losses of a device's rows, and the gradients of their sum."""
  dtype, width = hidden.dtype, hidden.shape[-1]
  words = over.gather(table.astype(dtype), "fsdp", dim=1)
  own_words = over.place(*_WORDS) * words.shape[0] + jnp.arange(words.shape[0])
  length = hidden.shape[1]
  hidden = over.gather(hidden, "seq", dim=1)
  rows = hidden.shape[:2]
  hidden, target = hidden.reshape(-1, width), target.reshape(-1)
  chunk = min(CHUNK, target.size)
  order, count = _labelled_first(target, chunk)

  def visit(number, carry):
    losses, d_hidden, d_words = carry
    at = jax.lax.dynamic_slice_in_dim(order, number * chunk, chunk)
    x = hidden.at[at].get(mode="fill", fill_value=0)
    label = target.at[at].get(mode="fill", fill_value=-1)
    trained = label >= 0
    logits = _dot("id,nd->in", x, words)
    top = over.largest(logits.max(-1), *_WORDS)
    total = over.total(jnp.exp(logits - top[:, None]).sum(-1), *_WORDS)
    lse = top + jnp.log(total)
    own = label[:, None] == own_words[None]
    score = over.total(jnp.where(own, logits, 0).sum(-1), *_WORDS)
    losses = losses.at[at].set(jnp.where(trained, lse - score, 0), mode="drop")
    if gradients:
      d_logits = jnp.exp(logits - lse[:, None]) - own
      d_logits = jnp.where(trained[:, None], d_logits, 0).astype(dtype)
      d_x = over.total(_dot("in,nd->id", d_logits, words), *_WORDS)
      # A factor after the sum, which would else be cast before it is sent.
      d_x *= trained[:, None]
      d_hidden = d_hidden.at[at].set(d_x.astype(dtype), mode="drop")
      d_words += _dot("in,id->nd", d_logits, x)
    return losses, d_hidden, d_words

  start = (
    jnp.zeros(target.shape, jnp.float32),
    jnp.zeros(hidden.shape if gradients else (0, width), dtype),
    jnp.zeros(words.shape if gradients else (0, width), jnp.float32),
  )
  # As many chunks as there are labels for. Devices that add up parts share
  # their rows, so they agree on the number.
  chunks = (count + chunk - 1) // chunk
  losses, d_hidden, d_words = jax.lax.fori_loop(0, chunks, visit, start)
  losses = losses.reshape(rows)
  if not gradients:
    return losses, d_hidden, d_words
  d_hidden = jax.lax.dynamic_slice_in_dim(
    d_hidden.reshape(*rows, width), over.place("seq") * length, length, axis=1
  )
  d_words = over.total(over.scatter_sum(d_words, "fsdp", dim=1), "data")
  return losses, d_hidden, d_words.astype(table.dtype)


def _labelled_first(target, chunk):
  """Positions with a target in order, then numbers past the end; how many.

  For targets -1 7 -1 9 in chunks of 4: [1, 3, 4, 4] and 2.
  """
  there = target >= 0
  length = -(-target.size // chunk) * chunk
  place = jnp.where(there, jnp.cumsum(there) - 1, length)
  order = jnp.full(length, target.size, jnp.int32)
  position = jnp.arange(target.size, dtype=jnp.int32)
  return order.at[place].set(position, mode="drop"), there.sum()


def _dot(equation, a, b):
  return jnp.einsum(equation, a, b, preferred_element_type=jnp.float32)
