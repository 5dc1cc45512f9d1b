"""The same features as torch files, read as the official trainer does."""

import pathlib
import time
from collections.abc import Sequence

import numpy as np

from hourjax.data.rows import RowSpec
from hourjax.data.store.features import FeatureStore

_WARM = 3  # rows that are read before the clock starts


def measure_torch(
  store: FeatureStore,
  videos: Sequence[str],
  spec: RowSpec,
  folder: pathlib.Path,
  rows: int,
) -> dict[str, float]:
  """One padded sample a row through a DataLoader; bf16 `.pt` files.

  Args:
    store: with the features.
    videos: to write and read.
    spec: of the rows that samples are padded to.
    folder: for the files.
    rows: to read.
  """
  import torch  # not among the requirements

  kind = torch.bfloat16
  shape = (spec.frame_tokens, spec.width)
  paths = []
  for number, video in enumerate(videos):
    frames = np.arange(store.stored(video).frames)
    features = store.read(video, frames, shape).view(np.uint16)
    paths.append(folder / f"{number}.pt")
    torch.save(torch.from_numpy(features).view(kind), paths[-1])

  class Padded(torch.utils.data.Dataset):
    def __len__(self):
      return rows + _WARM

    def __getitem__(self, k):
      features = torch.load(paths[k % len(paths)], weights_only=True)
      features = features.reshape(-1, spec.width)
      row = torch.zeros(spec.capacity.features, spec.width, dtype=kind)
      row[: len(features)] = features
      return row, features.numel() * 2

  results = {}
  for workers in (0, 2):
    loader = iter(
      torch.utils.data.DataLoader(Padded(), batch_size=1, num_workers=workers)
    )
    for _ in range(_WARM):
      next(loader)
    began, used = time.monotonic(), 0
    for _ in range(rows):
      used += int(next(loader)[1])
    took = time.monotonic() - began
    results[f"gb_per_second_{workers}_workers"] = round(used / took / 1e9, 2)
    results[f"rows_per_second_{workers}_workers"] = round(rows / took, 2)
  return results
