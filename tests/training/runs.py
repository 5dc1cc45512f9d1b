"""Whole trainings as processes: small data, one command, its losses."""

import atexit
import contextlib
import dataclasses
import functools
import json
import pathlib
import socket
import subprocess
import tempfile
import time

import pytest
from ml_collections import ConfigDict

from configs import demo
from hourjax.data.demo import build
from hourjax.data.prepare import build as prepare
from hourjax.data.prepare import lists
from hourjax.data.prepare.holdout import name_number
from hourjax.extraction.worker import extract_videos
from hourjax.models.params import init_params
from hourjax.training.config import build_experiment
from hourjax.training.metric_writer import MetricWriter, read_metrics
from tests.training.fork_server import Server
from tests.xla_flags import xla_flags

# Of the demo's configuration: the smallest model that has all parts.
SMALL = {
  "model.decoder.layers": 1,
  "model.memaug_layers": 1,
  "batch_rows": 1,
  "accumulate": 2,
  "log_every": 1,
  "data.max_skipped": 0.5,
  # Two videos in a row, each with questions of its own, and all of it drawn.
  "rows.features": 1360,
  "rows.memory": 1700,
  "rows.queries": 400,
  "rows.decoder": 448,
  "forgetting.max_frames": 64,
  "data.share_memory": 1,
  "draw_missing": "",
  "optimizer.name": "adamw",
  "optimizer.projector": 1.5e-3,
  "optimizer.memaug": 1.5e-3,
  "optimizer.decoder": 1.5e-3,
}


@contextlib.contextmanager
def interrupted_at(step: int):
  """Interrupts the training inside of it when the metrics of a step are due."""
  write = MetricWriter.write

  def stop(self, number, *args, **values):
    write(self, number, *args, **values)
    if number == step:
      raise KeyboardInterrupt

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(MetricWriter, "write", stop)
    with pytest.raises(KeyboardInterrupt):
      yield


def small_config(data: pathlib.Path, **changes):
  """The demo's last stage on `data`; keys of `changes` have __ for dots."""
  config = demo.get_config(f"data={data},stage=3")
  changes = {key.replace("__", "."): value for key, value in changes.items()}
  config.update_from_flattened_dict(SMALL | changes)
  return config


def make_data(folder: pathlib.Path, *extra: dict) -> pathlib.Path:
  """Six conversations about three videos, and `extra` raw records."""
  options = build.Options(train_videos=3, test_scale=0.02, conversations=2)
  build.build(folder, options)
  path = folder / "train.json"
  records = json.loads(path.read_text())
  for number, record in enumerate(records):
    turns = 1 + number % 2
    record["conversations"] = record["conversations"][: 2 * turns]
    record["questions"] = record["questions"][:turns]
  path.write_text(json.dumps([*extra, *records]))
  made = build_experiment(small_config(folder).to_dict())
  options = prepare.Options(
    items=(lists.Item.of_files([str(path)]),), tokenizer=f"{folder}/tokenizer"
  )
  prepare.build(folder / "stage3", options, workers=1)
  _prepare_held_out(folder)
  extract_videos(
    init_params(made.model, made.seed),
    made.model,
    videos=folder / "videos",
    out=folder / "features",
    batch_frames=64,
  )
  return folder


def _prepare_held_out(folder: pathlib.Path) -> None:
  """A dataset in which two of the three videos are held out.

  They have a stream more: single questions, some of them with options, that
  were written for another video.
  """
  train, test = (
    json.loads((folder / f"{name}.json").read_text())
    for name in ("train", "test")
  )
  train = [record for record in train if record["id"] != "bad"]
  videos = sorted({record["video"] for record in train}, key=name_number)
  items = []
  for stream, records in (
    ("long", train),
    ("short", [{**r, "video": videos[i % 2]} for i, r in enumerate(test)]),
  ):
    path = folder / f"held_out_{stream}.json"
    path.write_text(json.dumps(records))
    items.append(lists.Item((path,), stream=stream, name=str(path)))
  options = prepare.Options(
    items=tuple(items), tokenizer=f"{folder}/tokenizer", holdout="2"
  )
  prepare.build(folder / "held_out", options, workers=1)


