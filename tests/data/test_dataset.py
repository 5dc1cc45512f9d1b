"""From records with real files to what the decoder reads."""

import dataclasses
import re
import shutil

import av
import jax
import numpy as np
import pytest
from PIL import Image

from hourjax.data.conversations import question_ids
from hourjax.data.dataset import Dataset, SampleOptions
from hourjax.data.demo.tokenizer import train_tokenizer
from hourjax.data.forgetting import Embedder, Forgetting
from hourjax.data.memory_options import MemoryOptions
from hourjax.data.records.record import Record, Turn, parse_record
from hourjax.data.repository import repeated_frames
from hourjax.data.rows import RowSpec, Size, build_row, stack_rows
from hourjax.data.store.features import FeatureStore
from hourjax.data.tokenizer import Tokenizer
from hourjax.models.config import TINY
from hourjax.models.params import init_params, with_params

PIXELS, SECONDS = 8, 20
TOKENIZER = Tokenizer(train_tokenizer([]), "test")
CONFIG = dataclasses.replace(
  TINY,
  vision=dataclasses.replace(TINY.vision, image_size=PIXELS, layers=1),
  decoder=dataclasses.replace(
    TINY.decoder, layers=1, vocab=TOKENIZER.vocab_size
  ),
  pool_side=2,
  memaug_layers=1,
)
SPEC = RowSpec(
  capacity=Size(
    features=4 * SECONDS,
    frames=SECONDS,
    tiles=8,
    blends=200,
    memory=700,
    queries=500,
    decoder=600,
  ),
  frame_tokens=4,
  tile_tokens=16,
  width=CONFIG.vision.width,
  image_size=PIXELS,
)


@pytest.fixture(scope="module")
def media(tmp_path_factory):
  """Two videos, three images, and stored features of the first video."""
  folder = tmp_path_factory.mktemp("media")
  _write_video(folder / "clip.mp4", SECONDS)
  _write_video(folder / "long.mp4", 140)
  rng = np.random.default_rng(0)
  for name, size in [("a", (20, 9)), ("b", (8, 8)), ("c", (5, 30))]:
    picture = rng.integers(0, 256, (size[1], size[0], 3)).astype(np.uint8)
    Image.fromarray(picture).save(folder / f"{name}.png")
  store = FeatureStore(folder / "features", create=True)
  features = rng.normal(size=(SECONDS, 4, CONFIG.vision.width))
  store.write("clip.mp4", features, SECONDS)
  store.write("blink.mp4", features[:1], 0.5)
  store.write("never.mp4", features[:1], 0.0)
  return folder


def _write_video(path, frames):
  with av.open(str(path), "w") as container:
    stream = container.add_stream("libx264", rate=1)
    stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
    for i in range(frames):
      picture = np.full((48, 64, 3), 40 + i, np.uint8)
      frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
      container.mux(stream.encode(frame))
    container.mux(stream.encode())


def _record(name, **media):
  count = len(media["image"]) if "image" in media else len(media)
  talk = [
    {"from": "human", "value": "<image>\n" * count + "What is it?"},
    {"from": "gpt", "value": "It is red."},
  ]
  return parse_record({"id": name, "conversations": talk, **media}, "test")


def _dataset(records, media, *, stored=False, spec=SPEC, **options):
  return Dataset.from_records(
    records,
    tokenizer=TOKENIZER,
    spec=spec,
    options=SampleOptions(**options),
    media_root=media,
    features=FeatureStore(media / "features") if stored else None,
  )


def _size(dataset, index=0):
  return Size(*dataset.sizes[index].tolist())


CASES = {
  "stored video": ({"video": "clip.mp4"}, {"stored": True}),
  "raw video": ({"video": "clip.mp4"}, {}),
  "tiled image": ({"image": ["a.png"]}, {}),
  "plain image": ({"image": ["a.png"]}, {"single_image": "plain"}),
  "three images": ({"image": ["a.png", "b.png", "c.png"]}, {}),
  "text": ({}, {}),
}


