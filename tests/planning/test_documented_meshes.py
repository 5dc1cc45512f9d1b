"""Meshes of documents and configurations divide what they have to divide."""

import ast
import functools
import re
from pathlib import Path

import pytest

from configs import demo, hourllava
from hourjax.errors import UserError
from hourjax.parallel.chips import CHIPS
from hourjax.parallel.gpus import GPUS
from hourjax.planning import report, search
from hourjax.planning.compiler.compiled_step import compile_step, device_memory
from hourjax.planning.topology import Topology, parse_topology
from hourjax.planning.workload import make_workload
from hourjax.training.config import build_experiment
from hourjax.training.train_step import check_mesh
from tests.planning import examples

ROOT = Path(__file__).parents[2]
DOCUMENTS = (
  "*.md", "configs/*.md", "launch/*.md", "hourjax/**/*.py", "configs/*.py",
  "launch/**/*.py", "launch/**/*.sh", "hourjax/**/README.md",
)  # fmt: skip
CONFIGS = {"configs/hourllava.py": hourllava, "configs/demo.py": demo}
ACCELERATORS = {
  chip.accelerator.prefix: chip.accelerator.counts
  for chip in CHIPS.values()
  if chip.knows("accelerator")
}


def _texts():
  """Documents, and docstrings of code, by where they stand."""
  for pattern in DOCUMENTS:
    for path in sorted(ROOT.glob(pattern)):
      text = path.read_text()
      if path.suffix == ".py":
        tree = ast.parse(text)
        nodes = (ast.Module, ast.FunctionDef, ast.ClassDef)
        text = "\n\n".join(
          ast.get_docstring(node) or ""
          for node in ast.walk(tree)
          if isinstance(node, nodes)
        )
      yield path.relative_to(ROOT), text


def _documented():
  """(place, options) of every command or code span that sets a mesh."""
  for path, text in _texts():
    fenced = re.findall(r"^```.*?^```", text, re.M | re.S)
    rest = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    spans = re.findall(r"`([^`]+)`", rest)
    blocks = [*fenced, *(rest.split("\n\n") if path.suffix != ".md" else [])]
    lines = [
      line
      for block in blocks
      for line in re.sub(r"\\\n\s*", " ", block).splitlines()
    ]
    for line in [*lines, *(" ".join(span.split()) for span in spans)]:
      options = re.findall(r"--([\w.]+)=([^\s`'\"]+)", line)
      if any(
        name.startswith("config.mesh.") or ",mesh=" in value
        for name, value in options
      ):
        yield f"{path}: {line.strip()}", dict(options)


DOCUMENTED = list(_documented())


def _experiment(options):
  path, _, argument = options.get(
    "config", "configs/hourllava.py:size=3b,stage=3"
  ).partition(":")
  config = CONFIGS[path].get_config(argument or None)
  changes = {
    name.removeprefix("config."): value
    for name, value in options.items()
    if name.startswith("config.")
  }
  flat = dict(_flat(config.to_dict()))
  config.update_from_flattened_dict(
    {name: type(flat[name])(value) for name, value in changes.items()}
  )
  return build_experiment(config.to_dict())


def _flat(values, prefix=""):
  for key, value in values.items():
    if isinstance(value, dict):
      yield from _flat(value, f"{prefix}{key}.")
    else:
      yield f"{prefix}{key}", value


def _devices(options, mesh):
  if "topology" in options:
    return parse_topology(options["topology"]).devices
  if "accelerator" in options:
    family, _, number = options["accelerator"].partition("-")
    return int(number) // ACCELERATORS[family]
  sizes = (mesh.data, mesh.fsdp, mesh.seq, mesh.tensor)
  product = 1
  for size in sizes:
    product *= max(size, 1)
  return product


def test_they_are_found():
  places = {place.partition(":")[0] for place, _ in DOCUMENTED}
  assert places >= {"configs/README.md", "launch/README.md", "hourjax/plan.py"}


@pytest.mark.parametrize("options", [x for _, x in DOCUMENTED],
                         ids=[place for place, _ in DOCUMENTED])  # fmt: skip
def test_a_mesh_in_a_document_is_taken(options):
  experiment = _experiment(options)
  slices = int(options.get("num_slices", 1))
  devices = _devices(options, experiment.mesh) * slices
  check_mesh(experiment, devices, slices)


