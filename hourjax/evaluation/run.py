"""From questions to records to a report, on one process or on many.

A video is remembered once and asked its questions in batches that do not
depend on who asks them, so the answers do not either.
"""
# MERGED hourjax.evaluation.compare:
# Folders of models to one report: the whole of an evaluation.

import os
import pathlib
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from orbax.checkpoint import multihost

from hourjax import progress
from hourjax.data.media.frame_rules import sparse_note
from hourjax.data.store.features import FeatureStore
from hourjax.errors import UserError
from hourjax.evaluation import report
from hourjax.evaluation.parsing import PARSER_VERSION, parse
from hourjax.evaluation.questions import Question
from hourjax.evaluation.records import Records, Row
from hourjax.evaluation.report import Report
from hourjax.evaluation.scoring import LeftOut, Run, is_right, score
from hourjax.evaluation.task import BATCH, EvalTask
from hourjax.extraction.video_list import worker_slice
from hourjax.parallel import hosts
from hourjax.training.metric_writer import read_curve


@runtime_checkable
class Answer(Protocol):
  """What a memory answers; see `inference`."""

  text: str
  tokens: int
  finished: bool


@runtime_checkable
class Memory(Protocol):
  """A video that a model remembers; `note` is what is to be said of it."""

  note: str

  def answer(
    self, questions: Sequence[str], *, max_tokens: int
  ) -> Sequence[Answer]: ...


@runtime_checkable
class Model(Protocol):
  """What an evaluation needs of a model."""

  name: str

  def encode_memory(self, video: str) -> Memory: ...

  def encode_stored_memory(self, store: FeatureStore, video: str) -> Memory: ...


def evaluate(
  model: Model,
  exam: EvalTask,
  out: str | os.PathLike,
  *,
  worker: tuple[int, int] = (0, 1),
) -> Report | None:
  """Asks what is not answered yet, and reports when all of it is.

  Args:
    model: as `hourjax.load` gives it.
    exam: what to ask.
    out: folder of records and report; what an earlier call answered there
      counts. Workers share it.
    worker: (i, n): takes the videos i, i + n, ...

  Returns:
    The report, also written to `out`; None while other workers have not
    answered theirs.

  Raises:
    UserError: `out` holds another run, no such worker, or nothing could be
      asked.
    OSError: `out` cannot be written, e.g. the disk is full.
  """
  ask(model, exam, out, worker=worker)
  run = gather(exam, out, worker[1])
  if run is None:
    return None
  made = report.build({model.name: run})
  report.write(made, out)
  return made


def ask(
  model: Model,
  exam: EvalTask,
  out: str | os.PathLike,
  *,
  worker: tuple[int, int] = (0, 1),
) -> None:
  """Asks one worker's share of the questions; see `evaluate`."""
  index, count = worker
  batches = exam.batches()
  share = worker_slice(list(batches), index, count)
  records = Records(out, index, count)
  records.claim({"model": model.name, **_about(exam)})
  answered = records.answered()
  todo = {
    video: [
      batch
      for batch in batches[video]
      if any(item.id not in answered for item in batch)
    ]
    for video in share
  }
  total = sum(len(batch) for video in share for batch in batches[video])
  left = sum(len(batch) for video in share for batch in todo[video])
  with progress.bar(total, unit="question", desc="answer") as bar:
    bar.initial = bar.n = total - left  # the pace is that of the others
    for video, missing in todo.items():
      for rows, lost in _ask_video(model, exam, video, missing):
        records.add([row for row in rows if row["id"] not in answered])
        records.leave_out(lost)
        bar.update(len(rows) + len(lost))


def gather(
  exam: EvalTask, out: str | os.PathLike, workers: int | None = None
) -> Run | None:
  """Scores what all workers recorded in a folder; needs no model.

  Answers are read and judged anew, so a better parser changes the score.

  Args:
    exam: that was asked.
    out: folder of the records.
    workers: how many ask now; None if none do.

  Returns:
    The run; None while questions are neither answered nor left out.

  Raises:
    UserError: no folder of an evaluation, or other questions were asked.
  """
  records = Records(out, workers=workers)
  about = records.about()
  if about.get("questions") != exam.fingerprint():
    raise UserError(
      f"{out} holds answers to {about.get('benchmark')} version"
      f" {about.get('version')}, to other questions than those of"
      f" {exam.benchmark} version {exam.version} in --data; correct --out,"
      " --benchmark, --subtitles or --data"
    )
  answered, lost = records.answered(), records.left_out()
  scored, left_out = [], list(exam.left_out)
  for item in exam.chosen:
    if item.id in answered:
      scored.append(score(item, answered[item.id]))
    elif item.id in lost:
      left_out.append(LeftOut(item.id, item.video, lost[item.id]["reason"]))
    else:
      return None
  notes = list(exam.notes)
  if (count := len(exam.questions)) > len(exam.chosen):
    notes.append(f"The first {len(exam.chosen):,} of {count:,} questions only.")
  # As it was when they were asked: reporting again needs no feature store.
  if isinstance(sparse := about.get("sparse"), int) and sparse > 0:
    notes.append(sparse_note(sparse))
  about |= {"parser": PARSER_VERSION, "notes": notes}
  return Run(about, tuple(scored), tuple(left_out))


