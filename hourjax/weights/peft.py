"""Adapters in the layout of PEFT: adapter_config.json and one safetensors file.

PEFT stores the factors of a layer as torch's Linear has its weight, and under
the official name of the layer:

    ours                     PEFT's
    lora_a [layers, i, r]    base_model.model.NAME.lora_A.weight (r, i)
    lora_b [layers, r, o]    base_model.model.NAME.lora_B.weight (o, r)

MemAug's official Wqkv and Wkv are one layer where ours are three or two, with
an adapter each. Together these are one adapter of rank 3 r or 2 r: the A below
one another, and the B in blocks.

    A = [Aq; Ak; Av]        B = [Bq  0   0 ]
                                [0   Bk  0 ]
                                [0   0   Bv]

What is read may be of PEFT itself, with ranks and alphas of single layers.
"""

import json
import math
import pathlib
import re
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

import numpy as np
import pydantic
from safetensors.numpy import load_file, save_file

from hourjax import schema
from hourjax.errors import UserError
from hourjax.models import lora
from hourjax.models.config import ModelConfig
from hourjax.models.params import param_shapes
from hourjax.weights.names import Entry, key_table

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_BASE = "hourjax_base"  # the key of the file's metadata
Adapters = dict[str, dict[str, np.ndarray]]  # by path of the layer and by name


class _Config(schema.Schema):
  """Describes those keys of adapter_config.json that are relied on."""

  peft_type: Literal["LORA"]
  r: Annotated[int, pydantic.Field(ge=1)]
  lora_alpha: float
  use_dora: bool = False
  use_rslora: bool = False
  fan_in_fan_out: Literal[False] = False
  bias: Literal["none"] = "none"
  rank_pattern: dict[str, int] = pydantic.Field(default_factory=dict)
  alpha_pattern: dict[str, float] = pydantic.Field(default_factory=dict)
  modules_to_save: list[str] | None = None


def is_peft(folder: pathlib.Path) -> bool:
  """Returns whether a folder holds an adapter in PEFT's layout."""
  return (folder / CONFIG).is_file()


def write_adapters(
  folder: pathlib.Path,
  adapters: Mapping[str, Mapping[str, np.ndarray]],
  config: ModelConfig,
  options: lora.LoraConfig,
  *,
  base: str,
  fingerprint: str,
) -> None:
  """Writes adapters as a folder that `peft.PeftModel.from_pretrained` loads.

  Args:
    folder: to write into.
    adapters: by the path of the layer and by name, as `lora.complete` returns.
    config: of the model.
    options: of the adapters.
    base: name of the model that they belong to.
    fingerprint: of its weights.

  Raises:
    UserError: DoRA of only a part of an official layer.
  """
  tensors: dict[str, np.ndarray] = {}
  modules, ranks, alphas = [], {}, {}
  for entry, own in _entries(config, adapters):
    module = entry.official.removesuffix(".weight")
    modules.append(re.escape(module).replace(r"\{i\}", r"\d+"))
    rank = options.rank * len(own)
    if rank != options.rank:
      key = module.rpartition("{i}.")[2]
      ranks[key] = rank
      alphas[key] = options.alpha * len(own)
    for layer in range(max(1, entry.layers)):
      name = _PREFIX + module.format(i=layer)
      for key, value in _official(entry, own, layer, config).items():
        tensors[f"{name}.{key}"] = np.ascontiguousarray(value, np.float32)
  about = {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "base_model_name_or_path": base,
    "r": options.rank,
    "lora_alpha": options.alpha,
    "lora_dropout": options.dropout,
    "target_modules": "|".join(modules),
    "rank_pattern": ranks,
    "alpha_pattern": alphas,
    "bias": "none",
    "use_dora": options.dora,
    "use_rslora": False,
    "fan_in_fan_out": False,
    "inference_mode": True,
  }
  (folder / CONFIG).write_text(json.dumps(about, indent=2) + "\n")
  save_file(
    tensors, folder / WEIGHTS, metadata={"format": "pt", _BASE: fingerprint}
  )


