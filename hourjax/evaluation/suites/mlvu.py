"""MLVU: multiple choice about videos of 3 minutes to 2 hours, seven tasks.

Files: the authors' `json/1_plotQA.json` to `7_topic_reasoning.json` with
`video/<same name>/` (MLVU/MVLU on Hugging Face), or `mlvu/test-*.parquet`,
whose questions hold their options as text (sy1998/MLVU_dev and MLVU_Test).
Tasks 8 and 9 are free text, scored by another model, and left out.

Prompt: lmms-eval's `mlvu_dev`. The authors open the answer with "Best Option:
("; lmms-eval ends the prompt with it.

The benchmark's score is the mean of its tasks' accuracies.
"""

from typing import Any

from hourjax.errors import UserError
from hourjax.evaluation.parsing import LETTERS
from hourjax.evaluation.questions import Question
from hourjax.evaluation.suites import fields
from hourjax.evaluation.suites.suite import Source, Suite

QUESTION = "{question}\n{options}\nOnly give the best option.\nBest option: ("


def read(source: Source) -> list[Question]:
  """One question a row; ids count the rows of a file, which have none."""
  return [
    _question(row, source, number) for number, row in enumerate(source.rows)
  ]


def _question(row: dict[str, Any], source: Source, number: int) -> Question:
  part = source.file.stem
  name = f"{part}/{number}"
  at = f"{source.file.name}: question {name}"
  text, _ = fields.split_options(fields.text(row, "question", at))
  options = fields.texts(row, "candidates", at)
  seconds = row.get("duration")
  kind = "question_type" if "question_type" in row else "task_type"
  return Question(
    id=name,
    video=_video(row, source, kind, at),
    prompt=QUESTION.format(
      question=text, options=fields.lettered(options, "({}) {}")
    ),
    expected=_expected(row, options, at),
    kind="choice",
    options=options,
    tasks=(fields.text(row, kind, at),),
    duration=fields.minutes_range(seconds),
    chance=1 / len(options),
  )


def _video(row: dict[str, Any], source: Source, kind: str, at: str) -> str:
  """There is a folder a task, and tasks have other videos of the same name."""
  name = fields.text(row, "video" if "video" in row else "video_name", at)
  told = source.file.stem if "video" in row else fields.text(row, kind, at)
  # Some copies leave the numbers out, or have no folders at all.
  own = [f for f in FOLDERS if f[2:].lower() in told.lower()]
  paths = [f"{folder}/{name}" for f in own or [told] for folder in (f, f[2:])]
  if found := next(filter(None, map(source.videos.at, paths)), None):
    return found
  by_task = {*FOLDERS, *(f[2:] for f in FOLDERS)} & source.videos.folders()
  return source.videos.name(paths[0], *([] if own and by_task else [name]))


def _expected(row: dict[str, Any], options: tuple[str, ...], at: str) -> str:
  if row.get("answer") is None:
    raise UserError(
      f"{at}: has no answer, as the authors' file of MLVU-Test does not; use"
      " the dev split or a copy with answers"
    )
  answer = fields.text(row, "answer", at)
  # The authors give the option's text, the tables its letter.
  if "video_name" in row or (answer not in options and answer in LETTERS):
    return fields.letter(answer, options, at)
  return fields.letter_of_text(answer, options, at)


TASKS = (
  "1_plotQA",
  "2_needle",
  "3_ego",
  "4_count",
  "5_order",
  "6_anomaly_reco",
  "7_topic_reasoning",
)

FOLDERS = (*TASKS, "8_sub_scene", "9_summary")

SUITE = Suite(
  name="mlvu",
  title="MLVU",
  revision=1,
  annotations=(
    " ".join(f"json/{task}.json" for task in TASKS),
    " ".join(f"MLVU/json/{task}.json" for task in TASKS),
    "mlvu/test-*.parquet",
    "test-*.parquet",
    "*.parquet",
  ),
  columns=(
    frozenset({"video", "question", "candidates", "question_type"}),
    frozenset({"video_name", "question", "candidates", "task_type"}),
  ),
  read=read,
  prompts={"choice": QUESTION},
  videos=("video", "MLVU/video", "videos"),
)
