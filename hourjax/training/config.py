"""The configuration of a training run.

`build_experiment` turns a ConfigDict into the frozen dataclass `Experiment`,
once, when a command starts; nothing else reads ConfigDicts. What of it may
change later is in `workdir`.
"""

import dataclasses
import re
from collections.abc import Iterator, Mapping
from typing import Any, Literal

from hourjax import schema
from hourjax.data.dataset import SampleOptions
from hourjax.data.forgetting import Forgetting
from hourjax.data.memory_options import MemoryOptions
from hourjax.data.pipeline import ReadOptions
from hourjax.data.rows import Loss, RowSpec, Size
from hourjax.errors import UserError
from hourjax.models.config import ModelConfig
from hourjax.models.lora import LoraConfig
from hourjax.objective_config import LIMITS as OBJECTIVE_LIMITS
from hourjax.objective_config import ObjectiveConfig
from hourjax.parallel.chips import parse_tiles
from hourjax.parallel.mesh import MeshConfig
from hourjax.training.optimizer import COMPONENTS, OptimizerConfig

_MANY = 10**12  # steps: more than any run has
# Key -> the smallest and the largest value that makes sense. A value beyond is
# a typing error, and would fail much later, for lack of memory or time.
_CAPACITY = (0, 2**27)  # of a row
LIMITS: dict[str, tuple[float, float]] = {
  "batch_rows": (1, 2**16),
  "accumulate": (1, 2**16),
  "batch_samples": (0, 2**14),
  "steps": (0, 10**9),
  "epochs": (0, 10**5),
  "seed": (0, 2**32 - 1),  # JAX drops higher bits
  "max_length": (1, 2**24),
  "log_every": (1, _MANY),
  "checkpoint_every": (1, _MANY),
  "keep_checkpoints": (1, 10**6),
  "max_nonfinite": (1, _MANY),
  "eval_every": (0, _MANY),
  "eval_rows": (1, 2**20),
  "patience": (0, _MANY),
  **{f"rows.{name}": _CAPACITY for name in Size.names()},
  "read.threads": (1, 1024),
  "read.ahead": (1, 1024),
  **dict.fromkeys(("mesh.data", "mesh.fsdp"), (-1, 2**20)),
  **dict.fromkeys(("mesh.seq", "mesh.tensor"), (1, 2**20)),
  "mesh.slices": (0, 2**16),
  "data.share_memory": (1, 2**16),
  "data.max_skipped": (0, 1),
  "forgetting.ratio": (1, 10**6),
  "forgetting.max_frames": (1, 10**7),
  "forgetting.temporal_ratio": (0, 10**6),
  "memory.scale": (0, 1),
  "model.memory_chunk": (0, 2**27),
  **{f"optimizer.{name}": (0, 10) for name in (*COMPONENTS, "single_rate")},
  **dict.fromkeys(("optimizer.b1", "optimizer.b2"), (0, 1 - 1e-9)),
  "optimizer.eps": (1e-30, 1),
  "lora.rank": (0, 2**14),
  "lora.alpha": (1e-6, 1e6),
  "lora.dropout": (0, 1 - 1e-6),
  "optimizer.weight_decay": (0, 100),
  "optimizer.warmup": (0, 1),
  "optimizer.clip": (0, 1e9),
  **OBJECTIVE_LIMITS,
  "model.pool_side": (1, 1024),
  "model.memaug_layers": (0, 1024),
  "model.memaug_init": (0, 100),
  "model.vision.image_size": (1, 2**14),
  "model.vision.patch_size": (1, 2**14),
  "model.decoder.vocab": (1, 2**22),
  "model.decoder.kv_heads": (1, 2**10),
  "model.decoder.head_dim": (0, 2**12),
  "model.decoder.rope_base": (1, 1e12),
  "model.decoder.query_init": (0, 100),
}
for _part in ("vision", "decoder"):
  LIMITS |= {
    f"model.{_part}.width": (1, 2**16),
    f"model.{_part}.layers": (1, 1024),
    f"model.{_part}.heads": (1, 2**10),
    f"model.{_part}.mlp": (1, 2**20),
    f"model.{_part}.norm_eps": (1e-30, 1),
  }
