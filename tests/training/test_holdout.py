"""Evaluation on held-out data: its rows, its classes of labels, its numbers."""

import contextlib
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import hourllava
from hourjax.batch import IGNORE, Batch
from hourjax.data import rows
from hourjax.models.params import with_params
from hourjax.parallel.mesh import make_mesh
from hourjax.training import loop
from hourjax.training.batch_sharding import BatchSharding
from hourjax.training.config import build_experiment
from hourjax.training.data_loader import UnreadSampleLog, open_dataset
from hourjax.training.holdout import (
  ANSWER,
  LETTER,
  MARKUP,
  HoldoutEvaluation,
  LabelCodes,
  held_out_rows,
)
from hourjax.training.metric_writer import MetricWriter, read_metrics
from hourjax.training.train_state import abstract_state, fresh_state
from tests.training import event_files, runs

STEPS, EVERY, ROWS = 6, 2, 7


@pytest.fixture(scope="module")
def experiment(data):
  """Micro-batches of two rows: the last one of an evaluation is half empty."""
  config = runs.small_config(
    data,
    data__dataset=f"{data}/held_out",
    steps=STEPS,
    batch_rows=2,
    accumulate=1,
    log_every=4,
    checkpoint_every=3,
    eval_every=EVERY,
    eval_rows=ROWS,
  )
  return build_experiment(config.to_dict())


@pytest.fixture(scope="module")
def dataset(experiment):
  return open_dataset(experiment)


@pytest.fixture(scope="module")
def state(experiment):
  mesh = make_mesh(experiment.mesh)
  return fresh_state(experiment, *abstract_state(experiment, mesh, STEPS))


def _evaluation(experiment, dataset):
  mesh = make_mesh(experiment.mesh)
  sharding = BatchSharding(mesh, experiment.row_spec, experiment.batch_rows)
  return HoldoutEvaluation(experiment, dataset, sharding, STEPS)


@pytest.fixture
def sinks(tmp_path, experiment):
  """Where an evaluation leaves its time, and what it could not read."""
  metrics = MetricWriter(
    tmp_path,
    experiment.metrics,
    run_config={},
    steps=STEPS,
    start=0,
    flops_per_second=None,
  )
  unread = UnreadSampleLog(tmp_path, start=0, max_share=0.5)
  with contextlib.closing(metrics), contextlib.closing(unread):
    yield metrics, unread


def _indices(chosen):
  return [i for plan, at in chosen for group in plan.row(at)[1] for i in group]


# --- which rows --------------------------------------------------------------


def test_rows_are_held_out_and_of_every_stream(experiment, dataset):
  chosen = held_out_rows(experiment, dataset)
  found = _indices(chosen)
  assert len(chosen) == ROWS and len(set(found)) == len(found)
  assert dataset.columns.held_out[found].all()
  streams = [
    {
      dataset.columns.streams[dataset.columns.stream[i]]
      for i in _indices([row])
    }
    for row in chosen
  ]
  # One stream has two conversations about each of two videos: two rows.
  assert streams[:4] == [{"long"}, {"short"}] * 2
  assert set().union(*streams[4:]) == {"short"}


def test_rows_are_the_same_in_every_run(experiment, dataset):
  """Of another seed, and another division into micro-batches."""
  chosen = _indices(held_out_rows(experiment, dataset))
  other = runs.changed(experiment, seed=5, batch_rows=3, steps=9)
  assert _indices(held_out_rows(other, open_dataset(other))) == chosen
  fewer = runs.changed(experiment, eval_rows=3)
  assert _indices(held_out_rows(fewer, dataset)) == _indices(
    held_out_rows(experiment, dataset)[:3]
  )
  one = runs.changed(experiment, data__weights="short=0")
  left = _indices(held_out_rows(one, dataset))
  assert left and {dataset.columns.stream[i] for i in left} == {0}


@pytest.mark.parametrize(
  "argument", [f"size={s},stage={n}" for s in ("3b", "7b") for n in (1, 2, 3)]
)
def test_the_published_stages_spend_less_than_two_percent(argument):
  """A row of an evaluation costs at most what a row costs that is trained on.

  It takes the forward pass of four, where the devices are waited for (forward,
  again, and twice that backward), and as much reading as in training. Steps of
  128 samples of VideoMarathon, ten in a row at most, have 13 rows.
  """
  made = build_experiment(hourllava.get_config(argument).to_dict())
  assert made.eval_every and made.eval_rows >= 100
  for step_rows in (made.step_rows, 13):
    assert made.eval_rows / (made.eval_every * step_rows) < 0.02


# --- classes of labels -------------------------------------------------------


