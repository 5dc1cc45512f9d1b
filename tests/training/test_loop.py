"""Whole runs through the loop on a small demo; losses are equal floats."""

import dataclasses
import functools
import json
import shutil
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import demo
from hourjax.batch import Batch
from hourjax.data.dataset import Dataset
from hourjax.data.media.frame_rules import sparse_note
from hourjax.data.prepare import build as prepare
from hourjax.data.prepare import lists
from hourjax.data.rows import Size, batch_capacity
from hourjax.errors import UserError
from hourjax.models.params import init_params
from hourjax.training import data_loader, loop
from hourjax.training.checkpoint import restore_params
from hourjax.training.config import build_experiment
from hourjax.training.metric_writer import MetricWriter, read_metrics
from hourjax.training.train_state import TrainState
from hourjax.training.train_step import TrainStep, accumulate, zero_sums
from hourjax.training.workdir import EpochCounts, run_summary
from tests.training import runs

STEPS = 6


@pytest.fixture(scope="module")
def experiment(data):
  """Six steps, and a checkpoint in the middle."""
  config = runs.small_config(data, steps=STEPS, checkpoint_every=3)
  return build_experiment(config.to_dict())


@pytest.fixture(scope="module", autouse=True)
def _drawn_and_compiled_once():
  """Spares every run but the first what takes longest, and is the same."""
  draw, drawn, compiled = loop.fresh_state, {}, {}

  def fresh(asked, like, optimizer, begin):
    if begin is not None:
      return draw(asked, like, optimizer, begin)
    if asked.model not in drawn:
      drawn[asked.model] = draw(asked, like, optimizer)
    # A step reuses the memory of the state before it, so each run gets copies.
    return jax.tree.map(jnp.copy, drawn[asked.model])

  def step_of(config, optimizer, shardings, dropout):
    found = config, tuple(shardings.trained), dropout
    if found not in compiled:
      compiled[found] = TrainStep(config, optimizer, shardings, dropout)
    return compiled[found]

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(loop, "fresh_state", fresh)
    patch.setattr(loop, "TrainStep", step_of)
    yield


@pytest.fixture(scope="module")
def whole(experiment, tmp_path_factory):
  """Workdir of a run without interruption."""
  workdir = tmp_path_factory.mktemp("whole")
  loop.train(experiment, workdir)
  return workdir


def _files(workdir):
  return {
    path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()
  }


def _stop(experiment, workdir, monkeypatch, after):
  """Begins a run, which is interrupted once it has written a step."""
  wrote = MetricWriter.write

  def stop(self, step, *args, **values):
    wrote(self, step, *args, **values)
    if step == after:
      raise KeyboardInterrupt

  with monkeypatch.context() as patch:
    patch.setattr(MetricWriter, "write", stop)
    with pytest.raises(KeyboardInterrupt):
      loop.train(experiment, workdir)


@pytest.fixture(scope="module")
def samples(experiment):
  """Eighteen samples an epoch, in steps of 8, 8 and 2 that follow anyhow."""
  return runs.changed(
    experiment, batch_samples=8, accumulate=1, batch_rows=2,
    data__weights="stream:default=3", steps=5,
  )  # fmt: skip


@pytest.mark.slow
def test_streams_with_rows_of_their_own(samples, data, tmp_path, monkeypatch):
  """The same steps in other rows: losses differ by rounding alone."""
  records = json.loads((data / "train.json").read_text())
  records = [record for record in records if record["id"] != "bad"]
  items = []
  for stream, part in (("long", records[::2]), ("short", records[1::2])):
    path = tmp_path / f"{stream}.json"
    path.write_text(json.dumps(part))
    items.append(lists.Item((path,), stream=stream, name=str(path)))
  options = prepare.Options(items=tuple(items), tokenizer=f"{data}/tokenizer")
  prepare.build(tmp_path / "two", options, workers=1)
  one = runs.changed(
    samples, data__dataset=f"{tmp_path}/two", data__weights="", steps=4,
    batch_samples=2, batch_rows=1,
  )  # fmt: skip
  small = Size(features=680, memory=850, queries=200, decoder=256)
  two = dataclasses.replace(one, stream_rows={"short": small})
  seen = []
  monkeypatch.setattr(
    data_loader,
    "batch_capacity",
    lambda batch: (seen.append(batch_capacity(batch)), seen[-1])[1],
  )
  losses = []
  for run in (one, two):
    loop.train(run, tmp_path / f"run-{len(losses)}")
    rows = read_metrics(tmp_path / f"run-{len(losses)}")
    losses.append([row["loss"] for row in rows])
  assert set(seen[:4]) == {one.rows} and set(seen[4:]) == {one.rows, small}
  np.testing.assert_allclose(losses[0], losses[1], rtol=1e-5)