def changed(experiment, **changes):
  """The experiment with other values; keys have __ for dots."""
  config = ConfigDict(dataclasses.asdict(experiment))
  changes = {key.replace("__", "."): value for key, value in changes.items()}
  config.update_from_flattened_dict(changes)
  return build_experiment(config.to_dict())


@functools.cache
def _server() -> Server:
  server = Server()
  server.ask({"warm": small_config(pathlib.Path("data")).to_dict()})
  atexit.register(server.close)
  return server


class Training:
  """A process of `python -m hourjax.train`."""

  def __init__(
    self,
    data: pathlib.Path,
    workdir: pathlib.Path,
    *,
    file_bytes: int | None = None,
    toy: bool = False,
    env: dict[str, str] | None = None,
    **changes,
  ):
    """Starts it.

    Args:
      data: of `make_data`.
      workdir: of the run.
      file_bytes: no file may grow larger.
      toy: whether the train step is that of `toy`.
      env: more variables.
      changes: of the configuration, with __ for dots.
    """
    changes = SMALL | {k.replace("__", "."): v for k, v in changes.items()}
    arguments = [
      f"--config=configs/demo.py:data={data},stage=3",
      f"--workdir={workdir}",
      *(f"--config.{key}={value}" for key, value in changes.items()),
    ]
    variables = {
      # Compiled once, by the first process.
      "JAX_COMPILATION_CACHE_DIR": f"{data}/compiled",
      "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
      "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
      **(env or {}),
    }
    # Not a pipe: one that nobody reads would stop a talkative process.
    self._said = tempfile.NamedTemporaryFile("r")  # noqa: SIM115
    self.process = _server().start(
      arguments,
      env=variables,
      said=self._said.name,
      file_bytes=file_bytes,
      toy=toy,
    )

  def said(self) -> str:
    """What it wrote to stderr so far."""
    self._said.seek(0)
    return self._said.read()

  def ended(self, timeout: float = 240) -> tuple[int, str]:
    """Its exit status and what it said; killed if it does not end."""
    try:
      self.process.wait(timeout)
    except subprocess.TimeoutExpired:
      self.process.kill()
      self.process.wait()
      message = f"did not end in {timeout} s:\n{self.said()}"
      raise AssertionError(message) from None
    return self.process.returncode, self.said()

  def when(self, condition, timeout: float = 120) -> bool:
    """Waits until `condition()` or its end; tells whether the former came."""
    until = time.monotonic() + timeout
    while time.monotonic() < until:
      with contextlib.suppress(OSError):
        if condition():
          return True
      if self.process.poll() is not None:
        return False
      time.sleep(0.005)
    raise AssertionError(f"nothing came of it in {timeout} s")


def hosts(count: int, devices: int = 1) -> list[dict[str, str]]:
  """Variables of `count` processes that are one run."""
  with socket.socket() as free:
    free.bind(("localhost", 0))
    port = free.getsockname()[1]
  return [
    {
      "HOURJAX_COORDINATOR": f"localhost:{port}",
      "HOURJAX_PROCESSES": str(count),
      "HOURJAX_PROCESS": str(index),
      "XLA_FLAGS": xla_flags(devices),
    }
    for index in range(count)
  ]


def losses(workdir: pathlib.Path) -> list[tuple[float, ...]]:
  """(step, loss, gradient norm, tokens) of each logged step."""
  kept = ("step", "loss", "grad_norm", "tokens")
  return [tuple(row[key] for key in kept) for row in read_metrics(workdir)]


def evaluations(workdir: pathlib.Path) -> list[dict[str, float]]:
  """The step and all metrics of each evaluation on held-out data."""
  return [
    {k: v for k, v in row.items() if k == "step" or k.startswith("eval/")}
    for row in read_metrics(workdir)
    if "eval/answer_loss" in row
  ]


def logged(workdir: pathlib.Path) -> int:
  """Lines of metrics.jsonl so far."""
  path = workdir / "metrics.jsonl"
  return path.read_bytes().count(b"\n") if path.exists() else 0
