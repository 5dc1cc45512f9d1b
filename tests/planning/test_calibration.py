"""Estimates with constants that were measured, and files that are refused."""

import json

import numpy as np
import pytest

from hourjax.errors import UserError
from hourjax.models.flops import Flops, Work
from hourjax.parallel.chips import CHIPS
from hourjax.planning import report
from hourjax.planning.calibration import calibrated, constants
from hourjax.planning.roofline import component_seconds
from hourjax.planning.step_profile import OTHER, SCOPES, Label, Times
from hourjax.planning.topology import parse_topology
from hourjax.planning.workload import trained
from tests.planning.examples import experiment, in_rows, plan_by_formulas

V5E = CHIPS["v5e"]


@pytest.fixture
def write(tmp_path):
  """Writes a file with these constants; `changes` of its other fields."""

  def write(constants, **changes):
    path = tmp_path / "v5e.json"
    found = {
      "version": 1,
      "device_kind": "TPU v5 lite",
      "devices": 8,
      "jax": "0.10.2",
      "libtpu": "0.0.42",
      "date": "2026-01-31",
      "configuration": "3B, 8 x 1 rows",
      "constants": constants,
    }
    path.write_text(json.dumps(found | changes))
    return path

  return write


def _seconds(chip):
  """Seconds of one row with some work of every kind, by component."""
  work = Work(*[np.full(1, 1e3)] * len(Work._fields))
  work = work._replace(untrained=np.zeros(1))
  given = experiment(stage=2)
  found = component_seconds(given.model, work, trained(given), chip)
  return {name: float(seconds[0]) for name, seconds in found.items()}


def _plan(topology):
  """The plan of a step of 48 hours of video, a row each."""
  given = in_rows(experiment(mesh={"fsdp": 16, "seq": 16}, batch_rows=16), 3)
  return plan_by_formulas(given, topology, "video=3600")


@pytest.mark.parametrize(
  ("constants", "slower"),
  [
    # The tower's attention stays, its products do not.
    (
      {"dense": V5E.efficiency.dense / 2},
      {
        **dict.fromkeys(
          ("projector", "memaug_projections", "memaug_mlp", "decoder_linears",
           "lm_head"), 2.0,
        ),
        "tower": None,
      },
    ),
    (
      {"memaug_forward": V5E.efficiency.memaug[0] / 2,
       "memaug_backward": V5E.efficiency.memaug[1] / 2},
      {"memaug_self_attention": 2.0, "memaug_cross_attention": 2.0},
    ),
    ({"causal_backward": 0.2}, {"decoder_attention": None}),
    ({"tower": V5E.efficiency.tower / 2}, {"tower": None}),
    ({"link": 1e9, "hbm_bandwidth": 1e9}, {}),
  ],
)  # fmt: skip
def test_what_is_slower_is_what_was_measured(write, constants, slower):
  topology = calibrated(parse_topology("v5e:8x8"), write(constants))
  table, measured = _seconds(V5E), _seconds(topology.chip)
  for name, before in table.items():
    ratio = measured[name] / before
    wanted = slower.get(name, 1.0)
    if wanted is None:
      assert 1.0 < ratio < 6
    else:
      assert ratio == pytest.approx(wanted)


def test_an_estimate_by_measured_constants(write):
  table = parse_topology("v5e:16x16")
  path = write({"dense": 0.3, "hbm_bandwidth": 4.1e11, "link": 2.25e10})
  after, before = (
    _plan(each).estimate for each in (calibrated(table, path), table)
  )
  assert after.compute > 1.5 * before.compute
  assert after.memory == pytest.approx(2 * before.memory)
  # Links at half and at a third of their speed: what a collective takes to
  # begin stays, and the rest takes two and three times as long.
  path = write({"link": 1.5e10})
  third = _plan(calibrated(table, path)).estimate
  waited = [sum(a for a, _ in x.axes.values()) for x in (before, after, third)]
  assert waited[1] > 1.2 * waited[0]
  assert waited[2] - waited[0] == pytest.approx(2 * (waited[1] - waited[0]))
  assert after.step > before.step and after.mfu < before.mfu
  assert after.useful == before.useful


def test_the_page_says_what_was_measured(write):
  table = parse_topology("v5e:16x16")
  before = report.page(_plan(table))
  path = write({"dense": 0.61})
  after = report.page(_plan(calibrated(table, path)))
  assert "no TPU was timed" in before and "constants" not in before
  assert "no TPU was timed" not in after
  assert "estimated: with constants that were measured" in after
  words = " ".join(after.split())
  assert "products run at 61% of the chip's bf16 peak" in words
  assert (
    f"{path} has measured dense on 8 x TPU v5 lite (2026-01-31, jax 0.10.2,"
    " libtpu 0.0.42, 3B, 8 x 1 rows); all else as" in words
  )


