"""Steps of an epoch against sums by hand, and what is said and kept of them."""

import json

import numpy as np
import pytest

from configs import demo, hourllava
from hourjax.data.packing.row_plan import PlanOptions, RowPlan
from hourjax.data.rows import Size
from hourjax.training.config import build_experiment
from hourjax.training.workdir import (
  count_epoch,
  describe_steps,
  left_out,
  total_steps,
)
from tests.training import runs

ROWS = build_experiment(demo.get_config("stage=3").to_dict())
ROWS = runs.changed(ROWS, steps=0, batch_rows=2, accumulate=3)


def _plan(experiment, streams):
  """A plan of so many samples of each stream, three of which share a row."""
  stream = np.repeat(np.arange(len(streams)), streams)
  options = PlanOptions(
    batch_samples=experiment.batch_samples, drop_last=experiment.drop_last
  )
  sizes = np.ones((len(stream), 7), np.int64)
  return RowPlan(sizes, Size(*[3] * 7), options, stream=stream)


def _counts(experiment, streams, folder):
  return count_epoch(experiment, _plan(experiment, streams), folder)


@pytest.mark.parametrize("rows", [0, -5, "7", 7.5, None, [7]])
def test_a_count_of_rows_that_cannot_be_meant_is_counted_anew(tmp_path, rows):
  plan = _plan(ROWS, [6])
  there = {"plan": plan.fingerprint(), "rows": 7}
  path = tmp_path / "plan.json"
  path.write_text(json.dumps(there))
  assert count_epoch(ROWS, plan, tmp_path).saved() == there
  path.write_text(json.dumps(there | {"rows": rows}))
  assert count_epoch(ROWS, plan, tmp_path).saved() == there | {"rows": 2}


def test_what_was_counted_is_not_packed_again(tmp_path, monkeypatch):
  samples = runs.changed(ROWS, accumulate=1, batch_samples=8)
  counts = _counts(samples, [20, 9], tmp_path)
  # 8, 8 and 4 samples, and 8 and 1, three a row.
  assert counts.saved()["step_rows"] == {"1": 1, "2": 1, "3": 3}
  assert (counts.rows, counts.samples) == (12, 29)
  path = tmp_path / "plan.json"
  path.write_text(json.dumps(counts.saved()))
  with monkeypatch.context() as patch:
    patch.setattr(RowPlan, "_rows", None)
    assert _counts(samples, [20, 9], tmp_path) == counts
  for steps in ({}, {"x": 1}, {"3": 3}, {"3": "many"}, None, [12]):
    path.write_text(json.dumps(counts.saved() | {"step_rows": steps}))
    assert _counts(samples, [20, 9], tmp_path) == counts


# Samples by stream, epochs -> steps of 128 samples with and without the rest.
BY_HAND = [
  ([1280], 1, 10, 10),
  ([1281], 1, 10, 11),
  ([1281, 127, 128], 1, 11, 13),
  ([1281, 127, 128], 2.5, 28, 33),
  ([640], 1.1, 6, 6),  # 5.5, rounded up
]


@pytest.mark.parametrize("streams, epochs, dropped, kept", BY_HAND)
@pytest.mark.parametrize("size, stage", [("3b", 1), ("7b", 2)])
def test_steps_by_hand(tmp_path, streams, epochs, dropped, kept, size, stage):
  config = hourllava.get_config(f"size={size},stage={stage}")
  config.epochs = float(epochs)
  experiment = build_experiment(config.to_dict())
  counts = _counts(experiment, streams, tmp_path)
  assert total_steps(experiment, counts) == dropped
  experiment = runs.changed(experiment, drop_last=False)
  counts = _counts(experiment, streams, tmp_path)
  assert total_steps(experiment, counts) == kept


def test_steps_of_rows_stay_as_they_were(tmp_path):
  counts = _counts(ROWS, [60], tmp_path)
  assert counts.rows == 20
  assert total_steps(ROWS, counts) == 4  # 20 rows, 6 a step
  assert total_steps(runs.changed(ROWS, epochs=2.0), counts) == 7
  assert total_steps(runs.changed(ROWS, steps=5), counts) == 5


def test_what_is_said_of_a_step(tmp_path):
  counts = _counts(ROWS, [600], tmp_path)
  assert describe_steps(ROWS, counts) == (
    "6 rows, 18.0 samples on average (34 steps an epoch; in batches of samples,"
    " as published, it has 5 of 128 and 3 of 256)"
  )
  samples = runs.changed(ROWS, accumulate=1, batch_samples=8, drop_last=True)
  counts = _counts(samples, [20, 9, 7], tmp_path)
  # Steps of 3, 3 and 3 rows, in two micro-batches of 2 each.
  assert describe_steps(samples, counts) == (
    "8 samples of one stream, in 3.0 rows on average (2.00 micro-batches of 2"
    " rows, 25% of them empty; 3 steps an epoch)"
  )
  (text,) = left_out(samples, counts, ["a", "b", "short"])
  assert text.startswith("stream short has 7 samples an epoch, fewer than")
  assert not left_out(ROWS, counts, ["a", "b", "short"])
