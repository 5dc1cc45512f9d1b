"""Preference optimisation through the loop, on a small demo."""

import json

import jax
import numpy as np
import pytest

from hourjax.data.prepared import Prepared
from hourjax.data.rows import Size
from hourjax.errors import UserError
from hourjax.objectives.dpo import PreferenceObjective
from hourjax.parallel.mesh import make_mesh
from hourjax.training.batch_sharding import BatchSharding
from hourjax.training.config import build_experiment
from hourjax.training.data_loader import open_dataset, row_plan
from hourjax.training.loop import train
from hourjax.training.metric_writer import read_metrics
from hourjax.training.train_state import abstract_state, fresh_state
from tests.objectives.conftest import prepared
from tests.training import runs

STEPS = 4


@pytest.fixture(scope="module")
def experiment(data, pairs):
  config = runs.small_config(
    data, steps=STEPS, checkpoint_every=2, data__dataset=str(pairs),
    objective__name="dpo", data__share_memory=2, rows__decoder=800,
  )  # fmt: skip
  return build_experiment(config.to_dict())


@pytest.fixture(scope="module")
def whole(experiment, tmp_path_factory):
  """Workdir of a run without interruption."""
  workdir = tmp_path_factory.mktemp("dpo")
  train(experiment, workdir, PreferenceObjective(experiment))
  return workdir


def test_prepare_keeps_rejected_answers(pairs, records):
  found = Prepared(pairs)
  assert [r.rejected.split()[-1] for r in found.records] == [
    r["conversations"][-1]["value"].split()[-1] for r in records
  ]
  longer = found.columns.rejected - found.columns.tokens
  assert (longer >= 2).all() and len(set(longer.tolist())) > 2


def test_sizes_are_those_of_the_samples(experiment):
  """What is planned for a pair is what its two answers take."""
  objective = PreferenceObjective(experiment)
  dataset = objective.open_dataset()
  plain = open_dataset(experiment)
  for index in dataset.usable.tolist():
    sample = plain.sample(index)
    pair = objective._pair(dataset, index, sample, False)
    size = sum((answer.size for answer in pair), Size())
    # A newline after the end of the turn has no label, and is left out.
    planned = Size(*map(int, dataset.sizes[index]))
    assert size.queries == planned.queries and size.memory == planned.memory
    assert planned.decoder - 2 <= size.decoder <= planned.decoder


@pytest.mark.slow
def test_the_loss_begins_at_log_2_and_falls(whole):
  rows = read_metrics(whole)
  assert rows[0]["loss"] == pytest.approx(np.log(2), abs=1e-4)
  assert rows[0]["dpo/margin"] == pytest.approx(0, abs=1e-3)
  assert rows[-1]["loss"] < 0.65 and rows[-1]["dpo/preferred"] == 1


@pytest.mark.slow
def test_a_run_goes_on_bit_for_bit(experiment, whole, tmp_path):
  with runs.interrupted_at(3):
    train(experiment, tmp_path, PreferenceObjective(experiment))
  stored = (tmp_path / "reference.npz").read_bytes()
  train(experiment, tmp_path, PreferenceObjective(experiment))
  assert (tmp_path / "reference.npz").read_bytes() == stored
  assert runs.losses(tmp_path) == runs.losses(whole)


@pytest.mark.slow
def test_the_reference_is_computed_once(experiment, whole, monkeypatch):
  """A run that goes on without its file is refused."""

  def refused(self, *_):
    raise AssertionError("computed again")

  monkeypatch.setattr(PreferenceObjective, "_compute", refused)
  objective = PreferenceObjective(experiment)
  dataset = objective.open_dataset()
  plan = row_plan(experiment, dataset)
  mesh = make_mesh(experiment.mesh)
  sharding = BatchSharding(mesh, experiment.row_spec, experiment.batch_rows)
  like, optimizer = abstract_state(experiment, mesh, STEPS)
  state = fresh_state(experiment, like, optimizer)
  objective.start(dataset, plan, sharding, state, whole)
  assert np.isfinite(objective.reference[dataset.usable]).all()
  later = state._replace(step=jax.numpy.int32(2))
  (whole / "reference.npz").rename(whole / "away")
  try:
    with pytest.raises(UserError, match=r"reference.npz.*put it back"):
      objective.start(dataset, plan, sharding, later, whole)
  finally:
    (whole / "away").rename(whole / "reference.npz")


def test_records_without_a_rejected_answer(data, records, tmp_path):
  made = json.loads(json.dumps(records))
  for record in made[1:]:
    record["conversations"][-1]["rejected"] = "yes no"
  folder = prepared(tmp_path / "some", made, data / "tokenizer")
  config = runs.small_config(
    data, data__dataset=str(folder), objective__name="dpo",
    data__max_skipped=0.1, rows__decoder=800,
  )  # fmt: skip
  experiment = build_experiment(config.to_dict())
  with pytest.raises(UserError) as caught:
    PreferenceObjective(experiment).open_dataset()
  said = str(caught.value)
  assert f"1 of {len(made)} records" in said
  assert f"record {made[0]['id']}: has no rejected answer" in said
  assert "set config.objective.name=sft" in said
  # As many as may be skipped are.
  some = runs.changed(experiment, data__max_skipped=0.5)
  dataset = PreferenceObjective(some).open_dataset()
  assert len(dataset) == len(made) - 1


def test_a_pair_that_fits_no_row(experiment):
  small = runs.changed(experiment, rows__decoder=300, data__max_skipped=0)
  with pytest.raises(UserError, match=r"config.rows.decoder=300 < \d+ of all"):
    PreferenceObjective(small).open_dataset()