def _slice(name):
  """The topology of a slice as Cloud TPU counts it, or of GPUs."""
  kind, _, number = name.partition("-")
  if kind in GPUS:
    return GPUS[kind], int(number)
  chip = CHIPS[kind]
  return chip, int(number) // chip.accelerator.counts * chip.devices


@functools.cache
def _workload(size, stage):
  return make_workload(
    build_experiment(
      hourllava.get_config(
        f"size={size},stage={stage},videos=features"
      ).to_dict()
    )
  )


@pytest.mark.parametrize("size", hourllava.SLICES)
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_meshes_of_slices(size, stage):
  """They divide what they have to, and by the formulas a device holds it."""
  workload = _workload(size, stage)
  for name in hourllava.SLICES[size]:
    arg = f"size={size},stage={stage},videos=features,mesh={name}"
    experiment = build_experiment(hourllava.get_config(arg).to_dict())
    chip, devices = _slice(name)
    check_mesh(experiment, devices)
    topology = Topology(chip, (devices // chip.devices,))
    answer = search.formulas(
      experiment, topology, search.count_parameters(experiment),
      workload.streams,
    )  # fmt: skip
    memory = device_memory(answer, topology)
    assert memory.total <= memory.limit, (name, memory)


def test_a_slice_without_a_mesh():
  with pytest.raises(ValueError, match=r"mesh=v6e-7: known for 3b are .*v6e-8"):
    hourllava.get_config("mesh=v6e-7")
  with pytest.raises(ValueError, match="videos=films: short videos come as"):
    hourllava.get_config("videos=films")


def test_plan_refuses_what_training_would_and_says_what_it_takes():
  given = {"config.mesh.fsdp": 64, "config.mesh.seq": 4}
  topology = parse_topology("v5e:16x16")
  experiment = _experiment(given)
  with pytest.raises(UserError) as error:
    compile_step(experiment, topology, make_workload(experiment, "full"))
  message = str(error.value)
  assert message.startswith(
    "config.batch_rows=16 cannot be split over 64 groups"
  )
  remedy = dict(re.findall(r"--([\w.]+)=(\d+)", message))
  assert remedy == {"config.batch_rows": "64"}
  check_mesh(_experiment(given | remedy), topology.devices)
  with pytest.raises(UserError) as error:
    check_mesh(examples.in_rows(experiment, 3), topology.devices)
  message = str(error.value)
  remedy = dict(re.findall(r"--([\w.]+)=(\d+)", message))
  assert remedy == {"config.batch_rows": "64", "config.accumulate": "1"}
  assert "(64 rows a step instead of 48)" in message


@pytest.mark.parametrize(
  "mesh, message",
  [
    (
      {"fsdp": 256},
      "config.batch_samples=128 cannot be split over 256 groups of devices",
    ),
    ({"fsdp": 96}, "--config.batch_rows=96 (the config.batch_samples=128"),
    ({"fsdp": 6, "seq": 1}, "--config.batch_rows=18 (the"),
    ({"fsdp": 8, "seq": 24}, "config.mesh.seq=24 cannot share rows"),
    ({"fsdp": 5, "seq": 5}, "choose sizes whose product is 192"),
  ],
)
def test_other_meshes_that_do_not_fit(mesh, message):
  options = {f"config.mesh.{axis}": size for axis, size in mesh.items()}
  devices = mesh["fsdp"] * mesh.get("seq", 1) if mesh["fsdp"] != 5 else 192
  with pytest.raises(UserError, match=re.escape(message)):
    check_mesh(_experiment(options), devices)


def test_parameters_that_a_mesh_does_not_divide():
  keys = ("config.mesh.fsdp", "config.batch_rows", "config.batch_samples")
  options = dict.fromkeys(keys, 160)
  with pytest.raises(UserError, match=r"does not divide .* parameters"):
    check_mesh(_experiment(options), 160)


def test_flags_that_plan_prints_are_taken():
  found = examples.experiment(mesh={"fsdp": 64, "seq": 4}, batch_rows=64)
  plan = examples.plan_by_formulas(found, "v5e:16x16", "full")
  options = dict(re.findall(r"--([\w.]+)=(\S+)", report.flags(plan)))
  assert "config.batch_rows" in options
  check_mesh(_experiment(options), plan.topology.devices)
