"""Hour-LLaVA checkpoints under their official names, in and out.

A checkpoint is a folder with `config.json` and `model.safetensors`, or shards
listed in `model.safetensors.index.json`.

Each parameter is read from the file's place into the memory it will be used
in, a few rows at a time: reading takes the parameters in their own dtype and
some megabytes. Where parameters are split, a device's part alone is read.
"""
# MERGED hourjax.weights.tower:
# The vision tower alone, from published folders.

import dataclasses
import functools
import json
import pathlib
import threading
from collections.abc import Callable, Mapping, Set
from typing import Any

import jax
import numpy as np
from safetensors.numpy import save_file

from hourjax import progress, schema
from hourjax.errors import UserError
from hourjax.models.config import ModelConfig, VisionConfig
from hourjax.weights import names
from hourjax.weights.config import read_config, siglip_config, write_config
from hourjax.weights.folder import INDEX, find_tensors, folded
from hourjax.weights.names import Entry, is_unused, key_table
from hourjax.weights.tensors import (
  DTYPES,
  TensorReader,
  aligned,
  in_threads,
  transpose,
)

Params = dict[str, Any]  # numpy or jax arrays by path
# Of all parameters, or by path.
Dtypes = np.typing.DTypeLike | Mapping[str, np.typing.DTypeLike]
_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
_MEMAUG = "model.vision_resampler."
_SHARD_BYTES = 4 * 2**30
_TOLD = 2**26  # bytes; fewer are read without a word
_LINES = 8  # of each kind of problem
_HINTS = {
  "multi_modal_projector.": "these are the names of transformers' own LLaVA"
  " classes; take the checkpoint under its original names",
  "qweight": "these weights are quantised; take those in bfloat16",
  "weight_scale": "these weights are quantised; take those in bfloat16",
}


def load_params(
  folder: str | pathlib.Path,
  config: ModelConfig,
  shapes: Mapping[str, tuple[int, ...]],
  *,
  dtype: Dtypes = np.float32,
  optional: Set[str] = frozenset(),
  shardings: Mapping[str, jax.sharding.Sharding] | None = None,
) -> Params:
  """Reads a checkpoint into our parameters.

  Args:
    folder: of the checkpoint.
    config: the model to fill.
    shapes: its parameters, path to shape (`models.params.param_shapes`).
    dtype: of the result, one for all or by path.
    optional: parameters that the checkpoint may lack; they are then left out.
    shardings: where each parameter lies, by path; by default all of them are
      numpy arrays.

  Returns:
    Arrays by path.

  Raises:
    UserError: lists all missing, unexpected and misshapen names; or what is
      damaged, not finite or ambiguous.
  """
  folder = pathlib.Path(folder)
  with TensorReader(find_tensors(folder)) as reader:
    table = _present(key_table(config), optional, reader)
    found = {n for n in reader.names() if not is_unused(config, n)}
    if config.decoder.tied and _HEAD in found:
      _check_same_head(reader, folder)
      found -= {_HEAD}
    check_names(table, shapes, reader, found, folder)
    return read_entries(table, shapes, reader, dtype, shardings)


def read_entries(
  table: list[Entry],
  shapes: Mapping[str, tuple[int, ...]],
  reader: TensorReader,
  dtype: Dtypes,
  shardings: Mapping[str, jax.sharding.Sharding] | None = None,
) -> Params:
  """Our parameters of the entries, from tensors that were checked."""
  dtypes = dtype if isinstance(dtype, Mapping) else dict.fromkeys(shapes, dtype)
  todo = [
    (entry, part, path)
    for entry in table
    for part, path in enumerate(entry.paths)
  ]
  total = sum(
    int(np.prod(shapes[path])) * np.dtype(dtypes[path]).itemsize
    for _, _, path in todo
  )
  params = {}
  with _Telling(total) as told:
    for entry, part, path in todo:
      read = functools.partial(
        _read, entry, part, shapes[path], reader, np.dtype(dtypes[path]), told
      )
      if shardings is None:
        params[path] = read(tuple(slice(None) for _ in shapes[path]))
      else:
        params[path] = _placed(read, shapes[path], shardings[path])
  return params