@pytest.mark.slow
def test_steps_of_samples(samples, tmp_path, monkeypatch, capsys):
  """Interrupted after a step whose last micro-batch has an empty row."""
  loop.train(samples, tmp_path / "whole")
  said = capsys.readouterr().err
  assert "5 steps of 8 samples of one stream, in" in said
  assert "of them empty; 3 steps an epoch), from step 0" in said
  rows = read_metrics(tmp_path / "whole")
  taken = [row["samples_per_step"] for row in rows]
  assert sorted(taken[:3]) == [2, 8, 8]
  for row in rows:
    assert row["tokens_per_step"] == row["tokens"]
    assert row["micro_batches_per_step"] == -(-row["rows_per_step"] // 2)
    assert row["video_hours_per_step"] > 0
  run = tmp_path / "run"
  _stop(samples, run, monkeypatch, after=4)
  plan = json.loads((run / "plan.json").read_text())
  counted = {int(rows): n for rows, n in plan["step_rows"].items()}
  assert sum(counted.values()) == 3
  assert sum(rows * n for rows, n in counted.items()) == plan["rows"]
  loop.train(samples, run)
  assert runs.losses(run) == runs.losses(tmp_path / "whole")


@pytest.mark.slow
def test_gradients_of_a_step_in_any_micro_batches(samples):
  """The same samples in 1 to 4 micro-batches, the last with empty rows."""
  dataset = loop.open_dataset(samples)
  plan = loop.row_plan(samples, dataset)
  trained = jax.tree.map(jnp.asarray, init_params(samples.model, 0))
  add = jax.jit(functools.partial(accumulate, config=samples.model))
  found, empty = {}, set()
  for rows in (2, 4, 8):
    sums, read = zero_sums(trained), 0
    delivered = loop.batches(dataset, plan, samples.row_spec, rows=rows)
    for micro in delivered:
      sums = add(sums, trained, {}, Batch(*map(jnp.asarray, micro.batch)))
      read += micro.samples
      used = (micro.batch.decoder_segment > 0).any(axis=1)
      empty.add(int((~used).sum()))
      if micro.ends_step:
        break
    delivered.close()
    assert read in (2, 8) and sums.tokens > 0
    found[rows] = jax.tree.map(np.asarray, sums)
  assert len(empty) > 1
  one = found[2]
  whole = np.sqrt(sum(np.square(g).sum() for g in one.grads.values()))
  assert np.isfinite(whole) and whole > 0
  for other in (found[4], found[8]):
    assert other.tokens == one.tokens
    np.testing.assert_allclose(other.loss, one.loss, rtol=1e-6)
    for path, grad in other.grads.items():
      apart = np.abs(grad - one.grads[path]).max()
      assert apart <= 1e-6 * whole, path


@pytest.mark.slow
def test_a_resumed_run_has_the_losses_of_a_whole_one(
  experiment, whole, tmp_path, monkeypatch
):
  _stop(experiment, tmp_path, monkeypatch, after=5)
  # Steps 4 and 5 are after the checkpoint; they are taken and written again.
  assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2, 3, 4, 5]
  loop.train(experiment, tmp_path)
  rows = read_metrics(whole)
  assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
  assert runs.losses(tmp_path) == runs.losses(whole)
  assert len({row["loss"] for row in rows}) == STEPS
  one = restore_params(whole).params
  two = restore_params(tmp_path).params
  assert one.keys() == two.keys()
  assert all((one[path] == two[path]).all() for path in one)


@pytest.mark.slow
def test_muon_goes_on_from_its_own_moments(experiment, tmp_path):
  """Kernels have one moment and all else two, by names of their own."""
  changed = runs.changed(
    experiment,
    optimizer__name="muon",
    model__memaug_init=0.5,  # a model that no other test here shares
    steps=4,
    checkpoint_every=2,
  )
  loop.train(changed, tmp_path / "whole")
  with runs.interrupted_at(3):
    loop.train(changed, tmp_path / "resumed")
  loop.train(changed, tmp_path / "resumed")
  assert runs.losses(tmp_path / "resumed") == runs.losses(tmp_path / "whole")
  other = runs.changed(changed, optimizer__name="adamw")
  with pytest.raises(UserError, match=r'optimizer\.name: "muon" -> "adamw"'):
    loop.train(other, tmp_path / "whole")


