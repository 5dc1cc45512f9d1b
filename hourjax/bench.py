"""Measures speed and memory of the data path, the kernels and answering.

  python -m hourjax.bench data --json
  python -m hourjax.bench attention --topology=v5e:2x4
  python -m hourjax.bench ask  (or construct, or cpu)

`data` measures the data path with rows of --config (by default 3B, stage 3).
`attention` asks the TPU compiler, on any machine, how near the kernels come
to the limits of --topology (v5e, v5p, v6e or tpu7x and its chips), at the
sizes --model, --queries and --keys; on a TPU or GPU it measures time as well.
--tune ranks tile sizes instead, for many minutes. `ask` times the first token
about an hour of video, `construct` its calls, `cpu` MemAug beside torch.
"""

import pathlib
import tempfile

from absl import flags
from ml_collections import config_flags

from hourjax import command, progress
from hourjax.benchmarks import attention as kernels
from hourjax.benchmarks.ask import measure_ask
from hourjax.benchmarks.cpu import measure_cpu
from hourjax.benchmarks.data import Options, measure_data
from hourjax.benchmarks.figures import show
from hourjax.errors import UserError
from hourjax.training.config import build_experiment

_DEFAULT, _SHAPE = Options(), kernels.Options()
_3B = "configs/hourllava.py:size=3b,stage=3"
_CONFIG = config_flags.DEFINE_config_file("config", None, f"File ({_3B}).")
_JSON = flags.DEFINE_bool("json", False, "Print one JSON object.")
_GIGABYTES = flags.DEFINE_float("gigabytes", _DEFAULT.gigabytes, "To read.", 0)
_ROWS = flags.DEFINE_integer("rows", _DEFAULT.rows, "To read.", 2)
_CONVERSATIONS = flags.DEFINE_integer(
  "conversations", _DEFAULT.conversations, "To plan.", 1
)
_SCRATCH = flags.DEFINE_string("scratch", None, "Folder of temporary files.")
_TOPOLOGY = flags.DEFINE_string("topology", _SHAPE.topology, "To compile for.")
_MODEL = flags.DEFINE_string("model", _SHAPE.model, "Whose heads: 3b or 7b.")
_QUERIES = flags.DEFINE_integer("queries", _SHAPE.queries, "Queries of a row.")
_KEYS = flags.DEFINE_integer("keys", _SHAPE.keys, "Memory tokens of a row.")
_TUNE = flags.DEFINE_bool("tune", False, "Compile and rank tiles instead.")


def data(folder: pathlib.Path) -> dict:
  """Measures the data path."""
  options = Options(
    conversations=_CONVERSATIONS.value,
    gigabytes=_GIGABYTES.value,
    rows=_ROWS.value,
  )
  experiment = build_experiment(command.given(_CONFIG).to_dict())
  return measure_data(experiment, options, folder)


def attention(_: pathlib.Path) -> dict:
  """Measures the attention kernels."""
  options = kernels.Options(
    topology=_TOPOLOGY.value,
    model=_MODEL.value,
    queries=_QUERIES.value,
    keys=_KEYS.value,
    tune=_TUNE.value,
  )
  return kernels.measure_attention(options)


def construct(folder: pathlib.Path) -> dict:
  """Measures the calls and the bookkeeping of a construction."""
  with command.needing("construct"):
    from hourjax.benchmarks.construct import measure_construct
  return measure_construct(folder)


BENCHMARKS = {
  "data": data,
  "attention": attention,
  "ask": measure_ask,
  "construct": construct,
  "cpu": measure_cpu,
}


def main(argv: list[str]) -> None:
  """Runs the command."""
  name = " ".join(argv[1:])
  if name not in BENCHMARKS:
    raise UserError(f"bench {name!r}: give one of {', '.join(BENCHMARKS)}")
  with (
    progress.step(f"measuring {name}"),
    tempfile.TemporaryDirectory(dir=_SCRATCH.value) as folder,
  ):
    figures = BENCHMARKS[name](pathlib.Path(folder))
  show(figures, _JSON.value)


if __name__ == "__main__":
  command.run(main, positional=True, config=_3B)
