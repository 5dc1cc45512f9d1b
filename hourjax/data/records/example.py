"""A conversation as TFDS stores it, both ways; TensorFlow is not needed."""

import functools
import json
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from google.protobuf import json_format
from tensorflow_datasets.proto import tf_example_pb2

from hourjax.data.columns import Measures
from hourjax.data.records.record import Record, Turn

NUMBERS = ("tokens", "prompt", "answer", "images", "width", "height")


@functools.cache
def features() -> tfds.features.FeaturesDict:
  """Names and types of what is stored."""
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
  """Content of the features.json that TFDS writes of `features`."""
  return json_format.MessageToDict(features().to_proto())


def encode_record(
  record: Record,
  measures: Measures,
  *,
  stream: str = "default",
  duration: float | None = None,
  pictures: int = 0,
) -> bytes:
  """One conversation as it is stored: a serialised tf.train.Example.

  Args:
    record: checked; `extra` is stored as JSON text.
    measures: its numbers.
    stream: whose rows it belongs to.
    duration: of its video in seconds, None where it is not known.
    pictures: in the video's file, 0 where they are not known.
  """
  example = {
    "id": record.id,
    "modality": record.modality,
    "media": list(record.media),
    "source": record.source,
    "stream": stream,
    "duration": np.float32(np.nan if duration is None else duration),
    "pictures": pictures,
    "turns": [{"from": turn.role, "value": turn.text} for turn in record.turns],
    "extra": json.dumps(record.extra, ensure_ascii=False),
  }
  numbers = {name: getattr(measures, name) for name in NUMBERS}
  written = features().serialize_example(example | numbers)
  # A protocol buffer's map is written in an order that differs from process to
  # process, unless it is asked for: the same record, the same bytes.
  again = tf_example_pb2.Example.FromString(written)
  return again.SerializeToString(deterministic=True)


def parse_example(encoded: bytes) -> dict[str, Any]:
  """An example by the features that are defined here, whatever a file names.

  Raises:
    Exception: it is none with these features; of many types, some bare.
  """
  return features().deserialize_example_np(encoded)


def decode_record(example: dict[str, Any]) -> Record:
  """The record in an example as TFDS reads it."""
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
