"""Traces and programs, written by hand, against sums by hand."""

import re

import pytest
from jax.profiler import ProfileData

from hourjax.models.config import TINY
from hourjax.models.flops import Work, count_flops
from hourjax.planning.step_profile import (
  COLLECTIVE,
  OTHER,
  SCOPES,
  Event,
  Label,
  add_up,
  label_program,
  read_trace,
)

FORWARD, BACKWARD = (
  Label("decoder_linears", each) for each in ("forward", "backward")
)

# What follows a dollar sign is the path under which an instruction was traced.
PROGRAM = re.sub(
  r"\$(\S+)",
  r'metadata={op_name="jit(accumulate)/\1"}',
  """HloModule jit_accumulate, is_scheduled=true

%fused (a: f32[8,8], b: f32[8,8]) -> f32[8,8] {
  %a = f32[8,8]{1,0} parameter(0)
  %b = f32[8,8]{1,0} parameter(1)
  %dot.1 = f32[8,8]{1,0} dot(%a, %b), \
$transpose(jvp())/checkpoint/rematted_computation/decoder_linears/dot_general
  ROOT %add.1 = f32[8,8]{1,0} add(%dot.1, %b), $jvp(projector)/add
}

%gathered (c: f32[4,8]) -> f32[8,8] {
  %c = f32[4,8]{1,0} parameter(0)
  ROOT %all-gather.7 = f32[8,8]{1,0} all-gather(%c), $jvp()/decoder_linears
}

%body (d: f32[8,8]) -> f32[8,8] {
  %d = f32[8,8]{1,0} parameter(0)
  %copy.5 = f32[8,8]{1,0} copy(%d)
  ROOT %multiply.2 = f32[8,8]{1,0} multiply(%copy.5, %copy.5), \
$jvp()/decoder_linears/decoder_attention/while/body/mul
}

%condition (e: f32[8,8]) -> pred[] {
  %e = f32[8,8]{1,0} parameter(0)
  ROOT %constant.1 = pred[] constant(false)
}

ENTRY %main (x: f32[8,8], y: f32[4,8]) -> f32[8,8] {
  %x = f32[8,8]{1,0} parameter(0)
  %y = f32[4,8]{1,0} parameter(1)
  %async-start.1 = ((f32[4,8]), f32[8,8]) async-start(%y), calls=%gathered
  %copy.2 = f32[8,8]{1,0} copy(%x), $jvp()/copy
  %async-done.1 = f32[8,8]{1,0} async-done(%async-start.1)
  %all-reduce-start.3 = f32[8,8]{1,0} all-reduce-start(%copy.2)
  %all-reduce-done.3 = f32[8,8]{1,0} all-reduce-done(%all-reduce-start.3)
  %while.1 = f32[8,8]{1,0} while(%all-reduce-done.3), condition=%condition, \
body=%body, $jvp()/memaug_projections/memaug_self_attention/while
  ROOT %fusion.1 = f32[8,8]{1,0} fusion(%while.1, %async-done.1), \
kind=kOutput, calls=%fused, $jvp(projector)/add
}
""",
)


def test_scopes_are_the_components_that_are_counted():
  none = Work(*[0.0] * len(Work._fields))
  counted = set(count_flops(TINY, none, frozenset()))
  assert set(SCOPES) == counted | {"tower_attention"}


def test_labels_of_a_program():
  name, labels = label_program(PROGRAM)
  assert name == "jit_accumulate"
  # The product in a fusion counts, and the last scope of its path.
  assert labels["fusion.1"] == BACKWARD
  assert labels["multiply.2"] == Label("decoder_attention", "forward")
  # Without a name of its own: what the loop around it belongs to.
  assert labels["copy.5"] == Label("memaug_self_attention", "forward")
  assert labels["while.1"] is None
  assert labels["copy.2"] == OTHER
  for each in ("async-start.1", "async-done.1", "all-reduce-done.3"):
    assert labels[each] == COLLECTIVE


def test_a_program_that_is_one_component():
  _, labels = label_program(PROGRAM, "update")
  assert labels["fusion.1"] == labels["copy.2"] == Label("update")
  assert labels["async-done.1"] == COLLECTIVE


def _events(*spans, device=0):
  return [
    Event(device, "p", name, start * 1e9, end * 1e9)
    for name, start, end in spans
  ]


