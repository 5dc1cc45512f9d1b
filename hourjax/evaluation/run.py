"""From questions to answers on disk to a report, by one process or several.

A video's memory is encoded once, and its questions are asked in batches that do
not depend on the number of processes. So the answers do not depend on it
either.

  evaluate_folders   one or more models, each from its folder, to one report
  evaluate           a loaded model to a report: `ask`, `gather`, `report.build`
  report_again       a report of the answers in a folder, without a model
"""

import os
import pathlib
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from orbax.checkpoint import multihost

from hourjax import hub, progress
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
  """Describes an answer of a memory, such as `inference.memory.Answer`."""

  @property
  def text(self) -> str:
    """Returns the answer."""

  @property
  def tokens(self) -> int:
    """Returns its number of tokens."""

  @property
  def finished(self) -> bool:
    """Returns whether it ended by itself, before the limit of tokens."""


@runtime_checkable
class Memory(Protocol):
  """Describes the encoded memory of a video.

  Attributes:
    note: what a user should know of the video's frames; usually "".
  """

  note: str

  def answer(
    self, questions: Sequence[str], *, max_tokens: int
  ) -> Sequence[Answer]:
    """Answers questions about the video, in their order."""


@runtime_checkable
class Model(Protocol):
  """Describes the part of a model that an evaluation uses.

  Attributes:
    name: name of the model, which identifies its weights; records carry it.
  """

  name: str

  def encode_memory(self, source: str, /) -> Memory:
    """Encodes the memory of a video file, given by its path."""

  def encode_stored_memory(self, store: FeatureStore, video: str, /) -> Memory:
    """Encodes the memory of a video in a feature store, given by its name."""


def evaluate(
  model: Model,
  task: EvalTask,
  out: str | os.PathLike,
  *,
  worker: tuple[int, int] = (0, 1),
) -> Report | None:
  """Asks the questions that are not answered yet; reports if all are answered.

  Args:
    model: model, such as `hourjax.load` returns.
    task: questions to ask.
    out: folder of records and report. Answers that an earlier call left there
      count. All workers share it.
    worker: (i, n): this process takes the videos i, i + n, ...

  Returns:
    The report, which is also written to `out`; None while other workers have
    not answered their questions.

  Raises:
    UserError: `out` holds another run, there is no such worker, or no question
      could be asked.
    OSError: `out` cannot be written, e.g. because the disk is full.
  """
  ask(model, task, out, worker=worker)
  run = gather(task, out, worker[1])
  if run is None:
    return None
  result = report.build({model.name: run})
  report.write(result, out)
  return result


def ask(
  model: Model,
  task: EvalTask,
  out: str | os.PathLike,
  *,
  worker: tuple[int, int] = (0, 1),
) -> None:
  """Asks one worker's part of the questions, without a report.

  Args and errors are those of `evaluate`.
  """
  index, count = worker
  batches = task.batches()
  share = worker_slice(list(batches), index, count)
  records = Records(out, index, count)
  records.claim({"model": model.name, **_about(task)})
  answered = records.answered()
  missing = {
    video: [
      batch
      for batch in batches[video]
      if any(item.id not in answered for item in batch)
    ]
    for video in share
  }
  total = sum(len(batch) for video in share for batch in batches[video])
  left = sum(len(batch) for video in share for batch in missing[video])
  with progress.bar(total, unit="question", desc="answer") as bar:
    # Questions that are answered already must not count in the bar's speed.
    bar.initial = bar.n = total - left
    for video in missing:
      for rows, failed in _ask_video(model, task, video, missing[video]):
        # A batch is asked whole, so that its answers do not depend on a kill
        # before; those that were recorded before it are not recorded again.
        records.add([row for row in rows if row["id"] not in answered])
        records.leave_out(failed)
        bar.update(len(rows) + len(failed))


def gather(
  task: EvalTask, out: str | os.PathLike, workers: int | None = None
) -> Run | None:
  """Scores what all workers recorded in a folder; needs no model.

  Answers are parsed and scored again, so a better parser changes the score.

  Args:
    task: questions that were asked.
    out: folder of the records.
    workers: number of workers that are asking; None if none is.

  Returns:
    The run; None while some question is neither answered nor left out.

  Raises:
    UserError: the folder is not that of an evaluation, or other questions were
      asked.
  """
  records = Records(out, workers=workers)
  about = records.about()
  if about.get("questions") != task.fingerprint():
    raise UserError(
      f"{out} holds answers to {about.get('benchmark')} version"
      f" {about.get('version')}, to other questions than those of"
      f" {task.benchmark} version {task.version} in --data; correct --out,"
      " --benchmark, --subtitles or --data"
    )
  answered, failed = records.answered(), records.left_out()
  scored, left_out = [], list(task.left_out)
  for item in task.chosen:
    if item.id in answered:
      scored.append(score(item, answered[item.id]))
    elif item.id in failed:
      left_out.append(LeftOut(item.id, item.video, failed[item.id]["reason"]))
    else:
      return None
  notes = list(task.notes)
  if (count := len(task.questions)) > len(task.chosen):
    notes.append(f"The first {len(task.chosen):,} of {count:,} questions only.")
  # The number as it was when the questions were asked, because a report that is
  # made again is made without the feature store.
  if isinstance(sparse := about.get("sparse"), int) and sparse > 0:
    notes.append(sparse_note(sparse))
  about |= {"parser": PARSER_VERSION, "notes": notes}
  return Run(about, tuple(scored), tuple(left_out))


