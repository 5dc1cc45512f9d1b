"""Held-out data: chosen by names, marked in the dataset, never in a plan."""

import dataclasses
import hashlib
import json

import numpy as np
import pytest

from hourjax.data.columns import Columns
from hourjax.data.dataset import Dataset, SampleOptions
from hourjax.data.packing.row_plan import PlanOptions, RowPlan
from hourjax.data.prepare.build import build
from hourjax.data.prepare.holdout import name_number, parse_holdout
from hourjax.data.prepare.lists import Item, Options
from hourjax.data.prepare.report import table
from hourjax.data.prepared import Prepared
from hourjax.data.rows import RowSpec, Size
from hourjax.data.tokenizer import Tokenizer
from hourjax.errors import UserError

VIDEOS = [
  f"{folder}/{i:02}.mp4" for folder in ("ego4d", "panda") for i in range(20)
]
CAPACITY = Size(
  frames=1000, tiles=50, memory=10**5, queries=10**5, decoder=10**5
)


def _raw(name, **fields):
  talk = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "Yes"}]
  return {"id": name, "conversations": talk, **fields}


def _raws(stream, videos=VIDEOS):
  """Three conversations about each video, about images, and about nothing."""
  raws = [
    _raw(f"{stream}-{video}-{k}", video=video, duration=30.0)
    for k in range(3)
    for video in videos
  ]
  raws += [_raw(f"{stream}-text-{i}") for i in range(30)]
  raws += [
    _raw(f"{stream}-images-{i}", image=[f"{i}.png", f"{i + 1}.png"])
    for i in range(30)
  ]
  return raws


@pytest.fixture
def prepare(tmp_path, tokenizer_folder, media):
  def prepare(name, holdout, **streams):
    items = []
    for stream, raws in streams.items():
      path = tmp_path / f"{name}-{stream}.json"
      path.write_text(json.dumps(raws))
      items.append(Item((path,), stream=stream, name=str(path)))
    options = Options(
      items=tuple(items),
      tokenizer=str(tokenizer_folder),
      media=str(media),
      check_media=False,
      holdout=holdout,
    )
    return build(tmp_path / name, options)[0], Prepared(tmp_path / name)

  return prepare


def _held_out(data):
  """Ids of the held-out conversations."""
  return {
    record.id
    for record, held in zip(data.records, data.columns.held_out)
    if held
  }


def _videos(data):
  columns = data.columns
  about = columns.video[(columns.held_out > 0) & (columns.video >= 0)]
  return {columns.videos[i] for i in about}


def _below(name, share):
  """The rule, written another way."""
  digest = hashlib.sha256(name.encode()).hexdigest()
  return int(digest, 16) < share * 16**64


def test_a_share_takes_whole_videos_by_their_names(prepare):
  summary, data = prepare("d", "20%", short=_raws("s"), long=_raws("l"))
  expected = set()
  for record in data.records:
    names = record.media or (record.id,)
    if any(_below(name, 0.2) for name in names):
      expected.add(record.id)
  assert _held_out(data) == expected
  chosen = {video for video in VIDEOS if _below(video, 0.2)}
  assert _videos(data) == chosen and 2 <= len(chosen) <= 15
  counted = summary["held_out"]
  assert counted["conversations"] == counted["questions"] == len(expected)
  assert counted["videos"] == len(chosen)
  assert summary["kept"]["conversations"] == len(data) == 360
  (line,) = [x for x in table(summary).splitlines() if x.startswith("held out")]
  assert line.split()[-4:-1] == [str(len(expected))] * 2 + [str(len(chosen))]


def test_a_file_names_what_is_held_out(prepare, tmp_path):
  names = tmp_path / "names.txt"
  names.write_text(f"{VIDEOS[3]}\n 7.png \n\nnowhere.mp4\ns-text-2\n")
  _, data = prepare("d", str(names), s=_raws("s"))
  whole = {f"s-{VIDEOS[3]}-{k}" for k in range(3)}
  images = {"s-images-6", "s-images-7"}
  assert _held_out(data) == {*whole, *images, "s-text-2"}
  # Another list makes another dataset, and the order of a list does not.
  one, other = (parse_holdout(str(names)) for _ in range(2))
  assert str(one) == str(other)
  names.write_text(f"{VIDEOS[3]}\n")
  assert str(parse_holdout(str(names))) != str(one)
  names.write_text("\n")
  with pytest.raises(UserError, match="lists no name"):
    parse_holdout(str(names))
  with pytest.raises(UserError, match=r"none\.txt cannot be read"):
    parse_holdout("none.txt")


def test_no_image_of_held_out_data_is_trained_on(prepare):
  """One that is held out by its own name, wherever else it stands."""
  _, data = prepare("d", "20%", short=_raws("s"))
  trained = {
    name
    for record, held in zip(data.records, data.columns.held_out)
    for name in record.media
    if not held
  }
  assert trained and not {name for name in trained if _below(name, 0.2)}


def test_a_share_stays_when_data_is_added(prepare):
  _, few = prepare("few", "30%", short=_raws("s", VIDEOS[:15]))
  _, many = prepare("many", "30%", short=_raws("s"), other=_raws("o"))
  assert _videos(few) == _videos(many) & set(VIDEOS[:15]) != set()
  same = {record.id for record in few.records}
  assert _held_out(few) == _held_out(many) & same


def test_a_count_takes_the_smallest_numbers(prepare):
  _, data = prepare("d", "7", short=_raws("s"), long=_raws("l"))
  ordered = sorted(VIDEOS, key=name_number)
  assert _videos(data) == set(ordered[:7])
  # What is not about a video is held out at the share that this amounts to.
  share = name_number(ordered[7])
  texts = {f"{s}-text-{i}" for s in "sl" for i in range(30)}
  assert _held_out(data) & texts == {x for x in texts if name_number(x) < share}


