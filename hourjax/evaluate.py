"""Answers held-out questions with trained models and reports accuracies.

  python -m hourjax.evaluate --records=work/data/test.json \
      --run=work/memaug --without=work/no_memaug --out=work

Leaves report.json, answers of each run and the plots in --out.
"""

import hashlib
import json
import pathlib
import time

from absl import app, flags

from hourjax import command
from hourjax.data.record_files import read_records
from hourjax.evaluation.answers import answer_records
from hourjax.evaluation.report import (
  WITH,
  WITHOUT,
  build_report,
  plot_losses,
  summary,
  table,
  write_report,
)
from hourjax.evaluation.scoring import score
from hourjax.training.checkpoint import (
  checkpoint_name,
  read_config,
  restore_params,
)
from hourjax.training.experiment import build_experiment
from hourjax.training.loop import report_skipped
from hourjax.training.metrics import read_curve

_RECORDS = flags.DEFINE_string("records", None, "Questions, one a record.")
_RUN = flags.DEFINE_string("run", None, "Workdir of the run to report on.")
_WITHOUT = flags.DEFINE_string(
  "without", None, "Workdir of the same run without MemAug, to compare."
)
_OUT = flags.DEFINE_string("out", None, "Folder of the report.")
_TOKENS = flags.DEFINE_integer("tokens", 8, "Longest answer, in tokens.")
_ROW_MEMORY = flags.DEFINE_integer(
  "row_memory", 16_384, "Memory tokens that a row of short videos holds."
)


def evaluate(run: str, name: str, records, out: pathlib.Path):
  """Scores one run; its answers are kept, and reused while nothing changed."""
  path = out / f"answers_{name.replace(' ', '_').lower()}.json"
  source = {
    "checkpoint": checkpoint_name(run),
    "records": hashlib.sha256(
      pathlib.Path(_RECORDS.value).read_bytes()
    ).hexdigest(),
    "tokens": _TOKENS.value,
  }
  saved = json.loads(path.read_text()) if path.exists() else {}
  if all(saved.get(key) == value for key, value in source.items()):
    print(f"reused {path}")
    return score(records, saved["answers"])
  answers, skipped = answer_records(
    restore_params(run),
    build_experiment(read_config(run)),
    records,
    new_tokens=_TOKENS.value,
    row_memory=_ROW_MEMORY.value,
  )
  report_skipped(skipped)
  path.write_text(json.dumps({**source, "answers": answers}, indent=1) + "\n")
  return score(records, answers)


def main(argv: list[str]) -> None:
  command.begin(argv)
  began = time.monotonic()
  out = pathlib.Path(_OUT.value)
  with command.user_errors():
    out.mkdir(parents=True, exist_ok=True)
    records, skipped = read_records(_RECORDS.value)
    report_skipped(skipped)
    folders = {WITH: _RUN.value, WITHOUT: _WITHOUT.value}
    folders = {name: folder for name, folder in folders.items() if folder}
    runs = {n: evaluate(f, n, records, out) for n, f in folders.items()}
    report = build_report(runs, time.monotonic() - began)
    write_report(report, out)
    curves = {name: read_curve(f) for name, f in folders.items()}
    plot_losses(curves, out / "loss.png")
  print(table(report))
  print(summary(report))


if __name__ == "__main__":
  flags.mark_flags_as_required(["records", "run", "out"])
  app.run(main)
