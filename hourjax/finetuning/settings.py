"""What is decided about a fine-tuning: held-out videos, rows, steps, rates.

`make_experiment` is the one place for settings of the training, on features
that were extracted once. Of a large model adapters are trained, in a base whose
number format suits the device; of a small one everything but the vision tower.
"""

import dataclasses
import difflib
import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from hourjax import hub
from hourjax.data.dataset import Dataset
from hourjax.data.pipeline import ReadOptions
from hourjax.data.prepare.holdout import name_number, parse_holdout
from hourjax.data.rows import Size
from hourjax.errors import UserError
from hourjax.inference.load import (
  describe,
  find_folder,
  find_tokenizer,
  is_workdir,
)
from hourjax.models.config import ModelConfig
from hourjax.models.lora import LoraConfig
from hourjax.models.params import VISION, param_shapes
from hourjax.parallel.chips import Chip
from hourjax.parallel.gpus import device_facts
from hourjax.planning.one_host import fit_one_host
from hourjax.training.config import DataConfig, Experiment, build_experiment
from hourjax.training.data_loader import open_dataset
from hourjax.training.optimizer import COMPONENTS, OptimizerConfig
from hourjax.training.workdir import read_config

# Held out are whole videos, until so many of the questions, but at most so many
# (their score is then known within 3 %), and at most half of the videos.
_SHARE, _MOST_QUESTIONS = 0.2, 1000
# Of a run whose rates are known: what goes on from a trained model needs less.
_LOWER = 0.3
# Samples to train on, up to which a step has so many of them.
_BATCHES = ((256, 8), (1024, 16), (4096, 32), (16_384, 64), (math.inf, 128))
# The same for epochs; with early stopping these are upper bounds.
_EPOCHS = ((1000, 20.0), (10_000, 8.0), (math.inf, 2.0))
_BLIND = 5.0  # epochs at most, where nothing is held out
_PATIENCE = 3
# Parameters beside the tower, from which on adapters are trained: above this, a
# device that holds the model seldom holds what training all of it takes.
_LARGE = 10**9
_ADAPTERS = LoraConfig(rank=16, alpha=32.0)
_ADAPTER_RATE = 1e-4  # as in LLaVA's and PEFT's recipes
_MOST_BETWEEN = 200  # steps between two evaluations
_ROW_UNIT = 128  # capacities are multiples, which any mesh of ours divides
# Positions of MemAug and decoder in a micro-batch of one device.
_POSITIONS = 16_384
_UNBOUNDED = Size(*[2**27] * len(Size.names()))


