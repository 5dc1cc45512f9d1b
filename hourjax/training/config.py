"""One experiment as frozen dataclasses, built once from a ConfigDict."""
# MERGED hourjax.training.changes:
# What may change in the configuration of a run that goes on.
#
# Everything else decides which numbers come out, and a run whose steps belong
# two configurations has no name.

import contextlib
import dataclasses
import fnmatch
import json
import math
import os
import typing
from collections.abc import Iterator, Mapping
from typing import Any

from hourjax import schema
from hourjax.data.dataset import SampleOptions
from hourjax.data.forgetting import Forgetting
from hourjax.data.pipeline import ReadOptions
from hourjax.data.rows import RowSpec, Size
from hourjax.errors import UserError
from hourjax.models.config import ModelConfig
from hourjax.parallel.chips import parse_tiles
from hourjax.parallel.mesh import MeshConfig
from hourjax.training.optimizer import COMPONENTS, OptimizerConfig
from hourjax.training.profiling import parse_steps

_MANY = 10**12  # steps that never come
# Key -> the least and the greatest value that can be meant. What lies beyond is
# a slip of the keyboard, and would end in memory or patience running out.
LIMITS: dict[str, tuple[float, float]] = {
  "batch_rows": (1, 2**16),
  "accumulate": (1, 2**16),
  "steps": (0, 10**9),
  "epochs": (0, 10**5),
  "seed": (0, 2**32 - 1),  # of more, JAX would drop bits
  "max_length": (1, 2**24),
  "log_every": (1, _MANY),
  "checkpoint_every": (1, _MANY),
  "keep_checkpoints": (1, 10**6),
  "max_nonfinite": (1, _MANY),
  **{f"rows.{name}": (0, 2**27) for name in Size.names()},
  "read.threads": (1, 1024),
  "read.ahead": (1, 1024),
  **dict.fromkeys(("mesh.data", "mesh.fsdp"), (-1, 2**20)),
  **dict.fromkeys(("mesh.seq", "mesh.tensor"), (1, 2**20)),
  "mesh.slices": (0, 2**16),
  "data.share_memory": (1, 2**16),
  "data.max_skipped": (0, 1),
  "forgetting.ratio": (1, 10**6),
  "forgetting.max_frames": (1, 10**7),
  **{f"optimizer.{name}": (0, 10) for name in COMPONENTS},
  **dict.fromkeys(("optimizer.b1", "optimizer.b2"), (0, 1 - 1e-9)),
  "optimizer.eps": (1e-30, 1),
  "optimizer.weight_decay": (0, 100),
  "optimizer.warmup": (0, 1),
  "optimizer.clip": (0, 1e9),
  "model.pool_side": (1, 1024),
  "model.memaug_layers": (0, 1024),
  "model.vision.image_size": (1, 2**14),
  "model.vision.patch_size": (1, 2**14),
  "model.decoder.vocab": (1, 2**22),
  "model.decoder.kv_heads": (1, 2**10),
  "model.decoder.rope_base": (1, 1e12),
}
for _part in ("vision", "decoder"):
  LIMITS |= {
    f"model.{_part}.width": (1, 2**16),
    f"model.{_part}.layers": (1, 1024),
    f"model.{_part}.heads": (1, 2**10),
    f"model.{_part}.mlp": (1, 2**20),
    f"model.{_part}.norm_eps": (1e-30, 1),
  }
# Numbers of the first one must be a multiple of the second.
_MULTIPLES = (
  ("model.vision.width", "model.vision.heads"),
  ("model.decoder.width", "model.decoder.heads"),
  ("model.decoder.heads", "model.decoder.kv_heads"),
)
_DTYPES = ("float32", "bfloat16", "float16")


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
class MetricsConfig:
  """What is written beside metrics.jsonl.

  Attributes:
    tensorboard: event files in WORKDIR/tensorboard.
    wandb: project at Weights & Biases; empty is off.
    profile_steps: "a:b" to trace the steps a to b-1 into WORKDIR/profile, for
      TensorBoard's profile page and XProf; empty is off.
  """

  tensorboard: bool = True
  wandb: str = ""
  profile_steps: str = ""

  def __post_init__(self):
    parse_steps(self.profile_steps)


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
  watch: MetricsConfig = dataclasses.field(default_factory=MetricsConfig)

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
    UserError: for unknown or missing keys, values of another type, and numbers
      that cannot be meant, naming them.
  """
  experiment = _build(Experiment, config, "config")
  _check_values(experiment)
  return experiment


def _check_values(experiment: Experiment) -> None:
  """Compares all numbers and names with what can be meant by them."""
  values = dict(_flat(experiment))
  for key, (low, high) in LIMITS.items():
    if not low <= values[key] <= high:
      raise UserError(
        f"config.{key} is {schema.shorten(values[key])}; it must be at least"
        f" {low} and at most {high}"
      )
  for key, other in _MULTIPLES:
    if values[key] % values[other]:
      raise UserError(
        f"config.{key} is {values[key]} and config.{other} {values[other]};"
        " the first must be a multiple of the second"
      )
  for key in ("forward_tiles", "backward_tiles"):
    if text := values[f"model.attention.{key}"]:
      parse_tiles(text, f"config.model.attention.{key}")
  model = experiment.model
  if model.decoder.head_dim % 2:
    raise UserError(
      f"config.model.decoder has heads of {model.decoder.head_dim} numbers,"
      " which rotate in pairs; choose width and heads so that it is even"
    )
  if model.dtype not in _DTYPES:
    raise UserError(
      f"config.model.dtype is {model.dtype!r}; choose {_either(_DTYPES)}"
    )


def _flat(of: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
  """(dotted key, value) of all fields of nested dataclasses."""
  for field in dataclasses.fields(of):
    value, key = getattr(of, field.name), prefix + field.name
    if dataclasses.is_dataclass(value):
      yield from _flat(value, f"{key}.")
    else:
      yield key, value


def _typed(value: Any, kind: Any, where: str) -> Any:
  """The value as a field's type; nothing but int to float is converted."""
  options = typing.get_args(kind)  # of a Literal
  if options and value not in options:
    raise UserError(f"{where} is {value!r}; choose {_either(options)}")
  kind = str if options else kind
  if kind is float and type(value) is int:
    value = float(value) if abs(value) < 2**1000 else math.inf
  if type(value) is not kind or value != value:
    names = {int: "an integer", float: "a number", bool: "True or False"}
    raise UserError(
      f"{where} is {schema.shorten(value)}; it must be"
      f" {names.get(kind, 'text')}"
    )
  return value


