"""Stage 0: frames and captions are brought together by SigLIP's sigmoid loss.

A tower that is drawn at random gives features in which nothing can be found by
its name. Here the tower, the projector and the word embeddings learn from
single frames with short captions. A frame's projected token t and a text's mean
word embedding e, both of length 1, have the logit

    z = exp(scale) <t, e> + shift

and the loss is -log sigmoid(z) if the text is a caption of the frame, and
-log sigmoid(-z) if not, summed over the texts of the batch (SigLIP, arXiv
2303.15343, equation 1, with several captions a frame). The text side is the
decoder's own embedding, and every pooled token of a frame has to match by
itself. So a memory token starts out near the words of what it shows: MemAug can
find it by the words of a question, and the decoder's tied head can name it.

A text counts in both forms that a byte-level tokenizer gives it, at the start
of a line and after a space, so that both mean the same.
"""

import contextlib
import dataclasses
import functools
import json
import pathlib
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, Num

from hourjax import progress
from hourjax.alignment.captions import CaptionedFrames
from hourjax.atomic_file import write_file
from hourjax.data.tokenizer import Tokenizer
from hourjax.models.config import ModelConfig
from hourjax.models.params import with_params
from hourjax.models.siglip import pool_frames
from hourjax.training.checkpoint import Checkpoints
from hourjax.training.config import Experiment
from hourjax.training.optimizer import schedule
from hourjax.training.train_state import TrainState, initial_params

EMBEDDING = "decoder/embedding"
TRAINED = ("vision/", "projector/", EMBEDDING)
# SigLIP starts from 10 and -10 with thousands of texts a frame, of which one is
# right; here a few of some dozens are.
_SCALE, _SHIFT = np.log(10.0), -3.0
Params = dict[str, jax.Array]


class Texts(NamedTuple):
  """Holds the distinct texts of all captions.

  Attributes:
    tokens: [2, N, M] ids of each text at the start of a line and after a space.
    weight: float32 [2, N, M], 1 / number of a text's tokens; 0 on padding.
  """

  tokens: Int[np.ndarray, "2 N M"]
  weight: Float[np.ndarray, "2 N M"]


def encode_texts(texts: Sequence[str], tokenizer: Tokenizer) -> Texts:
  """Encodes texts in both forms."""
  ids = [[tokenizer.encode(f + text) for text in texts] for f in ("", " ")]
  longest = max(len(one) for form in ids for one in form)
  tokens = np.zeros((2, len(texts), longest), np.int32)
  weight = np.zeros(tokens.shape, np.float32)
  for i, form in enumerate(ids):
    for j, one in enumerate(form):
      tokens[i, j, : len(one)] = one
      weight[i, j, : len(one)] = 1 / len(one)
  return Texts(tokens, weight)


def text_logits(
  params: Params,
  pixels: Num[Array, "I h w 3"],
  texts: Texts,
  config: ModelConfig,
) -> Float[Array, "2 I P N"]:
  """Computes the logits of each pooled token with each text, in both forms.

  Args:
    params: of the model, with "scale" and "shift".
    pixels: of frames.
    texts: to compare with.
    config: of the model.
  """
  model = with_params(config, params)
  tokens = pool_frames(model.encode(pixels), config.pool_side)
  tokens = _unit(model.projector(tokens))
  words = params[EMBEDDING][texts.tokens]
  means = _unit(jnp.einsum("fnmd,fnm->fnd", words, texts.weight))
  product = jnp.einsum("ipd,fnd->fipn", tokens, means)
  return jnp.exp(params["scale"]) * product + params["shift"]


def sigmoid_loss(
  logits: Float[Array, "2 I P N"], shown: Num[Array, "I N"]
) -> Float[Array, ""]:
  """Computes the loss summed over texts, its mean over forms and tokens."""
  sign = 2.0 * shown - 1.0
  losses = -jax.nn.log_sigmoid(logits * sign[None, :, None])
  return losses.sum(-1).mean()


def ranked_share(
  logits: Float[np.ndarray, "I P N"], shown: Num[np.ndarray, "I N"]
) -> float:
  """Returns the share of captions among a token's k texts of highest logit.

  k is the number of the frame's captions, so 1 says that every token names all
  of what its frame shows and nothing else.
  """
  order = np.argsort(-logits, axis=-1)
  rank = np.argsort(order, axis=-1)
  right = (rank < shown.sum(-1)[:, None, None]) & (shown[:, None] > 0)
  return float(right.sum() / (shown.sum() * logits.shape[1]))


def _unit(x: Float[Array, "... D"]) -> Float[Array, "... D"]:
  return x * jax.lax.rsqrt(jnp.square(x).sum(-1, keepdims=True) + 1e-12)