@pytest.fixture(scope="module")
def embed():
  params = init_params(CONFIG, 0)
  run = jax.jit(lambda p, batch: with_params(CONFIG, p).embeddings(batch))
  return lambda batch: np.asarray(run(params, batch))


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_every_modality_reaches_the_decoder(case, media, embed):
  files, options = CASES[case]
  dataset = _dataset([_record(case, **files)], media, **options)
  assert not dataset.skipped and len(dataset) == 1
  sample = dataset.sample(0)
  planned = _size(dataset)
  # Newlines of a tiled image's rows without a kept token are not known ahead.
  spare = planned.decoder - sample.size.decoder
  assert sample.size == dataclasses.replace(
    planned,
    queries=planned.queries - spare,
    decoder=planned.decoder - spare,
  )
  assert 0 <= spare < (4 if case == "tiled image" else 1)
  row = build_row([sample], SPEC)
  out = embed(stack_rows([row]))[0]
  assert out.shape == (600, CONFIG.decoder.width)
  assert np.isfinite(out).all()
  visual = (row.decoder_segment > 0) & (row.decoder_token < 0)
  assert visual.any() == bool(files)
  # Newlines at one position are the same, whatever is seen is not.
  assert len(np.unique(out[visual], axis=0)) >= visual.sum() / 2


def test_what_is_shown_of_a_short_video_is_said(media):
  """Its 20 stored frames are one a second, which the file has not more of."""
  records = [_record(name, video=f"{name}.mp4") for name in ("clip", "blink")]
  stored = _dataset(records, media, stored=True)
  assert len(stored) == 2 and stored.sparse == ["clip.mp4", "blink.mp4"]
  assert _dataset(records[:1], media).sparse == []
  text = TOKENIZER.decode([i for i in _words(stored.sample(1)) if i >= 0])
  assert "lasts for 0.50 seconds, and 1 frames are" in text


def _words(sample) -> list[int]:
  return [int(token) for token in sample.layout.query_token]


def test_long_videos_as_pixels_do_not_train_the_tower(media):
  """They are shown by the official rule, as far as rows have room for them."""
  capacity = dataclasses.replace(SPEC.capacity, frames=160, memory=1500)
  spec = dataclasses.replace(SPEC, capacity=capacity)
  records = [_record(name, video=f"{name}.mp4") for name in ("long", "clip")]
  dataset = _dataset(records, media, spec=spec)
  long, clip = (dataset.sample(n) for n in range(2))
  assert long.size == _size(dataset) and long.size.frames == 140
  row = build_row([long, clip], spec)
  assert row.frame_trains.tolist() == [0] * 140 + [1] * SECONDS
  text = TOKENIZER.decode([i for i in _words(long) if i >= 0])
  assert "lasts for 140.00 seconds, and 140 frames are" in text


def test_what_is_planned_for_each_modality(media):
  def size(case):
    files, options = CASES[case]
    return _size(_dataset([_record(case, **files)], media, **options))

  assert size("stored video").features == 4 * SECONDS
  assert size("raw video").frames == SECONDS
  # Short videos are repeated to 128 frames of 4 tokens and a newline.
  assert size("raw video").memory == size("stored video").memory == 128 * 5
  assert size("three images").tiles == 3
  assert size("plain image").tiles == 1
  assert size("tiled image").tiles > 1
  assert size("text").memory == size("text").queries == 0


def test_a_sample_depends_on_seed_epoch_and_index_only(media):
  records = [_record(str(n), video="clip.mp4") for n in range(2)]

  def queries(epoch, index=0, seed=0):
    dataset = _dataset(records, media, stored=True, seed=seed)
    dataset.sample(1, 5)  # what was asked for before must not matter
    return dataset.sample(index, epoch).layout.query_source

  np.testing.assert_array_equal(queries(0), queries(0))
  for other in (queries(1), queries(0, index=1), queries(0, seed=1)):
    assert (queries(0) != other).any()


