"""Stored features and pixels in one run, beside a run over pixels alone."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from hourjax.data.demo.tokenizer import MARKUP, write_tokenizer
from hourjax.data.prepare import build, lists
from hourjax.data.rows import build_row, stack_rows
from hourjax.errors import UserError
from hourjax.extraction.worker import extract_videos
from hourjax.models.params import init_params, with_params
from hourjax.models.siglip import pool_frames
from hourjax.training import loop, train_step
from hourjax.training.config import build_experiment
from hourjax.training.data_loader import open_dataset
from hourjax.training.optimizer import component
from tests import videos
from tests.training import runs

WORDS = ["What", " is", " it", "?", "It", " is", " red", "."]
# Frames at one a second; the last is too long for the tower to learn from.
FRAMES = {"a.mp4": 20, "b.mp4": 24, "long.mp4": 140}
ROWS = {"features": 768, "frames": 256, "tiles": 12, "blends": 64,
        "memory": 3600, "queries": 2048, "decoder": 2304}  # fmt: skip

# Compiling takes longer than running, most of it in LLVM.
QUICK = {
  "xla_backend_optimization_level": 0,
  "xla_llvm_disable_expensive_passes": True,
}


def _talk(marks=1):
  return [
    {"from": "human", "value": "<image>\n" * marks + "What is it?"},
    {"from": "gpt", "value": "It is red."},
  ]


def _records():
  media = [{"video": name} for name in ("a.mp4", "b.mp4", "a.mp4", "long.mp4")]
  media += [{"image": "i.png"}, {"image": ["i.png", "j.png"]}, {}]
  for n, fields in enumerate(media):
    files = fields.get("image", [])
    marks = len(files) if isinstance(files, list) and files else len(fields)
    yield {"id": f"{n}", **fields, "conversations": _talk(marks)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """Videos, images and text; features of a.mp4 and long.mp4."""
  path = tmp_path_factory.mktemp("mixed")
  for name, frames in FRAMES.items():
    videos.write(path / "videos" / name, frames, 1)
  rng = np.random.default_rng(0)
  for name, size in (("i", (70, 150)), ("j", (64, 64))):
    pixels = rng.integers(0, 256, (*size, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(path / "videos" / f"{name}.png")
  write_tokenizer(path / "tokenizer", [*MARKUP, *WORDS])
  (path / "records.json").write_text(json.dumps(list(_records())))
  options = lists.Options(
    items=(lists.Item.of_files([str(path / "records.json")]),),
    tokenizer=str(path / "tokenizer"),
    media=str(path / "videos"),
  )
  build.build(path / "stage3", options, workers=1)
  experiment = _experiment(path)
  for store, names in (("features", "a.mp4\nlong.mp4"), ("long", "long.mp4")):
    (path / "names").write_text(names)
    extract_videos(
      init_params(experiment.model, experiment.seed),
      experiment.model,
      videos=path / "videos",
      out=path / store,
      names=path / "names",
    )
  return path


def _experiment(folder, **changes):
  rows = {f"rows__{name}": value for name, value in ROWS.items()}
  values = {"data__max_skipped": 0.0} | rows | changes
  return build_experiment(runs.small_config(folder, **values).to_dict())


def _row(folder, store, features=None):
  """All samples in one row, by the store of this name; "" is none.

  Args:
    folder: of the data.
    store: name of the feature store.
    features: float32 features of each video, in place of the stored ones.
  """
  where = str(folder / store) if store else ""
  dataset = open_dataset(_experiment(folder, data__features=where))
  samples = [dataset.sample(n) for n in range(len(dataset))]
  spec = _experiment(folder).row_spec
  batch = stack_rows([build_row(samples, spec)])
  if features is not None:
    stored = [
      features[dataset.record(n).media[0]]
      for n, sample in enumerate(samples)
      if sample.kind == "features" and sample.visual is not None
    ]
    exact = np.zeros(batch.features.shape, np.float32)
    found = np.concatenate(stored).reshape(-1, spec.width)
    exact[0, : len(found)] = found
    batch = batch._replace(features=exact)
  return batch, samples


@pytest.fixture(scope="module")
def params(folder):
  experiment = _experiment(folder)
  return init_params(experiment.model, experiment.seed)


@pytest.fixture(scope="module")
def exact(folder, params):
  """Features of the videos in float32, as the step makes them of pixels."""
  config = _experiment(folder).model
  assert config.dtype == "float32"

  @jax.jit
  def encode(params, pixels):
    tokens = with_params(config, params).encode(pixels)
    return pool_frames(tokens, config.pool_side)

  _, samples = _row(folder, "")
  media = [record.get("video") for record in _records()]
  return {
    name: np.asarray(encode(params, sample.visual))
    for name, sample in zip(media, samples)
    if name
  }


@pytest.fixture(scope="module")
def gradients(folder, params):
  """Loss and gradients of a batch, with the tower trained or frozen."""
  config = _experiment(folder).model
  step = jax.jit(
    functools.partial(train_step.accumulate, config=config),
    compiler_options=QUICK,
  )

  def run(batch, tower):
    trained, frozen = {}, {}
    for path, value in params.items():
      held = component(path) == "vision" and not tower
      (frozen if held else trained)[path] = value
    zero = train_step.zero_sums(trained)
    sums = step(zero, trained, frozen, jax.tree.map(jnp.asarray, batch))
    return float(sums.loss), jax.tree.map(np.asarray, sums.grads)

  return run


def _differences(some, others):
  """The largest difference of each gradient, relative to its norm."""
  assert some.keys() == others.keys()
  return {
    path: np.abs(value - others[path]).max()
    / max(np.linalg.norm(others[path]), 1e-9)
    for path, value in some.items()
  }


@pytest.mark.slow
def test_loss_and_gradients_are_those_of_pixels(folder, exact, gradients):
  """Stage 3: the tower is frozen, and features are what it would compute."""
  mixed, samples = _row(folder, "features", exact)
  pixels, _ = _row(folder, "")
  assert [s.kind for s in samples[:4]] == [
    "features", "frames", "features", "features",
  ]  # fmt: skip
  # Forgetting keeps the same tokens of both.
  for name in ("query_token", "query_source", "query_position", "target"):
    np.testing.assert_array_equal(getattr(mixed, name), getattr(pixels, name))
  assert pixels.frames.any(axis=(2, 3, 4)).sum() > (
    mixed.frames.any(axis=(2, 3, 4)).sum()
  )
  loss, grads = gradients(mixed, tower=False)
  other_loss, others = gradients(pixels, tower=False)
  assert loss == pytest.approx(other_loss, rel=1e-6)
  assert not any(component(path) == "vision" for path in grads)
  assert max(_differences(grads, others).values()) < 1e-5


@pytest.mark.slow
def test_the_tower_learns_from_short_videos_alone(folder, exact, gradients):
  """Stage 2: a long video gives it nothing, as features or as pixels."""
  long_stored, _ = _row(folder, "long", exact)
  pixels, _ = _row(folder, "")
  loss, grads = gradients(long_stored, tower=True)
  other_loss, others = gradients(pixels, tower=True)
  assert loss == pytest.approx(other_loss, rel=1e-6)
  # An exact gradient of zero is rounding in both.
  nothing = "vision/encoder/layers/k/bias"
  found = _differences(grads, others)
  found.pop(nothing)
  assert max(found.values()) < 1e-5
  tower = {path for path in grads if component(path) == "vision"}
  # The last norm of the tower is not read.
  read = {path for path in tower - {nothing} if "post_norm" not in path}
  assert all(np.linalg.norm(grads[path]) > 0 for path in read)
  # With a.mp4 as features, it learns from b.mp4 and the images alone.
  fewer, _ = _row(folder, "features", exact)
  _, less = gradients(fewer, tower=True)
  changed = _differences(less, grads)
  assert all(changed[path] > 1e-3 for path in read)


@pytest.mark.slow
def test_a_mixed_run_goes_on_as_if_never_interrupted(folder):
  options = {"steps": 4, "checkpoint_every": 2, "batch_rows": 1}
  experiment = _experiment(folder, **options)
  loop.train(experiment, folder / "whole")
  with runs.interrupted_at(3):
    loop.train(experiment, folder / "resumed")
  loop.train(experiment, folder / "resumed")
  assert runs.losses(folder / "resumed") == runs.losses(folder / "whole")
  # The same from pixels alone, but for features rounded to bfloat16.
  pixels = _experiment(folder, data__features="", **options)
  loop.train(pixels, folder / "pixels")
  for mixed, other in zip(
    runs.losses(folder / "whole"), runs.losses(folder / "pixels"), strict=True
  ):
    assert mixed[1:3] == pytest.approx(other[1:3], rel=5e-3)
    assert mixed[3] == other[3]


def test_pixels_need_a_media_folder(folder):
  experiment = _experiment(folder, data__media="")
  with pytest.raises(UserError) as error:
    open_dataset(experiment)
  assert str(error.value) == (
    "config.data.media is empty, and 1 videos come as pixels; set"
    " --config.data.media=FOLDER to read the pixels of b.mp4, or extract them"
    f" to {folder / 'features'}"
  )
