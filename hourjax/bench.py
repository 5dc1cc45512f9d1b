"""Measures speed and memory of the data path, the kernels and answering.

  python -m hourjax.bench data --json
  python -m hourjax.bench attention --topology=v5e:2x4
  python -m hourjax.bench ask

`data` measures the data path with rows of --config (by default 3B, stage 3).
--gigabytes says how much it writes and reads.
`attention` asks the TPU compiler, on any machine, how near the kernels come
to the limits of --topology (v5e, v5p, v6e or tpu7x and its chips), at the
sizes --model, --queries and --keys; on a TPU or GPU it measures time as well.
--tune ranks tile sizes instead, which takes many minutes.

`ask` measures the time to the first token of questions about an hour of video.
"""

import pathlib
import tempfile

from absl import flags
from ml_collections import config_flags

from hourjax import command, progress
from hourjax.benchmarks import attention as kernels
from hourjax.benchmarks.ask import measure_ask
from hourjax.benchmarks.data import Options, measure_data
from hourjax.benchmarks.figures import show
from hourjax.errors import UserError
from hourjax.training.config import build_experiment

_DEFAULT, _SHAPE = Options(), kernels.Options()
_3B = "configs/hourllava.py:size=3b,stage=3"
_CONFIG = config_flags.DEFINE_config_file("config", None, f"File ({_3B}).")
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
_TOPOLOGY = flags.DEFINE_string("topology", _SHAPE.topology, "To compile for.")
_MODEL = flags.DEFINE_string("model", _SHAPE.model, "Whose heads: 3b or 7b.")
_QUERIES = flags.DEFINE_integer("queries", _SHAPE.queries, "Queries of a row.")
_KEYS = flags.DEFINE_integer("keys", _SHAPE.keys, "Memory tokens of a row.")
_TUNE = flags.DEFINE_bool("tune", False, "Compile and rank tiles instead.")


def data() -> dict:
  """Measures the data path."""
  options = Options(
    conversations=_CONVERSATIONS.value,
    gigabytes=_GIGABYTES.value,
    rows=_ROWS.value,
  )
  experiment = build_experiment(command.given(_CONFIG).to_dict())
  with tempfile.TemporaryDirectory(dir=_SCRATCH.value) as folder:
    return measure_data(experiment, options, pathlib.Path(folder))


def attention() -> dict:
  """Measures the attention kernels."""
  options = kernels.Options(
    topology=_TOPOLOGY.value,
    model=_MODEL.value,
    queries=_QUERIES.value,
    keys=_KEYS.value,
    tune=_TUNE.value,
  )
  return kernels.measure_attention(options)


def ask() -> dict:
  """Measures questions about an hour of video."""
  with tempfile.TemporaryDirectory(dir=_SCRATCH.value) as folder:
    return measure_ask(pathlib.Path(folder))


BENCHMARKS = {"data": data, "attention": attention, "ask": ask}


def main(argv: list[str]) -> None:
  """Runs the command."""
  name = " ".join(argv[1:])
  if name not in BENCHMARKS:
    raise UserError(f"bench {name!r}: give one of {', '.join(BENCHMARKS)}")
  with progress.step(f"measuring {name}"):
    figures = BENCHMARKS[name]()
  show(figures, _JSON.value)


if __name__ == "__main__":
  command.run(main, positional=True, config=_3B)
