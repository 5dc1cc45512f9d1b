"""Capacities of rows that suit samples."""

import dataclasses
import json
import re

import pytest

from hourjax.data.rows import Size
from hourjax.errors import UserError
from hourjax.planning import fit_rows
from hourjax.planning.topology import parse_topology
from hourjax.planning.workload import make_workload, take_samples
from hourjax.training.config import build_experiment
from tests.planning.examples import experiment, plan_by_formulas
from tests.training import runs
from tests.training.conftest import data  # noqa: F401

SLICE = parse_topology("v6e:2x4")


@pytest.fixture(autouse=True)
def _few(monkeypatch):
  """Fewer samples and capacities, so that it takes seconds."""
  monkeypatch.setattr(fit_rows, "_SAMPLES", 1536)
  monkeypatch.setattr(fit_rows, "_FILLS", (0.97, 0.91))
  monkeypatch.setattr(fit_rows, "_MOST", 4)
  monkeypatch.setattr(fit_rows, "_SWEEPS", 1)


@pytest.fixture(scope="module")
def stage3():
  """Rows that are as large for both streams, and poor for each."""
  found = experiment(mesh={"fsdp": 8}, batch_rows=8)
  rows = Size(features=64 * 3623, tiles=40, blends=6561, memory=235_520,
              queries=15_872, decoder=16_640)  # fmt: skip
  return dataclasses.replace(
    found, rows=rows, stream_rows={"short": rows, "long": rows}
  )


@pytest.mark.slow
def test_an_epoch_becomes_shorter(stage3):
  samples = take_samples(stage3, "stage3")
  found = fit_rows.fit_rows(stage3, SLICE, samples)
  assert list(found) == ["short", "long"]
  for each in found.values():
    assert each.plan.estimate.days <= each.before.estimate.days
    assert each.left_out < 0.005
    assert each.plan.memory.total <= 0.95 * each.plan.memory.limit
  # With all samples, of which these are one in ten, it is shorter as well.
  rows = {stream: each.size for stream, each in found.items()}
  fitted = dataclasses.replace(stage3, stream_rows=rows)
  days = [
    plan_by_formulas(each, SLICE, "stage3").estimate.days
    for each in (stage3, fitted)
  ]
  assert days[1] < 0.97 * days[0]


def test_a_dataset_is_read(data, capsys):  # noqa: F811
  """Streams without rows of their own get those of `config.rows`."""
  made = build_experiment(runs.small_config(data).to_dict())
  made = dataclasses.replace(made, accumulate=1, batch_rows=2, batch_samples=2)
  page = fit_rows.propose(made, [SLICE._replace(shape=(1, 1))],
                          f"{data}/stage3")  # fmt: skip
  assert "of the 6 samples of" in page
  assert "config.rows: 0.00% of its samples are left out" in page
  options = dict(re.findall(r"--config\.rows\.(\w+)=(\d+)", page))
  size = Size(**{name: int(value) for name, value in options.items()})
  fitted = dataclasses.replace(made, rows=size)
  workload = make_workload(fitted, f"{data}/stage3")
  assert workload.samples == 6
  one = (1, 1)
  answer = fit_rows.propose(
    made, [SLICE._replace(shape=one)], f"{data}/stage3", as_json=True
  )
  assert json.loads(answer)[""]["rows"] == dataclasses.asdict(size)


def test_mistakes(stage3, tmp_path):
  with pytest.raises(UserError, match="names several slices"):
    fit_rows.propose(stage3, [SLICE, SLICE], "stage3")
  with pytest.raises(UserError, match="--fit_rows=stage9: known are stage1"):
    fit_rows.propose(stage3, [SLICE], "stage9")
  with pytest.raises(UserError, match=r"config\.data\.tokenizer is empty"):
    fit_rows.propose(stage3, [SLICE], str(tmp_path))
  small = Size(memory=128, queries=128, decoder=128)
  few = dataclasses.replace(stage3, rows=small)
  with pytest.raises(UserError, match="no sample fits a row: sample larger"):
    fit_rows.fit_rows(few, SLICE, take_samples(few, "stage3"))
