"""Folders of models to one report: the whole of an evaluation."""

import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from orbax.checkpoint import multihost

from hourjax import progress
from hourjax.errors import UserError
from hourjax.evaluation import report
from hourjax.evaluation.exam import Exam
from hourjax.evaluation.report import Report
from hourjax.evaluation.run import Model, ask, check, gather
from hourjax.parallel import hosts
from hourjax.training.metrics import read_curve

_WEEK = 7 * 24 * 3600  # seconds

Folders = Mapping[str, pathlib.Path]


def evaluate_folders(
  folders: Sequence[str | os.PathLike],
  exam: Exam,
  load: Callable[[str], Model],
  *,
  out: str | os.PathLike | None = None,
  names: Sequence[str] = (),
  worker: tuple[int, int] = (0, 1),
) -> Report | None:
  """Asks one or more models the same questions and reports on all of them.

  The first model's answers and the report go to `out`, each other one's
  answers to its own default folder, where a later comparison finds them.

  Args:
    folders: of the models; the first one is reported on.
    exam: what to ask.
    load: makes a model of a folder; one is in memory at a time.
    out: folder; by default `default_out` of the first model.
    names: of the models in the report; by default a lone model's own, else
      what tells the folders apart.
    worker: (i, n), as in `run.evaluate`.

  Returns:
    The report; None while other workers have not answered their share.

  Raises:
    UserError: as `run.evaluate`; a folder that is not there or there twice; a
      number of names that is not that of the models.
  """
  paths = [pathlib.Path(folder) for folder in folders]
  _check(paths, names)
  outs = [default_out(path, exam) for path in paths]
  if out is not None:
    outs[0] = pathlib.Path(out)
  for where in outs:  # before the first of them takes hours
    check(exam, where)
  if hosts.is_primary() and exam.notes:
    print("\n".join(exam.notes))
  own = []
  for number, (path, where) in enumerate(zip(paths, outs)):
    if hosts.is_primary():
      print(f"{path}: answers go to {where}", flush=True)
    # Processes of one run read a checkpoint together.
    _meet(f"evaluation-{number}")
    model = load(str(path))
    own.append(model.name)
    ask(model, exam, where, worker=worker)
    del model  # before the next one is loaded
  _meet("evaluation-end")
  names = names or (own if len(own) == 1 else told_apart(paths))
  runs = {
    name: gather(exam, where, worker[1]) for name, where in zip(names, outs)
  }
  if None in runs.values():
    print("other workers have more to ask; the last one writes the report")
    return None
  with progress.step("judging the answers and writing the report"):
    made = report.build(runs)
    if hosts.is_primary():
      curves = losses_of(dict(zip(names, paths)))
      files = report.write(made, outs[0], curves)
  if hosts.is_primary():
    print(f"report in {outs[0]}: {', '.join(files)}")
  return made


def report_again(
  exam: Exam, out: str | os.PathLike, name: str | None = None
) -> Report:
  """Reads and judges the answers in a folder anew; asks nothing.

  Raises:
    UserError: no folder of an evaluation, of another exam, or questions
      that were not asked yet.
  """
  run = gather(exam, out)
  if run is None:
    raise UserError(
      f"{out} holds answers to some of the questions only; give --model to ask"
      " the others, or the same --limit"
    )
  made = report.build({name or str(run.about.get("model")): run})
  print(f"report in {out}: {', '.join(report.write(made, out))}")
  return made


def default_out(folder: pathlib.Path, exam: Exam) -> pathlib.Path:
  """MODEL/evaluation/BENCHMARK, with -subtitles where prompts hold them."""
  suffix = "-subtitles" if exam.subtitles else ""
  return folder / "evaluation" / f"{exam.benchmark}{suffix}"


def told_apart(folders: Sequence[pathlib.Path]) -> list[str]:
  """The parts of paths in which they differ.

  [work/memaug/stage2, work/plain/stage2] -> ["memaug", "plain"]
  """
  parts = [folder.absolute().parts for folder in folders]
  while all(p and p[0] == parts[0][0] for p in parts):
    parts = [p[1:] for p in parts]
  while all(p and p[-1] == parts[0][-1] for p in parts):
    parts = [p[:-1] for p in parts]
  names = ["/".join(p) or folder.name for p, folder in zip(parts, folders)]
  if len(set(names)) < len(names):  # one folder lies in the other
    return [str(folder) for folder in folders]
  return names


def losses_of(folders: Folders) -> dict[str, list[dict[str, Any]]]:
  """Loss curves of the folders that are workdirs of ours, by name."""
  return {
    name: read_curve(folder)
    for name, folder in folders.items()
    if (folder / "metrics.jsonl").exists() and (folder / "config.json").exists()
  }


def _meet(where: str) -> None:
  """Waits for the other processes of this run, as long as it takes.

  A collective would give up on those that have more to ask.
  """
  wait = multihost.get_barrier_sync_fn()
  wait(key=where, timeout_ms=_WEEK * 1000)


def _check(paths: Sequence[pathlib.Path], names: Sequence[str]) -> None:
  for path in paths:
    if not path.is_dir():
      raise UserError(f"{path} is no folder of a model; correct it")
    if not (path / "config.json").is_file():
      raise UserError(
        f"{path} has no config.json, so it is neither the workdir of a training"
        " run nor an official checkpoint; correct it"
      )
  if len({path.resolve() for path in paths}) < len(paths):
    raise UserError(
      f"{', '.join(map(str, paths))}: a model cannot be compared with itself"
    )
  if names and len(set(names)) != len(paths):
    raise UserError(
      f"--names={','.join(names)} has {len(set(names))} different names for"
      f" {len(paths)} models; give one each"
    )
