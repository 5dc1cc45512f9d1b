import dataclasses

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hourjax.batch import IGNORE
from hourjax.data import forgetting, repository, rows
from hourjax.data.conversations import IMAGE, Conversation
from hourjax.data.layout import build_layout
from hourjax.data.media import images
from hourjax.errors import UserError

FRAME_SIDE, TILE_SIDE, IMAGE_SIZE, WIDTH = 2, 3, 6, 2
KINDS = ("video", "frames", "images", "tiled", "text")


def _sample(kind, number):
  """A sample whose every word and visual token can be told from others."""
  rng = np.random.default_rng(number)
  tag = 20 * number + 1
  visual, slots, source = None, 1, "features"
  if kind == "video":
    memory = repository.video_repository(3, FRAME_SIDE)
    visual = np.zeros((3, FRAME_SIDE**2, WIDTH), ml_dtypes.bfloat16)
    visual[..., 0] = np.arange(3)[:, None] + tag
    visual[..., 1] = np.arange(FRAME_SIDE**2)
  elif kind == "frames":
    memory, source = repository.video_repository(4, FRAME_SIDE), "frames"
    visual = _flat_pictures(4, tag)
  elif kind == "images":
    memory, source = repository.images_repository(2, TILE_SIDE), "tiles"
    visual, slots = _flat_pictures(2, tag), 2
  elif kind == "tiled":
    geometry = images.anyres_geometry(
      17, 17, tile=IMAGE_SIZE, side=TILE_SIDE, max_tiles=4
    )
    memory = repository.tiled_repository(geometry, TILE_SIDE)
    assert memory.blend_source.size  # scaled down
    visual, source = _flat_pictures(geometry.tiles, tag), "tiles"
  else:
    memory, slots = repository.empty_repository(), 0
  ids = [tag, *[IMAGE] * slots, tag + 1, tag + 2, tag + 3]
  labels = [IGNORE] * (slots + 2) + ids[-2:]
  kept = forgetting.Forgetting().kept_tokens(memory, rng)
  layout = build_layout(
    Conversation(np.array(ids, np.int32), np.array(labels, np.int32)),
    memory,
    kept,
  )
  return rows.Sample(f"{kind} {number}", layout, source, visual)


def _text(labelled, number, max_length=None):
  """Three words of prompt and so many labels."""
  ids = np.arange(3 + labelled, dtype=np.int32) + 1
  labels = np.where(np.arange(len(ids)) < 3, np.int32(IGNORE), ids)
  layout = build_layout(
    Conversation(ids, labels),
    repository.empty_repository(),
    [],
    max_length=max_length,
  )
  return rows.Sample(f"text {number}", layout)


