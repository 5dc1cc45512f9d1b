"""Stage 0: SigLIP's loss between tokens of frames and words."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest

from configs import demo
from hourjax.alignment import siglip_loss as alignment
from hourjax.alignment.captions import (
  CaptionedFrames,
  read_captioned_frames,
)
from hourjax.data.demo import tokenizer as demo_tokenizer
from hourjax.data.tokenizer import Tokenizer
from hourjax.errors import UserError
from hourjax.extraction.encoder import tower_params
from hourjax.models.config import DecoderConfig, ModelConfig, VisionConfig
from hourjax.models.params import with_params
from hourjax.models.siglip import pool_frames
from hourjax.training.config import build_experiment
from hourjax.training.train_state import initial_params

MODEL = ModelConfig(
  VisionConfig(
    image_size=16, patch_size=8, width=16, layers=1, heads=2, mlp=32
  ),
  DecoderConfig(
    vocab=512, width=16, layers=1, heads=2, kv_heads=1, mlp=16, tied=True
  ),
  pool_side=1,
  memaug_layers=1,
  dtype="float32",
  remat="none",
)
TEXTS = ["blue", "dark", "light", "red"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
  folder = tmp_path_factory.mktemp("tokenizer")
  lines = [f"{text}\n {text}" for text in TEXTS * 2]
  demo_tokenizer.write_tokenizer(folder, lines)
  return Tokenizer.from_folder(folder)


@pytest.fixture(scope="module")
def frames():
  """Frames of one colour, light or dark, with noise; 20 are held out."""
  rng = np.random.default_rng(0)
  colour, light = rng.integers(2, size=(2, 200))
  pixels = rng.integers(20, size=(200, 16, 16, 3), dtype=np.uint8)
  value = np.array([90, 220], np.uint8)[light]
  pixels[np.arange(200), ..., np.where(colour, 0, 2)] += value[:, None, None]
  shown = np.stack([1 - colour, 1 - light, light, colour], axis=1)
  return CaptionedFrames(pixels, shown.astype(np.float32), TEXTS, 20)


def _experiment(**changes):
  config = demo.get_config("stage=0")
  config.model = dataclasses.asdict(MODEL)
  config.update({"steps": 60, "batch_rows": 32, **changes})
  return build_experiment(config.to_dict())


def test_loss_is_that_of_siglip():
  rng = np.random.default_rng(1)
  logits = rng.normal(size=(2, 3, 4, 5)).astype(np.float32)
  shown = rng.integers(2, size=(3, 5)).astype(np.float32)
  total = 0.0
  for f, i, p, n in np.ndindex(logits.shape):
    z = logits[f, i, p, n] * (1 if shown[i, n] else -1)
    total += np.log1p(np.exp(-z))
  expected = total / (2 * 3 * 4)  # a mean over forms, frames and tokens
  found = alignment.sigmoid_loss(jnp.asarray(logits), jnp.asarray(shown))
  np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_ranked_share():
  shown = np.array([[1, 0, 1, 0]], np.float32)
  # One token ranks both captions first, the other only one of them.
  logits = np.array([[[4, 1, 3, 0], [4, 3, 1, 0]]], np.float32)
  assert alignment.ranked_share(logits, shown) == 0.75


def test_texts_in_both_forms(tokenizer):
  texts = alignment.encode_texts(["red", "dark red"], tokenizer)
  assert texts.tokens.shape == (2, 2, 2)
  start, inside = texts.tokens
  assert tokenizer.decode(start[0][:1]) == "red"
  assert tokenizer.decode(inside[0][:1]) == " red"
  # The second word of a text follows a space in both forms.
  assert start[1, 1] == inside[1, 1] == inside[0, 0]
  np.testing.assert_array_equal(
    texts.weight, [[[1, 0], [0.5, 0.5]], [[1, 0], [0.5, 0.5]]]
  )


def test_frames_are_named_and_the_workdir_serves(tmp_path, tokenizer, frames):
  rows = []
  experiment = _experiment(log_every=20)
  state, numbers = alignment.train_alignment(
    experiment, frames, tokenizer, rows.append
  )
  assert [row["step"] for row in rows] == [20, 40, 60]
  assert rows[-1]["loss"] < rows[0]["loss"] / 2
  assert numbers["held_out_frames"] == 20 and numbers["named"] == 1.0
  # Tokens are as long as words: the loss itself leaves their length open.
  model = with_params(experiment.model, state.trained)
  tokens = pool_frames(
    model.encode(jnp.asarray(frames.frames)), experiment.model.pool_side
  )
  tokens = np.linalg.norm(model.projector(tokens), axis=-1)
  used = alignment.encode_texts(TEXTS, tokenizer)
  words = state.trained[alignment.EMBEDDING][used.tokens[used.weight > 0]]
  words = np.linalg.norm(words, axis=-1)
  assert tokens.mean() == pytest.approx(words.mean(), rel=0.1)
  tmp_path.joinpath("run").mkdir()
  alignment.save_alignment(experiment, state, tmp_path / "run")

  # Extraction and training take what was learnt.
  params = {path: np.asarray(value) for path, value in state.trained.items()}
  tower = tower_params(experiment, str(tmp_path / "run"))
  assert tower and all(np.array_equal(tower[p], params[p]) for p in tower)
  drawn = initial_params(_experiment())
  init = initial_params(_experiment(init=str(tmp_path / "run")))
  assert init.keys() == params.keys()
  for path, value in init.items():
    np.testing.assert_array_equal(value, params[path])
    learnt = path.startswith(alignment.TRAINED) and "post_norm" not in path
    assert learnt != np.array_equal(value, drawn[path]), path


def _captions(tmp_path, value):
  path = tmp_path / "captions.json"
  path.write_text(json.dumps(value))
  return path


@pytest.mark.parametrize(
  ("value", "message"),
  [
    ([], "holds no captions; give a list of"),
    ([{"video": "a.mp4", "second": -1, "captions": ["x"]}], "second"),
    ([{"video": "a.mp4", "second": 1, "captions": []}], "captions"),
    ([{"video": "a.mp4", "second": 1, "captions": ["x"]}], "a.mp4"),
  ],
)
def test_mistakes_in_captions_are_named(tmp_path, value, message):
  with pytest.raises(UserError, match=message):
    read_captioned_frames(_captions(tmp_path, value), tmp_path, 16)