def train_alignment(
  experiment: Experiment,
  data: CaptionedFrames,
  tokenizer: Tokenizer,
  log: Any,
) -> tuple[TrainState, dict[str, float]]:
  """Trains tower, projector and word embeddings on captioned frames.

  `batch_rows` is the number of frames in a batch; the peak learning rates of
  tower, projector and decoder are those of the configuration.

  Args:
    experiment: of the run.
    data: frames and captions.
    tokenizer: of the model.
    log: called with a dict of numbers every `log_every` steps.

  Returns:
    The state, with all parameters of the model, and numbers about frames that
    were left out of training.
  """
  config, rates = experiment.model, experiment.optimizer
  texts = encode_texts(data.texts, tokenizer)
  params = initial_params(experiment)
  params |= {"scale": jnp.float32(_SCALE), "shift": jnp.float32(_SHIFT)}
  trained = {
    path: value
    for path, value in params.items()
    if path.startswith((*TRAINED, "scale", "shift"))
  }
  frozen = {path: v for path, v in params.items() if path not in trained}
  peak = {"vision": rates.vision, "projector": rates.projector}
  labels = {path: path.split("/")[0] for path in trained}
  optimizer = optax.chain(
    optax.clip_by_global_norm(rates.clip or 1e9),
    optax.partition(
      {
        name: optax.adam(
          schedule(
            peak.get(name, rates.decoder), experiment.steps, rates.warmup
          ),
          b1=rates.b1,
          b2=rates.b2,
          eps=rates.eps,
        )
        for name in set(labels.values())
      },
      labels,
    ),
  )

  @functools.partial(jax.jit, donate_argnums=(0, 1))
  def step(
    trained: Params, state: Any, pixels: Array, shown: Array
  ) -> tuple[Params, Any, Array]:
    def loss(trained: Params) -> Array:
      logits = text_logits({**frozen, **trained}, pixels, texts, config)
      return sigmoid_loss(logits, shown)

    value, grads = jax.value_and_grad(loss)(trained)
    updates, state = optimizer.update(grads, state, trained)
    new: Any = optax.apply_updates(trained, updates)
    return new, state, value

  state = jax.jit(optimizer.init)(trained)
  rng = np.random.default_rng(experiment.seed)
  count = data.frames.shape[0] - data.held_out
  losses, began = [], time.monotonic()
  with progress.bar(experiment.steps, unit="step", desc="align") as bar:
    for number in range(1, experiment.steps + 1):
      chosen = rng.integers(count, size=experiment.batch_rows)
      trained, state, value = step(
        trained, state, data.frames[chosen], data.shown[chosen]
      )
      losses.append(value)
      bar.update()
      if number % experiment.log_every == 0 or number == experiment.steps:
        mean = float(np.mean(jax.device_get(losses)))
        log({"step": number, "loss": mean})
        bar.set_postfix_str(f"loss {mean:.3f}")
        losses = []
  params = {**frozen, **trained}
  params |= _as_long_as_words(params, data.frames[:256], texts, config)
  ranked = jax.jit(functools.partial(text_logits, config=config))
  left_out = np.arange(count, len(data.frames))
  shares = [
    ranked_share(np.asarray(ranked(params, data.frames[part], texts))[0],
                 data.shown[part])
    for part in np.array_split(left_out, max(len(left_out) // 256, 1))
    if len(part)
  ]  # fmt: skip
  numbers = {
    "named": float(np.mean(shares)) if shares else float("nan"),
    "held_out_frames": len(left_out),
    "seconds": time.monotonic() - began,
  }
  params = {p: v for p, v in params.items() if p not in ("scale", "shift")}
  step_count = jnp.asarray(experiment.steps, jnp.int32)
  return TrainState(step_count, params, {}, ()), numbers


def _as_long_as_words(
  params: Params, pixels: np.ndarray, texts: Texts, config: ModelConfig
) -> Params:
  """Returns the projector's last layer scaled to the length of the words.

  The loss compares directions only, so tokens grow long, and what the layers
  of a decoder add to a token that is many times as long hardly turns it.

  Args:
    params: of the model.
    pixels: of some frames.
    texts: all captions.
    config: of the model.
  """
  frames = jnp.asarray(pixels)

  @jax.jit
  def ratio(params: Params) -> Array:
    model = with_params(config, params)
    tokens = pool_frames(model.encode(frames), config.pool_side)
    words = params[EMBEDDING][texts.tokens]
    lengths = jnp.linalg.norm(words, axis=-1)
    used = texts.weight > 0
    mean = (lengths * used).sum() / used.sum()
    return mean / jnp.linalg.norm(model.projector(tokens), axis=-1).mean()

  scale = ratio(params)
  last = ("projector/fc2/kernel", "projector/fc2/bias")
  return {path: params[path] * scale for path in last}


def save_alignment(
  experiment: Experiment, state: TrainState, workdir: pathlib.Path
) -> None:
  """Writes a workdir that training can start from and extraction can read.

  Args:
    experiment: of the run.
    state: that `train_alignment` returned.
    workdir: gets config.json and checkpoints/.
  """
  config = dataclasses.asdict(experiment)
  text = json.dumps(config, indent=2) + "\n"
  write_file(workdir / "config.json", text)
  checkpoints = Checkpoints(workdir, on_error="stop")
  with contextlib.closing(checkpoints):
    checkpoints.save(state, 0, "", config)
    checkpoints.finish()
