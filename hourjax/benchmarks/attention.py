"""How near attention comes to the limits of a chip.

For a TPU the real compiler runs, without a TPU, for the shape of a training
row; its schedule and the memory that it allots are read. Everything is
compiled in worker processes. Where there is an accelerator, attention is timed
on it as well.
"""

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from hourjax.benchmarks import attention_causal, schedule
from hourjax.benchmarks.attention_compile import (
  SPLASH_BLOCK,
  Compiled,
  Job,
  check_topology,
  compile_attention,
  mib,
)
from hourjax.benchmarks.attention_packed import (
  FRAME,
  Call,
  packed_figures,
  packed_row,
)
from hourjax.benchmarks.attention_tune import tune
from hourjax.errors import UserError
from hourjax.kernels.attention import attention
from hourjax.kernels.tpu.tiles import AttentionTiles
from hourjax.models.config import SIZES
from hourjax.parallel.chips import CHIPS, attention_tiles
from hourjax.parallel.gpus import peak_flops
from hourjax.planning.compiler.compile_pool import run_all

# Dense bf16 operations a second of a GPU, by its maker's data sheet, by a part
# of its `device_kind`.
_REPEATS = 5


def measure(
  heads: int, kv_heads: int, dim: int, queries: int, keys: int
) -> dict[str, Any]:
  """Returns figures of the default device, or why there are none.

  Args:
    heads: query heads.
    kv_heads: key and value heads.
    dim: width of a head.
    queries: queries of the row.
    keys: memory tokens of the row.

  Returns:
    On a TPU or GPU its name and, as `ours`, what `measure_here` returns; else
    `missing`, the reason.
  """
  if jax.default_backend() not in ("tpu", "gpu"):
    return {"missing": "no accelerator: this process runs on the CPU"}
  ours = measure_here(heads, kv_heads, dim, queries, keys)
  return {"device": jax.devices()[0].device_kind, "ours": ours}


def measure_here(
  heads: int,
  kv_heads: int,
  dim: int,
  queries: int,
  keys: int,
  *,
  causal: bool = False,
  implementation: str | None = None,
) -> dict[str, Any]:
  """Times the public attention call on the default device, whatever it is.

  Args:
    heads: query heads.
    kv_heads: key and value heads.
    dim: width of a head.
    queries: queries of the row.
    keys: memory tokens of the row.
    causal: whether a query reads only the keys up to its own place.
    implementation: of the call; None takes that of the platform.

  Returns:
    What `rates` returns.
  """
  key = jax.random.split(jax.random.key(0), 4)
  q_shape, k_shape = (1, queries, heads, dim), (1, keys, kv_heads, dim)
  q, d_out, k, v = (
    jax.random.normal(one, shape, jnp.bfloat16)
    for one, shape in zip(key, (q_shape, q_shape, k_shape, k_shape))
  )
  segments = (jnp.ones((1, n), jnp.int32) for n in (queries, keys))
  arrays = (q, k, v, *segments)
  call = functools.partial(
    attention,
    causal=causal,
    implementation=implementation,
    tiles=attention_tiles(jnp.bfloat16),
  )
  forward = jax.jit(lambda *arrays: jax.vjp(call, *arrays))
  backward = jax.jit(lambda pull, d_out: pull(d_out)[:3])
  _, pull = forward(*arrays)
  seconds = (
    median(lambda: jax.block_until_ready(forward(*arrays)[0])),
    median(lambda: jax.block_until_ready(backward(pull, d_out))),
  )
  product = 2.0 * dim * heads * queries * keys / (2 if causal else 1)
  return rates(product, peak(jax.devices()[0].device_kind), *seconds)


def peak(device_kind: str) -> float | None:
  """Returns the TFLOP/s that a device could reach, if it is known."""
  flops = peak_flops(device_kind)
  return flops and flops / 1e12


def median(call: Callable[[], Any]) -> float:
  """Returns the median seconds of five calls after a first one."""
  call()
  seconds = []
  for _ in range(_REPEATS):
    began = time.perf_counter()
    call()
    seconds.append(time.perf_counter() - began)
  return statistics.median(seconds)


def rates(
  product: float, peak: float | None, forward: float, backward: float
) -> dict[str, Any]:
  """Returns the figures that follow from measured seconds.

  Args:
    product: operations of one T x S product of all heads, of which the forward
      pass has 2 and the backward pass 5.
    peak: TFLOP/s that the device could reach, or None.
    forward: seconds of the forward pass.
    backward: seconds of the backward pass.

  Returns:
    For each, and for both together, seconds, TFLOP/s and the share of the peak.
  """
  figures = {}
  for name, products, took in (
    ("forward", 2, forward),
    ("backward", 5, backward),
    ("forward_and_backward", 7, forward + backward),
  ):
    speed = products * product / took / 1e12
    figures[name] = {
      "seconds": round(took, 5),
      "tflop_per_second": round(speed, 1),
      "share_of_peak": round(speed / peak, 3) if peak else None,
    }
  return figures


