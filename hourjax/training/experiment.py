"""One experiment as frozen dataclasses, built once from a ConfigDict."""

import dataclasses
import typing
from collections.abc import Mapping
from typing import Any

from hourjax.data.dataset import SampleOptions
from hourjax.data.forgetting import Forgetting
from hourjax.data.pipeline import ReadOptions
from hourjax.data.rows import RowSpec, Size
from hourjax.errors import UserError
from hourjax.models.config import ModelConfig
from hourjax.parallel.mesh import MeshConfig
from hourjax.training.optimizer import OptimizerConfig
from hourjax.training.watch import WatchConfig


@dataclasses.dataclass(frozen=True)
class DataConfig:
  """Where the data is; relative paths start at the working directory.

  Attributes:
    dataset: folder that `hourjax.prepare` wrote.
    media: folder of videos and images.
    features: feature store of the videos; empty to encode pixels in the step.
    tokenizer: folder of the tokenizer.
    single_image: see `SampleOptions`.
    share_memory: conversations about one video that may share its memory in a
      row, which is then read and projected once.
    weights: how often the samples of a stream or source are taken in an epoch
      where that is not once, as "ego4d=2,short=0.5".
    max_skipped: share of samples that cannot be used above which training does
      not start, or stops.
  """

  dataset: str = ""
  media: str = ""
  features: str = ""
  tokenizer: str = ""
  single_image: str = "tiled"
  share_memory: int = 1
  weights: str = ""
  max_skipped: float = 0.01

  def __post_init__(self):
    if not 0 <= self.max_skipped <= 1:
      raise UserError(
        f"config.data.max_skipped is {self.max_skipped}; it is a share, from 0"
        " to 1"
      )
    if self.share_memory < 1:
      raise UserError(
        f"config.data.share_memory is {self.share_memory}; 1 shares nothing,"
        " more lets so many conversations share a memory"
      )
    if self.single_image not in ("tiled", "plain"):
      raise UserError(
        f"config.data.single_image is {self.single_image!r}; choose tiled or"
        " plain"
      )


@dataclasses.dataclass(frozen=True)
class Experiment:
  """Everything that decides a training run.

  Attributes:
    model, forgetting, data, rows, optimizer, read, mesh, watch: see their
      classes; rows is the capacity of one row.
    init: empty for fresh weights, a checkpoint folder with official names, or
      the workdir of an earlier run.
    draw_missing: components (e.g. "memaug") that `init` may lack; they are
      drawn fresh. Stage 1 starts so from LLaVA-OneVision.
    seed: of weights, shuffling and forgetting.
    batch_rows: rows in a micro-batch, over all devices.
    accumulate: micro-batches in a step.
    steps: of the run; 0 takes them from `epochs`.
    epochs: passes over the data, if `steps` is 0.
    max_length: of the decoder's sequence.
    log_every, checkpoint_every: steps.
    keep_checkpoints: how many stay on disk.
    on_save_error: "continue" or "stop" when a checkpoint cannot be saved.
    max_nonfinite: steps in a row without finite loss and gradient after which
      the run stops; fewer are skipped.
  """

  model: ModelConfig
  forgetting: Forgetting
  data: DataConfig
  rows: Size
  optimizer: OptimizerConfig
  read: ReadOptions
  mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
  init: str = ""
  draw_missing: str = ""
  seed: int = 0
  batch_rows: int = 8
  accumulate: int = 1
  steps: int = 0
  epochs: float = 1.0
  max_length: int = 32_768
  log_every: int = 10
  checkpoint_every: int = 500
  keep_checkpoints: int = 2
  on_save_error: str = "continue"
  max_nonfinite: int = 5
  watch: WatchConfig = dataclasses.field(default_factory=WatchConfig)

  def __post_init__(self):
    at_least_one = ("batch_rows", "accumulate", "max_length", "log_every",
                    "checkpoint_every", "keep_checkpoints",
                    "max_nonfinite")  # fmt: skip
    for name in (*at_least_one, "steps", "seed"):
      low = int(name in at_least_one)
      if getattr(self, name) < low:
        raise UserError(
          f"config.{name} is {getattr(self, name)}; it must be at least {low}"
        )
    if self.on_save_error not in ("continue", "stop"):
      raise UserError(
        f"config.on_save_error is {self.on_save_error!r}; choose continue or"
        " stop"
      )
    if not self.steps and not self.epochs > 0:
      raise UserError(
        f"config.epochs is {self.epochs} and config.steps 0; one must be"
        " positive"
      )

  @property
  def step_rows(self) -> int:
    """Rows of an optimizer step."""
    return self.batch_rows * self.accumulate

  @property
  def row_spec(self) -> RowSpec:
    """Static shapes of the rows that this model reads."""
    vision = self.model.vision
    return RowSpec(
      capacity=self.rows,
      frame_tokens=self.model.pool_side**2,
      tile_tokens=vision.side**2,
      width=vision.width,
      image_size=vision.image_size,
    )

  @property
  def sample_options(self) -> SampleOptions:
    return SampleOptions(
      seed=self.seed,
      forgetting=self.forgetting,
      max_length=self.max_length,
      single_image=self.data.single_image,
    )


def build_experiment(config: Mapping[str, Any]) -> Experiment:
  """A (nested) mapping, e.g. a ConfigDict, to an Experiment.

  Raises:
    UserError: for unknown or missing keys, naming them.
  """
  return _build(Experiment, config, "config")


def _build(cls, values: Mapping[str, Any], where: str):
  fields = {field.name: field for field in dataclasses.fields(cls)}
  unknown = sorted(set(values) - set(fields))
  if unknown:
    raise UserError(
      f"{where} has no key {', '.join(unknown)}; known are"
      f" {', '.join(sorted(fields))}"
    )
  types = typing.get_type_hints(cls)
  arguments = {}
  for name, value in values.items():
    nested = types[name]
    if dataclasses.is_dataclass(nested):
      value = _build(nested, value, f"{where}.{name}")
    arguments[name] = value
  missing = sorted(
    name
    for name, field in fields.items()
    if name not in arguments
    and field.default is dataclasses.MISSING
    and field.default_factory is dataclasses.MISSING
  )
  if missing:
    raise UserError(f"{where} lacks {', '.join(missing)}")
  return cls(**arguments)
