"""Rewarded answers through the loop, on a small demo."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hourjax.data.rows import batch_capacity
from hourjax.errors import UserError
from hourjax.models.params import with_params
from hourjax.objectives.grpo import RewardObjective
from hourjax.objectives.losses import AnswerBatch
from hourjax.objectives.rewards import REWARDS
from hourjax.parallel import vocabulary
from hourjax.parallel.mesh import make_mesh
from hourjax.training.batch_sharding import BatchSharding
from hourjax.training.config import build_experiment
from hourjax.training.data_loader import row_plan
from hourjax.training.loop import train
from hourjax.training.metric_writer import read_metrics
from hourjax.training.train_state import abstract_state, fresh_state
from tests.training import runs

STEPS, GROUP = 4, 4


def _short(question, answers):
  """Rewards answers by how few letters they have."""
  return [-len(answer) / 10 for answer in answers]


MINE = REWARDS | {"short": _short}


@pytest.fixture(scope="module")
def experiment(data):
  config = runs.small_config(
    data, steps=STEPS, checkpoint_every=2, data__share_memory=2,
    objective__name="grpo", objective__group=GROUP, objective__max_tokens=6,
    objective__rewards="short=1,format=0.1", objective__kl=0.05,
    rows__decoder=2600, rows__queries=700,
  )  # fmt: skip
  return build_experiment(config.to_dict())


@pytest.fixture(scope="module")
def whole(experiment, tmp_path_factory):
  """Workdir of a run without interruption."""
  workdir = tmp_path_factory.mktemp("grpo")
  train(experiment, workdir, RewardObjective(experiment, MINE))
  return workdir


@pytest.fixture(scope="module")
def started(experiment, tmp_path_factory):
  """An objective, its first micro-batch, and the state that sampled it."""
  objective = RewardObjective(experiment, MINE)
  dataset = objective.open_dataset()
  plan = row_plan(experiment, dataset)
  mesh = make_mesh(experiment.mesh)
  sharding = BatchSharding(mesh, experiment.row_spec, experiment.batch_rows)
  like, optimizer = abstract_state(experiment, mesh, STEPS)
  state = fresh_state(experiment, like, optimizer)
  workdir = tmp_path_factory.mktemp("started")
  objective.start(dataset, plan, sharding, state, workdir)
  loader = objective.data_loader(dataset, plan, sharding, 0)
  loader.begin_step(1, state)
  batch, delivered = next(loader)
  yield objective, state, batch, delivered, loader
  loader.close()


def test_answers_share_memory_and_queries(started):
  """One memory and one set of queries for the answers to a question."""
  _, _, rows, delivered, _ = started
  batch = jax.tree.map(np.asarray, rows.batch)
  answers = int(batch.decoder_segment.max())
  assert answers == delivered.samples and answers % GROUP == 0
  placed = set(np.unique(batch.query_segment).tolist()) - {0}
  assert len(placed) == answers // GROUP
  # Answers to one question look up the same queries.
  for first in range(1, answers + 1, GROUP):
    sources = [
      batch.decoder_source[(batch.decoder_segment == first + n)]
      for n in range(GROUP)
    ]
    seen = {tuple(source[source >= 0].tolist()) for source in sources}
    assert len(seen) == 1 and len(next(iter(seen))) > 10
  assert batch_capacity(delivered.batch).decoder == 2600


def test_advantages_of_a_group_add_up_to_0(started):
  _, _, rows, _, _ = started
  segment = np.asarray(rows.batch.decoder_segment)[0]
  gains = [
    np.asarray(rows.batch.target_weight)[0][segment == n].sum()
    for n in range(1, segment.max() + 1)
  ]
  gains = np.array(gains).reshape(-1, GROUP)
  np.testing.assert_allclose(gains.sum(1), 0, atol=1e-5)
  np.testing.assert_allclose(gains.std(1), 1, atol=1e-5)


def test_training_sees_what_was_sampled(experiment, started):
  """The train step's logits agree with those that answers were drawn from.

  Answers are sampled anew with the probabilities of the training's forward
  pass and the same random keys.
  """
  objective, state, rows, _, _ = started
  params = state.trained | state.frozen

  @jax.jit
  def log_probabilities(params, batch):
    model = with_params(experiment.model, params)
    return model.logits(model(batch))

  with jax.set_mesh(state.step.sharding.mesh):
    logits = np.asarray(log_probabilities(params, rows.batch))[0]
  batch = jax.tree.map(np.asarray, rows.batch)
  indices = [i for g in _groups(objective, experiment) for i in g]
  sampler = objective._sampler
  count = len(indices) * GROUP
  sampling = sampler._row_sampling(indices, 1, count)
  for answer in range(count):
    place = np.flatnonzero(
      (batch.decoder_segment[0] == answer + 1) & (batch.target[0] >= 0)
    )
    for number, at in enumerate(place):
      ranked = np.argsort(-logits[at], kind="stable")
      key = jax.random.fold_in(sampling.keys[answer], number)
      drawn = jax.random.categorical(key, jnp.asarray(logits[at][ranked]))
      assert ranked[int(drawn)] == batch.target[0, at]


def _groups(objective, experiment):
  dataset = objective.open_dataset()
  return row_plan(experiment, dataset).row(0)[1]


def test_the_reference_is_the_model_itself_at_first(started):
  _, _, rows, _, _ = started
  assert isinstance(rows, AnswerBatch)
  reference = np.asarray(rows.reference)
  labelled = np.asarray(rows.target) >= 0
  assert (reference[labelled] > 0).all() and not reference[~labelled].any()


def test_resuming_gives_the_same_answers(started):
  """Of another loader, at the same step; another step has others."""
  objective, state, rows, _, loader = started
  dataset = objective.open_dataset()
  experiment = objective.experiment
  sharding, plan = loader._sharding, row_plan(experiment, dataset)
  again = objective.data_loader(dataset, plan, sharding, 0)
  try:
    again.begin_step(1, state)
    same, _ = next(again)
  finally:
    again.close()
  np.testing.assert_array_equal(same.target, rows.target)
  other = objective.data_loader(dataset, plan, sharding, 0)
  try:
    other.begin_step(2, state)
    different, _ = next(other)
  finally:
    other.close()
  assert (np.asarray(different.target) != np.asarray(rows.target)).any()


@pytest.mark.slow
def test_rewards_are_logged(whole):
  rows = read_metrics(whole)
  assert len(rows) == STEPS
  for row in rows:
    assert row["grpo/reward"] == pytest.approx(
      row["grpo/reward/short"] + 0.1 * row["grpo/reward/format"]
    )
    assert row["grpo/answers"] % GROUP == 0
  assert rows[0]["grpo/kl"] == pytest.approx(0, abs=1e-6)
  assert rows[-1]["grpo/kl"] > 1e-6


@pytest.mark.slow
def test_a_run_goes_on_bit_for_bit(experiment, whole, tmp_path):
  with runs.interrupted_at(3):
    train(experiment, tmp_path, RewardObjective(experiment, MINE))
  train(experiment, tmp_path, RewardObjective(experiment, MINE))
  kept = ("step", "loss", "grad_norm", "grpo/reward", "grpo/kl", "tokens")
  assert [[row[k] for k in kept] for row in read_metrics(tmp_path)] == [
    [row[k] for k in kept] for row in read_metrics(whole)
  ]


@pytest.mark.slow
def test_a_reward_that_is_not_finite_ends_the_run(experiment, tmp_path):
  def broken(question, answers):
    return [float("nan")] * len(answers)

  objective = RewardObjective(experiment, MINE | {"short": broken})
  with pytest.raises(UserError, match=r"reward 'short', question .* nan"):
    train(experiment, tmp_path, objective)


def test_unknown_reward(experiment):
  asked = dataclasses.replace(experiment.objective, rewards="shrot=1")
  wrong = dataclasses.replace(experiment, objective=asked)
  with pytest.raises(UserError, match=r"'shrot'; choose from multiple_choice"):
    RewardObjective(wrong, MINE)


def test_losses_of_labels_are_used(started):
  """The reference's losses are those of the vocabulary's own function."""
  objective, state, rows, _, _ = started
  model = objective.experiment.model

  @jax.jit
  def losses(params, batch):
    made = with_params(model, params)
    return vocabulary.token_losses(
      made(batch), made.output_embedding, batch.target
    )

  with jax.set_mesh(state.step.sharding.mesh):
    found = losses(state.trained | state.frozen, rows.batch)
  np.testing.assert_allclose(found, rows.reference, atol=1e-5)
