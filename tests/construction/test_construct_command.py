"""Constructions from start to end, seen from a shell."""

import collections
import json
import os
import random
import re
import signal
import sqlite3
import subprocess

import pyarrow.parquet
import pydantic
import pytest
from openai.types.chat import completion_create_params

from hourjax.construction import dataset
from hourjax.data.prepare import question_tables
from tests.construction import demo_videos, model_server
from tests.construction.model_server import completion, refusal

COUNT = 4
# Before these bytes of the dataset's files a run could differ from another.
WRITTEN = (
  dataset.CONVERSATIONS,
  dataset.QUESTIONS,
  "captions.parquet",
  "events.parquet",
  "dropped.jsonl",
  "videos.jsonl",
)


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
  return tmp_path_factory.mktemp("construction") / "videos"


@pytest.fixture(scope="module")
def player(videos):
  return model_server.Player(demo_videos.write_videos(videos, COUNT))


@pytest.fixture
def server(player):
  with model_server.running(player) as server:
    yield server


def _failures(done):
  """The line about calls that failed."""
  (line,) = [x for x in done.stdout.splitlines() if x.startswith("calls that")]
  return line


def _content(folder):
  """What a construction wrote, but for what it cost."""
  return {name: (folder / name).read_bytes() for name in WRITTEN}


@pytest.fixture(scope="module")
def whole(player, videos, tmp_path_factory):
  """An undisturbed construction, and the number of its calls."""
  out = tmp_path_factory.mktemp("whole")
  with model_server.running(player) as server:
    done = demo_videos.construct(server, videos, out, "--media=video")
    assert done.returncode == 0, done.stderr
    assert max(server.paid.values()) == 1
    return out, done, server


def test_questions_and_files(whole):
  out, done, server = whole
  assert f"{COUNT} of {COUNT} videos in {out}" in done.stdout
  assert server.stages["caption"] >= 4 * COUNT
  summary = json.loads((out / "summary.json").read_text())
  rows = pyarrow.parquet.read_table(out / dataset.QUESTIONS).to_pylist()
  assert summary["kept"]["questions"] == len(rows) > 30 * COUNT
  tasks = {row["task"] for row in rows}
  assert len(tasks) >= 20 and "overall_summarization" in tasks
  letters = summary["letters"]
  assert max(letters.values()) < 2 * min(letters.values())
  for row in rows:
    if row["options"]:
      assert row["answer"] in row["options"] and len(row["options"]) == 4
  captions = pyarrow.parquet.read_table(out / "captions.parquet").to_pylist()
  assert captions[0]["start"] == 0 and captions[0]["end"] == 30
  assert "slate train_0001" in captions[0]["summary"]
  events = pyarrow.parquet.read_table(out / "events.parquet").to_pylist()
  assert len(events) >= 3 * COUNT and events[0]["description"]
  card = (out / "README.md").read_text()
  assert "eye" in card and "pen" in card and "questions.parquet" in card
  for picture in ("topics.png", "tasks.png", "durations.png", "sources.png"):
    assert (out / picture).stat().st_size > 10_000


def test_answers_are_those_of_the_writer(whole, player):
  """Through shuffling, checks and both files, an answer stays the right one."""
  out, _, _ = whole
  rows = pyarrow.parquet.read_table(out / dataset.QUESTIONS).to_pylist()
  written = [row for row in rows if row["task"] != "overall_summarization"]
  for row in written:
    script = row["video"].removesuffix(".mp4")
    assert player.right[script, row["question"]] == {row["answer"]}
  # A judge would have dropped those that were mixed up before it saw them.
  assert sum(row["options"] is not None for row in rows) > 10 * COUNT
  # Of each video, what stands behind the letter of a conversation's answer.
  found = set()
  for record in json.loads((out / dataset.CONVERSATIONS).read_text()):
    turns = [turn["value"] for turn in record["conversations"]]
    for question, answer in zip(turns[::2], turns[1::2]):
      text = question.removeprefix("<image>\n")
      options = dict(re.findall(r"^([A-D])\. (.*)$", text, re.M))
      plain = text.split("\nA. ")[0]
      found.add((record["video"], plain, options.get(answer, answer)))
  assert found == {(r["video"], r["question"], r["answer"]) for r in rows}


