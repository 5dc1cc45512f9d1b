"""Which trainings a table needs, on the project's own configurations."""

import dataclasses
import json
import math

import numpy as np
import pytest

from configs import demo, hourllava
from hourjax.ablation import plan
from hourjax.ablation.tables import TABLES, Row, Table, Times, find_table
from hourjax.data.forgetting import Forgetting
from hourjax.errors import UserError
from hourjax.training.config import build_experiment

DEMO = demo.get_config("stage=3").to_dict()


def _jobs(name, tmp_path, config=DEMO, seeds=1):
  return plan.plan_jobs(TABLES[name], config, tmp_path, seeds)


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("size", ["demo", "3b"])
def test_every_row_is_a_configuration(name, size, tmp_path):
  config = DEMO
  if size == "3b":
    config = hourllava.get_config("size=3b,stage=3").to_dict()
  jobs = _jobs(name, tmp_path, config, seeds=2)
  rows = TABLES[name].rows
  assert [job.row for job in jobs] == [*rows, *rows]
  assert [job.seed for job in jobs] == [0] * len(rows) + [1] * len(rows)
  folders = {job.training.folder for job in jobs}
  assert len(folders) == len(jobs)
  # What a row says is what its run is configured with.
  for job in jobs:
    made = dataclasses.asdict(job.training.experiment)
    for key, value in job.row.overrides.items():
      got = plan._get(made, key)
      if isinstance(value, Times):
        value = plan._get(config, key) * value.factor
      if key == "forgetting.temporal_ratio":
        got = got or made["forgetting"]["ratio"]
      assert got == value


def test_the_papers_figures():
  """As its tables have them; LongVideoBench and LVBench, percent."""
  found = {row.label: row.paper for row in TABLES["5"].rows}
  assert found["uniform, without MemAug"] == (52.1, 38.3)
  assert found["keyframe"] == TABLES["4"].rows[1].paper == (53.5, 40.3)
  blocks = [row.paper[2] for row in TABLES["6"].rows]
  assert blocks == [40.0, 40.3, 40.6, 40.5]
  assert TABLES["9"].rows[2].paper == (35.6,)


def test_tables_share_runs(tmp_path):
  """Uniform forgetting is what the demo does, in any table."""
  runs = [
    {j.row.label: j.training.folder for j in _jobs(n, tmp_path)} for n in "459"
  ]
  usual = tmp_path / "runs" / "default" / "seed0"
  assert runs[0]["uniform"] == runs[1]["uniform"] == usual
  assert runs[2]["structured"] == usual
  assert runs[0]["keyframe"] == runs[1]["keyframe"] != usual
  assert runs[0]["keyframe"].parent.name == "forgetting.temporal=keyframe"


def test_a_seed_changes_nothing_else(tmp_path):
  one, two = _jobs("4", tmp_path, {**DEMO, "seed": 7}, seeds=2)[::4]
  assert (one.seed, two.seed) == (7, 8)
  same = dataclasses.replace(two.training.experiment, seed=7)
  assert same == one.training.experiment


@pytest.mark.parametrize("name", ["3", "figure4"])
@pytest.mark.parametrize("size", ["demo", "3b"])
def test_the_room_for_text_stays(name, size, tmp_path):
  """Counted frame by frame for a row that holds whole videos."""
  config = {**DEMO, "data": {**DEMO["data"], "share_memory": 1}}
  if size == "3b":
    config = hourllava.get_config("size=3b,stage=3").to_dict()
  side = config["model"]["pool_side"]
  frames = config["rows"]["memory"] // (side**2 + 1)

  def kept(rule):
    rule = Forgetting(**{**rule, "max_frames": 10**6})
    rng = np.random.default_rng(0)
    return len(rule.kept_frames(frames, rng)) * (
      rule.cell_count(side, side) + 1
    )

  before = config["rows"]["queries"] - kept(config["forgetting"])
  for job in _jobs(name, tmp_path, config):
    made = dataclasses.asdict(job.training.experiment)
    room = made["rows"]["queries"] - kept(made["forgetting"])
    more = kept(made["forgetting"]) > kept(config["forgetting"])
    images = config["rows"]["tiles"] * 27 * 28  # all of which may be kept
    # Rounded up to 64, and the ratio of frames down.
    assert room >= before - side**2 - 1
    assert room <= before + 64 + side**2 + images or not more
    grown = [
      made["rows"][k] - config["rows"][k] for k in ("queries", "decoder")
    ]
    assert grown[0] == grown[1] and bool(grown[0]) == more
    for key in ("features", "memory", "tiles"):
      assert made["rows"][key] == config["rows"][key]


