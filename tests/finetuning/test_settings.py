"""What is decided about a fine-tuning: the split, rates, steps, overrides."""

import collections
import dataclasses

import pytest

from configs import demo, hourllava
from hourjax.data.prepare.convert import VideoFact
from hourjax.data.rows import Size
from hourjax.errors import UserError
from hourjax.finetuning import settings
from hourjax.finetuning.questions import Questions
from hourjax.finetuning.run import drop_unusable
from hourjax.parallel.chips import CHIPS
from hourjax.parallel.gpus import GPUS
from hourjax.training.config import build_experiment
from hourjax.training.data_loader import open_dataset
from tests.training import runs


def _questions(videos, each=3):
  return [
    {"video": f"{v}.mp4", "held_out": False, "start": 0.0, "where": f"{v}/{q}"}
    for v in range(videos)
    for q in range(each)
  ]


def _held(found):
  return {item["video"] for item in found if item["held_out"]}


@pytest.mark.parametrize(
  "videos, each, count", [(2, 3, 1), (3, 1, 1), (30, 5, 6), (1000, 10, 100),
                          (20_000, 1, 1000)]
)  # fmt: skip
def test_whole_videos_are_held_out(videos, each, count):
  found = _questions(videos, each)
  assert not settings.choose_held_out(found)
  held = _held(found)
  assert abs(len(held) - count) <= 1 and len(held) <= videos / 2
  assert all((i["video"] in held) == i["held_out"] for i in found)
  # The same ones in any order, and for most of them with more videos.
  again = _questions(videos, each)[::-1]
  settings.choose_held_out(again)
  assert _held(again) == held


def test_how_much_is_held_out_may_be_said(tmp_path):
  for text, count in (("10%", 3), ("5", 5), ("1", 1)):
    found = _questions(30)
    settings.choose_held_out(found, text)
    assert len(_held(found)) == count, text
  names = tmp_path / "names.txt"
  names.write_text("3.mp4\n7.mp4\nnone.mp4\n")
  found = _questions(30)
  settings.choose_held_out(found, str(names))
  assert _held(found) == {"3.mp4", "7.mp4"}
  names.write_text("none.mp4\n")
  for text in ("30", "100", "99.9%", str(names)):
    with pytest.raises(UserError, match="--holdout="):
      settings.choose_held_out(_questions(30), text)


def test_a_column_of_splits_decides():
  found = _questions(4)
  for item in found[:3]:
    item["held_out"] = True
  (note,) = settings.choose_held_out(found)
  assert _held(found) == {"0.mp4"} and "column of splits" in note
  found[4]["held_out"] = True
  with pytest.raises(UserError, match=r"about 1\.mp4 and not others, and so for"
                     " 1 of 4 videos"):  # fmt: skip
    settings.choose_held_out(found)
  settings.choose_held_out(found, "2")
  assert len(_held(found)) == 2
  for item in found:
    item["held_out"] = True
  with pytest.raises(UserError, match="leaves none to train on"):
    settings.choose_held_out(found)


def test_of_a_single_video_nothing_is_held_out():
  found = _questions(1, 12)
  (note,) = settings.choose_held_out(found)
  assert not _held(found) and "one video, so nothing is held out" in note


def test_questions_beyond_a_video_are_left_out():
  items = _questions(3, 1)
  items[0]["start"] = 61.5
  found = Questions(3, items, [], [], {})
  facts = {
    "0.mp4": VideoFact(60.0, 100, 1.0),
    "1.mp4": VideoFact(problem=("unreadable video", "1.mp4 is no video")),
    "2.mp4": VideoFact(60.0, 100, 1.0),
  }
  drop_unusable(found, facts)
  assert [i["video"] for i in found.found] == ["2.mp4"]
  assert found.found[0]["duration"] == 60.0
  assert collections.Counter(i.kind for i in found.skipped) == {
    "part beyond the video": 1, "unreadable video": 1
  }  # fmt: skip


@pytest.fixture(scope="module")
def base(data):
  """The demo's last stage, whose projector was frozen."""
  return build_experiment(demo.get_config(f"data={data},stage=3").to_dict())


@pytest.fixture(scope="module")
def made(base, data):
  where = dataclasses.replace(base.data, dataset=f"{data}/held_out")
  dataset = settings.measure(base, where)
  return settings.make_experiment(base, where, dataset, {}), dataset


