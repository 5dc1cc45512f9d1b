"""Loading a model from the workdir of a training run or a published folder."""

import dataclasses
import hashlib
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, NoReturn

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, SingleDeviceSharding

from hourjax import hub
from hourjax.data.forgetting import Forgetting
from hourjax.data.tokenizer import Tokenizer
from hourjax.errors import UserError
from hourjax.inference.adapter import (
  Merge,
  host_device,
  read_adapter,
  short_name,
)
from hourjax.inference.engine import check_mesh, narrow_dtype
from hourjax.inference.model import Model
from hourjax.inference.prompts import Rules
from hourjax.models.config import ModelConfig
from hourjax.models.params import param_axes, param_shapes
from hourjax.parallel.mesh import MeshConfig, make_mesh
from hourjax.parallel.rules import param_shardings
from hourjax.training.checkpoint import restore_params
from hourjax.training.checkpoint_format import adapter_base, adapter_manifest
from hourjax.training.config import Experiment, build_experiment
from hourjax.training.workdir import read_config
from hourjax.weights import config as published
from hourjax.weights.checkpoint import load_params
from hourjax.weights.folder import weight_files
from hourjax.weights.own_keys import check_known

# A fingerprint of weights takes this many pieces of a file, evenly spread.
_PIECES = 64
_PIECE_BYTES = 1 << 16

# Returns what is kept of a parameter that was read, by path.
_Each = Callable[[str, np.ndarray], np.ndarray]
# Reads the parameters onto a mesh: by path, and the name of the model.
_Read = Callable[
  [ModelConfig, Mesh, _Each], tuple[Mapping[str, jax.Array], str]
]


class Source(NamedTuple):
  """Describes a model on disk, before its parameters are read.

  Attributes:
    config: of the model.
    rules: settings of its training that also decide answers.
    tokenizer: folder of its tokenizer, or a name with hf://.
    read: reads its parameters.
  """

  config: ModelConfig
  rules: Rules
  tokenizer: str | os.PathLike
  read: _Read


def load(
  folder: str | os.PathLike,
  *,
  tokenizer: str | os.PathLike | None = None,
  mesh: MeshConfig | None = None,
  adapter: str | os.PathLike | None = None,
) -> Model:
  """Reads a model and puts it on the devices of this process.

  Args:
    folder: workdir of a training run, of which the best or the newest sound
      checkpoint is read (see `restore_params`);
      or a published folder (`config.json`, safetensors and the tokenizer's
      files), or a name with hf:// (see `hub`).
    tokenizer: folder of the tokenizer. By default that of the training run, or
      the published folder.
    mesh: mesh over the devices of this process. By default memory is split
      over all of them if they divide a frame's tokens; otherwise one is used.
    adapter: workdir of a run of adapters, or a folder in PEFT's layout, that is
      merged into the model. Of a model that is a run of adapters its own are.

  Raises:
    UserError: there is no model, or it does not fit its configuration.
  """
  folder = find_folder(folder)
  # Quick checks come before the weights are read.
  own, base = find_base(folder)
  if own and adapter:
    raise UserError(
      f"adapter {adapter} is given, and model {folder} is a run of adapters"
      f" itself; give its base {base} as the model, or leave the adapter out"
    )
  source = describe(base)
  if own:
    # Its answers are put as in its training.
    rules = run_rules(build_experiment(read_config(folder)))
    source = source._replace(rules=rules)
  merge = None
  if own or adapter:
    merge = Merge(read_adapter(str(adapter or folder), source.config))
  words = find_tokenizer(tokenizer or source.tokenizer, folder)
  vocabulary = Tokenizer.from_folder(words)
  placed = _mesh(mesh, source.config)
  check_mesh(placed, source.config)
  params, name = source.read(
    source.config, placed, merge or (lambda path, value: value)
  )
  if merge is not None:
    merge.check(str(base))
    name = f"{name} + {merge.name}"
  return Model(
    params,
    source.config,
    vocabulary,
    name=name,
    rules=source.rules,
    mesh=placed,
  )


def find_base(folder: pathlib.Path) -> tuple[bool, pathlib.Path]:
  """Returns whether a folder is a run of adapters, and the model below them.

  Args:
    folder: of a model; of any other than such a run, itself.

  Raises:
    UserError: the base does not exist.
  """
  about = adapter_manifest(folder) if is_workdir(folder) else None
  if about is None:
    return False, folder
  base = adapter_base(about)
  try:
    return True, find_folder(base)
  except UserError as error:
    raise UserError(
      f"{folder} is a run of adapters, and their base {base} is not here:"
      f" {error}"
    ) from None


def describe(folder: pathlib.Path) -> Source:
  """Describes the model in a folder that `find_folder` returned.

  Raises:
    UserError: its configuration is missing, or one of another model.
  """
  return (_of_run if is_workdir(folder) else _of_published)(folder)


def find_folder(name: str | os.PathLike) -> pathlib.Path:
  """Returns the folder of a model; a name with hf:// is fetched.

  Raises:
    UserError: it does not exist.
  """
  folder = hub.local_folder(name)
  if not folder.is_dir():
    raise UserError(
      f"model folder {folder} does not exist; give the workdir of a training"
      " run or a folder with config.json and safetensors"
    )
  return folder


def is_workdir(folder: pathlib.Path) -> bool:
  """Returns whether a model's folder is the workdir of a training run."""
  return (folder / "checkpoints").is_dir()


