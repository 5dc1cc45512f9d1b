"""Planned sizes are those of samples that are laid out."""

import dataclasses
import re

import numpy as np
import pytest
from PIL import Image

from hourjax.data import sample_sizes
from hourjax.data.columns import ColumnsBuilder, Measures, measure_record
from hourjax.data.dataset import Dataset, SampleOptions
from hourjax.data.demo.tokenizer import train_tokenizer
from hourjax.data.forgetting import Forgetting
from hourjax.data.records.record import parse_record
from hourjax.data.rows import RowSpec, Size
from hourjax.data.store.features import FeatureStore
from hourjax.data.tokenizer import Tokenizer

WORDS = ["what", " is", "red?", "It's", "on\nthe", "", "left,\n\n", "12.5"]
WORDS += ["minutes…", "é", "視頻", "<b>", "<|im_end|>"]
UNBOUNDED = Size(*[2**31 - 1] * 7)
SPEC = RowSpec(
  UNBOUNDED, frame_tokens=9, tile_tokens=25, width=4, image_size=20
)
RULES = [
  Forgetting(),
  Forgetting(spatial="uniform", ratio=3, max_frames=20),
  Forgetting(temporal="random", ratio=8, max_frames=3),
]


@pytest.fixture(scope="module", params=["trained", "bytes"])
def tokenizer(request):
  """One that knows the words and one that spells them."""
  texts = [" ".join(WORDS)] * 50 if request.param == "trained" else []
  return Tokenizer(train_tokenizer(texts), "test")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
  """A store with videos of many lengths, and images of many shapes."""
  folder = tmp_path_factory.mktemp("media")
  store, rng = FeatureStore(folder, create=True), np.random.default_rng()
  durations = [1.0, 7.35, 99.999, 128, 301.5, 1000.25]
  for n, duration in enumerate(durations):
    frames = max(int(duration), 128)
    store.write(f"{n}.mp4", np.zeros((frames, 9, 4)), duration)
  for n in range(12):
    width, height = rng.integers(4, 200, 2)
    Image.new("RGB", (int(width), int(height))).save(folder / f"{n}.png")
  return folder


def _records(rng, count):
  for n in range(count):
    kind = ("video", "image", "image", "text")[n % 4]
    media, marks = {}, 0
    if kind == "video":
      media, marks = {"video": f"{rng.integers(6)}.mp4"}, 1
    elif kind == "image":
      marks = 1 if n % 8 < 4 else int(rng.integers(2, 5))
      media = {"image": [f"{i}.png" for i in rng.integers(0, 12, marks)]}
    turns = []
    for turn in range(2 * int(rng.integers(1, 5))):
      words = rng.choice(WORDS, rng.integers(1, 30))
      text = " ".join(["So", *words] if turn % 2 else words)
      mark = "<image>\n" * marks if turn == 0 else ""
      role = "gpt" if turn % 2 else "human"
      turns.append({"from": role, "value": mark + text})
    yield parse_record({"id": n, "conversations": turns, **media}, "test")


@pytest.mark.parametrize("rule", RULES, ids=range(len(RULES)))
@pytest.mark.parametrize("single", ["tiled", "plain"])
def test_planned_sizes_are_the_real_ones(rule, single, tokenizer, root):
  seed = np.random.SeedSequence().entropy
  print(f"seed {seed}")  # shown if the test fails
  records = list(_records(np.random.default_rng(seed), 24))
  for options in (
    SampleOptions(forgetting=rule, single_image=single),
    SampleOptions(forgetting=rule, single_image=single, max_length=400),
  ):
    dataset = Dataset.from_records(
      records,
      tokenizer=tokenizer,
      spec=SPEC,
      options=options,
      media_root=root,
      features=FeatureStore(root),
    )
    if options.max_length > 400:
      assert not dataset.skipped
    for index in dataset.usable.tolist():
      sample = dataset.sample(index)
      planned = Size(*dataset.sizes[index].tolist())
      unkept = _newlines_not_kept(sample.layout, rule)
      assert sample.size.queries == planned.queries - unkept
      cut = planned.decoder == options.max_length
      assert sample.size.decoder == planned.decoder - unkept or cut
      assert sample.size.decoder <= planned.decoder
      same = {"queries": 0, "decoder": 0}
      assert dataclasses.replace(sample.size, **same) == dataclasses.replace(
        planned, **same
      )
      if rule.spatial == "uniform":
        assert sample.size == planned


