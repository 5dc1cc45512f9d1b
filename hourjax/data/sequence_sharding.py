"""Sequence sharding: in which order the devices that share a row hold it.

The `seq` devices of the mesh share each row. A memory is not cut into n long
stretches, which would leave devices idle where videos are short: each device
gets an n-th of the tokens of every frame, and so has equally much to do for
videos of any length, and each memory token lies on the device that has the
feature it is made of. Newlines and encoded tokens, which every device can make,
go to the devices in turn (round-robin), and so do queries. Decoder positions
stay in order.

With 2 devices and frames a, b of 2 tokens, "|" being the newline:

    row        a0 a1 |  b0 b1 |
    device 0   a0 |  b0             the first half of each frame's tokens
    device 1   a1 b1 |              the second half; newlines in turn
"""

import math

import numpy as np
from jaxtyping import Int32, Int64, Shaped

from hourjax.batch import Batch
from hourjax.data.rows import RowSpec
from hourjax.errors import UserError

_MEMORY = ("memory_source", "memory_position", "memory_segment")
_QUERIES = (
  "query_token",
  "query_source",
  "query_position",
  "query_segment",
  "query_reads",
)


def check_sequence_sharding(spec: RowSpec, devices: int) -> None:
  """Checks that `devices` devices can share rows evenly.

  Raises:
    UserError: they cannot; names every capacity that prevents it.
  """
  capacity, problems = spec.capacity, []
  if capacity.features and spec.frame_tokens % devices:
    problems.append(
      f"it does not divide the {spec.frame_tokens} tokens of a frame"
    )
  if capacity.features % spec.frame_tokens:
    problems.append(
      f"config.rows.features={capacity.features} is no whole number of frames"
      f" of {spec.frame_tokens} tokens"
    )
  for name in ("memory", "queries", "decoder"):
    length = getattr(capacity, name)
    if length % devices:
      problems.append(
        f"config.rows.{name}={length} is no multiple of it (next:"
        f" {math.ceil(length / devices) * devices})"
      )
  if devices > 1 and problems:
    raise UserError(
      f"config.mesh.seq={devices} cannot share rows: {'; '.join(problems)};"
      " change the capacity or config.mesh.seq"
    )


def sequence_sharding_order(batch: Batch, spec: RowSpec, devices: int) -> Batch:
  """Returns rows in the order in which `devices` devices hold them.

  Each array is reordered so that a device's part is contiguous, except for
  features, which stay; `features_part` returns a device's part of them. Sources
  are renumbered: memory_source indexes the device's own features and then the
  encoded tokens; query_source and decoder_source index memory and queries in
  the new order.

  With 2 devices queries [q0 q1 q2 q3] become [q0 q2 | q1 q3], and decoder
  sources [0 1 2 3] become [0 2 1 3].

  Args:
    batch: [B, ...] numpy arrays as `rows` fills them.
    spec: of the rows; `check_sequence_sharding` has passed it.
    devices: how many share a row.
  """
  if devices == 1:
    return batch
  changed = batch._asdict()
  order, new_place = _memory_order(batch.memory_source, spec, devices)
  for name in _MEMORY:
    changed[name] = np.take_along_axis(changed[name], order, axis=1)
  changed["memory_source"] = _own_source(
    changed["memory_source"], spec, devices
  )
  changed["query_source"] = _renumbered(batch.query_source, new_place)
  queries = batch.query_token.shape[1]
  # Query t goes to device t % n, and is number t // n there.
  order = np.arange(queries).reshape(-1, devices).T.reshape(-1)
  for name in _QUERIES:
    changed[name] = changed[name][:, order]
  place = np.empty(queries, np.int32)
  place[order] = np.arange(queries)
  changed["decoder_source"] = _renumbered(batch.decoder_source, place[None])
  return Batch(**changed)


def features_part(
  features: Shaped[np.ndarray, "B X V"],
  frame_tokens: int,
  devices: int,
  part: int,
) -> Shaped[np.ndarray, "B x V"]:
  """Returns one device's tokens of each frame.

  Frames of 4 tokens [0 1 2 3 | 4 5 6 7] on 2 devices: part 0 is [0 1 4 5].

  Args:
    features: of rows; X is a whole number of frames.
    frame_tokens: of a frame; the devices divide it.
    devices: that share a row.
    part: number of the device.

  Returns:
    Features of x = X / devices tokens.
  """
  rows, _, width = features.shape
  frames = features.reshape(rows, -1, devices, frame_tokens // devices, width)
  return frames[:, :, part].reshape(rows, -1, width)


def _memory_order(
  source: Int32[np.ndarray, "B S"], spec: RowSpec, devices: int
) -> tuple[Int64[np.ndarray, "B S"], Int32[np.ndarray, "B S"]]:
  """Finds for each memory token the device that holds it.

  Returns:
    (order, new_place): the memory in its new order is memory[order], and
    token s of the row is at new_place[s] there. Each device's tokens stay in
    the order of the row.
  """
  rows, length = source.shape
  each = spec.frame_tokens // devices
  stored = (source >= 0) & (source < spec.capacity.features)
  # Tokens 0 .. each-1 of every frame lie on device 0, and so on.
  device = np.where(stored, source % spec.frame_tokens // max(each, 1), 0)
  # All other tokens, padding at the end included, go to devices in turn.
  free = ~stored
  turn = np.cumsum(free, axis=1) - 1
  device = np.where(free, turn % devices, device)
  order = np.argsort(device, axis=1, kind="stable")
  counts = np.stack([(device == d).sum(1) for d in range(devices)], axis=1)
  if (counts != length // devices).any():
    # Every frame, repeated or not, gives each device equally many tokens, and
    # what goes in turn fills up the rest.
    raise ValueError(
      f"memory of {length} tokens gives {counts.tolist()} to {devices}"
      " devices; a frame's tokens must be in memory equally often"
    )
  new_place = np.empty((rows, length), np.int32)
  # The inverse permutation: new_place[order[i]] = i.
  np.put_along_axis(
    new_place, order, np.arange(length, dtype=np.int32)[None], axis=1
  )
  return order, new_place


def _own_source(
  source: Int32[np.ndarray, "B S"], spec: RowSpec, devices: int
) -> Int32[np.ndarray, "B S"]:
  """Renumbers visual tokens of the row to those of the device that has them.

  With frames of 4 tokens, 8 features and 2 devices, tokens
  [0 1 2 3 4 5 6 7 | 8 9] become [0 1 0 1 2 3 2 3 | 4 5]: each device has 4
  features of its own, and encoded tokens come after them.
  """
  tokens, features = spec.frame_tokens, spec.capacity.features
  each = tokens // devices
  own = source // tokens * each + source % tokens % max(each, 1)
  encoded = source - features + features // devices
  numbered = np.where(source >= features, encoded, own)
  return np.where(source < 0, -1, numbered).astype(np.int32)


def _renumbered(
  source: Int32[np.ndarray, "B N"], place: Int32[np.ndarray, "b X"]
) -> Int32[np.ndarray, "B N"]:
  """Returns place[source]; -1 stays -1. A single row of places serves all."""
  if not place.shape[1]:
    return source  # nothing to point to
  found = np.take_along_axis(place, np.maximum(source, 0), axis=1)
  return np.where(source < 0, -1, found).astype(np.int32)