def test_other_data_under_the_same_options_is_prepared_anew(prepare):
  prepare("d", "20%", short=_raws("s"))
  with pytest.raises(UserError, match="holdout: '20%' -> '30%'"):
    prepare("d", "30%", short=_raws("s"))
  with pytest.raises(UserError, match="holdout: '20%' -> None"):
    prepare("d", "", short=_raws("s"))


@pytest.mark.parametrize(
  ("text", "said"),
  [
    ("100%", "--holdout=100% sets everything aside"),
    ("250 %", "--holdout=250 % sets everything aside"),
    ("0%", "--holdout=0%; write a share above 0 and below 100 %, such as 0.5%"),
    ("0", "--holdout=0; write"),
    ("0.5", "--holdout=0.5; write"),
    ("-3", "--holdout=-3; write"),
    ("some", "--holdout=some; write"),
  ],
)
def test_what_is_no_holdout(text, said):
  with pytest.raises(UserError) as raised:
    parse_holdout(text)
  assert said in str(raised.value)


def test_a_holdout_that_takes_everything(prepare):
  raws = _raws("s", VIDEOS[:3])
  whole = r"--holdout=3 sets aside all 3 videos, .* give less, such as --h"
  with pytest.raises(UserError, match=whole):
    prepare("d", "3", short=raws)
  with pytest.raises(UserError, match=r"--holdout=99\.9% sets aside all 3 v"):
    prepare("d", "99.9%", short=raws)
  texts = [raw for raw in raws if "text" in raw["id"]]
  with pytest.raises(UserError, match="sets aside all 30 conversations"):
    prepare("d", "99.9%", short=texts)
  with pytest.raises(UserError, match="none of 30 conversations is about one"):
    prepare("d", "2", short=texts)


def test_a_share_that_takes_nothing_is_said(prepare):
  raws = [raw for raw in _raws("s", VIDEOS[:3]) if "video" in raw]
  summary, data = prepare("d", "0.001%", short=raws)
  assert not data.columns.held_out.any()
  assert "nothing is held out; give a larger --holdout" in table(summary)


def test_datasets_without_a_holdout_are_as_before(prepare, tmp_path):
  """Neither the columns nor what tells of the dataset name it."""
  summary, data = prepare("d", "", short=_raws("s"))
  assert "held_out" not in summary and "held out" not in table(summary)
  assert "held_out" not in np.load(tmp_path / "d" / "columns.npz").files
  about = json.loads((tmp_path / "d" / "about.json").read_text())
  assert "held_out" not in about and "holdout" not in about["options"]
  assert data.columns.held_out.tolist() == [0] * len(data)


def test_a_dataset_that_lost_its_marks_is_refused(prepare, tmp_path):
  """Rather than trained on as a whole."""
  prepare("d", "20%", short=_raws("s"))
  path = tmp_path / "d" / "columns.npz"
  members = dict(np.load(path))
  count = int(members.pop("held_out").sum())
  np.savez(path, **members)
  said = f"has 0 held-out conversations in columns.npz and {count} in about"
  with pytest.raises(UserError, match=said):
    Prepared(tmp_path / "d")


def test_half_of_a_video_is_refused(prepare, tmp_path):
  _, data = prepare("d", "20%", short=_raws("s"))
  columns = data.columns
  marks = columns.held_out.copy()
  marks[np.flatnonzero((marks > 0) & (columns.video >= 0))[0]] = 0
  path = tmp_path / "d" / "columns.npz"
  np.savez(path, **dict(np.load(path)) | {"held_out": marks})
  with pytest.raises(UserError, match="held out in one conversation and not"):
    Columns.load(path)


@pytest.mark.parametrize("share", [1, 3])
def test_no_held_out_video_is_ever_trained_on(
  prepare, tokenizer_folder, media, share
):
  """In any stream, and with conversations that share a memory."""
  _, data = prepare("d", "20%", short=_raws("s"), long=_raws("l"))
  dataset = Dataset(
    data.records,
    _with_frames(data.columns),
    tokenizer=Tokenizer.from_folder(tokenizer_folder),
    spec=RowSpec(CAPACITY, 4, 16, 8, 32),
    options=SampleOptions(single_image="plain"),
    media_root=str(media),
  )
  columns = data.columns
  plan = RowPlan(
    dataset.sizes,
    CAPACITY,
    PlanOptions(share=share),
    members=dataset.usable,
    memory=columns.video,
    stream=columns.stream,
    weight=np.full(len(columns), 1.5),
  )
  taken = {
    index
    for epoch in range(2)
    for row in plan.epoch_rows(epoch)
    for group in row
    for index in group
  }
  assert len(taken) == (columns.held_out == 0).sum() == len(dataset)
  assert not columns.held_out[list(taken)].any()
  videos = {
    columns.videos[columns.video[i]] for i in taken if columns.video[i] >= 0
  }
  assert len(videos) > 20 and not videos & _videos(data)
  assert {columns.stream[i] for i in taken} == {0, 1}
  groups = [len(g) for row in plan.epoch_rows(0) for g in row]
  assert max(groups) == share
  held = dataset.held_out
  assert {columns.videos[i] for i in columns.video[held] if i >= 0} == _videos(
    data
  )
  assert not set(held) & set(dataset.usable)


def _with_frames(columns):
  """The columns, with a number of frames for videos that are not there."""
  frames = np.full(len(columns.videos), 900, np.int32)
  return dataclasses.replace(columns, num_frames=frames)
