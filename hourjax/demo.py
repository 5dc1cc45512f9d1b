"""Writes the demo's data: videos, train.json, test.json and a tokenizer.

  python -m hourjax.demo --workdir=/tmp/demo

needs no network and takes about 30 s on two cores and 300 MB. The files lie in
WORKDIR/data; a second run with the same options reuses them.
"""

import pathlib

from absl import flags

from hourjax import command
from hourjax.data.demo import build

_DEFAULT = build.Options()

_WORKDIR = flags.DEFINE_string(
  "workdir", None, "Folder whose subfolder data/ gets everything."
)
_SEED = flags.DEFINE_integer(
  "seed", _DEFAULT.seed, "Seed of all videos.", upper_bound=command.LAST_SEED
)
_TRAIN_VIDEOS = flags.DEFINE_integer(
  "train_videos",
  _DEFAULT.train_videos,
  "Number of training videos.",
  upper_bound=1_000_000,
)
_TEST_SCALE = flags.DEFINE_float(
  "test_scale",
  _DEFAULT.test_scale,
  "Multiple of the 68 test videos, which last up to an hour.",
)
_CONVERSATIONS = flags.DEFINE_integer(
  "conversations",
  _DEFAULT.conversations,
  "Conversations of each kind about each training video.",
  upper_bound=1_000,
)


def table(summary: dict) -> str:
  """Formats the main numbers of a summary as a few lines of text."""
  head = (
    "split",
    "videos",
    "hours",
    "records",
    "questions",
    "needle",
    "hidden",
  )
  rows = [head]
  for split, n in summary["splits"].items():
    needle = n["needle_questions"] / n["questions"]
    hidden = n["needles_dropped"] / n["needles"]
    hours = n["seconds"] / 3600
    counts = (n["records"], n["questions"], f"{needle:.0%}", f"{hidden:.0%}")
    rows.append((split, n["videos"], f"{hours:.1f}", *counts))
  lines = ["".join(f"{cell!s:>10}" for cell in row) for row in rows]
  tasks = {t for n in summary["splits"].values() for t in n["task"]}
  topics = {t for n in summary["splits"].values() for t in n["topic"]}
  note = (
    f"{len(tasks)} tasks of {len(topics)} topics; needle: share of questions"
    " for a card or a clip;\nhidden: cards of which temporal forgetting"
    " drops every frame"
  )
  return "\n".join([*lines, note])


def main(_: list[str]) -> None:
  """Runs the command."""
  folder = pathlib.Path(command.given(_WORKDIR)) / "data"
  options = build.Options(
    seed=_SEED.value,
    train_videos=_TRAIN_VIDEOS.value,
    test_scale=_TEST_SCALE.value,
    conversations=_CONVERSATIONS.value,
  )
  summary, reused = build.build(folder, options)
  print(f"{'reused' if reused else 'wrote'} {folder}")
  print(table(summary))


if __name__ == "__main__":
  command.run(main, required=["workdir"])