def check(exam: EvalTask, out: str | os.PathLike) -> None:
  """Finds what `ask` would refuse, as far as it shows without the model.

  Raises:
    UserError: `out` holds answers to another exam.
  """
  Records(out).check(_about(exam))


def _about(exam: EvalTask) -> Row:
  """What the answers depend on beside the model; see `Records.claim`."""
  return {
    "benchmark": exam.benchmark,
    "version": exam.version,
    "parser": PARSER_VERSION,
    "questions": exam.fingerprint(),
    "subtitles": exam.subtitles,
    "videos": "video files" if exam.features is None else "features",
    "frames": exam.frames,
    "sparse": exam.sparse,
    "max_tokens": exam.max_tokens,
    "batch": BATCH,
  }


def _ask_video(
  model: Model,
  exam: EvalTask,
  video: str,
  batches: Sequence[Sequence[Question]],
) -> Iterator[tuple[list[Row], list[Row]]]:
  """Records of each batch, and what of it could not be asked."""
  if not batches:
    return
  began = time.monotonic()
  try:
    memory = _remember(model, exam, video)
  except UserError as error:
    for batch in batches:
      yield [], [_lost(item, error) for item in batch]
    return
  if memory.note:
    print(f"{video}: {memory.note}", file=sys.stderr, flush=True)
  for batch in batches:
    answers, lost = _answers(memory, batch, exam.max_tokens)
    now = time.monotonic()
    seconds, began = round((now - began) / len(batch), 3), now
    yield [_record(*pair, seconds) for pair in answers], lost


def _remember(model: Model, exam: EvalTask, video: str) -> Memory:
  store = exam.features
  if store is None:
    return model.encode_memory(str(exam.videos / video))
  if video not in store:
    raise UserError(
      f"{video} is not in the feature store {store.root}; extract it"
    )
  return model.encode_stored_memory(store, video)


def _answers(
  memory: Memory, batch: Sequence[Question], max_tokens: int
) -> tuple[list[tuple[Question, Answer]], list[Row]]:
  """Pairs of question and answer, and the questions that cannot be asked."""
  try:
    prompts = [item.prompt for item in batch]
    answers = memory.answer(prompts, max_tokens=max_tokens)
    return list(zip(batch, answers, strict=True)), []
  except UserError as error:
    if len(batch) == 1:
      return [], [_lost(batch[0], error)]
  # One of them is at fault: each is asked alone, the others count.
  alone = [_answers(memory, [item], max_tokens) for item in batch]
  answers = [pair for pairs, _ in alone for pair in pairs]
  return answers, [row for _, rows in alone for row in rows]


def _record(item: Question, answer: Answer, seconds: float) -> dict[str, Any]:
  parsed = parse(answer.text, item)
  return {
    "id": item.id,
    "video": item.video,
    "tasks": list(item.tasks),
    "duration": item.duration,
    "prompt": item.prompt,
    "answer": answer.text,
    "parsed": parsed,
    "expected": item.expected,
    "correct": is_right(parsed, item),
    "finished": bool(answer.finished),
    "tokens": int(answer.tokens),
    "seconds": seconds,
  }


def _lost(item: Question, error: UserError) -> Row:
  return {"id": item.id, "video": item.video, "reason": str(error)}


_WEEK = 7 * 24 * 3600  # seconds

Folders = Mapping[str, pathlib.Path]


def evaluate_folders(
  folders: Sequence[str | os.PathLike],
  exam: EvalTask,
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
  exam: EvalTask, out: str | os.PathLike, name: str | None = None
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


def default_out(folder: pathlib.Path, exam: EvalTask) -> pathlib.Path:
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
