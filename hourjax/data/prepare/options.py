"""What makes one prepared dataset differ from another."""

import dataclasses
from typing import Literal

from hourjax.data.prepare.lists import Item


@dataclasses.dataclass(frozen=True)
class Options:
  """Where a dataset comes from.

  Attributes:
    items: files to read.
    tokenizer: folder of the tokenizer that counts.
    media: folder of videos and images, or None.
    features: the feature store that durations come from, or None.
    check_media: whether the media of every record must be there; videos are
      then opened for their duration.
    columns: columns of question tables, role -> names.
    seed: of `random:N%`.
    parquet_images: whether images in parquet files are unpacked below `media`
      or stay there.
  """

  items: tuple[Item, ...]
  tokenizer: str
  media: str | None = None
  features: str | None = None
  check_media: bool = True
  columns: dict[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
  seed: int = 0
  parquet_images: Literal["unpack", "keep"] = "unpack"