def choose_held_out(
  found: Sequence[dict[str, Any]], holdout: str = ""
) -> list[str]:
  """Marks the questions that are held out ("held_out"), and says how.

  Whole videos are held out: those that a column of splits names, if there is
  one, else those that the hash of their names chooses, as `prepare --holdout`
  does. Of a single video nothing is.

  Args:
    found: questions of `questions.read`, which are changed.
    holdout: a share such as "10%", or a number of videos; empty for the rule
      of this file.

  Returns:
    Sentences about it.

  Raises:
    UserError: everything would be held out, or a part of a video's questions.
  """
  asked = parse_holdout(holdout)
  videos: dict[str, int] = {}
  for item in found:
    videos[item["video"]] = videos.get(item["video"], 0) + 1
  named = {item["video"] for item in found if item["held_out"]}
  if named and not asked:
    _check_sides(found, named)
    return ["held out is what the column of splits says"]
  if len(videos) < 2:
    return [
      "there is one video, so nothing is held out: neither early stopping nor a"
      " score can tell whether the model learns more than these answers"
    ]
  order = sorted(videos, key=name_number)
  if asked and asked.names:
    count = sum(name in asked.names for name in order)
    order.sort(key=lambda name: name not in asked.names)
  elif asked:
    count = asked.amount * (len(order) if asked.percent else 100) / 100
    count = math.ceil(count)
  else:
    wanted = min(_SHARE * len(found), _MOST_QUESTIONS)
    sums = np.cumsum([videos[name] for name in order])
    count = 1 + int(np.searchsorted(sums, wanted))
    count = max(1, min(count, len(order) // 2))
  if not 0 < count < len(order):
    raise UserError(
      f"--holdout={holdout} sets {count} of {len(order)} videos aside; some"
      " must be left to train on, and some to compare with"
    )
  chosen = {*order[:count]}
  for item in found:
    item["held_out"] = item["video"] in chosen
  return []


def _check_sides(found: Sequence[dict[str, Any]], named: set[str]) -> None:
  """Raises a UserError if a column of splits cannot be followed."""
  trained = {item["video"] for item in found if not item["held_out"]}
  if not trained:
    raise UserError(
      "the column of splits holds all questions out, which leaves none to train"
      " on; correct it, or give --holdout=20%, which does not look at it"
    )
  if both := sorted(named & trained):
    raise UserError(
      f"the column of splits holds out some questions about {both[0]} and not"
      f" others, and so for {len(both)} of {len(named | trained)} videos; whole"
      " videos must be held out: correct it, or give --holdout=20%, which does"
      " not look at it"
    )


def base_experiment(model: str, tokenizer: str | None = None) -> Experiment:
  """Returns the settings that a model was trained with, or those of stage 3.

  Args:
    model: workdir of a run, a published folder, or a name with hf://.
    tokenizer: folder of the tokenizer, if it is not the model's own.

  Raises:
    UserError: there is no such model, or its tokenizer lacks.
  """
  folder = find_folder(model)
  source = describe(folder)
  optimizer = OptimizerConfig(clip=1.0)
  if is_workdir(folder):
    optimizer = build_experiment(read_config(folder)).optimizer
  words = tokenizer or source.tokenizer
  if not str(words).startswith(hub.PREFIX):
    words = find_tokenizer(words, folder).absolute()
  return Experiment(
    model=source.config,
    forgetting=source.rules.forgetting,
    memory=source.rules.memory,
    data=DataConfig(
      tokenizer=str(words), single_image=source.rules.single_image
    ),
    rows=Size(),
    optimizer=optimizer,
    read=ReadOptions(),
    init=model if str(model).startswith(hub.PREFIX) else str(folder.absolute()),
    seed=source.rules.seed,
    max_length=source.rules.max_length,
    loss="samples",
  )


def measure(base: Experiment, data: DataConfig) -> Dataset:
  """Opens a dataset, with its samples' sizes as if all features were stored.

  Args:
    base: of the model.
    data: where the data is; `features` may still be empty.

  Raises:
    UserError: the dataset cannot be opened.
  """
  dataset = open_dataset(dataclasses.replace(base, rows=_UNBOUNDED, data=data))
  names = Size.names()
  features, frames = names.index("features"), names.index("frames")
  sizes = dataset.sizes.copy()
  sizes[:, features] += sizes[:, frames] * base.model.pool_side**2
  sizes[:, frames] = 0
  dataset.sizes = sizes
  dataset.visual = dataset.visual._replace(
    stored=np.ones_like(dataset.visual.stored)
  )
  return dataset


def make_experiment(
  base: Experiment,
  data: DataConfig,
  dataset: Dataset,
  overrides: Mapping[str, str],
) -> Experiment:
  """Decides all settings of a fine-tuning.

  Args:
    base: of the model, see `base_experiment`.
    data: where the data is.
    dataset: the same data, see `measure`.
    overrides: values of keys such as "optimizer.decoder", as text.

  Raises:
    UserError: no sample can be used, or an override is no key or value.
  """
  count = len(dataset.usable)
  if not count:
    raise UserError(
      f"no question about {len(dataset.columns.videos)} videos can be trained"
      f" on: {dataset.skipped[0].reason if dataset.skipped else 'all held out'}"
    )
  rows = _rows(dataset)
  batch, micro = _batch(count, rows)
  steps = -(-count // batch)
  evaluate = min(max(steps, 5), _MOST_BETWEEN)
  held_out = len(dataset.held_out) > 0
  made = dataclasses.replace(
    base,
    data=data,
    rows=rows,
    optimizer=_rates(base.optimizer),
    batch_samples=batch,
    batch_rows=micro,
    epochs=min(_upto(_EPOCHS, count), math.inf if held_out else _BLIND),
    log_every=max(1, evaluate // 5),
    checkpoint_every=evaluate,
    keep_checkpoints=1,
    eval_every=evaluate if held_out else 0,
    patience=_PATIENCE if held_out else 0,
  )
  if parameters(base.model) >= _LARGE:
    kind = jax.devices()[0].device_kind
    made = adapt(made, device_facts(kind), jax.device_count())
  return override(made, overrides)


def parameters(model: ModelConfig) -> int:
  """Returns the number of a model's parameters, without the vision tower's."""
  shapes = param_shapes(model)
  return sum(
    math.prod(x) for path, x in shapes.items() if not path.startswith(VISION)
  )


def adapt(made: Experiment, chip: Chip | None, devices: int) -> Experiment:
  """Returns settings that train adapters, and fit the devices.

  Args:
    made: settings that train everything.
    chip: one of the devices; None of a kind that is not known, such as a CPU.
    devices: how many there are.

  Raises:
    UserError: not even the smallest settings fit.
  """
  config = dataclasses.asdict(made)
  config["lora"] = dataclasses.asdict(_ADAPTERS)
  config["optimizer"].update(
    dict.fromkeys(("projector", "memaug", "decoder"), _ADAPTER_RATE), b2=0.999
  )
  if chip is not None:
    fit = fit_one_host(
      made.model, chip, devices, options=_ADAPTERS, rows=made.rows
    )
    for key, value in fit.settings.items():
      group, *path = config, *key.split(".")
      for name in path[:-1]:
        group = group[name]
      group[path[-1]] = value
    print("\n".join(f"note: {text}" for text in fit.notes), file=sys.stderr)
  return build_experiment(config)


def _rates(own: OptimizerConfig) -> OptimizerConfig:
  """Returns an optimizer with the rates of the model's own training, lowered.

  A published model has those of the published stage 3. What was frozen there
  gets the lowest rate, and the tower none: its features are extracted once.
  """
  usual, names = OptimizerConfig(), COMPONENTS[1:]
  known = [getattr(own, name) for name in names]
  published = known == [getattr(usual, name) for name in names]
  least = min(rate for rate in (*known, 1.0) if rate)
  projector, memaug, decoder = (
    (1.0 if published else _LOWER) * (rate or least) for rate in known
  )
  return dataclasses.replace(
    own,
    vision=0.0,
    projector=projector,
    memaug=memaug,
    decoder=decoder,
    single_rate=0.0,
  )


def _rows(dataset: Dataset) -> Size:
  """Returns rows that hold the largest sample; shorter ones share a row."""
  used = np.concatenate([dataset.usable, dataset.held_out])
  most = dataset.sizes[used].max(axis=0).tolist()
  return Size(*(-(-size // _ROW_UNIT) * _ROW_UNIT for size in most))


def _batch(samples: int, rows: Size) -> tuple[int, int]:
  """Returns the samples of a step and the rows of a micro-batch."""
  devices = jax.device_count()
  wanted = min(int(_upto(_BATCHES, samples)), samples)
  batch = -(-wanted // devices) * devices
  each = min(_POSITIONS // (rows.queries + rows.decoder + 1), batch // devices)
  return batch, devices * 2 ** int(math.log2(max(each, 1)))


def _upto(table: Sequence[tuple[float, float]], count: int) -> float:
  """Returns the value of the first line whose bound is not exceeded."""
  return next(value for bound, value in table if count <= bound)


def parse_overrides(given: Sequence[str]) -> dict[str, str]:
  """Parses "KEY=VALUE" of --set; "config." may stand before the key.

  Raises:
    UserError: it has another form.
  """
  found = {}
  for text in given:
    key, equals, value = text.partition("=")
    if not equals or not key:
      raise UserError(f"--set={text}: write --set=KEY=VALUE")
    found[key.removeprefix("config.")] = value
  return found


def override(made: Experiment, values: Mapping[str, str]) -> Experiment:
  """Returns an experiment with other values.

  Args:
    made: the experiment.
    values: by key with dots, as text.

  Raises:
    UserError: there is no such key, or the value is of another type.
  """
  config = dataclasses.asdict(made)
  known = dict(_leaves(config))
  for key, text in values.items():
    if key not in known:
      near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
      hint = f"did you mean {near[0]}?" if near else "see configs/README.md"
      raise UserError(f"--set={key}={text}: there is no such key; {hint}")
    group, *path = config, *key.split(".")
    for name in path[:-1]:
      group = group[name]
    group[path[-1]] = _typed(text, known[key], key)
  experiment = build_experiment(config)
  if experiment.optimizer.vision:
    raise UserError(
      f"--set=optimizer.vision={experiment.optimizer.vision}: the tower is not"
      " trained here, since features are extracted once; train it with"
      " hourjax.train"
    )
  return experiment


def _leaves(values: Mapping[str, Any], prefix: str = "") -> list[Any]:
  """Returns (key with dots, value) of nested mappings."""
  return [
    pair
    for key, value in values.items()
    for pair in (
      _leaves(value, f"{prefix}{key}.")
      if isinstance(value, Mapping)
      else [(f"{prefix}{key}", value)]
    )
  ]


def _typed(text: str, old: Any, key: str) -> Any:
  """Returns a text as a value of the type of another one."""
  try:
    if isinstance(old, bool):
      return {"true": True, "false": False}[text.lower()]
    return type(old)(text)
  except (ValueError, KeyError):
    kinds = {bool: "true or false", int: "a whole number", float: "a number"}
    raise UserError(
      f"--set={key}={text}: give {kinds.get(type(old), 'text')}, as {old} is"
    ) from None
