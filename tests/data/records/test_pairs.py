"""Pairs of answers in the forms in which others write them."""

import pytest

from hourjax.data.records.record import Turn, parse_record
from hourjax.errors import UserError

ASK = {"from": "human", "value": "What colour?"}
SAID = {"from": "gpt", "value": "red"}
NAME = {"id": "r", "video": "v.mp4"}
MESSAGES = [{"role": "user", "content": "What colour?"}]


def _said(text):
  return {"role": "assistant", "content": text}


@pytest.mark.parametrize(
  "raw",
  [
    {"conversations": [ASK, {**SAID, "rejected": "blue"}]},
    {"conversations": [ASK, SAID], "rejected": "blue"},
    {"conversations": [ASK, SAID],
     "rejected": {"from": "gpt", "value": "blue"}},
    {"prompt": "What colour?", "chosen": "red", "rejected": "blue"},
    {"question": "What colour?", "chosen": "red", "rejected": "blue"},
    {"chosen": [*MESSAGES, _said("red")],
     "rejected": [*MESSAGES, _said("blue")]},
    {"conversations": [ASK], "chosen": SAID,
     "rejected": {"from": "gpt", "value": "blue"}},
    {"messages": MESSAGES, "chosen": _said("red"), "rejected": _said("blue")},
  ],
)  # fmt: skip
def test_forms(raw):
  record = parse_record(NAME | raw, "here")
  assert record.turns == (Turn("human", "What colour?"), Turn("gpt", "red"))
  assert record.rejected == "blue"
  assert set(record.extra) == {"rejected"}


@pytest.mark.parametrize("extra", [{}, {"rejected": None}, {"rejected": True}])
def test_a_record_that_is_no_pair(extra):
  record = parse_record(NAME | {"conversations": [ASK, SAID]} | extra, "here")
  assert record.rejected is None and record.extra == extra


@pytest.mark.parametrize(
  ("raw", "said"),
  [
    ({"prompt": "Why?", "chosen": "red"},
     "'chosen' is 'red' and there is no 'rejected'; add the answer"),
    ({"conversations": [ASK, {**SAID, "rejected": " "}]},
     "the rejected answer is ' '; it must be text that is not empty"),
    ({"conversations": [ASK, {**SAID, "rejected": None}]},
     "turn 1 has a rejected answer that is null"),
    ({"conversations": [ASK, SAID], "rejected": "red "},
     "the chosen answer and the rejected one are both 'red '"),
    ({"conversations": [ASK, {**SAID, "rejected": "blue"}, ASK, SAID]},
     "turn 1 of 4 has a rejected answer; only the last turn may"),
    ({"chosen": [*MESSAGES, _said("red")], "rejected": [_said("blue")]},
     "a pair answers one question"),
    ({"prompt": "Why?", "chosen": "", "rejected": "blue"},
     "the chosen answer is ''; it must be text"),
    ({"prompt": "Why?", "chosen": "red", "rejected": []},
     "the rejected answer is []; it must be text"),
  ],
)  # fmt: skip
def test_messages(raw, said):
  with pytest.raises(UserError) as caught:
    parse_record(NAME | raw, "file.json[3]")
  assert said in str(caught.value)
  assert str(caught.value).startswith("file.json[3]: record r: ")