def _read(entry, part, shape, reader, dtype, told, index) -> np.ndarray:
  """The part `index` of a parameter."""
  bounds = [s.indices(size)[:2] for s, size in zip(index, shape, strict=True)]
  result = aligned([stop - start for start, stop in bounds], dtype)
  names = entry.names()
  if not entry.layers:
    jobs = [(names[0], result)]
  else:
    (first, last), *bounds = bounds
    jobs = list(zip(names[first:last], result, strict=True))

  def read_one(job):
    name, target = job
    _read_rows(reader, name, entry, part, target, bounds)
    told(target.nbytes)

  in_threads(read_one, jobs)
  return result


def _read_rows(reader, name, entry, part, target, bounds) -> None:
  """One official tensor's part of `target`, whose bounds are of our axes."""
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
      target[where] = entry.turned(block)[columns]


def _placed(read: Callable, shape, sharding) -> jax.Array:
  """A parameter on its devices, of which this process reads its part once.

  A device that holds all that is read uses it where it is.
  """
  parts = sharding.addressable_devices_indices_map(tuple(shape)).values()
  bounds = [
    [s.indices(size)[:2] for s, size in zip(part, shape, strict=True)]
    for part in parts
  ]
  hull = [
    (min(start for start, _ in axis), max(stop for _, stop in axis))
    for axis in zip(*bounds, strict=True)
  ]
  values = read(tuple(slice(*bound) for bound in hull))

  def part_of(index):
    cut = [s.indices(size)[:2] for s, size in zip(index, shape, strict=True)]
    return values[
      tuple(
        slice(start - first, stop - first)
        for (start, stop), (first, _) in zip(cut, hull, strict=True)
      )
    ]

  return jax.make_array_from_callback(tuple(shape), sharding, part_of)


class _Telling:
  """A bar over megabytes, where there are many; threads may call it."""

  def __init__(self, total: int):
    self._bar = None
    if total >= _TOLD and jax.process_index() == 0:
      self._bar = progress.bar(total >> 20, unit="MB", desc="reading weights")
    self._lock, self._done = threading.Lock(), 0

  def __enter__(self) -> Callable[[int], None]:
    return self._add

  def __exit__(self, *_) -> None:
    if self._bar is not None:
      self._bar.close()

  def _add(self, size: int) -> None:
    with self._lock:
      self._done += size
      if self._bar is not None:
        self._bar.update((self._done >> 20) - self._bar.n)


def save_params(
  params: Params,
  config: ModelConfig,
  folder: str | pathlib.Path,
  *,
  shard_bytes: int = _SHARD_BYTES,
) -> None:
  """Writes our parameters as an official checkpoint folder, in shards."""
  folder = pathlib.Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  write_config(config, folder)
  shard, size, files, index = {}, 0, [], {}

  def flush():
    nonlocal shard, size
    name = f"model-{len(files) + 1:05d}.safetensors"
    save_file(shard, folder / name)
    files.append(name)
    index.update(dict.fromkeys(shard, name))
    shard, size = {}, 0

  for entry in key_table(config):
    for layer, name in enumerate(entry.names()):
      arrays = [params[path] for path in entry.paths]
      if entry.layers:
        arrays = [array[layer] for array in arrays]
      tensor = np.ascontiguousarray(entry.to_official(arrays))
      if shard and size + tensor.nbytes > shard_bytes:
        flush()
      shard[name] = tensor
      size += tensor.nbytes
  flush()
  (folder / INDEX).write_text(
    json.dumps({"metadata": {}, "weight_map": index}, indent=1) + "\n"
  )


def _present(table: list[Entry], optional: Set[str], reader) -> list[Entry]:
  """The table without optional entries of which no tensor is there."""
  found = reader.names()
  return [
    entry
    for entry in table
    if not optional.issuperset(entry.paths) or found & set(entry.names())
  ]


