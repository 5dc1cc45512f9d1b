"""Cross entropy over label tokens."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from hourjax.batch import IGNORE, Batch
from hourjax.models.hourllava import HourLLaVA

_CHUNK = 1024  # positions whose logits exist at a time


def loss_sums(
  model: HourLLaVA, batch: Batch
) -> tuple[Float[Array, ""], Int[Array, ""]]:
  """Summed cross entropy of a batch and the number of label tokens.

  Sums, not means: gradients of several micro-batches can then be added and
  divided once, so every label token weighs the same wherever it was packed.
  """
  losses = token_losses(model, model(batch), batch.target)
  return losses.sum(), (batch.target != IGNORE).sum()


def token_losses(
  model: HourLLaVA, hidden: Float[Array, "B L D"], target: Int[Array, "B L"]
) -> Float[Array, "B L"]:
  """Cross entropy of each position, 0 where nothing is trained; float32.

  Positions are taken in chunks whose logits are computed again in the
  backward pass: a matrix of B L x N never exists.
  """
  flat = hidden.reshape(-1, hidden.shape[-1])
  labels = target.reshape(-1)
  chunk = min(_CHUNK, flat.shape[0])
  extra = -flat.shape[0] % chunk
  flat = jnp.pad(flat, ((0, extra), (0, 0)))
  labels = jnp.pad(labels, (0, extra), constant_values=IGNORE)

  @jax.checkpoint
  def of_chunk(piece):
    hidden, label = piece
    logits = model.logits(hidden)
    top = jax.nn.logsumexp(logits, axis=-1)
    own = jnp.take_along_axis(logits, jnp.maximum(label, 0)[:, None], axis=-1)
    return jnp.where(label == IGNORE, 0.0, top - own[:, 0])

  pieces = (flat.reshape(-1, chunk, flat.shape[-1]), labels.reshape(-1, chunk))
  losses = jax.lax.map(of_chunk, pieces).reshape(-1)
  return losses[: target.size].reshape(target.shape)
