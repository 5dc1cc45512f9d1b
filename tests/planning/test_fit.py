"""Changes that make a step fit."""

import dataclasses

import pytest

from hourjax.errors import UserError
from hourjax.planning import fit, search
from hourjax.planning.compiler.compiled_step import Compiled
from hourjax.planning.plan import evaluate
from hourjax.planning.topology import parse_topology
from hourjax.planning.workload import make_workload
from tests.planning.examples import experiment, in_rows

GIB = 1 << 30


@pytest.fixture(scope="module")
def start():
  found = experiment(mesh={"fsdp": 16, "seq": 4}, batch_rows=32)
  found = in_rows(found, 3)
  model = dataclasses.replace(found.model, remat="none")
  return dataclasses.replace(found, model=model)


def test_changes_go_from_small_to_large(start):
  flags = [
    change.flags for change in fit.changes(start, parse_topology("v5e:8x8"))
  ]
  rows = ("--config.batch_rows=16", "--config.accumulate=6")
  assert flags[:4] == [
    rows,
    ("--config.model.remat=full",),
    ("--config.optimizer.mu_dtype=bfloat16",),
    (*rows, "--config.mesh.fsdp=8", "--config.mesh.seq=8"),
  ]
  together = flags[4]
  assert set(together) == {
    "--config.batch_rows=8",
    "--config.accumulate=12",
    "--config.model.remat=full",
    "--config.optimizer.mu_dtype=bfloat16",
    "--config.mesh.fsdp=8",
    "--config.mesh.seq=8",
  }
  assert [f for f in flags[5] if "topology" in f] == ["--topology=v5e:8x16"]
  assert [f for f in flags[6] if "topology" in f] == ["--topology=v5e:16x16"]
  assert len(flags) == 7


def test_batches_of_samples_are_never_accumulated(start):
  """Micro-batches become smaller, and as many as the samples need."""
  found = dataclasses.replace(start, accumulate=1, batch_samples=128)
  topology = parse_topology("v5e:8x8")
  flags = [change.flags for change in fit.changes(found, topology)]
  assert flags[0] == ("--config.batch_rows=16",)
  assert not any("accumulate" in flag for each in flags for flag in each)
  few = dataclasses.replace(found, batch_samples=32)
  more = fit.more_chips(fit.Change((), few, topology))
  assert more is not None and more.experiment.batch_rows == 32
  assert fit.more_chips(more) is None  # 64 groups for 32 samples


def test_every_change_is_what_its_flags_say(start):
  for change in fit.changes(start, parse_topology("v5e:8x8")):
    experiment, topology = change.experiment, change.topology
    data, fsdp, _, _ = experiment.mesh.sizes(topology.devices)
    assert experiment.batch_rows % (data * fsdp) == 0
    named = dict(flag[2:].split("=") for flag in change.flags)
    values = {
      "config.batch_rows": experiment.batch_rows,
      "config.accumulate": experiment.accumulate,
      "config.model.remat": experiment.model.remat,
      "config.optimizer.mu_dtype": experiment.optimizer.mu_dtype,
      "config.mesh.fsdp": experiment.mesh.fsdp,
      "config.mesh.seq": experiment.mesh.seq,
      "topology": topology.name,
    }
    for key, value in named.items():
      assert value == str(values[key])
    # Nothing else has changed.
    before = {
      "config.model.remat": start.model.remat,
      "config.optimizer.mu_dtype": start.optimizer.mu_dtype,
      "config.mesh.seq": start.mesh.seq,
      "config.batch_rows": start.batch_rows,
    }
    for key, value in before.items():
      if key not in named:
        assert values[key] == value


def test_the_first_that_fits_is_taken(start, monkeypatch):
  topology = parse_topology("v5e:8x8")
  workload = make_workload(start, "full")

  def compile_step(experiment, topology, workload, *, limit=9):
    assert limit == 9
    counted = search.count_parameters(experiment)
    answer = search.formulas(experiment, topology, counted)
    program = answer["programs"]["accumulate"]
    if experiment.mesh.seq == 8:
      raise UserError("cannot be split so")
    program["temporaries"] = 20 * GIB
    if experiment.model.remat == "full":
      program["temporaries"] = 2 * GIB
    return Compiled(answer)

  monkeypatch.setattr(fit, "compile_step", compile_step)
  plan = evaluate(
    start, topology, workload, compile_step(start, topology, workload)
  )
  assert not plan.fits
  lines = []
  change, found = fit.remedy(plan, lines.append, 9)
  assert change.flags == ("--config.model.remat=full",)
  assert found.fits
  assert len(lines) == 2


def test_nothing_may_help(start, monkeypatch):
  topology = parse_topology("v5e:16x16")
  found = dataclasses.replace(
    start, mesh=dataclasses.replace(start.mesh, seq=16)
  )
  workload = make_workload(found, "full")
  never = Compiled(None, "Ran out of memory", 99 * GIB)
  monkeypatch.setattr(fit, "compile_step", lambda *_, **__: never)
  plan = evaluate(found, topology, workload, never)
  assert fit.remedy(plan, lambda _: None) is None
