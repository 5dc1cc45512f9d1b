"""Who may import whom, read from the source."""

import ast
import collections
import functools
import graphlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "hourjax").rglob("*.py"))
# Part -> what of ours it may import.
ALLOWED = {
  "hourjax.data": (
    "hourjax.batch",
    "hourjax.atomic_file",
    "hourjax.errors",
    "hourjax.hub",
    "hourjax.jsonl",
    "hourjax.plots",
    "hourjax.processes",
    "hourjax.progress",
    "hourjax.schema",
    "hourjax.storage",
    "hourjax.data",
  ),
  "hourjax.kernels": ("hourjax.kernels",),
  "hourjax.models": (
    "hourjax.batch",
    "hourjax.kernels",
    "hourjax.models",
    "hourjax.parallel",
  ),
  "hourjax.parallel": (
    "hourjax.errors",
    "hourjax.kernels",
    "hourjax.parallel",
  ),
}


def _module(path):
  parts = path.relative_to(ROOT).with_suffix("").parts
  return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {_module(path): path for path in FILES}


@functools.cache
def _tree(path):
  return ast.parse(path.read_text())


def _imports(path):
  """Full names of the modules that a file imports, anywhere in it."""
  for node in ast.walk(_tree(path)):
    if isinstance(node, ast.Import):
      yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      assert not node.level, f"relative import in {path}"
      for alias in node.names:
        name = f"{node.module}.{alias.name}"
        yield name if name in MODULES else node.module


def _within(name, part):
  return name == part or name.startswith(f"{part}.")


def _is_entry_point(path):
  return any(
    isinstance(node, ast.FunctionDef) and node.name == "main"
    for node in _tree(path).body
  )


ENTRY_POINTS = [path for path in FILES if _is_entry_point(path)]


def test_sources_are_found():
  assert len(FILES) > 40
  names = {_module(path) for path in ENTRY_POINTS}
  commands = ("demo", "extract", "train", "evaluate")
  assert names >= {f"hourjax.{name}" for name in commands}
  assert all(path.parent == ROOT / "hourjax" for path in ENTRY_POINTS)


@pytest.mark.parametrize("part", ALLOWED)
def test_parts_know_only_what_is_below_them(part):
  wrong = [
    (module, name)
    for module, path in MODULES.items()
    if _within(module, part)
    for name in _imports(path)
    if _within(name, "hourjax")
    and not any(_within(name, allowed) for allowed in ALLOWED[part])
  ]
  assert not wrong


def test_data_runs_without_jax():
  wrong = [
    (module, name)
    for module, path in MODULES.items()
    if _within(module, "hourjax.data")
    for name in _imports(path)
    if name.split(".")[0] in ("jax", "flax", "optax", "orbax")
  ]
  assert not wrong


def test_nothing_imports_configs_tests_or_entry_points():
  entries = {_module(path) for path in ENTRY_POINTS}
  wrong = [
    (module, name)
    for module, path in MODULES.items()
    for name in _imports(path)
    if name in entries or name.split(".")[0] in ("configs", "tests")
  ]
  assert not wrong


def test_no_import_cycle():
  graph = {
    module: {name for name in _imports(path) if name in MODULES}
    for module, path in MODULES.items()
  }
  graphlib.TopologicalSorter(graph).prepare()  # raises CycleError


@pytest.mark.parametrize("path", FILES, ids=_module)
def test_length(path):
  lines = len(path.read_text().splitlines())
  assert lines <= (100 if path in ENTRY_POINTS else 500)


def _room(module):
  """The package or top-level module below hourjax that a module is in."""
  return ".".join(module.split(".")[:2])


ROOMS = {_room(module) for module in MODULES} - {"hourjax"}


def test_no_circle_between_packages():
  """Two packages that import each other are one, whatever their files do."""
  graph = {room: set() for room in ROOMS}
  for module, path in MODULES.items():
    if module == "hourjax":
      continue  # what a notebook needs, from everywhere
    names = {_room(name) for name in _imports(path) if _within(name, "hourjax")}
    graph[_room(module)] |= names - {_room(module), "hourjax"}
  graphlib.TopologicalSorter(graph).prepare()  # raises CycleError


def test_packages_are_small_enough_to_look_through():
  files = collections.Counter(path.parent for path in FILES)
  del files[ROOT / "hourjax"]  # commands, and what all packages share
  large = {
    str(folder.relative_to(ROOT)): count
    for folder, count in files.items()
    if count > 17  # with __init__.py
  }
  assert not large


# Lower this where a module is joined to its importer, and do not raise it.
MOST_WITH_ONE_IMPORTER = 20


def test_few_modules_have_a_single_importer():
  """What only one module needs is suspicious: is it a part of that one?

  Not so where the one is a command, which is short and leaves its work to one.
  """
  commands = {_module(path) for path in ENTRY_POINTS}
  importers = collections.defaultdict(set)
  for module, path in MODULES.items():
    for name in _imports(path):
      if name in MODULES and name != module:
        importers[name].add(module)
  single = sorted(
    module
    for module, found in importers.items()
    if len(found) == 1 and not found <= commands
  )
  assert len(single) <= MOST_WITH_ONE_IMPORTER, single


def test_only_the_plugin_for_lmms_eval_needs_it():
  """Others may import PyTorch inside of functions, where it is optional."""
  plugin = "hourjax.evaluation.lmms"
  foreign = ("lmms_eval", "loguru", "torch", "transformers")
  wrong = []
  for module, path in MODULES.items():
    for node in _tree(path).body if module != plugin else ():
      names = (
        [alias.name for alias in node.names]
        if isinstance(node, ast.Import)
        else [node.module]
        if isinstance(node, ast.ImportFrom)
        else []
      )
      wrong += [(module, n) for n in names if n.split(".")[0] in foreign]
    wrong += [(module, name) for name in _imports(path) if name == plugin]
  assert not wrong
