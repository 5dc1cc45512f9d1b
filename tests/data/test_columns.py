import json
import tracemalloc

import numpy as np
import pytest

from hourjax.data.columns import (
  MEASURED_AS,
  Columns,
  ColumnsBuilder,
  Measures,
  measure_record,
)
from hourjax.data.conversations import IGNORE, IMAGE, encode_conversation
from hourjax.data.demo.tokenizer import train_tokenizer
from hourjax.data.records.record import parse_record
from hourjax.data.tokenizer import Tokenizer
from hourjax.errors import UserError
from tests import tampering

TOKENIZER = Tokenizer(train_tokenizer([]), "test")


def _record(**media):
  talk = [
    {"from": "human", "value": "<image>\n" * len(media) + "What is it?"},
    {"from": "gpt", "value": "Red."},
    {"from": "human", "value": "Sure?"},
    {"from": "gpt", "value": "Yes."},
  ]
  return parse_record({"id": "r", "conversations": talk, **media}, "test")


def _columns():
  builder = ColumnsBuilder()
  builder.add(Measures(1, 9, 5, 6), "ego4d", "long", "ä b.mp4", None, 0)
  builder.add(Measures(0, 7, 0, 3), "", "short")
  builder.add(Measures(1, 8, 5, 6), "panda", "long", "ä b.mp4", 12.5, 30)
  builder.add(Measures(1, 8, 5, 6), "panda", "long", "c.mp4", 7, 2, 7.5)
  builder.add(Measures(2, 8, 5, 6, 1, 640, 480), "panda", "short")
  return builder.build()


def test_columns_of_conversations():
  columns = _columns()
  assert len(columns) == 5
  assert columns.videos == ("ä b.mp4", "c.mp4")
  assert columns.video.tolist() == [0, -1, 0, 1, -1]
  assert columns.sources == ("ego4d", "", "panda")
  assert columns.source.tolist() == [0, 1, 2, 2, 2]
  assert columns.streams == ("long", "short")
  assert columns.stream.tolist() == [0, 1, 0, 0, 1]
  # Facts of a video may become known with a later conversation.
  assert columns.duration.tolist() == [12.5, 7]
  assert columns.num_frames.tolist() == [30, 2]
  assert columns.width.tolist() == [0, 0, 0, 0, 640]


def _unnamed():
  builder = ColumnsBuilder()
  builder.add(Measures(1, 9, 5, 6), "", "", "a\0b.mp4")
  return builder.build()


@pytest.mark.parametrize(
  "made", [_columns, _unnamed, lambda: ColumnsBuilder().build()]
)
def test_saved_columns_come_back(made, tmp_path):
  made = made()
  made.save(tmp_path / "columns.npz")
  back = Columns.load(tmp_path / "columns.npz")
  for name, value in vars(made).items():
    if isinstance(value, tuple):
      assert getattr(back, name) == value
    else:
      np.testing.assert_array_equal(getattr(back, name), value)
      assert getattr(back, name).dtype == value.dtype


def test_columns_of_older_versions_have_no_rates(tmp_path):
  made = _columns()
  assert made.fps.tolist()[1] == 7.5 and np.isnan(made.fps[0])
  made.save(tmp_path / "columns.npz")
  with np.load(tmp_path / "columns.npz") as file:
    kept = {name: file[name] for name in file if name != "fps"}
  np.savez(tmp_path / "older.npz", **kept)
  older = Columns.load(tmp_path / "older.npz")
  assert np.isnan(older.fps).all() and len(older.fps) == 2
  np.testing.assert_array_equal(older.num_frames, made.num_frames)


