"""Estimates memory, time and cost of training on a pod before it is rented.

  python -m hourjax.plan --config=configs/hourllava.py:size=3b,stage=3 \
      --topology=v5e:16x16 --config.mesh.seq=16

compiles the real train step with the real TPU compiler, on any machine, and
prints memory, operations and traffic as compiled; time, MFU and cost as
estimated. If the step does not fit, it prints the smallest change with which it
does, and ends with 1. --search looks for the best mesh, with --topology=v5e:any
or a list also for the best slice; --topology=h100:8 plans for GPUs. --table
prints plans that --json wrote as a table; --fit_rows proposes rows for DATASET.
"""

import json
import sys

from absl import flags
from ml_collections import config_flags

from hourjax import command, progress
from hourjax.planning import calibration, fit, fit_rows, plan, report, search
from hourjax.planning.compiler.compiled_step import LIMIT
from hourjax.planning.topology import Topology, parse_topologies
from hourjax.planning.workload import make_workload
from hourjax.training.config import build_experiment

_CONFIG = config_flags.DEFINE_config_file("config", None, "Configuration file.")
_TOPOLOGY = flags.DEFINE_string("topology", None, "Such as v5e:16x16.")
_SLICES = flags.DEFINE_integer("num_slices", 1, "Slices of it.", 1, 1024)
_CALIBRATION = flags.DEFINE_string("calibration", None, "Measured constants.")
_PRICE = flags.DEFINE_float("price", None, "$ of a chip-hour.", 0)
_DATA = flags.DEFINE_string(
  "data", "", "stage1 to stage3, DATASET, video=SECONDS, or full."
)
_ROWS = flags.DEFINE_string("fit_rows", None, "DATASET, or stage1 to stage3.")
_JSON = flags.DEFINE_bool("json", False, "Print one JSON object.")
_SEARCH = flags.DEFINE_bool("search", False, "Try meshes and rows, rank them.")
_COMPILED = flags.DEFINE_integer(
  "compiled", search.COMPILED, "Candidates of a slice that are compiled.", 1
)
_EXACT = flags.DEFINE_bool("exact", False, "Compile to the end: minutes.")
_LIMIT = flags.DEFINE_float("compile_limit", LIMIT, "Seconds to compile.", 1)
_FIX = flags.DEFINE_bool("fix", True, "Look for a change that makes it fit.")
_TABLE = flags.DEFINE_list("table", None, "Files of plans, for one table.")


def _log(text: str) -> None:
  """Prints a line about progress on standard error."""
  print(text, file=sys.stderr, flush=True)


def _topologies() -> list[Topology]:
  """Returns the topologies that the options name."""
  names, file = command.given(_TOPOLOGY), _CALIBRATION.value
  return [calibration.calibrated(each, file)
          for each in parse_topologies(names, _SLICES.value)]  # fmt: skip


def make_plans() -> list[plan.Plan]:
  """Makes the plan of the configuration, or plans of a search, best first."""
  experiment = build_experiment(command.given(_CONFIG).to_dict())
  topologies = _topologies()
  with progress.step("drawing and packing the stage's data"):
    workload = make_workload(experiment, _DATA.value)
  price, limit = _PRICE.value, _LIMIT.value
  if _SEARCH.value:
    return search.search_slices(
      experiment, topologies, workload,
      price=price, count=_COMPILED.value, limit=limit, log=_log,
    )  # fmt: skip
  return [plan.of_one(
    experiment, topologies, workload,
    price=price, limit=limit, whole=_EXACT.value,
  )]  # fmt: skip


def main(_: list[str]) -> None:
  """Runs the command."""
  if _TABLE.value:
    print(report.table(_TABLE.value))
    return
  if _ROWS.value:
    experiment = build_experiment(command.given(_CONFIG).to_dict())
    print(fit_rows.propose(experiment, _topologies(), _ROWS.value, _JSON.value))
    return
  plans = make_plans()
  best, found = plans[0], None
  if not best.fits and _FIX.value:
    found = fit.remedy(best, _log, _LIMIT.value)
  changes = list(found[0].flags) if found else []
  if _JSON.value:
    known = {"remedy": changes} if found else {}
    print(json.dumps(plan.as_data(best) | known))
  else:
    print(report.text(plans, _SEARCH.value, changes))
  sys.exit(0 if best.fits else 1)


if __name__ == "__main__":
  command.run(main)
