"""Bundles are read right: from a snippet, and from a kernel just compiled."""

import pytest

from hourjax.benchmarks import schedule
from hourjax.benchmarks.attention_compile import Job, compile_attention
from hourjax.parallel.chips import CHIPS

# A grid with one guarded body: 0, 1 | 2, 3, 4 (branch; one bundle later it
# takes effect) | 5, 6 | 7 after the loop.
SNIPPET = """
     0   :  { %s1 = smov 4 }
   0x1   :  { %2 = sbr.rel (%p1) target = $region9 }
   0x2 LB: > { %s4 = sphi 0 } /* Start region 3 */
   0x3   : > { %5 = sbr.rel (%p2) target = $region4 }
   0x4   : > { %6 = vmatmul.bf16.mxu0 %v1 ;; %7 = vmatmul.lmr.bf16.16.mxu1 }
   0x5 PF: > { %8 = vmatmul.f32.gmra.mrb[4].mxu0 %v1 ;; %9 = vpop.f32.mrf.mxu0 }
   0x6   : > { %10 = vmatpush1.bf16.msra.mxu1 %v3 }
   0x7 PF:  { %11 = sfree 1 }
"""


def test_pieces_of_a_snippet():
  found = schedule.pieces(SNIPPET)
  assert [piece.start for piece in found] == [0, 2, 4, 5, 7]
  assert [piece.cycles for piece in found] == [2, 2, 1, 2, 1]
  assert [piece.depth for piece in found] == [0, 1, 1, 1, 0]
  assert [piece.labelled for piece in found] == [True, True, False, True, True]
  rows = [piece.rows for piece in found]
  assert rows == [{}, {}, {"mxu0": 16, "mxu1": 8}, {"mxu0": 8}, {}]
  # A row a cycle, two on v6e; never less than what is issued.
  assert found[2].cost("v5e") == 16 and found[2].cost("v6e") == 8
  assert found[4].cost("v5e") == 1


def test_an_impossible_share_is_an_error():
  flops = CHIPS["v5e"].flops_per_cycle * 100
  assert schedule.share_of_peak(flops, 100, "v5e") == 1
  with pytest.raises(ValueError, match=r"101.0% of what a core of v5e"):
    schedule.share_of_peak(flops * 1.01, 100, "v5e")


def test_another_layout_is_an_error():
  with pytest.raises(ValueError, match=r"expected 2 pieces .* depths \[1, 1\]"):
    schedule.forward_regions(schedule.pieces(SNIPPET))


@pytest.mark.slow
@pytest.mark.parametrize(
  "what, kind",
  [
    ("forward", schedule.CausalForward),
    ("backward", schedule.CausalBackward),
  ],
)
def test_a_real_causal_kernel(what, kind):
  """Every mask costs something, and pipelining a whole block gains."""
  job = Job(what, "v6e:2x4", 1, 2, 1, 128, 1024, 1024, causal=True)
  job = job._replace(tiles=(256, 512, 256, 256))
  compiled = compile_attention(job, f"attention_{what}_causal")
  (kernel,) = compiled.kernels.values()
  regions = schedule.causal_regions(kernel[0], kind)
  whole, uniform, diagonal, mixed = (
    schedule.total(getattr(regions, name), "v6e")
    for name in ("whole", "uniform", "diagonal", "mixed")
  )
  assert whole / 2 < uniform < diagonal < mixed
  products = {"forward": 4, "backward": 10}[what]
  flops = products * 128 * 256 * 512
  assert 0.1 < schedule.share_of_peak(flops, whole, "v6e") < 1


@pytest.mark.slow
@pytest.mark.parametrize("chip, rows", [("v5e", 128), ("v6e", 256)])
def test_a_real_kernel(chip, rows):
  job = Job("forward", f"{chip}:2x4", 1, 2, 1, 128, 128, 1024)
  job = job._replace(tiles=(256, 512, 256, 256))
  (kernel,) = compile_attention(job, "attention_forward").kernels.values()
  regions = schedule.forward_regions(kernel[0])
  (whole,), (mixed,) = regions.whole, regions.mixed
  assert whole.depth == 1 and mixed.depth == 2
  # Two products of 256 rows and 512 keys of dim 128 on all units. On v6e the
  # first one fills half a unit: its contraction is over 128.
  units = {"v5e": 4, "v6e": 2}[chip]
  flops = 2 * 2 * 128 * 256 * 512
  waste = {"v5e": 1, "v6e": 1.5}[chip]
  sent = {
    f"mxu{n}": flops * waste / (2 * units * rows**2) for n in range(units)
  }
  assert whole.rows == sent
  found = schedule.region_figures(flops, regions.whole, chip)
  assert 0.1 < found["share_of_peak"] <= 1
  with_overhead = schedule.overhead_share(flops, regions, chip)
  assert 0.05 < with_overhead < found["share_of_peak"]
  # All pieces of the grid's body have one name.
  named = [piece for part in regions for piece in part]
  inside = [piece for piece in kernel[0] if piece.depth]
  assert sorted(named) == sorted(inside)
