import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hourjax.data.records import record as records
from hourjax.data.records.record import (
  Record,
  Skipped,
  Turn,
  check_media,
  parse_record,
)
from hourjax.errors import UserError


def _raw(*values, first="human", **fields):
  roles = ("human", "gpt") if first == "human" else ("gpt", "human")
  turns = [{"from": roles[i % 2], "value": v} for i, v in enumerate(values)]
  return {"id": "r1", "conversations": turns, **fields}


VIDEO = _raw("<image>\nWho?", "Ann.", video="a/b.mp4")


def test_video_record():
  raw = {**VIDEO, "data_source": "ego4d", "topic": "action", "score": 3}
  assert parse_record(raw, "here") == Record(
    id="r1",
    modality="video",
    media=("a/b.mp4",),
    turns=(Turn("human", "<image>\nWho?"), Turn("gpt", "Ann.")),
    source="ego4d",
    extra={"topic": "action", "score": 3},
  )


def test_text_record_with_a_number_as_id():
  record = parse_record({**_raw("Hi", "Hello"), "id": 7}, "here")
  assert (record.id, record.modality, record.media) == ("7", "text", ())
  assert (record.source, record.extra) == ("", {})
  null = {**_raw("Hi", "Hello"), "image": None, "video": None}
  assert parse_record(null, "here").modality == "text"


@pytest.mark.parametrize("image", ["a.png", ["a.png"]])
def test_single_image_record(image):
  record = parse_record(_raw("<image>\nWhat?", "A bus", image=image), "here")
  assert (record.modality, record.media) == ("image", ("a.png",))


@pytest.mark.parametrize(
  "text, moved",
  [
    ("What is it?\n<image>", "<image>\nWhat is it?"),
    ("Is <image> a bus?  ", "<image>\nIs  a bus?"),
    ("<image>\nWhat? ", "<image>\nWhat? "),
    ("<image>What?", "<image>What?"),
    ("  <image>", "<image>"),
  ],
)
def test_single_marker_moves_to_the_front(text, moved):
  record = parse_record(_raw(text, "A bus", image="a.png"), "here")
  assert record.turns[0].text == moved


def test_markers_of_several_images():
  together = "Compare <image> and <image>."
  raw = _raw(together, "Same", "And this?\n<image>", "Other", image=["a"] * 3)
  turns = parse_record(raw, "here").turns
  assert turns[0].text == together  # several in a turn stay in place
  assert turns[2].text == "<image>\nAnd this?"


def test_video_turns_stay_as_they_are():
  raw = _raw("Who?\n<image>", "Ann", video="a.mp4")
  assert parse_record(raw, "here").turns[0].text == "Who?\n<image>"


def test_leading_gpt_turn_is_dropped():
  record = parse_record(_raw("dropped", "Hi", "Hello", first="gpt"), "here")
  assert record.turns == (Turn("human", "Hi"), Turn("gpt", "Hello"))


def test_answers_may_lack_at_inference():
  for raw in (_raw("Hi"), _raw("Hi", "")):
    with pytest.raises(UserError):
      parse_record(raw, "here")
    assert parse_record(raw, "here", require_answer=False).turns
  raw = _raw("Hi", "Hello", "Why?")
  assert len(parse_record(raw, "here").turns) == 2
  assert len(parse_record(raw, "here", require_answer=False).turns) == 3


HUMAN = {"from": "human", "value": "a"}
BAD = {
  "not an object": ("text", "expected an object .* found str"),
  "id in a list": ({**VIDEO, "id": [1]}, "'id' must be .* found"),
  "bool id": ({**VIDEO, "id": True}, "'id' must be .* found True"),
  "no turns": ({"id": 1}, "'conversations' must be .* found None"),
  "empty turns": (_raw(), r"'conversations' must be .* found \[\]"),
  "only gpt": (_raw("a", first="gpt"), "only one gpt turn"),
  "no value": (
    {"id": 1, "conversations": [{"from": "human"}]},
    "turn 0 must be",
  ),
  "unknown role": (
    {"id": 1, "conversations": [{"from": "system", "value": "a"}]},
    "turn 0 is from 'system', expected 'human'",
  ),
  "two humans": (
    {"id": 1, "conversations": [HUMAN, HUMAN]},
    "the last turn is from human",
  ),
  "no answer": (_raw("a"), "the last turn is from human"),
  "empty answer": (_raw("a", " ", "b", "\n"), "all 2 gpt answers are empty"),
  "both": ({**VIDEO, "image": "a.png"}, "both 'video' .*b.mp4.*a.png"),
  "empty path": ({**VIDEO, "video": ""}, "'video' must be a path"),
  "no images": (_raw("a", "b", image=[]), "'image' must be a path"),
  "number": (_raw("<image>", "b", image=3), "'image' must be .* found 3"),
  "two videos": ({**VIDEO, "video": ["a", "b"]}, "2 videos, 1 expected"),
  "too few": (_raw("<image>", "b", image=["a"] * 3), "1 <image> .* but 3 imag"),
  "text marker": (_raw("<image>", "b"), "1 <image> .* but 0 media"),
  "answer marker": (_raw("a", "<image>", image="a"), "<image> in a gpt answer"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_records(name):
  raw, message = BAD[name]
  with pytest.raises(UserError, match=message) as error:
    parse_record(raw, "list.json[4]")
  assert str(error.value).startswith("list.json[4]")


@settings(deadline=None)
@given(
  st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda x: (
      st.lists(x, max_size=3)
      | st.dictionaries(
        st.sampled_from(
          [
            *("id", "sample_id", "video", "videos", "image", "clip", "role"),
            *("conversations", "messages", "from", "value", "content"),
          ]
        ),
        x,
        max_size=5,
      )
    ),
    max_leaves=12,
  )
)
def test_anything_is_a_record_or_a_user_error(raw):
  try:
    record = parse_record(raw, "here")
  except UserError:
    return
  assert record.turns[-1].role == "gpt"


def test_check_media(tmp_path):
  (tmp_path / "in").mkdir()
  (tmp_path / "in" / "a.mp4").touch()
  (tmp_path / "out.mp4").touch()
  root = tmp_path / "in"

  def record(name, media):
    raw = _raw("<image>" * len(media), "b", image=media)
    return parse_record({**raw, "id": name}, "here")

  text = parse_record(_raw("a", "b"), "here")
  good = record("good", ["a.mp4", str(root / "a.mp4")])
  bad = [
    record("missing", ["a.mp4", "b.mp4"]),
    record("outside", ["../out.mp4"]),
    record("absolute", [str(tmp_path / "out.mp4")]),
  ]
  kept, skipped = check_media([text, *bad, good], root)
  assert kept == [text, good]
  assert [s.id for s in skipped] == ["missing", "outside", "absolute"]
  assert isinstance(skipped[0], Skipped)
  assert f"{root / 'b.mp4'} does not exist" in skipped[0].reason
  assert "lies outside" in skipped[1].reason
  assert "lies outside" in skipped[2].reason
  with pytest.raises(UserError, match=r"media folder .* does not exist"):
    check_media([], tmp_path / "none")


@pytest.mark.parametrize("name", ["../a.jpg", "x" * 300 + ".parquet/image/1"])
def test_odd_names_of_media_are_problems_of_their_own(
  tmp_path, monkeypatch, name
):
  (tmp_path / "a.jpg").touch()
  (tmp_path / "in").mkdir()
  monkeypatch.chdir(tmp_path / "in")
  for root in (".", tmp_path / "in"):
    found = records.media_problem(root, name)
    assert ("lies outside" if ".." in name else "does not exist") in found