def check(task: EvalTask, out: str | os.PathLike) -> None:
  """Raises the errors of `ask` that can be found without the model.

  Args:
    task: questions to ask.
    out: folder of the records.

  Raises:
    UserError: `out` holds answers to other questions, or cannot be written to.
  """
  Records(out).check(_about(task))


def _about(task: EvalTask) -> Row:
  """Returns what the answers depend on beside the model."""
  return {
    "benchmark": task.benchmark,
    "version": task.version,
    "parser": PARSER_VERSION,
    "questions": task.fingerprint(),
    "subtitles": task.subtitles,
    "videos": "video files" if task.features is None else "features",
    "frames": task.frames,
    "sparse": task.num_sparse,
    "max_tokens": task.max_tokens,
    "batch": BATCH,
  }


def _ask_video(
  model: Model,
  task: EvalTask,
  video: str,
  batches: Sequence[Sequence[Question]],
) -> Iterator[tuple[list[Row], list[Row]]]:
  """Yields the records of each batch, and of questions that failed."""
  if not batches:
    return
  start = time.monotonic()
  try:
    memory = _encode_memory(model, task, video)
  except UserError as error:
    for batch in batches:
      yield [], [_failed_row(item, error) for item in batch]
    return
  if memory.note:
    print(f"{video}: {memory.note}", file=sys.stderr, flush=True)
  for batch in batches:
    answers, failed = _answers(memory, batch, task.max_tokens)
    now = time.monotonic()
    # The first batch's time includes the encoding of the memory.
    seconds, start = round((now - start) / len(batch), 3), now
    yield [_answer_row(*pair, seconds) for pair in answers], failed


def _encode_memory(model: Model, task: EvalTask, video: str) -> Memory:
  """Encodes a video's memory, from its file or from stored features."""
  store = task.features
  if store is None:
    return model.encode_memory(str(task.videos / video))
  if video not in store:
    raise UserError(
      f"{video} is not in the feature store {store.root}; extract it"
    )
  return model.encode_stored_memory(store, video)


def _answers(
  memory: Memory, batch: Sequence[Question], max_tokens: int
) -> tuple[list[tuple[Question, Answer]], list[Row]]:
  """Asks one batch.

  Returns:
    Pairs of question and answer, and the records of questions that failed.
  """
  try:
    prompts = [item.prompt for item in batch]
    answers = memory.answer(prompts, max_tokens=max_tokens)
    return list(zip(batch, answers, strict=True)), []
  except UserError as error:
    if len(batch) == 1:
      return [], [_failed_row(batch[0], error)]
  # One question of the batch cannot be asked. Each is asked alone, so that the
  # others are answered.
  alone = [_answers(memory, [item], max_tokens) for item in batch]
  answers = [pair for pairs, _ in alone for pair in pairs]
  return answers, [row for _, rows in alone for row in rows]


def _answer_row(item: Question, answer: Answer, seconds: float) -> Row:
  """Returns the record of an answer."""
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


def _failed_row(item: Question, error: UserError) -> Row:
  """Returns the record of a question that could not be asked."""
  return {"id": item.id, "video": item.video, "reason": str(error)}


# --- Models in folders -------------------------------------------------------

_WEEK = 7 * 24 * 3600  # seconds


