"""MemAug on this machine's CPU, beside the official computation in torch.

Both sides have the same random weights and inputs in float32, the same number
of threads, and alternate in one process, so that what else the machine does
slows both. Of each the fastest of several runs counts. One block is measured,
with a video's share of queries: 6 % of its memory tokens.

`official_block` is what the published PyTorch code computes: key and value
heads are repeated for the query heads that share them, torch's
`scaled_dot_product_attention` does the rest.
"""

import dataclasses
import pathlib
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from hourjax import command
from hourjax.models.config import DecoderConfig
from hourjax.models.memaug import MemAugBlock

if TYPE_CHECKING:
  import torch

_SHARE = 17 / 65 / 4  # queries of a memory token, by spatial x temporal
_EPS = 1e-5  # of the LayerNorms


@dataclasses.dataclass(frozen=True)
class Sizes:
  """Says what is measured.

  Attributes:
    width: channels of a token.
    heads: query heads.
    kv_heads: key and value heads.
    head_dim: channels of a head.
    memory: lengths of the memory, in tokens.
    repeats: runs of each side.
  """

  width: int = 256
  heads: int = 4
  kv_heads: int = 2
  head_dim: int = 64
  memory: tuple[int, ...] = (2_080, 8_320, 29_120, 64_480)
  repeats: int = 3


def measure_cpu(_: pathlib.Path, sizes: Sizes = Sizes()) -> dict[str, Any]:
  """Measures one block of MemAug, forward and with gradients.

  Args:
    sizes: of the block and its memory.

  Returns:
    For each length of the memory: seconds of both sides and their ratio, ours
    over official; and the largest differences between outputs and between
    gradients of the memory, relative to the largest number.

  Raises:
    UserError: torch is not installed.
  """
  with command.needing("eval"):
    import torch  # noqa: F401  # not among the requirements
  return {
    f"memory of {length}": _one_length(sizes, length) for length in sizes.memory
  }


def _one_length(sizes: Sizes, length: int) -> dict[str, Any]:
  """Measures one length of the memory."""
  import torch

  block = _block(sizes)
  graph, params = nnx.split(block)
  weights = _to_torch(block)
  rng = np.random.default_rng(0)
  queries = max(1, round(length * _SHARE))
  x, d_out, memory = (
    rng.standard_normal((1, n, sizes.width), np.float32)
    for n in (queries, queries, length)
  )
  place = np.sort(rng.choice(length, queries, replace=False))
  where = {
    "memory_position": jnp.arange(length, dtype=jnp.int32)[None],
    "position": jnp.asarray(place, jnp.int32)[None],
    "segment": jnp.ones((1, queries), jnp.int32),
    "memory_segment": jnp.ones((1, length), jnp.int32),
    "reads_segment": jnp.ones((1, queries), jnp.int32),
  }

  @jax.jit
  def ours(params: Any, x: jax.Array, memory: jax.Array) -> jax.Array:
    return nnx.merge(graph, params)(x, memory, **where)

  @jax.jit
  def our_gradients(
    params: Any, x: jax.Array, memory: jax.Array, d_out: jax.Array
  ) -> tuple[Any, jax.Array, jax.Array]:
    return jax.vjp(ours, params, x, memory)[1](d_out)

  arrays = params, jnp.asarray(x), jnp.asarray(memory)
  j_d_out = jnp.asarray(d_out)
  leaves = [*weights.values()]
  t_x, t_memory, t_d_out = map(torch.from_numpy, (x, memory, d_out))
  t_place = torch.from_numpy(place)

  def official() -> "torch.Tensor":
    with torch.no_grad():
      return official_block(weights, t_x, t_memory, t_place, sizes)

  def official_gradients() -> tuple["torch.Tensor", ...]:
    inputs = [t.detach().requires_grad_() for t in (*leaves, t_x, t_memory)]
    named = dict(zip(weights, inputs))
    out = official_block(named, inputs[-2], inputs[-1], t_place, sizes)
    return torch.autograd.grad(out, inputs, t_d_out)

  def gradients() -> tuple[Any, jax.Array, jax.Array]:
    return our_gradients(*arrays, j_d_out)

  return {
    "forward": _compare(lambda: ours(*arrays), official, sizes.repeats),
    "with gradients": _compare(gradients, official_gradients, sizes.repeats),
    "difference": _difference(ours(*arrays), official()),
    "difference of gradients": _difference(
      gradients()[2], official_gradients()[-1]
    ),
  }


