"""Linear layers on a mesh, with adapters, and kernels of few bits."""

import contextlib
import contextvars
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Num

from hourjax.models.lora import FIXED, TRAINED, column_norms
from hourjax.models.quantization import dequantize
from hourjax.parallel.fsdp import gather_weight, weight_gradients

# Share and random key of the adapters' dropout; see `adapter_dropout`.
_DROPOUT: contextvars.ContextVar[tuple[float, jax.Array] | None] = (
  contextvars.ContextVar("adapter_dropout", default=None)
)
# Name under which rematerialisation finds products of inputs and weights.
PRODUCT = "product"
# Logical axes of the two leading dimensions of a layer's input.
LeadingAxes = tuple[str, str | None]
SEQUENCE: LeadingAxes = ("rows", "positions")
IMAGES: LeadingAxes = ("images", None)
# A few new tokens. They travel to the weights, which are not gathered.
TOKENS: LeadingAxes = ("rows", None)
# Logical axes of a weight.
WeightAxes = tuple[str | None, str | None]


@contextlib.contextmanager
def adapter_dropout(rate: float, key: jax.Array) -> Iterator[None]:
  """Makes adapters that are traced inside drop a share of their inputs.

  Args:
    rate: share that is set to 0.
    key: of the random choice; each layer folds its own number into it.
  """
  token = _DROPOUT.set((rate, key))
  try:
    yield
  finally:
    _DROPOUT.reset(token)


# Parameters that only layers have with an adapter or a quantized kernel.
ADDED = frozenset(("kernel_scale", *TRAINED, *FIXED))


class Linear(nnx.Linear):
  """Computes `nnx.Linear` on a mesh, and an adapter beside it if it has one.

  See `sharded_product`, `lora` and `quantization`.

  Attributes:
    axes: logical axes of the kernel.
    kernel_scale: scales of a quantized kernel.
    lora_a: of the adapter, as the four that follow.
    lora_b: see `lora_a`.
    lora_scale: see `lora_a`.
    lora_magnitude: see `lora_a`; only of DoRA.
    lora_seed: see `lora_a`; only with dropout.
  """

  # Each an nnx.Param of the layers that have it, see `params.with_params`.
  kernel_scale: Any = None
  lora_a: Any = None
  lora_b: Any = None
  lora_scale: Any = None
  lora_magnitude: Any = None
  lora_seed: Any = None

  def __init__(self, *args: Any, axes: WeightAxes, **kwargs: Any):
    """Draws the parameters.

    Args:
      *args: of `nnx.Linear`.
      axes: logical axes of the kernel.
      **kwargs: of `nnx.Linear`.
    """
    super().__init__(
      *args,
      kernel_metadata={"axes": axes},
      bias_metadata={"axes": (bias_axis(axes),)},
      **kwargs,
    )
    self.axes = axes

  def __call__(
    self, x: Float[Array, "a b i"], lead: LeadingAxes = SEQUENCE
  ) -> Float[Array, "a b o"]:
    """Computes x @ kernel + bias, and adds the adapter's output.

    Args:
      x: input.
      lead: logical axes of its first two dimensions.
    """
    x = x.astype(self.dtype)
    kernel = jnp.asarray(self.kernel[...])
    bias = None if self.bias is None else jnp.asarray(self.bias[...])
    if self.lora_magnitude is not None:
      return checkpoint_name(self._with_dora(x, kernel, bias, lead), PRODUCT)
    if self.kernel_scale is not None:
      scale = jnp.asarray(self.kernel_scale[...])
      y = quantized_product(x, kernel, scale, bias, self.axes, lead)
    else:
      y = _product(x, kernel, bias, self.axes, lead)
    if self.lora_a is not None:
      y = y + self._adapter(x, lead)
    return y if lead == TOKENS else checkpoint_name(y, PRODUCT)

  def _adapter(
    self, x: Float[Array, "a b i"], lead: LeadingAxes
  ) -> Float[Array, "a b o"]:
    """Computes what a LoRA adapter adds; see `lora`."""
    inputs, outputs = self.axes
    h = _product(self._dropped(x), self.lora_a[...], None, (inputs, None), lead)
    h = h * self.lora_scale[...].astype(h.dtype)
    return _product(h, self.lora_b[...], None, (None, outputs), lead)

  def _dropped(self, x: Float[Array, "a b i"]) -> Float[Array, "a b i"]:
    """Sets a share of an adapter's inputs to 0 within `adapter_dropout`."""
    dropout = _DROPOUT.get()
    if dropout is None or self.lora_seed is None:
      return x
    rate, key = dropout
    key = jax.random.fold_in(key, self.lora_seed[...])
    kept = jax.random.bernoulli(key, 1 - rate, x.shape)
    return jnp.where(kept, x / (1 - rate), 0).astype(x.dtype)

  def _with_dora(
    self,
    x: Float[Array, "a b i"],
    kernel: Num[Array, "i o"],
    bias: Float[Array, "o"] | None,
    lead: LeadingAxes,
  ) -> Float[Array, "a b o"]:
    """Computes a layer whose columns' lengths are trained (DoRA, eq. 5).

    The columns' lengths before that count as constants, as in the paper's
    section 4.3.
    """
    if self.kernel_scale is not None:
      scale = jnp.asarray(self.kernel_scale[...])
      y = quantized_product(x, kernel, scale, None, self.axes, lead)
      kernel = dequantize(kernel, scale, jnp.float32)
    else:
      y = _product(x, kernel, None, self.axes, lead)
    low_rank = jnp.matmul(
      self.lora_a[...], self.lora_b[...], precision="highest"
    )
    whole = kernel.astype(jnp.float32) + self.lora_scale[...] * low_rank
    norms = jax.lax.stop_gradient(column_norms(whole))
    ratio = (self.lora_magnitude[...] / norms).astype(y.dtype)[None, None]
    y = ratio * (y + self._adapter(x, lead))
    return y if bias is None else y + bias.astype(y.dtype)[None, None]


