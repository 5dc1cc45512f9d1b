"""The plugin of lmms-eval, with a fake model behind it and as a command."""

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hourjax.data.demo.tokenizer import write_tokenizer
from hourjax.errors import UserError
from hourjax.inference.memory import Answer, Memory
from hourjax.inference.sampling import Sampling
from hourjax.models.config import TINY
from hourjax.models.params import param_shapes
from hourjax.weights.shards import save_params
from tests import videos

ROOT = Path(__file__).parents[2]
TASK = Path(__file__).parent / "lmms_task"
# Importing lmms_eval brings PyTorch, which takes seconds.
pytestmark = pytest.mark.slow
WITHOUT = (
  "lmms_eval is not installed: pip install -e '.[eval]', then "
  "pip install --no-deps lmms_eval==0.7.3"
)


@pytest.fixture(scope="module")
def lmms():
  """The module of the plugin."""
  pytest.importorskip("lmms_eval", reason=WITHOUT)
  from hourjax.evaluation import lmms

  return lmms


class FakeMemory(Memory):
  def __init__(self, content, calls):
    self._content, self._calls = content, calls

  def answer(self, questions, **options):
    self._calls.append(("answer", len(questions), options))
    return [
      Answer(f"{self._content}: {question}", len(question), True)
      for question in questions
    ]


class FakeModel:
  """Answers with what it encoded and was asked; records every call."""

  name = "fake@0"

  def __init__(self):
    self.calls = []

  def encode_memory(self, video):
    return self._memory("video", video)

  def encode_images(self, images):
    pixels = [np.asarray(Image.open(path))[0, 0].tolist() for path in images]
    return self._memory("images", pixels)

  def empty_memory(self):
    return self._memory("text", None)

  def _memory(self, kind, content):
    self.calls.append((kind, content))
    return FakeMemory(content, self.calls)


@pytest.fixture
def make(lmms, monkeypatch):
  """Makes the plugin with a fake model behind it."""
  monkeypatch.setattr(lmms, "load", lambda folder, tokenizer: FakeModel())
  monkeypatch.delenv("WORLD_SIZE", raising=False)
  return lambda **options: lmms.HourJax(**{"pretrained": "DIR", **options})


def _requests(plugin, docs):
  """Requests as lmms_eval makes them; a doc is (text, visuals[, options])."""
  from lmms_eval.api.instance import Instance

  plugin.task_dict["task"] = {"test": docs}
  requests = []
  for i, (text, _, *options) in enumerate(docs):
    options = options[0] if options else {}
    arguments = (text, options, lambda doc: doc[1], i, "task", "test")
    metadata = {"task": "task", "doc_id": i, "repeats": 1}
    requests.append(Instance("generate_until", arguments, 0, metadata))
  return requests


def _ask(plugin, docs):
  results = plugin.generate_until(_requests(plugin, docs))
  return [result.text for result in results]


def _kinds(plugin):
  return [call[0] for call in plugin._model.calls]


# --- requests ---------------------------------------------------------------


def test_a_video_is_encoded_once_for_its_questions(make):
  plugin = make(batch_size=2)
  docs = [(f"q{i}", ["a.mp4"]) for i in range(5)] + [("q5", ["b.mp4"])]
  assert _ask(plugin, docs) == [
    *(f"a.mp4: q{i}" for i in range(5)),
    "b.mp4: q5",
  ]
  calls = [(call[0], call[1]) for call in plugin._model.calls]
  batches = [("answer", n) for n in (2, 2, 1)]
  assert calls == [
    ("video", "a.mp4"),
    *batches,
    ("video", "b.mp4"),
    ("answer", 1),
  ]


def test_the_memory_is_kept_for_the_next_call(make):
  plugin = make()
  _ask(plugin, [("q", ["a.mp4"])])
  _ask(plugin, [("q", ["a.mp4"])])
  assert _kinds(plugin) == ["video", "answer", "answer"]


