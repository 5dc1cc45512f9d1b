"""Answers a second, sampled to one question about an hour of video.

Side by side: with one memory and one prefill for all answers of a group, as
`hourjax.objectives.rollouts` samples them; with one memory and a prefill for
each answer; and with the memory encoded anew for each answer, as a trainer does
that calls its model once for each. The model has random weights. Nothing is
compiled while a clock runs, and the ways take turns, so that another load on
the machine meets all of them.
"""

import pathlib
import time
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np

from hourjax.benchmarks.ask import random_model
from hourjax.benchmarks.figures import peak_mib
from hourjax.data.records.record import Turn
from hourjax.inference.answering import Answering
from hourjax.inference.load import run_rules
from hourjax.inference.memory import Memory
from hourjax.inference.sampling import Sampling, row_sampling
from hourjax.objective_config import ObjectiveConfig
from hourjax.objectives.rollouts import decode_groups
from hourjax.training.config import Experiment

_QUESTION = "Which colour has the card that is shown once?"
_SECONDS = 3600
_GROUP = 8
_MAX_TOKENS = 16
_REPEATS = 3


def measure_answers(
  experiment: Experiment,
  folder: pathlib.Path,
  seconds: int = _SECONDS,
  group: int = _GROUP,
  max_tokens: int = _MAX_TOKENS,
) -> dict[str, Any]:
  """Measures the answers a second of three ways to sample a group.

  Args:
    experiment: with the model and the rule of forgetting.
    folder: where the tokenizer is written.
    seconds: length of the video, and its frames.
    group: answers to the question.
    max_tokens: of each answer; none ends before.

  Returns:
    By way, `seconds` of a group and `answers_per_second`, medians of several
    turns; and by how much `shared` is faster than the others.
  """
  model = random_model(folder, experiment.model, run_rules(experiment))
  shape = (model.config.pool_side**2, model.config.vision.width)
  drawn = np.random.default_rng(0).normal(size=(seconds, *shape))
  features = drawn.astype(ml_dtypes.bfloat16)

  def shared() -> None:
    _sample(_answering(model.encode_memory(features)), group, max_tokens)

  def prefilled_each() -> None:
    answering = _answering(model.encode_memory(features))
    for _ in range(group):
      _sample(answering, 1, max_tokens)

  def encoded_each() -> None:
    for _ in range(group):
      _sample(_answering(model.encode_memory(features)), 1, max_tokens)

  ways: dict[str, Callable[[], None]] = {
    "shared": shared,
    "prefill_each": prefilled_each,
    "encode_each": encoded_each,
  }
  taken = _medians(ways)
  first = taken["shared"]
  return {
    "frames": seconds,
    "group": group,
    "max_tokens": max_tokens,
    **{
      name: {"seconds": spent, "answers_per_second": group / spent}
      for name, spent in taken.items()
    },
    "over_prefill_each": taken["prefill_each"] / first,
    "over_encode_each": taken["encode_each"] / first,
    "peak_mib": peak_mib(),
  }


def _answering(memory: Memory) -> Answering:
  return memory._answering


def _sample(answering: Answering, group: int, max_tokens: int) -> None:
  """Samples a group of answers, all of them to the limit."""
  layout = answering.layout([Turn("human", _QUESTION)], max_tokens)
  found = decode_groups(
    answering.engine,
    [(answering.prefill([layout], max_tokens), 1)],
    ObjectiveConfig(group=group, max_tokens=max_tokens),
    lambda rows: row_sampling(Sampling(temperature=1.0), 0, rows),
    [-1],  # no answer ends before
  )
  assert [len(ids) for ids in found] == [max_tokens] * group


def _medians(ways: dict[str, Callable[[], None]]) -> dict[str, float]:
  """Returns the median seconds of each of several functions, in turns."""
  spent: dict[str, list[float]] = {name: [] for name in ways}
  for turn in range(_REPEATS + 1):
    for name, function in ways.items():
      began = time.perf_counter()
      function()
      if turn:  # the first one compiles
        spent[name].append(time.perf_counter() - began)
  return {name: float(np.median(values)) for name, values in spent.items()}
