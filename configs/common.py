"""What all configurations share.

A configuration is a Python file with `get_config(arg)`, which returns a
ConfigDict with every key of `hourjax.training.config.Experiment`.
"""

import dataclasses
from typing import Any

from ml_collections import ConfigDict

from hourjax.data.forgetting import Forgetting
from hourjax.data.pipeline import ReadOptions
from hourjax.data.rows import Size
from hourjax.models.config import ModelConfig
from hourjax.parallel.mesh import MeshConfig
from hourjax.training.config import DataConfig, Experiment
from hourjax.training.optimizer import OptimizerConfig


def parse_arg(arg: str | None, **defaults: Any) -> ConfigDict:
  """Parses "key=value,key=value" into the types of the defaults.

  `parse_arg("size=7b", size="3b", stage=3)` returns {"size": "7b", "stage": 3}.

  Args:
    arg: what stands behind the colon of --config=FILE:ARG; None if nothing.
    **defaults: value of each key that is not given.

  Raises:
    ValueError: a key is unknown, or a value has another type.
  """
  values = dict(defaults)
  for item in filter(None, (arg or "").split(",")):
    key, equals, value = item.partition("=")
    if key not in defaults or not equals:
      raise ValueError(
        f"config argument {item!r}: write key=value with a key of"
        f" {', '.join(defaults)}"
      )
    kind = type(defaults[key])
    try:
      values[key] = kind(value)
    except ValueError:
      raise ValueError(
        f"config argument {key} is {value!r}; it must be of type"
        f" {kind.__name__}"
      ) from None
  return ConfigDict(values)


def experiment(model: ModelConfig, rows: Size, **overrides: Any) -> ConfigDict:
  """Returns an Experiment's defaults as a ConfigDict.

  Where the defaults keep what a saved configuration means that lacks a key,
  and the official runs did something else, the latter is set here.

  Args:
    model: sizes of the model.
    rows: capacity of one row.
    **overrides: other values of keys at the top; an unknown key is an error.
  """
  base = Experiment(
    model=model,
    forgetting=Forgetting(),
    data=DataConfig(),
    rows=rows,
    optimizer=OptimizerConfig(clip=1.0),
    read=ReadOptions(),
    mesh=MeshConfig(),
    loss="samples",
  )
  config = ConfigDict(dataclasses.asdict(base))
  config.update(overrides)
  return config
