"""Kernels of frozen layers in 8 or 4 bits, for adapters on a small chip.

Number formats and their rounding are those of qwix; which one an array has is
told by its dtype:

    "int8"   int8   a scale for each output channel
    "int4"   int4   a scale for each 64 inputs of an output channel
    "nf4"    uint4  the same, and the 16 quantiles of a normal distribution in
                    place of 16 steps (QLoRA, arXiv 2305.14314)

qwix quantizes models by intercepting the operations of their layers. Ours are
products with a gradient of their own inside a scan, which it does not see; so
its arrays are used, and the layer converts its kernel when it runs.
"""

from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

Format = Literal["int8", "int4", "nf4"]
FORMATS = get_args(Format)
# Inputs of an output channel that share a scale, as in QLoRA.
BLOCK = 64
_DTYPES = {"int8": jnp.int8, "int4": jnp.int4, "nf4": jnp.uint4}


def quantized_shapes(
  shape: tuple[int, ...], kind: Format
) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
  """Returns shape and dtype of a quantized kernel and of its scales.

  Args:
    shape: of the kernel, `[..., i, o]`; see `check_block` for i.
    kind: number format.
  """
  *layers, inputs, outputs = shape
  blocks = 1 if kind == "int8" else inputs // BLOCK
  scale = jnp.float32 if kind == "int8" else jnp.bfloat16
  return (
    jax.ShapeDtypeStruct(shape, _DTYPES[kind]),
    jax.ShapeDtypeStruct((*layers, blocks, outputs), scale),
  )


def divides(shape: tuple[int, ...], kind: Format) -> bool:
  """Returns whether a kernel `[..., i, o]` can be quantized so."""
  return kind == "int8" or shape[-2] % BLOCK == 0


def quantize(
  kernel: Float[Array, "*layers i o"], kind: Format
) -> tuple[jax.Array, jax.Array]:
  """Rounds a kernel to a number format.

  Args:
    kernel: of one layer or of a stack of them.
    kind: number format.

  Returns:
    The kernel's codes, of its shape, and their scales.
  """
  import qwix  # imported here: few runs need it, and it takes a second

  codes, scale = quantized_shapes(kernel.shape, kind)
  inputs = kernel.ndim - 2
  found = qwix.quantize(
    kernel.astype(jnp.float32),
    kind if kind == "nf4" else codes.dtype,
    channelwise_axes=[a for a in range(kernel.ndim) if a != inputs],
    tiled_axes={} if kind == "int8" else {inputs: BLOCK},
    scale_dtype=scale.dtype,
  )
  return found.qvalue, found.scale


def dequantize(codes: jax.Array, scale: jax.Array, dtype: DTypeLike) -> Any:
  """Returns a kernel `[..., i, o]` that `quantize` rounded, in `dtype`."""
  import qwix

  known = {jnp.dtype(value): kind for kind, value in _DTYPES.items()}
  kind = known[codes.dtype]
  qtype = kind if kind == "nf4" else codes.dtype
  scale = scale.astype(dtype)
  return qwix.dequantize(qwix.QArray(codes, scale, qtype=qtype))


def is_quantized(kernel: jax.Array) -> bool:
  """Returns whether an array holds codes of `quantize`."""
  return kernel.dtype in {jnp.dtype(value) for value in _DTYPES.values()}
