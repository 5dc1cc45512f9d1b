"""One attention call, compiled for a TPU in a worker process.

`compile_attention` starts this module as a worker (see
`planning.compiler.compile_pool`), which reads a `Job` as JSON from standard
input and prints one line of JSON, and then reads the schedule that the compiler
leaves behind. No TPU is needed.
"""

import collections
import functools
import json
import pathlib
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

from hourjax.benchmarks import schedule
from hourjax.benchmarks.schedule import Piece
from hourjax.errors import UserError
from hourjax.kernels.attention import attention
from hourjax.kernels.sharded import Sharding
from hourjax.kernels.tpu import call as tpu
from hourjax.kernels.tpu.tiles import AttentionTiles, Tiles
from hourjax.parallel.chips import CHIPS
from hourjax.planning.compiler import hlo, traffic
from hourjax.planning.compiler.compile_pool import REASON, run_worker
from hourjax.planning.topology import parse_topology

SPLASH_BLOCK = 1024  # of queries and of keys
_LIMIT = 240  # seconds for one program


class Job(NamedTuple):
  """Describes what to compile: attention of one row of a batch, in bfloat16.

  Attributes:
    what: "forward" or "backward" of our kernels, "splash" or
      "splash_backward", "xla" or "xla_backward", or "sharded": the public
      call with its gradient, the memory split over all devices.
    topology: the topology of the compiler, such as "v5p:2x2x1".
    devices: how many of its devices to compile for.
    heads: query heads.
    kv_heads: key and value heads.
    dim: width of a head.
    queries: positions that ask.
    keys: memory tokens.
    tiles: `Tiles` for our kernel, or None for those of the chip.
    fused: whether splash computes dq together with dk and dv.
    causal: whether a query sees only keys up to its own index; not of "xla"
      or "sharded".
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
  causal: bool = False

  @property
  def generation(self) -> str:
    """Returns the name of the generation, such as "v5p"."""
    return self.topology.partition(":")[0]


class Compiled(NamedTuple):
  """Holds what is known of a compiled program.

  Attributes:
    figures: what `compile_job` returns; None if it was not compiled.
    missing: the reason if it was not compiled, in short.
    kernels: by pattern, the pieces of each kernel whose name matches it.
  """

  figures: dict[str, Any] | None
  missing: str
  kernels: dict[str, list[list[Piece]]]

  def memory(self) -> dict[str, Any]:
    """Returns MiB of temporaries in HBM, or why there is no such number."""
    if self.figures is None:
      return {"not_compiled": self.missing}
    return {"hbm_temporaries_mib": mib(self.figures["temporaries"])}


def mib(size: float) -> float:
  """Returns a number of bytes in MiB, rounded to one decimal."""
  return round(size / (1 << 20), 1)


def check_topology(name: str) -> None:
  """Refuses a topology that this benchmark does not know.

  Args:
    name: a generation and its chips, such as "v5e:2x4".

  Raises:
    UserError: the generation or the shape does not exist, or its entry in
      `parallel.chips` has no topologies for the benchmark.
  """
  generation = name.partition(":")[0]
  known = [name for name, chip in CHIPS.items() if chip.knows("bench")]
  if generation not in known:
    raise UserError(
      f"--topology={name}: {generation!r} is no generation of TPU; known are"
      f" {', '.join(known)}"
    )
  parse_topology(name)


def compile_attention(job: Job, *kernels: str) -> Compiled:
  """Compiles a job in a worker process.

  Args:
    job: what to compile.
    *kernels: patterns of names of kernels whose schedule is read. The
      compiler writes a schedule as soon as it has compiled the kernel, so it
      is there even if the rest of the program takes longer than the worker
      may run.

  Raises:
    UserError: the compiler refuses for another reason than memory.
  """
  with tempfile.TemporaryDirectory() as folder:
    flags = schedule.DUMP_FLAGS.format(folder=folder) if kernels else ""
    figures, missing = _run_job(job, flags)
    read = {
      name: schedule.read_kernels(pathlib.Path(folder), name)
      for name in kernels
    }
  return Compiled(figures, missing, read)


def _run_job(job: Job, flags: str) -> tuple[dict[str, Any] | None, str]:
  """Returns the worker's figures, or None and the reason."""
  outcome = run_worker(
    "hourjax.benchmarks.attention_compile",
    job._asdict(),
    limit=_LIMIT,
    flags=flags,
  )
  if outcome.late:
    return None, outcome.reason
  if outcome.answer is None:
    raise UserError(
      f"--topology={job.topology}: cannot compile {job.what} for"
      f" {job.devices} device(s), {job.queries} queries and {job.keys} keys:"
      f" {outcome.reason}"
    )
  if "exhausted" in outcome.answer:
    return None, outcome.answer["exhausted"].splitlines()[0][:REASON]
  return outcome.answer, ""


