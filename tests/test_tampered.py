"""Data from a stranger: no code of it runs, what does not fit is refused."""

import ast
import json
import pathlib
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds

from hourjax.data.prepared import Prepared
from hourjax.errors import UserError
from hourjax.training import checkpoint_format
from hourjax.training.checkpoint import Checkpoints, restore_params
from tests import tampering

ROOT = pathlib.Path(__file__).parents[1]
TRIES = {"dataset": 120, "store": 60, "tokenizer": 60, "workdir": 20}


@pytest.fixture(scope="module", params=TRIES)
def made(request, tmp_path_factory):
  folder = tmp_path_factory.mktemp("made") / request.param
  tampering.KINDS[request.param][0](folder)
  return folder


def test_a_changed_file_is_refused_or_harmless(made, tmp_path):
  """Never another exception, and never other data."""
  seeds = range(TRIES[made.name])
  counts, wrong = tampering.outcomes(made.name, made, tmp_path / "t", seeds)
  assert not wrong, "\n".join(wrong)
  assert counts["refused"] >= len(seeds) // 5


# --- code --------------------------------------------------------------------


@pytest.fixture
def planted(tmp_path, monkeypatch):
  """A module that leaves a mark when it is imported, where Python finds it."""
  mark = tmp_path / "mark"
  folder = tmp_path / "beside"
  folder.mkdir()
  (folder / "planted_module.py").write_text(
    f"import pathlib\npathlib.Path({str(mark)!r}).touch()\n"
  )
  monkeypatch.chdir(folder)
  monkeypatch.syspath_prepend(folder)
  yield mark
  sys.modules.pop("planted_module", None)


def _class_names(value):
  """(holder, key) of every name of a class."""
  for key, inner in value.items():
    if isinstance(inner, dict):
      yield from _class_names(inner)
    elif key == "pythonClassName":
      yield value, key


@pytest.mark.parametrize("at", [0, 7, 12, -1])
def test_features_of_a_dataset_run_no_code(tmp_path, planted, at):
  tampering.make_dataset(tmp_path / "d")
  path = tmp_path / "d" / "features.json"
  features = json.loads(path.read_text())
  places = list(_class_names(features))
  holder, key = places[at]
  holder[key] = "planted_module.Evil"
  path.write_text(json.dumps(features))
  with pytest.raises(UserError, match=r"does not describe.*planted_module"):
    Prepared(tmp_path / "d")
  assert not planted.exists()
  # It is the reader that matters: TFDS's own runs it.
  with pytest.raises(ValueError, match="Unrecognized"):
    tfds.builder_from_directory(tmp_path / "d")
  assert planted.exists()


def test_names_in_a_datasets_description_run_no_code(tmp_path, planted):
  tampering.make_dataset(tmp_path / "d")
  path = tmp_path / "d" / "dataset_info.json"
  info = json.loads(path.read_text())
  info |= {"moduleName": "planted_module", "name": "planted_module"}
  info["splits"][0]["filepathTemplate"] = "/etc/{DATASET}"
  path.write_text(json.dumps(info))
  assert len(Prepared(tmp_path / "d").records) == 8
  assert not planted.exists()


class _Planted:
  def __init__(self, mark):
    self.mark = mark

  def __reduce__(self):
    return pathlib.Path.touch, (self.mark,)


def test_pickles_in_arrays_are_not_opened(tmp_path, planted):
  tampering.make_dataset(tmp_path / "d")
  tampering.make_store(tmp_path / "s")
  evil = np.array([_Planted(planted)] * 4, object)
  path = tmp_path / "d" / "columns.npz"
  with np.load(path) as file:
    columns = dict(file)
  np.savez(path, **{**columns, "videos": evil})
  np.save(tmp_path / "s" / "0.mp4.npy", evil)
  with pytest.raises(UserError, match=r"columns\.npz cannot be read"):
    Prepared(tmp_path / "d")
  with pytest.raises(UserError, match=r"0\.mp4\.npy"):
    tampering.read_store(tmp_path / "s")
  assert not planted.exists()
  np.load(tmp_path / "s" / "0.mp4.npy", allow_pickle=True)
  assert planted.exists()


def test_names_in_a_checkpoint_run_no_code(tmp_path, planted):
  """Orbax writes names of classes and modules beside the arrays."""
  tampering.make_workdir(tmp_path / "run")
  folder = (
    pathlib.Path(checkpoint_format.checkpoint_folder(tmp_path / "run")) / "3"
  )
  changed = 0
  for path in folder.rglob("*"):
    if path.is_file() and path.name in ("_METADATA", "_CHECKPOINT_METADATA"):
      text = path.read_text()
      named = text.replace("jax.Array", "planted_module.Evil").replace(
        "orbax.", "planted_module."
      )
      changed += named != text
      path.write_text(named)
  assert changed == 2
  try:
    restore_params(tmp_path / "run")
    Checkpoints(tmp_path / "run").restore(tampering._state(), plan="plan")
  except UserError:
    pass
  assert not planted.exists()


# Functions that run what the data says.
BUILTINS = {"eval", "exec", "compile", "__import__"}
FORBIDDEN = {
  "import_module", "unsafe_load", "full_load", "unsafe_load_all", "load_all",
  "builder_from_directory", "builder_from_directories", "read_pickle",
  "run_path", "run_module",
}  # fmt: skip
MODULES = {"pickle", "cloudpickle", "dill", "marshal", "shelve", "joblib"}


def _dangers(tree):
  for node in ast.walk(tree):
    if isinstance(node, ast.Import | ast.ImportFrom):
      names = [alias.name for alias in node.names]
      names.append(getattr(node, "module", None) or "")
      yield from MODULES.intersection(n.split(".")[0] for n in names)
    if not isinstance(node, ast.Call):
      continue
    called = getattr(node.func, "attr", getattr(node.func, "id", ""))
    owner = getattr(getattr(node.func, "value", None), "id", "")
    given = {k.arg: getattr(k.value, "value", None) for k in node.keywords}
    builtin = isinstance(node.func, ast.Name) and called in BUILTINS
    if builtin or called in FORBIDDEN:
      yield called
    if called == "load" and owner == "yaml":
      yield "yaml.load"
    if called == "load" and owner == "torch" and not given.get("weights_only"):
      yield "torch.load"
    if given.get("allow_pickle") or given.get("trust_remote_code"):
      yield "allow_pickle"


def test_no_reader_runs_what_data_says():
  found = {
    str(path.relative_to(ROOT)): sorted(dangers)
    for part in ("hourjax", "configs", "launch")
    for path in (ROOT / part).rglob("*.py")
    if (dangers := set(_dangers(ast.parse(path.read_text()))))
  }
  # None of these names comes from a file: a worker process runs the module that
  # the process which starts it names, the others import our own modules.
  assert found == {
    "hourjax/processes.py": ["run_module"],
    "hourjax/evaluation/benchmarks/__init__.py": ["import_module"],
    "launch/docs.py": ["import_module"],
  }
