"""Runs many command lines after one import of what takes long.

  python -m tests.misused

reads [[module, argument, ...], ...] as JSON and prints [[status, stdout,
stderr], ...]: each line in a fork of this process.
"""

import importlib
import json
import os
import runpy
import sys
import tempfile

# What commands import, and not they themselves: those define options.
HEAVY = (
  "hourjax.command", "hourjax.extraction.worker", "hourjax.inference.load",
  "hourjax.training.loop", "hourjax.planning.search", "hourjax.data.demo.build",
  "hourjax.evaluation.run", "hourjax.data.prepare.build",
  "hourjax.benchmarks.ask", "hourjax.benchmarks.data", "hourjax.ablation.run",
  "hourjax.inference.export",
)  # fmt: skip


def ended(module: str, *arguments: str) -> tuple[int, str, str]:
  """Status and words of `python -m hourjax.MODULE ARGUMENTS`."""
  with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
    pid = os.fork()
    if not pid:
      os.dup2(out.fileno(), 1)
      os.dup2(err.fileno(), 2)
      _run(module, arguments)
    _, status = os.waitpid(pid, 0)
    words = []
    for file in (out, err):
      file.seek(0)
      words.append(file.read().decode(errors="replace"))
    return os.waitstatus_to_exitcode(status), *words


def _run(module, arguments):
  sys.argv = [module, *map(_decoded, arguments)]
  status = 0
  try:
    runpy.run_module(f"hourjax.{module}", run_name="__main__", alter_sys=True)
  except SystemExit as error:
    status = error.code if isinstance(error.code, int) else error.code and 1
  except BaseException:
    sys.excepthook(*sys.exc_info())
    status = 1
  finally:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status or 0)


def _decoded(argument: str) -> str:
  """As the interpreter decodes what a shell gives it."""
  return os.fsdecode(argument.encode("utf-8", "surrogateescape"))


if __name__ == "__main__":
  for name in HEAVY:
    importlib.import_module(name)
  print(json.dumps([ended(*line) for line in json.load(sys.stdin)]))
