"""Reads checkpoints under official names: Hour-LLaVA's, and SigLIP's towers.

A checkpoint is a folder with `config.json` and `model.safetensors`, or shards
listed in `model.safetensors.index.json`. Of a SigLIP folder, or of an
Hour-LLaVA checkpoint, the vision tower can be read alone.

Each parameter is read from its place in the file into the memory in which it
will be used, a few rows at a time. Reading therefore takes the memory of the
parameters in their final dtype and a few megabytes. Where parameters are split
over devices, a process reads only what its own devices hold.
"""

import contextlib
import dataclasses
import functools
import pathlib
from collections.abc import Callable, Iterator, Mapping, Set
from typing import Any

import jax
import numpy as np

from hourjax import schema
from hourjax.errors import UserError
from hourjax.models.config import ModelConfig, VisionConfig
from hourjax.weights import names
from hourjax.weights.config import read_config, siglip_config
from hourjax.weights.folder import check_names, find_tensors
from hourjax.weights.names import (
  EMBEDDING,
  HEAD,
  Entry,
  is_unused,
  key_table,
)
from hourjax.weights.tensors import (
  DTYPES,
  MegabyteBar,
  TensorReader,
  aligned,
  in_threads,
  transpose,
)

Params = dict[str, Any]  # numpy or jax arrays by path
Each = Callable[[str, Any], Any]  # path and array to what is kept of it
# One for all parameters, or one by path.
Dtypes = type[np.generic] | np.dtype | Mapping[str, np.dtype]


def load_params(
  folder: str | pathlib.Path,
  config: ModelConfig,
  shapes: Mapping[str, tuple[int, ...]],
  *,
  dtype: Dtypes = np.float32,
  optional: Set[str] = frozenset(),
  shardings: Mapping[str, jax.sharding.Sharding] | None = None,
  each: Each = lambda path, value: value,
) -> Params:
  """Reads a checkpoint into our parameters.

  Args:
    folder: of the checkpoint.
    config: of the model.
    shapes: of all its parameters by path (`models.params.param_shapes`).
    dtype: of the result, one for all or by path.
    optional: paths that the checkpoint may lack; they are then left out.
    shardings: of each parameter by path; by default all are numpy arrays.
    each: returns what is kept of a parameter, before the next one is read.

  Returns:
    Arrays by path.

  Raises:
    UserError: lists all missing, unexpected and misshapen names; or says what
      is damaged, not finite or ambiguous.
  """
  with open_params(folder, config, shapes, optional=optional) as opened:
    table, reader = opened
    return read_entries(table, shapes, reader, dtype, shardings, each)


@contextlib.contextmanager
def open_params(
  folder: str | pathlib.Path,
  config: ModelConfig,
  shapes: Mapping[str, tuple[int, ...]],
  *,
  optional: Set[str] = frozenset(),
) -> Iterator[tuple[list[Entry], TensorReader]]:
  """Opens a checkpoint and checks all names and shapes before any is read.

  Args:
    folder: as in `load_params`.
    config: as in `load_params`.
    shapes: as in `load_params`.
    optional: as in `load_params`.

  Yields:
    The entries that are there, and the reader of their tensors.

  Raises:
    UserError: as `load_params`.
  """
  folder = pathlib.Path(folder)
  with TensorReader(find_tensors(folder)) as reader:
    table = _present(key_table(config), optional, reader)
    found = {n for n in reader.names() if not is_unused(config, n)}
    if config.decoder.tied and HEAD in found:
      _check_same_head(reader, folder)
      found -= {HEAD}
    check_names(table, shapes, reader, found, folder)
    yield table, reader


def read_entries(
  table: list[Entry],
  shapes: Mapping[str, tuple[int, ...]],
  reader: TensorReader,
  dtype: Dtypes,
  shardings: Mapping[str, jax.sharding.Sharding] | None = None,
  each: Each = lambda path, value: value,
) -> Params:
  """Reads the parameters of the entries from tensors that were checked.

  Args:
    table: entries to read.
    shapes: of our parameters by path.
    reader: of the official tensors.
    dtype: of the result, one for all or by path.
    shardings: of each parameter by path; None for numpy arrays.
    each: returns what is kept of a parameter, before the next one is read.

  Returns:
    Arrays by path.
  """
  if not isinstance(dtype, Mapping):
    dtype = dict.fromkeys(shapes, np.dtype(dtype))
  todo = [
    (entry, part, path)
    for entry in table
    for part, path in enumerate(entry.paths)
  ]
  total = sum(
    int(np.prod(shapes[path])) * dtype[path].itemsize for _, _, path in todo
  )
  params: Params = {}
  shown = jax.process_index() == 0
  with MegabyteBar(total, "reading weights", shown=shown) as count:
    for entry, part, path in todo:
      read = functools.partial(
        _read, entry, part, shapes[path], reader, dtype[path], count
      )
      if shardings is None:
        value = read(tuple(slice(None) for _ in shapes[path]))
      else:
        value = _placed(read, shapes[path], shardings[path])
      params[path] = each(path, value)
  return params


