"""Runs a table: trains and evaluates its rows, one process after the other.

Each row and seed is a training and an evaluation, by the same commands that one
would type. What is finished is kept in the folder, so that the same command
goes on where it was interrupted.
"""

import dataclasses
import json
import os
import pathlib
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from hourjax import processes, progress, schema
from hourjax.ablation import plan
from hourjax.ablation.report import Result
from hourjax.ablation.tables import Table
from hourjax.atomic_file import write_file
from hourjax.data.prepared import Prepared
from hourjax.errors import UserError
from hourjax.evaluation import report
from hourjax.evaluation import run as asking
from hourjax.evaluation.task import EvalTask, open_task
from hourjax.training.checkpoint_format import (
  checkpoint_folder,
  checkpoint_steps,
)
from hourjax.training.workdir import (
  check_config_change,
  config_diff,
  find_config,
)

# It is read as configurations are, by its path.
_RUN_CONFIG = pathlib.Path(__file__).with_name("run_config.py")
_INTERRUPTED = 128 + signal.SIGINT
_LEFT_OUT = 3  # status of an evaluation that left questions out


@dataclasses.dataclass(frozen=True)
class Questions:
  """Says what the trained models are asked; options of `hourjax.evaluate`.

  Attributes:
    benchmark: name of the benchmark.
    data: its folder.
    features: feature store; None to read videos.
    videos: folder of the videos, if elsewhere.
    subtitles: whether prompts hold subtitles.
    limit: number of questions; None for all.
  """

  benchmark: str
  data: str
  features: str | None = None
  videos: str | None = None
  subtitles: bool = False
  limit: int | None = None

  def open(self) -> EvalTask:
    """Reads the benchmark."""
    return open_task(
      self.benchmark,
      self.data,
      subtitles=self.subtitles,
      features=self.features,
      videos=self.videos,
      limit=self.limit,
    )

  def options(self) -> list[str]:
    """Returns the options of the command."""
    given = dataclasses.asdict(self)
    given["subtitles"] = str(self.subtitles).lower()
    return [f"--{k}={v}" for k, v in given.items() if v is not None]


def run_table(
  table: Table,
  config: Mapping[str, Any],
  questions: Questions,
  *,
  out: str | os.PathLike,
  seeds: int,
) -> list[tuple[plan.Job, Result]]:
  """Trains and evaluates all rows.

  Args:
    table: what to run.
    config: configuration of the last stage.
    questions: what the trained models are asked.
    out: folder of the runs; several tables may share it.
    seeds: runs of each row.

  Returns:
    The runs of all rows with their results.

  Raises:
    UserError: something is missing, the folder holds other runs, or a run
      fails.
  """
  folder = pathlib.Path(out)
  jobs = plan.plan_jobs(table, config, folder, seeds)
  _check_trainings(jobs)
  with progress.step("reading the benchmark"):
    task = questions.open()
  asked = f"{task.fingerprint()} {len(task.chosen)}"
  done = _finished(jobs, task, asked)
  seconds = [result.seconds for result in done.values()]
  left = len({job.training.folder for job in jobs} - done.keys())
  for number, job in enumerate(jobs, 1):
    where = job.training.folder
    if where in done:
      continue
    began = time.monotonic()
    head = f"[{number}/{len(jobs)}] {job.row.label}, seed {job.seed}"
    time_left = _time_left(seconds, left)
    for each in job.earlier:
      _train(each, f"{head}: training {each.name}{time_left}")
    _train(job.training, f"{head}: training{time_left}")
    _say(f"{head}: evaluating{time_left}")
    done[where] = _evaluate(job, questions, asked, began)
    seconds.append(done[where].seconds)
    left -= 1
    _say(f"{head}: {100 * done[where].accuracy:.1f} % right")
  return [(job, done[job.training.folder]) for job in jobs]


def _say(text: str) -> None:
  """Prints a line at once, before a process of ours prints."""
  print(text, flush=True)


def _time_left(seconds: Sequence[float], left: int) -> str:
  """Returns how long the runs that are left will take, if it is known."""
  if not seconds:
    return ""
  mean = sum(seconds) / len(seconds)
  return f" (about {progress.duration(mean * left)} left)"


def _check_trainings(jobs: Sequence[plan.Job]) -> None:
  """Checks what can be checked before hours of training.

  Raises:
    UserError: a dataset is missing, or the folder holds other runs.
  """
  for training in plan.different_trainings(jobs):
    dataset = training.experiment.data.dataset
    if not dataset:
      raise UserError(
        "config.data.dataset is empty; set --config.data.dataset=FOLDER (a"
        " dataset is what `python -m hourjax.prepare` writes)"
      )
    Prepared(dataset)  # raises if it is none
    old = find_config(training.workdir)
    if old is not None:
      check_config_change(old, training.experiment, training.workdir)