def test_conversations_are_those_of_the_question_table(whole, tmp_path):
  """`prepare` reads either file, with the same result."""
  out, _, _ = whole
  records = json.loads((out / dataset.CONVERSATIONS).read_text())
  table = question_tables.QuestionTable(
    [out / dataset.QUESTIONS],
    {},
    tmp_path / "scratch",
    skip=lambda where, error: pytest.fail(f"{where}: {error}"),
    step=lambda count: None,
  )
  found = {record["id"]: record for _, record in table}
  assert found == {record["id"]: record for record in records}
  turns = [len(record["conversations"]) // 2 for record in records]
  assert set(turns) <= {1, 2, 3, 4, 5} and turns.count(5) > len(turns) / 2


def test_bodies_are_of_the_protocol(whole):
  """The package of the protocol's owner accepts them, key by key."""
  _, _, server = whole
  kind = completion_create_params.CompletionCreateParamsNonStreaming
  adapter = pydantic.TypeAdapter(kind)
  assert set(server.bodies) == {
    "caption", "events", "event", "video", "questions", "blind", "judge",
  }  # fmt: skip
  for stage, body in server.bodies.items():
    read = json.loads(json.dumps(body))
    if stage == "caption":
      parts = read["messages"][1]["content"]
      (video,) = [part for part in parts if part["type"] == "video_url"]
      assert video["video_url"]["url"].startswith("data:video/mp4;base64,")
      parts.remove(video)  # of vLLM and SGLang; OpenAI has images only
    adapter.validate_python(read)
    assert set(read) <= set(kind.__annotations__) | set(
      completion_create_params.CompletionCreateParamsBase.__annotations__
    )
    schema = read["response_format"]["json_schema"]["schema"]
    assert schema["additionalProperties"] is False
    assert schema["required"] == list(schema["properties"])


def test_images_are_of_the_protocol(server, videos, tmp_path):
  done = demo_videos.construct(
    server, videos, tmp_path, "--dry_run", "--sample=1"
  )
  assert done.returncode == 0, done.stderr
  body = server.bodies["caption"]
  kind = completion_create_params.CompletionCreateParamsNonStreaming
  pydantic.TypeAdapter(kind).validate_python(body)
  parts = body["messages"][1]["content"]
  assert [part["type"] for part in parts] == ["image_url"] * 15 + ["text"]


def test_a_dry_run_ends_after_the_forecast(server, videos, tmp_path):
  options = ["--dry_run", "--sample=3", "--prices=captioner=1/2,writer=3/4"]
  done = demo_videos.construct(server, videos, tmp_path, *options)
  assert done.returncode == 0, done.stderr
  assert server.stages == {"caption": 3, "event": 1}
  lines = done.stdout.splitlines()
  assert lines[0].startswith(f"forecast for {COUNT} videos, 2")
  rows = {line.split()[0]: line.split() for line in lines[2:10]}
  assert rows["caption"][-1] == "measured" and rows["judge"][-1] == "estimated"
  assert float(rows["all"][4]) > 0
  assert not (tmp_path / dataset.QUESTIONS).exists()
  # What was asked for the forecast is not asked again.
  done = demo_videos.construct(server, videos, tmp_path, "--sample=3")
  assert done.returncode == 0, done.stderr
  assert max(server.asked.values()) == 1


@pytest.mark.slow
def test_killed_fifteen_times(whole, server, videos, tmp_path):
  """The same result, and no call is paid for twice."""
  out, _, undisturbed = whole
  calls = undisturbed.asked.total()
  rng = random.Random(5)
  moments = sorted(rng.sample(range(2, calls), 15))
  server.wait = 0.02
  process = None

  def kill(request):
    if moments and len(server.paid) >= moments[0]:
      moments.pop(0)
      os.kill(process.pid, signal.SIGKILL)

  server.fault = kill
  line = demo_videos.command(server, videos, tmp_path, "--media=video")
  for _ in range(40):
    process = subprocess.Popen(
      line,
      cwd=demo_videos.ROOT,
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
    )
    said, _ = process.communicate(timeout=120)
    if process.returncode != -signal.SIGKILL:
      break
  assert not moments and process.returncode == 0, said
  assert _content(tmp_path) == _content(out)
  assert max(server.paid.values()) == 1
  assert set(server.paid) == set(undisturbed.paid)
  # Asked anew was only what was under way when it was killed.
  again = sum(count - 1 for count in server.asked.values())
  assert again <= 15 * 32
  (total,) = (
    sqlite3.connect(tmp_path / "calls.sqlite")
    .execute("SELECT sum(calls) FROM spent")
    .fetchone()
  )
  assert total == len(server.paid)


@pytest.mark.slow
def test_a_template_redoes_its_stage_and_what_hangs_on_it(
  whole, server, videos, tmp_path
):
  out, _, _ = whole
  done = demo_videos.construct(server, videos, tmp_path, "--media=video")
  assert done.returncode == 0, done.stderr
  before = dict(server.stages)
  own = tmp_path / "templates"
  own.mkdir()
  text = (demo_videos.ROOT / "hourjax/construction/templates").joinpath(
    "questions.jinja"
  )
  (own / "questions.jinja").write_text(text.read_text() + "\nBe kind.")
  options = ["--media=video", f"--templates={own}"]
  done = demo_videos.construct(server, videos, tmp_path, *options)
  assert done.returncode == 0, done.stderr
  for stage in ("caption", "events", "event", "video"):
    assert server.stages[stage] == before[stage]
  assert server.stages["questions"] == 2 * before["questions"]
  # The player writes the same questions, whose checks are known.
  assert server.stages["judge"] == before["judge"]
  assert _content(tmp_path) == _content(out)
  # And back again, nothing is asked.
  server.stages.clear()
  done = demo_videos.construct(server, videos, tmp_path, "--media=video")
  assert done.returncode == 0 and not server.stages


@pytest.mark.slow
def test_workers_share_the_videos(whole, server, videos, tmp_path):
  out, _, _ = whole
  first = demo_videos.construct(
    server, videos, tmp_path, "--media=video", "--worker=1/2"
  )
  assert first.returncode == 3 and "other workers" in first.stdout
  records = json.loads((tmp_path / dataset.CONVERSATIONS).read_text())
  assert {r["video"] for r in records} == {"train_0002.mp4", "train_0004.mp4"}
  second = demo_videos.construct(
    server, videos, tmp_path, "--media=video", "--worker=0/2"
  )
  assert second.returncode == 0, second.stderr
  assert _content(tmp_path) == _content(out)
  assert max(server.paid.values()) == 1
  # As one process it finds all that the two have done.
  server.stages.clear()
  third = demo_videos.construct(server, videos, tmp_path, "--media=video")
  assert third.returncode == 0 and not server.stages


def test_a_budget_ends_the_run(server, videos, tmp_path):
  prices = "--prices=captioner=10/10,writer=10/10"
  done = demo_videos.construct(
    server, videos, tmp_path, prices, "--budget=0.5", "--sample=1"
  )
  assert done.returncode == 3, done.stderr
  assert "the budget of $0.5 is spent" in done.stdout
  summary = json.loads((tmp_path / "summary.json").read_text())
  spent = sum(each["dollars"] for each in summary["calls"])
  assert 0.25 < spent <= 0.5
  one = "--prices=writer=1/1"
  done = demo_videos.construct(server, videos, tmp_path, one, "--budget=0.5")
  assert done.returncode == 2
  assert "--budget=0.5 but --prices lacks captioner" in done.stderr


BAD = [
  (lambda r: completion("```json\n{}\n```"), "wrong schema"),
  (lambda r: completion('{"temporality": "a'), "invalid JSON"),
  (lambda r: completion('{"events": [', "length"), "cut off"),
  (lambda r: completion(""), "empty answer"),
  (lambda r: completion(None), "empty answer"),
  (lambda r: completion('{"questions": []}'), "wrong schema"),
  (lambda r: completion("[" * 100_000), "invalid JSON"),
  (lambda r: completion("x" * 10_000_000), "too long"),
]


def test_unusable_answers_are_asked_for_again(server, videos, player, tmp_path):
  """Each call fails once, in turn in every way, and then is answered."""
  seen = []

  def fault(request):
    if request.again or request.tries:
      return None
    number = len(seen)
    seen.append(request.stage)
    if number % 9 == 8:
      return model_server.Response(body=b'{"choices": []}')
    return BAD[number % 9][0](request)

  server.fault = fault
  names = tmp_path / "names.txt"
  names.write_text("train_0001.mp4\n")
  done = demo_videos.construct(
    server, videos, tmp_path, f"--names={names}", "--sample=0"
  )
  assert done.returncode == 0, done.stderr
  assert "1 of 1 videos" in done.stdout
  assert len(seen) > 40
  for _, kind in BAD:
    assert re.search(rf"\d {kind}", _failures(done))


def test_an_answer_that_stays_bad_costs_itself(server, videos, tmp_path):
  def fault(request):
    if request.stage == "questions" and "as to scene" in request.text:
      return completion('{"questions": [{"task": "scene_recognition"}]}')
    if request.stage == "event" and "train_0002" in request.text:
      text = "Der Mann geht durch die Stadt, er kauft dort Brot und isst es."
      return completion(json.dumps({"description": text}))
    return None

  server.fault = fault
  done = demo_videos.construct(server, videos, tmp_path, "--sample=0")
  assert done.returncode == 0, done.stderr
  summary = json.loads((tmp_path / "summary.json").read_text())
  assert summary["videos"] == {
    "all": COUNT, "done": COUNT - 1, "partial": 0, "dropped": 1, "failed": 0,
    "of earlier starts": 0,
  }  # fmt: skip
  assert "scene" not in summary["topics"]
  assert summary["answers_unusable"]["wrong schema"] == 2 * (COUNT - 1)
  assert summary["answers_unusable"]["another language"] >= 3
  lines = (tmp_path / "videos.jsonl").read_text().splitlines()
  (dropped,) = [x for x in map(json.loads, lines) if x["state"] == "dropped"]
  assert dropped["video"] == "train_0002.mp4"
  assert dropped["kind"] == "too few events"
  # Nothing is asked again, since what the models said is known.
  server.stages.clear()
  done = demo_videos.construct(server, videos, tmp_path, "--sample=0")
  assert done.returncode == 0 and not server.stages


def test_a_bad_video_stops_no_other(server, videos, tmp_path):
  folder = tmp_path / "videos"
  folder.mkdir()
  (folder / "short.mp4").symlink_to(videos / "train_0001.mp4")
  (folder / "broken.mp4").write_bytes(b"\0" * 5000)
  done = demo_videos.construct(server, folder, tmp_path / "out", "--sample=0")
  assert done.returncode == 3, done.stderr
  assert "1 of 2 videos" in done.stdout and "1 failed" in done.stdout
  assert "broken.mp4" in done.stdout


def test_keys_are_nowhere(server, videos, tmp_path):
  """They go to their endpoint, which repeats them in an error."""
  keys = {"CAPTIONER_API_KEY": "sk-captioner1", "WRITER_API_KEY": "sk-writer22"}

  def fault(request):
    if request.stage == "event":
      said = request.headers["authorization"]
      return refusal(400, f"Incorrect key {said}")
    return None

  server.fault = fault
  out = tmp_path / "out"
  done = demo_videos.construct(server, videos, out, **keys)
  assert server.authorizations == {f"Bearer {key}" for key in keys.values()}
  everything = done.stdout + done.stderr
  for path in out.rglob("*"):
    if path.is_file():
      everything += path.read_bytes().decode("latin-1")
  assert "Incorrect key" in everything
  for key in keys.values():
    assert key not in everything


def test_refusals_name_the_remedy(server, videos, tmp_path):
  for status, words in (
    (401, "set CAPTIONER_API_KEY or OPENAI_API_KEY"),
    (404, "correct the model's name, or the address"),
  ):
    server.fault = lambda request, status=status: refusal(status, "never")
    done = demo_videos.construct(server, videos, tmp_path)
    assert done.returncode == 2
    (error,) = [x for x in done.stderr.splitlines() if x.startswith("error")]
    assert f"eye@{server.url}" in error and f": {status}" in error
    assert words in error
    # Of calls that were under way no other is made.
    assert server.stages["caption"] <= 32
    server.stages.clear()


def test_what_is_paid_is_kept_when_a_role_is_refused(server, videos, tmp_path):
  """The judge has no key; the writer's calls under way arrive."""
  server.wait = 0.1
  server.fault = lambda request: (
    refusal(401, "no key") if request.stage == "judge" else None
  )
  done = demo_videos.construct(server, videos, tmp_path, "--sample=0")
  assert (
    done.returncode == 2 and "(--judge): 401, it wants a key" in done.stderr
  )
  with sqlite3.connect(tmp_path / "calls.sqlite") as store:
    (kept,) = store.execute("SELECT count(*) FROM answers").fetchone()
  assert kept == len(server.paid) > 50


def test_an_endpoint_that_is_not_there(videos, tmp_path):
  with model_server.running(lambda request: None) as gone:
    pass
  done = demo_videos.construct(gone, videos, tmp_path, "--retry_wait=0.01")
  assert done.returncode == 2
  assert "sampled clips got a caption" in done.stderr
  assert "connection failed" in done.stderr


def test_faults_of_the_endpoint_are_waited_out(whole, server, videos, tmp_path):
  """A third of the calls fails in some way, and the result is the same."""
  out, _, _ = whole
  rng = random.Random(3)
  kinds = collections.Counter()
  faults = {
    "429 later": lambda: refusal(429, "slow down", Retry_After="0.05"),
    "429": lambda: refusal(429, "slow down"),
    "500": lambda: refusal(500),
    "503": lambda: refusal(503, Retry_After="0.01"),
    "cut": lambda: model_server.Response(body=b'{"choices": [' * 9, cut=40),
    "page": lambda: model_server.Response(body=b"<html>busy</html>"),
  }

  def fault(request):
    if rng.random() < 0.3 and request.tries < 3:
      name = rng.choice(sorted(faults))
      kinds[name] += 1
      return faults[name]()
    return None

  server.fault = fault
  done = demo_videos.construct(
    server, videos, tmp_path, "--media=video", "--retry_wait=0.02"
  )
  assert done.returncode == 0, done.stderr
  assert set(kinds) == set(faults)
  assert _content(tmp_path) == _content(out)
  for kind in ("429", "500", "503", "connection", "broken response"):
    assert re.search(rf"\d {kind}", _failures(done))


def test_what_is_refused_is_asked_for_at_the_next_start(
  server, videos, tmp_path
):
  """One topic of a video, and the captions of another one."""

  def fault(request):
    prompt = request.text
    first = request.stage == "questions" and "train_0001" in prompt
    if first and "as to scene" in prompt and "four options" in prompt:
      return refusal(400, "the prompt is too long")
    if request.stage == "event" and "train_0002" in prompt:
      return refusal(413, "too large")
    return None

  server.fault = fault
  done = demo_videos.construct(server, videos, tmp_path, "--sample=0")
  assert done.returncode == 3, done.stderr
  assert f"{COUNT - 2} of {COUNT} videos" in done.stdout
  assert "1 failed, 1 in part" in done.stdout
  records = json.loads((tmp_path / dataset.CONVERSATIONS).read_text())
  assert {record["video"] for record in records} == {
    "train_0001.mp4", "train_0003.mp4", "train_0004.mp4",
  }  # fmt: skip
  server.fault = lambda request: None
  server.stages.clear()
  done = demo_videos.construct(server, videos, tmp_path, "--sample=0")
  assert done.returncode == 0, done.stderr
  assert "caption" not in server.stages and "events" not in server.stages
  assert max(server.paid.values()) == 1


def test_names_as_find_prints_them(server, videos, tmp_path):
  """Fewer videos than before, by other names of them."""
  done = demo_videos.construct(server, videos, tmp_path, "--sample=0")
  assert done.returncode == 0, done.stderr
  server.stages.clear()
  names = tmp_path / "names.txt"
  names.write_text("./train_0001.mp4\n")
  done = demo_videos.construct(
    server, videos, tmp_path, "--sample=0", f"--names={names}"
  )
  assert done.returncode == 0, done.stdout
  assert "1 of 1 videos" in done.stdout and not server.stages
  records = json.loads((tmp_path / dataset.CONVERSATIONS).read_text())
  assert len({record["video"] for record in records}) == COUNT


def test_a_template_is_checked_before_the_first_call(server, videos, tmp_path):
  for name, text in (
    ("judge", "{{ reason }}"),
    ("again", "{{ problem + 1 }}"),
    ("caption", "{{ frames }} of {{ captoin }}"),
  ):
    (tmp_path / f"{name}.jinja").write_text(text)
    done = demo_videos.construct(
      server, videos, tmp_path / "out", f"--templates={tmp_path}"
    )
    assert done.returncode == 2, done.stdout
    (error,) = [x for x in done.stderr.splitlines() if x.startswith("error")]
    assert f"template {name}.jinja: " in error and "it may use " in error
    (tmp_path / f"{name}.jinja").unlink()
  assert not server.stages


def test_own_tasks_give_own_questions(server, videos, tmp_path):
  """A user's file of tasks, and no code."""
  path = tmp_path / "tasks.yaml"
  path.write_text("""
topics: {furniture: [object, scene]}
tasks:
- name: chair_counting
  topic: furniture
  form: short
  definition: How many chairs there are.
  formats: [open]
  open: {question: "How many chairs are at the table?", answer: Four.}
""")
  done = demo_videos.construct(server, videos, tmp_path, f"--tasks={path}")
  assert done.returncode == 0, done.stderr
  rows = pyarrow.parquet.read_table(tmp_path / dataset.QUESTIONS).to_pylist()
  assert {(r["task"], r["topic"], r["format"]) for r in rows} == {
    ("chair_counting", "furniture", "open")
  }
  assert (
    "How many chairs there are"
    in (server.bodies["questions"]["messages"][1]["content"])
  )
