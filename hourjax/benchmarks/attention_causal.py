"""The decoder's causal attention, beside that of jax's splash attention.

One row of the decoder is compiled: with all heads, as on a device that has
whole rows, and with a fourth of them, as after the all-to-all of four devices
(`kernels.ulysses`). The cycles of a row are those of all its blocks, by the
block schedule that the kernels make for it.
"""

import functools
from typing import Any

from hourjax.benchmarks import schedule
from hourjax.benchmarks.attention_compile import SPLASH_BLOCK, Compiled, Job
from hourjax.benchmarks.attention_packed import (
  Call,
  Row,
  block_cycles,
  count_blocks,
)
from hourjax.kernels.tpu.tiles import AttentionTiles
from hourjax.kernels.ulysses import head_blocks

# Positions of a row of the decoder, and of the samples that fill it.
_LENGTH, _SAMPLES = 16_640, (1, 4)
_DEVICES = 4  # among which the heads are divided by the all-to-all
_PRODUCTS = {"forward": 4, "backward": 10}  # operations by pair and dim
_READ = {
  "forward": schedule.CausalForward,
  "backward": schedule.CausalBackward,
}
_SPLASH = {"forward": ("fwd",), "backward": ("dq", "dkv")}


def steps(job: Job) -> dict[str, tuple[Job, *tuple[str, ...]]]:
  """Returns what is compiled.

  Args:
    job: its topology and heads count.

  Returns:
    By name, the job and patterns of the kernels whose schedule is read.
  """
  whole = job._replace(queries=_LENGTH, keys=_LENGTH, causal=True)
  blocks = head_blocks(job.heads, job.kv_heads, _DEVICES)
  part = whole._replace(
    heads=job.heads // blocks, kv_heads=max(1, job.kv_heads // blocks)
  )
  found: dict[str, tuple[Job, *tuple[str, ...]]] = {
    "causal_splash": (
      whole._replace(what="splash_backward"),
      *(
        f"splash_mha_{name}\\w*" for names in _SPLASH.values() for name in names
      ),
    )
  }
  for heads, one in (("all", whole), ("part", part)):
    for what in _PRODUCTS:
      kernel = f"attention_{what}_causal"
      found[f"causal_{what}_{heads}"] = one._replace(what=what), kernel
  return found


def figures(
  job: Job, tiles: AttentionTiles, compiled: dict[str, Compiled]
) -> dict[str, Any]:
  """Returns shares of the bf16 peak, counting half of all pairs as work.

  Args:
    job: as for `steps`.
    tiles: of the generation.
    compiled: the programs by the names that `steps` gives them.

  Raises:
    ValueError: the compiler has laid a kernel out in another way than the one
      known.
  """
  jobs = steps(job)
  found: dict[str, Any] = {"positions": _LENGTH}
  for heads in ("all", "part"):
    one = jobs[f"causal_forward_{heads}"][0]
    found[f"heads_{one.heads}_{one.kv_heads}"] = {
      what: _ours(one, what, tiles, compiled[f"causal_{what}_{heads}"])
      for what in _PRODUCTS
    }
  splash = functools.partial(_splash, job, compiled["causal_splash"])
  found["splash"] = {what: splash(what) for what in _PRODUCTS}
  return found


def _ours(
  job: Job, what: str, tiles: AttentionTiles, compiled: Compiled
) -> dict[str, Any]:
  """Returns the shares of one of our kernels, by samples that fill the row."""
  kernels = compiled.kernels[f"attention_{what}_causal"]
  if not kernels:
    return compiled.memory()
  regions = schedule.causal_regions(kernels[0], _READ[what])
  heads = job.heads, job.kv_heads, job.dim
  call = Call(regions, job.generation, tiles, *heads)
  parts, shape = call.cut(_LENGTH, _LENGTH)
  found = {}
  for samples in _SAMPLES:
    each = _LENGTH // samples
    row = Row(samples, each, each, _LENGTH, _LENGTH)
    counts = count_blocks(
      row, shape, parts=parts, by_key=call.by_key, causal=True
    )
    cycles = block_cycles(counts, regions, job.generation) * job.kv_heads
    flops = _PRODUCTS[what] * job.dim * job.heads * samples * each**2 / 2
    share = schedule.share_of_peak(flops, cycles, job.generation)
    found[f"share_of_peak_{samples}_samples"] = round(share, 3)
  return found | compiled.memory()


def _splash(job: Job, compiled: Compiled, what: str) -> dict[str, Any]:
  """Returns splash's share for a row of one sample.

  Only the pieces with products count, and only of blocks that reach below the
  diagonal: what splash takes is more.
  """
  kernels = [
    compiled.kernels[f"splash_mha_{name}\\w*"] for name in _SPLASH[what]
  ]
  if not all(kernels):
    return compiled.memory()
  hot = [piece for found in kernels for piece in found[0] if piece.rows]
  blocks = -(-_LENGTH // SPLASH_BLOCK)
  cycles = schedule.total(hot, job.generation) * blocks * (blocks + 1) // 2
  flops = _PRODUCTS[what] * job.dim * _LENGTH**2 / 2
  share = schedule.share_of_peak(flops, cycles, job.generation)
  return {"share_of_peak_1_samples": round(share, 3), **compiled.memory()}