def test_a_chip_that_lacks_facts_is_calibrated_too(write):
  path = write({"dense": 0.5}, device_kind="TPU v4")
  chip = calibrated(parse_topology("v4:2x2x1"), path).chip
  assert chip.efficiency.dense == 0.5 and not chip.knows("matrix_units")
  assert chip.efficiency.memaug == CHIPS["v4"].efficiency.memaug


def test_bandwidth_is_of_a_device_and_the_chip_has_two(write):
  path = write({"hbm_bandwidth": 3e12}, device_kind="TPU7x")
  chip = calibrated(parse_topology("tpu7x:2x2x1"), path).chip
  assert chip.hbm_bandwidth == 6e12


def test_no_file_changes_nothing():
  topology = parse_topology("v5e:8x8")
  assert calibrated(topology, None) is topology


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    (
      {"device_kind": "TPU v6 lite"},
      "was measured on TPU v6 lite, and --topology=v5e:8x8 is made of v5e;"
      " give a file that was measured on v5e, or none",
    ),
    ({"device_kind": "NVIDIA H200"}, "was measured on NVIDIA H200, and"),
    ({"version": 2}, "version is 2: input should be 1"),
    ({"constants": {"dense": 1.2}}, "constants.dense is 1.2: .* equal to 1"),
    ({"constants": {"dense": 0}}, "constants.dense is 0: "),
    ({"constants": {"tower": "fast"}}, "constants.tower is 'fast': "),
    ({"constants": None}, "constants is None: input should be a JSON object"),
  ],
)
def test_files_that_are_refused(write, changes, message):
  path = write(**{"constants": {}} | changes)
  with pytest.raises(UserError, match=message) as raised:
    calibrated(parse_topology("v5e:8x8"), path)
  assert str(path) in str(raised.value)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"version": 1}'])
def test_broken_files(tmp_path, text):
  path = tmp_path / "broken.json"
  path.write_text(text)
  with pytest.raises(UserError, match=r"`python -m hourjax\.bench step"):
    calibrated(parse_topology("v5e:8x8"), path)
  with pytest.raises(UserError, match="does not exist"):
    calibrated(parse_topology("v5e:8x8"), tmp_path / "missing.json")


def _measured(peak=100.0, state_bytes=0.0, link_bytes=0.0, **seconds):
  """Constants of a step whose components have 10, 20 and 5 operations each.

  `seconds` are (forward, backward) of components; those not named take (1, 2).
  """
  work = {OTHER: 10.0, Label("update"): 4.0}
  for name in SCOPES:
    forward, backward = seconds.get(name, (1.0, 2.0))
    work[Label(name, "forward")] = forward
    work[Label(name, "backward")] = backward
  flops = dict.fromkeys(SCOPES, Flops(10.0, 20.0, 5.0))
  return constants(
    flops,
    Times(work, 8.0, 1000.0),
    peak=peak,
    state_bytes=state_bytes,
    link_bytes=link_bytes,
  )


def test_constants_are_amounts_over_seconds():
  found, left_out = _measured(state_bytes=12.0, link_bytes=40.0)
  assert found.dense == pytest.approx(35 / 3 / 100)
  assert found.memaug_forward == found.causal_forward == pytest.approx(0.1)
  # What the backward pass computes again is part of it.
  assert found.memaug_backward == found.causal_backward == pytest.approx(0.125)
  assert found.tower == pytest.approx(35 / 3 / 100)
  assert (found.hbm_bandwidth, found.link) == (3.0, 5.0)
  assert not left_out


def test_attentions_of_memaug_are_one():
  found, _ = _measured(memaug_cross_attention=(3.0, 8.0))
  assert found.memaug_forward == pytest.approx(20 / 4 / 100)
  assert found.memaug_backward == pytest.approx(50 / 10 / 100)
  assert found.causal_forward == pytest.approx(0.1)


def test_what_tells_nothing_is_left_out():
  found, left_out = _measured(
    decoder_attention=(0.01, 0.2), tower_attention=(0.0, 0.0)
  )
  assert found.known().keys() == {"dense", "memaug_forward", "memaug_backward"}
  assert left_out == {
    "causal_forward": "too little of the step is of this kind",
    "causal_backward": "measured at 125% of the peak",
    "tower": "too little of the step is of this kind",
    "hbm_bandwidth": "too little of the step is of this kind",
    "link": "too little of the step is of this kind",
  }


def test_without_a_peak_there_are_no_shares_of_it():
  found, left_out = _measured(peak=0.0, state_bytes=12.0)
  assert found.known() == {"hbm_bandwidth": 3.0}
  assert left_out["dense"] == "the peak of the device is not known"
