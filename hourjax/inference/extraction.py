"""Videos to stored tower features."""

import os
import pathlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed

import jax
import numpy as np

from hourjax import progress
from hourjax.data.features import FeatureStore
from hourjax.data.records import Skipped
from hourjax.data.video import decode_frames, extraction_frames, probe
from hourjax.errors import UserError
from hourjax.models.config import ModelConfig
from hourjax.models.params import with_params
from hourjax.models.siglip import pool_frames

_THREADS = min(8, os.cpu_count() or 1)
_SUFFIXES = {".mp4", ".mkv", ".webm", ".mov", ".avi"}


def extract_videos(
  params: Mapping[str, jax.Array],
  config: ModelConfig,
  *,
  videos: str | os.PathLike,
  out: str | os.PathLike,
  batch_frames: int,
) -> list[Skipped]:
  """Encodes every video of a folder that the store does not hold yet.

  Args:
    params: of the model; only the tower is used.
    config: of the model.
    videos: folder, searched with its subfolders.
    out: folder of the feature store.
    batch_frames: frames encoded at a time.

  Returns:
    Videos that could not be read, with the reason.

  Raises:
    UserError: if the folder holds no video, or none could be read.
  """
  root = pathlib.Path(videos)
  names = sorted(
    str(path.relative_to(root))
    for path in root.rglob("*")
    if path.suffix.lower() in _SUFFIXES and not path.name.startswith(".")
  )
  if not names:
    raise UserError(
      f"{root} holds no video ({', '.join(sorted(_SUFFIXES))}); correct the"
      " folder"
    )
  store = FeatureStore(out, create=True)
  todo = [name for name in names if name not in store]
  encode = _encoder(params, config)
  failed, frames = [], 0
  with (
    progress.bar(len(todo), unit="video", desc="extract") as bar,
    # Decoding and resizing run outside Python's lock: one video a thread.
    ThreadPoolExecutor(_THREADS) as pool,
  ):
    jobs = {
      pool.submit(_extract, root / name, config, encode, batch_frames): name
      for name in todo
    }
    for job in as_completed(jobs):
      name = jobs.pop(job)
      try:
        features, duration = job.result()
        store.write(name, features, duration)
        frames += len(features)
      except UserError as error:
        failed.append(Skipped(name, str(error)))
      bar.set_postfix(frames=frames, failed=len(failed), refresh=False)
      bar.update()
  print(
    f"{len(names) - len(failed)} of {len(names)} videos in {store.root}"
    f" ({len(names) - len(todo)} were there), {frames} frames encoded"
  )
  for item in failed:
    print(f"  skipped {item.id}: {item.reason}")
  if len(failed) == len(names):
    raise UserError(f"none of the {len(names)} videos of {root} could be read")
  return failed


def _encoder(params, config: ModelConfig):
  """Jitted uint8 [n, h, w, 3] to float [n, Q, V]."""
  tower = {p: v for p, v in params.items() if p.startswith("vision/")}
  rest = {p: v for p, v in params.items() if p not in tower}

  @jax.jit
  def encode(tower, pixels):
    model = with_params(config, {**rest, **tower})
    return pool_frames(model.encode(pixels), config.pool_side)

  return lambda pixels: encode(tower, pixels)


def _extract(path, config, encode, batch_frames):
  """Features [F, Q, V] of one video and its duration in seconds."""
  info = probe(path)
  indices, duration = extraction_frames(info.frames, info.fps)
  size = config.vision.image_size
  frames = decode_frames(path, indices, size, info=info, batch=batch_frames)
  features = [encode_padded(encode, part, batch_frames) for part in frames]
  return np.concatenate(features), duration


def encode_padded(encode, frames: np.ndarray, size: int) -> np.ndarray:
  """Encodes up to `size` frames with one compiled shape."""
  padding = [(0, size - len(frames))] + [(0, 0)] * (frames.ndim - 1)
  return np.asarray(encode(np.pad(frames, padding)))[: len(frames)]
