"""Which trainings a table needs: one for each row and seed, and their starts.

A row is the configuration with some keys changed. Two rows with the same
configuration, of one table or of two, are one run. Rows begin with the weights
of `config.init`, as the configuration says. Where a row changes the model,
these do not fit it, and the earlier stage is trained again with that change: a
run's workdir holds the configuration for it.
"""

import copy
import dataclasses
import math
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from hourjax.ablation.tables import Row, Table, Times
from hourjax.data.forgetting import Forgetting
from hourjax.errors import UserError
from hourjax.training.config import Experiment, build_experiment
from hourjax.training.workdir import read_config


@dataclasses.dataclass(frozen=True)
class Training:
  """Describes one training.

  Attributes:
    name: what differs from the configuration, as the name of a folder.
    folder: of its files.
    experiment: its configuration.
  """

  name: str
  folder: pathlib.Path
  experiment: Experiment

  @property
  def workdir(self) -> pathlib.Path:
    """Returns the workdir of the training."""
    return self.folder / "training"


@dataclasses.dataclass(frozen=True)
class Job:
  """Describes a row's run with one seed.

  Attributes:
    row: of the table.
    seed: of the data's order, of forgetting, and of what is drawn.
    earlier: trainings of earlier stages that come before, in order.
    training: the run that is evaluated.
  """

  row: Row
  seed: int
  earlier: tuple[Training, ...]
  training: Training


def plan_jobs(
  table: Table, config: Mapping[str, Any], out: pathlib.Path, seeds: int
) -> list[Job]:
  """Returns a table's runs, all rows with one seed before the next seed.

  Args:
    table: whose rows are run.
    config: configuration of the last stage.
    out: folder of all runs.
    seeds: how many runs each row has; they are numbered from the
      configuration's seed on.

  Raises:
    UserError: a row's configuration cannot be built, or its start is not
      there or cannot be trained again.
  """
  base = dataclasses.asdict(build_experiment(config))
  init, first = base["init"], base["seed"]
  if init and not pathlib.Path(init).is_dir():
    raise UserError(
      f"--config.init={init} does not exist; train it first (the demo's by"
      " `bash launch/local.sh`), or give an empty one to start from fresh"
      " weights"
    )
  return [
    _job(row, base, out, seed)
    for seed in range(first, first + seeds)
    for row in table.rows
  ]


def _job(row: Row, base: dict[str, Any], out: pathlib.Path, seed: int) -> Job:
  """Returns a row's run with one seed."""
  changes = _changes(row, base)
  config = _changed(base, {**changes, "seed": seed})
  config["rows"] = grown_rows(base, config)
  name = folder_name(changes)
  model = {k: v for k, v in changes.items() if k.startswith("model.")}
  earlier = ()
  if model and config["init"]:
    earlier = tuple(_earlier(row, model, config, out))
    if earlier:
      config["init"] = str(earlier[-1].workdir)
  folder = out / "runs" / name / f"seed{seed}"
  training = Training(name, folder, build_experiment(config))
  return Job(row, seed, earlier, training)


def _changes(row: Row, base: Mapping[str, Any]) -> dict[str, Any]:
  """Returns what a row changes in the configuration, by dotted key."""
  changes = {}
  for key, value in row.overrides.items():
    old = _get(base, key)
    if isinstance(value, Times):
      value = max(1, round(old * value.factor))
    if value != old:
      changes[key] = value
  # A ratio of frames that says what its default stands for changes nothing.
  rule = base["forgetting"]
  ratio = changes.get("forgetting.ratio", rule["ratio"])
  same = changes.get("forgetting.temporal_ratio") == ratio
  if same and not rule["temporal_ratio"]:
    del changes["forgetting.temporal_ratio"]
  return changes


def _get(config: Mapping[str, Any], key: str) -> Any:
  """Returns the value of a dotted key."""
  value: Any = config
  for part in key.split("."):
    value = value[part]
  return value


