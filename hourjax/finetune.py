r"""Adapts a model to one's own videos and questions.

  python -m hourjax.finetune --videos=clips --questions=questions.csv \
      --model=hf://ORGANISATION/NAME --out=mine

Reads a table with the columns video, question, answer and, for multiple choice,
options (CSV, TSV, JSON, JSON lines, parquet or LLaVA's records), holds some
videos out, says how long each stage will take, extracts features, trains until
held-out answers get no better, and writes OUT/report.md with the accuracy on
held-out questions before and after. OUT/model is the new model.

The same command again goes on where it was interrupted. --dry_run ends after
the forecast. --set=KEY=VALUE sets any key of configs/README.md.

Ends with 0; 2 on a mistake in options or questions, 1 if the disk is full, 130
on interrupt.
"""

import os
import signal
import sys

from absl import flags

from hourjax import command, jax_environment
from hourjax.data.prepare import question_tables
from hourjax.finetuning import run, settings

_VIDEOS = flags.DEFINE_string("videos", None, "Folder of videos.")
_QUESTIONS = flags.DEFINE_string("questions", None, "File of questions.")
_MODEL = flags.DEFINE_string("model", None, "Workdir, published, or hf://...")
_OUT = flags.DEFINE_string("out", None, "Folder of model, data and report.")
_TOKENIZER = flags.DEFINE_string("tokenizer", None, "If not the model's own.")
_COLUMNS = flags.DEFINE_string(
  "columns", "", "Columns by their roles: video=clip,question=q,answer=gt,..."
)
_FIRST = flags.DEFINE_integer(
  "first_option", None, "Where answers are numbers of options: 0 or 1.", 0, 1
)
_HOLDOUT = flags.DEFINE_string(
  "holdout", "", "Videos to hold out: 10%, a number, or a file of names."
)
_SET = flags.DEFINE_multi_string(
  "set", [], "KEY=VALUE of the training's configuration; may be repeated."
)
_DRY_RUN = flags.DEFINE_bool("dry_run", False, "Ends after the forecast.")


def main(_: list[str]) -> None:
  """Runs the command."""
  jax_environment.keep_freed_memory(os.environ)
  ended_by = run.finetune(
    run.Options(
      videos=command.given(_VIDEOS),
      questions=command.given(_QUESTIONS),
      model=command.given(_MODEL),
      out=command.given(_OUT),
      tokenizer=_TOKENIZER.value,
      columns=question_tables.parse_mapping(_COLUMNS.value),
      first_option=_FIRST.value,
      holdout=_HOLDOUT.value,
      overrides=settings.parse_overrides(_SET.value),
      dry_run=_DRY_RUN.value,
    )
  )
  if ended_by == signal.SIGINT:
    sys.exit(128 + ended_by)


if __name__ == "__main__":
  command.run(
    main,
    required=["videos", "questions", "model", "out"],
    resume="what is finished counts, make room and start again",
    writes="out",
  )
