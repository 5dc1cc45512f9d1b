"""Compiles the steps of an answer with the real TPU compiler.

  python -m tests.inference.compile_for_tpu 3b v5e:2x2 3600

prints, as JSON, what each step of a question about so many frames takes of a
chip (GiB, parameters included), which attention kernels it calls, and the
largest collective in bytes.
"""

import functools
import json
import re
import sys

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec

from hourjax.data.rows import Size
from hourjax.inference import steps
from hourjax.inference.engine import narrow_dtype, rounded, row_spec
from hourjax.inference.sampling import RowSampling
from hourjax.models.config import SIZES
from hourjax.models.params import param_axes, param_shapes
from hourjax.parallel.mesh import MeshConfig, make_mesh
from hourjax.parallel.rules import param_shardings
from hourjax.training.batch_sharding import abstract_batch

KEPT, TEXT, ROOM = 512 * 17, 64, 256
_BYTES = {"bf16": 2, "f32": 4, "s32": 4, "pred": 1, "u32": 4}
_COLLECTIVE = re.compile(
  r"= (\w+)\[([\d,]*)\][^ ]* "
  r"(?:all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)\("
)


def main(size: str, topology: str, frames: int) -> None:
  """Prints what the steps take."""
  devices = topologies.get_topology_desc(
    platform="tpu", topology_name=topology
  ).devices
  config = SIZES[size]
  mesh = make_mesh(MeshConfig(fsdp=1, seq=len(devices)), devices)
  shapes = param_shapes(config)
  shardings = param_shardings(mesh, shapes, param_axes(config))
  params = {
    path: jax.ShapeDtypeStruct(
      shape, narrow_dtype(path, config), sharding=shardings[path]
    )
    for path, shape in shapes.items()
  }
  found = {}
  with jax.set_mesh(mesh):
    for name, lowered in _lowered(params, config, mesh, frames):
      found[name] = _figures(lowered.compile())
  print(json.dumps(found))


def _lowered(params, config, mesh, frames):
  """(name, lowered) in the order in which an answer needs them."""
  tokens = config.pool_side**2
  queries, decoder = rounded(KEPT + TEXT), rounded(KEPT + TEXT)
  kept = rounded(KEPT)
  memory = Size(
    features=rounded(frames) * tokens,
    memory=rounded(frames * (tokens + 1)),
    queries=kept,
  )
  abstract = functools.partial(_abstract, mesh)
  encode_memory = functools.partial(steps.encode_memory.lower, config=config)
  batch = abstract_batch(row_spec(config, memory), 1, mesh)
  yield "encode_memory", encode_memory(params, batch)
  cache = jax.eval_shape(
    functools.partial(steps.encode_memory, config=config), params, batch
  )
  cache = steps.MemoryCache(
    keys_values=jax.tree.map(
      lambda x: abstract(x, None, None, "seq"), cache.keys_values
    ),
    kept=abstract(cache.kept, None, "seq"),
    segment=abstract(cache.segment, None, "seq"),
  )
  prompt = Size(memory=kept, queries=queries, decoder=decoder)
  batch = abstract_batch(row_spec(config, prompt), 1, mesh)
  probes = jax.ShapeDtypeStruct((1, 512), jnp.int32)
  yield (
    "read_memory",
    steps.read_memory.lower(params, cache, batch, probes, config=config),
  )
  augmented = abstract(
    jax.ShapeDtypeStruct((1, queries, config.decoder.width), config.dtype),
    None,
    "seq",
  )
  capacity = rounded(KEPT + TEXT + ROOM)
  start = jax.ShapeDtypeStruct((1,), jnp.int32)
  more = {"config": config, "capacity": capacity}
  yield "prefill", steps.prefill.lower(params, augmented, batch, start, **more)
  cache = jax.eval_shape(
    functools.partial(steps.prefill, **more), params, augmented, batch, start
  )
  number = jax.ShapeDtypeStruct((1,), jnp.int32)
  state = steps.DecodeState(
    cache=jax.tree.map(lambda x: abstract(x, None, None, "seq"), cache),
    length=number,
    last_token=number,
    answer=jax.ShapeDtypeStruct((1, ROOM), jnp.int32),
    count=number,
    done=jax.ShapeDtypeStruct((1,), jnp.bool_),
  )
  scalar = jax.ShapeDtypeStruct((), jnp.float32)
  keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), 1))
  sampling = RowSampling(scalar, scalar, keys)
  whole = jax.ShapeDtypeStruct((), jnp.int32)
  stop = jax.ShapeDtypeStruct((2,), jnp.int32)
  args = params, state, sampling, stop, whole, whole
  yield "decode", steps.decode.lower(*args, config=config)


def _abstract(mesh, x, *axes):
  sharding = NamedSharding(mesh, PartitionSpec(*axes))
  return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


def _figures(compiled) -> dict:
  memory, text = compiled.memory_analysis(), compiled.as_text()
  sizes = [0]
  for dtype, shape in _COLLECTIVE.findall(text):
    count = 1
    for n in filter(None, shape.split(",")):
      count *= int(n)
    sizes.append(count * _BYTES[dtype])
  calls = re.findall(r"%(attention_\w+?)(?:\.\d+)? = ", text)
  return {
    "gib": (memory.argument_size_in_bytes + memory.temp_size_in_bytes) / 2**30,
    "calls": sorted(set(calls)),
    "largest_collective": max(sizes),
  }


if __name__ == "__main__":
  main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