def _newlines_not_kept(layout, rule) -> int:
  """Newlines of a tiled image that are planned, but whose row has no token."""
  kept = layout.query_source[layout.query_source >= 0]
  grids = [grid for slot in layout.repository.slots for grid in slot]
  return sum(
    rule.newline_count(*grid.index.shape[1:])
    - int(np.isin(grid.index[0], kept).any(axis=1).sum())
    for grid in grids
    if grid.newline.shape[1] > 1
  )


def test_uniform_forgetting_of_a_tiled_image():
  """1,323 decoder positions, where all newlines of it would make 1,349."""
  columns = ColumnsBuilder()
  columns.add(Measures(2, 35, 20, 30, 1, 1100, 700), "", "default")
  built = columns.build()
  made, problems = sample_sizes.sample_sizes(
    built,
    sample_sizes.video_input(built, None),
    tokenizer=Tokenizer(train_tokenizer([]), "test"),
    spec=dataclasses.replace(SPEC, tile_tokens=729, image_size=384),
    forgetting=Forgetting(spatial="uniform"),
    max_length=10_000,
    single_image="tiled",
  )
  size = Size(*made[0].tolist())
  assert not problems and size.decoder == 1349 - 26 == 1323
  assert size.queries == 20 + 1323 - 35


def test_narrow_images_are_planned_with_the_most_that_they_may_keep(root):
  """Their rows of one or two tokens often keep none, but never in the plan."""
  for n, size in enumerate([(6, 190), (190, 6), (18, 200)]):
    Image.new("RGB", size).save(root / f"narrow {n}.png")
  talk = [
    {"from": "human", "value": "<image>\nWhat?"},
    {"from": "gpt", "value": "It."},
  ]
  records = [
    parse_record(
      {"id": n, "image": f"narrow {n}.png", "conversations": talk}, "test"
    )
    for n in range(3)
  ]
  dataset = Dataset.from_records(
    records,
    tokenizer=Tokenizer(train_tokenizer([]), "test"),
    spec=SPEC,
    options=SampleOptions(),
    media_root=root,
  )
  fewer = 0
  for index in range(3):
    planned = Size(*dataset.sizes[index].tolist())
    for epoch in range(30):
      real = dataset.sample(index, epoch).size
      assert real.fits(planned)
      fewer += real.decoder < planned.decoder
  assert fewer > 20


def _about(video):
  talk = [
    {"from": "human", "value": "<image>\nWhat?"},
    {"from": "gpt", "value": "It."},
  ]
  return parse_record({"id": 1, "video": video, "conversations": talk}, "test")


def test_pixel_videos_come_with_frames_not_features(root):
  columns = ColumnsBuilder()
  record = _about("a.mp4")
  tokenizer = Tokenizer(train_tokenizer([]), "test")
  measures = measure_record(record, tokenizer, None)
  facts = {"a.mp4": (20.0, 600), "b.mp4": (None, 0), "c.mp4": (129.0, 3870)}
  for name, (duration, frames) in facts.items():
    columns.add(measures, "", "default", name, duration, frames)
  built = columns.build()
  visual = sample_sizes.video_input(built, None)
  # Below 128 seconds 128 of its 600 frames, else one a second.
  assert visual.num_frames.tolist() == [128, 0, 129]
  assert visual.problems.keys() == {1}
  assert "prepare with --media" in visual.problems[1]
  made, problems = sample_sizes.sample_sizes(
    built,
    visual,
    tokenizer=tokenizer,
    spec=dataclasses.replace(SPEC, capacity=Size(*[128] * 3, *[2**31 - 1] * 4)),
    forgetting=Forgetting(),
    max_length=10_000,
    single_image="tiled",
  )
  assert set(problems) == {1, 2}
  assert "config.rows.frames=128 < 129 of it; raise" in problems[2]
  size = dict(zip(sample_sizes.FIELDS, made[0].tolist()))
  assert size["frames"] == 128 and size["features"] == 0
  assert size["memory"] == 128 * 10