@pytest.mark.slow
def test_what_cannot_be_read_is_left_out_and_listed(
  experiment, whole, tmp_path
):
  """A file that is damaged after the run was planned."""
  workdir = tmp_path / "run"
  store = shutil.copytree(experiment.data.features, tmp_path / "features")
  broken = min(store.glob("train*.npy"))
  broken.write_bytes(broken.read_bytes()[:-100])
  loop.train(runs.changed(experiment, data__features=str(store)), workdir)
  lines = (workdir / "unread.jsonl").read_text().splitlines()
  unread = [json.loads(line) for line in lines]
  assert unread and all(str(broken) in item["reason"] for item in unread)
  rows = read_metrics(workdir)
  assert rows[-1]["unread_damaged"] == len(unread)
  tokens = [row["tokens"] for row in rows]
  assert sum(tokens) < sum(row["tokens"] for row in read_metrics(whole))


@pytest.mark.slow
def test_a_finished_run_is_left_alone(experiment, whole, monkeypatch, capsys):
  before = _files(whole)
  monkeypatch.setattr(loop, "TrainStep", None)
  loop.train(experiment, whole)
  assert "already trained: step 6 of 6" in capsys.readouterr().err
  assert _files(whole) == before


@pytest.mark.slow
def test_another_configuration_on_the_same_workdir(experiment, whole):
  """Refused with what differs, before anything is opened or written."""
  before = _files(whole)
  other = runs.changed(
    experiment, model__decoder__mlp=128, optimizer__clip=2.0, log_every=5
  )
  with pytest.raises(UserError, match="of another configuration") as error:
    loop.train(other, whole)
  assert str(whole) in str(error.value)
  assert "\n  model.decoder.mlp: 256 -> 128\n" in str(error.value)
  assert "\n  optimizer.clip: 1.0 -> 2.0\n" in str(error.value)
  assert "log_every" not in str(error.value)
  assert "config.init" in str(error.value)
  assert _files(whole) == before


@pytest.mark.slow
def test_other_data_behind_the_same_configuration(experiment, whole, tmp_path):
  """A position in one plan says nothing in another."""
  before = _files(whole)
  features = shutil.copytree(experiment.data.features, tmp_path / "features")
  index = features / "index-00000.jsonl"
  lines = index.read_text().splitlines(keepends=True)
  index.write_text("".join(line for line in lines if "train_0002" not in line))
  other = runs.changed(experiment, data__features=str(features))
  with pytest.raises(UserError, match="trained on rows of plan") as error:
    loop.train(other, whole)
  assert "config.init" in str(error.value)
  assert _files(whole) == before


@pytest.mark.slow
def test_bad_records_are_listed(whole):
  (listed,) = json.loads((whole / "skipped.json").read_text())
  assert listed["id"] == "bad"
  assert "nowhere.mp4 is not in" in listed["reason"]


@pytest.mark.slow
def test_too_many_bad_records(experiment, tmp_path):
  data = dataclasses.replace(experiment.data, max_skipped=0.1)
  strict = dataclasses.replace(experiment, data=data)
  with pytest.raises(
    UserError, match=r"1 of 7 records .*max_skipped=0.1 allows fewer"
  ):
    loop.train(strict, tmp_path / "run")
  assert not (tmp_path / "run").exists()


def test_no_dataset_given(tmp_path):
  empty = build_experiment(demo.get_config().to_dict())
  data = dataclasses.replace(empty.data, dataset="")
  empty = dataclasses.replace(empty, data=data)
  with pytest.raises(UserError, match=r"config\.data\.dataset is empty; set"):
    loop.train(empty, tmp_path)


def test_the_start_says_what_is_not_shown_of_short_videos(monkeypatch):
  monkeypatch.setenv("XLA_FLAGS", "")  # which have a note of their own

  class Samples(Dataset):
    sparse = ()
    columns = types.SimpleNamespace(
      streams=("default",), video=np.array([], int), videos=()
    )
    usable = np.array([], int)
    visual = types.SimpleNamespace(stored=np.array([], bool))

    def __init__(self):
      pass

  dataset = Samples()
  state = TrainState(jnp.int32(0), {}, {}, ())
  experiment = build_experiment(demo.get_config().to_dict())

  def said():
    return run_summary(
      experiment, dataset, EpochCounts("", 3, {0: 5}), state, 4
    )

  assert "note" not in said()
  dataset.sparse = ["a.mp4", "b.mp4"]
  assert f"\nnote: {sparse_note(2)}" in said()
