"""LoRA: adapters of linear layers whose kernels stay as they are.

    y = x W + b + (alpha / r) (dropout(x) A) B          (arXiv 2106.09685)

An adapter is a group of parameters beside the kernel W of its layer, stacked
as that is:

    decoder/layers/layers/attn/q/kernel        [layers, i, o]  frozen
    decoder/layers/layers/attn/q/lora_a        [layers, i, r]  trained
    decoder/layers/layers/attn/q/lora_b        [layers, r, o]  trained, from 0
    decoder/layers/layers/attn/q/lora_scale    [layers]        alpha / r

With `dora` there is `lora_magnitude` [layers, o] too, the length of each column
of W at first (DoRA, arXiv 2402.09353); with dropout, `lora_seed` [layers]. A
layer has an adapter if its parameters are there: the model needs no other word
of it (`params.with_params`).
"""

import dataclasses
import fnmatch
import zlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32

from hourjax.models import quantization

Base = Literal["float32", "bfloat16", "int8", "int4", "nf4"]
# Parameters of an adapter; the first ones are trained.
A, B, MAGNITUDE = TRAINED = ("lora_a", "lora_b", "lora_magnitude")
SCALE, SEED = FIXED = ("lora_scale", "lora_seed")
# Components that have linear layers for adapters.
ADAPTED = ("projector", "memaug", "decoder")
# Words of PEFT and of Hugging Face's Qwen2 -> patterns of ours.
ALIASES = {
  "all-linear": "*",
  **{f"{name}_proj": f"decoder/attn/{name}" for name in "qkvo"},
  **{f"{name}_proj": f"decoder/{name}" for name in ("gate", "up", "down")},
}


@dataclasses.dataclass(frozen=True)
class LoraConfig:
  """Says which linear layers get adapters, and what they are added to.

  Attributes:
    rank: of the adapters; 0 trains without any.
    alpha: their output is multiplied by alpha / rank.
    targets: patterns of linear layers, separated by commas: `decoder/*`,
      `memaug/cross_attn/*`, `projector/fc1`, `*/q`; or the words of PEFT,
      `all-linear` or `q_proj`. Layers of components whose learning rate is 0
      have none.
    dropout: share of the inputs of an adapter that are set to 0.
    dora: whether the length of each column of a kernel is trained apart from
      its direction.
    base: how the frozen kernels are stored: "float32", "bfloat16", or in 8 or
      4 bits (`models.quantization`), which stand for QLoRA.
  """

  rank: int = 0
  alpha: float = 32.0
  targets: str = "all-linear"
  dropout: float = 0.0
  dora: bool = False
  base: Base = "bfloat16"


def layer_name(path: str) -> str:
  """Returns the name of a layer, as targets name it, of its path.

  `decoder/layers/layers/attn/q` is decoder/attn/q, `memaug/layers/fc1` is
  memaug/fc1.
  """
  return "/".join(part for part in path.split("/") if part != "layers")


def linear_layers(shapes: Iterable[str]) -> Iterator[str]:
  """Yields the paths of linear layers that may have adapters.

  The vision tower has none, nor has the output embedding.

  Args:
    shapes: paths of a model's parameters.
  """
  for path in shapes:
    layer, _, last = path.rpartition("/")
    adapted = layer.split("/")[0] in ADAPTED and layer != "decoder/head"
    if last == "kernel" and adapted:
      yield layer


def target_layers(config: LoraConfig, shapes: Iterable[str]) -> list[str]:
  """Returns the paths of the layers that the targets name, in their order.

  Args:
    config: with the targets.
    shapes: paths of a model's parameters.

  Raises:
    ValueError: a pattern matches no layer.
  """
  layers = {path: layer_name(path) for path in linear_layers(shapes)}
  patterns = [text.strip() for text in config.targets.split(",")]
  wanted = [ALIASES.get(text, text) for text in patterns]
  for text, pattern in zip(patterns, wanted):
    if not fnmatch.filter(layers.values(), pattern):
      raise ValueError(
        f"config.lora.targets has {text!r}, which is none of the model's linear"
        f" layers {', '.join(layers.values())}; give one of them, a pattern"
        f" such as decoder/*, or {', '.join(ALIASES)}"
      )
  return [
    path
    for path, name in layers.items()
    if any(fnmatch.fnmatchcase(name, pattern) for pattern in wanted)
  ]


def adapter_shapes(
  config: LoraConfig,
  layers: Iterable[str],
  shapes: Mapping[str, tuple[int, ...]],
) -> dict[str, jax.ShapeDtypeStruct]:
  """Returns shapes and dtypes of the adapters' parameters by path.

  Args:
    config: of the adapters.
    layers: paths of the layers that have one.
    shapes: of the model's parameters by path.

  Raises:
    ValueError: the rank is as large as a kernel, which is no saving.
  """
  found = {}
  for path in layers:
    *stack, inputs, outputs = shapes[f"{path}/kernel"]
    if config.rank > min(inputs, outputs):
      raise ValueError(
        f"config.lora.rank is {config.rank}, and {layer_name(path)} has a"
        f" kernel of {inputs} x {outputs}, whose rank is at most"
        f" {min(inputs, outputs)}; lower the rank, or leave this layer out of"
        " config.lora.targets"
      )
    own: dict[str, tuple[tuple[int, ...], Any]] = {
      A: ((*stack, inputs, config.rank), jnp.float32),
      B: ((*stack, config.rank, outputs), jnp.float32),
      SCALE: (tuple(stack), jnp.float32),
    }
    if config.dora:
      own[MAGNITUDE] = (*stack, outputs), jnp.float32
    if config.dropout:
      own[SEED] = tuple(stack), jnp.uint32
    for name, (shape, dtype) in own.items():
      found[f"{path}/{name}"] = jax.ShapeDtypeStruct(shape, dtype)
  return found


