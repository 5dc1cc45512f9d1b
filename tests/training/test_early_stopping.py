"""Early stopping: which step is the best, when a run ends, what is kept."""

import contextlib
import json
import math

import jax.numpy as jnp
import pytest

from hourjax.errors import UserError
from hourjax.inference.load import load
from hourjax.training import loop
from hourjax.training.checkpoint import Checkpoints, restore_params
from hourjax.training.checkpoint_format import (
  checkpoint_folder,
  checkpoint_steps,
)
from hourjax.training.config import build_experiment
from hourjax.training.faults import (
  LOSS,
  EarlyStopping,
  best_step,
  overfitting,
  read_losses,
)
from hourjax.training.holdout import HoldoutEvaluation
from hourjax.training.train_state import TrainState
from hourjax.training.workdir import config_diff
from tests.training import runs

# By step: lowest at 4, and then three evaluations that are not lower.
LOSSES = {2: 1.0, 4: 0.5, 6: 0.7, 8: 0.5, 10: 0.6, 12: 0.1}


def _fed(folder, losses, *, start=0, patience=3):
  """Early stopping that was told of these losses."""
  early = EarlyStopping(folder, start=start, patience=patience)
  with contextlib.closing(early):
    for step, loss in losses.items():
      early.add(step, {LOSS: loss})
  return early


@pytest.mark.parametrize(
  "losses, best, due",
  [
    ([], None, False),
    ([1.0], 1, False),
    ([1.0, 0.9, 0.8, 0.7], 4, False),
    ([1.0, 1.0, 1.0], 1, False),
    ([1.0, 1.0, 1.0, 1.0], 1, True),
    ([1.0, 0.5, 0.6, 0.7, 0.4], 5, False),
    ([math.nan, 1.0], 2, False),
    ([math.nan, math.nan, math.inf], None, True),
    ([1.0, math.nan, 2.0, math.inf], 1, True),
  ],
)
def test_best_and_end(tmp_path, losses, best, due):
  given = dict(enumerate(losses, start=1))
  early = _fed(tmp_path, given)
  assert (early.best, early.due) == (best, due)
  # The same from the file, by a run that goes on.
  again = EarlyStopping(tmp_path, start=len(losses), patience=3)
  assert (again.best, again.due) == (best, due)


def test_lines_after_the_start_do_not_count(tmp_path):
  _fed(tmp_path, LOSSES)
  again = EarlyStopping(tmp_path, start=7, patience=3)
  assert again.best == 4 and not again.due
  assert again.add(8, {LOSS: 0.4}) and again.best == 8
  again.close()
  assert read_losses(tmp_path) == {2: 1.0, 4: 0.5, 6: 0.7, 8: 0.4}


def test_without_patience_nothing_is_written(tmp_path):
  early = _fed(tmp_path, LOSSES, patience=0)
  assert early.best is None and not early.due
  assert not list(tmp_path.iterdir())
  assert best_step(tmp_path, [2, 4]) is None


def test_a_foreign_file_is_refused_and_not_needed_to_read(tmp_path):
  (tmp_path / "evaluations.jsonl").write_text('{"step": "two"}\n')
  with pytest.raises(UserError, match=r"evaluations\.jsonl, line 1"):
    EarlyStopping(tmp_path, start=0, patience=1)
  assert best_step(tmp_path, [2]) is None


def _rows(*values):
  """Lines of metrics.jsonl: (step, loss in training, held-out loss)."""
  return [
    {"step": step, "loss": loss} | ({} if held is None else {LOSS: held})
    for step, loss, held in values
  ]


def test_overfitting_is_both_curves():
  rising = _rows((1, 2.0, None), (2, 1.0, 0.7), (3, 0.5, None), (4, 0.3, 0.9))
  text = overfitting(rising)
  assert "from step 2 to step 4" in text
  assert "rose from 0.700 to 0.900" in text and "fell from 1.500 to" in text
  slight = _rows((2, 1.0, 0.700), (4, 0.3, 0.705))
  falling = _rows((2, 1.0, 0.9), (4, 0.3, 0.7))
  diverging = _rows((2, 1.0, 0.7), (4, 1.3, 0.9))
  for rows in (slight, falling, diverging, [], rising[:2], rising[:1]):
    assert not overfitting(rows)


