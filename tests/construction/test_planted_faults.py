"""The checks find planted faults, and let good questions pass.

Each of the faults is planted at least 35 times, by a player whose judge is
honest and who knows nothing without the video but what everyone does.
"""

import collections
import json
import random

import pyarrow.parquet
import pytest
import yaml

from hourjax.construction import dataset, prompts, tasks
from tests.construction import demo_videos, model_server

VIDEOS = 42
TASKS = (
  "spatial_perception",
  "object_recognition",
  "object_attribute",
  "action_recognition",
  "scene_recognition",
)
# Fault -> a part of the reason that it must be dropped for.
FAULTS = {
  "two right options": "several options right",
  "another option is right": "another option right",
  "answer in the question": "names its answer",
  "answered without the video": "without the video",
  "repetition": "repeats another",
  "time beyond the end": "beyond the end",
  "benchmark's question": "benchmark",
}
# What everyone knows, and its answer.
_KNOWN = [
  ("How many legs does a healthy {animal} have?", "four",
   ["two", "six", "eight"]),
]  # fmt: skip
_ANIMALS = ("cat", "dog", "horse", "cow", "lion", "tiger", "goat", "sheep")
_BENCHMARK = [
  f"What does the {who} in the {colour} coat hand to the {whom} at the {place}?"
  for who in ("baker", "driver", "teacher", "doctor")
  for colour in ("striped", "woollen", "golden")
  for whom in ("cashier", "guard")
  for place in ("counter", "gate", "fountain", "crossing")
]


class Planter(model_server.Player):
  """Plants a fault into every third question, each kind in turn."""

  def __init__(self, scripts):
    super().__init__(scripts)
    self.planted: dict[tuple[str, str], str] = {}
    self._blind_known: dict[str, str] = {}

  def change(self, script, questions):
    kinds = list(FAULTS)
    changed = []
    for number, item in enumerate(questions):
      if number % 3 == 2:
        # The same in every run, whatever the order of the calls.
        place = int(script.name[-4:]) * len(TASKS) + TASKS.index(item["task"])
        kind = kinds[place % len(kinds)]
        item = self._plant(kind, script, item, changed)
        self.planted[script.name, item["question"]] = kind
      changed.append(item)
    return changed

  def _plant(self, kind, script, item, before):
    rng = random.Random(f"{script.name} {item}")
    item = {**item, "options": list(item["options"])}
    right = {item["answer"]}
    if kind == "two right options":
      item["question"] += " Or nearby?"
      right.add(item["options"][1])
    elif kind == "another option is right":
      item["question"] += " Indeed?"
      right = {item["options"][2]}
    elif kind == "answer in the question":
      item["question"] = (
        f"As the {item['answer']} tells, {item['question'].lower()}"
      )
    elif kind == "answered without the video":
      text, answer, wrong = rng.choice(_KNOWN)
      text = text.format(animal=rng.choice(_ANIMALS))
      item |= {"question": text, "answer": answer, "options": [answer, *wrong]}
      self._blind_known[text] = answer
      right = {answer}
    elif kind == "repetition":
      item = {**rng.choice(before)}
      right = {item["answer"]}
      words = item["question"].rstrip("?").split()
      item["question"] = rng.choice(
        [
          f"{' '.join(words)} in the video?",
          f"{' '.join(words)}, as it is shown?",
          f"During the video, {' '.join(words)}?",
          f"{' '.join(words[3:])}, {' '.join(words[:3])} there?",
        ]
      )
    elif kind == "time beyond the end":
      late = script.duration + rng.randrange(5, 3000)
      stated = rng.choice(
        [f"At {prompts.clock(late)}", f"After {late} seconds",
         f"In minute {late // 60 + 1}", f"Between 10 and {late} seconds"]
      )  # fmt: skip
      item["question"] = f"{stated}, {item['question'].lower()}"
    else:
      text = rng.choice(_BENCHMARK)
      if rng.random() < 0.5:
        text = text.replace("What does", "What did")
      item["question"] = text
    self.right[script.name, item["question"]] = right
    return item

  def _blind(self, request):
    text, options = model_server.read_question(request.text)
    if text in self._blind_known:
      known = self._blind_known[text]
      return {"answer": next(k for k, v in options.items() if v == known)}
    return super()._blind(request)


@pytest.mark.slow
def test_planted_faults_are_found(tmp_path):
  videos = tmp_path / "videos"
  player = Planter(demo_videos.write_videos(videos, VIDEOS, seed=7))
  known = tasks.read_tasks()
  content = {
    "topics": dict.fromkeys(TASKS, known.topics["object"]),
    "tasks": [
      task.model_dump(exclude_none=True)
      | {"topic": task.name, "formats": ["multiple_choice"]}
      for task in known.tasks
      if task.name in TASKS
    ],
  }
  own = tmp_path / "tasks.yaml"
  own.write_text(yaml.safe_dump(content))
  benchmark = tmp_path / "benchmark.jsonl"
  rows = [{"video_id": "x", "question": text} for text in _BENCHMARK]
  benchmark.write_text("\n".join(map(json.dumps, rows)))
  out = tmp_path / "out"
  with model_server.running(player) as server:
    done = demo_videos.construct(
      server, videos, out, "--count=3", "--sample=0", f"--tasks={own}",
      f"--exclude={benchmark}",
    )  # fmt: skip
  assert done.returncode == 0, done.stderr
  kept = pyarrow.parquet.read_table(out / dataset.QUESTIONS).to_pylist()
  reasons = {(row["video"], row["question"]): "" for row in kept}
  for line in (out / "dropped.jsonl").read_text().splitlines():
    row = json.loads(line)
    reasons[row["video"], row["question"]] = row["reason"]
  counts: dict[str, collections.Counter] = collections.defaultdict(
    collections.Counter
  )
  for (video, text), reason in reasons.items():
    kind = player.planted.get((video.removesuffix(".mp4"), text), "none")
    counts[kind][reason] += 1
  for kind, found in counts.items():
    print(f"{kind}: {found.total()}, {dict(found)}")
  good = counts.pop("none")
  assert good.total() > 300
  # A guess of four options is right three times of three once in 64.
  alarms = good.total() - good[""]
  assert alarms <= 0.04 * good.total()
  assert sum(found.total() for found in counts.values()) >= 200
  for kind, found in counts.items():
    assert found[""] <= 0.05 * found.total(), (kind, found)
    # Of those that were not guessed before another check saw them.
    right = sum(n for reason, n in found.items() if FAULTS[kind] in reason)
    guessed = found["it is answered without the video"]
    seen = found.total() - (guessed if "without" not in FAULTS[kind] else 0)
    assert right >= 0.95 * seen, (kind, found)
