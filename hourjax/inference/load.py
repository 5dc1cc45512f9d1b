"""Models from disk: workdirs of training runs, and published folders."""

import hashlib
import os
import pathlib

import jax
import numpy as np

from hourjax.data.tokenizer import Tokenizer
from hourjax.errors import UserError
from hourjax.inference.model import Model
from hourjax.inference.prompts import Rules
from hourjax.models.config import ModelConfig
from hourjax.models.params import param_shapes
from hourjax.parallel.mesh import MeshConfig, make_mesh
from hourjax.training.checkpoint import read_config, restore_params
from hourjax.training.experiment import build_experiment
from hourjax.weights import checkpoint as published

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
  read = _from_run if (folder / "checkpoints").is_dir() else _published
  params, config, rules, own_tokenizer, name = read(folder)
  words = pathlib.Path(tokenizer) if tokenizer else own_tokenizer
  if not words.is_dir():
    raise UserError(
      f"the tokenizer of {folder}, {words}, does not exist; start where the"
      " training was started, or give its folder as tokenizer"
    )
  return Model(
    params,
    config,
    Tokenizer.from_folder(words),
    name=name,
    rules=rules,
    mesh=_mesh(mesh, config),
  )


def _from_run(folder: pathlib.Path):
  experiment = build_experiment(read_config(folder))
  params, step, arrays = restore_params(folder, _host())
  rules = Rules(
    experiment.forgetting,
    experiment.max_length,
    experiment.data.single_image,
    experiment.seed,
  )
  words = pathlib.Path(experiment.data.tokenizer)
  mark = hashlib.sha256(repr(sorted(arrays.items())).encode()).hexdigest()
  name = f"{_named(folder)} step {step} {mark[:12]}"
  return params, experiment.model, rules, words, name


def _published(folder: pathlib.Path):
  config = published.read_config(folder)
  params = published.load_params(folder, config, param_shapes(config))
  digest = hashlib.sha256()
  for path in sorted(folder.glob("*.safetensors")):
    _sample(path, digest)
  name = f"{_named(folder)} {digest.hexdigest()[:12]}"
  return params, config, Rules(), folder, name


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
