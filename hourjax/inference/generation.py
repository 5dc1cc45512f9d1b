"""Greedy answers for packed rows of prompts."""

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from hourjax.batch import Batch
from hourjax.models.config import ModelConfig
from hourjax.models.params import with_params


@functools.partial(jax.jit, static_argnames=("config", "new_tokens"))
def generate(
  params: Mapping[str, jax.Array],
  batch: Batch,
  last: Int[Array, "B A"],
  *,
  config: ModelConfig,
  new_tokens: int,
) -> Int[Array, "B A n"]:
  """Writes `new_tokens` greedy tokens after each prompt of each row.

  MemAug runs once; the decoder runs over the whole row for every token, which
  suits short answers. Samples must have been laid out with `prompt_only` and
  an answer room of at least `new_tokens`.

  Args:
    params: of the model, by path.
    batch: rows of prompts.
    last: decoder index of the last prompt token of each sample; -1 is none.
    config: of the model.
    new_tokens: tokens to generate; nothing stops earlier.

  Returns:
    Token ids; those of missing samples mean nothing.
  """
  model = with_params(config, params)
  embeddings = model.embeddings(batch)
  at = jnp.maximum(last, 0)

  def write(embeddings, n):
    hidden = model.decode(embeddings, batch)
    here = jnp.take_along_axis(hidden, (at + n)[..., None], axis=1)
    token = jnp.argmax(model.logits(here), axis=-1).astype(jnp.int32)
    place = jnp.where(last < 0, embeddings.shape[1], at + n + 1)
    embeddings = jax.vmap(lambda e, i, x: e.at[i].set(x, mode="drop"))(
      embeddings, place, model.decoder.embed(token)
    )
    return embeddings, token

  _, tokens = jax.lax.scan(write, embeddings, jnp.arange(new_tokens))
  return tokens.transpose(1, 2, 0)
