"""A small model whose tower the tests of extraction run."""

import dataclasses
import functools
import pathlib

import av
import jax
import numpy as np

from hourjax.data.media.frame_rules import extraction_frames
from hourjax.data.media.images import resize
from hourjax.data.media.video import probe
from hourjax.data.records.record import Skipped
from hourjax.data.store.features import FeatureStore
from hourjax.extraction.worker import extract_videos
from hourjax.models.config import DecoderConfig, ModelConfig, VisionConfig
from hourjax.models.params import with_params
from hourjax.models.siglip import pool_frames
from tests.drawn_params import draw_params

MODEL = ModelConfig(
  VisionConfig(
    image_size=32, patch_size=8, width=16, layers=2, heads=2, mlp=24
  ),
  DecoderConfig(
    vocab=32, width=16, layers=1, heads=2, kv_heads=1, mlp=16, tied=True
  ),
  pool_side=2,
  memaug_layers=1,
  dtype="float32",
  remat="none",
)
SHAPE = (4, 16)


@functools.cache
def params() -> dict[str, np.ndarray]:
  """Draws the parameters of MODEL."""
  return draw_params(MODEL, 0)


def other_params() -> dict[str, np.ndarray]:
  """Draws the parameters of another tower."""
  return params() | {"vision/position": params()["vision/position"] + 1}


@jax.jit
def _encode(params, pixels):
  model = with_params(MODEL, params)
  return pool_frames(model.encode(pixels), MODEL.pool_side)


def features(params, pixels: np.ndarray) -> np.ndarray:
  """Computes the features of at most 160 uint8 frames by the whole model."""
  padded = np.zeros((160, *pixels.shape[1:]), np.uint8)
  padded[: len(pixels)] = pixels
  return np.asarray(_encode(params, padded))[: len(pixels)]


def extract(params, root, out, **options) -> list[Skipped]:
  """Extracts with the tower of MODEL."""
  return extract_videos(params, MODEL, videos=root, out=out, **options)


def oracle(params, path) -> np.ndarray:
  """Computes the features of a video that is decoded whole."""
  info = probe(path)
  indices, _ = extraction_frames(info.frames, info.fps)
  with av.open(str(path)) as container:
    frames = [
      np.rot90(f.to_ndarray(format="rgb24"), round(f.rotation / 90) % 4)
      for f in container.decode(video=0)
    ]
  taken = [resize(np.ascontiguousarray(frames[i]), 32) for i in indices]
  return features(params, np.stack(taken))


def read_all(store: FeatureStore, name: str) -> np.ndarray:
  """Reads the features of all stored frames of a video."""
  frames = np.arange(store.stored(name).frames)
  return store.read(name, frames, SHAPE)


def write_config(
  path: pathlib.Path,
  pool_side: int = MODEL.pool_side,
  vision: dict | None = None,
) -> pathlib.Path:
  """Writes a configuration file of MODEL for commands.

  Args:
    path: the file.
    pool_side: side of the grid of a frame's features.
    vision: changes to the configuration of the tower.
  """
  model = dataclasses.asdict(MODEL) | {"pool_side": pool_side}
  model["vision"] |= vision or {}
  names = ("forgetting", "data", "rows", "optimizer", "read")
  parts = {name: {} for name in names}
  values = {"model": model, "seed": 0, "init": "", **parts}
  path.write_text(
    "from ml_collections import ConfigDict\n"
    "def get_config():\n"
    f"  return ConfigDict({values})\n"
  )
  return path
