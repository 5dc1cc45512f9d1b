"""Times from counts, against sums by hand."""

import numpy as np
import pytest

from hourjax.parallel.chips import CHIPS
from hourjax.planning import roofline
from hourjax.planning.roofline import collective_seconds, row_seconds, slowest
from hourjax.planning.workload import make_workload, steps_of, trained
from tests.planning.examples import experiment, in_rows, plan_by_formulas

V5E, V5P = CHIPS["v5e"], CHIPS["v5p"]


def _line(sent, devices, count=0):
  return {"sent": sent, "devices": devices, "count": count}


def _links(*dims, slices=1, devices=16):
  return {"devices": devices, "slices": slices, "dims": [list(d) for d in dims]}


@pytest.mark.parametrize(
  ("links", "ways"),
  [
    (_links((16, 16, 16)), 2),  # a closed ring
    (_links((8, 8, 16)), 1),  # half of it: a line
    (_links((4, 16, 16)), 2 / 4),  # every fourth chip: four share the ring
    (_links((16, 16, 16), (16, 16, 16)), 4),
    (_links((4, 4, 16), (4, 4, 16)), 2),
  ],
)
def test_links_of_an_axis(links, ways):
  took = collective_seconds(_line(9e9, 16), links, V5E)
  assert took == pytest.approx(9e9 / (4.5e10 * ways))


def test_a_small_slice_is_not_closed():
  """v5e rings close at 16 chips, v5p's at 4."""
  took = [
    collective_seconds(_line(9e10, 4), _links((4, 4, 4)), chip)
    for chip in (V5E, V5P)
  ]
  assert took == [pytest.approx(2), pytest.approx(0.5)]


def test_between_slices_the_network_is_shared():
  """8 devices of 2 slices: 4 send a part each, by hand 1 s."""
  links = _links((4, 4, 4), slices=2, devices=8)
  sent = 4 * V5E.dcn
  assert collective_seconds(_line(sent, 8), links, V5E) == pytest.approx(1)


def test_many_small_collectives_take_their_hops():
  took = collective_seconds(_line(0, 16, count=1000), _links((16, 16, 16)), V5E)
  assert took == pytest.approx(1000 * 16 * roofline.HOP)


def test_the_slowest_shard_sets_the_pace():
  seconds = np.array([[1.0, 1, 1, 5], [1, 1, 1, 1]])
  # Micro-batches of four rows on two shards: (2, 6) and (2, 2).
  assert slowest(seconds, 2) == (4, 3)
  assert slowest(np.ones((2, 4)), 4) == (1, 1)
  assert slowest(np.full((3, 16), 2.0), 8) == (4, 4)


def test_an_hour_by_hand():
  """3B, one hour a row on one v5p chip: seconds of its products."""
  found = experiment()
  workload = make_workload(found, "video=3600")
  mesh = {"data": 1, "fsdp": 1, "seq": 1, "tensor": 1}
  work = roofline.executed_work(found, workload, mesh)
  for each in (0, 1):  # the video's row, and an empty one
    whole = (work.memory[each], work.queries[each], work.decoder[each])
    assert whole == (235520, 15872, 16640)
  assert (work.cross_pairs[1], work.labels[1]) == (0, 0)
  rates = V5P.efficiency
  seconds = row_seconds(found.model, work, trained(found), V5P)[0]
  cross = 4 * 9280 * 234000 * 2048 * 4 * roofline.PACKED
  by_hand = cross / rates.memaug[0] + 2.5 * cross / rates.memaug[1]
  alone = by_hand / 459e12
  assert 0.3 * seconds < alone < 0.6 * seconds
  assert 1.15 < seconds < 4  # 1.15 s is an hour's ideal, without padding


def test_an_empty_row_costs_less_than_an_hour_but_not_nothing():
  found = experiment()
  workload = make_workload(found, "video=3600")
  mesh = {"data": 1, "fsdp": 1, "seq": 1, "tensor": 1}
  work = roofline.executed_work(found, workload, mesh)
  hour, empty = row_seconds(found.model, work, trained(found), V5P)
  assert 0.2 * hour < empty < 0.7 * hour


@pytest.mark.parametrize("samples", [True, False])
def test_the_parts_of_an_estimate_add_up(samples):
  given = experiment(mesh={"fsdp": 16, "seq": 16}, batch_rows=16)
  plan = plan_by_formulas(given if samples else in_rows(given, 3), "v5e:16x16")
  found = plan.estimate
  waited = sum(a for a, _ in found.axes.values())
  beside = sum(b for _, b in found.axes.values())
  busy = max(found.compute, found.memory)
  step = max(busy, beside) + waited + found.update
  assert found.step == pytest.approx(step)
  assert found.hidden <= found.step <= found.exposed
  assert found.balanced < found.compute
  steps = steps_of(plan.experiment, plan.workload)
  if samples:
    assert found.samples == 128
    assert 0.1 < found.empty < 0.6
    assert 16 * found.micro_batches * (1 - found.empty) == pytest.approx(
      found.rows
    )
  else:
    assert (found.rows, found.micro_batches, found.empty) == (48, 3, 0)
    assert found.samples == pytest.approx(421, rel=0.01)  # more than published
  assert found.steps == pytest.approx(plan.workload.samples / found.samples)
  assert found.rows == steps.rows
  executed = sum(part.total for part in found.components.values())
  assert found.useful < executed
  peak = 256 * 197e12
  assert found.mfu == pytest.approx(found.useful / found.step / peak)
  assert found.days == pytest.approx(
    plan.workload.rows / found.rows * found.step / 86400
  )
  assert found.cost == pytest.approx(found.days * 24 * 256 * plan.price)
  per_second = found.rows / found.step
  assert found.video_hours_a_day == pytest.approx(
    plan.workload.seconds.mean() / 3600 * per_second * 86400
  )
  assert 0.05 < found.mfu < 0.6


def test_decoder_attention_of_few_kv_heads_is_repeated():
  """7B: 28 heads on 16 devices make four blocks, so four compute each."""
  found = experiment("7b")
  workload = make_workload(found, "video=3600")
  pairs = [
    roofline.executed_work(
      found, workload, {"data": 1, "fsdp": 1, "seq": seq, "tensor": 1}
    ).causal_pairs[0]
    for seq in (1, 4, 16)
  ]
  assert pairs[0] == pairs[1] == pairs[2] / 4