def test_each_video_comes_as_features_or_pixels(root):
  """What the store has as features, other files as pixels, and no third."""
  columns = ColumnsBuilder()
  record = _about("0.mp4")
  tokenizer = Tokenizer(train_tokenizer([]), "test")
  measures = measure_record(record, tokenizer, None)
  facts = {
    "0.mp4": (1.0, 0, None),  # in the store
    "4.mp4": (301.5, 9045, 30.0),  # in the store, and its frames are known
    "raw.mp4": (150.0, 4500, 30.0),
    "unknown.mp4": (None, 0, None),
  }
  for name, known in facts.items():
    columns.add(measures, "", "default", name, *known)
  built, store = columns.build(), FeatureStore(root)
  visual = sample_sizes.video_input(built, store)
  assert visual.stored.tolist() == [True, True, False, False]
  assert visual.num_frames.tolist() == [128, 301, 150, 0]
  assert visual.duration[:3].tolist() == [1.0, 301.5, 150.0]
  assert list(visual.problems) == [3]
  assert re.fullmatch(
    "unknown.mp4 is not in .*; extract it first, or prepare with --media so"
    " that it comes as pixels .number of frames .0. or duration .nan s. not"
    " known.",
    visual.problems[3],
  )

  def sized(frames=1000, **rule):
    return sample_sizes.sample_sizes(
      built,
      visual,
      tokenizer=tokenizer,
      spec=dataclasses.replace(
        SPEC, capacity=dataclasses.replace(UNBOUNDED, frames=frames)
      ),
      forgetting=Forgetting(**rule),
      max_length=10_000,
      single_image="tiled",
    )

  made, problems = sized()
  sizes = [Size(*row) for row in made.tolist()]
  assert set(problems) == {3}
  assert [size.features for size in sizes[:3]] == [128 * 9, 301 * 9, 0]
  assert [size.frames for size in sizes[:3]] == [0, 0, 150]
  assert [size.memory for size in sizes[:3]] == [1280, 3010, 1500]
  _, problems = sized(frames=0)
  assert set(problems) == {2, 3}
  assert problems[2].startswith("raw.mp4 comes as pixels (extract it, ")
  assert "config.rows.frames=0 < 150 of it; raise" in problems[2]
  # Rules that look at features cannot choose among pixels.
  for temporal in ("keyframe", "question"):
    _, problems = sized(temporal=temporal)
    assert set(problems) == {2, 3}
    assert problems[2] == (
      "raw.mp4 comes as pixels, and config.forgetting.temporal="
      f"{temporal} needs stored features; extract it, or choose uniform or"
      " random"
    )
  # Without a store, all come as pixels.
  pixels = sample_sizes.video_input(built, None)
  assert not pixels.stored.any()
  assert pixels.num_frames.tolist() == [0, 302, 150, 0]


def test_an_image_that_no_grid_can_show(root):
  Image.new("RGB", (1, 30_000)).save(root / "thin.png")
  record = parse_record(
    {
      "id": "thin",
      "image": "thin.png",
      "conversations": [
        {"from": "human", "value": "<image>\nWhat?"},
        {"from": "gpt", "value": "It."},
      ],
    },
    "test",
  )
  dataset = Dataset.from_records(
    [record],
    tokenizer=Tokenizer(train_tokenizer([]), "test"),
    spec=SPEC,
    options=SampleOptions(),
    media_root=root,
  )
  (skipped,) = dataset.skipped
  assert "record thin: an image of 1 x 30000 pixels is too narrow" in (
    skipped.reason
  )
