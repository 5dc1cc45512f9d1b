"""Does a model learn from constructed questions as from generated ones?

  python -m tests.construction.learning WORK --steps=900

WORK is the folder that launch/local.sh has filled. Questions about the demo's
training videos are constructed with a server that plays the models. From the
same stage 1 two models learn all tasks, from the constructed questions and from
as many of those that the demo generates, five in a conversation; both answer
the questions about the test videos.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys

import yaml

from hourjax.construction import dataset, tasks
from hourjax.data.demo import build
from hourjax.data.demo.questions import QUESTION_MAKERS
from tests.construction import demo_videos, model_server

# Of the demo's tasks, those with options, and those with one question a video.
_CHOICE = ("temporal_gap_estimation",)
_ONE = ("duration_perception", "event_sequence")
TURNS = 5


def write_tasks(path):
  """The demo's tasks, each a topic, since videos lack questions of some."""
  known = tasks.read_tasks()
  kept = [
    task.model_dump(exclude_none=True)
    | {
      "topic": task.name,
      "formats": ["multiple_choice" if task.name in _CHOICE else "open"],
      "count": 1 if task.name in _ONE else None,
    }
    for task in known.tasks
    if task.name in QUESTION_MAKERS
  ]
  topics = {
    task.name: known.topics[task.topic]
    for task in known.tasks
    if task.name in QUESTION_MAKERS
  }
  path.write_text(yaml.safe_dump({"topics": topics, "tasks": kept}))


def construct(work, scripts, out, count):
  """Constructs questions about the videos of these scripts."""
  out.mkdir(parents=True, exist_ok=True)
  write_tasks(out / "tasks.yaml")
  names = out / "names.txt"
  names.write_text("".join(f"{script.name}.mp4\n" for script in scripts))
  player = model_server.Player(scripts, filling=False)
  with model_server.running(player) as server:
    line = demo_videos.command(
      server, work / "data" / "videos", out, f"--tasks={out / 'tasks.yaml'}",
      f"--names={names}", "--check=rules", "--sample=0", "--again=0",
    )  # fmt: skip
    _run(*line[1:], f"--count={count}")
    return server.stages.total()


def generated(work, constructed, out):
  """As many generated questions, with as many in a conversation."""
  records = json.loads((work / "data" / "train.json").read_text())
  wanted = sum(
    len(record["conversations"]) // 2
    for record in json.loads(constructed.read_text())
  )
  named = {r["video"] for r in json.loads(constructed.read_text())}
  kept = []
  for record in records:
    if record["video"] in named and wanted > 0:
      questions = record["questions"][:TURNS]
      turns = record["conversations"][: 2 * TURNS]
      kept.append(record | {"questions": questions, "conversations": turns})
      wanted -= len(questions)
  out.write_text(json.dumps(kept))


def _run(*arguments):
  """Runs a module of Python on the CPU, and shows what it says."""
  done = subprocess.run(
    [sys.executable, *map(str, arguments)],
    cwd=demo_videos.ROOT,
    env=os.environ | {"JAX_PLATFORMS": "cpu"},
    check=True,
    stdout=subprocess.PIPE,
    text=True,
  )
  print(done.stdout, end="", flush=True)
  return done.stdout


def learn(work, name, records, steps):
  """Trains stage 2 on records, and returns its report."""
  data = work / "data"
  folder = work / "learning" / name
  _run(
    "-m", "hourjax.prepare", f"--records={records}",
    f"--out={folder / 'data'}", "--overwrite",
    f"--tokenizer={data / 'tokenizer'}", f"--features={data / 'features'}",
  )  # fmt: skip
  _run(
    "-m", "hourjax.train", f"--config=configs/demo.py:data={data},stage=2",
    f"--workdir={folder / 'run'}", f"--config.init={work / 'stage1'}",
    f"--config.data.dataset={folder / 'data'}", f"--config.steps={steps}",
  )  # fmt: skip
  _run(
    "-m", "hourjax.evaluate", f"--model={folder / 'run'}",
    "--benchmark=records", f"--data={data}",
    f"--features={data / 'features'}", f"--out={folder}",
  )  # fmt: skip
  return json.loads((folder / "report.json").read_text())


def main(argv):
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("work", type=pathlib.Path)
  parser.add_argument("--steps", type=int, default=900)
  parser.add_argument("--count", type=int, default=2)
  options = parser.parse_args(argv)
  work = options.work.absolute()
  about = json.loads((work / "data" / "demo.json").read_text())["options"]
  about.pop("version")
  scripts = build.Options(**about).scripts()["train"]
  out = work / "learning" / "marathon"
  calls = construct(work, scripts, out, options.count)
  constructed = out / dataset.CONVERSATIONS
  others = work / "learning" / "generated.json"
  generated(work, constructed, others)
  print(f"{calls:,} calls")
  for name, records in (("constructed", constructed), ("generated", others)):
    report = learn(work, name, records, options.steps)
    low, high = report["interval"]
    print(f"{name}: {report['accuracy']:.1%} [{low:.1%}, {high:.1%}]")


if __name__ == "__main__":
  main(sys.argv[1:])
