"""Rows dealt to the devices that share them, like cards.

With n devices a row, frame by frame each gets an n-th of the frame's tokens,
so that all have equally much to do for videos of any length, and each memory
token lies on the device that has the feature it is made of. Newlines and
encoded tokens, which every device can make, are dealt in turn; so are queries.
Decoder positions stay in order. With 2 devices and frames of 2 tokens, memory
a0 a1 | b0 b1 | becomes a0 | b0 and a1 b1 |.
"""

import math

import numpy as np

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
  """Raises UserError naming every capacity that cannot be dealt evenly."""
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


def deal(batch: Batch, spec: RowSpec, devices: int) -> Batch:
  """Rows in the order in which `devices` devices hold them.

  What a device holds is contiguous, but for features, of which
  `features_part` gives each device its own. Sources are renumbered:
  memory_source counts a device's own features, then encoded tokens;
  query_source and decoder_source count dealt memory and dealt queries.

  Args:
    batch: [B, ...] numpy arrays as `rows` fills them.
    spec: of the rows; `check_sequence_sharding` has passed it.
    devices: that share a row.
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
  # Place t of the row goes to device t % n, there to place t // n.
  dealt = np.arange(queries).reshape(-1, devices).T.reshape(-1)
  for name in _QUERIES:
    changed[name] = changed[name][:, dealt]
  place = np.empty(queries, np.int32)
  place[dealt] = np.arange(queries)
  changed["decoder_source"] = _renumbered(batch.decoder_source, place[None])
  return Batch(**changed)


def features_part(
  features: np.ndarray, frame_tokens: int, devices: int, part: int
) -> np.ndarray:
  """[B, X / n, V]: a device's tokens of each frame of features [B, X, V]."""
  rows, _, width = features.shape
  frames = features.reshape(rows, -1, devices, frame_tokens // devices, width)
  return frames[:, :, part].reshape(rows, -1, width)


def _memory_order(source, spec, devices):
  """(order, new_place), int [B, S]: dealt memory is memory[order].

  On equal terms a row keeps its order on each device.
  """
  rows, length = source.shape
  each = spec.frame_tokens // devices
  stored = (source >= 0) & (source < spec.capacity.features)
  device = np.where(stored, source % spec.frame_tokens // max(each, 1), 0)
  # All others, padding at the end included, in turn.
  free = ~stored
  turn = np.cumsum(free, axis=1) - 1
  device = np.where(free, turn % devices, device)
  order = np.argsort(device, axis=1, kind="stable")
  counts = np.stack([(device == d).sum(1) for d in range(devices)], axis=1)
  if (counts != length // devices).any():
    # Free tokens fill up what frames repeated unevenly leave.
    raise ValueError(
      f"memory of {length} tokens is dealt {counts.tolist()} to {devices}"
      " devices; a frame's tokens must be in memory equally often"
    )
  new_place = np.empty((rows, length), np.int32)
  np.put_along_axis(
    new_place, order, np.arange(length, dtype=np.int32)[None], axis=1
  )
  return order, new_place


def _own_source(source, spec, devices):
  """Row numbers of visual tokens to numbers on the device that holds them."""
  tokens, features = spec.frame_tokens, spec.capacity.features
  each = tokens // devices
  own = source // tokens * each + source % tokens % max(each, 1)
  encoded = source - features + features // devices
  numbered = np.where(source >= features, encoded, own)
  return np.where(source < 0, -1, numbered).astype(np.int32)


def _renumbered(source, place):
  if not place.shape[1]:
    return source  # nothing to point to
  found = np.take_along_axis(place, np.maximum(source, 0), axis=1)
  return np.where(source < 0, -1, found).astype(np.int32)