_DAY = 24 * 3600 * FRAME  # memory tokens of a video of a day
_SPLASH_KERNELS = (
  "splash_mha_fwd\\w*",
  "splash_mha_dq\\w*",
  "splash_mha_dkv\\w*",
)


@dataclasses.dataclass(frozen=True)
class Options:
  """Says what is measured.

  Attributes:
    topology: what to compile for: a generation and its chips.
    model: "3b" or "7b", whose heads and head dim are taken.
    queries: MemAug queries of the row.
    keys: memory tokens of the row; the default holds an hour of video.
    tune: whether to look for the best tiles instead.
  """

  topology: str = "v5p:2x2x1"
  model: str = "3b"
  queries: int = 9_728
  keys: int = 235_520
  tune: bool = False

  @property
  def generation(self) -> str:
    """Returns the name of the generation, such as "v5p"."""
    return self.topology.partition(":")[0]

  @property
  def tiles(self) -> AttentionTiles:
    """Returns the kernels' tiles for bfloat16."""
    return CHIPS[self.generation].attention_tiles(jnp.bfloat16)

  def job(self, what: str, **changes: Any) -> Job:
    """Returns a job of this shape on one device of the topology.

    Args:
      what: see `Job`.
      **changes: other fields of the job that differ.
    """
    sizes = SIZES[self.model].decoder
    job = Job(
      what,
      self.topology,
      1,
      sizes.heads,
      sizes.kv_heads,
      sizes.head_size,
      self.queries,
      self.keys,
    )
    return job._replace(**changes)

  def check(self) -> None:
    """Checks the options.

    Raises:
      UserError: a topology or a model does not exist, or a size is below 1.
    """
    check_topology(self.topology)
    models = [name for name in SIZES if name != "tiny"]
    if self.model not in models:
      raise UserError(f"--model={self.model}: known are {', '.join(models)}")
    for name in ("queries", "keys"):
      if getattr(self, name) < 1:
        raise UserError(f"--{name}={getattr(self, name)}: give at least 1")


