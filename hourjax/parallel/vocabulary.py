"""Word embeddings and cross entropy over a vocabulary split over devices.

Every device has the embeddings of some words. Along `fsdp` their width is split
in storage, and gathered while they are used. Devices along `seq` and `tensor`
work on the same rows, so each computes all positions of these rows for its own
words.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Num

from hourjax.parallel import collectives
from hourjax.parallel.rules import spec

CHUNK = 1024  # label positions whose logits exist at a time
_TABLE = spec("words", "table")
_TOKENS = spec("rows")
_SPLIT = spec("rows", "positions", None)
_WORDS = ("seq", "tensor")
_ROWS = ("data", "fsdp")
_NO_WORD = 2**30  # larger than any id


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def embed(
  table: Num[Array, "N D"],
  token: Int[Array, "B M"],
  dtype: jax.typing.DTypeLike,
) -> Num[Array, "B M D"]:
  """Returns word embeddings in `dtype`, or their bits.

  The gradient of the table is summed in float32. M is split over positions.

  Args:
    table: row n is the embedding of word n; or the bits of these, as uint16.
    token: ids of words; those below 0 read row 0.
    dtype: of the result; that of the table if it holds bits.
  """
  function = collectives.local_shard_map(
    functools.partial(_embed_local, dtype), (_TABLE, _TOKENS), _SPLIT
  )
  return function(table, jnp.maximum(token, 0))


def _embed_local(
  dtype: jax.typing.DTypeLike, table: jax.Array, token: jax.Array
) -> jax.Array:
  table = collectives.all_gather(table.astype(dtype), "fsdp", dim=1)
  local = token - collectives.axis_index(*_WORDS) * table.shape[0]
  there = (local >= 0) & (local < table.shape[0])
  rows = jnp.where(there[..., None], table.at[local].get(mode="clip"), 0)
  return collectives.reduce_scatter(
    collectives.psum(rows, "tensor"), "seq", dim=1
  )


def _embed_forward(
  table: jax.Array, token: jax.Array, dtype: jax.typing.DTypeLike
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
  """Returns the embeddings, and what the backward pass needs."""
  # An array of size 0, which carries length and dtype to the backward pass.
  like = jnp.zeros((table.shape[0], 0), table.dtype)
  return embed(table, token, dtype), (token, like)


def _embed_backward(
  dtype: jax.typing.DTypeLike,
  saved: tuple[jax.Array, jax.Array],
  d_rows: jax.Array,
) -> tuple[jax.Array, None]:
  """Returns the gradient of the table; the ids have none."""
  del dtype
  token, like = saved

  def local(d_rows: jax.Array, token: jax.Array) -> jax.Array:
    words = like.shape[0] // collectives.axis_size(*_WORDS)
    d_rows = collectives.all_gather(d_rows, "seq", dim=1).astype(jnp.float32)
    own = token - collectives.axis_index(*_WORDS) * words
    # An id below 0 would count from the end; beyond the end it is dropped.
    own = jnp.where(own < 0, words, own)
    d_table = jnp.zeros((words, d_rows.shape[-1]), jnp.float32)
    d_table = d_table.at[own].add(d_rows, mode="drop")
    return collectives.psum(
      collectives.reduce_scatter(d_table, "fsdp", dim=1), "data"
    )

  function = collectives.local_shard_map(local, (_SPLIT, _TOKENS), _TABLE)
  d_table = function(d_rows, jnp.maximum(token, 0))
  return d_table.astype(like.dtype), None


embed.defvjp(_embed_forward, _embed_backward)


@jax.custom_vjp
def cross_entropy(
  hidden: Float[Array, "B L D"],
  table: Float[Array, "N D"],
  target: Int[Array, "B L"],
  weight: Float[Array, "B L"],
) -> Float[Array, ""]:
  """Returns weight x cross entropy in float32, summed over all labels.

  Logits are computed only for positions with a target, `CHUNK` of them at a
  time: no more of the B x L x N logits ever exist, and padding and visual
  tokens cost nothing. Loss and gradients are computed in one pass of three
  products, and nothing is computed again in the backward pass.

  Args:
    hidden: split over rows and positions; its dtype is that of the products.
    table: row n is the output vector of word n.
    target: the word, or below 0 where there is none.
    weight: of each position, float32. It has no gradient.
  """
  return (token_losses(hidden, table, target) * weight).sum()


def token_losses(
  hidden: Float[Array, "B L D"],
  table: Float[Array, "N D"],
  target: Int[Array, "B L"],
) -> Float[Array, "B L"]:
  """Returns the cross entropy of each position; 0 where there is no target.

  As `cross_entropy`, but without weights and without a gradient.

  Args:
    hidden: as for `cross_entropy`.
    table: as for `cross_entropy`.
    target: as for `cross_entropy`.
  """
  function = collectives.local_shard_map(
    lambda hidden, table, target: _entropy(hidden, table, target, None)[0],
    (_SPLIT, _TABLE, _TOKENS),
    _TOKENS,
  )
  return function(hidden, table, target)


def most_likely(
  hidden: Float[Array, "B L D"],
  table: Float[Array, "N D"],
  target: Int[Array, "B L"],
) -> Bool[Array, "B L"]:
  """Returns where the target is the most likely word, as `argmax` finds it.

  False where there is no target. Of several words of the same logit the first
  counts. Logits exist for a chunk of positions at a time, as in
  `cross_entropy`, and each device has those of its own words.

  Args:
    hidden: as for `cross_entropy`.
    table: as for `cross_entropy`.
    target: as for `cross_entropy`.
  """
  function = collectives.local_shard_map(
    _most_likely_local, (_SPLIT, _TABLE, _TOKENS), _TOKENS
  )
  return function(hidden, table, target)


def _most_likely_local(
  hidden: jax.Array, table: jax.Array, target: jax.Array
) -> jax.Array:
  words = collectives.all_gather(table.astype(hidden.dtype), "fsdp", dim=1)
  first_word = collectives.axis_index(*_WORDS) * words.shape[0]
  hidden = collectives.all_gather(hidden, "seq", dim=1)
  rows = hidden.shape[:2]
  hidden, target = hidden.reshape(-1, hidden.shape[-1]), target.reshape(-1)
  chunk = min(CHUNK, target.size)
  order, count = _labelled_first(target, chunk)

  def chunk_step(number: jax.Array, right: jax.Array) -> jax.Array:
    """Compares the labels of one chunk of positions."""
    at = jax.lax.dynamic_slice_in_dim(order, number * chunk, chunk)
    x = hidden.at[at].get(mode="fill", fill_value=0)
    label = target.at[at].get(mode="fill", fill_value=-1)
    logits = _dot("id,nd->in", x, words)
    own, best = logits.max(-1), logits.argmax(-1) + first_word
    # The smallest id among the devices that have the largest logit.
    there = own == collectives.pmax(own, *_WORDS)
    best = -collectives.pmax(jnp.where(there, -best, -_NO_WORD), *_WORDS)
    return right.at[at].set(label == best, mode="drop")

  chunks = (count + chunk - 1) // chunk
  right = jnp.zeros(target.shape, bool)
  return jax.lax.fori_loop(0, chunks, chunk_step, right).reshape(rows)


def _entropy_forward(
  hidden: jax.Array, table: jax.Array, target: jax.Array, weight: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
  """Returns the weighted sum of the losses, and its gradients."""
  function = collectives.local_shard_map(
    _entropy, (_SPLIT, _TABLE, _TOKENS, _TOKENS), (_TOKENS, _SPLIT, _TABLE)
  )
  losses, d_hidden, d_table = function(hidden, table, target, weight)
  return (losses * weight).sum(), (d_hidden, d_table)


def _entropy_backward(
  saved: tuple[jax.Array, jax.Array], d_loss: jax.Array
) -> tuple[jax.Array | None, ...]:
  """Returns the gradients of the hidden states and of the table."""
  d_hidden, d_table = saved
  d_hidden = (d_loss * d_hidden).astype(d_hidden.dtype)
  return d_hidden, d_loss * d_table, None, None


cross_entropy.defvjp(_entropy_forward, _entropy_backward)


def _entropy(
  hidden: jax.Array,
  table: jax.Array,
  target: jax.Array,
  weight: jax.Array | None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Computes the losses of a device's rows, and gradients of a weighted sum.

  Args:
    hidden: the device's part.
    table: the device's part.
    target: of the device's rows, all positions.
    weight: of each position in the sum; None for no gradients, which are then
      empty arrays.

  Returns:
    Losses [B, L], not weighted, and the gradients of hidden and table.
  """
  gradients = weight is not None
  dtype, width = hidden.dtype, hidden.shape[-1]
  words = collectives.all_gather(table.astype(dtype), "fsdp", dim=1)
  own_words = collectives.axis_index(*_WORDS) * words.shape[0] + jnp.arange(
    words.shape[0]
  )
  length = hidden.shape[1]
  hidden = collectives.all_gather(hidden, "seq", dim=1)
  rows = hidden.shape[:2]
  hidden, target = hidden.reshape(-1, width), target.reshape(-1)
  weight = None if weight is None else weight.reshape(-1)
  chunk = min(CHUNK, target.size)
  order, count = _labelled_first(target, chunk)

  def chunk_step(
    number: jax.Array, carry: tuple[jax.Array, jax.Array, jax.Array]
  ) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Adds the losses and gradients of one chunk of positions."""
    losses, d_hidden, d_words = carry
    at = jax.lax.dynamic_slice_in_dim(order, number * chunk, chunk)
    x = hidden.at[at].get(mode="fill", fill_value=0)
    label = target.at[at].get(mode="fill", fill_value=-1)
    trained = label >= 0
    logits = _dot("id,nd->in", x, words)
    top = collectives.pmax(logits.max(-1), *_WORDS)
    total = collectives.psum(jnp.exp(logits - top[:, None]).sum(-1), *_WORDS)
    lse = top + jnp.log(total)
    own = label[:, None] == own_words[None]
    score = collectives.psum(jnp.where(own, logits, 0).sum(-1), *_WORDS)
    losses = losses.at[at].set(jnp.where(trained, lse - score, 0), mode="drop")
    if weight is not None:
      # Weighted in float32, before the one rounding to the products' dtype.
      share = weight.at[at].get(mode="fill", fill_value=0)
      d_logits = (jnp.exp(logits - lse[:, None]) - own) * share[:, None]
      d_logits = jnp.where(trained[:, None], d_logits, 0).astype(dtype)
      d_x = collectives.psum(_dot("in,nd->id", d_logits, words), *_WORDS)
      # A factor between sum and cast: without it the compiler casts first, and
      # sums over devices in bfloat16. It is 1 wherever the gradient counts.
      d_x *= trained[:, None]
      d_hidden = d_hidden.at[at].set(d_x.astype(dtype), mode="drop")
      d_words += _dot("in,id->nd", d_logits, x)
    return losses, d_hidden, d_words

  start = (
    jnp.zeros(target.shape, jnp.float32),
    jnp.zeros(hidden.shape if gradients else (0, width), dtype),
    jnp.zeros(words.shape if gradients else (0, width), jnp.float32),
  )
  # As many chunks as there are labels for. Devices whose parts are added up
  # have the same rows, and so the same number of chunks.
  chunks = (count + chunk - 1) // chunk
  losses, d_hidden, d_words = jax.lax.fori_loop(0, chunks, chunk_step, start)
  losses = losses.reshape(rows)
  if not gradients:
    return losses, d_hidden, d_words
  d_hidden = jax.lax.dynamic_slice_in_dim(
    d_hidden.reshape(*rows, width),
    collectives.axis_index("seq") * length,
    length,
    axis=1,
  )
  d_words = collectives.psum(
    collectives.reduce_scatter(d_words, "fsdp", dim=1), "data"
  )
  return losses, d_hidden, d_words.astype(table.dtype)


def _labelled_first(
  target: jax.Array, chunk: int
) -> tuple[jax.Array, jax.Array]:
  """Returns the positions that have a target, in order, and their number.

  The array is filled up to whole chunks with the length of `target`, which is
  no position. For the targets
  -1 7 -1 9 in chunks of 4: [1, 3, 4, 4] and 2.
  """
  there = target >= 0
  length = -(-target.size // chunk) * chunk
  place = jnp.where(there, jnp.cumsum(there) - 1, length)
  order = jnp.full(length, target.size, jnp.int32)
  position = jnp.arange(target.size, dtype=jnp.int32)
  return order.at[place].set(position, mode="drop"), there.sum()


def _dot(equation: str, a: jax.Array, b: jax.Array) -> jax.Array:
  """Multiplies as einsum does, summed in float32."""
  return jnp.einsum(equation, a, b, preferred_element_type=jnp.float32)
