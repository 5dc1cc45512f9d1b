"""The decoder's causal attention, beside that of jax's splash attention.

One row of the decoder is compiled: with all heads, as on a device that has
whole rows, and with a fourth of them, as after the all-to-all of four devices
(`kernels.ulysses`). The cycles of a row are those of all its blocks, by the
block schedule that the kernels make for it.
"""

import functools
from collections.abc import Callable
from typing import Any

from hourjax.benchmarks import schedule
from hourjax.benchmarks.attention_compile import (
  SPLASH_BLOCK,
  Compiled,
  Job,
  compile_attention,
)
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


def calls(job: Job) -> dict[str, Callable[[], Compiled]]:
  """Returns what is compiled, by name.

  Args:
    job: its topology and heads count.
  """
  splash = _row(job)._replace(what="splash_backward")
  patterns = [_pattern(name) for names in _SPLASH.values() for name in names]
  found: dict[str, Callable[[], Compiled]] = {
    "causal_splash": functools.partial(compile_attention, splash, *patterns)
  }
  for name, row in _rows(job).items():
    for what in _PRODUCTS:
      one, kernel = row._replace(what=what), f"attention_{what}_causal"
      call = functools.partial(compile_attention, one, kernel)
      found[f"causal_{what}_{name}"] = call
  return found


def _row(job: Job) -> Job:
  """Returns a job for a row of the decoder, with all heads."""
  return job._replace(queries=_LENGTH, keys=_LENGTH, causal=True)


def _rows(job: Job) -> dict[str, Job]:
  """Returns jobs for rows by name: of all heads, and of one device's."""
  blocks = head_blocks(job.heads, job.kv_heads, _DEVICES)
  part = job._replace(
    heads=job.heads // blocks, kv_heads=max(1, job.kv_heads // blocks)
  )
  return {f"heads_{x.heads}_{x.kv_heads}": _row(x) for x in (job, part)}


def _pattern(name: str) -> str:
  """Returns a pattern for the names of one of splash's kernels."""
  return rf"splash_mha_{name}\w*"


def figures(
  job: Job, tiles: AttentionTiles, compiled: dict[str, Compiled]
) -> dict[str, Any]:
  """Returns shares of the bf16 peak, counting half of all pairs as work.

  Args:
    job: as for `calls`.
    tiles: of the generation.
    compiled: the programs by the names that `calls` gives them.

  Raises:
    ValueError: the compiler has laid a kernel out in another way than the one
      known.
  """
  found: dict[str, Any] = {"positions": _LENGTH}
  for name, row in _rows(job).items():
    found[name] = {
      what: _ours(row, what, tiles, compiled[f"causal_{what}_{name}"])
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
  kernels = [compiled.kernels[_pattern(name)] for name in _SPLASH[what]]
  if not all(kernels):
    return compiled.memory()
  hot = [piece for found in kernels for piece in found[0] if piece.rows]
  blocks = -(-_LENGTH // SPLASH_BLOCK)
  cycles = schedule.total(hot, job.generation) * blocks * (blocks + 1) // 2
  flops = _PRODUCTS[what] * job.dim * _LENGTH**2 / 2
  share = schedule.share_of_peak(flops, cycles, job.generation)
  return {"share_of_peak_1_samples": round(share, 3), **compiled.memory()}
