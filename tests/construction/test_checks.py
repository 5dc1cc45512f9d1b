"""Rules that questions must keep."""

import collections
import json

import pytest

from hourjax.construction import checks
from hourjax.construction.checks import Benchmarks, Question
from hourjax.errors import UserError


def _question(text, answer="a red hat", options=()):
  return Question("task", "topic", text, answer, tuple(options))


def _choice(text, *options):
  return _question(text, options[0], options)


@pytest.mark.parametrize(
  "text, placed, anywhere",
  [
    ("At 1:30, for 20 seconds", [90], [20, 90]),
    ("What is seen after 1:02:03?", [3723], [3723]),
    ("in minute 5, or 2.5 minutes later", [300], [150, 300]),
    ("between 30 and 45 s, until 2 h", [45, 7200], [45, 7200]),
    ("after 1,500 seconds, at the 90-second mark", [90, 1500], [90, 1500]),
    ("It lasts for 3 minutes.", [], [180]),
    ("The final score is 21:15.", [], [1275]),
    ("The recipe says 45 minutes.", [], [2700]),
    ("cars of the 1980s, from the 1990s", [], []),
    ("five people and 12 cups of 3 sorts", [], []),
    ("the ratio 16:9, John 3:16", [], [196]),
  ],
)
def test_times_that_a_text_names(text, placed, anywhere):
  assert checks.seconds_named(text) == placed
  assert checks.seconds_named(text, anywhere=True) == anywhere


def test_times_beyond_the_end():
  late = _choice("When is it?", "0:10", "0:20", "5:30", "0:40")
  assert checks.times_fault(late, 300) and not checks.times_fault(late, 330)
  assert checks.times_fault(_question("What is at 10:00?"), 599) is None
  assert checks.times_fault(_question("What is at 10:00?"), 590)
  duration = Question("temporal_perception", "t", "What?", "About 3 minutes.")
  assert checks.times_fault(duration, 150)
  # Nothing of these is a time of the video.
  score = _choice("What is the final score?", "21:15", "16:10", "9:04", "2:01")
  clock = _choice("What does the clock show?", "10:15", "9:30", "8:00", "1:00")
  shop = _question("What is written on the shop?", "24-hour service")
  recipe = _question("How does he bake it?", "For 45 minutes, on a low heat.")
  for question in (score, clock, shop, recipe):
    assert checks.times_fault(question, 180) is None


@pytest.mark.parametrize(
  "options, fault",
  [
    (("a cat", "a dog", "a cow", "an owl"), None),
    (("a cat", "a dog", "A cat.", "an owl"), "options are equal"),
    (("a cat", "a dog", "a cow", "All of the above"), "speaks of others"),
    (("a cat", "a dog", "Both A and B", "an owl"), "speaks of others"),
    (("a cat", "a dog", "none of these", "an owl"), "speaks of others"),
    (("C", "C++", "C#", "D"), None),
    (("$5", "5%", "-5", "5"), None),
    (("He throws all of them away", "Both of them", "One", "Two"), None),
    (("a cat", "a dog", "B or C", "an owl"), "speaks of others"),
    (("Both men leave", "All guests sing", "None", "Vitamin B and D"), None),
  ],
)
def test_options(options, fault):
  found = checks.options_fault(_choice("Which?", *options))
  assert (found is None) if fault is None else fault in found


@pytest.mark.parametrize(
  "question, leaks",
  [
    (_question("What colour is the red hat?", "Red."), True),
    (_question("What colour is the hat?", "Red."), False),
    (_question("Which is first, the oven or the sink?", "The oven."), False),
    (_question("Is there a dog?", "Yes."), False),
    (_question("Is the answer yes?", "Yes."), False),
    (_question("How many of the four dogs jump?", "Four."), False),
    (_question("Which hand holds the left handle?", "The left hand."), False),
    (_choice("What does he cut the rope with?", "a rope", "b", "c", "d"), True),
    (
      _choice("Of the knife and the saw, which is first?",
              "the knife", "the saw", "an axe", "a file"),
      False,
    ),
    (_question("Why does he run?", "He runs since the bus is leaving."), False),
  ],
)  # fmt: skip
def test_leaks(question, leaks):
  assert bool(checks.leak_fault(question)) == leaks