def added_axes(
  path: str, axes: Mapping[str, tuple[str | None, ...]]
) -> tuple[str | None, ...]:
  """Returns the logical axes of a parameter that is not the model's own.

  It is one of an adapter, or the scales of a quantized kernel, which are small
  and split only as their columns are.

  Args:
    path: of the parameter.
    axes: of the model's parameters, by path.
  """
  layer, _, name = path.rpartition("/")
  *stack, inputs, outputs = axes[f"{layer}/kernel"]
  last: dict[str, tuple[str | None, ...]] = {
    A: (inputs, None),
    B: (None, outputs),
    "kernel_scale": (None, outputs),
    MAGNITUDE: (outputs if outputs in ("heads", "mlp") else None,),
  }
  return (*stack, *last.get(name, ()))


def draw(
  path: str,
  like: jax.ShapeDtypeStruct,
  config: LoraConfig,
  seed: int,
) -> jax.Array:
  """Returns a parameter of a fresh adapter, all but `lora_magnitude`.

  As PEFT draws them: A uniformly within 1 / sqrt(inputs), B zero, so that a
  fresh adapter changes nothing.

  Args:
    path: of the parameter.
    like: its shape and dtype.
    config: of the adapters.
    seed: of the random numbers.
  """
  layer, _, name = path.rpartition("/")
  number = zlib.crc32(layer.encode())
  if name == A:
    key = jax.random.fold_in(jax.random.key(seed), number)
    bound = like.shape[-2] ** -0.5
    return jax.random.uniform(key, like.shape, like.dtype, -bound, bound)
  if name == SCALE:
    return jnp.full(like.shape, config.alpha / config.rank, like.dtype)
  if name == SEED:
    # Stacked layers have numbers one after the other.
    first = jnp.uint32(number)
    return (first + jnp.arange(like.size, dtype=jnp.uint32)).reshape(like.shape)
  return jnp.zeros(like.shape, like.dtype)


def column_norms(kernel: jax.Array) -> jax.Array:
  """Returns the length of each column of a kernel `[..., i, o]`, float32."""
  return jnp.linalg.norm(kernel.astype(jnp.float32), axis=-2)


def merge(
  kernel: Float32[Array, "*layers i o"], adapter: Mapping[str, jax.Array]
) -> Float32[Array, "*layers i o"]:
  """Returns the kernel of a layer together with its adapter.

  Args:
    kernel: of the layer, not quantized.
    adapter: its parameters by name, such as "lora_a".
  """
  scale = adapter[SCALE][..., None, None]
  low_rank = jnp.matmul(adapter[A], adapter[B], precision="highest")
  whole = kernel + scale * low_rank
  if MAGNITUDE in adapter:
    ratio = adapter[MAGNITUDE] / column_norms(whole)
    whole = whole * ratio[..., None, :]
  return whole


def complete(
  params: Mapping[str, jax.Array], config: LoraConfig
) -> dict[str, dict[str, jax.Array]]:
  """Returns adapters layer by layer, with the scale of their output.

  Args:
    params: trained parameters of adapters by path.
    config: of the adapters.

  Returns:
    For the path of each layer, its parameters by name.
  """
  adapters: dict[str, dict[str, jax.Array]] = {}
  for path, value in params.items():
    layer, _, name = path.rpartition("/")
    adapters.setdefault(layer, {})[name] = value
  for own in adapters.values():
    stack = own[A].shape[:-2]
    own[SCALE] = jnp.full(stack, config.alpha / config.rank, jnp.float32)
  return adapters


def stored_shapes(
  config: LoraConfig, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, jax.ShapeDtypeStruct]:
  """Returns shapes and dtypes of a frozen model, as its base stores it.

  Kernels and embeddings are narrow, as in inference; norms and biases are
  float32. What 4 bits do not divide, and the tower, is bfloat16.

  Args:
    config: with the base.
    shapes: of the model's parameters by path.

  Returns:
    By path, with `kernel_scale` beside each quantized kernel.
  """
  found = {}
  quantized = set(linear_layers(shapes))
  for path, shape in shapes.items():
    layer, _, name = path.rpartition("/")
    if name not in ("kernel", "embedding") or config.base == "float32":
      found[path] = jax.ShapeDtypeStruct(shape, jnp.float32)
    elif (
      layer in quantized
      and config.base != "bfloat16"
      and quantization.divides(shape, config.base)
    ):
      codes, scale = quantization.quantized_shapes(shape, config.base)
      found[path], found[f"{path}_scale"] = codes, scale
    else:
      found[path] = jax.ShapeDtypeStruct(shape, jnp.bfloat16)
  return found
