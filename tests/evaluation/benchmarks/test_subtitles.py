import numpy as np
import pytest

from hourjax.evaluation.benchmarks import subtitles


def _read(tmp_path, text, encoding="utf-8"):
  path = tmp_path / "a.srt"
  path.write_bytes(text.encode(encoding))
  return subtitles.read_srt(path)


@pytest.mark.parametrize(
  ("text", "said"),
  [
    # Numbers, times, empty lines, both kinds of line ends.
    ("1\n00:00:00,000 --> 00:00:01,000\nHi\n\n2\n00:00:01,000 --> x\nyou\n",
     "Hi\nyou"),
    ("1\r\n00:00:00,000 --> 00:00:01,000\r\nHi\r\nyou\r\n\r\n", "Hi\nyou"),
    ("00:00:00,000 --> 00:00:01,000\nno number\n", "no number"),
    # A number that is said stays.
    ("1\n00:00:00,000 --> 1\n42\n\n2\n00:00:01,000 --> 2\n43\n", "42\n43"),
    ("1\n0 --> 1\nten\n\n11\n\n2\n1 --> 2\nb\n", "ten\n11\nb"),
    # Markup, entities, spaces.
    ('1\n0 --> 1\n<font color="white" size=".72c">Hi <i>you</i></font>\n',
     "Hi you"),
    ("1\n0 --> 1\n{\\an8}up  here &amp; there\n", "up here & there"),
    ("1\n0 --> 1\n{not a tag} 3 < 5\n", "{not a tag} 3 < 5"),
    # A line that repeats the one before it, as in rolling captions.
    ("1\n0 --> 1\na\n\n2\n1 --> 2\na\nb\n\n3\n2 --> 3\nb\nc\n", "a\nb\nc"),
    ("1\n0 --> 1\na\n\n2\n1 --> 2\nb\n\n3\n2 --> 3\na\n", "a\nb\na"),
    # Nothing said.
    ("", None),
    ("\n\n", None),
    ("1\n0 --> 1\n<i></i>\n", None),
  ],
)  # fmt: skip
def test_srt(text, said, tmp_path):
  assert _read(tmp_path, text) == said


def test_no_file(tmp_path):
  assert subtitles.read_srt(tmp_path / "none.srt") is None


@pytest.mark.parametrize("encoding", ["utf-8-sig", "latin-1"])
def test_encodings(encoding, tmp_path):
  said = _read(tmp_path, "1\n0 --> 1\nna\u00efve\n", encoding)
  assert said is not None and said.startswith("na") and said.endswith("ve")
  assert ("\u00ef" in said) == (encoding == "utf-8-sig")


def test_short_texts_are_whole():
  lines = [f"{i:09}" for i in range(4000)]
  assert subtitles.join(lines) == "\n".join(lines)


def test_long_texts_are_thinned_evenly():
  lines = [f"{i:09}" for i in range(9000)]
  kept = subtitles.join(lines).split("\n")
  numbers = np.array([int(line) for line in kept])
  assert len("\n".join(kept).encode()) <= subtitles.LIMIT
  assert len(kept) == 4000  # of ten bytes each with their line end
  assert (numbers[0], numbers[-1]) == (0, 8999)
  assert set(np.diff(numbers)) == {2, 3}


def test_the_limit_is_in_bytes():
  lines = ["\u4f60\u597d" * 10 + str(i) for i in range(2000)]
  said = subtitles.join(lines)
  assert 0.95 * subtitles.LIMIT < len(said.encode()) <= subtitles.LIMIT


@pytest.mark.parametrize("count", [1, 2, 3])
def test_lines_too_long_for_any_limit(count):
  lines = [str(i) * 30_000 for i in range(count)]
  said = subtitles.join(lines)
  assert said == "0" * 30_000


def test_a_single_line_too_long():
  assert subtitles.join(["x" * 50_000]) is None
