"""Sampling of the next token: the likeliest one, or one drawn at random."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from hourjax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Sampling:
  """Describes how tokens are chosen.

  Attributes:
    temperature: 0 takes the likeliest token. Above 0, logits are divided by it
      and a token is drawn.
    top_p: tokens are drawn from the smallest set of likeliest tokens whose
      probabilities add up to this (nucleus sampling, arXiv 1904.09751). 1
      draws from all tokens.
    seed: seed of the draws. What is drawn for a prompt depends on the seed and
      on the prompt's place in its list, not on the other prompts of its batch.
  """

  temperature: float = 0.0
  top_p: float = 1.0
  seed: int = 0

  def __post_init__(self) -> None:
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


class RowSampling(NamedTuple):
  """Holds `Sampling` as device arrays, with a random key for each row."""

  temperature: Float[Array, ""]
  top_p: Float[Array, ""]
  keys: Key[Array, "N"]


def row_sampling(sampling: Sampling, first: int, rows: int) -> RowSampling:
  """Returns the sampling of prompts number `first` to `first + rows - 1`."""
  key = jax.random.key(sampling.seed)
  fold = jax.vmap(jax.random.fold_in, in_axes=(None, 0))
  return RowSampling(
    jnp.float32(sampling.temperature),
    jnp.float32(sampling.top_p),
    fold(key, first + jnp.arange(rows)),
  )


def sample(
  logits: Float[Array, "N V"], sampling: RowSampling, count: Int[Array, "N"]
) -> Int[Array, "N"]:
  """Chooses the next token of each row.

  Args:
    logits: of the next token.
    sampling: how to choose, with a random key for each row.
    count: number of tokens that the row has so far. It is folded into the
      row's key, so that each token has a draw of its own.

  Returns:
    Tokens, int32.
  """

  def drawn() -> Array:
    scaled = logits / sampling.temperature
    order = jnp.argsort(-scaled, axis=1, stable=True)
    ranked = jnp.take_along_axis(scaled, order, axis=1)
    probability = jax.nn.softmax(ranked, axis=1)
    # A token stays if the likelier ones leave something of top_p; so the
    # likeliest one always stays.
    likelier = jnp.cumsum(probability, axis=1) - probability
    ranked = jnp.where(likelier < sampling.top_p, ranked, -jnp.inf)
    keys = jax.vmap(jax.random.fold_in)(sampling.keys, count)
    rank = jax.vmap(jax.random.categorical)(keys, ranked)
    return jnp.take_along_axis(order, rank[:, None], axis=1)[:, 0]

  def likeliest() -> Array:
    return jnp.argmax(logits, axis=1)

  chosen = jax.lax.cond(sampling.temperature > 0, drawn, likeliest)
  return chosen.astype(jnp.int32)
