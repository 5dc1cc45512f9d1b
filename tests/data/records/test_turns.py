"""Reading of a record's turns, by the table in `data/records/turns.py`."""

import copy
import random

import pytest

from hourjax.data.records.record import parse_record
from hourjax.data.records.turns import MARKER, SYSTEM
from hourjax.errors import UserError

ONE, TWO = {"image": "a.png"}, {"image": ["a.png", "b.png"]}
VIDEO = {"video": "a.mp4"}


def _raw(*values, **fields):
  roles = ("human", "gpt")
  turns = [{"from": roles[i % 2], "value": v} for i, v in enumerate(values)]
  return {"id": "r", "conversations": turns, **fields}


def _texts(raw):
  record = parse_record(raw, "here")
  return [turn.text for turn in record.turns], set(record.repairs)


ADDED = "no marker: put in front"
MOVED = "marker moved to the front"
JOINED = "several markers for one"
FORM = "marker of another form"
READ = {
  "one image, none": (_raw("Who?", "Ann", **ONE), "<image>\nWho?", {ADDED}),
  "an empty question": (_raw("", "Ann", **ONE), "<image>\n", {ADDED}),
  "two images, none": (
    _raw("Same?", "No", **TWO),
    "<image>\n<image>\nSame?",
    {ADDED},
  ),
  "last": (_raw("Who?<image>", "Ann", **ONE), "<image>\nWho?", {MOVED}),
  "in between": (
    _raw("Is <image> red?", "No", **ONE),
    "<image>\nIs  red?",
    {MOVED},
  ),
  "in front": (_raw("<image>Who? ", "Ann", **ONE), "<image>Who? ", {}),
  "twice": (
    _raw("<image>\nThis <image>?", "A", **ONE),
    "<image>\nThis ?",
    {JOINED},
  ),
  "three times": (_raw("<image><image><image>", "A", **ONE), MARKER, {JOINED}),
  "Image": (_raw("<Image>\nWho?", "Ann", **ONE), "<image>\nWho?", {FORM}),
  "spaced": (
    _raw("Who? < image />", "Ann", **ONE),
    "<image>\nWho?",
    {FORM, MOVED},
  ),
  "noise": (
    _raw("<image>QA_GT_caption_based_noisy\nWho?", "Ann", **ONE),
    "<image>\nWho?",
    {},
  ),
  "video, none": (_raw("Who?", "Ann", **VIDEO), "Who?", {ADDED}),
  "video, twice": (
    _raw("<image>\n<image>\nWho?", "Ann", **VIDEO),
    "<image>\n<image>\nWho?",  # `encode_conversation` removes them
    {JOINED},
  ),
  "<video>": (_raw("<video>\nWho?", "Ann", **VIDEO), "<image>\nWho?", {FORM}),
  "<video> beside": (
    _raw("<image>\nWhat is <video>?", "A tag", **VIDEO),
    "<image>\nWhat is <video>?",
    {},
  ),
  "a word": (
    _raw("What is <image> in LLaVA?", "A slot."),
    "What is <image> in LLaVA?",
    {"<image> in a text: words"},
  ),
  "a tag": (
    _raw("Is <video> HTML?", "Yes: <image>"),
    "Is <video> HTML?",
    {"<image> in a text: words"},
  ),
  "empty image": (
    _raw("Hi", "Hello", image=""),
    "Hi",
    {"empty image: text"},
  ),
}


@pytest.mark.parametrize("name", READ)
def test_first_turn(name):
  raw, text, repairs = READ[name]
  texts, found = _texts(raw)
  assert (texts[0], found) == (text, set(repairs))


def _official(turns):
  """What sharding and `preprocess_multimodal` make of one image's turns."""
  turns = copy.deepcopy(turns)
  if not any(MARKER in turn["value"] for turn in turns):
    turns[0]["value"] = f"{MARKER}\n{turns[0]['value']}"
  for turn in turns:
    text = turn["value"]
    if text.count(MARKER) == 1 and not text.startswith(MARKER):
      text = f"{MARKER}\n{text.replace(MARKER, '').strip()}".strip()
    turn["value"] = text
  return [turn["value"] for turn in turns]