def _product(
  x: Float[Array, "a b i"],
  kernel: Float[Array, "i o"],
  bias: Float[Array, "o"] | None,
  axes: WeightAxes,
  lead: LeadingAxes,
) -> Float[Array, "a b o"]:
  """Computes x @ kernel + bias; a few tokens travel to the weights."""
  if lead != TOKENS:
    return sharded_product(x, kernel, bias, axes, lead)
  y = x @ kernel.astype(x.dtype)
  return y if bias is None else y + bias.astype(x.dtype)[None, None]


def bias_axis(axes: WeightAxes) -> str | None:
  """Returns the logical axis of a bias, given those of its kernel.

  It is split only where the outputs that it is added to are.
  """
  return axes[1] if axes[1] in ("heads", "mlp") else None


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def sharded_product(
  x: Float[Array, "a b i"],
  kernel: Float[Array, "i o"],
  bias: Float[Array, "o"] | None,
  axes: WeightAxes,
  lead: LeadingAxes,
) -> Float[Array, "a b o"]:
  """Computes x @ kernel + bias in the dtype of x, on the mesh that is set.

  The kernel is gathered for the product, and gathered again in the backward
  pass instead of being kept (see `parallel.fsdp`).

  Args:
    x: input.
    kernel: as it is stored, in its own dtype.
    bias: as it is stored; None for none.
    axes: logical axes of the kernel.
    lead: logical axes of a and b.
  """
  y = x @ gather_weight(kernel, axes, x.dtype)
  return y if bias is None else y + bias.astype(x.dtype)[None, None]


_Residuals = tuple[jax.Array, jax.Array, jax.Array | None]


def _product_forward(
  x: jax.Array,
  kernel: jax.Array,
  bias: jax.Array | None,
  axes: WeightAxes,
  lead: LeadingAxes,
) -> tuple[jax.Array, _Residuals]:
  return sharded_product(x, kernel, bias, axes, lead), (x, kernel, bias)


def _product_backward(
  axes: WeightAxes, lead: LeadingAxes, residuals: _Residuals, d_y: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
  x, kernel, bias = residuals
  gathered = gather_weight(kernel, axes, x.dtype)
  d_x = jnp.einsum("abo,io->abi", d_y, gathered)
  d_kernel, d_bias = weight_gradients(x, d_y, axes, lead, kernel.dtype)
  return d_x, d_kernel, None if bias is None else d_bias


sharded_product.defvjp(_product_forward, _product_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def quantized_product(
  x: Float[Array, "a b i"],
  codes: Num[Array, "i o"],
  scale: Float[Array, "s o"],
  bias: Float[Array, "o"] | None,
  axes: WeightAxes,
  lead: LeadingAxes,
) -> Float[Array, "a b o"]:
  """Computes x @ kernel + bias with a frozen kernel of few bits.

  The kernel is converted for the product, and again in the backward pass. Only
  x has a gradient.

  Args:
    x: input.
    codes: of the kernel, see `quantization`.
    scale: of the codes.
    bias: as it is stored; None for none.
    axes: logical axes of the kernel.
    lead: logical axes of a and b.
  """
  kernel = dequantize(codes, scale, x.dtype)
  return _product(x, kernel, bias, axes, lead)


def _quantized_forward(
  x: jax.Array,
  codes: jax.Array,
  scale: jax.Array,
  bias: jax.Array | None,
  axes: WeightAxes,
  lead: LeadingAxes,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
  return quantized_product(x, codes, scale, bias, axes, lead), (codes, scale)


def _quantized_backward(
  axes: WeightAxes,
  lead: LeadingAxes,
  residuals: tuple[jax.Array, jax.Array],
  d_y: jax.Array,
) -> tuple[jax.Array, None, None, None]:
  del lead  # a gradient lies where its input does
  kernel = dequantize(*residuals, d_y.dtype)
  gathered = gather_weight(kernel, axes, d_y.dtype)
  return jnp.einsum("abo,io->abi", d_y, gathered), None, None, None


quantized_product.defvjp(_quantized_forward, _quantized_backward)


def linear(
  in_width: int,
  out_width: int,
  *,
  axes: WeightAxes,
  bias: bool = True,
  variance: float = 1.0,
  dtype: str,
  rngs: nnx.Rngs,
) -> Linear:
  """Builds a linear layer with parameters drawn from N(0, variance / in).

  At the widths of the published decoders 1 / in is the variance of their
  standard deviation of 0.02; a tiny model trained from scratch needs the larger
  weights that its own width gives. Parameters are float32.

  Args:
    in_width: input channels.
    out_width: output channels.
    axes: logical axes of the kernel.
    bias: whether there is a bias.
    variance: of the kernel, times `in_width`.
    dtype: of the computation.
    rngs: streams of random numbers.
  """
  return Linear(
    in_width,
    out_width,
    axes=axes,
    use_bias=bias,
    dtype=jnp.dtype(dtype),
    kernel_init=nnx.initializers.variance_scaling(
      variance, "fan_in", "truncated_normal"
    ),
    rngs=rngs,
  )