def _finished(
  jobs: Sequence[plan.Job], task: EvalTask, asked: str
) -> dict[pathlib.Path, Result]:
  """Returns the results that are there, by the folder of the run.

  Raises:
    UserError: one of them is that of another run or of other questions.
  """
  done = {}
  for job in jobs:
    asking.check(task, job.training.folder / "evaluation")
    path = job.training.folder / "result.json"
    if path.exists():
      result = schema.read_schema(Result, path, remedy="delete it")
      _check_result(result, job, asked, path)
      done[job.training.folder] = result
  return done


def _check_result(
  result: Result, job: plan.Job, asked: str, path: pathlib.Path
) -> None:
  """Raises a UserError if a finished run is that of something else."""
  new = dataclasses.asdict(job.training.experiment)
  found = [
    f"{key}: {old} -> {now}"
    for key, (old, now) in config_diff(result.config, new).items()
  ]
  if result.questions != asked:
    found.append(f"questions: {result.questions} -> {asked}")
  if found:
    raise UserError(
      f"{path} is the result of another run ({'; '.join(found)}); choose"
      " another --out"
    )


def _train(training: plan.Training, title: str) -> None:
  """Trains, or goes on; nothing happens if it is done.

  Raises:
    UserError: the training fails or stops early.
  """
  folder, experiment = training.folder, training.experiment
  finished = folder / "trained"
  if finished.exists():
    return
  _say(title)
  folder.mkdir(parents=True, exist_ok=True)
  path = folder / "config.json"
  write_file(path, json.dumps(dataclasses.asdict(experiment), indent=2) + "\n")
  _command(
    "hourjax.train",
    f"--config={_RUN_CONFIG}:{path}",
    f"--workdir={training.workdir}",
  )
  steps = checkpoint_steps(checkpoint_folder(training.workdir))
  if experiment.steps and max(steps, default=0) < experiment.steps:
    raise UserError(
      f"{training.workdir} stopped after step {max(steps, default=0)} of"
      f" {experiment.steps}; start again to go on"
    )
  write_file(finished, "")


def _evaluate(
  job: plan.Job, questions: Questions, asked: str, began: float
) -> Result:
  """Asks the trained model, and writes the run's result.

  Raises:
    UserError: the evaluation fails.
  """
  folder = job.training.folder
  out = folder / "evaluation"
  _command(
    "hourjax.evaluate",
    f"--model={job.training.workdir}",
    f"--out={out}",
    *questions.options(),
    accepted=(0, _LEFT_OUT),
  )
  found = report.load(out)
  (own,) = found.names
  tasks = {
    task: runs[own]
    for task, runs in found.groups("task").items()
    if runs[own]["count"]
  }
  result = Result(
    config=dataclasses.asdict(job.training.experiment),
    questions=asked,
    accuracy=found.data["accuracy"],
    count=found.data["count"],
    chance=found.data["chance"],
    left_out=found.left_out,
    by_task={task: each["accuracy"] for task, each in tasks.items()},
    chance_by_task={task: each["chance"] for task, each in tasks.items()},
    count_by_task={task: each["count"] for task, each in tasks.items()},
    seconds=time.monotonic() - began,
  )
  text = result.model_dump_json(indent=2)
  write_file(folder / "result.json", text + "\n")
  return result


def _command(
  module: str, *options: str, accepted: Sequence[int] = (0,)
) -> None:
  """Runs a command of ours in a process that ends with this one.

  Raises:
    UserError: it fails; it has said why.
    KeyboardInterrupt: after the process has ended, too.
  """
  process = subprocess.Popen(
    processes.module_command(module, *options),
    # Ctrl-C reaches it through us alone: a second signal would end it at once.
    process_group=0,
  )
  status = _wait(process.wait, lambda: process.send_signal(signal.SIGINT))
  if status == _INTERRUPTED:
    raise KeyboardInterrupt
  if status not in accepted:
    raise UserError(
      f"`python -m {module} {' '.join(options)}` ended with status {status};"
      " see above. When that is settled, start again to go on"
    )


def _wait(wait: Callable[[], int], interrupt: Callable[[], None]) -> int:
  """Waits for a process, and lets it end in its own way on Ctrl-C."""
  try:
    return wait()
  except KeyboardInterrupt:
    interrupt()
    wait()
    raise