def test_what_the_official_loader_reads_is_read_alike():
  rng = random.Random(0)
  for _ in range(500):
    parts = ["\n", " ", "Who is it?", "a b", "", "  x", "é\n"]
    values = [
      "".join(rng.choices(parts, k=rng.randrange(4))) + ("." if i % 2 else "")
      for i in range(2 * rng.randrange(1, 4))
    ]
    if rng.random() < 0.7:
      at = 2 * rng.randrange(len(values) // 2)
      cut = rng.randrange(len(values[at]) + 1)
      values[at] = values[at][:cut] + MARKER + values[at][cut:]
    raw = _raw(*values, image=rng.choice(["a", ["a"]]))
    assert _texts(raw)[0] == _official(raw["conversations"])


def test_markers_of_one_image_in_several_turns():
  raw = _raw("Hi", "Hi.", "Is <image> red?", "No", "<image>\nAnd?", "So", **ONE)
  texts, repairs = _texts(raw)
  assert texts[::2] == ["Hi", "<image>\nIs  red?", "And?"]
  assert repairs == {JOINED, MOVED}


def test_markers_of_several_images_stay():
  together = "First <image> and then <image>."
  raw = _raw(together, "No", "Or\n<image>?", "Yes", image=["a", "b", "c"])
  texts, repairs = _texts(raw)
  assert texts[::2] == [together, "<image>\nOr\n?"]
  assert repairs == {MOVED}


def _turn(role, text, keys=("from", "value")):
  return dict(zip(keys, (role, text)))


HUMAN, GPT = _turn("human", "Hi"), _turn("gpt", "Hello")
CHAT = ("role", "content")
TALKS = {
  "answer first": ([GPT, HUMAN, GPT], "hg", "answer before the first question"),
  "question last": ([HUMAN, GPT, HUMAN], "hg", "last question without answer"),
  "two questions": ([HUMAN, HUMAN, GPT], "hhg", "turns of one side in a row"),
  "two answers": ([HUMAN, GPT, GPT], "hgg", "turns of one side in a row"),
  "role and content": (
    [_turn("user", "a", CHAT), _turn("assistant", "b", CHAT)],
    "hg",
    "turns by role and content",
  ),
  "user and assistant": (
    [_turn("User", "a"), _turn("ASSISTANT ", "b")],
    "hg",
    "roles of another name",
  ),
  "usual system turn": (
    [_turn("system", f"{SYSTEM}\n"), HUMAN, GPT],
    "hg",
    "usual system turn left out",
  ),
}


@pytest.mark.parametrize("name", TALKS)
@pytest.mark.parametrize("key", ["conversations", "messages", "conversation"])
def test_who_speaks(name, key):
  turns, roles, repair = TALKS[name]
  record = parse_record({"id": 1, key: turns}, "here")
  assert "".join(turn.role[0] for turn in record.turns) == roles
  assert record.repairs == (repair,)
  assert record.extra == {}


def test_the_last_question_stays_at_inference():
  raw = {"id": 1, "conversations": [HUMAN, GPT, HUMAN]}
  record = parse_record(raw, "here", require_answer=False)
  assert len(record.turns) == 3


IDS = [
  ({"id": "a"}, "a", ()),
  ({"id": 0}, "0", ()),
  ({"id": 1.5}, "1.5", ()),
  ({"sample_id": 7}, "7", ("sample_id as id",)),
  ({"id": None, "sample_id": "x"}, "x", ("sample_id as id",)),
  ({}, "list.json[4]", ("no id: numbered",)),
  ({"id": None}, "list.json[4]", ("no id: numbered",)),
  ({"id": ""}, "list.json[4]", ("no id: numbered",)),
]


@pytest.mark.parametrize("given, name, repairs", IDS)
def test_ids(given, name, repairs):
  raw = {"conversations": [HUMAN, GPT], **given}
  record = parse_record(raw, "/some/where/list.json[4]")
  assert (record.id, record.repairs, record.extra) == (name, repairs, {})


BAD = {
  "fewer markers": (_raw("<image>", "b", **TWO), "1 <image> .* but 2 image"),
  "more markers": (_raw("<image>" * 3, "b", **TWO), "3 <image> .* but 2 image"),
  "text that lacks its image": (_raw("<image>\nRed?", "b"), "but 0 media"),
  "the same, last": (_raw("Red?\n<image>", "b"), "but 0 media"),
  "text that lacks its video": (_raw("<video>\nRed?", "b"), "but 0 media"),
  "an answer that sees": (_raw("a", "<image>", **ONE), "in a gpt answer"),
  "Qwen's marker": (_raw("<|image_pad|>Red?", "b", **ONE), "another model's"),
  "sound": (_raw("<audio>\nLoud?", "b", **VIDEO), "another model's marker"),
  "system": (
    {"id": 1, "conversations": [_turn("system", "Be kind."), HUMAN, GPT]},
    "turn 0 is from 'system', expected 'human'.*put its words into the",
  ),
  "system later": (
    {"id": 1, "conversations": [HUMAN, _turn("system", "Be kind."), GPT]},
    "turn 1 is from 'system'",
  ),
  "a tool": (
    {"id": 1, "conversations": [HUMAN, _turn("tool", "3"), GPT]},
    "turn 1 is from 'tool', expected human or gpt",
  ),
  "two answers first": (
    {"id": 1, "conversations": [GPT, GPT]},
    "must come fir",
  ),
  "number": (_raw("a", 3, **ONE), "turn 1 must be .* found"),
  "parts": (_raw([{"type": "text"}], "b"), "turn 0 must be"),
  "id is a list": ({"id": [], "conversations": [HUMAN, GPT]}, "'id' must be"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_refused(name):
  raw, message = BAD[name]
  with pytest.raises(UserError, match=message) as error:
    parse_record(raw, "list.json[4]")
  assert str(error.value).startswith("list.json[4]")