def test_answers_are_what_the_assistant_says(experiment, dataset):
  evaluation = _evaluation(experiment, dataset)
  codes, tokenizer = evaluation._codes, dataset.tokenizer
  topics, letters = set(), 0
  for index in _indices(evaluation._rows):
    record, sample = dataset.record(index), dataset.sample(index)
    targets = sample.layout.targets
    found = evaluation._sample_codes(targets, index)
    assert ((found > 0) == (targets != IGNORE)).all()
    kinds = np.where(found > 0, (found - 1) % 3, -1)
    said = [turn.text for turn in record.turns if turn.role == "gpt"]
    of_answers = (kinds == ANSWER) | (kinds == LETTER)
    assert tokenizer.decode(targets[of_answers]) == "".join(said)
    first = [f["letter"] for f in record.extra["questions"] if f["letter"]]
    assert tokenizer.decode(targets[kinds == LETTER]) == "".join(first)
    letters += len(first)
    markup = targets[kinds == MARKUP]
    text = tokenizer.decode(markup)
    assert text.count("assistant") == len(said) and "user" not in text
    assert (markup == tokenizer.im_end).sum() == 1 + len(record.turns)
    # By stream and topic.
    stream = int(dataset.columns.stream[index])
    names = [f["topic"] for f in record.extra["questions"]]
    expected = {
      codes.code(stream, codes._topics.index(name), ANSWER) for name in names
    }
    assert set(found[kinds == ANSWER]) <= expected
    assert set(found[kinds == MARKUP]) == {codes.code(stream, 0, MARKUP)}
    topics |= set(names)
  assert codes._topics == sorted({"", *topics})
  assert letters >= 1 and len(topics) >= 4


def test_the_metrics_of_counted_labels():
  codes = LabelCodes(("short", "long"), ["", "action"])
  assert codes.code(1, 1, LETTER) == 1 + (1 * 2 + 1) * 3 + 2
  sums = codes.zeros()
  labels = [  # code, loss, whether it is right
    (0, 99.0, True),
    (codes.code(0, 0, MARKUP), 0.5, True),
    (codes.code(0, 0, ANSWER), 2.0, False),
    (codes.code(1, 1, LETTER), 4.0, True),
    (codes.code(1, 1, LETTER), 1.0, False),
    (codes.code(1, 1, ANSWER), 5.0, True),
    (codes.code(1, 0, MARKUP), 1.5, False),
  ]
  for part in (labels[:3], labels[3:]):
    of, losses, right = map(np.array, zip(*part))
    codes.add(sums, of[None], losses[None], right[None])
  assert codes.metrics(sums) == {
    "eval/answer_loss": 3.0,
    "eval/markup_loss": 1.0,
    "eval/first_token_accuracy": 0.5,
    "eval/answer_tokens": 4.0,
    "eval/letters": 2.0,
    "eval/answer_loss/stream:short": 2.0,
    "eval/markup_loss/stream:short": 0.5,
    "eval/answer_loss/stream:long": 10 / 3,
    "eval/markup_loss/stream:long": 1.5,
    "eval/first_token_accuracy/stream:long": 0.5,
    "eval/answer_loss/topic:action": 10 / 3,
    "eval/first_token_accuracy/topic:action": 0.5,
  }


def test_one_stream_is_not_listed_twice():
  codes = LabelCodes(("default", "empty"), [""])
  sums = codes.zeros()
  of = np.array([[codes.code(0, 0, ANSWER)]])
  codes.add(sums, of, np.array([[2.0]]), np.array([[False]]))
  assert codes.metrics(sums) == {
    "eval/answer_loss": 2.0,
    "eval/answer_tokens": 1.0,
    "eval/letters": 0.0,
  }


# --- the numbers -------------------------------------------------------------


def _dense(experiment, dataset, state, evaluation):
  """The metrics of samples alone in a row, by logits over the vocabulary."""
  config, spec = experiment.model, experiment.row_spec
  params = {**state.trained, **state.frozen}

  @jax.jit
  def logits(batch):
    model = with_params(config, params)
    return jax.nn.log_softmax(model.logits(model(batch)))

  codes = evaluation._codes
  sums = codes.zeros()
  for index in _indices(evaluation._rows):
    sample = dataset.sample(index)
    row = rows.stack_rows([rows.build_row([sample], spec)])
    found = np.asarray(logits(Batch(*map(jnp.asarray, row))))[0]
    targets = sample.layout.targets
    found = found[: len(targets)]
    losses = -np.take_along_axis(found, np.maximum(targets, 0)[:, None], 1)[
      :, 0
    ]
    right = found.argmax(-1) == targets
    of = evaluation._sample_codes(targets, index)
    codes.add(sums, of[None], losses[None], right[None])
  return codes.metrics(sums)