# The first must be a multiple of the second.
_MULTIPLES = (
  ("model.vision.width", "model.vision.heads"),
  ("model.decoder.width", "model.decoder.heads"),
  ("model.decoder.heads", "model.decoder.kv_heads"),
)
_DTYPES = ("float32", "bfloat16", "float16")
# Names that keys had in older versions -> today's.
_RENAMED = {"watch": "metrics"}


@dataclasses.dataclass(frozen=True)
class DataConfig:
  """Says where the data is; paths may be relative to the working directory.

  Attributes:
    dataset: folder that `hourjax.prepare` wrote.
    media: folder of videos and images.
    features: feature store of the videos; empty to encode their pixels in the
      train step.
    tokenizer: folder of the tokenizer, or a name with hf:// (see `hub`).
    single_image: "tiled" or "plain", see `SampleOptions`.
    share_memory: how many conversations about one video may share its memory
      in a row, so that it is read and projected once; 1 shares nothing.
    weights: how often each sample of a stream or source is taken in an epoch,
      if not once, such as "ego4d=2,short=0.5".
    max_skipped: if a larger share of the samples cannot be used, training does
      not start, or stops.
  """

  dataset: str = ""
  media: str = ""
  features: str = ""
  tokenizer: str = ""
  single_image: Literal["tiled", "plain"] = "tiled"
  share_memory: int = 1
  weights: str = ""
  max_skipped: float = 0.01

  def __post_init__(self) -> None:
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


def parse_steps(text: str) -> range:
  """Returns the steps of "a:b", which are a to b-1; none for an empty text.

  Raises:
    UserError: the text has another form, or means no step.
  """
  if not text:
    return range(0)
  match = re.fullmatch(r"(\d+):(\d+)", text)
  steps = range(*map(int, match.groups())) if match else range(0)
  if not steps or not steps[0]:
    raise UserError(
      f"config.metrics.profile_steps is {text!r}; write a:b to trace the steps"
      " a to b-1, with 1 <= a < b, as 10:15"
    )
  return steps


@dataclasses.dataclass(frozen=True)
class MetricsConfig:
  """Says what is written beside metrics.jsonl.

  Attributes:
    tensorboard: whether event files are written to WORKDIR/tensorboard.
    wandb: project at Weights & Biases; empty for none.
    profile_steps: "a:b" to trace the steps a to b-1 into WORKDIR/profile, for
      TensorBoard's profile page and XProf; empty for none.
  """

  tensorboard: bool = True
  wandb: str = ""
  profile_steps: str = ""

  def __post_init__(self) -> None:
    parse_steps(self.profile_steps)


