"""Conversations as TFDS stores them, encoded and decoded without TensorFlow."""

import functools
import json
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from google.protobuf import json_format
from tensorflow_datasets.proto import tf_example_pb2

from hourjax.data.columns import Measures
from hourjax.data.records.record import Record, Turn

_EXAMPLE = tf_example_pb2.Example  # pyrefly: ignore[missing-attribute]  made at import by protobuf

NUMBERS = ("tokens", "prompt", "answer", "images", "width", "height")


@functools.cache
def features() -> tfds.features.FeaturesDict:
  """Returns the names and types of the stored features."""
  text = tfds.features.Text
  return tfds.features.FeaturesDict(
    {
      "id": text(),
      "modality": text(),
      "media": tfds.features.Sequence(text()),
      "source": text(),
      "stream": text(),
      "duration": np.float32,
      "pictures": np.int64,
      "turns": tfds.features.Sequence({"from": text(), "value": text()}),
      "extra": text(),
      **dict.fromkeys(NUMBERS, np.int64),
    }
  )


def features_json() -> dict[str, Any]:
  """Returns the content of the features.json that TFDS writes of `features`."""
  return json_format.MessageToDict(features().to_proto())


def encode_record(
  record: Record,
  measures: Measures,
  *,
  stream: str = "default",
  duration: float | None = None,
  frames: int = 0,
) -> bytes:
  """Encodes one conversation as a serialised tf.train.Example.

  Args:
    record: checked; `extra` is stored as JSON text.
    measures: its lengths and sizes.
    stream: name of the stream that packs it into rows.
    duration: of its video in seconds, None if unknown.
    frames: number of frames of the video's file, 0 if unknown.
  """
  example = {
    "id": record.id,
    "modality": record.modality,
    "media": list(record.media),
    "source": record.source,
    "stream": stream,
    "duration": np.float32(np.nan if duration is None else duration),
    "pictures": frames,
    "turns": [{"from": turn.role, "value": turn.text} for turn in record.turns],
    "extra": json.dumps(record.extra, ensure_ascii=False),
  }
  numbers = {name: getattr(measures, name) for name in NUMBERS}
  written = features().serialize_example(example | numbers)
  # By default the order in which a protocol buffer's map is written differs
  # between processes; the same record must always give the same bytes.
  again = _EXAMPLE.FromString(written)
  return again.SerializeToString(deterministic=True)


def parse_example(encoded: bytes) -> dict[str, Any]:
  """Parses an example with `features`, whatever a file's features.json names.

  Raises:
    Exception: it has other features. TFDS raises errors of many types.
  """
  example = features().deserialize_example_np(encoded)
  assert isinstance(example, dict)  # as of every FeaturesDict
  return example


def decode_record(example: dict[str, Any]) -> Record:
  """Returns the record in an example as TFDS reads it."""
  turns = example["turns"]
  return Record(
    id=example["id"].decode(),
    modality=example["modality"].decode(),
    media=tuple(name.decode() for name in example["media"]),
    turns=tuple(
      Turn(role.decode(), text.decode())
      for role, text in zip(turns["from"], turns["value"], strict=True)
    ),
    source=example["source"].decode(),
    extra=json.loads(example["extra"]),
  )
