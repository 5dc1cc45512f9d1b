"""What all configurations share."""

import dataclasses

from ml_collections import ConfigDict

from hourjax.data.forgetting import Forgetting
from hourjax.data.pipeline import ReadOptions
from hourjax.data.rows import Size
from hourjax.models.config import ModelConfig
from hourjax.parallel.mesh import MeshConfig
from hourjax.training.config import DataConfig, Experiment
from hourjax.training.optimizer import OptimizerConfig


def parse_arg(arg: str | None, **defaults):
  """Parses "key=value,key=value" into the types of the defaults, strictly.

  `parse_arg("size=7b", size="3b", stage=3)` gives {"size": "7b", "stage": 3}.

  Raises:
    ValueError: for an unknown key or a value of another type.
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


def experiment(model: ModelConfig, rows: Size, **overrides) -> ConfigDict:
  """An Experiment's defaults as a ConfigDict; unknown keys fail."""
  base = Experiment(
    model=model,
    forgetting=Forgetting(),
    data=DataConfig(),
    rows=rows,
    optimizer=OptimizerConfig(),
    read=ReadOptions(),
    mesh=MeshConfig(),
  )
  config = ConfigDict(dataclasses.asdict(base))
  config.update(overrides)
  return config
