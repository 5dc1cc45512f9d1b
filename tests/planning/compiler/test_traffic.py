"""What is sent: groups as XLA writes them, and programs of known traffic."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hourjax.planning.compiler import hlo
from hourjax.planning.compiler.compile_pool import ENVIRONMENT
from hourjax.planning.compiler.traffic import Layout, by_axis, collectives

ROOT = Path(__file__).parents[3]
MESH = Layout(("data", "fsdp", "seq"), (2, 2, 2))
MIB = 1 << 20


def _program(*lines, more=""):
  body = "\n".join(f"  {line}" for line in lines)
  return hlo.parse(f"{more}\nENTRY %main (a: f32[8]) -> f32[8] {{\n{body}\n}}")


def _one(line, layout=MESH):
  (found,) = collectives(_program(line), layout)
  return found


def _reduce(groups):
  return _one(
    "%x = f32[1024,256]{1,0:T(8,128)} all-reduce(%a), channel_id=1,"
    f" replica_groups={groups}, use_global_device_ids=true, to_apply=%add"
  )


@pytest.mark.parametrize(
  ("groups", "axes", "devices"),
  [
    ("{{0,1},{2,3},{4,5},{6,7}}", ("seq",), 2),
    ("{{0,2},{4,6},{1,3},{5,7}}", ("fsdp",), 2),
    ("{{0,4},{1,5},{2,6},{3,7}}", ("data",), 2),
    ("{{0,1,2,3},{4,5,6,7}}", ("fsdp", "seq"), 4),
    ("{}", ("data", "fsdp", "seq"), 8),
    ("[4,2]<=[8]", ("seq",), 2),
    ("[2,4]<=[4,2]T(1,0)", ("data", "fsdp"), 4),
    ("[4,2]<=[2,2,2]T(0,2,1)", ("fsdp",), 2),
    ("[1,8]<=[8]", ("data", "fsdp", "seq"), 8),
    ("mesh['a'=4,'b'=2] {'a'}", ("data", "fsdp"), 4),
    ("mesh['a'=4,'b'=2] {'b'}", ("seq",), 2),
    ("mesh['a'=4,'b'=2] {'a','b'}", ("data", "fsdp", "seq"), 8),
    # Part of an axis: the first and the second half of a's four.
    ("mesh['a'=4,'b'=2] {'a':(1)2}", ("data",), 2),
    ("mesh['a'=4,'b'=2] {'a':(2)2}", ("fsdp",), 2),
    (
      "mesh['a'=2,'b'=2,'c'=2], device_ids=([2,2,2]T(2,1,0)) {'a'}",
      ("seq",),
      2,
    ),
    (
      "mesh['a'=2,'b'=2,'c'=2], device_ids=([2,2,2]T(2,1,0)) {'a','b'}",
      ("fsdp", "seq"),
      4,
    ),
  ],
)
def test_groups_and_axes(groups, axes, devices):
  found = _reduce(groups)
  assert (found.axes, found.devices) == (axes, devices)
  assert found.sent == pytest.approx(2 * MIB * (devices - 1) / devices)


def test_groups_of_one_send_nothing():
  program = _program(
    "%x = f32[8]{0} all-reduce(%a), replica_groups=[8,1]<=[8], to_apply=%add"
  )
  assert collectives(program, MESH) == []


@pytest.mark.parametrize(
  ("line", "sent", "asynchronous"),
  [
    ("%x = bf16[4,256]{1,0} all-gather(%a), GROUPS, dimensions={0}",
     2048 / 2, False),
    ("%x = (bf16[2,256]{1,0}, bf16[4,256]{1,0}) all-gather-start(%a), GROUPS,"
     " dimensions={0}", 2048 / 2, True),
    ("%x = f32[4,256]{1,0} reduce-scatter(%a), GROUPS, dimensions={0},"
     " to_apply=%add", 2 * 4096 / 2, False),
    ("%x = (f32[256]{0}, f32[256]{0}) all-to-all(%a, %b), GROUPS",
     2048 / 2, False),
    ("%x = f32[512]{0} all-to-all(%a), GROUPS, dimensions={0}",
     2048 / 2, False),
    ("%x = (f32[512]{0}, f32[256]{0}) all-reduce(%a, %b), GROUPS, to_apply=%d",
     2 * 3072 / 2, False),
    ("%x = f32[512]{0} all-reduce-start(%a), GROUPS, to_apply=%add",
     2 * 2048 / 2, True),
  ],
)  # fmt: skip
def test_bytes_sent(line, sent, asynchronous):
  line = line.replace("GROUPS", "channel_id=1, replica_groups=[4,2]<=[8]")
  found = _one(line)
  assert found.sent == sent
  assert found.asynchronous == asynchronous
  assert found.axes == ("seq",)


def test_the_end_of_a_pair_counts_nothing():
  program = _program(
    "%s = (f32[8]{0}, f32[16]{0}) all-gather-start(%a), channel_id=1,"
    " replica_groups=[4,2]<=[8], dimensions={0}",
    "%d = f32[16]{0} all-gather-done(%s)",
  )
  assert len(collectives(program, MESH)) == 1


def test_a_reduction_fused_with_its_slice_is_a_scatter():
  more = """%all-reduce-scatter.1 (p: f32[1024]) -> f32[512] {
  %p = f32[1024]{0} parameter(0)
  %r = f32[1024]{0} all-reduce(%p), channel_id=2, replica_groups=[4,2]<=[8], to_apply=%add
  ROOT %s = f32[512]{0} dynamic-slice(%r, %c), dynamic_slice_sizes={512}
}
"""  # noqa: E501
  (found,) = collectives(
    _program(
      "%f = f32[512]{0} fusion(%a), kind=kCustom, calls=%all-reduce-scatter.1",
      more=more,
    ),
    MESH,
  )
  assert (found.kind, found.sent) == ("reduce-scatter", 4096 / 2)


def test_pieces_of_one_fused_collective_count_once():
  piece = (
    "%g{} = f32[1024]{{0}} all-gather(%p), channel_id={}, replica_groups="
    '[4,2]<=[8], dimensions={{0}}, frontend_attributes={{chain_id="{}"}},'
    ' backend_config={{"async_collective_fusion_config":{{"flag_start":"2"}}}}'
  )
  computations = "".join(
    f"%part{i} (p: f32[512]) -> f32[1024] {{\n"
    "  %p = f32[512]{0} parameter(0)\n"
    f"  ROOT {piece.format(i, channel, chain)}\n}}\n"
    for i, (channel, chain) in enumerate(
      [(7, 0), (7, 0), (7, 0), (8, 0), (7, 1)]
    )
  )
  calls = [
    f"%f{i} = f32[1024]{{0}} fusion(%a), kind=kCustom, calls=%part{i}"
    for i in range(5)
  ]
  found = collectives(_program(*calls, more=computations), MESH)
  assert len(found) == 3
  assert all(each.asynchronous for each in found)
  # A piece in a loop, which the compiler runs beside the collective.
  loop = (
    "%cond (s: f32[512]) -> pred[] {\n"
    "  ROOT %c = pred[] constant(true)\n}\n"
    "%body (s: f32[512]) -> f32[1024] {\n"
    "  %s = f32[512]{0} parameter(0)\n"
    "  ROOT %f9 = f32[1024]{0} fusion(%s), kind=kCustom, calls=%part0\n}\n"
  )
  turns = (
    "%w = f32[1024]{0} while(%a), condition=%cond, body=%body,"
    ' backend_config={"known_trip_count":{"n":"5"}}'
  )
  for first in (calls[0], turns), (turns, calls[0]):
    (one,) = collectives(_program(*first, more=computations + loop), MESH)
    assert one.times == 1


def test_a_wrapped_asynchronous_collective():
  more = """%wrapped (p: f32[1024]) -> f32[512] {
  %p = f32[1024]{0} parameter(0)
  ROOT %r = f32[512]{0} reduce-scatter(%p), channel_id=2, replica_groups=[4,2]<=[8], dimensions={0}, to_apply=%add
}
"""  # noqa: E501
  (found,) = collectives(
    _program(
      "%s = ((f32[1024]{0}), f32[512]{0}) async-start(%a), calls=%wrapped",
      "%d = f32[512]{0} async-done(%s)",
      more=more,
    ),
    MESH,
  )
  assert found.asynchronous
  assert found.sent == 2048


def test_a_permutation_by_the_axes_that_it_crosses():
  found = collectives(
    _program(
      "%s = (f32[256]{0}, f32[256]{0}, u32[], u32[])"
      " collective-permute-start(%a), channel_id=3,"
      " source_target_pairs={{0,1},{1,0},{2,6},{6,2},{3,3},{4,4},{5,7},{7,4}}"
    ),
    MESH,
  )
  # Of eight devices two send along seq, two along data and so on.
  assert {each.axes: each.sent for each in found} == {
    ("seq",): 1024 * 2 / 8,
    ("data",): 1024 * 2 / 8,
    ("fsdp",): 1024 * 1 / 8,
    ("fsdp", "seq"): 1024 * 1 / 8,
  }


def test_of_a_conditional_the_larger_branch_counts():
  branch = """%branch{0} (p: f32[8]) -> f32[8] {{
  %p = f32[8]{{0}} parameter(0)
  ROOT %r = f32[{1}]{{0}} all-reduce(%p), replica_groups=[4,2]<=[8], to_apply=%add
}}
"""  # noqa: E501
  more = branch.format(0, 100) + branch.format(1, 300)
  found = collectives(
    _program(
      "%c = f32[8]{0} conditional(%i, %a, %a),"
      " branch_computations={%branch0, %branch1}",
      "%y = f32[8]{0} all-reduce(%a), replica_groups=[4,2]<=[8], to_apply=%d",
      more=more,
    ),
    MESH,
  )
  assert sorted(each.payload for each in found) == [32, 1200]


# Programs that were compiled ------------------------------------------------

TURNS, LAYERS, UNKNOWN = 5, 6, 3
ARRAY = 4 * MIB  # float32 of 1024 x 1024


def _compiled(where):
  done = subprocess.run(
    [sys.executable, "-m", "tests.planning.compiler.known_traffic", where],
    cwd=ROOT,
    env=os.environ | ENVIRONMENT,
    capture_output=True,
    text=True,
    timeout=240,
  )
  assert done.returncode == 0, done.stderr[-2000:]
  return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("where", ["cpu", "v5e:2x4"])
def test_known_traffic(where):
  found = _compiled(where)
  by_hand = {
    (line["axes"], line["kind"]): (line["count"], line["sent"])
    for line in found["collectives"]["traffic"]
  }
  assert by_hand == {
    ("b", "all-gather"): (TURNS, TURNS * 2 * ARRAY / 2),
    ("c", "reduce-scatter"): (TURNS, TURNS * 2 * ARRAY / 2),
    ("a+c", "all-reduce"): (TURNS, TURNS * 2 * ARRAY * 3 / 4),
    ("b", "collective-permute"): (TURNS, TURNS * ARRAY),
    ("a", "all-reduce"): (UNKNOWN, UNKNOWN * 2 * ARRAY / 2),
  }
  guessed = [x["axes"] for x in found["collectives"]["traffic"] if x["guessed"]]
  assert guessed == ["a"]

  # The weights of each layer are gathered twice and their gradients summed.
  size = {"bf16": 2, "f32": 4}
  layers = {
    (line["axes"], line["kind"]): (
      line["count"],
      line["sent"] / size[line["dtype"]],
    )
    for line in found["layers"]["traffic"]
  }
  weights = 1024 * 1024
  assert layers["fsdp", "all-gather"] == (
    2 * LAYERS,
    2 * LAYERS * weights * 3 / 4,
  )
  # CPU sums whole gradients, TPU the part of each device.
  passes, kind = (1, "reduce-scatter") if where != "cpu" else (2, "all-reduce")
  assert layers["fsdp", kind] == (LAYERS, passes * LAYERS * weights * 3 / 4)
  assert layers["seq", "all-reduce"] == (LAYERS, LAYERS * weights / 4)

  # What arguments are, from their names; padding is the compiler's.
  kinds = found["layers"]["kinds"]
  assert set(kinds) == {"parameters", "batches"}
  assert sum(kinds.values()) == found["layers"]["arguments"]


def test_totals_are_by_what_is_alike():
  one = _reduce("[4,2]<=[8]")
  lines = by_axis([one, one, _reduce("[1,8]<=[8]")], times=3)
  assert [(x["axes"], x["count"]) for x in lines] == [
    ("seq", 6),
    ("data+fsdp+seq", 3),
  ]
  assert lines[0]["sent"] == 6 * one.sent