def test_images_keep_more(tmp_path):
  """Without spatial forgetting a row keeps its images whole."""
  config = hourllava.get_config("size=3b,stage=1").to_dict()
  first = _jobs("3", tmp_path, config)[0].training.experiment
  added = first.rows.queries - config["rows"]["queries"]
  whole = 40 * (27 * 27 + 27)
  assert config["rows"]["tiles"] == 40 and whole > config["rows"]["memory"]
  assert added == math.ceil(0.75 * config["rows"]["memory"] / 64) * 64


# --- earlier stages -----------------------------------------------------------


def _workdir(path, config):
  (path / "checkpoints").mkdir(parents=True)
  (path / "config.json").write_text(json.dumps(config))
  return str(path)


@pytest.fixture
def staged(tmp_path):
  """Two earlier stages and the configuration of the last one."""
  tower = demo.get_config("stage=3").to_dict()
  tower["model"]["memaug_layers"] = DEMO["model"]["memaug_layers"]
  first = _workdir(tmp_path / "work" / "stage0", tower)
  one = {**demo.get_config("stage=3").to_dict(), "init": first, "seed": 5}
  del one["memory"]  # as an older version wrote it
  second = _workdir(tmp_path / "work" / "stage1", one)
  return {**DEMO, "init": second}


def test_earlier_stage_is_shared_where_the_model_stays(staged, tmp_path):
  for name in ("3", "4", "9", "figure4"):
    for job in _jobs(name, tmp_path / "out", staged):
      if "model.memaug_layers" not in job.row.overrides:
        assert not job.earlier
        assert job.training.experiment.init == staged["init"]


def test_earlier_stages_are_trained_again_with_another_model(staged, tmp_path):
  out = tmp_path / "out"
  jobs = {job.row.label: job for job in _jobs("6", out, staged)}
  assert not jobs["2 blocks"].earlier  # as the demo has
  job = jobs["8 blocks"]
  place = out / "earlier" / "model.memaug_layers=8"
  assert [x.folder for x in job.earlier] == [place / "stage0", place / "stage1"]
  zero, one = (training.experiment for training in job.earlier)
  last = job.training.experiment
  assert (zero.init, one.init) == ("", str(place / "stage0" / "training"))
  assert last.init == str(place / "stage1" / "training")
  assert {x.model.memaug_layers for x in (zero, one, last)} == {8}
  # Nothing else of a stage changes.
  assert one.seed == 5
  assert zero.steps == demo.get_config("stage=3").steps
  # Another seed of the row begins with the same weights.
  again = plan.plan_jobs(TABLES["6"], staged, out, 2)
  assert {j.earlier for j in again if j.row == job.row} == {job.earlier}
  found = plan.different_trainings(again)
  assert len(found) == len({each.folder for each in found}) == 8 + 3 * 2


def test_earlier_stages_without_memaug_are_shared(staged, tmp_path):
  """As the demo's, where each row's own MemAug is drawn in the last stage."""
  path = tmp_path / "work" / "stage1" / "config.json"
  config = json.loads(path.read_text())
  config["model"]["memaug_layers"] = 0
  path.write_text(json.dumps(config))
  later = {**staged, "draw_missing": "memaug"}
  jobs = _jobs("6", tmp_path / "out", later)
  assert not any(job.earlier for job in jobs)
  assert {job.training.experiment.init for job in jobs} == {staged["init"]}


def test_weights_that_nothing_here_trained(tmp_path):
  (tmp_path / "published").mkdir()
  config = {**DEMO, "init": str(tmp_path / "published"), "draw_missing": ""}
  assert _jobs("4", tmp_path, config)
  with pytest.raises(UserError, match=r"'1 block' changes model.memaug_layers"):
    _jobs("6", tmp_path, config)
  # MemAug is added to such weights, as in stage 1.
  config["draw_missing"] = "memaug"
  assert not any(job.earlier for job in _jobs("6", tmp_path, config))


# --- mistakes -----------------------------------------------------------------


def test_unknown_table():
  with pytest.raises(UserError, match=r"--table=7 is none.*3, 4, 5, 6, 9"):
    find_table("7")


def test_a_row_that_no_configuration_can_be(tmp_path):
  row = Row("half", {"memory.scale": 1.5})
  with pytest.raises(UserError, match=r"config\.memory\.scale is 1\.5"):
    plan.plan_jobs(Table("x", (row,), "half"), DEMO, tmp_path, 1)


def test_names_of_folders():
  assert plan.folder_name({}) == "default"
  names = plan.folder_name({"memory.scale": 0.5, "forgetting.ratio": 1})
  assert names == "forgetting.ratio=1+memory.scale=0.5"
  assert build_experiment(DEMO).memory.scale == 1