def test_patience_needs_evaluations(data):
  config = runs.small_config(data, patience=2)
  with pytest.raises(UserError, match=r"patience is 2 and config\.eval_every"):
    build_experiment(config.to_dict())


def test_what_may_change_in_a_run_that_goes_on():
  old = {"patience": 0, "eval_every": 5}
  assert not config_diff(old, {"patience": 2, "eval_every": 5})
  assert not config_diff(old, {"patience": 0, "eval_every": 9})
  assert list(config_diff(old, {"patience": 2, "eval_every": 9})) == [
    "eval_every"
  ]


def _state(step):
  return TrainState(
    jnp.int32(step), {"decoder/x": jnp.full(3, float(step))}, {}, ()
  )


def test_the_best_is_kept_and_read(tmp_path):
  early = EarlyStopping(tmp_path, start=0, patience=9)
  checkpoints = Checkpoints(tmp_path, keep=2)
  with contextlib.closing(checkpoints), contextlib.closing(early):
    for step, loss in {1: 1.0, 2: 0.5, 3: 0.8, 4: 0.9, 5: 0.7}.items():
      early.add(step, {LOSS: loss})
      checkpoints.best = early.best
      checkpoints.save(_state(step), 0, "plan", {})
    checkpoints.finish()
  assert checkpoint_steps(checkpoints.folder) == [2, 4, 5]
  # Afterwards the best is read, and the run itself goes on from the newest.
  assert restore_params(tmp_path).step == 2
  assert restore_params(tmp_path, step=5).step == 5
  state, _ = Checkpoints(tmp_path).restore(_state(0), plan="plan")
  assert int(state.step) == 5
  # Damaged, it gives way to the newest.
  (checkpoints.folder / "2" / "about" / "metadata").write_text("{}")
  assert restore_params(tmp_path).step == 5


# --- runs --------------------------------------------------------------------


@pytest.fixture
def scripted(monkeypatch):
  """Evaluations that find the losses of `LOSSES`."""

  def evaluate(self, step, *_):
    return {LOSS: LOSSES[step]} if step in LOSSES else {}

  monkeypatch.setattr(HoldoutEvaluation, "evaluate", evaluate)


@pytest.fixture(scope="module")
def experiment(data):
  config = runs.small_config(
    data,
    data__dataset=f"{data}/held_out",
    steps=14,
    accumulate=1,
    checkpoint_every=3,
    keep_checkpoints=1,
    eval_every=2,
    eval_rows=2,
    patience=3,
  )
  return build_experiment(config.to_dict())


def _found(workdir):
  steps = checkpoint_steps(checkpoint_folder(workdir))
  return runs.losses(workdir), read_losses(workdir), steps


@pytest.mark.slow
def test_a_run_ends_early_and_again_after_kills(
  experiment, scripted, tmp_path, capsys, data
):
  """Broken off before and after its best step, it ends as if it had not been.

  Ten is its last step: no loss is below that of step 4.
  """
  whole, broken = tmp_path / "whole", tmp_path / "broken"
  loop.train(experiment, whole)
  said = capsys.readouterr().err
  assert "stopped early after step 10 of 14: 3 evaluations in a row" in said
  assert "step 4 has the lowest held-out loss, 0.500" in said
  losses, evaluated, steps = _found(whole)
  assert [line[0] for line in losses] == list(range(1, 11))
  assert evaluated == {k: v for k, v in LOSSES.items() if k <= 10}
  assert steps == [4, 10]
  assert "step 4 " in load(whole).name

  for step in (4, 5, 8, 10):
    with runs.interrupted_at(step):
      loop.train(experiment, broken)
  loop.train(experiment, broken)
  assert _found(broken) == (losses, evaluated, steps)

  # Started again, it has ended, and says so.
  capsys.readouterr()
  loop.train(experiment, broken)
  said = capsys.readouterr().err
  assert "already trained: step 10 of 14" in said and "step 4 has" in said
  assert _found(broken) == (losses, evaluated, steps)
  # Another run begins with its best step.
  other = runs.changed(experiment, init=str(whole), steps=1, patience=0)
  loop.train(other, tmp_path / "other")
  config = json.loads((tmp_path / "other" / "config.json").read_text())
  assert config["init"] == str(whole)