def official_block(
  weights: dict[str, "torch.Tensor"],
  x: "torch.Tensor",
  memory: "torch.Tensor",
  place: "torch.Tensor",
  sizes: Sizes,
) -> "torch.Tensor":
  """Computes a block of MemAug as the official code does.

  Args:
    weights: by path, such as "self_attn/q/kernel"; kernels are [out, in].
    x: queries [1, T, D].
    memory: tokens [1, S, D].
    place: positions [T] of the queries; those of the memory are 0, 1, 2, ...
    sizes: of heads.
  """
  import torch
  import torch.nn.functional as F

  def product(name: str, x: "torch.Tensor") -> "torch.Tensor":
    return F.linear(x, weights[f"{name}/kernel"], weights[f"{name}/bias"])

  def norm(name: str, x: "torch.Tensor") -> "torch.Tensor":
    scale, bias = weights[f"{name}/scale"], weights[f"{name}/bias"]
    return F.layer_norm(x, x.shape[-1:], scale, bias, _EPS)

  def heads(
    name: str, x: "torch.Tensor", place: "torch.Tensor | None" = None
  ) -> "torch.Tensor":
    """Returns heads [1, heads, N, C], rotated if places are given."""
    split = product(name, x).unflatten(-1, (-1, sizes.head_dim)).transpose(1, 2)
    if place is None:
      return split
    rotary = sizes.head_dim // 2
    exponent = torch.arange(0, rotary, 2, dtype=torch.float32) / rotary
    phase = place.float()[:, None] * (1.0 / 1e6**exponent)
    cos, sin = phase.cos().repeat(1, 2), phase.sin().repeat(1, 2)
    turned, rest = split[..., :rotary], split[..., rotary:]
    first, second = turned.chunk(2, dim=-1)
    half = torch.cat([-second, first], dim=-1)
    return torch.cat([turned * cos + half * sin, rest], dim=-1)

  def attend(
    name: str, x: "torch.Tensor", m: "torch.Tensor", m_place: "torch.Tensor"
  ) -> "torch.Tensor":
    q = heads(f"{name}/q", x, place)
    groups = sizes.heads // sizes.kv_heads
    k, v = (
      t.repeat_interleave(groups, dim=1)
      for t in (heads(f"{name}/k", m, m_place), heads(f"{name}/v", m))
    )
    out = F.scaled_dot_product_attention(q, k, v)
    return product(f"{name}/o", out.transpose(1, 2).flatten(2))

  x = norm("norm1", x + attend("self_attn", x, x, place))
  places = torch.arange(memory.shape[1])
  x = norm("norm2", x + attend("cross_attn", x, memory, places))
  return norm("norm3", x + product("fc2", F.gelu(product("fc1", x))))


def _block(sizes: Sizes) -> MemAugBlock:
  """Draws a block; biases and norms too, which begin as zeros and ones."""
  decoder = DecoderConfig(
    vocab=1,
    width=sizes.width,
    layers=1,
    heads=sizes.heads,
    kv_heads=sizes.kv_heads,
    head_dim=sizes.head_dim,
    mlp=1,
    tied=True,
  )
  block = MemAugBlock(decoder, "float32", nnx.Rngs(0))
  rng = np.random.default_rng(1)
  for _, param in nnx.iter_graph(block):
    if isinstance(param, nnx.Param) and param[...].ndim == 1:
      noise = rng.standard_normal(param[...].shape, np.float32)
      param[...] = param[...] + 0.1 * noise
  return block


def _to_torch(block: MemAugBlock) -> dict[str, "torch.Tensor"]:
  """Returns the block's parameters by path, with kernels [out, in]."""
  import torch

  flat = nnx.to_flat_state(nnx.state(block, nnx.Param))
  return {
    "/".join(map(str, path)): torch.tensor(np.asarray(param[...]).T)
    for path, param in flat
  }


def _compare(
  ours: Callable[[], Any], official: Callable[[], Any], repeats: int
) -> dict[str, float]:
  """Returns the fastest run of each side in seconds, and their ratio."""
  best = [float("inf")] * 2
  for run in range(repeats + 1):
    for side, function in enumerate((ours, official)):
      started = time.perf_counter()
      jax.block_until_ready(function())
      if run:  # the first compiles
        best[side] = min(best[side], time.perf_counter() - started)
  return {
    "ours, s": round(best[0], 4),
    "official, s": round(best[1], 4),
    "ratio": round(best[0] / best[1], 2),
  }


def _difference(ours: jax.Array, official: "torch.Tensor") -> float:
  """Returns the largest difference over the largest number."""
  reference = official.numpy()
  error = np.abs(np.asarray(ours) - reference).max() / np.abs(reference).max()
  return float(f"{error:.1e}")