def _entries(
  config: ModelConfig, adapters: Mapping[str, Mapping[str, np.ndarray]]
) -> Iterator[tuple[Entry, dict[int, Mapping[str, np.ndarray]]]]:
  """Yields official layers, and the adapters of their parts by their place."""
  for entry in key_table(config):
    own = {
      place: adapters[path.removesuffix("/kernel")]
      for place, path in enumerate(entry.paths)
      if path.endswith("/kernel") and path.removesuffix("/kernel") in adapters
    }
    if own:
      yield entry, own


def _official(
  entry: Entry,
  own: Mapping[int, Mapping[str, np.ndarray]],
  layer: int,
  config: ModelConfig,
) -> dict[str, np.ndarray]:
  """Returns PEFT's tensors of one layer.

  Args:
    entry: of the official layer.
    own: adapters of its parts.
    layer: of a stack.
    config: of the model.
  """

  def part(place: int, name: str) -> np.ndarray:
    value = np.asarray(own[place][name])
    return value[layer] if entry.layers else value

  shapes = param_shapes(config)
  columns = [shapes[path][-1] for path in entry.paths]
  rank = part(min(own), lora.A).shape[-1]
  b = np.zeros((sum(columns), rank * len(own)), np.float32)
  for number, place in enumerate(own):
    start = sum(columns[:place])
    rows = slice(start, start + columns[place])
    b[rows, number * rank : (number + 1) * rank] = part(place, lora.B).T
  found = {
    "lora_A.weight": np.concatenate([part(p, lora.A).T for p in own]),
    "lora_B.weight": b,
  }
  if lora.MAGNITUDE in own[min(own)]:
    if len(own) < len(columns):
      left = [p for n, p in enumerate(entry.paths) if n not in own]
      raise UserError(
        f"PEFT has no words for DoRA of a part of {entry.official}: the adapter"
        f" leaves out {', '.join(left)}; merge it into its base, or train with"
        " config.lora.targets that name all parts"
      )
    found["lora_magnitude_vector"] = np.concatenate(
      [part(p, lora.MAGNITUDE) for p in own]
    )
  return found


def read_adapters(
  folder: pathlib.Path, config: ModelConfig
) -> tuple[Adapters, str]:
  """Reads a folder in PEFT's layout, of ours or of PEFT's.

  Args:
    folder: of the adapter.
    config: of the model.

  Returns:
    The adapters by the path of the layer and by name, of which layers that have
    none are zero; and the fingerprint of their base, empty if it is not known.

  Raises:
    UserError: it is no LoRA, names other layers or shapes than the model's, or
      trains more than adapters.
  """
  remedy = "give a folder that PEFT or hourjax.export wrote for this model"
  about = schema.read_schema(_Config, folder / CONFIG, remedy=remedy)
  if about.modules_to_save:
    raise UserError(
      f"{folder}/{CONFIG} has modules_to_save={about.modules_to_save}: whole"
      " layers were trained beside the adapters; merge it with PEFT's"
      " merge_and_unload and load the merged model"
    )
  try:
    tensors = load_file(folder / WEIGHTS)
    metadata = _metadata(folder / WEIGHTS)
  except (OSError, ValueError) as error:
    raise UserError(
      f"{folder}/{WEIGHTS} cannot be read ({error}); {remedy}"
    ) from None
  except Exception as error:  # safetensors' own, which has no base class
    raise UserError(
      f"{folder}/{WEIGHTS} is no safetensors file ({error}); {remedy}"
    ) from None
  shapes = param_shapes(config)
  adapters: Adapters = {}
  used: set[str] = set()
  problems: list[str] = []
  for entry in key_table(config):
    if not entry.paths[0].endswith("/kernel"):
      continue
    layers = _layers_of(entry, tensors)
    if layers:
      used |= {name for layer in layers.values() for name in layer.values()}
      problems += _read_entry(entry, layers, tensors, shapes, about, adapters)
  left = sorted(set(tensors) - used)
  problems += [f"unexpected: {name}" for name in left]
  if problems or not adapters:
    shown = "\n  ".join(problems[:8]) or "it has no tensors"
    raise UserError(
      f"{folder} is no adapter of this model ({len(problems)} problems):\n "
      f" {shown}"
    )
  return adapters, metadata.get(_BASE, "")


