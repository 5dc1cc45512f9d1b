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
from hourjax.models.params import init_params, with_params
from hourjax.models.siglip import pool_frames

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
def params() -> dict[str, jax.Array]:
  """Freshly drawn ones."""
  return init_params(MODEL, 0)


def other_params() -> dict[str, jax.Array]:
  """Those of another tower."""
  return params() | {"vision/position": params()["vision/position"] + 1}


@jax.jit
def _encode(params, pixels):
  model = with_params(MODEL, params)
  return pool_frames(model.encode(pixels), MODEL.pool_side)


def features(params, pixels: np.ndarray) -> np.ndarray:
  """The features of at most 160 uint8 pictures, by the whole model."""
  padded = np.zeros((160, *pixels.shape[1:]), np.uint8)
  padded[: len(pixels)] = pixels
  return np.asarray(_encode(params, padded))[: len(pixels)]


def extract(params, root, out, **options) -> list[Skipped]:
  """`extract_videos` of MODEL."""
  return extract_videos(params, MODEL, videos=root, out=out, **options)


def oracle(params, path) -> np.ndarray:
  """Features of a video by decoding it whole and running the whole model."""
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
  """All stored frames of a video."""
  frames = np.arange(store.stored(name).frames)
  return store.read(name, frames, SHAPE)


def write_config(
  path: pathlib.Path,
  pool_side: int = MODEL.pool_side,
  vision: dict | None = None,
) -> pathlib.Path:
  """A configuration file of MODEL for commands; `vision` changes the tower."""
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