@dataclasses.dataclass(frozen=True)
class Experiment:
  """Holds everything that decides a training run.

  Attributes:
    model: sizes and dtype of the model.
    forgetting: which memory tokens become queries.
    data: where the data is, and how samples are weighted.
    rows: capacity of one row.
    optimizer: learning rates and the rest of AdamW.
    read: how far ahead rows are read.
    mesh: how devices are divided.
    init: empty for fresh weights, a folder of published weights or a name with
      hf:// (see `hub`), or the workdir of an earlier run.
    draw_missing: components that `init` may lack, separated by commas; they
      are drawn fresh. Stage 1 starts from LLaVA-OneVision with "memaug".
    seed: of weights, shuffling and forgetting.
    batch_rows: rows in a micro-batch, over all devices.
    accumulate: micro-batches in a step, if `batch_samples` is 0.
    batch_samples: samples in a step, all of one stream, which take as many
      micro-batches as they need; 0 lets a step be `accumulate` micro-batches
      and take as many samples as these hold.
    drop_last: whether the samples of a stream that are left over at the end of
      an epoch, fewer than `batch_samples`, are left out.
    steps: of the run; 0 takes their number from `epochs`.
    epochs: passes over the data, if `steps` is 0.
    max_length: of the decoder's sequence of one sample, in tokens.
    loss: "samples", the mean of the samples' mean losses, or "tokens", the
      mean over all label tokens of a step, as runs had that were saved before
      there was a choice.
    log_every: steps between two that are logged.
    checkpoint_every: steps between two checkpoints.
    keep_checkpoints: how many stay on disk.
    on_save_error: "continue" or "stop" when a checkpoint cannot be saved.
    max_nonfinite: the run stops after so many steps in a row whose loss or
      gradient is not finite; fewer are skipped.
    eval_every: steps between two evaluations on held-out data; 0 for none.
    eval_rows: rows of held-out data that an evaluation takes, always the same.
    patience: evaluations in a row without a lower loss of held-out answers
      after which the run ends, see `faults`; 0 is off.
    memory: which memory tokens queries attend to, and their positions.
    metrics: what is written beside metrics.jsonl.
    lora: adapters, trained in place of the model's own parameters.
    objective: sft, dpo or grpo, and their keys.
    stream_rows: capacity of the rows of streams that have another than `rows`,
      by the name of the stream. It counts only where a step is `batch_samples`
      samples: else rows of several streams share micro-batches.
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
  batch_samples: int = 0
  drop_last: bool = False
  steps: int = 0
  epochs: float = 1.0
  max_length: int = 32_768
  loss: Loss = "tokens"
  log_every: int = 10
  checkpoint_every: int = 500
  keep_checkpoints: int = 2
  on_save_error: str = "continue"
  max_nonfinite: int = 5
  eval_every: int = 0
  eval_rows: int = 128
  patience: int = 0
  memory: MemoryOptions = dataclasses.field(default_factory=MemoryOptions)
  metrics: MetricsConfig = dataclasses.field(default_factory=MetricsConfig)
  lora: LoraConfig = dataclasses.field(default_factory=LoraConfig)
  objective: ObjectiveConfig = dataclasses.field(
    default_factory=ObjectiveConfig
  )
  # Left out of the hash: a dict has none.
  stream_rows: dict[str, Size] = dataclasses.field(
    default_factory=dict, hash=False
  )

  def __post_init__(self) -> None:
    at_least_one = ("batch_rows", "accumulate", "max_length", "log_every",
                    "checkpoint_every", "keep_checkpoints",
                    "max_nonfinite", "eval_rows")  # fmt: skip
    others = ("batch_samples", "steps", "seed", "eval_every", "patience")
    for name in (*at_least_one, *others):
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
    self.memory.check_forgetting(self.forgetting)
    chunk, seq = self.model.memory_chunk, self.mesh.seq
    if chunk and seq > 1:
      raise UserError(
        f"config.model.memory_chunk is {chunk} and config.mesh.seq {seq}: a"
        " memory that is split over devices is not projected in chunks; set"
        " config.model.memory_chunk=0, or config.mesh.seq=1"
      )
    if self.model.offload == "host" and self.model.remat != "full":
      raise UserError(
        f"config.model.offload is 'host' and config.model.remat"
        f" {self.model.remat!r}, which keeps more than is moved; set"
        " config.model.remat=full, or config.model.offload=device"
      )
    if not self.steps and not self.epochs > 0:
      raise UserError(
        f"config.epochs is {self.epochs} and config.steps 0; one must be"
        " positive"
      )
    if self.patience and not self.eval_every:
      raise UserError(
        f"config.patience is {self.patience} and config.eval_every 0: without"
        " evaluations nothing ends the run; set config.eval_every"
      )
    self._check_batch()

  def _check_batch(self) -> None:
    """Raises a UserError if the keys of a step's size contradict each other."""
    samples, rows = self.batch_samples, self.batch_rows
    if not samples:
      if self.drop_last:
        raise UserError(
          "config.drop_last is True and config.batch_samples 0: only batches of"
          " samples can be left over; set config.batch_samples, or"
          " config.drop_last=False"
        )
      return
    if self.accumulate > 1:
      raise UserError(
        f"config.accumulate is {self.accumulate} and config.batch_samples"
        f" {samples}: a step takes as many micro-batches as its samples need;"
        " set config.accumulate=1, or config.batch_samples=0 for steps of"
        f" {self.accumulate} micro-batches"
      )
    if rows > samples:
      raise UserError(
        f"config.batch_rows is {rows} and config.batch_samples {samples}: a"
        f" step has at most a row for each sample, so {rows - samples} rows of"
        f" every micro-batch would be empty; set config.batch_rows={samples} or"
        " fewer, on a mesh whose data x fsdp divides it, or raise"
        " config.batch_samples"
      )

  @property
  def trained_components(self) -> frozenset[str]:
    """Returns the components that learn, and "adapters" if only these do."""
    names = {name for name in COMPONENTS if self.optimizer.rate(name) > 0}
    return frozenset(names | ({"adapters"} if self.lora.rank else set()))

  @property
  def micro_batches(self) -> int:
    """Returns a step's micro-batches; 0 for as many as its samples need."""
    return 0 if self.batch_samples else self.accumulate

  @property
  def step_rows(self) -> int:
    """Returns the number of rows in an optimizer step.

    With `batch_samples` it is the most that a step can have, a row a sample.
    """
    return self.batch_samples or self.batch_rows * self.accumulate

  @property
  def rows_by_stream(self) -> dict[str, Size]:
    """Returns `stream_rows` where it counts, else nothing."""
    return self.stream_rows if self.batch_samples else {}

  @property
  def row_specs(self) -> dict[str, RowSpec]:
    """Returns the static shapes of the rows that differ, by stream.

    Those of streams that `stream_rows` does not name are under "".
    """
    own = {
      stream: dataclasses.replace(self.row_spec, capacity=size)
      for stream, size in self.rows_by_stream.items()
    }
    return {"": self.row_spec} | own

  @property
  def reads_pixels(self) -> bool:
    """Returns whether rows hold frames or tiles for the vision tower."""
    sizes = [spec.capacity for spec in self.row_specs.values()]
    return any(size.frames or size.tiles for size in sizes)

  @property
  def row_spec(self) -> RowSpec:
    """Returns the static shapes of the rows that this model reads."""
    vision = self.model.vision
    return RowSpec(
      capacity=self.rows,
      frame_tokens=self.model.pool_side**2,
      tile_tokens=vision.side**2,
      width=vision.width,
      image_size=vision.image_size,
      loss=self.loss,
    )

  @property
  def sample_options(self) -> SampleOptions:
    """Returns how the dataset makes samples of records."""
    return SampleOptions(
      seed=self.seed,
      forgetting=self.forgetting,
      memory=self.memory,
      max_length=self.max_length,
      single_image=self.data.single_image,
    )