def _changed(
  config: Mapping[str, Any], changes: Mapping[str, Any]
) -> dict[str, Any]:
  """Returns a configuration with other values of some dotted keys."""
  config = copy.deepcopy(dict(config))
  for key, value in changes.items():
    *groups, last = key.split(".")
    holder = config
    for group in groups:
      holder = holder[group]
    holder[last] = value
  return config


def folder_name(changes: Mapping[str, Any]) -> str:
  """Returns the name of the folder of a run, such as "memory.scale=0.5"."""
  return "+".join(f"{k}={v}" for k, v in sorted(changes.items())) or "default"


def _earlier(
  row: Row,
  model: Mapping[str, Any],
  later: Mapping[str, Any],
  out: pathlib.Path,
) -> Iterator[Training]:
  """Yields the earlier stages that a change of the model trains again.

  Args:
    row: for the message.
    model: keys of the model, and their values.
    later: configuration of the stage after them.
    out: folder of all runs.
  """
  init = pathlib.Path(later["init"])
  drawn = "memaug" in later["draw_missing"].split(",")
  if not (init / "checkpoints").is_dir():
    if drawn:
      return  # weights of another model, which MemAug is added to
    raise UserError(
      f"the row {row.label!r} changes {', '.join(model)}, which the weights in"
      f" --config.init={init} do not have, and no training left them there that"
      " could be repeated; give the workdir of one, or an empty --config.init"
    )
  # An older run may lack keys, which have defaults.
  config = dataclasses.asdict(build_experiment(read_config(init)))
  if all(_get(config, key) == value for key, value in model.items()):
    return
  begins = drawn and not config["model"]["memaug_layers"]
  if begins and set(model) == {"model.memaug_layers"}:
    return  # MemAug begins in the later stage
  changed = _changed(config, model)
  if config["init"]:
    before = list(_earlier(row, model, config, out))
    yield from before
    if before:
      changed["init"] = str(before[-1].workdir)
  name = folder_name(model)
  folder = out / "earlier" / name / init.name
  yield Training(f"{name}, {init.name}", folder, build_experiment(changed))


def grown_rows(
  base: Mapping[str, Any], config: Mapping[str, Any]
) -> dict[str, int]:
  """Returns capacities in which a row's samples fit, if it keeps more.

  Queries and decoder positions grow by what forgetting keeps more of a whole
  row's memory; the room for text, and so the samples of a row, stay the same.
  With 240 frames of 4 tokens in a row, one of 4 tokens kept and one of 4 frames
  or all, 60 x 2 become 240 x 2 tokens: 360 more.

  Args:
    base: configuration without the row's changes.
    config: configuration with them.
  """
  rows, model = dict(config["rows"]), config["model"]
  side = model["pool_side"]
  old, new = (Forgetting(**c["forgetting"]) for c in (base, config))
  extra = 0.0
  if rows["features"] or rows["frames"]:
    more = max(0.0, _kept_share(new, side) - _kept_share(old, side))
    extra = more * rows["memory"] * config["data"]["share_memory"]
  # Of images one token in `ratio` is kept; rows of tokens end in a newline.
  of_images = max(0.0, 1 / new.ratio - 1 / old.ratio)
  tile = model["vision"]["image_size"] // model["vision"]["patch_size"]
  tokens = min(rows["memory"], rows["tiles"] * tile * (tile + 1))
  extra += of_images * tokens
  # Meshes divide rows by powers of two.
  extra = math.ceil(extra / 64) * 64
  for name in ("queries", "decoder"):
    rows[name] += extra
  return rows


def _kept_share(rule: Forgetting, side: int) -> float:
  """Returns which share of a video's memory is kept, without its limit."""
  tokens = (rule.cell_count(side, side) + 1) / (side**2 + 1)
  return tokens / (rule.temporal_ratio or rule.ratio)


def different_trainings(jobs: Sequence[Job]) -> list[Training]:
  """Returns the trainings of jobs, each once, in order."""
  found: dict[pathlib.Path, Training] = {}
  for job in jobs:
    for each in (*job.earlier, job.training):
      found.setdefault(each.folder, each)
  return list(found.values())