@pytest.mark.slow
def test_an_evaluation_is_that_of_each_sample_alone(
  experiment, dataset, state, sinks
):
  """Rows of several samples, and a micro-batch with an empty row."""
  evaluation = _evaluation(experiment, dataset)
  assert max(len(_indices([row])) for row in evaluation._rows) > 1
  assert evaluation.evaluate(1, state, *sinks) == {}
  found = evaluation.evaluate(EVERY, state, *sinks)
  expected = _dense(experiment, dataset, state, evaluation)
  assert found == pytest.approx(expected, rel=1e-4)
  assert found.keys() == expected.keys()
  assert {"eval/answer_loss/stream:long", "eval/markup_loss"} < found.keys()
  assert any("/topic:" in key for key in found)
  # Every time the same, also with other micro-batches.
  assert evaluation.evaluate(2 * EVERY, state, *sinks) == found
  other = runs.changed(experiment, batch_rows=3)
  again = _evaluation(other, dataset).evaluate(STEPS, state, *sinks)
  assert again == pytest.approx(found, rel=1e-5)


@pytest.mark.slow
def test_what_cannot_be_read_is_listed_and_not_counted(
  experiment, state, sinks, tmp_path
):
  store = shutil.copytree(experiment.data.features, tmp_path / "features")
  changed = runs.changed(experiment, data__features=str(store))
  dataset = open_dataset(changed)
  evaluation = _evaluation(changed, dataset)
  columns, chosen = dataset.columns, _indices(evaluation._rows)
  video = columns.videos[columns.video[chosen[0]]]
  (broken,) = store.glob(f"{video}*.npy")
  broken.write_bytes(broken.read_bytes()[:-100])
  lost = {i for i in chosen if columns.videos[columns.video[i]] == video}
  assert 0 < len(lost) < len(chosen)
  found = evaluation.evaluate(EVERY, state, *sinks)
  text = (tmp_path / "unread.jsonl").read_text()
  lines = [json.loads(line) for line in text.splitlines()]
  assert {line["id"] for line in lines} == {dataset.record(i).id for i in lost}
  assert {line["step"] for line in lines} == {EVERY}
  answers = [
    evaluation._sample_codes(dataset.sample(i).layout.targets, i)
    for i in chosen
    if i not in lost
  ]
  kinds = (np.concatenate(answers) - 1) % 3
  counted = (np.concatenate(answers) > 0) & (kinds != MARKUP)
  assert found["eval/answer_tokens"] == counted.sum() > 0


# --- runs --------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_is_evaluated_and_learns_the_same(experiment, tmp_path, capsys):
  """Another run is not evaluated at first, is broken off, and goes on.

  It has the same losses, and from then on the same evaluations.
  """
  whole, other = tmp_path / "whole", tmp_path / "other"
  loop.train(experiment, whole)
  said = capsys.readouterr().err
  assert f"evaluation every {EVERY} steps on {ROWS} rows of" in said
  assert said.count("  held-out ") == 3
  found = runs.evaluations(whole)
  assert [row["step"] for row in found] == [2, 4, 6]
  assert len({row["eval/answer_loss"] for row in found}) == 3
  # A line of an evaluation has everything else too.
  assert [row["step"] for row in read_metrics(whole)] == [1, 2, 4, 6]
  assert all("mfu" in row or row["step_seconds"] for row in read_metrics(whole))
  assert read_metrics(whole)[-1]["lost_seconds/evaluate"] > 0
  shown = event_files.curves(event_files.read_events(whole / "tensorboard"))
  for name in ("answer_loss", "markup_loss", "answer_loss/stream:short"):
    assert list(shown[f"eval/{name}"]) == [2, 4, 6]

  with runs.interrupted_at(5):
    loop.train(runs.changed(experiment, eval_every=0, log_every=1), other)
  assert not runs.evaluations(other)
  assert "samples are held out, and nothing is ev" in capsys.readouterr().err
  loop.train(runs.changed(experiment, log_every=1), other)
  assert runs.evaluations(other) == found[1:]
  # Tokens are those since the line before, and here each step has a line.
  losses = {line[0]: line[:3] for line in runs.losses(other)}
  assert sorted(losses) == list(range(1, STEPS + 1))
  for line in runs.losses(whole):
    assert losses[line[0]] == line[:3]


def test_a_dataset_without_held_out_data_is_said(
  experiment, data, state, sinks, capsys
):
  other = runs.changed(experiment, data__dataset=f"{data}/stage3")
  evaluation = _evaluation(other, open_dataset(other))
  evaluation.report()
  said = capsys.readouterr().err
  assert f"although config.eval_every is {EVERY}" in said
  assert f"{data}/stage3 has no held-out data; prepare it with" in said
  assert evaluation.evaluate(EVERY, state, *sinks) == {}
