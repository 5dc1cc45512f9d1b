"""Measures speed and memory of the data path, kernels, steps and answering.

  python -m hourjax.bench data --json
  python -m hourjax.bench attention --topology=v5e:2x4
  python -m hourjax.bench step --config=configs/demo.py --out=calibration.json
  python -m hourjax.bench ask  (or answers, construct, cpu, gpu)

`data` and `answers` take --config (by default 3B, stage 3); `attention` asks
the TPU compiler, or with --tune ranks tiles; `step` measures a training step on
the devices at hand beside its plan, and `plan --calibration` takes what it
writes to --out. See hourjax/benchmarks/README.md.
"""

import pathlib
import tempfile

from absl import flags
from ml_collections import config_flags

from hourjax import command, progress
from hourjax.benchmarks import attention, data, step
from hourjax.benchmarks.answers import measure_answers
from hourjax.benchmarks.ask import measure_ask
from hourjax.benchmarks.cpu import measure_cpu
from hourjax.benchmarks.figures import show
from hourjax.benchmarks.gpu import measure_gpu
from hourjax.errors import UserError
from hourjax.training.config import Experiment, build_experiment

_DEFAULT, _SHAPE = data.Options, attention.Options
_3B = "configs/hourllava.py:size=3b,stage=3"
_CONFIG = config_flags.DEFINE_config_file("config", None, f"File ({_3B}).")
_JSON = flags.DEFINE_bool("json", False, "Print one JSON object.")
_SCRATCH = flags.DEFINE_string("scratch", None, "Folder of temporary files.")
flags.DEFINE_float("gigabytes", _DEFAULT.gigabytes, "To read.", 0)
flags.DEFINE_integer("rows", _DEFAULT.rows, "To read.", 2)
flags.DEFINE_integer("conversations", _DEFAULT.conversations, "To plan.", 1)
flags.DEFINE_string("topology", _SHAPE.topology, "To compile for.")
flags.DEFINE_string("model", _SHAPE.model, "Whose heads: 3b or 7b.")
flags.DEFINE_integer("queries", _SHAPE.queries, "Queries of a row.")
flags.DEFINE_integer("keys", _SHAPE.keys, "Memory tokens of a row.")
flags.DEFINE_bool("tune", False, "Compile and rank tiles instead.")
flags.DEFINE_integer("steps", step.Options.steps, "To time.", 1)
flags.DEFINE_float("peak_tflops", None, "Of a device that is no TPU.", 0)
flags.DEFINE_string("out", None, "Calibration file.")


def _experiment() -> Experiment:
  """Returns the experiment of --config."""
  return build_experiment(command.given(_CONFIG).to_dict())


def construct(folder: pathlib.Path) -> dict:
  """Measures the calls and the bookkeeping of a construction."""
  with command.needing("construct"):
    from hourjax.benchmarks.construct import measure_construct
  return measure_construct(folder)


BENCHMARKS = {
  "data": lambda folder: data.measure_data(
    _experiment(), command.filled(data.Options), folder
  ),
  "attention": lambda _: attention.measure_attention(
    command.filled(attention.Options)
  ),
  "ask": measure_ask,
  "answers": lambda folder: measure_answers(_experiment(), folder),
  "construct": construct,
  "step": lambda folder: step.measure_step(
    _experiment(), command.filled(step.Options), folder
  ),
  "gpu": lambda _: measure_gpu(),
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
