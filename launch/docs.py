"""Writes the reference of all modules, generated from their docstrings.

Started by `bash launch/docs.sh`. Modules are imported, but nothing is computed.
"""

import importlib
import inspect
import pathlib
import pkgutil
import sys
import warnings
from typing import Any

from absl import flags

import hourjax

# Only lmms-eval imports it, and need not be installed.
PLUGIN = "hourjax.evaluation.lmms"


def import_all() -> None:
  """Imports every module, so that pdoc finds them imported.

  The commands define options of the same names, which a process accepts only
  once: those of one command are removed before the next is imported.
  """
  for module in pkgutil.walk_packages(hourjax.__path__, "hourjax."):
    if module.name == PLUGIN:
      continue
    for owner, options in flags.FLAGS.flags_by_module_dict().items():
      if owner.startswith("hourjax."):
        for option in list(options):
          delattr(flags.FLAGS, option.name)
    importlib.import_module(module.name)


def shorten_annotations() -> None:
  """Lets signatures name types as our own code does.

  Otherwise an array reads `jaxtyping.Float[jaxlib._jax.Array, 'B S D']`.
  """
  written = inspect.formatannotation

  def formatted(annotation: object, *options: Any, **named: Any) -> str:
    text = written(annotation, *options, **named)
    for prefix in ("jaxtyping.", "jax.jaxlib._jax.", "jaxlib._jax."):
      text = text.replace(prefix, "")
    return text

  inspect.formatannotation = formatted


def main(folder: str) -> None:
  """Writes HTML into the folder; index.html is its first page."""
  import_all()
  shorten_annotations()
  import pdoc  # takes the functions of `inspect` when it is imported

  warnings.filterwarnings("ignore", message=f"Couldn't import {PLUGIN}")
  pdoc.render.configure(docformat="google", show_source=False)
  pdoc.pdoc("hourjax", f"!{PLUGIN}$", output_directory=pathlib.Path(folder))
  print(f"wrote {folder}/index.html")


if __name__ == "__main__":
  main(*sys.argv[1:])
