"""Adapters that are merged into the model they were trained on.

    workdir of a run of adapters, or PEFT's folder
         |  read_adapter
    Adapter: factors by layer        base: one parameter after the other
         +------------- Merge -------------+
                          |
    kernel + scale A B, and the base's fingerprint compared at the end

Merged, a model answers as fast as any other, and nothing else of inference
knows of adapters.
"""

import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hourjax import hub
from hourjax.errors import UserError
from hourjax.models import lora
from hourjax.models.config import ModelConfig
from hourjax.models.params import VISION, param_shapes
from hourjax.training.checkpoint import restore_params
from hourjax.training.checkpoint_format import (
  adapter_manifest,
  fingerprint,
  weight_sum,
)
from hourjax.weights import peft


class Adapter(NamedTuple):
  """Holds the adapters of a model.

  Attributes:
    layers: by the path of the layer and by name, such as "lora_a".
    base: fingerprint of the weights that they belong to; empty if it is not
      known.
    name: of the adapter, for messages and reports.
  """

  layers: Mapping[str, Mapping[str, Any]]
  base: str
  name: str


def read_adapter(
  name: str, config: ModelConfig, step: int | None = None
) -> Adapter:
  """Reads the adapters of a run, or of a folder in PEFT's layout.

  Args:
    name: workdir, folder or hf:// name.
    config: of the model that they are for.
    step: of the run's checkpoint, if not the newest.

  Raises:
    UserError: there are none, or they are for another model.
  """
  folder = hub.local_folder(name)
  about = adapter_manifest(folder)
  if about is None and not peft.is_peft(folder):
    raise UserError(
      f"adapter {folder} holds neither a run of adapters (checkpoints of"
      f" config.lora) nor PEFT's {peft.CONFIG}; give one of them, or the folder"
      " as --model if it holds a whole model"
    )
  if about is None:
    layers, base = peft.read_adapters(folder, config)
    return Adapter(layers, base, short_name(folder))
  found = restore_params(folder, step=step)
  options = lora.LoraConfig(**about["config"]["lora"])
  adapters = lora.complete(found.params, options)
  _check(folder, adapters, config)
  return Adapter(
    adapters, about["base"], f"{short_name(folder)} step {found.step}"
  )


class Merge:
  """Merges adapters into parameters as these are read, one by one."""

  def __init__(self, adapter: Adapter):
    """Merges nothing yet.

    Args:
      adapter: to be merged.
    """
    self._adapter = adapter
    self._sums: dict[str, int] = {}
    self._left = set(adapter.layers)

  @property
  def name(self) -> str:
    """Returns the name of the adapter."""
    return self._adapter.name

  def __call__(self, path: str, value: np.ndarray) -> np.ndarray:
    """Returns a parameter with its adapter, in the dtype that it has."""
    if self._adapter.base and not path.startswith(VISION):
      self._sums[path] = weight_sum(value)
    layer = path.removesuffix("/kernel")
    if layer == path or layer not in self._adapter.layers:
      return value
    self._left.discard(layer)
    own = {
      name: jnp.asarray(x) for name, x in self._adapter.layers[layer].items()
    }
    with jax.default_device(host_device()):
      merged = lora.merge(jnp.asarray(value, jnp.float32), own)
    return np.asarray(merged).astype(value.dtype)

  def check(self, base: str, *, whole: bool = True) -> None:
    """Compares what was read with what the adapters belong to.

    Args:
      base: name of the model, for the message.
      whole: whether all of its parameters were read.

    Raises:
      UserError: the adapters are of other weights.
    """
    if not whole or not self._adapter.base:
      return
    found = fingerprint(self._sums)
    if found != self._adapter.base:
      raise UserError(
        f"adapter {self._adapter.name} belongs to the base"
        f" {self._adapter.base}, and {base} has the weights {found}; give the"
        " model that it was trained on"
      )


def _check(
  folder: pathlib.Path,
  adapters: Mapping[str, Mapping[str, Any]],
  config: ModelConfig,
) -> None:
  """Raises a UserError if adapters do not have the shapes of a model."""
  shapes = param_shapes(config)
  wrong = []
  for layer, own in adapters.items():
    shape = shapes.get(f"{layer}/kernel")
    found = (*own[lora.A].shape[:-1], own[lora.B].shape[-1])
    if shape != found:
      wrong.append(f"{layer}: adapter {found}, model {shape or 'nothing'}")
  if wrong:
    raise UserError(
      f"adapter {folder} is of another model ({len(wrong)} layers differ); give"
      " the model that it was trained on:\n  " + "\n  ".join(wrong[:5])
    )


def host_device() -> jax.Device:
  """Returns the host's memory as a device; the first one without a CPU."""
  try:
    return jax.local_devices(backend="cpu")[0]
  except RuntimeError:
    return jax.local_devices()[0]


def short_name(folder: pathlib.Path) -> str:
  """Returns the last two names of a folder's path, or its name at the hub."""
  return hub.short_name(folder) or "/".join(folder.absolute().parts[-2:])
