"""Constructs a dataset from videos, by models behind OpenAI-compatible servers.

  python -m hourjax.construct --videos=videos --out=marathon \
      --captioner=Qwen2.5-VL-7B@http://localhost:8000/v1 \
      --writer=DeepSeek-V3@https://HOST/v1 --prices=captioner=0/0,writer=0.3/1.1

Keys come from CAPTIONER_API_KEY, WRITER_API_KEY, JUDGE_API_KEY, OPENAI_API_KEY.
Nothing is asked twice: start again to go on. `prepare` reads the result.

Exit status: 0; 3 if videos failed or are left to others or to a higher budget;
2 on a mistake, 1 if the disk is full, 130 on interrupt, 143 on SIGTERM.
"""

import sys

from absl import flags

from hourjax import command
from hourjax.construction.clips import MEDIA, ClipOptions
from hourjax.construction.options import CHECKS, ModelName, Options
from hourjax.construction.tasks import TASKS
from hourjax.extraction.video_list import parse_worker

_VIDEOS = flags.DEFINE_string("videos", None, "Folder of videos.")
_OUT = flags.DEFINE_string("out", None, "Folder of the dataset.")
_CAPTIONER = flags.DEFINE_string("captioner", None, "Sees; NAME@URL.")
_WRITER = flags.DEFINE_string("writer", None, "Model that writes, NAME@URL.")
_JUDGE = flags.DEFINE_string("judge", None, "Model that checks (--writer).")
_TASKS = flags.DEFINE_string("tasks", str(TASKS), "YAML file of tasks.")
_TEMPLATES = flags.DEFINE_string("templates", None, "Folder of templates.")
_EXCLUDE = flags.DEFINE_multi_string("exclude", [], "File of a benchmark.")
_NAMES = flags.DEFINE_string("names", None, "File of names; only these videos.")
_WORKER = flags.DEFINE_string("worker", "0/1", "Share of this process, i/n.")
_CLIP = flags.DEFINE_float("clip_seconds", 30, "Length of a clip.", 1, 600)
_RATE = flags.DEFINE_float("frame_rate", 0.5, "Frames sent a second.", 0.01, 30)
_SIZE = flags.DEFINE_integer("frame_size", 448, "Longest side, px.", 32, 4096)
_MEDIA = flags.DEFINE_enum("media", "images", MEDIA, "How frames are sent.")
_COUNT = flags.DEFINE_integer("count", 3, "Questions a task and format.", 1, 20)
_EVENTS = flags.DEFINE_integer("min_events", 3, "Least of a video.", 1, 100)
_CHECKS = flags.DEFINE_multi_enum("check", list(CHECKS), CHECKS, "To be made.")
_TRIES = flags.DEFINE_integer("blind_tries", 3, "All right: drop it.", 1, 20)
_MARK = flags.DEFINE_bool("mark", False, "Mark what needs no video; keep it.")
_AGAIN = flags.DEFINE_integer("again", 2, "More tries if unusable.", 0, 10)
_SEED = flags.DEFINE_integer("seed", 0, "Of sampling.", 0, command.LAST_SEED)
_CALLS = flags.DEFINE_integer("concurrency", 32, "Calls at a time.", 1, 4096)
_WAIT = flags.DEFINE_float("retry_wait", 1, "Before a second try, s.", 0, 600)
_TIME = flags.DEFINE_float("timeout", 600, "Longest call, in s.", 1, 86400)
_PRICES = flags.DEFINE_string("prices", "", "ROLE=IN/OUT,... $ for 1M tokens.")
_BUDGET = flags.DEFINE_float("budget", None, "Dollars to spend in all.", 0)
_SAMPLE = flags.DEFINE_integer("sample", 8, "Clips to forecast from.", 0, 1000)
_DRY_RUN = flags.DEFINE_bool("dry_run", False, "End after the forecast.")


def main(_: list[str]) -> None:
  """Runs the command."""
  with command.needing("construct"):
    from hourjax.construction import dataset, run
    from hourjax.construction.costs import Prices
  writer = command.given(_WRITER)
  options = Options(
    ClipOptions(_CLIP.value, _RATE.value, _SIZE.value, _MEDIA.value),
    {
      "captioner": ModelName.parse(command.given(_CAPTIONER), "captioner"),
      "writer": ModelName.parse(writer, "writer"),
      "judge": ModelName.parse(_JUDGE.value or writer, "judge"),
    },
    count=_COUNT.value,
    min_events=_EVENTS.value,
    checks=tuple(name for name in CHECKS if name in _CHECKS.value),
    blind_tries=_TRIES.value,
    mark=_MARK.value,
    again=_AGAIN.value,
    seed=_SEED.value,
  )
  settings = run.Settings(
    command.given(_VIDEOS),
    command.given(_OUT),
    options,
    run.Limits(_CALLS.value, _TIME.value, _WAIT.value, _BUDGET.value),
    Prices.parse(_PRICES.value),
    tasks=_TASKS.value,
    templates=_TEMPLATES.value,
    exclude=tuple(_EXCLUDE.value),
    names=_NAMES.value,
    worker=parse_worker(_WORKER.value),
    sample=_SAMPLE.value,
    dry_run=_DRY_RUN.value,
  )
  if summary := run.construct(settings):
    print(dataset.table(summary, settings.out))
    sys.exit(0 if dataset.is_whole(summary) else 3)


if __name__ == "__main__":
  command.run(
    main,
    required=["videos", "out", "captioner", "writer"],
    resume="what was answered so far is kept, start again",
    writes="out",
  )