def build_experiment(config: Mapping[str, Any]) -> Experiment:
  """Builds an Experiment from a nested mapping, such as a ConfigDict.

  Raises:
    UserError: a key is unknown or missing, a value has another type, or a
      number is outside of `LIMITS`; names the key.
  """
  experiment = schema.build(Experiment, config, "config", _RENAMED)
  _check_values(experiment)
  return experiment


def _check_values(experiment: Experiment) -> None:
  """Raises a UserError for a number or name that makes no sense."""
  values = dict(_flat(experiment))
  streams = {
    f"stream_rows.{stream}.{name}": getattr(size, name)
    for stream, size in experiment.rows_by_stream.items()
    for name in Size.names()
  }
  values |= streams
  for key, (low, high) in (LIMITS | dict.fromkeys(streams, _CAPACITY)).items():
    if not low <= values[key] <= high:
      raise UserError(
        f"config.{key} is {schema.shorten(values[key])}; it must be at least"
        f" {low} and at most {high}"
      )
  for key, other in _MULTIPLES:
    if key == "model.decoder.width" and experiment.model.decoder.head_dim:
      continue  # heads have a size of their own
    if values[key] % values[other]:
      raise UserError(
        f"config.{key} is {values[key]} and config.{other} {values[other]};"
        " the first must be a multiple of the second"
      )
  for key in ("forward_tiles", "backward_tiles"):
    if text := values[f"model.attention.{key}"]:
      parse_tiles(text, f"config.model.attention.{key}")
  model = experiment.model
  if model.decoder.head_size % 2:
    raise UserError(
      f"config.model.decoder has heads of {model.decoder.head_size} numbers,"
      " which rotate in pairs; choose width and heads, or head_dim, so that it"
      " is even"
    )
  if model.dtype not in _DTYPES:
    raise UserError(
      f"config.model.dtype is {model.dtype!r}; choose {schema.either(_DTYPES)}"
    )


def _flat(of: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
  """Yields (dotted key, value) of all fields of nested dataclasses."""
  for field in dataclasses.fields(of):
    value, key = getattr(of, field.name), prefix + field.name
    if dataclasses.is_dataclass(value):
      yield from _flat(value, f"{key}.")
    else:
      yield key, value


def rename_old_keys(config: Mapping[str, Any]) -> dict[str, Any]:
  """Returns a saved configuration under today's names of its keys.

  Args:
    config: as an older version may have written it.
  """
  return {
    _RENAMED.get(key, key): value
    for key, value in config.items()
    # Should both names be there, today's counts.
    if _RENAMED.get(key, key) == key or _RENAMED[key] not in config
  }
