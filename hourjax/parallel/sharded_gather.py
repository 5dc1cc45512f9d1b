"""Sharded gathers: of rows that lie on other devices, with their gradients.

Each device looks up those of the wanted rows that it holds, with zeros in place
of the others; the sum over the devices is the result. So only results are sent,
and nothing of the table, and adding zeros rounds nothing.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from hourjax.parallel import collectives
from hourjax.parallel.rules import spec


@jax.custom_vjp
def gather_rows(
  table: Float[Array, "B X D"], index: Int[Array, "B N"]
) -> Float[Array, "B N D"]:
  """Returns table[b, index[b, n]], of a table that is split over devices.

  Args:
    table: split over rows, and X over the memory's axis.
    index: into X; one below 0 reads row 0. N is split as X is.
  """
  return _gather(table, jnp.maximum(index, 0))


def _gather(table: jax.Array, index: jax.Array) -> jax.Array:
  function = collectives.local_shard_map(_gather_local, (_SPLIT, _ROWS), _SPLIT)
  return function(table, index)


def _gather_local(table: jax.Array, index: jax.Array) -> jax.Array:
  # Row x of the whole table is row x - (first row of this device) of its part.
  rows = _lookup(table, index - collectives.axis_index("seq") * table.shape[1])
  return collectives.reduce_scatter(rows, "seq", dim=1)


def _gather_forward(
  table: jax.Array, index: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
  """Returns the rows, and what the backward pass needs."""
  # An array of size 0, which carries shape and dtype to the backward pass.
  like = jnp.zeros((0, *table.shape[1:]), table.dtype)
  return gather_rows(table, index), (index, like)


def _gather_backward(
  saved: tuple[jax.Array, jax.Array], d_rows: jax.Array
) -> tuple[jax.Array, None]:
  """Returns the gradient of the table; the index has none."""
  index, like = saved

  def local(d_rows: jax.Array, index: jax.Array) -> jax.Array:
    length = like.shape[1] // collectives.axis_size("seq")
    d_rows = collectives.all_gather(d_rows, "seq", dim=1)
    own = index - collectives.axis_index("seq") * length
    return _scatter(d_rows, own, length).astype(like.dtype)

  function = collectives.local_shard_map(local, (_SPLIT, _ROWS), _SPLIT)
  return function(d_rows, jnp.maximum(index, 0)), None


gather_rows.defvjp(_gather_forward, _gather_backward)


@jax.custom_vjp
def build_memory(
  stored: Float[Array, "B X D"],
  encoded: Float[Array, "B E D"],
  newline: Float[Array, "D"],
  source: Int[Array, "B S"],
) -> Float[Array, "B S D"]:
  """Returns the memory of each row, from parts that each device holds.

  With X / (devices) = 2 features on each device and encoded tokens e, the
  sources [0, 1, -1, 2] on a device give its features 0 and 1, the newline, and
  encoded token 0.

  Args:
    stored: projected features; X is split as the memory is.
    encoded: projected tokens of what was encoded in the step; on all devices.
    newline: the learned token.
    source: of each memory token: -1 for the newline, below X / (devices) a
      feature of the device that holds the memory token, else an encoded token
      (`data.sequence_sharding`).
  """
  return _memory_forward(stored, encoded, newline, source)[0]


def _memory_forward(
  stored: jax.Array, encoded: jax.Array, newline: jax.Array, source: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
  """Returns the memory, and what the backward pass needs."""
  function = collectives.local_shard_map(
    _memory_local, (_SPLIT, _ROWS, spec(None), _INDEX), _SPLIT
  )
  memory = function(stored, encoded, newline, source)
  # Arrays of size 0 for shapes and dtypes, as in `_gather_forward`.
  likes = tuple(
    jnp.zeros((0, *x.shape[1:]), x.dtype) for x in (stored, encoded)
  )
  return memory, (source, *likes)


def _memory_local(
  stored: jax.Array, encoded: jax.Array, newline: jax.Array, source: jax.Array
) -> jax.Array:
  table = jnp.concatenate([stored, encoded], axis=1)
  rows = _lookup(table, jnp.maximum(source, 0))
  newline = newline.astype(rows.dtype)[None, None]
  return jnp.where(source[..., None] < 0, newline, rows)


def _memory_backward(
  saved: tuple[jax.Array, ...], d_memory: jax.Array
) -> tuple[jax.Array | None, ...]:
  """Returns the gradients of `build_memory`'s arrays; the source has none."""
  source, stored, encoded = saved

  def local(
    d_memory: jax.Array, source: jax.Array
  ) -> tuple[jax.Array, jax.Array, jax.Array]:
    own = stored.shape[1] // collectives.axis_size("seq")
    # `_scatter` drops the newlines, whose source is below 0.
    d_table = _scatter(d_memory, source, own + encoded.shape[1])
    # Every device has all encoded tokens, but only some of the memory tokens
    # that are copies of them: their gradients are summed.
    d_encoded = collectives.psum(d_table[:, own:], "seq")
    is_newline = (source < 0)[..., None]
    d_newline = jnp.where(is_newline, d_memory.astype(jnp.float32), 0)
    d_newline = collectives.psum(d_newline.sum((0, 1)), "data", "fsdp", "seq")
    return (
      d_table[:, :own].astype(stored.dtype),
      d_encoded.astype(encoded.dtype),
      d_newline,
    )

  function = collectives.local_shard_map(
    local, (_SPLIT, _INDEX), (_SPLIT, _ROWS, spec(None))
  )
  return *function(d_memory, source), None


build_memory.defvjp(_memory_forward, _memory_backward)

_SPLIT = spec("rows", "memory", None)
_INDEX = spec("rows", "memory")
_ROWS = spec("rows")


def _lookup(table: jax.Array, index: jax.Array) -> jax.Array:
  """Returns table[b, index[b, n]]; zeros for an index outside of the table."""
  there = (index >= 0) & (index < table.shape[1])
  rows = jax.vmap(lambda t, i: t.at[i].get(mode="clip"))(table, index)
  return jnp.where(there[..., None], rows, 0)


def _scatter(values: jax.Array, index: jax.Array, length: int) -> jax.Array:
  """Adds values [B, N, D] to the rows of a table of zeros [B, length, D].

  The transpose of `_lookup`, in float32: the only frame of a video of one frame
  is in memory 128 times, and of 128 terms bfloat16 has lost most bits of the
  later ones.
  """

  def row(values: jax.Array, index: jax.Array) -> jax.Array:
    table = jnp.zeros((length, values.shape[-1]), jnp.float32)
    # An index below 0 would count from the end; beyond the end it is dropped.
    index = jnp.where(index < 0, length, index)
    return table.at[index].add(values.astype(jnp.float32), mode="drop")

  return jax.vmap(row)(values, index)
