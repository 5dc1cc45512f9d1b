"""Makes a folder of random weights with the layout and size of a published one.

  python -m tests.weights.make_full_size OUT --size=3b --tokenizer=FOLDER

writes config.json, four shards in bfloat16 with their index, and the
tokenizer's files: 7.4 GB for 3B, 17.4 GB for 7B. Names and shapes are the
official ones (`tests/golden/params_real.json`). Not run with the tests; for
measurements of loading and asking at full size:

  /usr/bin/time -v python -m hourjax.ask --model=OUT --video=v.mp4 "question"
"""

import argparse
import json
import pathlib
import shutil

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from hourjax.models.config import SIZES
from hourjax.weights.description import write_config
from tests import golden_files

_SHARDS = 4
_NAMES = {"3b": "hourllava_3b_qwen2.5-3b", "7b": "hourllava_7b_qwen2-7b"}


def make(out: pathlib.Path, size: str, tokenizer: pathlib.Path | None) -> None:
  """Writes the folder; a shard is held in memory at a time."""
  out.mkdir(parents=True, exist_ok=True)
  write_config(SIZES[size], out)
  for path in sorted(tokenizer.iterdir()) if tokenizer else []:
    if path.is_file():
      shutil.copy(path, out)
  real = json.loads(golden_files.golden_path("params_real.json").read_text())
  shapes = real["shapes"][_NAMES[size]]
  if SIZES[size].decoder.tied:
    shapes = {n: shape for n, shape in shapes.items() if n != "lm_head.weight"}
  total = 2 * sum(int(np.prod(shape)) for shape in shapes.values())
  rng, shard, index, number, held = np.random.default_rng(0), {}, {}, 1, 0
  for at, (name, shape) in enumerate(shapes.items(), 1):
    shard[name] = _tensor(name, shape, rng)
    held += shard[name].nbytes
    if held >= total / _SHARDS or at == len(shapes):
      file = f"model-{number:05d}-of-{_SHARDS:05d}.safetensors"
      save_file(shard, out / file, metadata={"format": "pt"})
      index |= dict.fromkeys(shard, file)
      shard, number, held = {}, number + 1, 0
  (out / "model.safetensors.index.json").write_text(
    json.dumps({"metadata": {"total_size": total}, "weight_map": index})
  )


def _tensor(name, shape, rng) -> np.ndarray:
  """As they are drawn: norms 1, biases 0, kernels of their inputs' size."""
  if len(shape) == 1:
    one = "norm" in name and name.endswith("weight")
    return np.full(shape, float(one), ml_dtypes.bfloat16)
  spread = np.float32(np.prod(shape[1:], dtype=float) ** -0.5)
  tensor = np.empty(shape, ml_dtypes.bfloat16)
  for row in range(0, len(tensor), 4096):
    part = tensor[row : row + 4096]
    part[...] = rng.standard_normal(part.shape, np.float32) * spread
  return tensor


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("out", type=pathlib.Path)
  parser.add_argument("--size", choices=_NAMES, default="3b")
  parser.add_argument("--tokenizer", type=pathlib.Path)
  options = parser.parse_args()
  make(options.out, options.size, options.tokenizer)


if __name__ == "__main__":
  main()
