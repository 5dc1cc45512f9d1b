"""Prints how far gradients on rings of devices are from those of numpy."""

import os

from tests.xla_flags import xla_flags

os.environ["XLA_FLAGS"] = xla_flags(8)
os.environ["JAX_PLATFORMS"] = "cpu"

import json

import jax
import numpy as np

from hourjax.parallel import fsdp
from hourjax.parallel.mesh import MeshConfig, make_mesh

ROWS, TOKENS, INPUTS, OUTPUTS = 8, 8, 16, 32
MESHES = (
  MeshConfig(fsdp=8),
  MeshConfig(fsdp=4, seq=2),
  MeshConfig(fsdp=1, seq=8),
  MeshConfig(data=2, fsdp=2, tensor=2),
)


def main() -> None:
  """Compares kernels that are cut along either dimension, on every mesh.

  Sums are sent as float32 and, as a share of the largest gradient, bfloat16.
  """
  fsdp._rings = lambda: True  # as on a TPU
  rng = np.random.default_rng(0)
  x = rng.normal(size=(ROWS, TOKENS, INPUTS)).astype(np.float32)
  d_y = rng.normal(size=(ROWS, TOKENS, OUTPUTS)).astype(np.float32)
  expected = np.einsum("abi,abo->io", x.astype(np.float64), d_y)
  errors = {}
  for mesh in MESHES:
    for axes in (("width", "mlp"), ("mlp", "width")):
      # The bias is left out: its sum would run beside the ring, and on a CPU
      # the two may wait for one another.
      def kernel(x, d_y, axes=axes):
        lead = ("rows", "positions")
        return fsdp.weight_gradients(x, d_y, axes, lead, np.float32)[0]

      for sent in ("float32", "bfloat16"):
        with (
          jax.set_mesh(make_mesh(mesh)),
          fsdp.gradients_summed_in(sent),
        ):
          found = np.asarray(jax.jit(lambda *a: kernel(*a))(x, d_y))
        error = float(np.abs(found - expected).max())
        errors[f"{sent} {mesh}: {axes}"] = error / np.abs(expected).max()
  print(json.dumps(errors))


if __name__ == "__main__":
  main()
