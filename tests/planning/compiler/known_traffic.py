"""Programs whose traffic is known, compiled and read.

  python -m tests.planning.compiler.known_traffic cpu
  python -m tests.planning.compiler.known_traffic v5e:2x4

prints what `traffic.by_axis` finds in each, as JSON.
"""

import json
import os
import sys

from tests.xla_flags import xla_flags

if sys.argv[1:] == ["cpu"]:
  os.environ["XLA_FLAGS"] = xla_flags(8)

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from hourjax.planning.compiler import hlo, traffic
from hourjax.planning.compiler.compiled_step import argument_kinds
from hourjax.planning.topology import parse_topology

TURNS, LAYERS, UNKNOWN = 5, 6, 3
N = 1024
ROWS = 4096


def main(where: str) -> None:
  devices = _devices(where)
  programs = {
    "collectives": _collectives(
      Mesh(devices.reshape(2, 2, 2), ("a", "b", "c"))
    ),
    "layers": _layers(Mesh(devices.reshape(4, 2), ("fsdp", "seq"))),
  }
  print(json.dumps(programs))


def _devices(where: str) -> np.ndarray:
  if where == "cpu":
    return np.array(jax.devices())
  from jax.experimental import topologies

  topology = parse_topology(where)
  found = topologies.get_topology_desc(
    platform="tpu", topology_name=topology.name, **topology.bounds
  )
  return np.array(found.devices)


def _collectives(mesh):
  """One collective of each kind, by hand, in loops."""

  def here(x, turns):
    def turn(x, _):
      whole = jax.lax.all_gather(x, "b", tiled=True)
      x = x + jax.lax.psum_scatter(jnp.sin(whole), "c", tiled=True)
      x = x + jax.lax.psum(jnp.cos(x), ("a", "c"))
      x = x + jax.lax.ppermute(jnp.tanh(x), "b", [(0, 1), (1, 0)])
      return x, None

    x, _ = jax.lax.scan(turn, x, None, length=TURNS)
    # As many turns as the data says.
    return jax.lax.while_loop(
      lambda at: at[0] < turns[0],
      lambda at: (at[0] + 1, jax.lax.pmax(at[1] * 1.5, "a")),
      (0, x),
    )[1]

  function = jax.jit(
    jax.shard_map(
      here, mesh=mesh, in_specs=(P(), P()), out_specs=P(), check_vma=False
    )
  )
  whole = NamedSharding(mesh, P())
  return _read(
    function.lower(
      jax.ShapeDtypeStruct((N, N), jnp.float32, sharding=whole),
      jax.ShapeDtypeStruct((1,), jnp.int32, sharding=whole),
    ).compile(),
    mesh,
  )


def _layers(mesh):
  """Layers whose weights are gathered over fsdp, by the compiler alone."""
  stored = NamedSharding(mesh, P(None, "fsdp", None))

  def loss(trained, batch):
    def layer(x, w):
      return jax.nn.relu(x @ w), None

    x, _ = jax.lax.scan(jax.checkpoint(layer), batch, trained)
    return (x.astype(jnp.float32) ** 2).sum()

  rows = NamedSharding(mesh, P(("fsdp", "seq"), None))
  compiled = (
    jax.jit(jax.grad(loss), out_shardings=stored)
    .lower(
      jax.ShapeDtypeStruct((LAYERS, N, N), jnp.bfloat16, sharding=stored),
      jax.ShapeDtypeStruct((ROWS, N), jnp.bfloat16, sharding=rows),
    )
    .compile()
  )
  return _read(compiled, mesh)


def _read(compiled, mesh):
  program = hlo.parse(compiled.as_text())
  layout = traffic.Layout.of(mesh)
  found = traffic.collectives(program, layout, UNKNOWN)
  memory = compiled.memory_analysis()
  return {
    "traffic": traffic.by_axis(found),
    "kinds": argument_kinds(program),
    "arguments": memory.argument_size_in_bytes,
  }


if __name__ == "__main__":
  main(*sys.argv[1:])
