r"""Repeats an ablation of the paper on data of one's own.

  python -m hourjax.ablate --table=4 --seeds=3
  python -m hourjax.ablate --table=figure4 --seeds=5 --out=work/scale \
      --config=configs/hourllava.py:stage=3 --config.init=work/stage2 \
      --benchmark=lvbench --data=downloads/LVBench

Tables are 3 (spatial forgetting), 4 (temporal forgetting), 5 (with and without
MemAug), 6 (blocks), 9 (positions) and figure4 (ratio of kept frames, scale of
the memory). Each row and seed is a training and an evaluation. By default rows
are the last stage of the demo and begin with its stage 2, so run
launch/local.sh first. Where a row changes a part of the model that earlier
stages trained, these are trained again.

Writes OUT/table4.md, .json and .png. A command that is started again
continues; tables share what they have in common. Exit status: 0; 2 on a
mistake in the options, 1 if the disk is full, 130 on interrupt.
"""

import os
import re
import sys

from absl import flags
from ml_collections import config_flags

from hourjax import command
from hourjax.ablation import report
from hourjax.ablation.run import Questions, run_table
from hourjax.ablation.tables import TABLES, find_table
from hourjax.errors import UserError

# The demo's last stage, where it begins, and its benchmark.
_DEMO = [
  "--config=configs/demo.py:stage=3",
  "--config.init=work/stage2",
]
_DEMO_DATA = "work/data"

_TABLE = flags.DEFINE_string("table", None, f"One of {', '.join(TABLES)}.")
_SEEDS = flags.DEFINE_integer("seeds", 3, "Runs of a row.", lower_bound=1)
_OUT = flags.DEFINE_string("out", "work/ablation", "Folder of runs and tables.")
_CONFIG = config_flags.DEFINE_config_file("config", None, "Configuration file.")
_STEPS = flags.DEFINE_integer(
  "steps", None, "Steps of a row's run, if not the configuration's.",
  lower_bound=1,
)  # fmt: skip
_BENCHMARK = flags.DEFINE_string("benchmark", "records", "As in evaluate.")
_DATA = flags.DEFINE_string("data", None, "Folder of the benchmark.")
_FEATURES = flags.DEFINE_string(
  "features", None, "Feature store of its videos; by default the training's."
)
_VIDEOS = flags.DEFINE_string("videos", None, "Videos to read instead.")
_SUBTITLES = flags.DEFINE_bool("subtitles", False, "Ask with subtitles.")
_LIMIT = flags.DEFINE_integer(
  "limit", None, "Asks the first questions only.", lower_bound=1
)


def main(_: list[str]) -> None:
  """Runs the command."""
  name, benchmark = command.given(_TABLE), _BENCHMARK.value
  table = find_table(name)
  config = command.given(_CONFIG).to_dict()
  if _STEPS.value is not None:
    config["steps"] = _STEPS.value
  data = _DATA.value or (_DEMO_DATA if benchmark == "records" else None)
  if data is None:
    raise UserError(f"--data is missing: give the folder of {benchmark}")
  features = _FEATURES.value
  if features is None and not _VIDEOS.value:
    features = config["data"]["features"] or None
  asked = (features, _VIDEOS.value, _SUBTITLES.value, _LIMIT.value)
  questions = Questions(benchmark, data, *asked)
  out = _OUT.value
  runs = run_table(table, config, questions, out=out, seeds=_SEEDS.value)
  results = report.collect(table, runs, config, benchmark)
  print(f"in {out}: {', '.join(report.write(results, out, name))}")
  print(results.summary())


if __name__ == "__main__":
  given = any(re.match(r"--?config(=|$)", word) for word in sys.argv[1:])
  if not given and os.path.exists("configs/demo.py"):
    sys.argv[1:1] = _DEMO
  command.run(
    main, required=["table"], resume="what is finished counts, start again"
  )
