"""Gathers of rows that lie on other devices, with their gradients.

Each device looks up what it holds of the wanted rows and adds zeros for the
others; a sum over the devices, which sends as much as there are results and
nothing of the table, completes them. One number and zeros add exactly.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from hourjax.parallel import collectives as over
from hourjax.parallel.rules import spec


@jax.custom_vjp
def gather_rows(
  table: Float[Array, "B X D"], index: Int[Array, "B N"]
) -> Float[Array, "B N D"]:
  """table[b, index[b, n]]; an index below 0 reads row 0.

  Args:
    table: split over rows, and X over the memory's axis.
    index: into X. N is split as X is.
  """
  return _take(table, jnp.maximum(index, 0))


def _take(table, index):
  function = over.local_shard_map(_take_here, (_SPLIT, _ROWS), _SPLIT)
  return function(table, index)


def _take_here(table, index):
  rows = _lookup(table, index - over.place("seq") * table.shape[1])
  return over.scatter_sum(rows, "seq", dim=1)


def _take_forward(table, index):
  # An array of no size: the shape that the backward pass needs.
  like = jnp.zeros((0, *table.shape[1:]), table.dtype)
  return gather_rows(table, index), (index, like)


def _take_backward(saved, d_rows):
  index, like = saved

  def here(d_rows, index):
    length = like.shape[1] // over.size("seq")
    d_rows = over.gather(d_rows, "seq", dim=1)
    local = index - over.place("seq") * length
    return _scatter(d_rows, local, length).astype(like.dtype)

  function = over.local_shard_map(here, (_SPLIT, _ROWS), _SPLIT)
  return function(d_rows, jnp.maximum(index, 0)), None


gather_rows.defvjp(_take_forward, _take_backward)


@jax.custom_vjp
def build_memory(
  stored: Float[Array, "B X D"],
  encoded: Float[Array, "B E D"],
  newline: Float[Array, "D"],
  source: Int[Array, "B S"],
) -> Float[Array, "B S D"]:
  """The memory of each row, from parts that each device holds.

  Args:
    stored: projected features; X is split as the memory is.
    encoded: projected tokens of what was encoded in the step; on all devices.
    newline: the learned token.
    source: of each memory token: -1 for the newline, below X / (devices) a
      feature of the device that holds the memory token, else an encoded token
      (`data.dealing`).
  """
  return _memory_forward(stored, encoded, newline, source)[0]


def _memory_forward(stored, encoded, newline, source):
  function = over.local_shard_map(
    _memory_here, (_SPLIT, _ROWS, spec(None), _INDEX), _SPLIT
  )
  memory = function(stored, encoded, newline, source)
  likes = tuple(jnp.zeros((0, *x.shape[1:]), x.dtype)
                for x in (stored, encoded))  # fmt: skip
  return memory, (source, *likes)


def _memory_here(stored, encoded, newline, source):
  table = jnp.concatenate([stored, encoded], axis=1)
  rows = _lookup(table, jnp.maximum(source, 0))
  newline = newline.astype(rows.dtype)[None, None]
  return jnp.where(source[..., None] < 0, newline, rows)


def _memory_backward(saved, d_memory):
  source, stored, encoded = saved

  def here(d_memory, source):
    own = stored.shape[1] // over.size("seq")
    # Where there are no encoded tokens every source below 0 is a newline.
    d_table = _scatter(d_memory, source, own + encoded.shape[1])
    d_encoded = over.total(d_table[:, own:], "seq")
    is_newline = (source < 0)[..., None]
    d_newline = jnp.where(is_newline, d_memory.astype(jnp.float32), 0)
    d_newline = over.total(d_newline.sum((0, 1)), "data", "fsdp", "seq")
    return (
      d_table[:, :own].astype(stored.dtype),
      d_encoded.astype(encoded.dtype),
      d_newline,
    )

  function = over.local_shard_map(
    here, (_SPLIT, _INDEX), (_SPLIT, _ROWS, spec(None))
  )
  return *function(d_memory, source), None


build_memory.defvjp(_memory_forward, _memory_backward)

_SPLIT = spec("rows", "memory", None)
_INDEX = spec("rows", "memory")
_ROWS = spec("rows")


def _lookup(table, index):
  """table[b, index[b, n]], zeros where the index is outside of the table."""
  there = (index >= 0) & (index < table.shape[1])
  rows = jax.vmap(lambda t, i: t.at[i].get(mode="clip"))(table, index)
  return jnp.where(there[..., None], rows, 0)


def _scatter(values, index, length):
  """The transpose of `_lookup`."""

  def row(values, index):
    table = jnp.zeros((length, values.shape[-1]), values.dtype)
    # Below 0 would count from the end.
    index = jnp.where(index < 0, length, index)
    return table.at[index].add(values, mode="drop")

  return jax.vmap(row)(values, index)