def test_damaged_columns(tmp_path):
  path = tmp_path / "columns.npz"
  _columns().save(path)
  content = path.read_bytes()
  np.savez(tmp_path / "other.npz", modality=np.zeros(3))
  damaged = {
    "half.npz": content[: len(content) // 2],
    "empty.npz": b"",
    "text.npz": b"nothing",
  }
  for name, broken in damaged.items():
    (tmp_path / name).write_bytes(broken)
  with np.load(path) as file:
    columns = dict(file)
  uneven = {**columns, "tokens": columns["tokens"][:-1]}
  np.savez(tmp_path / "uneven.npz", **uneven)
  for name in [*damaged, "other.npz", "missing.npz", "uneven.npz"]:
    with pytest.raises(UserError, match=f"{name} cannot be read .* again"):
      Columns.load(tmp_path / name)


@pytest.mark.parametrize(
  ("name", "change", "said"),
  [
    ("video", lambda c: c + 2, "video 0 is 2, not -1 to 1"),
    ("video", lambda c: c - 1, "video 1 is -2, not -1 to 1"),
    ("video", lambda c: c * 0 - 1, "modality and video do not agree, first at"),
    ("source", lambda c: c + 9, "source 0 is 9, not 0 to 2"),
    ("stream", lambda c: c - 1, "stream 0 is -1, not 0 to 1"),
    ("modality", lambda c: c + 3, "modality 0 is 4, not 0 to 2"),
    ("tokens", lambda c: -c, "tokens 0 is -9, not 0 to 2147483647"),
    ("tokens", lambda c: c.astype(np.int64), "of int64, not .N. of int32"),
    ("tokens", lambda c: c.astype(object), "no header of|in another layout"),
    ("tokens", lambda c: c[None], "array .1, 5. of int32"),
    ("width", lambda c: c * 0, "width or height of the single image is 0"),
    ("duration", lambda c: c * 1e7, "duration is no number from 0 to 1000000"),
    ("duration", lambda c: -c, "duration is no number"),
    ("duration", lambda c: c * np.inf, "duration is no number"),
    ("fps", lambda c: -c, "fps is no number above 0 and to 1000000000"),
    ("fps", lambda c: c * np.inf, "fps is no number above 0"),
    ("fps", lambda c: c[:-1], "columns of different lengths"),
    ("pictures", lambda c: c - 99, "pictures 0 is -69"),
    ("videos", lambda c: _names(3), "videos is 3, not a list"),
    ("videos", lambda c: _names(["a", 1]), "videos is .'a', 1., not a list"),
    ("videos", lambda c: _names(["a", "a"]), "videos has a name twice"),
    ("videos", lambda c: _names(["a"]), "columns of different lengths"),
    ("sources", lambda c: _names([]), "source 0 is 0, not 0 to -1"),
    ("videos", lambda c: np.frombuffer(b"[" * 9999, np.uint8), "too deep"),
    ("videos", lambda c: np.frombuffer(b"\xff[]", np.uint8), "not UTF-8"),
  ],
)
def test_columns_that_cannot_be_meant(tmp_path, name, change, said):
  path = tmp_path / "columns.npz"
  _columns().save(path)
  with np.load(path) as file:
    columns = dict(file)
  np.savez(path, **{**columns, name: change(columns[name])})
  with pytest.raises(UserError, match=rf"columns\.npz cannot be .*({said})"):
    Columns.load(path)


def _names(names):
  return np.frombuffer(json.dumps(names).encode(), np.uint8)


def test_sizes_are_checked_before_memory_is_taken(tmp_path):
  """Of 2**33 numbers, and of a member that grows when it is unpacked."""
  path = tmp_path / "columns.npz"
  _columns().save(path)
  tampering.claim_more(path, "tokens")
  with pytest.raises(UserError, match="tokens claims 34359738368 bytes and"):
    Columns.load(path)
  _columns().save(path)
  with np.load(path) as file:
    columns = dict(file)
  columns["tokens"] = np.zeros(10**7, np.int32)
  np.savez_compressed(path, **columns)
  tracemalloc.start()
  with pytest.raises(UserError, match="is compressed, or larger"):
    Columns.load(path)
  assert tracemalloc.get_traced_memory()[1] < 10**7
  tracemalloc.stop()


@pytest.mark.parametrize("media", [{"video": "a.mp4"}, {}])
def test_measures_are_those_of_the_encoded_conversation(media):
  record = _record(**media)
  made = measure_record(record, TOKENIZER, None)
  whole = encode_conversation(
    record.turns,
    TOKENIZER,
    video=MEASURED_AS if media else None,
  )
  text = whole.ids != IMAGE
  assert made.tokens == text.sum()
  assert made.prompt == (text & (whole.labels == IGNORE)).sum()
  assert made.images == made.width == made.height == 0
  said = TOKENIZER.decode(whole.ids[text][made.answer :])
  assert said.startswith("Red.")


def test_an_image_without_a_folder():
  with pytest.raises(UserError, match=r"record r: .* a.png; give the media"):
    measure_record(_record(image="a.png"), TOKENIZER, None)
