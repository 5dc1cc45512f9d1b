"""Loss and every gradient on 8 devices are those of one device.

The devices are virtual ones of a worker process; rows are packed with videos,
frames and images for the encoder, tiled images and text.
"""

import json
import os
import subprocess
import sys

import pytest

# Of the norm of each gradient; float32 throughout.
LIMIT = 1e-5


# Every two axes are split together in some case.
_CASES = [
  # Rows and parameters over one axis, the memory over the other.
  {"mesh": {"fsdp": 2, "seq": 4}},
  # Copies of the parameters, and heads, MLP width and words in parts; no stored
  # features, as in stages 1 and 2.
  {"mesh": {"data": 2, "fsdp": 2, "tensor": 2}, "stored": False},
  # Fewer blocks of heads than devices, and a head that is not the embedding.
  {
    "mesh": {"fsdp": 1, "seq": 4, "tensor": 2},
    "model": {
      "decoder": {"heads": 12, "kv_heads": 2, "width": 48, "tied": False}
    },
  },
  # The decoder reads kept tokens from other devices, without MemAug.
  {"mesh": {"data": 2, "fsdp": 2, "seq": 2}, "model": {"memaug_layers": 0}},
]


def _differences(cases):
  done = subprocess.run(
    [sys.executable, "-m", "tests.parallel.sharded_step", json.dumps(cases)],
    env={**os.environ, "JAX_PLATFORMS": "cpu"},
    capture_output=True,
    text=True,
    timeout=900,
  )
  assert not done.returncode, done.stderr[-3000:]
  return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def found():
  return _differences(_CASES)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(_CASES)))
def test_meshes(found, number):
  differences = dict(found[number])
  assert differences.pop("tokens") == differences.pop("most likely") == 0
  assert len(differences) > 30
  wrong = {name: x for name, x in differences.items() if not x < LIMIT}
  assert not wrong
