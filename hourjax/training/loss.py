"""Cross entropy over label tokens."""

from jaxtyping import Array, Float, Int

from hourjax.batch import IGNORE, Batch
from hourjax.models.hourllava import HourLLaVA
from hourjax.parallel import vocabulary


def loss_sums(
  model: HourLLaVA, batch: Batch
) -> tuple[Float[Array, ""], Int[Array, ""]]:
  """Summed cross entropy of a batch and the number of label tokens.

  Sums, not means: gradients of several micro-batches can then be added and
  divided once, so every label token weighs the same wherever it was packed.
  """
  hidden = model(batch)
  loss = vocabulary.cross_entropy(hidden, model.words, batch.target)
  return loss, (batch.target != IGNORE).sum()


def token_losses(
  model: HourLLaVA, hidden: Float[Array, "B L D"], target: Int[Array, "B L"]
) -> Float[Array, "B L"]:
  """Cross entropy of each position, 0 where nothing is trained; float32."""
  return vocabulary.token_losses(hidden, model.words, target)
