"""Reads a folder onto four virtual devices and compares with reading it whole.

  python -m tests.weights.split FOLDER

prints, as JSON, for meshes that split rows, columns and layers' heads, how many
parameters are split and how many bytes were read, of how many.
"""

import json
import os
import pathlib
import sys

from tests.xla_flags import xla_flags

if __name__ == "__main__":
  os.environ["XLA_FLAGS"] = xla_flags(4)

import jax
import ml_dtypes
import numpy as np

from hourjax.models.params import param_axes
from hourjax.parallel.mesh import MeshConfig, make_mesh
from hourjax.parallel.rules import param_shardings
from hourjax.weights import tensors
from tests.weights import folders

MESHES = [
  {"fsdp": 4},
  {"fsdp": 2, "tensor": 2},
  {"fsdp": 1, "seq": 4},
  {"fsdp": 1, "data": 2, "tensor": 2},
]


def main(folder: pathlib.Path) -> None:
  """Prints the figures; fails where a value differs."""
  config, found = folders.UNTIED, []
  shapes = folders.shapes(config)
  whole = folders.load(folder, dtype=ml_dtypes.bfloat16)
  fill = tensors.TensorReader._fill
  read = 0

  def counting(self, tensor, block, offset):
    nonlocal read
    read += block.nbytes
    fill(self, tensor, block, offset)

  tensors.TensorReader._fill = counting
  for sizes in MESHES:
    mesh, read = make_mesh(MeshConfig(**sizes)), 0
    where = param_shardings(mesh, shapes, param_axes(config))
    got = folders.load(folder, dtype=ml_dtypes.bfloat16, shardings=where)
    for path, value in whole.items():
      assert got[path].sharding == where[path]
      np.testing.assert_array_equal(got[path], value, err_msg=path)
    split = sum(not x.sharding.is_fully_replicated for x in got.values())
    found.append({"split": split, "read": read})
  total = 4 * sum(value.size for value in whole.values())  # float32 in the file
  print(
    json.dumps({"total": total, "devices": jax.device_count(), "on": found})
  )


if __name__ == "__main__":
  main(pathlib.Path(sys.argv[1]))
