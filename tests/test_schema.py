"""Files from outside: what does not fit is refused by name."""

import json

import pydantic
import pytest

from hourjax import schema
from hourjax.errors import UserError


class _Inner(schema.Schema):
  size: int


class _Outer(schema.Schema):
  name: str
  share: float = 1.0
  inner: _Inner | None = None
  numbers: list[int] = pydantic.Field(default_factory=list)


REMEDY = "write it again"


def _read(tmp_path, content):
  path = tmp_path / "a.json"
  path.write_bytes(content if isinstance(content, bytes) else content.encode())
  return schema.read_schema(_Outer, path, remedy=REMEDY)


def test_what_fits_is_read(tmp_path):
  text = '{"name": "a", "share": 1, "inner": {"size": 3}, "more": [[]]}'
  read = _read(tmp_path, b"\xef\xbb\xbf" + text.encode())
  assert read == _Outer(name="a", share=1.0, inner=_Inner(size=3))


@pytest.mark.parametrize(
  ("content", "said"),
  [
    ("", "not JSON"),
    ('{"name": ', "not JSON"),
    ("[]", "the whole is []"),
    ("null", "the whole is None"),
    ("{}", "name is missing"),
    ('{"name": 3}', "name is 3"),
    ('{"name": "a", "share": "1"}', "share is '1'"),
    ('{"name": "a", "share": NaN}', "share is nan"),
    ('{"name": "a", "share": 1e999}', "share is inf"),
    ('{"name": "a", "inner": {"size": true}}', "inner.size is True"),
    ('{"name": "a", "inner": {"size": 1.5}}', "inner.size is 1.5"),
    ('{"name": "a", "numbers": [1, null]}', "numbers.1 is None"),
    ('{"name": "a", "numbers": [' + '"x",' * 9 + '"x"]}', "and 5 more"),
    ('{"name": "a", "inner": ' + "[" * 100_000, "nested too deep"),
    ('{"name": ' + "9" * 5000 + "}", "not JSON"),
    ("\x80".encode("latin-1"), "not UTF-8 text (byte 0)"),
    ("version https://git-lfs.github.com/spec/v1\noid sha256:0", "git lfs"),
  ],
)
def test_what_does_not_fit_is_refused(tmp_path, content, said):
  with pytest.raises(UserError) as error:
    _read(tmp_path, content)
  assert said in str(error.value) and "a.json" in str(error.value)
  assert len(str(error.value)) < 700 + len(str(tmp_path))


def test_what_is_no_file_is_refused(tmp_path):
  big = tmp_path / "big.json"
  big.write_text(json.dumps(["a" * 100]))
  for path, said in [
    (tmp_path, "is a folder"),
    ("/dev/zero", "no regular file"),
    (tmp_path / "none.json", "does not exist"),
    (tmp_path / ("a" * 300), "cannot read"),
    ("a\0b", "cannot read"),
  ]:
    with pytest.raises(UserError, match=said):
      schema.read_json(path, remedy=REMEDY)
  with pytest.raises(UserError, match="more than 50 bytes"):
    schema.read_json(big, remedy=REMEDY, most=50)
