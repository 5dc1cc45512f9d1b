"""Random parameters by numpy: the compiler takes longer than many tests."""

import numpy as np

from hourjax.models.config import ModelConfig
from hourjax.models.params import param_shapes


def draw_params(config: ModelConfig, seed: int) -> dict[str, np.ndarray]:
  """Draws float32 parameters as `init_params` distributes them."""
  rng = np.random.default_rng(seed)
  params = {}
  for path, shape in sorted(param_shapes(config).items()):
    name = path.rpartition("/")[2]
    if name in ("scale", "bias"):
      value = np.full(shape, float(name == "scale"))
    else:
      one = shape[1:] if "/layers/" in path else shape
      fan_in = np.prod(one[:-1]) if name == "kernel" else one[-1]
      value = rng.normal(scale=fan_in**-0.5, size=shape)
    params[path] = value.astype(np.float32)
  return params
