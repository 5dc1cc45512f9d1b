"""A tiny model with random weights, and its answers without caches."""

import dataclasses
import functools
import pathlib

import jax
import ml_dtypes
import numpy as np

from hourjax.data.demo.tokenizer import MARKUP, write_tokenizer
from hourjax.data.layout import Layout
from hourjax.data.records.record import Turn
from hourjax.data.rows import (
  RowSpec,
  Sample,
  Size,
  Visual,
  build_row,
  stack_rows,
)
from hourjax.data.tokenizer import Tokenizer
from hourjax.inference.chat_session import ChatSession
from hourjax.inference.engine import rounded, row_spec
from hourjax.inference.memory import Memory
from hourjax.inference.model import Model
from hourjax.inference.prompts import Rules
from hourjax.inference.steps import DecodeState
from hourjax.models.config import TINY, ModelConfig, VisionConfig
from hourjax.models.params import with_params
from hourjax.parallel.mesh import MeshConfig, make_mesh
from tests.drawn_params import draw_params

CONFIG = dataclasses.replace(
  TINY,
  vision=VisionConfig(
    image_size=8, patch_size=2, width=24, layers=1, heads=2, mlp=32
  ),
  decoder=dataclasses.replace(TINY.decoder, vocab=640),
  pool_side=4,
)
SHAPE = (CONFIG.pool_side**2, CONFIG.vision.width)
QUESTIONS = ["Who?", "What is shown on the card in the garden?", "Why so late?"]


def tokenizer(folder: pathlib.Path) -> Tokenizer:
  """Writes and reads a tokenizer of few words."""
  write_tokenizer(folder, [*MARKUP, *QUESTIONS])
  return Tokenizer.from_folder(folder)


def tiny(
  folder: pathlib.Path,
  mesh: MeshConfig | None = None,
  config: ModelConfig = CONFIG,
  **rules,
) -> Model:
  """Makes a tiny model.

  Its weights are larger than training draws them, so that answers depend on
  the question.
  """
  params = draw_params(config, 3)
  params = {
    path: value * np.float32(3 if path.endswith("kernel") else 1)
    for path, value in params.items()
  }
  mesh = mesh or MeshConfig(fsdp=1)
  count = mesh.seq * mesh.tensor
  return Model(
    params,
    config,
    tokenizer(folder),
    name="tiny",
    rules=Rules(**rules),
    mesh=make_mesh(mesh, jax.devices()[:count]),
  )


def features(frames: int = 150, seed: int = 0) -> np.ndarray:
  """Draws features [F, Q, V]."""
  drawn = np.random.default_rng(seed).normal(size=(frames, *SHAPE))
  return drawn.astype(ml_dtypes.bfloat16)


def layout_of(memory: Memory, turns: list[Turn]) -> Layout:
  """Lays out a prompt about a memory."""
  return memory._answering.layout(turns, 1)


@functools.partial(jax.jit, static_argnames="config")
def _logits(params, batch, config):
  model = with_params(config, params)
  return model.logits(model(batch))


def slow_logits(
  model: Model,
  layout: Layout,
  visual: np.ndarray | None,
  answer: list[int],
  kind: Visual = "features",
) -> np.ndarray:
  """Computes logits [n + 1, N] after a prompt and after each answer token.

  The row runs through the model as in training, without caches.
  """
  answer = np.asarray(answer, np.int32)
  minus = np.full(len(answer), -1, np.int32)
  layout = dataclasses.replace(
    layout,
    decoder_token=np.append(layout.decoder_token, answer),
    decoder_source=np.append(layout.decoder_source, minus),
    labels=np.append(layout.labels, minus),
  )
  sample = Sample("slow", layout, kind, visual)
  length = len(layout.decoder_token)
  batch = stack_rows([build_row([sample], _padded_spec(sample.size))])
  logits = _logits(model.engine.params, batch, config=model.config)
  return np.asarray(logits)[0, length - len(answer) - 1 : length]


def _padded_spec(size: Size) -> RowSpec:
  """Returns capacities of which there are few, so that few are compiled."""
  capacity = {
    name: rounded(count, 1 if name in ("frames", "tiles") else 128)
    for name, count in dataclasses.asdict(size).items()
  }
  capacity["features"] = rounded(size.features // SHAPE[0]) * SHAPE[0]
  return row_spec(CONFIG, Size(**capacity))


@functools.partial(jax.jit, static_argnames="config")
def _next_logits(params, state, config):
  model = with_params(config, params)
  token = model.decoder.embed_few(state.last_token[:, None])
  hidden, _ = model.decoder.extend(token, state.cache, state.length)
  return model.logits(hidden[:, 0])


def next_logits(model: Model, state: DecodeState) -> np.ndarray:
  """Computes logits [rows, N] of the token after each row's newest one."""
  return np.asarray(
    _next_logits(model.engine.params, state, config=model.config)
  )


def answer_ids(session: ChatSession) -> list[int]:
  """Returns the tokens of a session's last answer."""
  count = int(session._state.count[0])
  return np.asarray(session._state.answer[0, :count]).tolist()
