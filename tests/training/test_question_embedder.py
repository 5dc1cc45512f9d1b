"""Runs whose forgetting is guided by the questions."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

import hourjax
from hourjax.data.forgetting import EMBEDDER_PARAMS, Forgetting
from hourjax.errors import UserError
from hourjax.models.config import TINY
from hourjax.models.params import init_params
from hourjax.training import loop
from hourjax.training.config import build_experiment
from hourjax.training.data_loader import QUESTION_EMBEDDER, question_embedder
from hourjax.training.train_step import TrainState
from tests.training import runs

CONFIG = dataclasses.replace(TINY, dtype="bfloat16")


def _state(step):
  params = init_params(CONFIG, 0)
  frozen = {path: params.pop(path) for path in EMBEDDER_PARAMS[:1]}
  return TrainState(jnp.int32(step), params, frozen, None)


def test_the_first_parameters_are_kept(tmp_path):
  first = question_embedder(_state(0), CONFIG, tmp_path)
  later = question_embedder(_state(7), CONFIG, tmp_path)
  rng = np.random.default_rng(0)
  features = rng.normal(size=(3, 4, CONFIG.vision.width))
  ids = np.array([1, 2])
  np.testing.assert_array_equal(
    first.mean_projected(features), later.mean_projected(features)
  )
  np.testing.assert_array_equal(first.mean_word(ids), later.mean_word(ids))
  words = init_params(CONFIG, 0)["decoder/embedding"].astype(jnp.bfloat16)
  expected = np.asarray(words[ids], np.float32).mean(axis=0)
  np.testing.assert_allclose(first.mean_word(ids), expected, rtol=1e-6)


def test_a_run_cannot_go_on_without_them(tmp_path):
  with pytest.raises(
    UserError, match=f"{QUESTION_EMBEDDER}, by which forgetting.temporal"
  ):
    question_embedder(_state(7), CONFIG, tmp_path)
  (tmp_path / QUESTION_EMBEDDER).write_bytes(b"no archive")
  with pytest.raises(UserError, match="put it back, or start another workdir"):
    question_embedder(_state(7), CONFIG, tmp_path)


@pytest.mark.slow
def test_a_guided_run_goes_on_as_if_never_interrupted(tmp_path):
  folder = runs.make_data(tmp_path / "data")
  config = runs.small_config(
    folder, steps=3, checkpoint_every=2, forgetting__temporal="question"
  )
  experiment = build_experiment(config.to_dict())
  assert experiment.forgetting.needs_question
  whole, resumed = tmp_path / "whole", tmp_path / "resumed"
  loop.train(experiment, whole)
  with runs.interrupted_at(3):
    loop.train(experiment, resumed)
  before = (resumed / QUESTION_EMBEDDER).read_bytes()
  loop.train(experiment, resumed)
  assert runs.losses(resumed) == runs.losses(whole)
  assert (resumed / QUESTION_EMBEDDER).read_bytes() == before
  # Frames are chosen, and so the losses are others than without.
  uniform = dataclasses.replace(experiment, forgetting=Forgetting(
    **dataclasses.asdict(experiment.forgetting) | {"temporal": "uniform"}
  ))  # fmt: skip
  loop.train(dataclasses.replace(uniform, steps=1), tmp_path / "uniform")
  assert runs.losses(tmp_path / "uniform")[:1] != runs.losses(whole)[:1]
  # The model is asked as it was trained.
  model = hourjax.load(whole)
  assert model.rules.forgetting.temporal == "question"
  features = np.load(next(iter(sorted((folder / "features").glob("*.npy")))))
  memory = model.encode_memory(features.view("bfloat16"))
  kept = [
    memory._answering.kept.of_question(np.array(model.tokenizer.encode(text)))[
      0
    ]
    for text in ("What does the red fox do?", "Where is the card?")
  ]
  assert len(kept[0]) == len(kept[1]) and (kept[0] != kept[1]).any()
