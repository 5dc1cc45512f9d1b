"""The training data of an experiment: samples, and the plan of their rows."""

import numpy as np

from hourjax.data.columns import Columns
from hourjax.data.dataset import Dataset
from hourjax.data.plan import PlanOptions, RowPlan
from hourjax.data.prepared import Prepared
from hourjax.data.store.features import FeatureStore
from hourjax.data.tokenizer import Tokenizer
from hourjax.errors import UserError
from hourjax.training.experiment import Experiment

_SHOWN = 20
MOST_WEIGHT = 10_000
_MOST_SAMPLES = 2**28  # of an epoch, whose order is an array in memory


def open_dataset(experiment: Experiment) -> Dataset:
  """The prepared dataset with the features there are.

  Raises:
    UserError: if it was prepared for another tokenizer, or more than
      `data.max_skipped` of the samples cannot be used.
  """
  data = experiment.data
  for key in ("dataset", "tokenizer"):
    if not getattr(data, key):
      raise UserError(
        f"config.data.{key} is empty; set --config.data.{key}=FOLDER (a dataset"
        " is what `python -m hourjax.prepare` writes)"
      )
  prepared = Prepared(data.dataset)
  tokenizer = Tokenizer.from_folder(data.tokenizer)
  if prepared.about["tokenizer_id"] != tokenizer.fingerprint:
    raise UserError(
      f"{data.dataset} was prepared for tokenizer"
      f" {prepared.about['tokenizer_id']}, {data.tokenizer} is"
      f" {tokenizer.fingerprint}; prepare again with --tokenizer="
      f"{data.tokenizer}, or correct config.data.tokenizer"
    )
  dataset = Dataset(
    prepared.records,
    prepared.columns,
    tokenizer=tokenizer,
    spec=experiment.row_spec,
    options=experiment.sample_options,
    media_root=data.media,
    features=FeatureStore(data.features) if data.features else None,
  )
  total = len(prepared.columns)
  if not len(dataset) or len(dataset.skipped) > data.max_skipped * total:
    reasons = [item.reason for item in dataset.skipped[:_SHOWN]]
    if len(dataset.skipped) > _SHOWN:
      reasons.append(f"... and {len(dataset.skipped) - _SHOWN} more")
    raise UserError(
      f"{len(dataset.skipped)} of {total} records of {data.dataset} cannot be"
      f" used, config.data.max_skipped={data.max_skipped} allows fewer; mend"
      " them or raise it:\n  " + "\n  ".join(reasons)
    )
  return dataset


def row_plan(experiment: Experiment, dataset: Dataset) -> RowPlan:
  """The rows of a run: a function of data, capacity and seed alone."""
  columns, data = dataset.columns, experiment.data
  return RowPlan(
    dataset.sizes,
    experiment.rows,
    PlanOptions(seed=experiment.seed, share=data.share_memory),
    members=dataset.usable,
    memory=columns.video,
    stream=columns.stream,
    weight=sample_weights(columns, data.weights),
  )


def sample_weights(columns: Columns, weights: str) -> np.ndarray:
  """float [N]: what "name=weight,..." says of each sample's stream or source.

  A name that is both is written "stream:name" or "source:name".

  Raises:
    UserError: not of this form, a name that does not occur or is both, a
      weight below zero or above MOST_WEIGHT, or an epoch of more samples than
      can be meant.
  """
  result = np.ones(len(columns))
  kinds = {
    "stream": (columns.streams, columns.stream),
    "source": (columns.sources, columns.source),
  }
  for item in filter(None, weights.split(",")):
    key, _, value = (part.strip() for part in item.rpartition("="))
    found = [
      (kind, name)
      for kind, (names, _) in kinds.items()
      for name in names
      if key in (name, f"{kind}:{name}")
    ]
    weight = _number(value)
    if len(found) != 1 or weight is None:
      raise UserError(
        f"config.data.weights: {item!r} must be NAME=WEIGHT with a weight from"
        f" 0 to {MOST_WEIGHT} and the name of one stream or source"
        " (stream:NAME or source:NAME if it is both); streams:"
        f" {', '.join(columns.streams)}; sources: {', '.join(columns.sources)}"
      )
    ((kind, name),) = found
    names, column = kinds[kind]
    result[column == names.index(name)] *= weight
  if (total := result.sum()) > _MOST_SAMPLES:
    raise UserError(
      f"config.data.weights={weights!r} makes an epoch of {total:.3g} samples"
      f" of {len(columns)}, at most {_MOST_SAMPLES} are meant; lower them, or"
      " set config.steps"
    )
  return result


def _number(text: str) -> float | None:
  try:
    value = float(text)
  except ValueError:
    return None
  return value if 0 <= value <= MOST_WEIGHT else None
