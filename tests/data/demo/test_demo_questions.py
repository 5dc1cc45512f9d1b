"""Answers are computed anew here, second by second from the question text."""

import collections
import re

import pytest

from configs import demo
from hourjax.data.columns import measure_record
from hourjax.data.demo import build, script, world
from hourjax.data.demo.tokenizer import train_tokenizer
from hourjax.data.records.record import parse_record
from hourjax.data.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def asked():
  """(script, question text, facts) of 60 videos of all durations."""
  writer = build.RecordWriter(1, "test")
  out = []
  for i in range(1, 61):
    video = script.make_script(1, "test", i, ((180, 360), (600, 3600))[i % 2])
    for record in writer.test(video):
      text = record["conversations"][0]["value"].removeprefix("<image>\n")
      out.append((video, text.split("\n")[0], record["questions"][0]))
  return out


def _seconds(video):
  """What is on at every second."""
  return [s for s in video.scenes for _ in range(s.start, s.end)]


def _where(scenes, **values):
  return [
    t
    for t, s in enumerate(scenes)
    if all(getattr(s, k) == v for k, v in values.items())
  ]


def _one(values):
  assert len(set(values)) == 1, values
  return next(iter(values))


def _answer(task, scenes, text):
  """The answer to a question; None for tasks not recomputed here."""
  text = text.rstrip("?")
  if task == "duration_perception":
    counts = collections.Counter(s.place for s in scenes)
    return counts.most_common(1)[0][0]
  if task == "temporal_reasoning":
    one, two = re.fullmatch(r"Is the (\w+) .* than the (\w+)", text).groups()
    longer = len(_where(scenes, place=one)) > len(_where(scenes, place=two))
    return "yes" if longer else "no"
  if task == "temporal_gap_estimation":
    one, two = re.search(r"of the (\w+) does the (\w+)", text).groups()
    gap = min(_where(scenes, place=two)) - min(_where(scenes, place=one))
    return f"{gap} seconds"
  if task in ("scene_transition", "action_sequence"):
    place = re.search(r"(?:follows|after) the (\w+)", text)[1]
    after = scenes[max(_where(scenes, place=place)) + 1]
    return after.place if task == "scene_transition" else after.action
  if task == "event_sequence":
    return f"{scenes[0].kind}, {scenes[-1].kind}"
  if task in ("spatial_reasoning", "action_reasoning"):
    field = "side" if task == "spatial_reasoning" else "action"
    one, two = (
      _one([getattr(scenes[t], field) for t in _where(scenes, kind=k, place=p)])
      for k, p in re.findall(r"the (\w+) in the (\w+)", text)
    )
    return f"{one}, {two}: {'yes' if one == two else 'no'}"
  if task == "object_permanence":
    colour, kind, place = re.search(
      r"the (\w+) (\w+) of the (\w+)", text
    ).groups()
    shown = {scenes[t].place for t in _where(scenes, colour=colour, kind=kind)}
    return _one(shown - {place})
  if task == "key_event_extraction":
    found = re.search(r"show an? (.*)", text)[1] in {s.title for s in scenes}
    return "yes" if found else "no"
  if task == "event_summarization":
    return f"{scenes[0].place}, {scenes[-1].place}"
  if task == "object_existence":
    colour, kind = re.search(r"an? (\w+) (\w+) in", text).groups()
    return "yes" if _where(scenes, colour=colour, kind=kind) else "no"
  field = {
    "object_attribute": "colour",
    "action_recognition": "action",
    "spatial_perception": "spot",
  }.get(task)
  if field:
    kind, place = re.search(r"the (\w+) in the (\w+)", text).groups()
    found = _where(scenes, kind=kind, place=place)
    return _one([getattr(scenes[t], field) for t in found])
  return None


def test_answers_computed_anew(asked):
  tasks = collections.Counter()
  for video, text, facts in asked:
    if facts["needle_kind"] in ("clip, order", "clip, word"):
      tasks["clip"] += 1
      _check_clip(video.clip, text, facts)
      continue
    if facts["needle"]:
      needle = video.needle
      assert facts["needle_kind"] == "card"
      assert re.search(r"the (\w+) that", text)[1] == needle.kind
      assert facts["answer"] == needle.colour
      assert facts["seconds"] == list(needle.spans[0])
      assert facts["dropped"] == needle.dropped
      assert facts["format"] == "open" and facts["chance"] == 0.25
      continue
    assert facts["dropped"] is None
    expected = _answer(facts["task"], _seconds(video), text)
    if expected is not None:
      assert facts["answer"] == expected, (video, text)
      tasks[facts["task"]] += 1
  assert len(tasks) == 16, tasks


def _check_clip(clip, text, facts):
  """Looks at every second of the clip."""
  shown = [clip.thing_at(t)[0] for t in range(clip.start, clip.end)]
  expected = {
    "What moves first in the clip?": shown[0],
    "What moves last in the clip?": shown[-1],
    "What does the clip say?": clip.word,
  }[text]
  assert facts["answer"] == expected and facts["chance"] == 0.25
  assert facts["needle"] and facts["dropped"] == clip.dropped
  assert facts["seconds"] == [clip.start, clip.end]