def _read(
  entry: Entry,
  part: int,
  shape: tuple[int, ...],
  reader: TensorReader,
  dtype: np.dtype,
  count: Callable[[int], None],
  index: tuple[slice, ...],
) -> np.ndarray:
  """Reads the slice `index` of the parameter entry.paths[part].

  Args:
    entry: of the official tensor.
    part: index into the entry's paths.
    shape: of the whole parameter.
    reader: of the official tensors.
    dtype: of the result.
    count: called with the number of bytes after each tensor.
    index: a slice for each dimension.
  """
  bounds = [s.indices(size)[:2] for s, size in zip(index, shape, strict=True)]
  result = aligned([stop - start for start, stop in bounds], dtype)
  names = entry.names()
  if not entry.layers:
    jobs = [(names[0], result)]
  else:
    (first, last), *bounds = bounds
    jobs = list(zip(names[first:last], result, strict=True))

  def read_one(job: tuple[str, np.ndarray]) -> None:
    name, target = job
    _read_rows(reader, name, entry, part, target, bounds)
    count(target.nbytes)

  in_threads(read_one, jobs)
  return result


def _read_rows(
  reader: TensorReader,
  name: str,
  entry: Entry,
  part: int,
  target: np.ndarray,
  bounds: list[tuple[int, int]],
) -> None:
  """Fills `target` with a slice of one layer from one official tensor.

  Args:
    reader: of the official tensors.
    name: of the official tensor.
    entry: of the official tensor.
    part: index into the entry's paths.
    target: one layer's slice of our parameter.
    bounds: start and stop of the slice along each of our axes.
  """
  axis, offset = entry.row_axis, sum(entry.rows[:part])
  start, stop = (bound + offset for bound in bounds[axis])
  columns = tuple(
    slice(None) if n == axis else slice(*bound)
    for n, bound in enumerate(bounds)
  )
  shape = [len(range(*b)) for b in bounds]
  whole = entry.layout == "same" and shape[1:] == list(reader[name].shape[1:])
  if whole and reader.fill(name, target, start):
    return
  for first, block in reader.rows(name, start, stop, target.dtype):
    place = slice(first - start, first - start + len(block))
    if entry.layout == "transposed":
      transpose(target[:, place], block[:, columns[0]])
    else:
      where = tuple(
        place if n == axis else slice(None) for n in range(len(shape))
      )
      target[where] = entry.transposed(block)[columns]


def _placed(
  read: Callable[[tuple[slice, ...]], np.ndarray],
  shape: tuple[int, ...],
  sharding: jax.sharding.Sharding,
) -> jax.Array:
  """Puts a parameter on its devices.

  This process reads once the smallest block that holds all of its devices'
  parts. A device on the CPU that holds the whole block uses it without a copy.

  Args:
    read: reads a block of the parameter.
    shape: of the parameter.
    sharding: of the parameter.
  """
  parts = [
    part
    for part in sharding.addressable_devices_indices_map(shape).values()
    if part is not None
  ]
  bounds = [
    [s.indices(size)[:2] for s, size in zip(part, shape, strict=True)]
    for part in parts
  ]
  block = [
    (min(start for start, _ in axis), max(stop for _, stop in axis))
    for axis in zip(*bounds, strict=True)
  ]
  values = read(tuple(slice(*bound) for bound in block))

  def part_of(index: tuple[slice, ...] | None) -> np.ndarray:
    if index is None:  # by its type; a map of indices has none
      return values
    cut = [s.indices(size)[:2] for s, size in zip(index, shape, strict=True)]
    return values[
      tuple(
        slice(start - first, stop - first)
        for (start, stop), (first, _) in zip(cut, block, strict=True)
      )
    ]

  return jax.make_array_from_callback(tuple(shape), sharding, part_of)


def _present(
  table: list[Entry], optional: Set[str], reader: TensorReader
) -> list[Entry]:
  """Leaves out optional entries of which no tensor is there."""
  found = reader.names()
  return [
    entry
    for entry in table
    if not set(entry.paths) <= optional or found & set(entry.names())
  ]


