"""Writes parameters as safetensors files in shards, in any order.

Where each tensor lies is known from the shapes alone. A parameter is therefore
written straight to its place, a few rows at a time, and may be forgotten
before the next one is read:

  layout of all files, from names, shapes and dtypes
       |
  ShardWriter: headers -> one parameter after the other -> index

Stacked layers go to one tensor a layer, and each of the parameters that
officially are rows of one tensor (q, k and v) to its own rows.
"""

import dataclasses
import itertools
import json
import math
import os
import pathlib
import shutil
from collections.abc import Mapping
from typing import Any

import numpy as np

from hourjax.errors import UserError
from hourjax.models.config import ModelConfig
from hourjax.weights.description import write_config
from hourjax.weights.folder import INDEX, shortened
from hourjax.weights.names import Entry, key_table
from hourjax.weights.tensors import (
  DTYPES,
  check_finite,
  in_threads,
  transpose,
)

SHARD_BYTES = 5 * 10**9  # largest file, as in transformers
_FORMAT = {"format": "pt"}  # transformers refuses files that do not say it
_BLOCK = 2**21  # values that are converted at a time
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclasses.dataclass(frozen=True)
class Place:
  """Describes where a tensor is written.

  Attributes:
    file: name of the shard.
    start: offset of the first byte, counted from the first tensor's.
    shape: official shape.
    dtype: of the tensor.
  """

  file: str
  start: int
  shape: tuple[int, ...]
  dtype: np.dtype

  @property
  def nbytes(self) -> int:
    """Returns the number of bytes."""
    return math.prod(self.shape) * self.dtype.itemsize


def layout(
  table: list[Entry],
  shapes: Mapping[str, tuple[int, ...]],
  dtypes: Mapping[str, np.dtype],
  shard_bytes: int = SHARD_BYTES,
) -> dict[str, Place]:
  """Returns where each tensor goes, by official name.

  The tensors of one layer lie together, layer after layer. A shard ends before
  the tensor with which it would be larger than `shard_bytes`, so that only one
  that holds a single tensor can be larger.

  Args:
    table: entries to write.
    shapes: of our parameters by path.
    dtypes: of the tensors by path of our parameters.
    shard_bytes: size of a shard in bytes, without its header.
  """
  shards: list[dict[str, Place]] = [{}]
  held = 0
  for name, entry in _ordered(table):
    ours = [shapes[path][1 if entry.layers else 0 :] for path in entry.paths]
    dtype = np.dtype(dtypes[entry.paths[0]])
    place = Place("", held, entry.official_shape(ours), dtype)
    if shards[-1] and held + place.nbytes > shard_bytes:
      shards.append({})
      place, held = dataclasses.replace(place, start=0), 0
    shards[-1][name] = place
    held += place.nbytes
  return {
    name: dataclasses.replace(
      place, file=f"model-{number:05d}-of-{len(shards):05d}.safetensors"
    )
    for number, shard in enumerate(shards, 1)
    for name, place in shard.items()
  }


def _ordered(table: list[Entry]) -> list[tuple[str, Entry]]:
  """Returns each tensor's name and entry, those of a layer together."""

  def stack(entry: Entry) -> tuple[str, int]:
    return entry.official.partition("{i}")[0], entry.layers

  found = []
  for (_, layers), group in itertools.groupby(table, key=stack):
    entries = list(group)
    if not layers:
      found += [(entry.official, entry) for entry in entries]
    for layer in range(layers):
      found += [(entry.official.format(i=layer), entry) for entry in entries]
  return found