def test_options_have_one_right_answer(asked):
  for _, _, facts in asked:
    options = facts["options"]
    if facts["format"] == "open":
      assert options is None and facts["letter"] is None
      assert 0 < facts["chance"] <= 0.5
      continue
    assert len(set(options)) == 4 and facts["chance"] == 0.25
    assert options["ABCD".index(facts["letter"])] == facts["answer"]


def test_balance_and_coverage(asked):
  facts = [f for _, _, f in asked]
  assert {f["topic"] for f in facts} == {t for t, _ in world.TASKS.values()}
  assert {f["task"] for f in facts} == set(world.TASKS)
  assert len(world.TASKS) == 21
  for key in ("letter", "answer"):
    counts = collections.defaultdict(collections.Counter)
    for f in facts:
      if key == "letter" and f["letter"]:
        counts[f["task"]][f["letter"]] += 1
      elif key == "answer" and f["answer"].endswith(("yes", "no")):
        counts[f["task"]][f["answer"].split()[-1]] += 1
    for task, n in counts.items():
      every = n.values()
      assert len(n) == (4 if key == "letter" else 2), task
      assert max(every) - min(every) <= 1, (task, n)


def test_every_test_video_is_asked_for_its_card_and_its_clip(asked):
  by_video = collections.defaultdict(list)
  for video, _, facts in asked:
    by_video[video.name].append(facts)
  for questions in by_video.values():
    kinds = sorted(f["needle_kind"] for f in questions if f["needle"])
    assert kinds[0] == "card" and kinds[1] in ("clip, order", "clip, word")
    others = [f["task"] for f in questions if not f["needle"]]
    # Each task for which the video has a question.
    assert len(set(others)) == len(others) >= 12
  clips = collections.Counter(f["needle_kind"] for _, _, f in asked)
  assert clips["clip, order"] == clips["clip, word"] == len(by_video) // 2
  colours = collections.Counter(
    f["answer"] for _, _, f in asked if f["needle_kind"] == "card"
  )
  assert set(colours.values()) == {len(by_video) // 4}
  assert set(colours) == set(world.NEEDLE_COLOURS)


@pytest.mark.parametrize("kind", ["lookups", "train", "memory"])
def test_training_conversations(kind):
  writer = build.RecordWriter(0, "train")
  turns = collections.Counter()
  for i in range(1, 21):
    video = script.make_script(0, "train", i, (130, 170))
    for number, record in enumerate(getattr(writer, kind)(video, 8)):
      assert record["id"] == f"train_{i:04d}-{number:02d}"
      assert record["duration"] == float(video.duration)
      talk, questions = record["conversations"], record["questions"]
      turns[len(questions)] += 1
      assert len(talk) == 2 * len(questions)
      about = [facts for facts in questions if facts["needle"]]
      needles = len(build.NEEDLE_QUESTIONS) if kind == "memory" else 0
      assert len({(f["needle_kind"], f["answer"]) for f in about}) == needles
      assert len(about) == needles
      marks = ["<image>" in turn["value"] for turn in talk]
      assert marks == [True] + [False] * (len(talk) - 1)
      tasks = [facts["task"] for facts in questions if not facts["needle"]]
      assert len(set(tasks)) == len(tasks)
      if kind == "lookups":
        assert set(tasks) <= set(build.LOOKUPS)
        # One word, but for a corner.
        assert all(len(turn["value"].split()) <= 2 for turn in talk[1::2])
      for turn, facts in zip(talk[1::2], questions):
        assert turn["value"] == (facts["letter"] or facts["answer"])
  expected = 6 if kind == "lookups" else build.TURNS
  assert turns.most_common(1)[0][0] == expected


def test_conversations_fit_the_rows_of_their_stage():
  """Those that did not would be left out, and longer ones first."""
  writer, videos = build.RecordWriter(7, "train"), range(1, 121)
  scripts = [script.make_script(7, "train", i, (130, 170)) for i in videos]
  written = {
    stage: [r for s in scripts for r in getattr(writer, kind)(s, 6)]
    for stage, kind in enumerate(("lookups", "train", "memory"), start=1)
  }
  texts = [
    turn["value"]
    for records in written.values()
    for record in records
    for turn in record["conversations"]
  ]
  tokenizer = Tokenizer(train_tokenizer(texts), "test")
  for stage, records in written.items():
    rows = demo.get_config(f"stage={stage}").rows
    sizes = [
      measure_record(parse_record(record, "test"), tokenizer, None)
      for record in records
    ]
    kept = script.MAX_KEPT * 2  # a token and a newline each
    assert kept + max(size.prompt for size in sizes) <= rows.queries
    assert kept + max(size.tokens for size in sizes) <= rows.decoder


def test_multiple_choice_text():
  writer = build.RecordWriter(0, "test")
  record = next(
    r
    for i in range(1, 9)
    for r in writer.test(script.make_script(0, "test", i, (180, 300)))
    if r["questions"][0]["format"] == "multiple_choice"
  )
  question, *options, last = record["conversations"][0]["value"].split("\n")[1:]
  assert question.endswith("?")
  assert options == [
    f"{letter}. {option}"
    for letter, option in zip("ABCD", record["questions"][0]["options"])
  ]
  assert last == "Answer with the letter."