def _flat_pictures(count, tag):
  pixels = np.zeros((count, IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8)
  return pixels + (tag + np.arange(count, dtype=np.uint8))[:, None, None, None]


def _spec(samples, spare=0):
  total = rows.Size(*[spare] * 7)
  for sample in samples:
    total += sample.size
  return rows.RowSpec(total, FRAME_SIDE**2, TILE_SIDE**2, WIDTH, IMAGE_SIZE)


def _resolved(row, segment):
  """What one sample's memory, queries and decoder positions hold.

  Visual tokens are the pair (frame or tile, place in it), as if an encoder
  returned that.
  """

  def encoded(pixels, tokens):
    pairs = np.zeros((len(pixels), tokens, WIDTH))
    pairs[..., 0] = pixels[:, 0, 0, :1]
    pairs[..., 1] = np.arange(tokens)
    return pairs.reshape(-1, WIDTH)

  table = np.concatenate(
    [
      row.features.astype(float),
      encoded(row.frames, FRAME_SIDE**2),
      encoded(row.tiles, TILE_SIDE**2),
    ]
  )
  blends = np.einsum("rf,rfv->rv", row.blend_weight, table[row.blend_source])
  newline = np.full((1, WIDTH), -1.0)
  table = np.concatenate([table, blends, newline])  # -1 is the last row
  memory = table[row.memory_source]

  def gathered(token, source, below):
    word = np.stack([token, np.full_like(token, -7)], axis=1)
    if not len(below):
      return word.astype(float)
    return np.where(token[:, None] >= 0, word, below[source])

  queries = gathered(row.query_token, row.query_source, memory)
  decoder = gathered(row.decoder_token, row.decoder_source, queries)
  of_memory = row.memory_segment == segment
  of_queries = row.query_segment == segment
  of_decoder = row.decoder_segment == segment
  assert (row.query_reads[of_queries] == segment).all()
  return {
    "memory": memory[of_memory],
    "memory_position": row.memory_position[of_memory],
    "queries": queries[of_queries],
    "query_position": row.query_position[of_queries],
    "decoder": decoder[of_decoder],
    "decoder_position": row.decoder_position[of_decoder],
    "target": row.target[of_decoder],
    "target_weight": row.target_weight[of_decoder],
  }


@given(
  kinds=st.lists(st.sampled_from(KINDS), min_size=1, max_size=6),
  spare=st.integers(0, 3),
)
def test_a_packed_sample_reads_what_it_reads_alone(kinds, spare):
  samples = [_sample(kind, n) for n, kind in enumerate(kinds)]
  row = rows.build_row(samples, _spec(samples, spare))
  for number, sample in enumerate(samples, start=1):
    alone = _resolved(rows.build_row([sample], _spec([sample])), 1)
    packed = _resolved(row, number)
    for key, expected in alone.items():
      np.testing.assert_allclose(packed[key], expected, err_msg=key)
    assert len(packed["memory"]) == sample.size.memory
    assert len(packed["decoder"]) == sample.size.decoder
    assert packed["decoder_position"].tolist() == list(
      range(sample.size.decoder)
    )


@given(kinds=st.lists(st.sampled_from(KINDS), min_size=1, max_size=4))
def test_segments_rise_and_padding_is_zero(kinds):
  samples = [_sample(kind, n) for n, kind in enumerate(kinds)]
  row = rows.build_row(samples, _spec(samples, spare=2))
  for column in ("memory_segment", "query_segment", "decoder_segment"):
    ids = getattr(row, column)
    assert ids[-2:].tolist() == [0, 0]
    assert (np.diff(ids[:-2]) >= 0).all()
  assert (row.target[row.decoder_segment == 0] == IGNORE).all()
  assert (row.target_weight[row.decoder_segment == 0] == 0).all()
  assert (row.query_reads[row.query_segment == 0] == 0).all()


@given(
  counts=st.lists(st.integers(0, 9), min_size=1, max_size=5),
  loss=st.sampled_from(["samples", "tokens"]),
)
def test_labels_weigh_what_the_loss_says(counts, loss):
  samples = [_text(count, n) for n, count in enumerate(counts)]
  spec = dataclasses.replace(_spec(samples, spare=2), loss=loss)
  row = rows.build_row(samples, spec)
  assert row.target_weight.dtype == np.float32
  assert ((row.target_weight > 0) == (row.target != IGNORE)).all()
  for number, count in enumerate(counts, start=1):
    own = row.target_weight[row.decoder_segment == number]
    each = 1 if loss == "tokens" else np.float32(1) / np.float32(count or 1)
    assert (own[own > 0] == each).all() and (own > 0).sum() == count


def test_a_label_that_is_cut_off_weighs_nothing():
  """Of 6 labels two are left when the sequence is cut at 5 positions."""
  sample = _text(6, 0, max_length=5)
  assert (sample.layout.targets != IGNORE).sum() == 2
  spec = dataclasses.replace(_spec([sample]), loss="samples")
  row = rows.build_row([sample], spec)
  assert row.target_weight.tolist() == [0, 0, 0.5, 0.5, 0]


def test_memory_content():
  """The numbers themselves, once, so that the tests above mean something."""
  sample = _sample("video", 0)
  got = _resolved(rows.build_row([sample], _spec([sample], spare=1)), 1)
  tokens = FRAME_SIDE**2 + 1
  shown = repository.repeated_frames(3)
  frames = got["memory"].reshape(len(shown), tokens, WIDTH)
  np.testing.assert_array_equal(frames[:, 0, 0], shown + 1)
  assert frames[0, :, 1].tolist() == [0, 1, 2, 3, -1]
  assert got["decoder"][0].tolist() == [1, -7]


def test_pixels_stay_bytes_unless_floats_come():
  small = _sample("images", 0)
  assert rows.build_row([small], _spec([small])).tiles.dtype == np.uint8
  text = _sample("text", 1)
  assert rows.build_row([text], _spec([text], 1)).tiles.dtype == np.uint8
  floats = dataclasses.replace(small, visual=small.visual.astype(np.float32))
  assert rows.build_row([floats], _spec([floats])).tiles.dtype == np.float32


def test_features_are_bfloat16():
  video = _sample("video", 0)
  row = rows.build_row([video], _spec([video]))
  assert row.features.dtype == ml_dtypes.bfloat16


def test_stack_rows():
  samples = [_sample("video", 0), _sample("text", 1)]
  spec = _spec(samples)
  batch = rows.stack_rows([rows.build_row([s], spec) for s in samples])
  assert batch.memory_source.shape == (2, spec.capacity.memory)
  assert batch.features.shape == (2, spec.capacity.features, WIDTH)
  assert batch.memory_segment[1].max() == 0


def test_sizes():
  size = _sample("tiled", 0).size
  assert size.features == size.frames == 0
  assert size.tiles == 10 and size.blends > 0
  video = _sample("video", 0).size
  assert video.features == 3 * FRAME_SIDE**2
  assert video.memory == repository.MIN_FRAMES * (FRAME_SIDE**2 + 1)
  assert (video + size).tiles == 10
  assert video.fits(video) and not (video + size).fits(video)


def test_check_fits_names_both_values_of_every_capacity():
  size = rows.Size(memory=4810, queries=9, decoder=600)
  capacity = rows.Size(memory=4096, queries=9, decoder=512)
  with pytest.raises(UserError) as error:
    rows.check_fits(size, capacity, "record 12")
  message = str(error.value)
  assert "config.rows.memory=4096 < 4810 of record 12" in message
  assert "config.rows.decoder=512 < 600 of record 12" in message
  assert "queries" not in message and "raise these capacities" in message
  rows.check_fits(capacity, capacity, "record 12")


def test_row_refuses_the_sample_that_does_not_fit():
  samples = [_sample("video", 0), _sample("video", 1)]
  with pytest.raises(UserError, match="video 1"):
    rows.build_row(samples, _spec(samples[:1]))