def test_every_kind_of_question_in_order(make, tmp_path):
  Image.new("RGB", (2, 2), (1, 2, 3)).save(tmp_path / "a.PNG")
  inside = Image.new("L", (2, 2), 9)
  plugin = make(batch_size=8)
  docs = [
    ("t0", []),
    ("t1", None),
    ("i0", [inside]),
    ("i1", [inside, str(tmp_path / "a.PNG")]),
    ("v0", [Path("a.mp4")]),
    ("t2", []),
  ]
  assert _ask(plugin, docs) == [
    "None: t0",
    "None: t1",
    "[[9, 9, 9]]: i0",
    "[[9, 9, 9], [1, 2, 3]]: i1",
    "a.mp4: v0",
    "None: t2",
  ]


def test_tokens_are_counted(make):
  plugin = make()
  (result,) = plugin.generate_until(_requests(plugin, [("four", [])]))
  assert result.token_counts.to_dict() == {"output_tokens": 4}


def test_questions_of_one_batch_are_answered_in_one_way(make):
  plugin = make(batch_size=8)
  long = {"max_new_tokens": 9}
  _ask(plugin, [("a", []), ("b", [], long), ("c", [], long), ("d", [])])
  answers = plugin._model.calls[1:]
  assert [call[1] for call in answers] == [1, 2, 1]
  assert [call[2]["max_tokens"] for call in answers] == [1024, 9, 1024]


@pytest.mark.parametrize(
  "visuals, message",
  [
    (["a.mp4", "b.mp4"], "task/test/0: 2 visuals with a video among them"),
    (["a.png", "b.mp4"], "task/test/0: 2 visuals with a video among them"),
    ([{"array": 1}], "task/test/0: a visual is a dict; expected the path"),
  ],
)
def test_visuals_that_are_refused(make, visuals, message):
  with pytest.raises(UserError, match=message):
    _ask(make(), [("q", visuals)])


def test_likelihoods_are_refused(make):
  plugin = make()
  with pytest.raises(NotImplementedError, match="task compares likelihoods"):
    plugin.loglikelihood(_requests(plugin, [("q", [])]))


def test_rounds(make):
  """A task writes the next question, and may change what was answered."""
  plugin = make()

  def next_round(doc, *, previous_output, round_idx, previous_round_info):
    steps.append((list(previous_output), round_idx, previous_round_info))
    if round_idx == 3:
      return None, None, True, [*previous_output[:-1], "end"], None
    visuals = ["a.mp4"] if round_idx == 1 else ["b.mp4"]
    return visuals, f"q{round_idx}", False, previous_output, round_idx

  steps = []
  (request,) = _requests(plugin, [("q0", ["a.mp4"])])
  *first, doc_id, task, split = request.args
  request.arguments = (*first, next_round, doc_id, task, split)
  (answers,) = plugin.generate_until_multi_round([request])
  assert answers == ["a.mp4: q0", "a.mp4: q1", "end"]
  assert steps == [
    (["a.mp4: q0"], 1, None),
    (["a.mp4: q0", "a.mp4: q1"], 2, 1),
    (["a.mp4: q0", "a.mp4: q1", "b.mp4: q2"], 3, 2),
  ]
  assert _kinds(plugin) == ["video", "answer", "answer", "video", "answer"]


# --- options ----------------------------------------------------------------


@pytest.mark.parametrize(
  "given, temperature, top_p",
  [
    ({}, 0, 1),
    ({"do_sample": False, "temperature": 0.7, "top_p": 0.5}, 0, 1),
    ({"do_sample": True}, 1, 1),
    ({"do_sample": True, "temperature": 0.2, "top_p": 0.9}, 0.2, 0.9),
    ({"temperature": 0.7, "top_p": None}, 0.7, 1),
    ({"temperature": 0, "top_p": 0}, 0, 1),
    ({"do_sample": True, "temperature": 0, "top_p": 0.9}, 0, 1),
    ({"do_sample": True, "temperature": None, "top_p": 0}, 0, 1),
  ],
)
def test_sampling_as_in_transformers(lmms, given, temperature, top_p):
  got = lmms.Generation.parse(given, max_tokens=7)
  assert got == lmms.Generation(7, temperature, top_p)


