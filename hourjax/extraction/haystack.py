"""Features of videos that are drawn and never written: needles in haystacks.

Eight hours of a video are 28,800 frames, but the demo's world has few different
ones. So each different frame is encoded once, and a video's features are these
in the order in which it shows them.
"""

import dataclasses
import json
import os
import pathlib
import zlib
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from hourjax import progress
from hourjax.atomic_file import write_file
from hourjax.data.demo import drawing
from hourjax.data.demo.build import RecordWriter
from hourjax.data.demo.script import (
  MIN_SECONDS,
  Script,
  make_script,
  move_needles,
)
from hourjax.data.media import images
from hourjax.data.store.features import FeatureStore
from hourjax.errors import UserError
from hourjax.extraction.encoder import Encoder

LONGEST = 24 * 60  # minutes


def write_haystack(
  encoder: Encoder,
  out: str | os.PathLike,
  *,
  minutes: Sequence[int],
  depths: int,
  videos: int,
  seed: int,
) -> list[Script]:
  """Writes the features and questions of videos with needles at given depths.

  Videos that the store holds already are not drawn again.

  Args:
    encoder: the tower.
    out: folder that gets features/ and test.json.
    minutes: lengths of the videos.
    depths: number of depths, spread evenly: 5 are 10, 30, 50, 70 and 90 %.
    videos: number of videos of each length and depth.
    seed: of the videos.

  Returns:
    The scripts of all videos.

  Raises:
    UserError: a length is too short or long, or the store holds the features of
      another tower.
  """
  for length in minutes:
    if not MIN_SECONDS <= 60 * length <= 60 * LONGEST:
      raise UserError(
        f"a video of {length} minutes; choose lengths from"
        f" {-(-MIN_SECONDS // 60)} to {LONGEST} minutes"
      )
  folder = pathlib.Path(out)
  scripts, records = [], []
  writer = RecordWriter(seed, "test")
  for length in minutes:
    for depth in range(depths):
      for number in range(videos):
        share = (depth + 0.5) / depths
        scripts.append(_script(seed, length, share, number))
        records += writer.needles(scripts[-1])
  store = FeatureStore(folder / "features", create=True)
  _write_features(encoder, store, scripts)
  write_file(folder / "test.json", json.dumps(records, indent=1))
  return scripts


def _script(seed: int, minutes: int, depth: float, number: int) -> Script:
  """Makes the script of a video, whose name says all that determines it.

  A store thus never mixes videos of different options. What the needles show is
  drawn by the name too, so that it does not go with depth or length.
  """
  name = f"{minutes}min_{100 * depth:g}percent_{number}_seed{seed}"
  index = 1 + zlib.crc32(name.encode()) % 10**6
  seconds = 60 * minutes
  script = make_script(seed, "test", index, (seconds, seconds))
  return dataclasses.replace(move_needles(script, depth), name=name)


def _write_features(
  encoder: Encoder, store: FeatureStore, scripts: Sequence[Script]
) -> None:
  """Stores the features of all videos that are not stored yet."""
  todo = [s for s in scripts if f"{s.name}.mp4" not in store]
  with (
    store.temp_files.locked(),
    progress.bar(
      sum(s.duration for s in todo), unit="frame", desc="encode"
    ) as bar,
  ):
    store.claim(encoder.fingerprint, encoder.shape)
    for script in todo:
      features = encode_script(encoder, script)
      store.write(f"{script.name}.mp4", features, script.duration)
      bar.update(script.duration)


def encode_script(
  encoder: Encoder, script: Script
) -> Float[np.ndarray, "F Q V"]:
  """Returns the features of a video that is drawn, not read.

  They are those of the frames before a video codec has touched them.

  Args:
    encoder: the tower.
    script: of the video; a frame for each of its seconds.
  """
  different: list[np.ndarray] = []
  numbers: dict[int, int] = {}  # of a different frame, by its id
  order = []
  for second in range(script.duration):
    frame = drawing.frame(script, second)
    number = numbers.setdefault(id(frame), len(different))
    if number == len(different):
      different.append(frame)
    order.append(number)
  pixels = np.stack([images.resize(f, encoder.image_size) for f in different])
  short = -len(pixels) % encoder.batch
  pixels = np.concatenate([pixels, np.zeros_like(pixels[:1]).repeat(short, 0)])
  found = [
    np.asarray(encoder(pixels[start : start + encoder.batch]))
    for start in range(0, len(pixels), encoder.batch)
  ]
  return np.concatenate(found)[order]
