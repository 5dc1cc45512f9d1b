import json
import random
import tempfile

import pytest

from hourjax.data.records import json_stream
from hourjax.data.records.json_stream import BrokenJson, parse, stream_list


def _read(text, start=0):
  content = text if isinstance(text, bytes) else text.encode()
  with tempfile.TemporaryFile() as file:
    file.write(content)
    file.seek(start)
    return list(stream_list(file, start))


def _random(rng, depth=0):
  kind = rng.randrange(8 if depth < 4 else 6)
  if kind == 6:
    return [_random(rng, depth + 1) for _ in range(rng.randrange(4))]
  if kind == 7:
    keys = ["a", "]", '"', "\\", "é{", "b c"]
    return {k: _random(rng, depth + 1) for k in rng.sample(keys, 3)}
  text = "".join(rng.choices('ab"\\{}[],: \n\u2028é😀', k=rng.randrange(9)))
  return [None, True, rng.random() * 1e9, rng.getrandbits(60), text, -3][kind]


@pytest.mark.parametrize("block", [1, 7, 64, 1 << 16])
def test_lists_read_as_json_reads_them(monkeypatch, block):
  monkeypatch.setattr(json_stream, "_BLOCK", block)
  rng = random.Random(block)
  for _ in range(60):
    items = [_random(rng) for _ in range(rng.randrange(6))]
    text = json.dumps(
      items, ensure_ascii=rng.random() < 0.5, indent=rng.choice((None, 1))
    )
    text = rng.choice(("", " \n")) + text + rng.choice(("", "\r\n "))
    assert _read(text) == [("", item) for item in items]
    rest = {"version": 1, "about": {"a": [1]}, "]": "["}
    wrapped = json.dumps({**rest, "data": items, "end": None})
    assert _read(wrapped) == [("data", item) for item in items]


@pytest.mark.parametrize(
  "text", ["NaN", "Infinity", "-Infinity", "1e999", "-1e999", "9" * 5000]
)
def test_numbers_that_are_no_numbers_are_missing(text):
  assert parse(text) is None
  assert _read(f'[{{"a": {text}}}, {text}, 2]') == [
    ("", {"a": None}),
    ("", None),
    ("", 2),
  ]


@pytest.mark.parametrize("text", ["1.5", "-0.0", "1e3", str(10**400), '"NaN"'])
def test_other_numbers_are_as_json_has_them(text):
  assert parse(text) == json.loads(text)


BROKEN = {
  "": ("expected '[', not the end", 0),
  "x": ("expected '[', not 'x'", 0),
  "[1, 2": ("expected ',', not the end", 5),
  "[1 2]": ("expected ',', not '2'", 3),
  "[1,]": ("a comma before the closing bracket", 3),
  "[,1]": ("expected a value", 1),
  '["a': ("expected a value", 1),
  '[{"a": "b]': ("the file ends within a value", 10),
  '[{"a": tru}]': ("Expecting value at character 6", 11),
  "[{]]": ("Expecting property name", 3),
  "[1] [2]": ("something follows the end", 4),
  '[{"a": 1}{"a": 2}]': ("expected ',', not '{'", 9),
  "{'a': []}": ("expected a key in quotes", 1),
  '{"a": [1], }': ("expected a key in quotes", 11),
  "[" * 5000: ("the file ends within a value", 5000),
  "[" * 70 + "]" * 70: ("nested too deep", 139),
  "[" * 9000 + "]" * 9000: ("nested too deep", 17999),
}


@pytest.mark.parametrize("block", [1, 1 << 16])
@pytest.mark.parametrize("text", BROKEN, ids=lambda t: t[:20])
def test_broken_lists_tell_where(monkeypatch, text, block):
  monkeypatch.setattr(json_stream, "_BLOCK", block)
  reason, byte = BROKEN[text]
  with pytest.raises(BrokenJson) as error:
    _read(text)
  assert reason in error.value.reason
  assert error.value.byte == byte


@pytest.mark.parametrize(
  "text, keys",
  [
    ("{}", {}),
    ('{"a": {"b": [1]}}', {"a": False}),
    ('{"a": [1], "b": [2]}', {"a": True, "b": True}),
  ],
)
def test_objects_without_one_list(text, keys):
  with pytest.raises(KeyError) as error:
    _read(text)
  assert error.value.args[0] == keys


@pytest.mark.parametrize("block", [1, 3, 1 << 16])
def test_bytes_that_are_not_utf8(monkeypatch, block):
  monkeypatch.setattr(json_stream, "_BLOCK", block)
  for text in (b'["a\xff"]', b'["\xff', b'[{"k": "\xc3\xa9", "a": "\xff"}]'):
    with pytest.raises(UnicodeDecodeError) as error:
      _read(text)
    assert error.value.start == text.index(b"\xff")


def test_one_value_is_bounded(monkeypatch):
  monkeypatch.setattr(json_stream, "_BLOCK", 10)
  monkeypatch.setattr(json_stream, "MOST", 1000)
  assert len(_read(json.dumps(["a" * 400] * 9))) == 9
  for text in ('["' + "a" * 5000, '[{"a": "' + "a" * 5000 + '"}]'):
    with pytest.raises(BrokenJson, match="a value of more than"):
      _read(text)