LABELS = {
  "p": {"dot": FORWARD, "back": BACKWARD, "sum": COLLECTIVE, "loop": None}
}


def test_only_collectives_beside_which_nothing_runs_are_waited_for():
  events = _events(("loop", 0, 10), ("dot", 0, 3), ("sum", 2, 5), ("dot", 6, 7))
  times = add_up(events, LABELS)
  assert times.work == {FORWARD: 4}
  assert (times.collectives, times.idle, times.total) == (2, 1, 7)


def test_instructions_at_a_time_share_it():
  events = _events(("dot", 0, 4), ("back", 2, 6), ("unknown", 6, 7))
  times = add_up(events, LABELS)
  assert times.work == {FORWARD: 3, BACKWARD: 3, OTHER: 1}
  assert times.of("decoder_linears") == 6
  assert times.of("decoder_linears", "backward") == 3


def test_devices_are_averaged_over_the_time_of_all():
  events = _events(("dot", 0, 4)) + _events(("dot", 2, 8), device=1)
  times = add_up(events, LABELS)
  assert times.work == {FORWARD: 5}
  assert (times.collectives, times.idle) == (0, 3)


def test_an_empty_trace_is_no_measurement():
  with pytest.raises(ValueError, match="no instruction"):
    add_up([], LABELS)


def _write(folder, planes):
  raw = ProfileData.text_proto_to_serialized_xspace(planes)
  (folder / "plugins").mkdir()
  (folder / "plugins" / "host.xplane.pb").write_bytes(raw)


def _plane(name, names, lines):
  """A plane with lines of (event, start, duration) in picoseconds."""
  metadata = "".join(
    f'event_metadata {{ key: {i} value {{ id: {i} name: "{each}" }} }}'
    for i, each in enumerate(names, 1)
  )
  text = ""
  for line, events in lines.items():
    each = "".join(
      f"events {{ metadata_id: {names.index(event) + 1} offset_ps: {at}"
      f" duration_ps: {took} {stats} }}"
      for event, at, took, stats in events
    )
    text += f'lines {{ name: "{line}" timestamp_ns: 0 {each} }}'
  keys = (
    'stat_metadata { key: 1 value { id: 1 name: "hlo_op" } }'
    'stat_metadata { key: 2 value { id: 2 name: "hlo_module" } }'
  )
  return f'planes {{ name: "{name}" {text} {metadata} {keys} }}'


def test_a_trace_of_a_tpu(tmp_path):
  """Names of events are instructions; the module that runs is the program."""
  first, second = "jit_accumulate(17)", "jit_update(18)"
  names = [first, second, "%fusion.1 = f32[8]{0} fusion(%x)", "copy-done.2"]
  _write(
    tmp_path,
    _plane(
      "/device:TPU:3",
      names,
      {
        "XLA Modules": [(first, 0, 5000, ""), (second, 5000, 5000, "")],
        "XLA Ops": [
          (names[2], 1000, 2000, ""), (names[2], 6000, 1000, ""),
          (names[3], 8000, 1000, ""),
        ],
        "Async XLA Ops": [(names[3], 1000, 7000, "")],
      },
    )
    + _plane("/host:CPU", ["x"], {"python": [("x", 0, 9, "")]}),
  )  # fmt: skip
  assert read_trace(tmp_path) == [
    Event(3, "jit_accumulate", "fusion.1", 1, 3),
    Event(3, "jit_update", "fusion.1", 6, 7),
    Event(3, "jit_update", "copy-done.2", 8, 9),
  ]


def test_a_trace_of_a_gpu(tmp_path):
  """Kernels of all streams, with the instruction that launched them."""
  named = (
    'stats { metadata_id: 1 str_value: "fusion.1" }'
    'stats { metadata_id: 2 str_value: "jit_accumulate" }'
  )
  _write(
    tmp_path,
    _plane(
      "/device:GPU:0",
      ["kernel", "copy"],
      {
        "Stream #13(Compute)": [("kernel", 0, 4000, named)],
        "Stream #14(MemcpyD2D)": [("copy", 4000, 1000, "")],
        "XLA Ops": [("kernel", 0, 4000, named)],
      },
    ),
  )
  assert read_trace(tmp_path) == [
    Event(0, "jit_accumulate", "fusion.1", 0, 4),
    Event(0, "", "copy", 4, 5),
  ]
