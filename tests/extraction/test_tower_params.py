import dataclasses

import numpy as np
import pytest

from hourjax.data.pipeline import ReadOptions
from hourjax.data.rows import Size
from hourjax.errors import UserError
from hourjax.extraction.encoder import tower_params
from hourjax.models.params import init_params
from hourjax.training.checkpoint import Checkpoints
from hourjax.training.config import build_experiment
from hourjax.training.train_step import TrainState
from hourjax.weights.shards import save_params
from tests.extraction import towers

EXPERIMENT = dataclasses.replace(
  build_experiment(
    {
      "model": dataclasses.asdict(towers.MODEL),
      "forgetting": {},
      "data": {},
      "rows": dataclasses.asdict(Size()),
      "optimizer": {},
      "read": dataclasses.asdict(ReadOptions()),
    }
  )
)


def _tower(params):
  return {p: np.asarray(value) for p, value in params.items() if "vision/" in p}


def _assert_same(got, expected):
  assert got.keys() == expected.keys()
  for path, value in expected.items():
    assert isinstance(got[path], np.ndarray)
    np.testing.assert_array_equal(got[path], value, err_msg=path)


def _checkpoint(workdir, frozen, trained, steps=(7,)):
  """As training writes it, optimizer state and all."""
  checkpoints = Checkpoints(workdir)
  for step in steps:
    state = TrainState(
      step=np.int32(step),
      trained=trained,
      frozen=frozen,
      opt_state=[{"mu": trained}],
    )
    checkpoints.save(state, position=step, plan="", config={})
    checkpoints.wait_for_save()
  checkpoints.close()
  return str(workdir)


@pytest.mark.slow
def test_fresh_ones_are_those_that_training_draws():
  _assert_same(tower_params(EXPERIMENT), _tower(init_params(towers.MODEL, 0)))


def test_a_checkpoint_folder_by_option_and_by_init(tmp_path):
  params = {p: np.asarray(v) for p, v in towers.other_params().items()}
  save_params(params, towers.MODEL, tmp_path)
  expected = _tower(params)
  _assert_same(tower_params(EXPERIMENT, str(tmp_path)), expected)
  init = dataclasses.replace(EXPERIMENT, init=str(tmp_path))
  _assert_same(tower_params(init), expected)


@pytest.mark.parametrize(
  "group", ["frozen", pytest.param("trained", marks=pytest.mark.slow)]
)
def test_a_workdir(tmp_path, group):
  params = {p: np.asarray(v) for p, v in towers.other_params().items()}
  tower = _tower(params)
  rest = {p: v for p, v in params.items() if p not in tower}
  parts = (tower, rest) if group == "frozen" else (rest, tower)
  workdir = _checkpoint(tmp_path, *parts)
  _assert_same(tower_params(EXPERIMENT, workdir), tower)


def test_a_damaged_checkpoint_is_passed_over(tmp_path, capsys):
  """By its checksums, in favour of the one before it."""
  params = {p: np.asarray(v) for p, v in towers.other_params().items()}
  tower = _tower(params)
  rest = {p: v for p, v in params.items() if p not in tower}
  workdir = _checkpoint(tmp_path, tower, rest, steps=(7, 8))
  about = tmp_path / "checkpoints" / "8" / "about" / "metadata"
  about.write_text(about.read_text().replace("vision/position", "vision/other"))
  _assert_same(tower_params(EXPERIMENT, workdir), tower)
  assert "8 is damaged" in capsys.readouterr().err


@pytest.mark.slow
def test_workdirs_that_do_not_fit(tmp_path):
  params = {p: np.asarray(v) for p, v in towers.params().items()}
  tower = _tower(params)
  rest = {p: v for p, v in params.items() if p not in tower}
  tower["vision/position"] = tower["vision/position"][1:]
  del tower["vision/patch/bias"]
  workdir = _checkpoint(tmp_path / "one", tower, rest)
  with pytest.raises(UserError, match="vision/patch/bias, vision/position are"):
    tower_params(EXPERIMENT, workdir)
  workdir = _checkpoint(tmp_path / "two", {}, rest)
  with pytest.raises(UserError, match=r"does not fit config.model: vis"):
    tower_params(EXPERIMENT, workdir)
  (tmp_path / "three" / "checkpoints").mkdir(parents=True)
  with pytest.raises(UserError, match="holds no checkpoint; train first"):
    tower_params(EXPERIMENT, str(tmp_path / "three"))
