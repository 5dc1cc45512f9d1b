"""Between official tensors and our parameters, and when gradients agree."""

import re

import numpy as np
from flax import nnx

from hourjax.models.config import ModelConfig
from hourjax.weights.names import key_table

# Largest error of a gradient, relative to the largest number in its tensor.
GRADIENT = 1e-4

# Some gradients are exactly zero: softmax ignores a bias on all keys, hence on
# those of the tower, which has no rotary positions. What is computed is the
# rounding of either side, and differs from processor to processor. The same
# terms, times the inputs, make the gradient of the kernel and do not cancel
# there: of its largest number, float32 may leave as much as the root of some
# thousand terms times 2^-24.
ZERO = 2e-6
_ZERO = re.compile(
  r"(?:encoder/layers/k/|vision_model\..*\.self_attn\.k_proj\.)bias$"
)


def to_ours(tensors, config: ModelConfig, component: str):
  """Parameters of one component by path, from its official tensors.

  Args:
    tensors: by official name, or by the part of it after the component.
    config: of the model.
    component: "memaug" or "vision".
  """
  params: dict[str, list] = {}
  for entry in key_table(config):
    if not entry.paths[0].startswith(f"{component}/"):
      continue
    for name in entry.names():
      key = next(k for k in tensors if f".{name}".endswith(f".{k}"))
      for path, part in zip(entry.paths, entry.to_ours(tensors[key])):
        path = path.removeprefix(f"{component}/")
        params.setdefault(path, []).append(part)
        if not entry.layers:
          params[path] = part
  return {
    path: np.stack(p) if isinstance(p, list) else p
    for path, p in params.items()
  }


def to_official(params, config: ModelConfig) -> dict[str, np.ndarray]:
  """Our parameters, or as many of them as there are, by official name."""
  named = {}
  for entry in key_table(config):
    if not set(entry.paths) <= set(params):
      continue
    for layer, name in enumerate(entry.names()):
      arrays = [np.asarray(params[path]) for path in entry.paths]
      if entry.layers:
        arrays = [array[layer] for array in arrays]
      named[name] = entry.to_official(arrays)
  return named


def build(make, params) -> nnx.Module:
  """The module that `make` builds, with parameters by path; pure."""
  graph, state = nnx.split(nnx.eval_shape(make))
  flat = [
    (path, variable.replace(params["/".join(map(str, path))]))
    for path, variable in nnx.to_flat_state(state)
    if isinstance(variable, nnx.Param)
  ]
  return nnx.merge(graph, nnx.from_flat_state(flat))


def _kernel_of(bias: str, names) -> str:
  start = bias.removesuffix("bias")
  return next(
    start + end for end in ("kernel", "weight") if start + end in names
  )


def assert_gradients(got, expected, relative=GRADIENT):
  """Every gradient is right to `relative`, or to rounding where it is zero."""
  assert set(got) == set(expected)
  wrong = {}
  for name, reference in expected.items():
    assert got[name].shape == reference.shape, name
    error = np.abs(got[name] - reference).max()
    allowed = relative * np.abs(reference).max()
    if _ZERO.search(name):
      allowed = ZERO * np.abs(expected[_kernel_of(name, expected)]).max()
    if not error <= allowed:
      wrong[name] = f"off by {error:.2e}, allowed {allowed:.2e}"
  assert not wrong, wrong
