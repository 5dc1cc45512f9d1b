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
from hourjax.data.demo.tokens import train_tokenizer
from hourjax.data.records import parse_record
from hourjax.data.tokenizer import Tokenizer
from hourjax.errors import UserError

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
  builder.add(Measures(1, 8, 5, 6), "panda", "long", "c.mp4", 7, 2)
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
  assert columns.pictures.tolist() == [30, 2]
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
