"""Which candidates there are, and how they are ranked."""

import dataclasses

import pytest

from hourjax.errors import UserError
from hourjax.planning import report, search
from hourjax.planning.compiler.compiled_step import Compiled
from hourjax.planning.topology import parse_topologies, parse_topology
from hourjax.planning.workload import make_workload
from tests.planning.examples import experiment, in_rows, plan_by_formulas

GIB = 1 << 30
POD = parse_topology("v5e:16x16")


@pytest.fixture(scope="module")
def stage3():
  found = experiment()
  return found, make_workload(found)


@pytest.mark.parametrize("samples", [True, False])
def test_candidates_can_be_split(stage3, samples):
  found, _ = stage3
  found = found if samples else in_rows(found, 3)
  candidates = list(search.candidates(found, POD))
  assert len(candidates) > 50
  assert len(set(candidates)) == len(candidates)
  for each in candidates:
    data, fsdp, seq, tensor = each.mesh.sizes(256)
    assert each.batch_rows % (data * fsdp) == 0
    if samples:
      assert each.batch_rows <= each.batch_samples == 128
      assert each.accumulate == 1
    else:
      assert 0.75 <= each.step_rows / 48 <= 1.34
    assert 64 % seq == 0  # tokens of a frame
    assert 2 % tensor == 0  # KV heads
  assert {each.model.remat for each in candidates} == {"full", "dots", "none"}


def test_slices_are_joined_by_data_alone(stage3):
  found, _ = stage3
  for each in search.candidates(found, POD._replace(slices=2)):
    assert each.mesh.sizes(512)[0] % 2 == 0


def test_parameters_are_counted():
  counted = search.count_parameters(experiment())
  assert sum(counted.values()) == 3_700_088_352  # hourjax/README.md, Model
  assert counted["tower"] == 397_747_744
  assert counted["frozen"] == 0
  first = search.count_parameters(experiment(stage=1))
  assert first["learnt"] == 209_842_176


def test_formulas_of_what_is_stored():
  """Parameters, moments and gradients are known exactly, but for padding."""
  plan = plan_by_formulas(
    experiment(mesh={"fsdp": 16, "seq": 16}), "v5e:16x16", "full"
  )
  learnt = 3_700_088_352 - 397_747_744
  assert plan.memory.optimizer == pytest.approx(8 * learnt / 256, rel=1e-6)
  assert plan.memory.gradients == pytest.approx(4 * learnt / 256, rel=1e-6)
  assert plan.memory.parameters == pytest.approx(
    4 * learnt / 256 + 4 * 397_747_744 / 16, rel=1e-6
  )


def test_keeping_more_takes_more_memory():
  mesh = {"fsdp": 16, "seq": 16}
  sizes = []
  for remat in ("full", "dots", "none"):
    found = experiment(mesh=mesh)
    model = dataclasses.replace(found.model, remat=remat)
    found = dataclasses.replace(found, model=model)
    plan = plan_by_formulas(found, "v5e:16x16", "full")
    sizes.append(plan.memory.temporaries)
  assert sizes == sorted(set(sizes))


def test_hbm_is_flat_when_video_and_seq_double():
  found = experiment(mesh={"fsdp": 16, "seq": 8}, batch_rows=16)
  rows = dataclasses.replace(
    found.rows,
    memory=2 * found.rows.memory,
    features=2 * found.rows.features,
  )
  longer = dataclasses.replace(
    found, rows=rows, mesh=dataclasses.replace(found.mesh, seq=16)
  )
  plans = [
    plan_by_formulas(found, "v5e:8x16", "full"),
    plan_by_formulas(longer, "v5e:16x16", "full"),
  ]
  assert plans[1].memory.total <= plans[0].memory.total


@pytest.mark.slow
def test_the_best_are_compiled_and_those_numbers_rank(stage3, monkeypatch):
  found, workload = stage3
  asked, lines, counted = [], [], search.count_parameters(found)

  def compile_step(candidate, topology, workload, *, limit):
    assert limit == 9
    asked.append(candidate)
    if len(asked) == 2:
      raise UserError("cannot be split")
    answer = search.formulas(candidate, topology, counted, workload.streams)
    if len(asked) == 1:  # the compiler needs more than was thought
      answer["programs"]["accumulate/long"]["temporaries"] = 20 * GIB
    return Compiled(answer)

  monkeypatch.setattr(search, "compile_step", compile_step)
  plans = search.search(
    found, POD, workload, count=4, limit=9, log=lines.append
  )
  assert len(asked) == 4 and len(plans) == 3
  assert plans[-1].experiment == asked[0] and not plans[-1].fits
  assert plans[0].fits
  days = [plan.estimate.days for plan in plans[:-1]]
  assert days == sorted(days)
  assert any("cannot be split" in line for line in lines)
  # By the formulas these were the shortest of those that fit.
  judged = search.judge(found, POD, workload)
  roomy = (p for p in judged if p.memory.total <= search.ROOM * p.memory.limit)
  assert next(roomy).experiment == asked[0]
  fits = [plan.fits for plan in judged]
  assert fits == sorted(fits, reverse=True)


def test_rows_that_suit_no_mesh_are_refused(stage3):
  found, workload = stage3
  topology = parse_topology("v5p:16x16x16")
  rows = dataclasses.replace(in_rows(found, 1), batch_rows=1)
  with pytest.raises(UserError, match="no mesh of 4096 devices suits 1 rows"):
    search.search(rows, topology, workload, log=print)
  few = dataclasses.replace(found, batch_samples=8, batch_rows=8)
  with pytest.raises(UserError, match=r"suits 8 samples .*batch_samples"):
    search.search(few, topology, workload, log=print)


def test_the_best_plan_of_each_slice(stage3, monkeypatch):
  """In order of their cost; one on which nothing fits is left out."""
  found, workload = stage3
  counted, lines = search.count_parameters(found), []

  def compile_step(candidate, topology, workload, *, limit):
    answer = search.formulas(candidate, topology, counted, workload.streams)
    if topology.chips == 8:
      return Compiled(None, "RESOURCE_EXHAUSTED")
    return Compiled(answer)

  monkeypatch.setattr(search, "compile_step", compile_step)
  topologies = parse_topologies("v6e:2x4,v6e:4x4,v6e:4x8")
  plans = search.search_slices(
    found, topologies, workload, count=1, log=lines.append
  )
  assert sorted(p.topology.chips for p in plans) == [16, 32]
  costs = [plan.estimate.cost for plan in plans]
  assert costs == sorted(costs)
  assert any("no candidate fits" in line for line in lines)
  table = report.compared(plans).splitlines()
  assert len(table) == 4 and table[2].startswith("| v6e:4x4 |")
  assert "% days, " in table[3] and "% days, " not in table[2]
  assert sum("cheapest" in line for line in table) == 1
  assert sum("fastest" in line for line in table) == 1
