"""Measures speed, memory and goodput.

  python -m hourjax.bench data          a table
  python -m hourjax.bench data --json   one JSON object

measures the data path with rows of --config (by default 3B, stage 3). It
writes 3 GB into a temporary folder; --gigabytes takes less.
"""

import json
import pathlib
import tempfile

from absl import app, flags
from ml_collections import config_flags

from hourjax import command
from hourjax.benchmarks.data import Options, measure_data
from hourjax.errors import UserError
from hourjax.training.experiment import build_experiment

_DEFAULT = Options()
_CONFIG = config_flags.DEFINE_config_file(
  "config", "configs/hourllava.py:size=3b,stage=3", "Configuration file."
)
_JSON = flags.DEFINE_bool("json", False, "Print one JSON object.")
_GIGABYTES = flags.DEFINE_float(
  "gigabytes", _DEFAULT.gigabytes, "Features to write and read.", lower_bound=0
)
_ROWS = flags.DEFINE_integer(
  "rows", _DEFAULT.rows, "Rows to read for each figure.", lower_bound=2
)
_CONVERSATIONS = flags.DEFINE_integer(
  "conversations", _DEFAULT.conversations, "To plan.", lower_bound=1
)
_SCRATCH = flags.DEFINE_string(
  "scratch", None, "Folder for the temporary files; the system's by default."
)


def data() -> dict:
  """Figures of the data path."""
  options = Options(
    conversations=_CONVERSATIONS.value,
    gigabytes=_GIGABYTES.value,
    rows=_ROWS.value,
  )
  experiment = build_experiment(_CONFIG.value.to_dict())
  with tempfile.TemporaryDirectory(dir=_SCRATCH.value) as folder:
    return measure_data(experiment, options, pathlib.Path(folder))


BENCHMARKS = {"data": data}


def lines(figures, path=()) -> list[str]:
  """`a.b.c   value` a line."""
  if not isinstance(figures, dict):
    return [f"{'.'.join(path):<44}{figures}"]
  return [x for k, v in figures.items() for x in lines(v, (*path, k))]


def main(argv: list[str]) -> None:
  command.begin(argv[:1])
  with command.user_errors():
    if len(argv) != 2 or argv[1] not in BENCHMARKS:
      raise UserError(
        f"bench {' '.join(argv[1:])!r}: give one of {', '.join(BENCHMARKS)}"
      )
    figures = BENCHMARKS[argv[1]]()
  print(json.dumps(figures) if _JSON.value else "\n".join(lines(figures)))


if __name__ == "__main__":
  app.run(main)
