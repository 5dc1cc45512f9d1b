"""Plans for people."""

import dataclasses
import json

import pytest

from hourjax.errors import UserError
from hourjax.planning import report
from hourjax.planning.compiler.compiled_step import Compiled
from hourjax.planning.plan import as_data, evaluate
from tests.planning.examples import experiment, in_rows, plan_by_formulas


@pytest.fixture(scope="module")
def plan():
  found = experiment(mesh={"fsdp": 16, "seq": 16})
  return plan_by_formulas(found, "v5e:16x16", price=1.5)


def test_a_page_says_what_is_computed_and_what_estimated(plan):
  text = report.page(plan)
  parts = ("computed: what the compiler allots", "computed: TFLOP of a step",
           "computed: MiB that a device sends", "estimated: no TPU was timed",
           "assumed")  # fmt: skip
  places = [text.index(part) for part in parts]
  assert places == sorted(places)
  assert f"of 15.75 ({plan.memory.total / plan.memory.limit:.0%}): fits" in text
  assert f"MFU {plan.estimate.mfu:.1%}" in text
  assert "$1.50 a chip-hour" in text
  assert all(len(line) <= 80 for line in text.splitlines())
  text = " ".join(text.split())
  assert "128 samples a step in micro-batches of 16 rows" in text
  found = plan.estimate
  assert f"{found.empty:.0%} of whose rows are empty" in text
  assert f"an epoch has {found.steps:,.0f} steps" in text
  rows = plan_by_formulas(in_rows(plan.experiment, 3), "v5e:16x16")
  text = " ".join(report.page(rows).split())
  assert "48 rows a step in 3 micro-batches" in text
  assert f"a step has {rows.estimate.samples:.0f} samples on average" in text


def test_a_plan_as_data_is_json(plan):
  data = json.loads(json.dumps(as_data(plan)))
  assert data["fits"] is True
  assert data["computed"]["memory_bytes"]["total"] == plan.memory.total
  assert data["estimated"]["mfu"] == plan.estimate.mfu
  sent = data["computed"]["sent_by_axis"]
  lines = data["computed"]["traffic"]
  assert sum(sum(x.values()) for x in sent.values()) == pytest.approx(
    sum(line["sent"] * line["times"] for line in lines)
  )
  assert data["mesh"] == {"data": 1, "fsdp": 16, "seq": 16, "tensor": 1}


def test_a_plan_without_programs(plan):
  failed = evaluate(
    plan.experiment, plan.topology, plan.workload,
    Compiled(None, "accumulate: Ran out of memory", 20 << 30),
  )  # fmt: skip
  assert "DOES NOT FIT: accumulate: Ran out of memory" in report.page(failed)
  data = as_data(failed)
  assert (data["fits"], data["needed_gib"]) == (False, 20)
  assert "--" in report.ranking([failed])


def test_a_table_of_plans(plan, tmp_path):
  paths = []
  for name, data in (
    ("3b stage 3, v5e-256", "stage3"),
    ("one hour", "video=3600"),
  ):
    found = plan_by_formulas(plan.experiment, plan.topology, data)
    paths.append(tmp_path / f"{name}.json")
    paths[-1].write_text(json.dumps(as_data(found)))
  head, rule, first, second = report.table(map(str, paths)).splitlines()
  assert head.count("|") == rule.count("|") == first.count("|") == 11
  assert first.startswith("| 3b stage 3, v5e-256 | 256 (v5e:16x16) |")
  assert "1, 16, 16, 1" in first and "of 15.75" in first and "$" in first
  # One video has no epoch to pay for.
  assert second.endswith("| -- | -- |")


@pytest.mark.parametrize("text", ["", "[]", "{}", "{"])
def test_other_files_are_refused(tmp_path, text):
  path = tmp_path / "a.json"
  path.write_text(text)
  with pytest.raises(UserError, match=r"a\.json holds no plan"):
    report.table([str(path)])


@pytest.mark.parametrize(
  ("value", "text"),
  [(0, "0"), (1234.4, "1,234"), (56.78, "56.8"), (0.00123, "0.00123"),
   (3.2e-7, "3.2e-07"), (100, "100")],
)  # fmt: skip
def test_numbers_have_three_digits(value, text):
  assert report.number(value) == text


def test_flags_give_the_plan_again(plan):
  assert report.flags(plan) == (
    "--config.mesh.data=1 --config.mesh.fsdp=16 --config.mesh.seq=16"
    " --config.mesh.tensor=1 --config.batch_rows=16 --config.model.remat=full"
  )
  rows = dataclasses.replace(plan, experiment=in_rows(plan.experiment, 3))
  assert "--config.batch_rows=16 --config.accumulate=3" in report.flags(rows)