def measure_attention(options: Options) -> dict[str, Any]:
  """Returns all figures as plain data, or with `tune` those of the tiles.

  Shares are of the bf16 peak of one core. The kernel computes one block, which
  is a query tile and a key tile, after the other. `share_of_peak` is the share
  of the branch that a block takes if all its keys are of one segment;
  `share_with_overhead` adds what every block runs besides, but not what
  begins and ends an output tile.

  Raises:
    UserError: for an unknown topology or model, or one that the compiler
      refuses.
  """
  options.check()
  if options.tune:
    return tune(options.job("forward"), options.tiles)
  pod = CHIPS[options.generation].bench
  sharded = functools.partial(options.job, "sharded", devices=8)
  day = -(-_DAY // (64 * 2048)) * 64 * 2048
  # Name -> the job and the kernels whose schedule is read.
  steps: dict[str, tuple[Job, *tuple[str, ...]]] = {
    "forward": (options.job("forward"), "attention_forward"),
    "backward": (options.job("backward"), "attention_backward"),
    "splash": (options.job("splash"), *_SPLASH_KERNELS),
    "splash_backward": (options.job("splash_backward"), *_SPLASH_KERNELS),
    "splash_fused": (
      options.job("splash_backward", fused=True),
      *_SPLASH_KERNELS,
    ),
    "xla": (options.job("xla"),),
    "xla_backward": (options.job("xla_backward"),),
    "day": (options.job("sharded", topology=pod.of_64, devices=64, keys=day),),
    "s": (sharded(topology=pod.of_8),),
    "2s": (sharded(topology=pod.of_8, keys=2 * options.keys),),
  }
  calls = {
    name: functools.partial(compile_attention, job, *kernels)
    for name, (job, *kernels) in steps.items()
  } | attention_causal.calls(options.job("forward"))
  return collect_figures(options, run_all("attention", calls))


def collect_figures(
  options: Options, compiled: dict[str, Compiled]
) -> dict[str, Any]:
  """Returns the figures of `measure_attention` from compiled programs.

  Args:
    options: what is measured.
    compiled: the programs by the names that `measure_attention` gives them.

  Raises:
    UserError: the compiler's schedule has another layout than the one known.
  """
  job, generation = options.job("forward"), options.generation
  try:
    regions = {
      "forward": schedule.forward_regions(
        _kernel(compiled["forward"], "attention_forward")
      ),
      "backward": schedule.backward_regions(
        _kernel(compiled["backward"], "attention_backward")
      ),
    }
  except ValueError as error:
    raise UserError(
      f"--queries={options.queries} --keys={options.keys}: {error}; the"
      " schedule of a row of a few tiles may differ, give more keys"
    ) from error
  row = packed_row(options.queries, options.keys)
  heads = job.heads, job.kv_heads, job.dim
  calls = {
    name: Call(found, generation, options.tiles, *heads)
    for name, found in regions.items()
  }
  return {
    "topology": options.topology,
    "model": options.model,
    "shape": {
      name: getattr(job, name)
      for name in ("queries", "keys", "heads", "kv_heads", "dim")
    },
    **{
      name: kernel_figures(call, compiled[name], options)
      for name, call in calls.items()
    },
    "packed_row": {
      "videos": row.videos,
      "keys_of_each": row.keys,
      "queries_of_each": row.queries,
      **{name: packed_figures(call, row) for name, call in calls.items()},
    },
    "splash": {
      "forward": _splash(compiled["splash"], ("fwd",), 4, job),
      "backward": _splash(compiled["splash_backward"], ("dq", "dkv"), 10, job),
      "backward_fused": _splash(compiled["splash_fused"], ("dkv",), 10, job),
    },
    "xla": {
      "forward": compiled["xla"].memory(),
      "backward": compiled["xla_backward"].memory(),
    },
    "causal": attention_causal.figures(job, options.tiles, compiled),
    "day_long": _day(compiled["day"], generation),
    "sharded_traffic_mib": {
      name: _sent(compiled[name]) for name in ("s", "2s")
    },
    "measured": measure(*heads, options.queries, options.keys),
  }


def kernel_figures(
  call: Call, compiled: Compiled, options: Options
) -> dict[str, Any]:
  """Returns the shares of peak of one of our kernels, and its memory.

  Args:
    call: the kernel with the pieces of its schedule.
    compiled: the program in which it stands.
    options: what is measured.
  """
  _, shape = call.cut(options.queries, options.keys)
  chip = call.generation
  flops = (10 if call.by_key else 4) * call.dim * shape.rows * shape.keys
  overhead = schedule.overhead_share(flops, call.regions, chip)
  return {
    **schedule.region_figures(flops, call.regions.whole, chip),
    "share_with_overhead": round(overhead, 3),
    "tiles": {
      name: getattr(shape, name) for name in ("rows", "keys", "chunk", "unit")
    },
    **compiled.memory(),
    "vmem_limit_mib": mib(call.tiles.vmem),
    "compile_seconds": compiled.figures and compiled.figures["seconds"],
  }


def _kernel(compiled: Compiled, name: str) -> list[schedule.Piece]:
  """Returns the pieces of a kernel of this name.

  Raises:
    ValueError: it was not compiled.
  """
  found = compiled.kernels[name]
  if not found:
    raise ValueError(f"{name} was not compiled: {compiled.missing}")
  return found[0]


def _splash(
  compiled: Compiled, names: tuple[str, ...], products: int, job: Job
) -> dict[str, Any]:
  """Returns figures of splash's kernels of these names, taken together.

  The pieces with products are taken to be those for one block of queries
  and one block of keys.

  Args:
    compiled: the program.
    names: the kernels among which the work is divided.
    products: useful operations by pair of query and key and by dim.
    job: what was compiled.
  """
  kernels = [compiled.kernels[f"splash_mha_{name}\\w*"] for name in names]
  memory = compiled.memory()
  if not all(kernels):
    return memory
  hot = [piece for found in kernels for piece in found[0] if piece.rows]
  flops = products * job.dim * SPLASH_BLOCK**2
  return schedule.region_figures(flops, hot, job.generation) | memory


def _day(compiled: Compiled, generation: str) -> dict[str, Any]:
  """Returns what each of 64 devices holds of a day of video with gradients."""
  found = compiled.figures
  if found is None:
    return compiled.memory()
  arrays = {
    f"{name}_mib": mib(found[name])
    for name in ("arguments", "outputs", "temporaries")
  }
  held = found["arguments"] + found["temporaries"]
  limit = CHIPS[generation].limit
  return {
    "devices": 64,
    "topology": CHIPS[generation].bench.of_64,
    **arrays,
    "arguments_and_temporaries_mib": mib(held),
    "hbm_limit_mib": round(limit / (1 << 20)),
    "share_of_hbm": round(held / limit, 4),
    "collectives_mib": _sent(compiled),
  }


def _sent(compiled: Compiled) -> float | str:
  """Returns MiB of collectives of a device, or why they are not known."""
  if compiled.figures is None:
    return compiled.missing
  return mib(sum(compiled.figures["collectives"].values()))
