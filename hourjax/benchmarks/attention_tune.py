"""Tiles for the TPU kernels: candidates are compiled and ranked."""

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp

from hourjax.benchmarks import schedule
from hourjax.benchmarks.attention_compile import (
  Compiled,
  Job,
  compile_attention,
)
from hourjax.errors import UserError
from hourjax.kernels.tpu import call
from hourjax.kernels.tpu.tiles import AttentionTiles, Shape, Tiles, cut
from hourjax.planning.compiler.compile_pool import run_all

_ROWS, _KEYS = (512, 1024, 2048), (512, 1024, 2048, 4096)
_CHUNKS, _UNITS = (256, 512, 1024), (256, 512, 1024)
# Scores of a block: with fewer its overhead shows, with more the unrolled
# branch takes minutes to compile. Scores of a unit: with fewer the units wait
# for each other, with more they spill from registers.
_SCORES = {"forward": (1 << 20, 1 << 22), "backward": (1 << 20, 1 << 21)}
_OF_UNIT = (1 << 17, 1 << 19)
_PRODUCTS = {"forward": 4, "backward": 10}  # operations by pair and dim
# Tiles of what is compiled: so many that the arrays stay in HBM and loops over
# tiles are not unrolled; more would not change the schedule.
_QUERY_TILES, _KEY_TILES = 32, 64


def tune(job: Job, limits: AttentionTiles) -> dict[str, Any]:
  """Compiles candidates of tiles and ranks them by their share of the peak.

  The share is `schedule.overhead_share` at the job's shape.

  Args:
    job: its sizes and its topology count.
    limits: its VMEM is the limit.

  Returns:
    For each kernel the candidates, best first, with the share of peak of a
    block; those that the compiler refuses with its reason. `line`: what to
    write for bfloat16 into `parallel.chips.CHIPS`.
  """
  calls = {
    (what, tiles): functools.partial(_compile, job, what, tiles)
    for what in ("forward", "backward")
    for tiles in candidates(job, limits, what)
  }
  compiled = run_all("tune", calls)
  figures, best = {}, {}
  for what in ("forward", "backward"):
    ranked: list[dict[str, Any]] = [
      {"tiles": tiles._asdict(), **_figures(job, what, tiles, found)}
      for (kernel, tiles), found in compiled.items()
      if kernel == what
    ]
    ranked.sort(key=lambda one: -one.get("share_with_overhead", 0))
    figures[what] = {
      f"{place:02}": candidate for place, candidate in enumerate(ranked, 1)
    }
    best[what] = Tiles(**ranked[0]["tiles"])
  return figures | {
    "line": f'"bfloat16": ({best["forward"]}, {best["backward"]}),'
  }


def candidates(job: Job, limits: AttentionTiles, what: str) -> list[Tiles]:
  """Returns tiles that fit VMEM, neither too small nor too large to compile.

  Tiles of one chunk are left out: the compiler makes no loop over one chunk,
  and so the pieces of the kernel could not be distinguished.

  Args:
    job: its sizes count.
    limits: its VMEM is the limit.
    what: "forward" or "backward".
  """
  least, most = _SCORES[what]
  found = []
  for tiles in itertools.starmap(
    Tiles, itertools.product(_ROWS, _KEYS, _CHUNKS, _UNITS)
  ):
    fits = tiles.unit <= tiles.rows and tiles.chunk < tiles.keys
    fits = fits and least <= tiles.rows * tiles.keys <= most
    fits = fits and _OF_UNIT[0] <= tiles.chunk * tiles.unit <= _OF_UNIT[1]
    if fits and vmem(job, limits, what, tiles) <= limits.vmem:
      found.append(tiles)
  return found


def vmem(job: Job, limits: AttentionTiles, what: str, tiles: Tiles) -> int:
  """Returns the bytes of VMEM that a kernel takes with these tiles.

  Args:
    job: its sizes count.
    limits: its VMEM is the limit.
    what: "forward" or "backward".
    tiles: the tiles of that kernel.
  """
  if what == "forward":
    return call.forward_vmem(_shape(job, tiles), 2)
  q, k = (
    jax.ShapeDtypeStruct((1, length, heads, job.dim), jnp.bfloat16)
    for length, heads in ((job.queries, job.heads), (job.keys, job.kv_heads))
  )
  parts, shape = call.split(limits._replace(backward=tiles), q, k)
  # A second sweep over the keys costs more than any tiles gain.
  return call.backward_vmem(shape, 2) if parts == 1 else limits.vmem + 1


def _shape(job: Job, tiles: Tiles) -> Shape:
  """Returns how tiles cut the job's arrays."""
  return cut(
    tiles,
    queries=job.queries,
    keys=job.keys,
    groups=job.heads // job.kv_heads,
    dim=job.dim,
  )


def _compile(job: Job, what: str, tiles: Tiles) -> Compiled | str:
  """Compiles a program of a few tiles; returns a refusal as text."""
  shape = _shape(job, tiles)
  small = job._replace(
    what=what,
    tiles=tuple(tiles),
    queries=min(job.queries, _QUERY_TILES * shape.queries),
    keys=min(job.keys, _KEY_TILES * shape.keys),
  )
  try:
    return compile_attention(small, f"attention_{what}")
  except UserError as error:
    return str(error)


def _figures(
  job: Job, what: str, tiles: Tiles, compiled: Compiled | str
) -> dict[str, Any]:
  """Returns the figures of one candidate, or why there are none."""
  if isinstance(compiled, str):
    return {"refused": compiled}
  kernels = compiled.kernels[f"attention_{what}"]
  if not kernels:
    return {"refused": compiled.missing}
  shape = _shape(job, tiles)
  flops = _PRODUCTS[what] * job.dim * shape.rows * shape.keys
  read = {
    "forward": schedule.forward_regions,
    "backward": schedule.backward_regions,
  }[what]
  try:
    regions = read(kernels[0])
  # The compiler has laid the kernel out in another way than the one known.
  except ValueError as error:
    return {"refused": str(error)}
  share = schedule.overhead_share(flops, regions, job.generation)
  return {
    "share_with_overhead": round(share, 4),
    **schedule.region_figures(flops, regions.whole, job.generation),
  }
