"""Compiles one attention call for a TPU, in a process of its own.

An impossible topology ends the process, and the compiler reads its flags when
it is loaded: so `attention_compile` starts this file, gives it a `Job` as JSON
on standard input, and it prints one line of JSON. No TPU is needed.
"""
# MERGED hourjax.benchmarks.attention_compile:
# Starts `attention_child` and reads what the compiler leaves behind.

import concurrent.futures
import functools
import json
import math
import pathlib
import re
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.experimental.pallas.ops.tpu import splash_attention as library
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from hourjax import progress
from hourjax.benchmarks import schedule
from hourjax.benchmarks.schedule import Piece
from hourjax.errors import UserError
from hourjax.kernels.attention import attention
from hourjax.kernels.sharded import Sharding
from hourjax.kernels.tpu import call as tpu
from hourjax.kernels.tpu.tiles import AttentionTiles, Tiles
from hourjax.parallel.chips import CHIPS
from hourjax.planning.compile_pool import REASON, ask_child

SPLASH_BLOCK = 1024  # of queries and of keys
_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s64": 8, "f64": 8}
_COLLECTIVE = re.compile(
  r"= (.+?) (all-reduce|all-gather|reduce-scatter|all-to-all"
  r"|collective-permute)(-start)?\("
)
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\]")


class Job(NamedTuple):
  """What to compile: one row of the batch, bfloat16.

  Attributes:
    what: "forward" or "backward" of our kernels, "splash" or
      "splash_backward", "xla" or "xla_backward", or "sharded": the public
      call with its gradient, the memory split over all devices.
    topology: of the compiler, such as "v5p:2x2x1".
    devices: of it to compile for.
    heads, kv_heads, dim, queries, keys: the call's sizes.
    tiles: `Tiles` for our kernels, or None for those of the chip.
    fused: whether splash computes dq with dk and dv.
  """

  what: str
  topology: str
  devices: int
  heads: int
  kv_heads: int
  dim: int
  queries: int
  keys: int
  tiles: tuple[int, ...] | None = None
  fused: bool = False

  @property
  def generation(self) -> str:
    return self.topology.partition(":")[0]


class Collective(NamedTuple):
  """One collective of a compiled program."""

  kind: str  # "all-reduce", "all-gather", ...
  dtype: str  # as XLA writes it: "f32"
  bytes: int  # of its result on one device