@pytest.mark.parametrize(
  "until, expected",
  [
    (None, "One. Two\n\nThree"),
    ([], "One. Two\n\nThree"),
    (["\n\n"], "One. Two"),
    ("Two", "One."),
    (["\n\n", "", "."], "One"),
    (["four"], "One. Two\n\nThree"),
    (["One"], ""),
  ],
)
def test_stop_strings_cut(lmms, until, expected):
  generation = lmms.Generation.parse({"until": until}, max_tokens=7)
  assert generation.cut("One. Two\n\nThree") == expected


def test_options_of_a_task_reach_the_model(make):
  plugin = make()
  options = {
    "max_new_tokens": 5,
    "do_sample": True,
    "temperature": 0.5,
    "top_p": 0.8,
    "until": ["b"],
  }
  assert _ask(plugin, [("a b c", [], options)]) == ["None: a"]
  assert plugin._model.calls[-1][2] == {
    "max_tokens": 5,
    "sampling": Sampling(0.5, 0.8),
  }


def test_a_question_asked_again_is_drawn_anew(make):
  plugin = make(batch_size=2)
  _ask(plugin, [("a", [])] * 3)
  _ask(plugin, [("a", [])])
  answers = plugin._model.calls[1:]
  assert [call[2]["sampling"].seed for call in answers] == [0, 2, 3]


def test_options_that_are_not_followed_are_logged_once(make):
  from loguru import logger

  logged = []
  sink = logger.add(logged.append, level="WARNING", format="{message}")
  plugin = make()
  options = {"num_beams": 3, "top_k": None, "repetition_penalty": 1.0}
  _ask(plugin, [("a", [], options), ("b", [], options)])
  logger.remove(sink)
  assert logged == ["hourjax does not follow num_beams=3 of the task\n"]


@pytest.mark.parametrize(
  "options, message",
  [
    ({"pretrained": ""}, "no model is named; say --model_args pretrained="),
    ({"batch_size": "auto"}, "--batch_size=auto: expected a number"),
    ({"batch_size": 0}, "--batch_size=0: expected a number of 1 or more"),
    ({"max_batch_size": 4}, "--max_batch_size=4 means nothing here"),
    ({"device": "cuda"}, "--device=cuda means nothing here: jax chooses"),
  ],
)
def test_options_that_are_refused(make, options, message):
  with pytest.raises(UserError, match=message):
    make(**options)


def test_torch_distributed_is_refused(make, monkeypatch):
  monkeypatch.setenv("WORLD_SIZE", "2")
  with pytest.raises(UserError, match="WORLD_SIZE=2: lmms_eval would share"):
    make()


# --- the real command -------------------------------------------------------

QUESTIONS = [
  ("video.mp4", None, "What happens first?"),
  ("video.mp4", None, "And how does it end, all in all?"),
  (None, "picture.png", "What colour is it?"),
  (None, None, "Who are you?"),
]
# Starts the command in a process that has asked the model the same questions
# itself: PyTorch, lmms_eval and the model are loaded once for both.
COMMAND = """
import functools, json, pathlib, runpy, sys

from hourjax.inference import load as module

module.load = load = functools.cache(module.load)
model = load(sys.argv[sys.argv.index("--model_args") + 1].split("=")[1],
             tokenizer=None)
rows = [json.loads(line) for line in open("questions.jsonl")]
memories, answers = {}, []
for row in rows:
  key = row["video"], row["image"]
  if key not in memories:
    memories[key] = (
      model.encode_memory(row["video"]) if row["video"]
      else model.encode_images([row["image"]]) if row["image"]
      else model.empty_memory()
    )
batches = ((0, 1), (2,), (3,))
for batch in batches:
  memory = memories[rows[batch[0]]["video"], rows[batch[0]]["image"]]
  texts = [rows[n]["question"] for n in batch]
  answers += [a.text for a in memory.answer(texts, max_tokens=6)]
for number in (0, 2):
  rows[number]["answer"] = answers[number]
lines = [json.dumps(row) + "\\n" for row in rows]
pathlib.Path("questions.jsonl").write_text("".join(lines))
pathlib.Path("answers.json").write_text(json.dumps(answers))
# Of the tasks only ours is read; those of lmms_eval are 1,900 files.
from lmms_eval.tasks import TaskManager
read = TaskManager.initialize_tasks
TaskManager.initialize_tasks = lambda self, **options: read(
  self, **{**options, "include_defaults": False}
)
try:
  runpy.run_module("lmms_eval", run_name="__main__", alter_sys=True)
finally:
  # The command found its model through the same call, and nothing else.
  info = load.cache_info()
  pathlib.Path("loads.json").write_text(json.dumps([info.hits, info.misses]))
"""