def compile_job(job: Job) -> dict[str, Any]:
  """Compiles a job for its topology, in this process.

  Returns:
    `arguments`, `outputs` and `temporaries`: bytes of one device, as the
    compiler allots them; `seconds` that compiling took; and `collectives`,
    see `collective_bytes`.
  """
  wanted = parse_topology(job.topology)
  topology = topologies.get_topology_desc(
    platform="tpu", topology_name=wanted.name, **wanted.bounds
  )
  mesh = Mesh(np.array(topology.devices[: job.devices]), ("seq",))
  function, arguments = _function_and_arguments(job, mesh)
  began = time.monotonic()
  compiled = jax.jit(function).lower(*arguments).compile()
  seconds = time.monotonic() - began
  memory = hlo.program_memory(compiled)
  sent = {}
  if job.devices > 1:
    program = hlo.parse(hlo.program_text(compiled))
    sent = collective_bytes(program, traffic.Layout.of(mesh))
  return {
    "arguments": memory.argument_size_in_bytes,
    "outputs": memory.output_size_in_bytes,
    "temporaries": memory.temp_size_in_bytes,
    "seconds": round(seconds, 1),
    "collectives": sent,
  }


def collective_bytes(
  program: hlo.Program, layout: traffic.Layout
) -> dict[str, int]:
  """Returns the bytes that a program's collectives gather, reduce or move.

  Args:
    program: as compiled for the mesh.
    layout: the layout of the mesh.

  Returns:
    Bytes of the whole results, by kind and dtype: "all-reduce f32".
  """
  found = collections.Counter()
  for each in traffic.collectives(program, layout):
    found[f"{each.kind} {each.dtype}"] += int(each.times * each.payload)
  return dict(found)


def _function_and_arguments(
  job: Job, mesh: Mesh
) -> tuple[Callable, tuple[jax.ShapeDtypeStruct, ...]]:
  """Returns the job's function and the abstract arrays to call it with."""
  split = job.what == "sharded"

  def array(
    shape: tuple[int, ...], dtype: jax.typing.DTypeLike, spec: P
  ) -> jax.ShapeDtypeStruct:
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
  # What the backward kernel takes besides: the log-sum-exp of each query and
  # head, and the sum of its output times the output's gradient.
  numbers = array(q.shape[:3], jnp.float32, specs.q)
  jaxs = functools.partial(splash, job.fused, job.causal)
  functions: dict[str, tuple[Callable, tuple[jax.ShapeDtypeStruct, ...]]] = {
    "forward": (_forward(job), ()),
    "backward": (_backward(job), (numbers, numbers, q)),
    "splash": (jaxs, ()),
    "splash_backward": (gradients(jaxs), (q,)),
    "xla": (xla, ()),
    "xla_backward": (gradients(xla), (q,)),
  }
  function, more = functions[job.what]
  local = jax.shard_map(
    function, mesh=mesh, in_specs=P(), out_specs=P(), check_vma=False
  )
  return local, (*arguments, *more)


def _tiles(job: Job) -> AttentionTiles:
  """Returns the generation's tiles, with the job's own for its kernel."""
  tiles = CHIPS[job.generation].attention_tiles(jnp.bfloat16)
  if job.tiles is None:
    return tiles
  own = Tiles(*job.tiles)
  if job.what == "forward":
    return tiles._replace(forward=own)
  return tiles._replace(backward=own)


