"""The TPU compiler takes the kernels at real size; without a TPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hourjax.planning.compiler.compile_pool import ENVIRONMENT

ROOT = Path(__file__).parents[3]

# In a process of its own: where the compiler does not know a topology, it
# ends the process.
PROGRAM = """
import json, re, sys
import jax, jax.numpy as jnp, numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from hourjax.kernels.tpu import call
from hourjax.parallel.chips import CHIPS

devices = topologies.get_topology_desc(
  platform="tpu", topology_name=sys.argv[1], chips_per_host_bounds=(1, 1, 1)
).devices[:1]
mesh = Mesh(np.array(devices), ("x",))
sharding = NamedSharding(mesh, PartitionSpec())
tiles = CHIPS[sys.argv[1].partition(":")[0]].attention_tiles(jnp.bfloat16)

def array(dtype, *shape):
  return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

T, S, H, K, C = int(sys.argv[2]), int(sys.argv[3]), 16, 2, 128
q = array(jnp.bfloat16, 1, T, H, C)
k = array(jnp.bfloat16, 1, S, K, C)
numbers = array(jnp.float32, 1, T, H)
segments = array(jnp.int32, 1, T), array(jnp.int32, 1, S)

def forward(*operands):
  return call.forward(*operands, out_dtype=jnp.bfloat16, tiles=tiles)

def backward(*operands):
  return call.backward(*operands, tiles=tiles)

found = {}
for function, operands in (
  (forward, (q, k, k, *segments)),
  (backward, (q, k, k, *segments, numbers, numbers, q)),
):
  local = jax.shard_map(
    function,
    mesh=mesh,
    in_specs=PartitionSpec(),
    out_specs=PartitionSpec(),
    check_vma=False,
  )
  compiled = jax.jit(local).lower(*operands).compile()
  text = compiled.as_text()
  found[function.__name__] = {
    "temp": compiled.memory_analysis().temp_size_in_bytes,
    "calls": sorted(re.findall(
      r'%(attention_[a-z_]+)[.0-9]* = .* custom_call_target="tpu_custom_call"',
      text,
    )),
  }
print(json.dumps(found))
"""


def compiled(topology, queries, keys):
  """By kernel: bytes of temporaries, and calls of the program."""
  worker = subprocess.run(
    [sys.executable, "-c", PROGRAM, topology, str(queries), str(keys)],
    env=os.environ | ENVIRONMENT | {"PYTHONPATH": str(ROOT)},
    capture_output=True,
    text=True,
    timeout=300,
  )
  assert worker.returncode == 0, worker.stderr[-3000:]
  found = json.loads(worker.stdout.splitlines()[-1])
  assert found["forward"]["calls"] == [
    "attention_forward",
    "attention_forward_running",
  ]
  assert found["backward"]["calls"] == ["attention_backward"]
  return found


@pytest.mark.slow
@pytest.mark.parametrize("topology", ["v5e:1x1", "v6e:1x1"])
def test_an_hour_compiles(topology):
  """3B, 9,728 queries and 235,520 keys: no T x S array."""
  for each in compiled(topology, 9728, 235520).values():
    assert each["temp"] < 2**29


@pytest.mark.slow
def test_a_day_compiles():
  """On one chip: 24 hours in parts, which are one program.

  Backward there is a copy of a part of the keys, not of all 6 GiB of them.
  """
  found = compiled("v5e:1x1", 12288, 24 * 3600 * 65 // 1024 * 1024 + 1024)
  assert found["forward"]["temp"] < 6.5 * 2**30
  assert found["backward"]["temp"] < 4 * 2**30