def _write_model(folder):
  """A tiny model with random weights, written as the official ones are."""
  write_tokenizer(folder, [question for *_, question in QUESTIONS])
  rng = np.random.default_rng(0)
  params = {
    path: rng.normal(size=shape).astype(np.float32)
    for path, shape in param_shapes(TINY).items()
  }
  save_params(params, TINY, folder)


def _write_questions(folder):
  rows = [
    {"video": video, "image": image, "question": question, "answer": "-"}
    for video, image, question in QUESTIONS
  ]
  lines = [json.dumps(row) + "\n" for row in rows]
  (folder / "questions.jsonl").write_text("".join(lines))


def _metadata(folder):
  """A folder in which Python finds our entry points, as if installed."""
  project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
  about = folder / f"hourjax-{project['version']}.dist-info"
  about.mkdir(parents=True)
  lines = [f"Name: hourjax\nVersion: {project['version']}\n"]
  (about / "METADATA").write_text("".join(lines))
  groups = project["entry-points"].items()
  (about / "entry_points.txt").write_text(
    "".join(
      f"[{group}]\n" + "".join(f"{k} = {v}\n" for k, v in entries.items())
      for group, entries in groups
    )
  )
  return folder


def _lmms_eval(folder, *arguments):
  distributed = ("WORLD_SIZE", "RANK", "LOCAL_RANK")
  env = {k: v for k, v in os.environ.items() if k not in distributed}
  path = os.pathsep.join([str(_metadata(folder / "metadata")), str(ROOT)])
  offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
  env |= {"PYTHONPATH": path, "HF_HOME": str(folder / "home"), **offline}
  return subprocess.run(
    [sys.executable, "-c", COMMAND, "--model", "hourjax", *arguments],
    cwd=folder,
    env=env,
    capture_output=True,
    text=True,
    timeout=600,
  )


def test_the_lmms_eval_command(tmp_path):
  pytest.importorskip("lmms_eval", reason=WITHOUT)
  _write_model(tmp_path / "model")
  videos.write(tmp_path / "video.mp4", 90)
  Image.fromarray(videos.picture(3)).save(tmp_path / "picture.png")
  _write_questions(tmp_path)
  done = _lmms_eval(
    tmp_path,
    *("--model_args", f"pretrained={tmp_path / 'model'}"),
    *("--tasks", "hourjax_tiny", "--include_path", str(TASK)),
    *("--batch_size", "2", "--output_path", "out", "--log_samples"),
  )
  # On an error lmms_eval ends with 0 all the same, but writes nothing.
  written = list((tmp_path / "out").rglob("*_results.json"))
  assert len(written) == 1, done.stdout + done.stderr
  answers = json.loads((tmp_path / "answers.json").read_text())
  assert len({*answers, ""}) > 3, "answers so alike prove nothing"
  assert json.loads((tmp_path / "loads.json").read_text()) == [1, 1]
  results = json.loads(written[0].read_text())["results"]["hourjax_tiny"]
  assert results["right,none"] == 0.5
  (samples,) = (tmp_path / "out").rglob("*_samples_hourjax_tiny.jsonl")
  samples = [json.loads(line) for line in samples.open()]
  assert [sample["filtered_resps"] for sample in samples] == answers
