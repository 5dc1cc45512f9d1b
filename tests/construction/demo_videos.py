"""Demo videos on disk, and commands that construct questions about them."""

import os
import pathlib
import subprocess
import sys

import yaml

from hourjax.construction import tasks
from hourjax.data.demo import drawing
from hourjax.data.demo.questions import QUESTION_MAKERS
from tests.construction.model_server import ModelServer, scripts_of

ROOT = pathlib.Path(__file__).parents[2]


def write_videos(folder, count, seed=0):
  """Renders videos; returns their scripts."""
  folder.mkdir(parents=True, exist_ok=True)
  scripts = scripts_of(count, seed)
  for script in scripts:
    drawing.write_video(folder / f"{script.name}.mp4", script)
  return scripts


def write_tasks(path, formats=("open",)):
  """Writes a file of the tasks that the demo has questions of."""
  known = tasks.read_tasks()
  kept = [
    task.model_dump(exclude_none=True) | {"formats": list(formats)}
    for task in known.tasks
    if task.name in QUESTION_MAKERS
  ]
  content = {"topics": known.topics, "tasks": kept}
  path.write_text(yaml.safe_dump(content, sort_keys=False))
  return path


def command(server: ModelServer, videos, out, *options):
  """The command line of a construction."""
  return [
    sys.executable,
    "-m",
    "hourjax.construct",
    f"--videos={videos}",
    f"--out={out}",
    f"--captioner=eye@{server.url}",
    f"--writer=pen@{server.url}",
    "--count=1",
    *options,
  ]


def construct(server: ModelServer, videos, out, *options, **environment):
  """Runs a construction to its end."""
  kept = {k: v for k, v in os.environ.items() if not k.endswith("_API_KEY")}
  return subprocess.run(
    command(server, videos, out, *options),
    cwd=ROOT,
    env=kept | environment,
    capture_output=True,
    text=True,
    timeout=240,
  )
