"""The compiler's text, read: small programs written by hand."""

import pytest

from hourjax.planning.compiler import hlo

LOOP = """HloModule jit_f, is_scheduled=true

%cond (p: (s32[], f32[8])) -> pred[] {
  %limit = s32[]{:T(128)} constant(LIMIT)
  %p = (s32[]{:T(128)}, f32[8]{0:T(256)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i, %limit), direction=DIRECTION
}

%body.clone (q: (s32[], f32[8])) -> (s32[], f32[8]) {
  %one = s32[]{:T(128)} constant(STEP)
  %q = (s32[]{:T(128)}, f32[8]{0:T(256)}) parameter(0)
  %j = s32[]{:T(128)} get-tuple-element(%q), index=0
  %next = s32[]{:T(128)} add(%j, %one)
  %x = f32[8]{0:T(256)} get-tuple-element(%q), index=1
  %kernel = f32[8]{0:T(256)} custom-call(%x), custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
"name": "k"
}}, metadata={op_name="a kernel's text goes over several lines"}
  ROOT %out = (s32[]{:T(128)}, f32[8]{0:T(256)}) tuple(%next, %kernel)
}

ENTRY %main (a: f32[8]) -> f32[8] {
  %a = f32[8]{0:T(256)} parameter(0), metadata={op_name="a['x']"}
  %zero = s32[]{:T(128)} constant(START)
  %copy.1 = s32[]{:T(128)} copy(%zero)
  %start = (s32[]{:T(128)}, f32[8]{0:T(256)}) tuple(%copy.1, %a)
  %while.1 = (s32[]{:T(128)}, f32[8]{0:T(256)}) while(%start), condition=%cond, body=%body.clone, metadata={op_name="w"}
  ROOT %r = f32[8]{0:T(256)} get-tuple-element(%while.1), index=1
}
"""  # noqa: E501


def _loop(limit=6, direction="LT", step=1, start=0):
  text = LOOP.replace("LIMIT", str(limit)).replace("DIRECTION", direction)
  return text.replace("STEP", str(step)).replace("START", str(start))


def _times(text, opcode, unknown=1.0):
  program = hlo.parse(text)
  return [
    (run.times, run.guessed)
    for run in hlo.runs(program, unknown)
    if run.instruction.opcode == opcode
  ]


@pytest.mark.parametrize(
  ("changes", "times"),
  [
    ({}, 6),
    ({"start": 2}, 4),
    ({"direction": "LE"}, 7),
    ({"limit": 7, "step": 2}, 4),
    ({"limit": 0}, 0),
    ({"start": 5, "limit": 0, "step": -1, "direction": "GT"}, 5),
    ({"start": 5, "limit": 0, "step": -1, "direction": "GE"}, 6),
  ],
)
def test_trip_counts_from_the_condition(changes, times):
  assert _times(_loop(**changes), "custom-call") == [(times, False)]


def test_a_known_trip_count_is_taken():
  text = _loop().replace(
    'metadata={op_name="w"}',
    'backend_config={"known_trip_count":{"n":"11"}}',
  )
  assert _times(text, "custom-call") == [(11, False)]


def test_a_loop_that_the_data_ends_is_marked():
  text = _loop().replace(
    "%limit = s32[]{:T(128)} constant(6)",
    "%limit = s32[]{:T(128)} get-tuple-element(%p), index=0",
  )
  assert _times(text, "custom-call", 4.0) == [(4.0, True)]


def test_instructions_after_a_kernel_of_several_lines_are_there():
  body = hlo.parse(_loop()).computations["body.clone"]
  assert [each.opcode for each in body][-2:] == ["custom-call", "tuple"]
  assert body[-1].root
  assert body[-1].operands() == ["next", "kernel"]


def test_attributes():
  program = hlo.parse(_loop())
  loop = program.find("main", "while.1")
  assert loop.attribute("body") == "%body.clone"
  assert loop.attribute("metadata") == '{op_name="w"}'
  assert loop.attribute("missing") is None


@pytest.mark.parametrize(
  ("shape", "plain", "padded"),
  [
    ("f32[]{:T(128)}", 4, 4),
    ("f32[256]{0:T(1024)}", 1024, 4096),
    ("f32[2,96]{1,0:T(2,128)}", 768, 1024),
    ("bf16[1,3,200]{2,1,0:T(8,128)(2,1)}", 1200, 8 * 256 * 2),
    # The layout's minor dimension is not the last one.
    ("f32[5,130]{0,1:T(8,128)}", 2600, 136 * 128 * 4),
    ("pred[7]{0:T(512)}", 7, 512),
    ("f32[3,5]{1,0}", 60, 60),
    ("s4[10]{0:T(128)}", 5, 64),
    ("f8e4m3fn[16]{0}", 16, 16),
  ],
)
def test_bytes(shape, plain, padded):
  (array,) = hlo.Instruction("x", shape, "parameter", "0)", False).arrays()
  assert (array.bytes, array.padded_bytes) == (plain, padded)


def test_an_unknown_dtype_is_said():
  (array,) = hlo.Instruction("x", "odd[3]{0}", "add", "", False).arrays()
  with pytest.raises(ValueError, match="'odd'"):
    _ = array.bytes


def test_text_without_an_entry_is_refused():
  with pytest.raises(ValueError, match="no ENTRY"):
    hlo.parse("HloModule empty\n")