def test_everything_but_the_tower_is_trained(base, made):
  experiment, _ = made
  rates, own = experiment.optimizer, base.optimizer
  assert rates.vision == 0 and own.projector == 0
  assert rates.memaug == pytest.approx(0.3 * own.memaug)
  assert rates.decoder == pytest.approx(0.3 * own.decoder) == rates.projector
  # A published model is trained with the rates of its last stage.
  published = hourllava.get_config("size=3b,stage=3").to_dict()["optimizer"]
  usual = settings._rates(settings.OptimizerConfig(clip=1.0))
  for name in ("projector", "memaug", "decoder"):
    assert getattr(usual, name) == published[name]


def test_rows_hold_every_sample(made):
  experiment, dataset = made
  opened = open_dataset(experiment)
  assert not opened.skipped
  assert len(opened.usable) == len(dataset.usable) > 0
  assert len(opened.held_out) == len(dataset.held_out) > 0
  assert (opened.sizes <= experiment.rows.astuple()).all()
  assert experiment.rows.frames == 0
  small = dataclasses.replace(
    experiment, rows=Size(*(max(x - 128, 0) for x in experiment.rows.astuple()))
  )
  with pytest.raises(UserError, match="sample larger than a row"):
    open_dataset(dataclasses.replace(
      small, data=dataclasses.replace(small.data, max_skipped=0.0)
    ))  # fmt: skip


def test_small_data_ends_early(made):
  experiment, _ = made
  assert experiment.patience == 3 and experiment.eval_every == 5
  assert experiment.epochs == 20 and experiment.batch_samples <= 8
  assert experiment.batch_rows <= experiment.batch_samples


def test_sizes_of_steps():
  small = Size(queries=300, decoder=300)
  assert settings._batch(40, small) == (8, 8)
  assert settings._batch(3, small) == (3, 2)
  assert settings._batch(500, small) == (16, 16)
  assert settings._batch(10**6, small) == (128, 16)
  assert settings._batch(10**6, Size(queries=20_000, decoder=9000)) == (128, 1)


def test_overrides(made):
  experiment, _ = made
  values = settings.parse_overrides(
    ["epochs=3", "config.optimizer.decoder=1e-5", "drop_last=true", "init=x",
     "rows.memory=4096"]
  )  # fmt: skip
  changed = settings.override(experiment, values)
  assert changed == runs.changed(
    experiment, epochs=3.0, optimizer__decoder=1e-5, drop_last=True, init="x",
    rows__memory=4096,
  )  # fmt: skip
  for text, message in (
    ("epoch=3", "there is no such key; did you mean epochs"),
    ("optimizer=3", "there is no such key"),
    ("epochs=many", "give a number, as 20"),
    ("batch_rows=1.5", "give a whole number"),
    ("drop_last=1", "give true or false"),
    ("batch_rows=0", "at least 1"),
    ("optimizer.vision=1e-5", "the tower is not trained here"),
  ):
    with pytest.raises(UserError, match=message):
      settings.override(experiment, settings.parse_overrides([text]))
  with pytest.raises(UserError, match="write --set=KEY=VALUE"):
    settings.parse_overrides(["epochs"])


@pytest.mark.parametrize("name", ["v5e", "rtx4090", ""])
def test_of_a_large_model_adapters_are_trained(name):
  """In a base, and with what waits on the host, that suit the device."""
  config = hourllava.get_config("size=3b,stage=3").to_dict()
  base = dataclasses.replace(
    build_experiment(config),
    stream_rows={},
    rows=Size(features=230_400, memory=234_112, queries=9216, decoder=9984),
  )
  assert settings.parameters(base.model) > settings._LARGE
  chip = (CHIPS | GPUS).get(name)
  made = settings.adapt(base, chip, 1)
  assert made.lora.rank == 16 and made.rows.features == base.rows.features
  assert made.optimizer.rate("decoder") == made.optimizer.rate("memaug") > 0
  assert made.model.offload == ("host" if name == "v5e" else "device")
  assert bool(made.model.memory_chunk) == bool(name)
  with pytest.raises(UserError, match=r"on|needs"):
    long = dataclasses.replace(base.rows, memory=5_000_000, features=4_900_000)
    settings.adapt(dataclasses.replace(base, rows=long), CHIPS["v5e"], 1)