class ShardWriter:
  """Writes the files of a checkpoint, one parameter after the other."""

  def __init__(
    self,
    folder: pathlib.Path,
    table: list[Entry],
    shapes: Mapping[str, tuple[int, ...]],
    dtypes: Mapping[str, np.dtype],
    *,
    shard_bytes: int = SHARD_BYTES,
  ):
    """Plans the files; they are made on `__enter__`.

    Args:
      folder: that exists.
      table: entries to write.
      shapes: of our parameters by path.
      dtypes: of the tensors by path of our parameters.
      shard_bytes: as in `layout`.
    """
    self._folder, self._shapes = folder, shapes
    self._places = layout(table, shapes, dtypes, shard_bytes)
    self._parts = {
      path: (entry, part)
      for entry in table
      for part, path in enumerate(entry.paths)
    }
    self._left = set(self._parts)
    self._files: dict[str, int] = {}
    self._first: dict[str, int] = {}  # offset of a file's first tensor

  @property
  def nbytes(self) -> int:
    """Returns the bytes of all tensors."""
    return sum(place.nbytes for place in self._places.values())

  def __enter__(self) -> "ShardWriter":
    """Makes the files with their headers.

    Raises:
      UserError: the disk has too little room.
    """
    free = shutil.disk_usage(self._folder).free
    if free < self.nbytes:
      raise UserError(
        f"{self._folder.parent} has {free / 1e9:.2f} GB free and the weights"
        f" take {self.nbytes / 1e9:.2f} GB; make room, or choose another folder"
      )
    for file in dict.fromkeys(place.file for place in self._places.values()):
      header = _header(self._places, file)
      path = self._folder / file
      flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
      self._files[file] = os.open(path, flags, 0o666)
      _write(self._files[file], header, 0)
      self._first[file] = len(header)
    return self

  def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
    """Closes the files, and writes the index if the block succeeded.

    Raises:
      ValueError: a parameter was not written.
    """
    for file in self._files.values():
      os.close(file)
    self._files = {}
    if error is not None:
      return
    if self._left:
      raise ValueError(f"not written: {shortened(sorted(self._left))}")
    index = {
      "metadata": {"total_size": self.nbytes},
      "weight_map": {name: place.file for name, place in self._places.items()},
    }
    (self._folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")

  def write(self, path: str, value: np.ndarray) -> int:
    """Writes one of our parameters; a second time, it is replaced.

    Args:
      path: of the parameter; one that the table lacks is left out.
      value: of the whole parameter, all layers.

    Returns:
      The number of bytes.

    Raises:
      UserError: it has another shape than the model's, or is not finite in
        the dtype that is written.
    """
    if path not in self._parts:
      return 0
    entry, part = self._parts[path]
    if tuple(value.shape) != tuple(self._shapes[path]):
      raise UserError(
        f"{path} is {tuple(value.shape)} in the weights and"
        f" {tuple(self._shapes[path])} in the model that is written; use the"
        " config.json that they came with"
      )
    layers = value if entry.layers else [value]

    def write_one(job: tuple[str, np.ndarray]) -> None:
      self._write_rows(job[0], entry, sum(entry.rows[:part]), job[1])

    in_threads(write_one, list(zip(entry.names(), layers, strict=True)))
    self._left.discard(path)
    return value.size * self._places[entry.names()[0]].dtype.itemsize

  def _write_rows(
    self, name: str, entry: Entry, row: int, value: np.ndarray
  ) -> None:
    """Writes one layer's parameter into a tensor, from a row on."""
    place = self._places[name]
    file, start = self._files[place.file], self._first[place.file]
    width = math.prod(place.shape[1:])
    at = start + place.start + row * width * place.dtype.itemsize
    for block in _blocks(value, entry, place.dtype):
      check_finite(name, block, "take an earlier checkpoint, or train again")
      _write(file, block.reshape(-1).view(np.uint8).data, at)
      at += block.nbytes


def _blocks(value: np.ndarray, entry: Entry, dtype: np.dtype) -> Any:
  """Yields a layer's parameter as contiguous blocks of official rows."""
  if entry.layout == "conv":
    yield np.ascontiguousarray(entry.official_rows(value).astype(dtype))
    return
  transposed = entry.layout == "transposed"
  count = value.shape[1 if transposed else 0]
  width = max(1, value.size // max(1, count))
  step = max(1, _BLOCK // width)
  for first in range(0, count, step):
    part = slice(first, first + step)
    block = value[:, part] if transposed else value[part]
    with np.errstate(over="ignore", invalid="ignore"):  # checked afterwards
      block = np.ascontiguousarray(block.astype(dtype))
    if transposed:
      rows = np.empty(block.shape[::-1], dtype)
      transpose(rows, block)
      block = rows
    yield block


def _header(places: Mapping[str, Place], file: str) -> bytes:
  """Returns the first bytes of a file: the header's length and the header."""
  described: dict[str, Any] = {"__metadata__": _FORMAT}
  for name, place in places.items():
    if place.file == file:
      described[name] = {
        "dtype": _NAMES[place.dtype],
        "shape": list(place.shape),
        "data_offsets": [place.start, place.start + place.nbytes],
      }
  text = json.dumps(described, separators=(",", ":")).encode()
  # The format wants tensors at multiples of 8 bytes.
  text += b" " * (-len(text) % 8)
  return len(text).to_bytes(8, "little") + text


def _write(file: int, data: Any, at: int) -> None:
  """Writes all bytes at an offset."""
  view = memoryview(data)
  while view:
    count = os.pwrite(file, view, at)
    view, at = view[count:], at + count


def save_params(
  params: Mapping[str, Any],
  config: ModelConfig,
  folder: str | os.PathLike,
  *,
  shard_bytes: int = SHARD_BYTES,
) -> None:
  """Writes parameters that are in memory as an official checkpoint folder.

  Args:
    params: by path; each is written in its own dtype.
    config: of the model.
    folder: to write, made if it is not there.
    shard_bytes: as in `layout`.
  """
  folder = pathlib.Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  write_config(config, folder)
  arrays = {path: np.asarray(value) for path, value in params.items()}
  shapes = {path: value.shape for path, value in arrays.items()}
  dtypes = {path: value.dtype for path, value in arrays.items()}
  writer = ShardWriter(
    folder, key_table(config), shapes, dtypes, shard_bytes=shard_bytes
  )
  with writer:
    for path, value in arrays.items():
      writer.write(path, value)