def collectives(hlo: str) -> list[Collective]:
  """All arrays that the program's collectives send, one entry an array."""
  found = []
  for result, kind, start in _COLLECTIVE.findall(hlo):
    arrays = _ARRAY.findall(result)
    if start and kind != "all-reduce":  # operands, results, and counters
      arrays = (
        arrays[len(arrays) // 2 :] if kind == "all-gather" else arrays[1:]
      )
      arrays = arrays[:1]
    for dtype, sizes in arrays:
      count = math.prod(int(n) for n in sizes.split(",") if n)
      found.append(Collective(kind, dtype, count * _BYTES.get(dtype, 4)))
  return found


def collective_bytes(hlo: str) -> int:
  """Bytes of the results of a compiled program's collectives, per device."""
  return sum(each.bytes for each in collectives(hlo))


def compile_job(job: Job) -> dict[str, Any]:
  """Compiles for the job's topology.

  Returns:
    Bytes of arguments, outputs and temporaries of one device, as the compiler
    allots them, seconds that compiling took, and bytes of collectives by kind
    and dtype.
  """
  layout = [int(n) for n in job.topology.partition(":")[2].split("x")]
  bounds = {}
  if math.prod(layout) < 4:  # less than the host that is assumed
    bounds["chips_per_host_bounds"] = (*layout, 1, 1)[:3]
  topology = topologies.get_topology_desc(
    platform="tpu", topology_name=job.topology, **bounds
  )
  mesh = Mesh(np.array(topology.devices[: job.devices]), ("seq",))
  function, arguments = _call(job, mesh)
  began = time.monotonic()
  compiled = jax.jit(function).lower(*arguments).compile()
  seconds = time.monotonic() - began
  memory = compiled.memory_analysis()
  sent = {}
  for each in collectives(compiled.as_text()) if job.devices > 1 else ():
    name = f"{each.kind} {each.dtype}"
    sent[name] = sent.get(name, 0) + each.bytes
  return {
    "arguments": memory.argument_size_in_bytes,
    "outputs": memory.output_size_in_bytes,
    "temporaries": memory.temp_size_in_bytes,
    "seconds": round(seconds, 1),
    "collectives": sent,
  }


def _call(job: Job, mesh: Mesh):
  """A function and the abstract arrays to call it with."""
  split = job.what == "sharded"

  def array(shape, dtype, spec):
    sharding = NamedSharding(mesh, spec if split else P())
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

  sharding = Sharding(mesh, memory="seq")
  specs = sharding.specs()
  q = array((1, job.queries, job.heads, job.dim), jnp.bfloat16, specs.q)
  k = array((1, job.keys, job.kv_heads, job.dim), jnp.bfloat16, specs.k)
  segments = (
    array((1, job.queries), jnp.int32, specs.query_segment),
    array((1, job.keys), jnp.int32, specs.key_segment),
  )
  arguments = (q, k, k, *segments)
  if split:
    call = functools.partial(attention, sharding=sharding, tiles=_tiles(job))
    return gradients(call), (*arguments, q)
  numbers = array(q.shape[:3], jnp.float32, specs.q)
  function, more = {
    "forward": (_forward(job), ()),
    "backward": (_backward(job), (numbers, numbers, q)),
    "splash": (functools.partial(splash, job.fused), ()),
    "splash_backward": (gradients(functools.partial(splash, job.fused)), (q,)),
    "xla": (xla, ()),
    "xla_backward": (gradients(xla), (q,)),
  }[job.what]
  local = jax.shard_map(
    function, mesh=mesh, in_specs=P(), out_specs=P(), check_vma=False
  )
  return local, (*arguments, *more)


def _tiles(job: Job) -> AttentionTiles:
  """Returns the generation's tiles, or the job's for its kernel."""
  tiles = CHIPS[job.generation].attention_tiles(jnp.bfloat16)
  if job.tiles is None:
    return tiles
  return tiles._replace(**{job.what: Tiles(*job.tiles)})


def _forward(job: Job):
  return functools.partial(
    tpu.forward, out_dtype=jnp.bfloat16, tiles=_tiles(job)
  )


def _backward(job: Job):
  return functools.partial(tpu.backward, tiles=_tiles(job))


def gradients(call):
  """The vector-Jacobian product of an attention call, as a function."""

  def function(q, k, v, query_segment, key_segment, d_out):
    _, pull = jax.vjp(
      lambda *inputs: call(*inputs, query_segment, key_segment), q, k, v
    )
    return pull(d_out)

  return function


def splash(fused, q, k, v, query_segment, key_segment):
  """jax's splash attention between all queries and keys of a segment."""
  block = SPLASH_BLOCK
  q_, k_, v_ = (_blocks(x, block).swapaxes(1, 2) for x in (q, k, v))
  mask = library.FullMask((q_.shape[2], k_.shape[2]))
  dq = {} if fused else {"block_q_dq": block, "block_kv_dq": block}
  call = library.make_splash_mha(
    library.MultiHeadMask([mask] * q.shape[2]),
    block_sizes=library.BlockSizes(
      block_q=block,
      block_kv=block,
      block_kv_compute=block,
      block_q_dkv=block,
      block_kv_dkv=block,
      block_kv_dkv_compute=block,
      use_fused_bwd_kernel=fused,
      **dq,
    ),
    head_shards=1,
    q_seq_shards=1,
  )
  ids = library.SegmentIds(
    _blocks(query_segment, block), _blocks(key_segment, block)
  )
  out = jax.vmap(call)(q_, k_, v_, ids)
  return out.swapaxes(1, 2)[:, : q.shape[1]]


def xla(q, k, v, query_segment, key_segment):
  """Attention as XLA computes it, with a T x S matrix."""
  same = query_segment[:, :, None] == key_segment[:, None]
  return jax.nn.dot_product_attention(q, k, v, mask=same[:, None])


def _blocks(x, block):
  """x with zeros up to whole blocks along axis 1."""
  widths = [(0, 0)] * x.ndim
  widths[1] = (0, -x.shape[1] % block)
  return jnp.pad(x, widths)


def answer(text: str) -> str:
  """The answer to a job in JSON, in JSON: figures, or what ran out."""
  try:
    return json.dumps(compile_job(Job(**json.loads(text))))
  except jax.errors.JaxRuntimeError as error:
    if "RESOURCE_EXHAUSTED" not in str(error):
      raise
    return json.dumps({"exhausted": str(error)})


if __name__ == "__main__":
  print(answer(sys.stdin.read()))


_LAYOUT = re.compile(r"\d+(x\d+){1,2}")
_AT_ONCE = 2  # programs that are compiled
_LIMIT = 240  # seconds for one program


class Compiled(NamedTuple):
  """What is known of a compiled program.

  Attributes:
    figures: of `attention_child.compile_job`; None if it was not compiled.
    missing: the reason then, in short.
    kernels: pieces of the kernels that were asked for, by pattern.
  """

  figures: dict[str, Any] | None
  missing: str
  kernels: dict[str, list[list[Piece]]]

  def memory(self) -> dict[str, Any]:
    """MiB of temporaries in HBM, or why there is no such number."""
    if self.figures is None:
      return {"not_compiled": self.missing}
    return {"hbm_temporaries_mib": mib(self.figures["temporaries"])}


def mib(size: float) -> float:
  """Bytes in MiB."""
  return round(size / (1 << 20), 1)


def check_topology(name: str) -> None:
  """Raises UserError for a topology that no compiler knows."""
  generation, _, layout = name.partition(":")
  known = [name for name, chip in CHIPS.items() if chip.knows("bench")]
  if generation not in known:
    raise UserError(
      f"--topology={name}: {generation!r} is no generation of TPU; known are"
      f" {', '.join(known)}"
    )
  if not _LAYOUT.fullmatch(layout):
    raise UserError(
      f"--topology={name}: give its chips, such as {generation}:2x4"
    )


def compile_in_child(job: Job, *kernels: str) -> Compiled:
  """Compiles in a process of its own.

  Args:
    job: what to compile.
    *kernels: patterns of the kernels whose schedule is read. It is there as
      soon as a kernel is compiled, even if the rest of the program takes
      longer than `_LIMIT`.

  Raises:
    UserError: if the compiler refuses for another reason than memory.
  """
  with tempfile.TemporaryDirectory() as folder:
    flags = schedule.DUMP_FLAGS.format(folder=folder) if kernels else ""
    figures, missing = _run(job, flags)
    read = {
      name: schedule.read_kernels(pathlib.Path(folder), name)
      for name in kernels
    }
  return Compiled(figures, missing, read)


def run_all(name: str, calls: dict[str, Callable]) -> dict[str, Any]:
  """Calls of no argument, a few at once, and their results by name.

  The first error cancels those that have not begun.
  """
  results = {}
  with (
    concurrent.futures.ThreadPoolExecutor(_AT_ONCE) as pool,
    progress.bar(len(calls), unit="program", desc=name) as shown,
  ):
    waiting = {pool.submit(call): key for key, call in calls.items()}
    try:
      for done in concurrent.futures.as_completed(waiting):
        results[waiting[done]] = done.result()
        shown.set_postfix_str(waiting[done], refresh=False)
        shown.update()
    finally:
      pool.shutdown(wait=False, cancel_futures=True)
  return results


def _run(job: Job, flags: str) -> tuple[dict[str, Any] | None, str]:
  """The child's figures, or None and why not."""
  found = ask_child(
    "hourjax.benchmarks.attention_compile",
    job._asdict(),
    limit=_LIMIT,
    flags=flags,
  )
  if found.late:
    return None, found.reason
  if found.answer is None:
    raise UserError(
      f"--topology={job.topology}: cannot compile {job.what} for"
      f" {job.devices} device(s), {job.queries} queries and {job.keys} keys:"
      f" {found.reason}"
    )
  if "exhausted" in found.answer:
    return None, found.answer["exhausted"].splitlines()[0][:REASON]
  return found.answer, ""