def test_keyframes_are_kept_by_their_features(media):
  rule = Forgetting(temporal="keyframe")
  record = _record("clip", video="clip.mp4")
  dataset = _dataset([record], media, stored=True, forgetting=rule)
  sample = dataset.sample(0)
  means = sample.visual.astype(np.float32).mean(axis=1)
  expected = rule.kept_frames(128, np.random.default_rng(0), means)
  source = sample.layout.query_source
  assert sorted(set(source[source >= 0] // 5)) == expected.tolist()
  assert len(expected) == 32
  uniform = Forgetting().kept_frames(128, np.random.default_rng(0))
  assert expected.tolist() != uniform.tolist()
  assert sample.size == _size(dataset)


SCENES = 40


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
  """A stored video of two scenes, and what tells red frames by the word."""
  folder = tmp_path_factory.mktemp("scenes")
  width = CONFIG.vision.width
  features = np.random.default_rng(0).normal(size=(SCENES, 4, width)) * 0.1
  features[: SCENES // 2, :, 0] += 1
  features[SCENES // 2 :, :, 1] += 1
  store = FeatureStore(folder / "features", create=True)
  store.write("two.mp4", features, SCENES)
  words = np.zeros((TOKENIZER.vocab_size, 2))
  words[question_ids((Turn("human", "red"),), TOKENIZER), 0] = 1
  words[question_ids((Turn("human", "blue"),), TOKENIZER), 1] = 1
  return folder, Embedder(
    {
      "projector/fc1/kernel": np.eye(width, 2) * 9,
      "projector/fc1/bias": np.zeros(2),
      "projector/fc2/kernel": np.eye(2),
      "projector/fc2/bias": np.zeros(2),
      "decoder/embedding": words,
    }
  )


def _guided(scenes, *questions):
  """One conversation about the video for each tuple of questions."""
  folder, embedder = scenes
  records = []
  for n, asked in enumerate(questions):
    turns = [
      turn for text in asked for turn in (Turn("human", text), Turn("gpt", "a"))
    ]
    records.append(Record(f"{n}", "video", ("two.mp4",), tuple(turns), "", {}))
  rule = Forgetting(temporal="question")
  dataset = _dataset(records, folder, stored=True, forgetting=rule)
  dataset.embedder = embedder
  return dataset


def _kept_frames(sample):
  source = sample.layout.query_source
  return repeated_frames(SCENES)[np.unique(source[source >= 0] // 5)]


def test_the_scene_that_the_human_turns_name_is_kept(scenes):
  dataset = _guided(
    scenes, ("red",), ("blue",), ("blue", "blue", "red"), ("<image>\n",)
  )
  red, blue, both, none = (dataset.sample(i) for i in range(4))
  assert (_kept_frames(red) < SCENES // 2).all()
  assert (_kept_frames(blue) >= SCENES // 2).all()
  # Two of three turns say blue, and no frame shows both.
  assert (_kept_frames(both) >= SCENES // 2).all()
  uniform = Forgetting().kept_frames(128, np.random.default_rng(0))
  np.testing.assert_array_equal(
    _kept_frames(none), repeated_frames(SCENES)[uniform]
  )
  for index, sample in enumerate((red, blue, both, none)):
    assert sample.size == _size(dataset, index)


def test_samples_that_share_a_memory_keep_what_they_keep_alone(scenes):
  dataset = _guided(scenes, ("red",), ("blue",))
  together, failed = dataset.samples((0, 1), 3)
  assert not failed and [s.reuses_memory for s in together] == [False, True]
  for index, sample in enumerate(together):
    alone = dataset.sample(index, 3).layout
    for name in ("query_token", "query_source", "query_position"):
      np.testing.assert_array_equal(
        getattr(sample.layout, name), getattr(alone, name)
      )


def test_a_memory_of_kept_tokens_can_be_shared(media):
  """All conversations about a video keep the same tokens in an epoch."""
  records = [_record(name, video="clip.mp4") for name in "ab"]
  dataset = _dataset(records, media, stored=True, memory=MemoryOptions(scale=0))
  one, two = dataset.samples((0, 1), 3)[0]
  kept = one.layout.query_source[one.layout.query_source >= 0]
  np.testing.assert_array_equal(
    one.layout.query_source, two.layout.query_source
  )
  attended = np.flatnonzero(one.layout.repository.attended)
  np.testing.assert_array_equal(attended, kept)
  later = dataset.sample(0, 4).layout
  assert (later.query_source != one.layout.query_source).any()
  # With the whole memory each keeps its own.
  whole = _dataset(records, media, stored=True)
  one, two = whole.samples((0, 1), 3)[0]
  assert (one.layout.query_source != two.layout.query_source).any()


def test_a_model_is_needed_to_be_guided_by_questions(scenes):
  dataset = _guided(scenes, ("red",))
  dataset.embedder = None
  made, (failure,) = dataset.samples((0,), 0)
  assert not made and "needs the model's projector" in failure.reason


def _only_reason(dataset, name):
  assert len(dataset) == 1  # the good record stays
  (skipped,) = dataset.skipped
  assert skipped.id == name
  return skipped.reason


def test_bad_records_are_listed_with_values_and_remedy(media):
  good = _record("good", video="clip.mp4")
  stored = {
    "lost.mp4": "record bad: lost.mp4 is not in .*features; extract it first, "
    "or prepare with --media",
    "never.mp4": "never.mp4 has 1 frames and lasts 0.0 s .* extract it again",
  }
  for name, message in stored.items():
    records = [good, _record("bad", video=name)]
    reason = _only_reason(_dataset(records, media, stored=True), "bad")
    assert re.search(message, reason), reason
  raw = {
    "lost.mp4": "cannot read video .*lost.mp4",
    "long.mp4": r"config.rows.frames=20 < 140 of it; .*raise these capacities",
  }
  for name, message in raw.items():
    reason = _only_reason(
      _dataset([good, _record("bad", video=name)], media), "bad"
    )
    assert re.search(message, reason), reason


def test_sample_larger_than_a_row(media):
  records = [_record("big", video="clip.mp4"), _record("small")]
  capacity = dataclasses.replace(SPEC.capacity, memory=500)
  spec = dataclasses.replace(SPEC, capacity=capacity)
  reason = _only_reason(_dataset(records, media, spec=spec), "big")
  assert "record big: sample larger than a row" in reason
  assert "config.rows.memory=500 < 640 of it" in reason
  assert "raise these capacities" in reason


def test_an_answer_that_is_cut_off(media):
  """One position of the answer is enough to train on, none is not."""
  whole = _dataset([_record("long")], media)
  layout = whole.sample(0).layout
  opening = len(TOKENIZER.encode("<|im_start|>assistant\n"))
  spoken = np.flatnonzero(layout.labels == TOKENIZER.im_start)[2] + opening
  assert (
    len(_dataset([_record("long")], media, max_length=int(spoken) + 1)) == 1
  )
  dataset = _dataset([_record("long")], media, max_length=int(spoken))
  assert not len(dataset)
  (skipped,) = dataset.skipped
  assert f"record long: its answer starts at position {spoken}" in (
    skipped.reason
  )
  assert f"max_length is {spoken}; raise config.max_length" in skipped.reason


def test_videos_of_a_store_and_others_in_one_row(media):
  """The store has clip.mp4; copies of it and a longer video come as pixels."""
  shutil.copy(media / "clip.mp4", media / "raw.mp4")
  names = ("clip", "raw", "long", "lost")
  records = [_record(name, video=f"{name}.mp4") for name in names]
  capacity = dataclasses.replace(SPEC.capacity, frames=160, memory=2000)
  spec = dataclasses.replace(SPEC, capacity=capacity)
  dataset = _dataset(records, media, stored=True, spec=spec)
  assert _only_skipped(dataset).startswith("record lost: lost.mp4 is not in ")
  assert dataset.pixel_videos() == ["raw.mp4", "long.mp4"]
  assert dataset.notes[0].startswith("1 videos come as stored features, 2 that")
  clip, raw, long = samples = [dataset.sample(n) for n in range(3)]
  for n, sample in enumerate(samples):
    assert sample.size == _size(dataset, n)
  assert [s.kind for s in samples] == ["features", "frames", "frames"]
  assert clip.size.features == 4 * SECONDS and clip.size.frames == 0
  assert raw.size.features == 0 and raw.size.frames == SECONDS
  assert clip.size.memory == raw.size.memory == 128 * 5
  # The same is said of the file and of its features.
  assert clip.layout.query_token.tolist() == raw.layout.query_token.tolist()
  row = build_row([raw, clip, long], spec)
  # Tower and memory find each in its part of the visual tokens.
  base, pixels = spec.visual_base("frames"), row.memory_segment == 1
  features = row.memory_segment == 2
  source = row.memory_source
  assert source[features].max() == 4 * SECONDS - 1
  assert source[pixels & (source >= 0)].min() == base
  assert row.frame_trains.tolist() == [1] * SECONDS + [0] * 140


def _only_skipped(dataset):
  (skipped,) = dataset.skipped
  return skipped.reason


def test_samples_share_one_reading_of_a_video(media):
  records = [_record(str(n), video="clip.mp4") for n in range(3)]
  dataset = _dataset(records, media, stored=True)
  room = np.full((5 * SECONDS, CONFIG.vision.width), np.nan, "bfloat16")
  made, failed = dataset.samples((2, 0), 4, room)
  assert not failed
  assert [s.name for s in made] == ["2", "0"]
  assert [s.reuses_memory for s in made] == [False, True]
  for index, sample in zip((2, 0), made):
    alone = dataset.sample(index, 4)
    np.testing.assert_array_equal(sample.visual, alone.visual)
    np.testing.assert_array_equal(
      sample.layout.query_source, alone.layout.query_source
    )
    assert np.shares_memory(sample.visual, room)
  assert np.isfinite(room[: 4 * SECONDS].astype(np.float32)).all()
  assert np.isnan(room[4 * SECONDS :].astype(np.float32)).all()


def test_what_cannot_be_read_is_reported_not_raised(media):
  lost = parse_record(
    {
      "id": "bad",
      "image": ["a.png", "gone.png"],
      "conversations": [
        {"from": "human", "value": "<image><image>\nWhat?"},
        {"from": "gpt", "value": "Red."},
      ],
    },
    "test",
  )
  dataset = _dataset([_record("good"), lost], media)
  assert len(dataset) == 2  # only single images are opened before
  made, (failure,) = dataset.samples((1,), 0)
  assert made == []
  assert failure.id == "bad" and "gone.png" in failure.reason


def test_markers_and_images_differ_in_number(media):
  turns = (Turn("human", "<image>\nWhat?"), Turn("gpt", "Red."))
  record = Record("two", "image", ("a.png", "b.png"), turns, "", {})
  _, (failure,) = _dataset([record], media).samples((0,), 0)
  assert "record two" in failure.reason and "1 visual slots" in failure.reason
  assert "brings 2; write one <image> for each" in failure.reason


def test_keyframes_need_features(media):
  rule = Forgetting(temporal="keyframe")
  records = [_record("clip", video="clip.mp4"), _record("text")]
  pixels = _dataset(records, media, forgetting=rule)
  (skipped,) = pixels.skipped
  assert skipped.id == "clip" and pixels.usable.tolist() == [1]
  assert "clip.mp4 comes as pixels, and config.forgetting" in skipped.reason
  made, (failure,) = pixels.samples((0,), 0)
  assert not made and "keyframe needs stored features" in failure.reason
  stored = _dataset(records, media, stored=True, forgetting=rule)
  for index in (0, 1):  # text has nothing to choose from
    assert not stored.samples((index,), 0)[1]
