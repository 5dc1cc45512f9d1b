"""MLVU: multiple choice about videos of 3 minutes to 2 hours, seven tasks.

Files: the authors' `json/1_plotQA.json` to `7_topic_reasoning.json` with
`video/<same name>/` (MLVU/MVLU on Hugging Face; `data/` on GitHub), their
`test-ground-truth/test_mcq_gt.json` of MLVU-Test, or `mlvu/test-*.parquet`,
whose questions hold their options as text (sy1998/MLVU_dev and MLVU_Test).
Tasks 8 and 9 are free text, scored by another model, and left out.

Some rows of the JSON have an empty option, no question, or an answer that is
none of the options. The authors' code and VLMEvalKit ask them all the same; an
answer that is no option makes every answer wrong, so it does here.

Prompt: lmms-eval's `mlvu_dev`. The authors open the answer with "Best Option:
("; lmms-eval ends the prompt with it.

The benchmark's score is the mean of its tasks' accuracies.
"""

import itertools

from hourjax.errors import UserError
from hourjax.evaluation.benchmarks import fields
from hourjax.evaluation.benchmarks.benchmark import Benchmark, Row, Source
from hourjax.evaluation.questions import Question
from hourjax.evaluation.scoring import LeftOut

# With the options, "(A) ..." a line each, below the question.
QUESTION = "{question}\nOnly give the best option.\nBest option: ("


def read(source: Source) -> list[Question | LeftOut]:
  """Makes one question of each row; rows without an id are numbered.

  Args:
    source: an annotation file.

  Raises:
    UserError: no row of the file has an answer.
  """
  rows = [row for row in source.rows if isinstance(row, dict)]
  if all(row.get("answer") is None for row in rows):
    raise UserError(
      f"{source.file.name}: question {source.file.stem}/0: has no answer, as"
      " the authors' questions of MLVU-Test do not; use"
      " test-ground-truth/test_mcq_gt.json, the dev split or another copy with"
      " answers"
    )
  number = itertools.count()
  numbered = (
    row if isinstance(row, UserError) else {**row, _NUMBER: count}
    for count, row in zip(number, source.rows)
  )
  return source.make_each(lambda row: _question(row, source), numbered)


# Key under which a row gets its number. No column has a name with a space.
_NUMBER = " row"


def _question(row: Row, source: Source) -> Question:
  """Makes the question of a row."""
  part = source.file.stem
  name = str(row.get("question_id") or f"{part}/{row[_NUMBER]}")
  at = f"{source.file.name}: question {name}"
  text = str(row.get("question") or "")
  options = fields.split_options(text)[1]
  has_list = bool(options)
  if fields.has_options(row) or not has_list:
    options = fields.options(row, at, empty=True)
  if not has_list:
    text = f"{text}\n{fields.lettered(options, '({}) {}')}"
  kind = "question_type" if "question_type" in row else "task_type"
  expected = _expected(row, options)
  return Question(
    id=name,
    video=_video(row, source, kind, at),
    prompt=QUESTION.format(question=text),
    expected=expected,
    kind="choice",
    options=options,
    tasks=(fields.text(row, kind, at),),
    duration=fields.minutes_range(row.get("duration")),
    chance=fields.chance(options, expected),
  )


def _video(row: Row, source: Source, kind: str, at: str) -> str:
  """Returns the video's name.

  Each task has a folder, and videos of different tasks have the same names.
  """
  name = fields.text(row, "video" if "video" in row else "video_name", at)
  task = source.file.stem if "video" in row else fields.text(row, kind, at)
  # Some copies leave the folders' numbers out ("plotQA" for "1_plotQA"), or
  # have no folders at all.
  own = [f for f in FOLDERS if f[2:].lower() in task.lower()]
  paths = [f"{folder}/{name}" for f in own or [task] for folder in (f, f[2:])]
  by_task = {*FOLDERS, *(f[2:] for f in FOLDERS)} & source.videos.folders()
  # Where there are folders a task, the name alone could be another task's
  # video.
  return source.videos.name(*paths, *([] if own and by_task else [name]))


def _expected(row: Row, options: tuple[str, ...]) -> str:
  """Returns the right option's letter; "" if no option is right."""
  answer = str(row.get("answer") or "")
  # The authors give the option's text, the tables its letter.
  readers = [fields.letter_of_text, fields.letter]
  for read in readers[::-1] if "video_name" in row else readers:
    try:
      return read(answer, options, "")
    except UserError:
      continue
  return ""


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

BENCHMARK = Benchmark(
  name="mlvu",
  title="MLVU",
  revision=2,
  annotations=(
    " ".join(f"json/{task}.json" for task in TASKS),
    " ".join(f"MLVU/json/{task}.json" for task in TASKS),
    " ".join(f"data/{task}.json" for task in TASKS),
    " ".join(f"MLVU/data/{task}.json" for task in TASKS),
    " ".join(f"{task}.json" for task in TASKS),
    "test-ground-truth/test_mcq_gt.json",
    "test_mcq_gt.json",
    "MLVU_Test/test-ground-truth/test_mcq_gt.json",
    "mlvu/test-*.parquet",
    "test-*.parquet",
    "data/test-*.parquet",
    "test_multi_choice_tasks.json",
    "MLVU_Test/test_question.json",
    "test_question.json",
    "*.parquet",
  ),
  columns=(
    frozenset({"video", "question", "candidates", "question_type"}),
    frozenset({"video_name", "question", "candidates", "task_type"}),
    frozenset({"video_name", "question", "answer", "task_type"}),
  ),
  read=read,
  prompts={"choice": QUESTION},
  videos=("video", "MLVU/video", "videos", "MLVU_Test/video"),
)