def _forward(job: Job) -> Callable:
  how = {"tiles": _tiles(job), "causal": job.causal}
  return functools.partial(tpu.forward, out_dtype=jnp.bfloat16, **how)


def _backward(job: Job) -> Callable:
  how = {"tiles": _tiles(job), "causal": job.causal}
  return functools.partial(tpu.backward, **how)


def gradients(call: Callable) -> Callable:
  """Returns a function that computes the gradients of an attention call.

  Args:
    call: takes q, k, v, query_segment and key_segment.

  Returns:
    A function of the same arrays and the gradient of the output, which
    returns the gradients of q, k and v.
  """

  def function(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    query_segment: jax.Array,
    key_segment: jax.Array,
    d_out: jax.Array,
  ) -> tuple[jax.Array, ...]:
    _, pull = jax.vjp(
      lambda *inputs: call(*inputs, query_segment, key_segment), q, k, v
    )
    return pull(d_out)

  return function


def splash(
  fused: bool,
  causal: bool,
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  query_segment: jax.Array,
  key_segment: jax.Array,
) -> jax.Array:
  """Computes attention by the splash kernel that comes with jax.

  Args:
    fused: whether its backward pass computes dq together with dk and dv.
    causal: whether a query sees only keys up to its own index.
    q: queries `[1, T, H, C]`.
    k: keys `[1, S, K, C]`.
    v: values `[1, S, K, C]`.
    query_segment: segment ids `[1, T]`.
    key_segment: segment ids `[1, S]`.

  Returns:
    The output `[1, T, H, C]`.
  """
  block = SPLASH_BLOCK
  q_, k_, v_ = (jnp.swapaxes(_pad_to_blocks(x, block), 1, 2) for x in (q, k, v))
  kind = library.CausalMask if causal else library.FullMask
  mask = kind((q_.shape[2], k_.shape[2]))
  call = library.make_splash_mha(
    library.MultiHeadMask([mask] * q.shape[2]),
    block_sizes=library.BlockSizes(
      block_q=block,
      block_kv=block,
      block_kv_compute=block,
      block_q_dkv=block,
      block_kv_dkv=block,
      block_kv_dkv_compute=block,
      block_q_dq=None if fused else block,
      block_kv_dq=None if fused else block,
      use_fused_bwd_kernel=fused,
    ),
    head_shards=1,
    q_seq_shards=1,
  )
  ids = library.SegmentIds(
    _pad_to_blocks(query_segment, block), _pad_to_blocks(key_segment, block)
  )
  out = jax.vmap(call)(q_, k_, v_, ids)
  assert isinstance(out, jax.Array)  # residuals come only if asked for
  return jnp.swapaxes(out, 1, 2)[:, : q.shape[1]]


def xla(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  query_segment: jax.Array,
  key_segment: jax.Array,
) -> jax.Array:
  """Computes attention by XLA, which builds a T x S matrix.

  Args:
    q: queries `[1, T, H, C]`.
    k: keys `[1, S, K, C]`.
    v: values `[1, S, K, C]`.
    query_segment: segment ids `[1, T]`.
    key_segment: segment ids `[1, S]`.

  Returns:
    The output `[1, T, H, C]`.
  """
  same = query_segment[:, :, None] == key_segment[:, None]
  return jax.nn.dot_product_attention(q, k, v, mask=same[:, None])


def _pad_to_blocks(x: jax.Array, block: int) -> jax.Array:
  """Returns x with zeros up to whole blocks along axis 1."""
  widths = [(0, 0)] * x.ndim
  widths[1] = (0, -x.shape[1] % block)
  return jnp.pad(x, widths)


def answer(text: str) -> str:
  """Returns the answer to a job: figures, or the compiler's last words.

  Args:
    text: a job as JSON.

  Returns:
    What `compile_job` returns, as JSON; or `exhausted`, the message of the
    compiler if memory was not enough.
  """
  try:
    return json.dumps(compile_job(Job(**json.loads(text))))
  except jax.errors.JaxRuntimeError as error:
    if "RESOURCE_EXHAUSTED" not in str(error):
      raise
    return json.dumps({"exhausted": str(error)})


if __name__ == "__main__":
  print(answer(sys.stdin.read()))
