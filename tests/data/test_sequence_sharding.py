"""Rows in round-robin order mean the same, by resolving all their indices."""

import dataclasses

import hypothesis
import ml_dtypes
import numpy as np
import pytest
from hypothesis import strategies as st

from hourjax.batch import IGNORE
from hourjax.data import repository, rows
from hourjax.data.conversations import IMAGE, Conversation
from hourjax.data.forgetting import Forgetting
from hourjax.data.layout import build_layout
from hourjax.data.sequence_sharding import (
  check_sequence_sharding,
  features_part,
  sequence_sharding_order,
)
from hourjax.errors import UserError

SIDE, WIDTH, PIXELS = 4, 2, 4
SPEC = rows.RowSpec(
  rows.Size(
    features=16 * 300,
    frames=4,
    tiles=3,
    memory=16 * 450,
    queries=16 * 160,
    decoder=16 * 170,
  ),
  frame_tokens=SIDE**2,
  tile_tokens=9,
  width=WIDTH,
  image_size=PIXELS,
)


def _sample(kind, count, seed):
  rng = np.random.default_rng(seed)
  words = rng.integers(1, 90, 14).astype(np.int32)
  words[2] = IMAGE
  if kind == "images":
    memory = repository.images_repository(1, 3)
    kind, visual = "tiles", _pixels(rng, 1)
  else:
    memory = repository.video_repository(count, SIDE)
    visual = rng.normal(size=(count, SIDE**2, WIDTH)).astype(ml_dtypes.bfloat16)
    if kind == "frames":
      visual = _pixels(rng, count)
  labels = np.where(np.arange(14) < 8, np.int32(IGNORE), words)
  layout = build_layout(
    Conversation(words, labels), memory, Forgetting().kept_tokens(memory, rng)
  )
  return rows.Sample(f"{kind} {seed}", layout, kind, visual)


def _pixels(rng, count):
  return rng.integers(0, 255, (count, PIXELS, PIXELS, 3)).astype(np.uint8)


def _batch(lengths, others):
  row = [_sample("features", n, i) for i, n in enumerate(lengths)]
  row += [_sample(kind, 2, 50 + i) for i, kind in enumerate(others)]
  empty = rows.build_row([], SPEC)
  return rows.stack_rows([rows.build_row(row, SPEC), empty])


def _meaning(batch, devices):
  """Each decoder position, query and memory token with what it refers to."""
  n, own = devices, SPEC.capacity.features // devices
  each = SPEC.capacity.memory // n
  parts = [
    features_part(batch.features, SPEC.frame_tokens, n, i) for i in range(n)
  ]
  found = []
  for b in range(len(batch.target)):
    memory = []
    for place, source in enumerate(batch.memory_source[b].tolist()):
      token = ("encoded", source - own)
      if source < 0:
        token = ("newline",)
      elif source < own:
        token = ("feature", parts[place // each][b, source].tobytes())
      memory.append(
        (
          *token,
          batch.memory_position[b, place],
          batch.memory_segment[b, place],
        )
      )
    queries = [
      (token, memory[source] if source >= 0 else None, position, segment, reads)
      for token, source, position, segment, reads in zip(
        *(
          getattr(batch, f"query_{name}")[b].tolist()
          for name in ("token", "source", "position", "segment", "reads")
        )
      )
    ]
    decoder = [
      (token, queries[source] if source >= 0 else None)
      for token, source in zip(batch.decoder_token[b], batch.decoder_source[b])
    ]
    found.append((sorted(map(str, memory)), sorted(map(str, queries)), decoder))
  return found


@hypothesis.settings(max_examples=12)
@hypothesis.given(
  st.lists(st.integers(1, 140), max_size=2),
  st.lists(st.sampled_from(["frames", "images"]), max_size=2, unique=True),
  st.sampled_from([2, 4, 8, 16]),
)
def test_every_reference_is_kept(lengths, others, devices):
  batch = _batch(lengths, others)
  ordered = sequence_sharding_order(batch, SPEC, devices)
  assert _meaning(ordered, devices) == _meaning(batch, 1)
  assert ordered.memory_source.dtype == np.int32
  assert ordered.query_source.dtype == ordered.decoder_source.dtype == np.int32


def test_every_device_has_as_much_to_do():
  """Whatever the videos, also those whose frames are repeated."""
  batch = _batch([37, 140], ["images"])
  ordered = sequence_sharding_order(batch, SPEC, 8)
  for name in ("memory_segment", "query_segment"):
    parts = getattr(ordered, name)[0].reshape(8, -1)
    for segment in (1, 2, 3):
      counts = (parts == segment).sum(1)
      assert counts.max() - counts.min() <= 1
    # In order on each device, padding at the end.
    ids = np.where(parts == 0, 99, parts)
    assert (np.diff(ids, axis=1) >= 0).all()


def test_one_device_gets_the_row_as_it_is():
  batch = _batch([20], [])
  assert sequence_sharding_order(batch, SPEC, 1) is batch
  part = features_part(batch.features, SPEC.frame_tokens, 1, 0)
  assert np.shares_memory(part, batch.features)


@pytest.mark.parametrize(
  "devices, changes, words",
  [
    (32, {}, "does not divide the 16 tokens of a frame"),
    (4, {"memory": 803}, r"config.rows.memory=803 .*next: 804"),
    (4, {"queries": 10}, r"config.rows.queries=10 .*next: 12"),
    (4, {"decoder": 9}, r"config.rows.decoder=9 .*next: 12"),
    (2, {"features": 40}, "no whole number of frames of 16 tokens"),
  ],
)
def test_capacities_that_cannot_be_shared_evenly(devices, changes, words):
  capacity = dataclasses.replace(SPEC.capacity, **changes)
  spec = dataclasses.replace(SPEC, capacity=capacity)
  with pytest.raises(UserError, match=words):
    check_sequence_sharding(spec, devices)
  check_sequence_sharding(spec, 1)
