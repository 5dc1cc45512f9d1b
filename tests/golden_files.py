"""Finds the golden numbers and the Qwen tokenizer, wherever they lie.

Tests list what a folder holds rather than naming it, so that another folder
of the same make is checked without editing a test.
"""

import functools
import json
import os
import shutil
import tempfile
from pathlib import Path

import numpy as np

from hourjax.data.tokenizer import Tokenizer

NO_GOLDEN = "no golden folder: set HOURJAX_GOLDEN or add tests/golden"
NO_TOKENIZER = "no Qwen tokenizer: set HOURJAX_TOKENIZER to its folder"

_TESTS = Path(__file__).resolve().parent


def golden_folder() -> Path | None:
  """$HOURJAX_GOLDEN, else tests/golden, else ../shared/golden, else None."""
  if os.environ.get("HOURJAX_GOLDEN"):
    return Path(os.environ["HOURJAX_GOLDEN"])
  for folder in (_TESTS / "golden", _TESTS.parents[1] / "shared" / "golden"):
    if (folder / "META.json").is_file():
      return folder
  return None


def golden_path(name: str) -> Path | None:
  """The file of that name, or None where it is missing."""
  folder = golden_folder()
  path = folder and folder / name
  return path if path and path.is_file() else None


def npz(name: str) -> dict[str, np.ndarray]:
  """All arrays of an .npz file; none where it is missing."""
  path = golden_path(name)
  if path is None:
    return {}
  with np.load(path) as arrays:
    return {key: arrays[key] for key in arrays.files}


def load_json(name: str):
  """What a JSON file holds; an empty dict where it is missing."""
  path = golden_path(name)
  return json.loads(path.read_text(encoding="utf-8")) if path else {}


@functools.cache
def meta() -> dict:
  """META.json; an empty dict where it is missing."""
  return load_json("META.json")


def present() -> dict[str, dict]:
  """META's entries of the files that are really in the folder."""
  entries = meta().get("files", {})
  return {name: e for name, e in entries.items() if golden_path(name)}


def meta_of(name: str) -> dict:
  """What META.json says about one file."""
  return meta().get("files", {}).get(name, {})


@functools.cache
def tokenizer(family: str = "qwen2") -> Tokenizer | None:
  """The tokenizer of `qwen2` or `qwen2.5`; None where its files are missing.

  Looks in $HOURJAX_TOKENIZER, else in `tokenizer` beside the golden folder,
  which holds `qwen2/` and, as the families share their vocabulary,
  `<family>_tokenizer_config.json`. A model's own folder will do for `qwen2`.
  """
  root = os.environ.get("HOURJAX_TOKENIZER")
  if not root and golden_folder():
    root = golden_folder().parent / "tokenizer"
  if not root or not Path(root).is_dir():
    return None
  root = Path(root)
  base = root / "qwen2" if (root / "qwen2").is_dir() else root
  if (root / family).is_dir():
    return Tokenizer.from_folder(root / family)
  config = base.parent / f"{family}_tokenizer_config.json"
  if config.is_file():
    with tempfile.TemporaryDirectory() as folder:
      for name in ("vocab.json", "merges.txt"):
        os.symlink((base / name).resolve(), Path(folder) / name)
      shutil.copy(config, Path(folder) / "tokenizer_config.json")
      return Tokenizer.from_folder(folder)
  return Tokenizer.from_folder(base) if family == "qwen2" else None
