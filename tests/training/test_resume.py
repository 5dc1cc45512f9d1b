"""Whole runs through the loop on a small demo; losses are equal floats."""

import dataclasses
import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import pytest

from configs import demo
from hourjax.data.demo import build
from hourjax.data.prepare import build as prepare
from hourjax.data.prepare import lists
from hourjax.errors import UserError
from hourjax.inference.extraction import extract_videos
from hourjax.models.params import init_params
from hourjax.training import loop
from hourjax.training.checkpoint import read_config, restore_params
from hourjax.training.experiment import build_experiment
from hourjax.training.initial import initial_params
from hourjax.training.metrics import Metrics, read_metrics

STEPS = 6
BAD = {
  "id": "bad",
  "video": "nowhere.mp4",
  "conversations": [
    {"from": "human", "value": "<image>\nWhy?"},
    {"from": "gpt", "value": "So."},
  ],
}


@pytest.fixture(scope="module")
def experiment(tmp_path_factory):
  """Six steps on six conversations and a record without its video."""
  folder = tmp_path_factory.mktemp("data")
  options = build.Options(train_videos=3, test_scale=0.02, conversations=2)
  build.build(folder, options)
  path = folder / "train.json"
  path.write_text(json.dumps([BAD, *json.loads(path.read_text())]))
  config = demo.get_config(f"data={folder},stage=2")
  config.update(
    steps=STEPS, batch_rows=1, accumulate=2, log_every=1, checkpoint_every=3
  )
  config.model.decoder.layers = config.model.memaug_layers = 1
  config.data.max_skipped = 0.5
  made = build_experiment(config.to_dict())
  options = prepare.Options(
    items=(lists.Item.of_files([str(path)]),), tokenizer=f"{folder}/tokenizer"
  )
  prepare.build(folder / "stage2", options, workers=1)
  extract_videos(
    init_params(made.model, made.seed),
    made.model,
    videos=folder / "videos",
    out=folder / "features",
    batch_frames=64,
  )
  return made


@pytest.fixture(scope="module", autouse=True)
def _drawn_and_compiled_once(experiment):
  """Spares every run but the first what takes longest, and is the same."""
  drawn = initial_params(experiment)
  made, compile_step = [], loop.jit_train_step

  def fresh(asked):
    # A step reuses the memory of the state before it, so each run gets copies.
    same = asked.model == experiment.model
    return jax.tree.map(jnp.copy, drawn) if same else initial_params(asked)

  @functools.cache
  def jitted(config):
    return compile_step(config, made[0])

  def step_of(config, optimizer):
    made.append(optimizer)
    return jitted(config)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(loop, "initial_params", fresh)
    patch.setattr(loop, "jit_train_step", step_of)
    yield


@pytest.fixture(scope="module")
def whole(experiment, tmp_path_factory):
  """Workdir of a run without interruption."""
  workdir = tmp_path_factory.mktemp("whole")
  loop.train(experiment, workdir)
  return workdir


def _losses(workdir):
  kept = ("step", "loss", "grad_norm", "tokens")
  return [{k: row[k] for k in kept} for row in read_metrics(workdir)]


def _files(workdir):
  return {
    path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()
  }


@pytest.mark.slow
def test_a_resumed_run_has_the_losses_of_a_whole_one(
  experiment, whole, tmp_path, monkeypatch
):
  write = Metrics.write

  def stop(self, step, values):
    write(self, step, values)
    if step == 5:
      raise KeyboardInterrupt

  with monkeypatch.context() as patch:
    patch.setattr(Metrics, "write", stop)
    with pytest.raises(KeyboardInterrupt):
      loop.train(experiment, tmp_path)
  # Steps 4 and 5 are after the checkpoint; they are taken and written again.
  assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2, 3, 4, 5]
  loop.train(experiment, tmp_path)
  rows = read_metrics(whole)
  assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
  assert _losses(tmp_path) == _losses(whole)
  assert len({row["loss"] for row in rows}) == STEPS
  one, two = restore_params(whole), restore_params(tmp_path)
  assert one.keys() == two.keys()
  assert all((one[path] == two[path]).all() for path in one)


def test_what_cannot_be_read_is_left_out_and_listed(
  experiment, whole, tmp_path
):
  """A file that is damaged after the run was planned."""
  store = pathlib.Path(experiment.data.features)
  broken = min(store.glob("train*.npy"))
  content = broken.read_bytes()
  broken.write_bytes(content[:-100])
  try:
    loop.train(experiment, tmp_path)
  finally:
    broken.write_bytes(content)
  lines = (tmp_path / "unread.jsonl").read_text().splitlines()
  unread = [json.loads(line) for line in lines]
  assert unread and all(str(broken) in item["reason"] for item in unread)
  rows = read_metrics(tmp_path)
  assert rows[-1]["unread_damaged"] == len(unread)
  tokens = [row["tokens"] for row in rows]
  assert sum(tokens) < sum(row["tokens"] for row in read_metrics(whole))


def test_a_finished_run_is_left_alone(experiment, whole, monkeypatch, capsys):
  before = _files(whole)
  monkeypatch.setattr(loop, "jit_train_step", None)
  loop.train(experiment, whole)
  assert "already trained: step 6 of 6" in capsys.readouterr().err
  assert _files(whole) == before


def test_another_model_on_the_same_workdir(experiment, whole):
  wider = dataclasses.replace(
    experiment.model,
    decoder=dataclasses.replace(experiment.model.decoder, mlp=128),
  )
  other = dataclasses.replace(experiment, model=wider)
  with pytest.raises(UserError, match="does not fit this configuration") as e:
    loop.train(other, whole)
  assert str(whole) in str(e.value)
  # What the run was started with must not be lost.
  assert read_config(whole)["model"] == dataclasses.asdict(experiment.model)


def test_bad_records_are_listed(whole):
  (listed,) = json.loads((whole / "skipped.json").read_text())
  assert listed["id"] == "bad"
  assert "nowhere.mp4 is not in" in listed["reason"]


def test_too_many_bad_records(experiment, tmp_path):
  data = dataclasses.replace(experiment.data, max_skipped=0.1)
  strict = dataclasses.replace(experiment, data=data)
  with pytest.raises(
    UserError, match=r"1 of 7 records .*max_skipped=0.1 allows fewer"
  ):
    loop.train(strict, tmp_path / "run")
  assert not (tmp_path / "run").exists()


def test_other_data_on_the_same_workdir(experiment, whole):
  """A position in one plan says nothing in another."""
  before = read_config(whole)
  data = dataclasses.replace(experiment.data, weights="train=2")
  other = dataclasses.replace(experiment, data=data)
  with pytest.raises(UserError, match="trained on rows of plan") as error:
    loop.train(other, whole)
  assert "config.init" in str(error.value)
  assert read_config(whole) == before


@pytest.mark.parametrize(
  "key, value",
  [
    ("seed", -1),
    ("steps", -5),
    ("max_length", 0),
    ("data.max_skipped", 1.5),
    ("data.share_memory", 0),
    ("data.single_image", "plan"),
    ("read.threads", 0),
  ],
)
def test_values_out_of_range(key, value):
  config = demo.get_config()
  config.update_from_flattened_dict({key: value})
  with pytest.raises(UserError, match=f"config.{key} is '?{value}"):
    build_experiment(config.to_dict())


def test_no_dataset_given(experiment, tmp_path):
  data = dataclasses.replace(experiment.data, dataset="")
  empty = dataclasses.replace(experiment, data=data)
  with pytest.raises(UserError, match=r"config\.data\.dataset is empty; set"):
    loop.train(empty, tmp_path)