def _check_same_head(reader: TensorReader, folder: pathlib.Path) -> None:
  """Raises unless a head beside tied embeddings holds these embeddings."""
  head, embedding = reader[HEAD], reader[EMBEDDING]
  same = head.shape == embedding.shape
  if same and {head.dtype, embedding.dtype} <= set(DTYPES):
    wide = np.dtype(np.float32)
    rows = head.shape[0]
    same = all(
      np.array_equal(one, two)
      for (_, one), (_, two) in zip(
        reader.rows(HEAD, 0, rows, wide),
        reader.rows(EMBEDDING, 0, rows, wide),
        strict=True,
      )
    )
  if not same:
    raise UserError(
      f"{folder}/config.json says tie_word_embeddings, and {HEAD} differs from"
      f" {EMBEDDING}: either the first is used for words that are written, or"
      " the second; say false to use the head, or take it out of the files"
    )


# What Hugging Face's SigLIP assumes where config.json is silent.
_DEFAULTS = {
  "hidden_size": 768,
  "intermediate_size": 3072,
  "num_hidden_layers": 12,
  "num_attention_heads": 12,
  "image_size": 224,
  "patch_size": 16,
  "layer_norm_eps": 1e-6,
}
_SIGLIP = "vision_model."
_KIND = "siglip_vision_model"
_WHAT = (
  "--tower takes a SigLIP folder, an Hour-LLaVA checkpoint or a workdir of"
  " training"
)


def load_tower(
  folder: str | pathlib.Path,
  config: ModelConfig,
  shapes: Mapping[str, tuple[int, ...]],
) -> dict[str, np.ndarray]:
  """Reads the tower of a SigLIP folder or of an Hour-LLaVA checkpoint.

  Only the tower's tensors are read, without the last layer and the attention
  head of a SigLIP folder (see hourjax/README.md, Vision encoder).

  Args:
    folder: with config.json and safetensors files.
    config: of the model that the tower is for.
    shapes: of the model's parameters by path.

  Returns:
    float32 arrays by path ("vision/...").

  Raises:
    UserError: another size than the model's, or lists all missing and
      misshapen tensors.
  """
  folder = pathlib.Path(folder)
  _check_sizes(_sizes(folder / "config.json"), config.vision, folder)
  with TensorReader(find_tensors(folder)) as reader:
    siglip = any(name.startswith(_SIGLIP) for name in reader.names())
    table = names.tower_table(config, _SIGLIP if siglip else names.TOWER)
    wanted = {name for entry in table for name in entry.names()}
    found = reader.names() & wanted
    check_names(table, shapes, reader, found, folder)
    return read_entries(table, shapes, reader, np.float32)


def _sizes(path: pathlib.Path) -> VisionConfig:
  """Reads the tower's sizes from a config.json of either kind of folder."""
  raw: Any = schema.read_json(path, remedy=_WHAT)
  if not isinstance(raw, dict):
    raise UserError(f"{path} is {schema.shorten(raw)}, no JSON object; {_WHAT}")
  kind = raw.get("model_type", "")
  if "vocab_size" not in raw and kind not in (_KIND, "siglip"):
    raise UserError(
      f"{path}: model_type is {schema.shorten(kind)}, and no language model is"
      f" described; of towers alone 'siglip' and {_KIND!r} are read; {_WHAT}"
    )
  if kind == _KIND:
    raw = {**_DEFAULTS, **raw}
    layers = raw["num_hidden_layers"]
    if raw.get("mm_vision_select_layer") == -1 and type(layers) is int:
      # An export of ours: the last layer is not there, and all others are used.
      raw["num_hidden_layers"] = layers + 1
    return siglip_config(raw, str(path))
  if kind == "siglip":
    given = raw.get("vision_config") or {}
    if not isinstance(given, dict):
      raise UserError(
        f"{path}: vision_config is {schema.shorten(given)}, no JSON object;"
        f" {_WHAT}"
      )
    return siglip_config({**_DEFAULTS, **given}, f"{path}, vision_config")
  return read_config(path.parent).vision


def _check_sizes(
  found: VisionConfig, wanted: VisionConfig, folder: pathlib.Path
) -> None:
  theirs, ours = dataclasses.asdict(found), dataclasses.asdict(wanted)
  wrong = [
    f"{name}: {folder.name} {theirs[name]}, model {ours[name]}"
    for name in ours
    if theirs[name] != ours[name]
  ]
  if wrong:
    raise UserError(
      f"{folder}/config.json describes another tower than config.model.vision"
      " (layers without the last one): " + "; ".join(wrong) + "; give the"
      " tower that the model is made for, or change the configuration"
    )