def find_tokenizer(
  name: str | os.PathLike, model: pathlib.Path
) -> pathlib.Path:
  """Returns the folder of a model's tokenizer; hf:// is fetched.

  Raises:
    UserError: it does not exist.
  """
  words = hub.local_folder(name, hub.TOKENIZER)
  if not words.is_dir():
    raise UserError(
      f"the tokenizer of {model}, {words}, does not exist; start where the"
      " training was started, or give its folder as tokenizer"
    )
  return words


def run_rules(experiment: Experiment) -> Rules:
  """Returns the settings of a training that also decide answers."""
  return Rules(
    experiment.forgetting,
    experiment.max_length,
    experiment.data.single_image,
    experiment.seed,
    experiment.memory,
  )


def _of_run(folder: pathlib.Path) -> Source:
  """Describes the model of a training run."""
  experiment = build_experiment(read_config(folder))
  words = experiment.data.tokenizer

  def read(
    config: ModelConfig, mesh: Mesh, each: _Each
  ) -> tuple[Mapping[str, jax.Array], str]:
    """Restores the best or the newest sound checkpoint."""
    shapes, shardings = param_shapes(config), _shardings(config, mesh)

    def place(path: str, value: Any) -> jax.Array:
      """Checks one parameter and puts it on the mesh."""
      if tuple(value.shape) != shapes.get(path):
        _misfit(folder, path, value.shape, shapes.get(path))
      value = np.asarray(value)
      if not _finite(value):
        raise UserError(
          f"{path} in the checkpoint of {folder} holds values that are"
          " not finite; take an earlier checkpoint, or train again"
        )
      value = each(path, value)
      value = value.astype(narrow_dtype(path, config), copy=False)
      return jax.device_put(value, shardings[path])

    found = restore_params(folder, host_sharding(), each=place)
    for path in shapes.keys() - found.params.keys():
      _misfit(folder, path, None, shapes[path])
    arrays = sorted(found.arrays.items())
    digest = hashlib.sha256(repr(arrays).encode()).hexdigest()
    name = f"{short_name(folder)} step {found.step} {digest[:12]}"
    return found.params, name

  return Source(experiment.model, run_rules(experiment), words, read)


def _misfit(
  folder: pathlib.Path,
  path: str,
  found: tuple[int, ...] | None,
  wanted: tuple[int, ...] | None,
) -> NoReturn:
  """Raises an error that names both shapes of a parameter."""
  both = [tuple(shape) if shape else "nothing" for shape in (found, wanted)]
  raise UserError(
    f"{path} is {both[0]} in the checkpoint of {folder} and {both[1]}"
    f" in the model that {folder}/config.json describes; use the config.json of"
    " that training"
  )


def _of_published(folder: pathlib.Path) -> Source:
  """Describes the model of a published folder."""

  def read(
    config: ModelConfig, mesh: Mesh, each: _Each
  ) -> tuple[Mapping[str, jax.Array], str]:
    """Reads the safetensors."""
    shapes = param_shapes(config)
    shardings = _shardings(config, mesh)

    def merged(path: str, value: jax.Array) -> jax.Array:
      whole = np.asarray(value)
      kept = each(path, whole)
      return value if kept is whole else jax.device_put(kept, shardings[path])

    params = load_params(
      folder,
      config,
      shapes,
      dtype={path: narrow_dtype(path, config) for path in shapes},
      shardings=shardings,
      each=merged,
    )
    digest = hashlib.sha256()
    for path in weight_files(folder):
      for part in _excerpt(path):
        digest.update(part)
    return params, f"{short_name(folder)} {digest.hexdigest()[:12]}"

  config, found = published.read_config(folder), published.read_rules(folder)
  rules = Rules(
    _forgetting(found.forgetting, folder),
    found.max_length,
    found.single_image,
    found.seed,
  )
  return Source(config, rules, folder, read)


def _forgetting(given: Mapping[str, Any], folder: pathlib.Path) -> Forgetting:
  """Builds the rule of forgetting that a published folder describes."""
  known = dataclasses.asdict(Forgetting())
  where = f"{folder}/config.json: hourjax.forgetting"
  return Forgetting(**check_known(given, known, where))


def _shardings(config: ModelConfig, mesh: Mesh) -> dict[str, NamedSharding]:
  return param_shardings(mesh, param_shapes(config), param_axes(config))


def _finite(value: np.ndarray) -> bool:
  """Returns whether all numbers are finite.

  Stacks of layers are checked a layer at a time, since the comparison takes a
  byte for each number.
  """
  parts = value if value.ndim > 2 else [value]
  return all(bool(np.isfinite(part).all()) for part in parts)


def _excerpt(path: pathlib.Path) -> Iterator[bytes]:
  """Yields the name, the size and pieces of a file, for a fingerprint."""
  size = path.stat().st_size
  yield f"{path.name} {size}".encode()
  last = max(0, size - _PIECE_BYTES)
  with path.open("rb") as file:
    for start in np.linspace(0, last, _PIECES).astype(int):
      file.seek(int(start))
      yield file.read(_PIECE_BYTES)


def host_sharding() -> SingleDeviceSharding:
  """Returns the host's memory, where whole arrays fit.

  Without a CPU backend it is the first device.
  """
  return SingleDeviceSharding(host_device())


def _mesh(mesh: MeshConfig | None, config: ModelConfig) -> Mesh:
  """Returns the mesh of a configuration, by default over all devices."""
  devices = jax.local_devices()
  if mesh is None:
    count = len(devices) if config.pool_side**2 % len(devices) == 0 else 1
    mesh, devices = MeshConfig(fsdp=1, seq=count), devices[:count]
  return make_mesh(mesh, devices)
