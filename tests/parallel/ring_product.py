"""Prints how far sums on a ring of four devices are from those of numpy."""

import os

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"
os.environ["JAX_PLATFORMS"] = "cpu"

import json

import jax
import numpy as np
from jax.sharding import PartitionSpec as P

from hourjax.parallel import fsdp
from hourjax.parallel.mesh import MeshConfig, make_mesh

TOKENS, INPUTS, OUTPUTS = 6, 16, 20


def main() -> None:
  """Compares both dimensions of a kernel that can be cut into blocks."""
  rng = np.random.default_rng(0)
  x = rng.normal(size=(4, TOKENS, INPUTS)).astype(np.float32)
  d_y = rng.normal(size=(4, TOKENS, OUTPUTS)).astype(np.float32)
  expected = np.einsum("abi,abo->io", x.astype(np.float64), d_y)
  errors = []
  with jax.set_mesh(make_mesh(MeshConfig(fsdp=4))):
    for dim, spec in enumerate((P("fsdp"), P(None, "fsdp"))):
      summed = jax.shard_map(
        lambda x, d_y, dim=dim: fsdp._ring_product(
          x, d_y, np.float32, "fsdp", dim
        ),
        in_specs=(P("fsdp"), P("fsdp")),
        out_specs=spec,
        check_vma=False,
      )
      found = np.asarray(jax.jit(summed)(x, d_y))
      errors.append(float(np.abs(found - expected).max()))
  print(json.dumps(errors))


if __name__ == "__main__":
  main()
