"""Asks a model the questions of a benchmark and reports its scores.

  python -m hourjax.evaluate --model=work/stage3 --benchmark=videomme \
      --data=downloads/Video-MME --subtitles

Answers and report go to MODEL/evaluation/BENCHMARK or --out. A command that is
started again continues; several machines share the videos by JAX's process
index or by --worker=0/8 and so on, and the last one writes the report. Without
--model the answers in --out are read and scored again.

Exit status: 0; 3 if questions were left out, which the report lists; 2 on a
mistake in the options, 1 if the disk is full, 130 on interrupt.
"""

import functools
import sys

from absl import flags

import hourjax
from hourjax import command, hub, progress
from hourjax.errors import UserError
from hourjax.evaluation import run
from hourjax.evaluation.benchmarks import BENCHMARKS
from hourjax.evaluation.report import Report
from hourjax.evaluation.task import open_task
from hourjax.extraction.video_list import parse_worker
from hourjax.parallel import hosts

_MODEL = flags.DEFINE_string("model", None, "Workdir, checkpoint, or hf://...")
_BENCHMARK = flags.DEFINE_string(
  "benchmark", None, f"One of {', '.join(sorted(BENCHMARKS))}."
)
_DATA = flags.DEFINE_string("data", None, "Its folder.")
_SUBTITLES = flags.DEFINE_bool("subtitles", False, "Ask with them.")
_FEATURES = flags.DEFINE_string(
  "features", None, "Feature store to read instead of videos."
)
_VIDEOS = flags.DEFINE_string("videos", None, "Folder of videos, if elsewhere.")
_OUT = flags.DEFINE_string("out", None, "Folder of answers and report.")
_WORKER = flags.DEFINE_string("worker", None, "Share of this process, i/n.")
_LIMIT = flags.DEFINE_integer("limit", None, "Asks the first ones only.", 1)
_TOKENIZER = flags.DEFINE_string("tokenizer", None, "If not the model's own.")
_ADAPTER = flags.DEFINE_string("adapter", None, "LoRA to merge into --model.")
_COMPARE = flags.DEFINE_list("compare", [], "Other models to ask the same.")
_NAMES = flags.DEFINE_list(
  "names", [], "Names of the models in the report, --model's first."
)


def main(_: list[str]) -> None:
  """Runs the command."""
  report = _evaluate()
  if report is None:
    return
  if not _MODEL.value or hosts.is_primary():
    print(report.table())
    print(report.summary())
  sys.exit(0 if report.complete else 3)


def _evaluate() -> Report | None:
  """Answers and reports; None in a process while others are at work."""
  worker = parse_worker(_WORKER.value) if _WORKER.value else None
  with progress.step("reading the benchmark"):
    task = open_task(
      command.given(_BENCHMARK),
      command.given(_DATA),
      subtitles=_SUBTITLES.value,
      features=_FEATURES.value,
      videos=_VIDEOS.value,
      limit=_LIMIT.value,
    )
  if not _MODEL.value:
    if not _OUT.value or worker or _COMPARE.value or _NAMES.value[1:]:
      raise UserError("give --model to ask, or only --out to report again")
    return run.report_again(task, _OUT.value, *_NAMES.value[:1])
  load = functools.partial(hourjax.load, tokenizer=_TOKENIZER.value)
  adapters, own = {}, None
  if _ADAPTER.value:  # of --model; other models are compared as they are
    adapters[str(hub.local_folder(_MODEL.value))] = {"adapter": _ADAPTER.value}
    own = run.default_out(hub.own_folder(_ADAPTER.value), task)
  hosts.start_hosts()
  with hosts.leaving():
    return run.evaluate_folders(
      [_MODEL.value, *_COMPARE.value],
      task,
      lambda folder: load(folder, **adapters.get(folder, {})),
      out=_OUT.value or own,
      names=_NAMES.value,
      worker=worker or (hosts.index(), hosts.count()),
    )


if __name__ == "__main__":
  command.run(
    main,
    required=["benchmark", "data"],
    resume="what is answered so far counts, start again",
  )
