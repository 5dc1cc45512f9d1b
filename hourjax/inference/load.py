"""Models from disk: workdirs of training runs, and published folders."""

import hashlib
import os
import pathlib
from typing import NoReturn

import jax
import numpy as np
from jax.sharding import Mesh

from hourjax.data.forgetting import Forgetting
from hourjax.data.tokenizer import Tokenizer
from hourjax.errors import UserError
from hourjax.inference.engine import check_mesh, narrow_dtype
from hourjax.inference.model import Model
from hourjax.inference.prompts import Rules
from hourjax.models.config import ModelConfig
from hourjax.models.params import param_axes, param_shapes
from hourjax.parallel.mesh import MeshConfig, make_mesh
from hourjax.parallel.rules import param_shardings
from hourjax.training.checkpoint import restore_params
from hourjax.training.config import build_experiment
from hourjax.training.workdir import read_config
from hourjax.weights import config as published
from hourjax.weights.checkpoint import load_params
from hourjax.weights.folder import weight_files

_SAMPLE = 1 << 16  # bytes
_SAMPLES = 64  # of a file of weights, evenly over it


def load(
  folder: str | os.PathLike,
  *,
  tokenizer: str | os.PathLike | None = None,
  mesh: MeshConfig | None = None,
) -> Model:
  """Reads a model and puts it on the devices of this process.

  Args:
    folder: workdir of a training run, of which the newest sound checkpoint is
      taken; or a folder with official names (`config.json`, safetensors and
      the tokenizer's files).
    tokenizer: its folder, if it is not the one the run was trained with or
      lies elsewhere than in a published folder.
    mesh: over the devices of this process; by default memory is split over
      all of them if they divide a frame's tokens, else one is used.

  Raises:
    UserError: there is no model, or it does not fit its configuration.
  """
  folder = pathlib.Path(folder)
  if not folder.is_dir():
    raise UserError(
      f"model folder {folder} does not exist; give the workdir of a training"
      " run or a folder with config.json and safetensors"
    )
  # What is quick to be found wrong comes before the weights.
  describe = _of_run if (folder / "checkpoints").is_dir() else _of_published
  config, rules, own_tokenizer, read = describe(folder)
  words = pathlib.Path(tokenizer) if tokenizer else own_tokenizer
  if not words.is_dir():
    raise UserError(
      f"the tokenizer of {folder}, {words}, does not exist; start where the"
      " training was started, or give its folder as tokenizer"
    )
  vocabulary = Tokenizer.from_folder(words)
  on = _mesh(mesh, config)
  check_mesh(on, config)
  params, name = read(config, on)
  return Model(params, config, vocabulary, name=name, rules=rules, mesh=on)


def _of_run(folder: pathlib.Path):
  experiment = build_experiment(read_config(folder))
  rules = Rules(
    experiment.forgetting,
    experiment.max_length,
    experiment.data.single_image,
    experiment.seed,
  )
  words = pathlib.Path(experiment.data.tokenizer)

  def read(config, mesh):
    shapes, shardings = param_shapes(config), _shardings(config, mesh)

    def place(path, value):
      if tuple(value.shape) != shapes.get(path):
        _misfit(folder, path, value.shape, shapes.get(path))
      value = np.asarray(value)
      if not _finite(value):
        raise UserError(
          f"{path} in the newest checkpoint of {folder} holds values that are"
          " not finite; take an earlier checkpoint, or train again"
        )
      value = value.astype(narrow_dtype(path, config), copy=False)
      return jax.device_put(value, shardings[path])

    found = restore_params(folder, _host(), each=place)
    for path in shapes.keys() - found.params.keys():
      _misfit(folder, path, None, shapes[path])
    arrays = sorted(found.arrays.items())
    mark = hashlib.sha256(repr(arrays).encode()).hexdigest()
    name = f"{_named(folder)} step {found.step} {mark[:12]}"
    return found.params, name

  return experiment.model, rules, words, read


def _misfit(folder, path, found, wanted) -> NoReturn:
  shown = [tuple(shape) if shape else "nothing" for shape in (found, wanted)]
  raise UserError(
    f"{path} is {shown[0]} in the newest checkpoint of {folder} and {shown[1]}"
    f" in the model that {folder}/config.json describes; use the config.json of"
    " that training"
  )


def _of_published(folder: pathlib.Path):
  def read(config, mesh):
    shapes = param_shapes(config)
    params = load_params(
      folder,
      config,
      shapes,
      dtype={path: narrow_dtype(path, config) for path in shapes},
      shardings=_shardings(config, mesh),
    )
    digest = hashlib.sha256()
    for path in weight_files(folder):
      _sample(path, digest)
    return params, f"{_named(folder)} {digest.hexdigest()[:12]}"

  rules = Rules(Forgetting(spatial=published.read_spatial(folder)))
  return published.read_config(folder), rules, folder, read


def _shardings(config: ModelConfig, mesh: Mesh):
  return param_shardings(mesh, param_shapes(config), param_axes(config))


def _finite(value: np.ndarray) -> bool:
  """A layer at a time: the comparison takes a byte for each number."""
  parts = value if value.ndim > 2 else [value]
  return all(bool(np.isfinite(part).all()) for part in parts)


def _sample(path: pathlib.Path, digest) -> None:
  """Of a file that is too large to be read for its name."""
  size = path.stat().st_size
  digest.update(f"{path.name} {size}".encode())
  with path.open("rb") as file:
    for start in np.linspace(0, max(0, size - _SAMPLE), _SAMPLES).astype(int):
      file.seek(int(start))
      digest.update(file.read(_SAMPLE))


def _named(folder: pathlib.Path) -> str:
  """The last two names of its path: "memaug/stage2"."""
  return "/".join(folder.absolute().parts[-2:])


def _host():
  """The host's memory, where whole arrays fit; else the first device."""
  try:
    device = jax.local_devices(backend="cpu")[0]
  except RuntimeError:  # JAX_PLATFORMS leaves the CPU out
    device = jax.local_devices()[0]
  return jax.sharding.SingleDeviceSharding(device)


def _mesh(mesh: MeshConfig | None, config: ModelConfig):
  devices = jax.local_devices()
  if mesh is None:
    count = len(devices) if config.pool_side**2 % len(devices) == 0 else 1
    mesh, devices = MeshConfig(fsdp=1, seq=count), devices[:count]
  return make_mesh(mesh, devices)