def evaluate_folders(
  folders: Sequence[str | os.PathLike],
  task: EvalTask,
  load: Callable[[str], Model],
  *,
  out: str | os.PathLike | None = None,
  names: Sequence[str] = (),
  worker: tuple[int, int] = (0, 1),
) -> Report | None:
  """Asks one or more models the same questions and reports on all of them.

  The first model's answers and the report go to `out`. The answers of each
  other model go to its own default folder, where a later comparison finds them.

  Args:
    folders: folders of the models; the report is about the first.
    task: questions to ask.
    load: loads the model of a folder; one model is in memory at a time.
    out: folder of the report; by default `default_out` of the first model.
    names: names of the models in the report. By default a single model has its
      own name, and several have the parts in which their folders differ.
    worker: (i, n), as in `evaluate`.

  Returns:
    The report; None while other workers have not answered their questions.

  Raises:
    UserError: as `evaluate`; a folder that does not exist or is named twice; or
      another number of names than of models.
  """
  paths = [hub.local_folder(folder) for folder in folders]
  _check_folders(paths, names)
  own = [hub.own_folder(folder) for folder in folders]
  outs = [default_out(folder, task) for folder in own]
  if out is not None:
    outs[0] = pathlib.Path(out)
  # All folders are checked before the first model answers for hours.
  for where in outs:
    check(task, where)
  if hosts.is_primary() and task.notes:
    print("\n".join(task.notes))
  own_names = []
  for number, (path, where) in enumerate(zip(paths, outs)):
    if hosts.is_primary():
      print(f"{path}: answers go to {where}", flush=True)
    # Processes of one run read a checkpoint together.
    _barrier(f"evaluation-{number}")
    model = load(str(path))
    own_names.append(model.name)
    ask(model, task, where, worker=worker)
    # Frees the device's memory before the next model is loaded.
    del model
  _barrier("evaluation-end")
  names = names or (own_names if len(paths) == 1 else distinct_names(own))
  runs = {}
  for name, where in zip(names, outs):
    if (run := gather(task, where, worker[1])) is None:
      print("other workers have more to ask; the last one writes the report")
      return None
    runs[name] = run
  with progress.step("judging the answers and writing the report"):
    result = report.build(runs)
    files = []
    if hosts.is_primary():
      files = report.write(result, outs[0], losses(dict(zip(names, paths))))
  if files:
    print(f"report in {outs[0]}: {', '.join(files)}")
  return result


def report_again(
  task: EvalTask, out: str | os.PathLike, name: str | None = None
) -> Report:
  """Parses and scores the answers in a folder again; asks nothing.

  Args:
    task: questions that were asked.
    out: folder of the answers; the report goes there, too.
    name: name of the model in the report; by default its own.

  Raises:
    UserError: the folder is not that of an evaluation, other questions were
      asked, or some were not asked yet.
  """
  run = gather(task, out)
  if run is None:
    raise UserError(
      f"{out} holds answers to some of the questions only; give --model to ask"
      " the others, or the same --limit"
    )
  result = report.build({name or str(run.about.get("model")): run})
  print(f"report in {out}: {', '.join(report.write(result, out))}")
  return result


def default_out(folder: pathlib.Path, task: EvalTask) -> pathlib.Path:
  """Returns MODEL/evaluation/BENCHMARK, the default folder of a report.

  The name ends in -subtitles where prompts hold subtitles.

  Args:
    folder: folder of the model.
    task: questions to ask.
  """
  suffix = "-subtitles" if task.subtitles else ""
  return folder / "evaluation" / f"{task.benchmark}{suffix}"


def distinct_names(folders: Sequence[pathlib.Path]) -> list[str]:
  """Returns the parts of paths in which they differ.

  [a/memaug/stage2, a/plain/stage2] -> ["memaug", "plain"]

  Args:
    folders: folders of the models, all different.
  """
  parts = [folder.absolute().parts for folder in folders]
  while all(p and p[0] == parts[0][0] for p in parts):
    parts = [p[1:] for p in parts]
  while all(p and p[-1] == parts[0][-1] for p in parts):
    parts = [p[:-1] for p in parts]
  names = ["/".join(p) or folder.name for p, folder in zip(parts, folders)]
  # Parts that remain are alike where one folder lies in the other.
  if len(set(names)) < len(names):
    return [str(folder) for folder in folders]
  return names


def losses(
  folders: Mapping[str, pathlib.Path],
) -> dict[str, list[dict[str, Any]]]:
  """Reads the loss curves of those folders that are workdirs of ours.

  Args:
    folders: name -> folder.

  Returns:
    Name -> rows with "step" and "loss"; other folders are absent.
  """
  return {
    name: read_curve(folder)
    for name, folder in folders.items()
    if (folder / "metrics.jsonl").exists() and (folder / "config.json").exists()
  }


def _barrier(name: str) -> None:
  """Waits for the other processes of this run, for up to a week.

  A collective operation would time out while they still ask.
  """
  wait = multihost.get_barrier_sync_fn()
  wait(key=name, timeout_ms=_WEEK * 1000)


def _check_folders(paths: Sequence[pathlib.Path], names: Sequence[str]) -> None:
  """Raises a UserError if folders or their names are not as they must be."""
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