def _either(options: tuple[str, ...]) -> str:
  return f"{', '.join(options[:-1])} or {options[-1]}"


def _build(cls, values: Any, where: str):
  if not isinstance(values, Mapping):
    raise UserError(
      f"{where} is {schema.shorten(values)}; it must be a group of keys"
    )
  fields = {field.name: field for field in dataclasses.fields(cls)}
  unknown = sorted(map(str, set(values) - set(fields)))
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
      arguments[name] = _build(nested, value, f"{where}.{name}")
    else:
      arguments[name] = _typed(value, nested, f"{where}.{name}")
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


# Pattern of keys -> why they may change.
HARMLESS = {
  "log_every": "what is said, not what is done",
  "watch.*": "what is said, not what is done",
  "read.*": "how far to read ahead; the rows are the same",
  "checkpoint_every": "when to save",
  "keep_checkpoints": "how much to keep",
  "on_save_error": "what to do when saving fails",
  "max_nonfinite": "when to give up",
  "data.max_skipped": "when to give up",
  "mesh.*": "where arrays lie; a checkpoint goes onto any mesh",
  "model.remat": "what is computed twice; the same function",
  "model.attention.*": "who computes attention; the same function",
  # Moved or copied. That the rows are the same is checked by the plan's
  # fingerprint, and the tokenizer against the dataset.
  "data.dataset": "where the data lies",
  "data.media": "where the data lies",
  "data.features": "where the data lies",
  "data.tokenizer": "where the data lies",
}


def refuse_changes(
  old: Mapping[str, Any], new: Experiment, workdir: str | os.PathLike
) -> None:
  """Raises unless a run of `old` may go on as `new`.

  `HARMLESS` keys may differ, and so may batch_rows and accumulate while their
  product, the rows of a step, stays: micro-batches change rounding alone.
  Not even `steps` or `epochs` may grow: the learning rate of every step
  depends on them, and would jump.

  Args:
    old: configuration of the run in `workdir`, as `read_config` gives it.
    new: the configuration asked for.
    workdir: for the message.

  Raises:
    UserError: with "key: old -> new" of every difference.
  """
  found = differences(old, dataclasses.asdict(new))
  if not found:
    return
  lines = [f"{key}: {was} -> {now}" for key, (was, now) in found.items()]
  raise UserError(
    f"{workdir} holds the run of another configuration; differences"
    " (there -> asked for):\n  "
    + "\n  ".join(lines)
    + "\nchange these back, or start another workdir (with --config.init="
    f"{workdir} it begins with this run's weights)"
  )


def differences(
  old: Mapping[str, Any], new: Mapping[str, Any]
) -> dict[str, tuple[str, str]]:
  """Keys that differ and matter -> (old, new) as text; "(not set)" if absent.

  Keys that an older version did not know count with their defaults.
  """
  # Keys that this version does not know stay, and are listed.
  with contextlib.suppress(UserError, TypeError, ValueError):
    old = dataclasses.asdict(build_experiment(old))
  was, now = _flat_changes(old), _flat_changes(new)
  found = {
    key: (was.get(key, "(not set)"), now.get(key, "(not set)"))
    for key in sorted({**was, **now})
    if was.get(key) != now.get(key) and not _harmless(key)
  }
  if set(found) & {"batch_rows", "accumulate"} and _rows(was) == _rows(now):
    found.pop("batch_rows", None)
    found.pop("accumulate", None)
  return found


def _flat_changes(
  values: Mapping[str, Any], prefix: str = ""
) -> dict[str, str]:
  result = {}
  for key, value in values.items():
    if isinstance(value, Mapping):
      result |= _flat_changes(value, f"{prefix}{key}.")
    else:
      result[prefix + key] = json.dumps(value)
  return result


def _harmless(key: str) -> bool:
  return any(fnmatch.fnmatchcase(key, pattern) for pattern in HARMLESS)


def _rows(flat: Mapping[str, str]) -> int | None:
  try:
    return int(flat["batch_rows"]) * int(flat["accumulate"])
  except (KeyError, ValueError):
    return None