def _metadata(path: pathlib.Path) -> dict[str, str]:
  """Returns what the head of a safetensors file says beside its tensors."""
  with path.open("rb") as file:
    size = int.from_bytes(file.read(8), "little")
    return json.loads(file.read(size)).get("__metadata__") or {}


def _layers_of(
  entry: Entry, tensors: Mapping[str, Any]
) -> dict[int, dict[str, str]]:
  """Returns the names of an official layer's tensors, by layer and by kind."""
  found: dict[int, dict[str, str]] = {}
  module = entry.official.removesuffix(".weight")
  for layer in range(max(1, entry.layers)):
    name = _PREFIX + module.format(i=layer)
    kinds = {
      lora.A: f"{name}.lora_A.weight",
      lora.B: f"{name}.lora_B.weight",
      lora.MAGNITUDE: f"{name}.lora_magnitude_vector",
    }
    own = {kind: key for kind, key in kinds.items() if key in tensors}
    if own:
      found[layer] = own
  return found


def _read_entry(
  entry: Entry,
  layers: Mapping[int, Mapping[str, str]],
  tensors: Mapping[str, np.ndarray],
  shapes: Mapping[str, tuple[int, ...]],
  about: _Config,
  adapters: Adapters,
) -> list[str]:
  """Adds the adapters of an official layer; returns what is wrong with it."""
  module = entry.official.removesuffix(".weight")
  inputs = shapes[entry.paths[0]][-2]
  columns = [shapes[path][-1] for path in entry.paths]
  kinds = {lora.A, lora.B} | ({lora.MAGNITUDE} if about.use_dora else set())
  whole = range(max(1, entry.layers))
  if about.use_dora and len(layers) < len(whole):
    return [f"{module}: DoRA of {len(layers)} of {len(whole)} layers"]
  rank = (
    max(len(tensors[own[lora.A]]) for own in layers.values() if lora.A in own)
    if any(lora.A in own for own in layers.values())
    else 0
  )
  stacked: dict[str, list[np.ndarray]] = {}
  for layer in whole:
    name = module.format(i=layer)
    own = layers.get(layer)
    if own is None:
      values = {
        lora.A: np.zeros((inputs, rank), np.float32),
        lora.B: np.zeros((rank, sum(columns)), np.float32),
        lora.SCALE: np.float32(0),
      }
    else:
      if kinds - own.keys():
        return [f"missing: {kind} of {name}" for kind in kinds - own.keys()]
      a, b = (tensors[own[k]].astype(np.float32) for k in (lora.A, lora.B))
      if a.shape[1:] != (inputs,) or b.shape != (sum(columns), len(a)):
        return [
          f"{name}: factors {a.shape} and {b.shape}, the model has"
          f" {inputs} x {sum(columns)}"
        ]
      short = rank - len(a)
      values = {
        lora.A: np.pad(a.T, ((0, 0), (0, short))),
        lora.B: np.pad(b.T, ((0, short), (0, 0))),
        lora.SCALE: np.float32(_scale(about, name)),
      }
      if about.use_dora:
        values[lora.MAGNITUDE] = tensors[own[lora.MAGNITUDE]].reshape(-1)
    for kind, value in values.items():
      stacked.setdefault(kind, []).append(np.asarray(value, np.float32))
  start = 0
  for path, count in zip(entry.paths, columns):
    found = {kind: np.stack(v) for kind, v in stacked.items()}
    for kind in {lora.B, lora.MAGNITUDE} & found.keys():
      found[kind] = found[kind][..., start : start + count]
    if not entry.layers:
      found = {kind: value[0] for kind, value in found.items()}
    adapters[path.removesuffix("/kernel")] = found
    start += count
  return []


def _scale(about: _Config, name: str) -> float:
  """Returns what PEFT multiplies a layer's low-rank product by."""

  def own(patterns: Mapping[str, Any], default: Any) -> Any:
    for key, value in patterns.items():
      if re.match(rf"(.*\.)?({key})$", name):
        return value
    return default

  rank = own(about.rank_pattern, about.r)
  alpha = own(about.alpha_pattern, about.lora_alpha)
  return alpha / (math.sqrt(rank) if about.use_rslora else rank)