def test_repetitions():
  same = [
    "What does the man in the red hat hold?",
    "What is the man with a red hat holding?",
    "During the video, what does the man in the red hat hold?",
  ]
  other = [
    "What does the man in the blue hat hold?",
    "What does the woman in the red hat hold?",
    "What does the man in the red hat hold before he leaves?",
    "What does the man in the red hat hold after he leaves?",
  ]
  found = checks.repetitions(
    [_question(text, "A cup.") for text in (*same, *other)]
  )
  assert found == {1, 2}
  # The same words with another answer, or in the other format, are another.
  assert not checks.repetitions(
    [_question(same[0], "A cup."), _question(same[1], "An umbrella.")]
  )
  assert not checks.repetitions(
    [
      _question(same[0], "A cup."),
      _choice(same[0], "A cup.", "A fork.", "A rope.", "A key."),
    ]
  )


def test_letters_are_balanced_and_repeatable():
  questions = [
    _choice(f"Number {i}?", "right", "one", "two", "three") for i in range(400)
  ]
  shuffled = checks.shuffle(questions, "a.mp4")
  letters = collections.Counter(question.letter for question in shuffled)
  assert set(letters.values()) == {100}
  for question in shuffled:
    assert set(question.options) == {"right", "one", "two", "three"}
  assert shuffled == checks.shuffle(questions, "a.mp4")
  assert shuffled != checks.shuffle(questions, "b.mp4")
  ones = [question.options.index("one") for question in shuffled]
  others = collections.Counter(ones)
  assert min(others.values()) > 60


def test_benchmarks_videos_are_found_by_name():
  known = Benchmarks(videos=["abc-DEF_123.mp4", "clips/movie7.mkv"])
  for name in ("abc-DEF_123.webm", "yt/v_abc-DEF_123.mp4", "movie7.mp4"):
    assert known.has_video(name)
  for name in ("abc-DEF_124.mp4", "movie77.mp4", "other.mp4", "movie7b.mp4"):
    assert not known.has_video(name)


def test_benchmarks_questions_are_found_by_their_words():
  options = ("a copper kettle", "a wooden crate", "a paper lantern", "a rope")
  known = Benchmarks(
    questions=[
      ("What does the sailor carry onto the upper deck at dawn?", options),
      ("What is he doing?", ()),
    ]
  )
  assert known.has_question(
    _question("What is the sailor carrying onto the upper deck at dawn?")
  )
  assert known.has_question(
    _choice("What does the sailor carry at dawn?", *options)
  )
  for question in (
    _question("What does the sailor carry off the lower deck at night?"),
    _question("What is he doing?"),  # too few words to be anyone's
    _choice("What does the sailor carry?", "a fork", "b cup", "c ink", "d owl"),
    _choice("Which is hung up?", "a rope", "a towel", "a paper bag", "a flag"),
  ):
    assert not known.has_question(question)


def test_many_benchmark_questions_are_searched_quickly():
  """A rare word of each leads to it; none is compared with all."""
  texts = [
    f"What does person{i} put on table{i % 97} in room{i % 89} of {i % 83}?"
    for i in range(20_000)
  ]
  known = Benchmarks(questions=[(text, ()) for text in texts])
  assert all(known.has_question(_question(text)) for text in texts[::40])
  assert not any(
    known.has_question(_question(text.replace("person", "pet")))
    for text in texts[::40]
  )


def test_annotation_files_are_read(tmp_path):
  rows = [
    {"video_id": "001", "videoID": "abc-DEF_123", "options": ["A. x", "B. y"],
     "url": "https://www.youtube.com/watch?v=xyz-DEF_123&t=10s",
     "question": "Who opens the gate of the farm?"},
    {"key": "tale9", "qa": [
      {"question": "Where do the two young sisters sleep that cold night?"
       "\n(A) In a barn\n(B) In a tent"}]},
  ]  # fmt: skip
  path = tmp_path / "benchmark.jsonl"
  path.write_text("\n".join(map(json.dumps, rows)))
  names = tmp_path / "names.txt"
  names.write_text("one.mp4\n\ntwo\nhttps://youtu.be/pqr-DEF_123?t=5\n")
  known = checks.read_benchmarks([str(path), str(names)])
  found = ("abc-DEF_123", "xyz-DEF_123", "pqr-DEF_123", "tale9", "one", "two")
  for name in found:
    assert known.has_video(f"{name}.mp4")
  assert not known.has_video("001.mp4") and not known.has_video("10s.mp4")
  night = "Where do the two young sisters sleep that cold night?"
  assert known.has_question(_question(night, "In a barn"))
  assert known.has_question(
    _question("Who is opening the gate of this farm?")
  ) is (False)  # too few words
  empty = tmp_path / "empty.jsonl"
  empty.write_text('{"a": 1}\n')
  with pytest.raises(UserError, match="its columns are a"):
    checks.read_benchmarks([str(empty)])
  with pytest.raises(UserError, match=r"none\.jsonl"):
    checks.read_benchmarks([str(tmp_path / "none.jsonl")])
