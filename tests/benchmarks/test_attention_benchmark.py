"""The figures of attention, at small shapes and through a real process."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from hourjax.benchmarks import attention, attention_compile
from hourjax.benchmarks.attention import Options
from hourjax.benchmarks.attention_compile import (
  Job,
  collective_bytes,
  compile_attention,
)
from hourjax.benchmarks.attention_packed import (
  Row,
  count_blocks,
  packed_row,
)
from hourjax.errors import UserError
from hourjax.kernels.tpu.tiles import Tiles, cut
from hourjax.planning.compiler import hlo
from hourjax.planning.compiler.compile_pool import Outcome
from hourjax.planning.compiler.traffic import Layout

ROOT = Path(__file__).parents[2]
SMALL = ("--queries=640", "--keys=12480")


def _run(*arguments, timeout=60):
  return subprocess.run(
    [sys.executable, "-m", "hourjax.bench", "attention", *arguments],
    cwd=ROOT,
    capture_output=True,
    text=True,
    timeout=timeout,
  )


def test_collectives_of_a_snippet():
  text = """ENTRY %main (x: f32[2,8]) -> f32[3] {
  %a = f32[2,8]{1,0} all-reduce(%x), to_apply=%add
  %b = (f32[4]{0}, bf16[2]{0}) all-reduce-start(%y, %z), to_apply=%add
  %c = f32[4]{0} all-reduce-done(%b)
  %d = (bf16[1,4]{1,0}, bf16[8,4]{1,0}) all-gather-start(%w), dimensions={0}
  %e = f32[3]{0} add(%c, %c), metadata={op_name="all-reduce(x)"}
}
"""
  # A collective of several arrays counts under the dtype of the largest.
  assert collective_bytes(hlo.parse(text), Layout(("seq",), (8,))) == {
    "all-reduce f32": 64 + 16 + 4,
    "all-gather bf16": 64,
  }


@pytest.mark.slow
def test_only_sums_over_queries_are_sent():
  # That traffic does not grow with the memory: test_one_json_object.
  job = Job("sharded", "v5e:2x4", 8, 4, 2, 128, 128, 8 * 256)
  reduced = 128 * 4 * 128 * 4  # float32 [T, H, C]
  traffic = compile_attention(job).figures["collectives"]
  (name, sent), *others = traffic.items()
  assert name == "all-reduce f32" and not others
  # Output and dq; a maximum and a sum for each query and head.
  assert 2 * reduced <= sent <= 2.1 * reduced


def test_blocks_of_a_packed_row():
  # Queries 1 1 2 2 in tiles of one, and keys 1 1 | 1 2 | 2 2 | 0 0 in tiles of
  # two chunks: each query tile meets a whole key tile and the mixed one, in
  # which one chunk concerns it. Segment 2 is seen before its whole tile.
  row = Row(2, 256, 384, 512, 1024)
  tiles = Tiles(128, 256, 128, 128)
  shape = cut(tiles, queries=512, keys=1024, groups=1, dim=8)
  counts = count_blocks(row, shape, parts=1, by_key=False)
  expected = {"always": 8, "first": 4, "last": 4, "whole": 4, "new": 2}
  expected |= {"chunk": 8, "uniform": 4}
  assert counts == expected
  # Backward, key tile by key tile: the last one has a block that does nothing.
  counts = count_blocks(row, shape, parts=1, by_key=True)
  assert counts == expected | {"always": 9}


@pytest.mark.parametrize("by_key", [False, True])
def test_blocks_of_a_causal_row(by_key):
  # Four tiles of queries, two of keys with two chunks each; the first query
  # tile has its diagonal in chunk 0, the last one in chunk 3.
  row = Row(1, 512, 512, 512, 512)
  tiles = Tiles(128, 256, 128, 128)
  shape = cut(tiles, queries=512, keys=512, groups=1, dim=8)
  how = {"by_key": by_key, "causal": True}
  counts = count_blocks(row, shape, parts=1, **how)
  tiles = {"first": 2, "last": 2} if by_key else {"first": 4, "last": 4}
  assert counts == tiles | {
    "always": 6,
    "whole": 2,
    "new": 2,
    "chunk": 8,
    "uniform": 2,
    "diagonal": 4,
  }
  # In two parts of the queries. The second half of the keys is above all of
  # the first part: one block, which writes zeros, if keys are written.
  parts = count_blocks(row, shape._replace(query_tiles=2), parts=2, **how)
  assert parts == counts | {
    "always": 7 if by_key else 6,
    "first": 4,
    "last": 4,
  }


def test_six_videos_of_ten_minutes():
  row = packed_row(9_728, 235_520)
  assert (row.videos, row.queries, row.keys) == (6, 1_621, 39_000)
  query, key = row.segments()
  assert np.bincount(key).tolist() == [1_520, *[39_000] * 6]
  assert np.bincount(query).tolist() == [2, *[1_621] * 6]


def test_times_of_a_tiny_call():
  here = attention.measure_here(4, 2, 16, 8, 32)
  assert here["forward"]["seconds"] > 0
  assert here["forward_and_backward"]["tflop_per_second"] >= 0
  missing = attention.measure(4, 2, 16, 8, 32)
  assert missing == {"missing": "no accelerator: this process runs on the CPU"}


@pytest.mark.parametrize(
  "changes, message",
  [
    (
      {"topology": "v9:2x2"},
      "--topology=v9:2x2: 'v9' is no generation of TPU; known are v5e, v5p,"
      " v6e, tpu7x",
    ),
    ({"topology": "v5e"}, "--topology=v5e: give its chips, such as v5e:4x4"),
    ({"topology": "v5e:2by4"}, "--topology=v5e:2by4: give its chips"),
    ({"topology": "v5p:3x3x3"}, "--topology=v5p:3x3x3: there is no such slice"),
    ({"model": "70b"}, "--model=70b: known are 3b, 7b"),
    ({"keys": 0}, "--keys=0: give at least 1"),
  ],
)
def test_nonsense(changes, message):
  with pytest.raises(UserError, match=re.escape(message)):
    Options(**changes).check()


@pytest.mark.parametrize(
  "outcome, figures, missing",
  [
    (Outcome({"temporaries": 1}), {"temporaries": 1}, ""),
    (Outcome({"exhausted": "too much\nof it"}), None, "too much"),
    (Outcome(None, True, "not compiled within 240 s"), None,
     "not compiled within 240 s"),
  ],
)  # fmt: skip
def test_what_a_worker_answers(outcome, figures, missing, monkeypatch):
  monkeypatch.setattr(attention_compile, "run_worker", lambda *_, **__: outcome)
  found = compile_attention(Job("xla", "v5e:2x4", 1, 2, 1, 8, 8, 8))
  assert (found.figures, found.missing) == (figures, missing)


def test_a_crash_names_what_was_compiled(monkeypatch):
  crash = Outcome(None, False, "Check failed: x")
  monkeypatch.setattr(attention_compile, "run_worker", lambda *_, **__: crash)
  with pytest.raises(UserError, match=r"cannot compile xla .*: Check failed"):
    compile_attention(Job("xla", "v5e:2x4", 1, 2, 1, 8, 8, 8))


@pytest.mark.slow
def test_nonsense_in_a_process():
  done = _run("--model=70b")
  assert done.returncode == 2, done.stderr
  assert "error: --model=70b: known are 3b, 7b" in done.stderr
  assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_one_json_object():
  done = _run("--topology=v5e:2x4", "--json", *SMALL, timeout=300)
  assert done.returncode == 0, done.stderr
  figures = json.loads(done.stdout)
  for name in ("forward", "backward"):
    kernel, packed = figures[name], figures["packed_row"][name]
    assert 0.1 < kernel["share_with_overhead"] < kernel["share_of_peak"] <= 1
    cycles = kernel["schedule_cycles"], kernel["matrix_unit_cycles"]
    assert kernel["limit"] == ("schedule", "matrix unit")[np.argmax(cycles)]
    assert kernel["hbm_temporaries_mib"] > 0
    assert packed.get("ratio_to_sum_of_parts", 1) < 3
    assert 0 < figures["splash"][name]["share_of_peak"] <= 1
    ours, packed, part, splash = (
      figures["causal"][heads][name][f"share_of_peak_{samples}_samples"]
      for heads, samples in (
        ("heads_16_2", 1),
        ("heads_16_2", 4),
        ("heads_4_1", 1),
        ("splash", 1),
      )
    )
    assert 0 < packed < ours < 1 and 0 < splash < part < 1
  traffic = figures["sharded_traffic_mib"]
  assert traffic["s"] == traffic["2s"] > 0
  assert 0 < figures["day_long"]["share_of_hbm"] < 0.1
  assert figures["measured"]["missing"].startswith("no accelerator")