def check_names(
  table: list[Entry],
  shapes: Mapping[str, tuple[int, ...]],
  reader: TensorReader,
  found: Set[str],
  folder: str | pathlib.Path,
) -> None:
  """Compares names, shapes and dtypes of the table with the tensors `found`.

  Raises:
    UserError: lists all that are missing, unexpected, misshapen or of a dtype
      that holds no weights; many of one kind as their first few.
  """
  wanted = {}
  for entry in table:
    ours = [shapes[path][1 if entry.layers else 0 :] for path in entry.paths]
    shape = entry.official_shape(ours)
    wanted.update(dict.fromkeys(entry.names(), tuple(shape)))
  missing, unexpected = set(wanted) - found, found - set(wanted)
  misshapen, untyped = {}, {}
  for name in set(wanted) & found:
    tensor = reader[name]
    if tensor.shape != wanted[name]:
      misshapen[name] = (
        f"shape of {{}}: checkpoint {tensor.shape}, model {wanted[name]}"
      )
    if tensor.dtype not in DTYPES:
      untyped[name] = (
        f"dtype of {{}}: {tensor.dtype}, read are {', '.join(DTYPES)}"
      )
  lines = [
    *_told(dict.fromkeys(missing, "missing: {}")),
    *_told(dict.fromkeys(unexpected, "unexpected: {}")),
    *_told(misshapen),
    *_told(untyped),
  ]
  if lines:
    count = sum(map(len, (missing, unexpected, misshapen, untyped)))
    hints = {
      hint for part, hint in _HINTS.items() if any(part in n for n in found)
    }
    if missing == {_HEAD}:
      hints.add(
        "the output vectors are missing; where they are the embeddings,"
        ' config.json says "tie_word_embeddings": true (without it Qwen2\'s'
        " are vectors of their own)"
      )
    memaug = {name for name in wanted if name.startswith(_MEMAUG)}
    if memaug and missing == memaug:
      hints.add(
        "MemAug is missing, as in LLaVA-OneVision's weights: a training that"
        " starts from them draws it (--config.draw_missing=memaug), and answers"
        " need a model that was trained with it"
      )
    why = "; ".join(
      sorted(hints) or ["is its config.json the one these weights came with?"]
    )
    raise UserError(
      f"{folder} does not fit the model ({count} problems); {why}\n  "
      + "\n  ".join(lines)
    )


def _told(problems: Mapping[str, str]) -> list[str]:
  """A line for each tensor, or for the layers in which it is the same."""
  groups: dict[str, list[str]] = {}
  for name, text in problems.items():
    groups.setdefault(text, []).append(name)
  lines = sorted(
    text.format(name)
    for text, names in groups.items()
    for name in folded(names)
  )
  more = len(lines) - _LINES
  return lines[:_LINES] + ([f"... and {more} more lines"] if more > 0 else [])


def _check_same_head(reader: TensorReader, folder) -> None:
  """A head beside tied embeddings must be these, under a second name."""
  head, embedding = reader[_HEAD], reader[_EMBEDDING]
  same = head.shape == embedding.shape
  if same and {head.dtype, embedding.dtype} <= set(DTYPES):
    wide = np.dtype(np.float32)
    rows = head.shape[0]
    same = all(
      np.array_equal(one, two)
      for (_, one), (_, two) in zip(
        reader.rows(_HEAD, 0, rows, wide),
        reader.rows(_EMBEDDING, 0, rows, wide),
        strict=True,
      )
    )
  if not same:
    raise UserError(
      f"{folder}/config.json says tie_word_embeddings, and {_HEAD} differs from"
      f" {_EMBEDDING}: either the first is used for words that are written, or"
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

  Of a SigLIP folder the last layer and the attention head are left where they
  are (SPEC section 1). Only the tower's tensors are read.

  Args:
    folder: with config.json and safetensors files.
    config: the model whose tower it shall be.
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
    return siglip_config({**_DEFAULTS, **raw}, str(path))
  if kind == "siglip":
    given = raw.get("vision_config") or {}
    if not isinstance(given, dict):
      raise UserError(
        f"{path}: vision_config is {schema.shorten(given)}, no JSON object;"
        f" {_WHAT}"
      )
    return siglip_config({**_DEFAULTS, **given}, f"{path}, vision_config")
  return read_config(path.parent).vision


def _check_sizes(found: VisionConfig, wanted: VisionConfig, folder) -> None:
  found, wanted = dataclasses.asdict(found), dataclasses.asdict(wanted)
  wrong = [
    f"{name}: {folder.name} {found[name]}, model {wanted[name]}"
    for name in wanted
    if found[name] != wanted[name]
  ]
  if wrong:
    raise UserError(
      f"{folder}/config.json describes another tower than config.model.vision"
      " (layers without the last one): " + "; ".join(wrong) + "; give the"
      " tower that the model is made for, or change the configuration"
    )
