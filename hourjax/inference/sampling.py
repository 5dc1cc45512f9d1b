"""Which token comes next: the likeliest, or one drawn."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from hourjax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Sampling:
  """How tokens are chosen.

  Attributes:
    temperature: 0 takes the likeliest token; above, logits are divided by it
      and a token is drawn.
    top_p: only the likeliest tokens that together have this probability are
      drawn from (nucleus sampling, arXiv 1904.09751); 1 is all.
    seed: of the draws. What is drawn for a prompt depends on the seed and on
      the prompt's place in its list, not on what else is answered with it.
  """

  temperature: float = 0.0
  top_p: float = 1.0
  seed: int = 0

  def __post_init__(self):
    if not 0 <= self.temperature < float("inf"):
      raise UserError(
        f"temperature is {self.temperature}; it must be 0 (the likeliest"
        " token) or more"
      )
    if not 0 < self.top_p <= 1:
      raise UserError(f"top_p is {self.top_p}; it must be above 0, at most 1")
    if not 0 <= self.seed < 2**32:
      raise UserError(
        f"seed is {self.seed}; it must be 0 or more, below 2^32 = {2**32}"
      )


GREEDY = Sampling()


class Draw(NamedTuple):
  """`Sampling` on the devices, with a key for each row."""

  temperature: Float[Array, ""]
  top_p: Float[Array, ""]
  keys: Key[Array, "N"]


def draws(sampling: Sampling, first: int, rows: int) -> Draw:
  """For prompts number `first` to first + rows - 1."""
  key = jax.random.key(sampling.seed)
  fold = jax.vmap(jax.random.fold_in, in_axes=(None, 0))
  return Draw(
    jnp.float32(sampling.temperature),
    jnp.float32(sampling.top_p),
    fold(key, first + jnp.arange(rows)),
  )


def draw(
  logits: Float[Array, "N V"], how: Draw, count: Int[Array, "N"]
) -> Int[Array, "N"]:
  """A token for each row; `count` tells its draws apart from earlier ones."""

  def drawn():
    scaled = logits / how.temperature
    order = jnp.argsort(-scaled, axis=1, stable=True)
    ranked = jnp.take_along_axis(scaled, order, axis=1)
    share = jax.nn.softmax(ranked, axis=1)
    # The likeliest always stays.
    before = jnp.cumsum(share, axis=1) - share
    ranked = jnp.where(before < how.top_p, ranked, -jnp.inf)
    keys = jax.vmap(jax.random.fold_in)(how.keys, count)
    rank = jax.vmap(jax.random.categorical)(keys, ranked)
    return jnp.take_along_axis(order, rank[:, None], axis=1)[:, 0]

  def likeliest():
    return jnp.argmax(logits, axis=1)

  chosen = jax.lax.cond(how.temperature > 0, drawn, likeliest)
  return chosen.astype(jnp.int32)
