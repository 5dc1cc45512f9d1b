"""Attention on the accelerator at hand, by the clock."""

import functools
import importlib.util
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp

from hourjax import kernels
from hourjax.benchmarks.attention_child import gradients

# Dense bf16 TFLOP/s of a chip, by its maker's data sheet; a part of
# `device_kind`. Of TPU7x a device is half a chip.
PEAKS = {
  "TPU v5 lite": 197,
  "TPU v5": 459,
  "TPU v6 lite": 918,
  "TPU7x": 1153.5,
  "H100": 989,
  "H200": 989,
  "A100": 312,
}
_REPEATS = 5


def measure(
  heads: int, kv_heads: int, dim: int, queries: int, keys: int
) -> dict[str, Any]:
  """Figures of the default device, or why there are none."""
  if jax.default_backend() not in ("tpu", "gpu"):
    return {"missing": "no accelerator: this process runs on the CPU"}
  return measure_here(heads, kv_heads, dim, queries, keys)


def measure_here(
  heads: int, kv_heads: int, dim: int, queries: int, keys: int
) -> dict[str, Any]:
  """Times the public call on the default device, whatever it is.

  Returns:
    For forward and for forward with backward: seconds (the median of five
    calls after the first one), TFLOP/s (4 operations a pair and dim forward,
    14 with the backward) and the share of the chip's peak; on a GPU also
    those of cuDNN through jax and of torch's flash attention.
  """
  key = jax.random.split(jax.random.key(0), 4)
  q_shape, k_shape = (1, queries, heads, dim), (1, keys, kv_heads, dim)
  q, d_out, k, v = (
    jax.random.normal(one, shape, jnp.bfloat16)
    for one, shape in zip(key, (q_shape, q_shape, k_shape, k_shape))
  )
  segments = (jnp.ones((1, n), jnp.int32) for n in (queries, keys))
  arrays = (q, k, v, *segments)
  device = jax.devices()[0]
  peak = next((x for n, x in PEAKS.items() if n in device.device_kind), None)
  rate = functools.partial(_rates, 2 * dim * heads * queries * keys, peak)
  figures = {"device": device.device_kind}
  figures["ours"] = _jax_seconds(kernels.attention, arrays, d_out)
  if device.platform == "gpu":
    figures["cudnn"] = _attempt(_jax_seconds, _cudnn, arrays, d_out)
    figures["torch"] = _attempt(_torch_seconds, q_shape, k_shape)
  return {
    name: rate(x) if isinstance(x, list) else x for name, x in figures.items()
  }


def _attempt(function, *arguments) -> list[float] | str:
  try:
    return function(*arguments)
  except Exception as error:  # a rival's: whatever it is, it is reported
    return f"{type(error).__name__}: {error}"[:300]


def _jax_seconds(call, arrays, d_out) -> list[float]:
  """Seconds of forward, and of forward with backward."""
  forward, backward = jax.jit(call), jax.jit(gradients(call))
  return [
    _median(lambda: jax.block_until_ready(forward(*arrays))),
    _median(lambda: jax.block_until_ready(backward(*arrays, d_out))),
  ]


def _cudnn(q, k, v, *_):
  return jax.nn.dot_product_attention(q, k, v, implementation="cudnn")


def _torch_seconds(q_shape, k_shape) -> list[float]:
  """As `_jax_seconds`, of torch's flash attention; [B, H, T, C] there."""
  if importlib.util.find_spec("torch") is None:
    raise ModuleNotFoundError("torch is not installed")
  import torch  # not among the requirements
  from torch.nn.attention import SDPBackend, sdpa_kernel

  def array(shape):
    batch, length, heads, dim = shape
    return torch.randn(
      (batch, heads, length, dim),
      dtype=torch.bfloat16,
      device="cuda",
      requires_grad=True,
    )

  q, k, v = array(q_shape), array(k_shape), array(k_shape)
  d_out = torch.randn_like(q)

  def forward():
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
      out = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, enable_gqa=True
      )
    torch.cuda.synchronize()
    return out

  def both():
    torch.autograd.grad(forward(), (q, k, v), d_out)
    torch.cuda.synchronize()

  return [_median(forward), _median(both)]


def _median(call) -> float:
  call()
  seconds = []
  for _ in range(_REPEATS):
    began = time.perf_counter()
    call()
    seconds.append(time.perf_counter() - began)
  return statistics.median(seconds)


def _rates(product: float, peak: float | None, seconds: list[float]) -> dict:
  """Figures from the operations of one T x S product of all heads."""
  figures = {}
  names = ("forward", 2), ("forward_and_backward", 7)
  for (name, products), took in zip(names, seconds):
    speed = products * product / took / 1e12
    figures[name] = {
      "seconds": round(took, 5),
      "tflop_per_second": round(speed, 1),
      "share_of_peak": round(speed / peak, 3) if peak else None,
    }
  return figures
