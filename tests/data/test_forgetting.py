import typing

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

from hourjax.data import repository
from hourjax.data.forgetting import (
  EMBEDDER_PARAMS,
  TEMPORAL_STRATEGIES,
  Embedder,
  Forgetting,
  Temporal,
  memory_indices,
  neighbour_similarity,
)
from hourjax.data.media import images
from hourjax.errors import UserError
from hourjax.models.memory import Projector
from tests import golden_files

SWEEP = golden_files.npz("index_sweep.npz")
SWEEP_META = golden_files.meta_of("index_sweep.npz").get("sweep", {})


def _rng(*seed):
  return np.random.default_rng(seed)


@pytest.mark.parametrize("frames", SWEEP_META)
def test_kept_frames_of_many_lengths(frames):
  meta = SWEEP_META[frames]
  got = Forgetting().kept_frames(meta["frames_after"], _rng())
  assert len(got) == meta["n_sampled"]
  assert (got[-1] == meta["frames_after"] - 1) == meta["last_frame_in_linspace"]
  np.testing.assert_array_equal(got, SWEEP[f"T{frames}.temporal_frames"])


def test_kept_frames_example():
  assert Forgetting().kept_frames(16, _rng()).tolist() == [0, 5, 10, 15]


@given(
  frames=st.integers(128, 5000),
  temporal=st.sampled_from(["uniform", "random"]),
  seed=st.integers(0, 9),
)
def test_kept_frames_ascend_and_count(frames, temporal, seed):
  rule = Forgetting(temporal=temporal)
  got = rule.kept_frames(frames, _rng(seed))
  assert len(got) == min(512, frames // 4)
  assert (np.diff(got) > 0).all()
  assert got[0] >= 0 and got[-1] < frames
  if temporal == "uniform":
    assert got[0] == 0 and got[-1] == frames - 1
  np.testing.assert_array_equal(got, rule.kept_frames(frames, _rng(seed)))


@given(
  high=st.integers(1, 9),
  wide=st.integers(1, 9),
  frames=st.integers(1, 5),
  spatial=st.sampled_from(["random", "uniform"]),
)
def test_kept_cells_ascend_and_count(high, wide, frames, spatial):
  index = np.zeros((frames, high, wide), np.int32)
  grid = repository.Grid(index, np.zeros((frames, 0), np.int32))
  got = Forgetting(spatial=spatial).kept_cells(grid, frames, _rng(0))
  count = -(-high * wide // 4)
  if spatial == "uniform":
    count = -(-high // 2) * -(-wide // 2)
  assert got.shape == (frames, count)
  assert (np.diff(got, axis=1) > 0).all()
  assert got.min() >= 0 and got.max() < high * wide


def test_uniform_cells_are_every_second_row_and_column():
  memory = repository.video_repository(128, 4)
  ((grid,),) = memory.slots
  rule = Forgetting(spatial="uniform")
  cells = rule.kept_cells(grid, 2, _rng())
  assert cells.tolist() == [[0, 2, 8, 10]] * 2
  (kept,) = rule.kept_tokens(memory, _rng())
  assert kept[:5].tolist() == [0, 2, 8, 10, 16]  # 16 is the newline


def test_keep_takes_newlines_of_kept_frames():
  memory = repository.video_repository(130, 2)
  ((grid,),) = memory.slots
  cells = np.array([[1], [3]])
  got = memory_indices(grid, np.array([0, 129]), cells)
  assert got.tolist() == [1, 4, 129 * 5 + 3, 129 * 5 + 4]


@given(frames=st.integers(1, 300), seed=st.integers(0, 99))
def test_random_choice_is_a_function_of_seed_epoch_and_sample(frames, seed):
  memory = repository.video_repository(frames, 8)

  def kept(epoch):
    (tokens,) = Forgetting().kept_tokens(memory, _rng(seed, epoch, 7))
    return tokens

  first = kept(0)
  shown = max(frames, repository.MIN_FRAMES)
  assert len(first) == shown // 4 * 17
  assert first.dtype == np.int32 and (np.diff(first) > 0).all()
  assert (memory.source[first] == repository.NEWLINE).sum() == shown // 4
  np.testing.assert_array_equal(kept(0), first)
  assert not np.array_equal(kept(1), first)


def test_random_cells_are_drawn_evenly_and_differ_by_frame():
  memory = repository.video_repository(1024, 8)
  ((grid,),) = memory.slots
  cells = Forgetting().kept_cells(grid, 1024, _rng(0))
  assert len(np.unique(cells, axis=0)) == 1024
  counts = np.bincount(cells.ravel(), minlength=64)
  expected = 1024 * 16 / 64
  assert (np.abs(counts - expected) < 5 * (expected * 0.75) ** 0.5).all()


def test_base_and_grid_of_a_tiled_image_are_kept_apart():
  """Each gives a quarter; the grid's newlines stand where they stood."""
  geometry = images.anyres_geometry(30, 20, tile=10, side=4)
  memory = repository.tiled_repository(geometry, 4)
  ((base, grid),) = memory.slots
  (kept,) = Forgetting().kept_tokens(memory, _rng(0))
  assert (np.diff(kept) > 0).all()
  assert np.isin(kept, base.index).sum() == 4
  cells = geometry.unpadded_h * geometry.unpadded_w
  assert np.isin(kept, grid.index).sum() == -(-cells // 4)
  newlines = kept[memory.source[kept] == repository.NEWLINE]
  rows = np.isin(grid.index[0], kept).any(axis=1)
  np.testing.assert_array_equal(newlines, grid.newline[0][rows])


def _official_newlines(positions, high, wide):
  """Positions of kept cells with newlines among them, as the official code.

  It goes through the first cells of the rows and puts a newline before the
  first kept cell from there on, unless it has just done so, and one at the end.
  """
  parts, start = [], 0
  for first in range(wide, high * wide, wide):
    end = int(np.searchsorted(positions, first))
    if start < end < len(positions):
      parts += [positions[start:end], [high * wide]]
      start = end
  return np.concatenate([*parts, positions[start:], [high * wide]])


@pytest.mark.parametrize("spatial", ["random", "uniform"])
@pytest.mark.parametrize(
  "size", [(400, 30), (30, 400), (90, 60), (1000, 41), (20, 20), (7, 300)]
)
def test_newlines_of_a_tiled_image_are_the_official_ones(size, spatial):
  """Only those of rows in which a token is kept, however narrow the image."""
  geometry = images.anyres_geometry(*size, tile=10, side=3, max_tiles=4)
  memory = repository.tiled_repository(geometry, 3)
  ((base, grid),) = memory.slots
  _, high, wide = grid.index.shape
  rule = Forgetting(spatial=spatial)
  fewest = high
  for seed in range(20):
    rng = _rng(seed)
    kept_base = rule.kept_cells(base, 1, rng)
    cells = rule.kept_cells(grid, 1, rng)[0]
    (kept,) = rule.kept_tokens(memory, _rng(seed))
    of_grid = kept[kept >= base.index.size]
    np.testing.assert_array_equal(
      memory.position[of_grid], _official_newlines(cells, high, wide)
    )
    assert len(kept) - len(of_grid) == kept_base.size
    newlines = int((memory.source[kept] == repository.NEWLINE).sum())
    assert newlines <= rule.newline_count(high, wide)
    fewest = min(fewest, newlines)
    if spatial == "uniform":
      assert newlines == rule.newline_count(high, wide) == -(-high // 2)
  if spatial == "random" and wide <= 4 and high > 4:
    assert fewest < high  # the narrowest do lose some


def test_uniform_forgetting_of_a_tiled_image():
  """An image of 1100 x 700: 26 of the 52 rows keep a newline, in real sizes."""
  geometry = images.anyres_geometry(1100, 700)
  assert (geometry.resized_h, geometry.resized_w) == (52, 81)
  memory = repository.tiled_repository(geometry, 27)
  (kept,) = Forgetting(spatial="uniform").kept_tokens(memory, _rng(0))
  newlines = (memory.source[kept] == repository.NEWLINE).sum()
  assert (newlines, len(kept)) == (26, 14 * 14 + 26 * 41 + 26)


# --- keyframes --------------------------------------------------------------


@given(frames=st.integers(1, 20), seed=st.integers(0, 5))
def test_neighbour_similarity(frames, seed):
  features = _rng(seed).normal(size=(frames, 3))
  unit = features / np.linalg.norm(features, axis=1, keepdims=True)
  expected = [
    np.mean(
      [
        unit[i] @ unit[j]
        for j in range(max(0, i - 4), min(frames, i + 5))
        if j != i
      ]
      or [0]
    )
    for i in range(frames)
  ]
  got = neighbour_similarity(features)
  np.testing.assert_allclose(got, expected, atol=1e-5)


def test_keyframes_differ_from_their_neighbours():
  features = np.tile([1.0, 0.0], (200, 1))
  odd = np.arange(3, 200, 4)
  features[odd] = [0.0, 1.0]
  rule = Forgetting(temporal="keyframe")
  got = rule.kept_frames(200, _rng(), features)
  np.testing.assert_array_equal(got, odd)


def test_keyframes_need_features():
  rule = Forgetting(temporal="keyframe")
  with pytest.raises(UserError, match="needs stored features"):
    rule.kept_frames(200, _rng())


# --- question-guided ----------------------------------------------------------

QUESTION = Forgetting(temporal="question")


def _embedder(words=3, features=3, seed=0):
  """A projector that copies features, and one word for each direction."""
  rng = _rng(seed)
  width = features
  return Embedder(
    {
      "projector/fc1/kernel": 9 * np.eye(features, width),
      "projector/fc1/bias": rng.normal(size=width) * 0.01,
      "projector/fc2/kernel": np.eye(width) / 9,
      "projector/fc2/bias": rng.normal(size=width) * 0.01,
      "decoder/embedding": np.eye(words, width),
    }
  )


@pytest.mark.slow
def test_mean_projected_token_is_that_of_the_projector():
  rng = _rng(0)
  shapes = [(5, 7), (7,), (7, 7), (7,), (4, 7)]
  params = {
    path: rng.normal(size=shape).astype(np.float32)
    for path, shape in zip(EMBEDDER_PARAMS, shapes)
  }
  features = rng.normal(size=(37, 3, 5)).astype(ml_dtypes.bfloat16)
  projector = Projector(5, 7, dtype="float32", rngs=nnx.Rngs(0))
  for name in ("fc1", "fc2"):
    layer = getattr(projector, name)
    layer.kernel[...] = params[f"projector/{name}/kernel"]
    layer.bias[...] = params[f"projector/{name}/bias"]
  expected = projector(jnp.asarray(features, jnp.float32)).mean(axis=1)
  embedder = Embedder(params)
  got = embedder.mean_projected(features)
  np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)
  # A frame's vector does not depend on the frames beside it.
  np.testing.assert_allclose(
    embedder.mean_projected(features[20:21])[0], got[20], rtol=1e-5, atol=1e-5
  )
  words = params["decoder/embedding"]
  got = embedder.mean_word(np.array([1, 3, 3]))
  np.testing.assert_allclose(got, (words[1] + 2 * words[3]) / 3, rtol=1e-6)


def _scenes(frames=240):
  """Three scenes, each of a third of the frames and a direction of its own."""
  scene = np.arange(frames) * 3 // frames
  noise = _rng(1).normal(size=(frames, 2, 3)) * 0.1
  return scene, np.eye(3)[scene][:, None] + noise


@pytest.mark.parametrize("word", [0, 1, 2])
def test_the_scene_that_a_question_names_is_kept(word):
  scene, features = _scenes()
  summary = QUESTION.summarise_frames(features, _embedder())
  got = QUESTION.kept_frames(240, _rng(), summary, np.array([word]))
  assert len(got) == 240 // 4 == QUESTION.frame_count(240)
  assert (np.diff(got) > 0).all()
  assert (scene[got] == word).all()
  again = QUESTION.summarise_frames(features, _embedder())
  np.testing.assert_array_equal(
    got, QUESTION.kept_frames(240, _rng(1), again, np.array([word]))
  )


def test_repeated_frames_are_kept_together_in_order():
  _, features = _scenes(6)  # repeated to 128, about 21 times each
  summary = QUESTION.summarise_frames(features, _embedder())
  got = QUESTION.kept_frames(128, _rng(), summary, np.array([1]))
  shown = repository.repeated_frames(6)[got]
  assert len(got) == 32 and set(shown) == {2, 3}
  cosines = [(m @ [0, 1, 0]) / np.linalg.norm(m) for m in summary[0][[2, 3]]]
  best = 2 + int(np.argmax(cosines))
  assert (shown == best).sum() == (repository.repeated_frames(6) == best).sum()


def test_without_words_frames_are_evenly_spaced():
  _, features = _scenes()
  summary = QUESTION.summarise_frames(features, _embedder())
  got = QUESTION.kept_frames(240, _rng(), summary, np.zeros(0, np.int32))
  np.testing.assert_array_equal(got, Forgetting().kept_frames(240, _rng()))


def test_what_question_guided_forgetting_lacks_is_named():
  _, features = _scenes()
  with pytest.raises(UserError, match="question needs stored features"):
    QUESTION.kept_frames(240, _rng(), None, np.array([1]))
  with pytest.raises(UserError, match="needs the model's projector and word"):
    QUESTION.summarise_frames(features)
  summary = QUESTION.summarise_frames(features, _embedder())
  with pytest.raises(UserError, match="needs a question"):
    QUESTION.kept_frames(240, _rng(), summary)
  # Images and text have nothing to choose frames from.
  memory = repository.images_repository(2, 4)
  assert len(QUESTION.kept_tokens(memory, _rng())) == 2


def test_each_strategy_says_what_it_needs():
  needs = {
    name: (strategy.summarise is not None, strategy.needs_question)
    for name, strategy in TEMPORAL_STRATEGIES.items()
  }
  assert needs == {
    "uniform": (False, False),
    "random": (False, False),
    "keyframe": (True, False),
    "question": (True, True),
  }
  assert set(needs) == set(typing.get_args(Temporal))
  _, features = _scenes()
  assert Forgetting().summarise_frames(features) is None


@pytest.mark.parametrize("field", ["spatial", "temporal"])
def test_unknown_rules_are_refused(field):
  rule = Forgetting()
  # The type checks of these tests would stop the constructor earlier.
  object.__setattr__(rule, field, "best")
  with pytest.raises(UserError, match=f"forgetting.{field} is 'best'; choose"):
    rule.__post_init__()


@pytest.mark.parametrize("ratio", [1, 2, 4, 8, 16])
def test_ratio_of_frames_apart_from_that_of_tokens(ratio):
  """Of 9 tokens a quarter is kept, and one frame of `ratio`."""
  memory = repository.video_repository(160, 3)
  rule = Forgetting(temporal_ratio=ratio)
  (tokens,) = rule.kept_tokens(memory, _rng(0))
  expected = np.linspace(0, 159, 160 // ratio).astype(int)
  frames, counts = np.unique(tokens // 10, return_counts=True)
  assert frames.tolist() == expected.tolist()
  assert set(counts) == {3 + 1}  # and the newline
  (same,) = Forgetting(ratio=ratio).kept_tokens(memory, _rng(0))
  assert np.unique(same // 10).tolist() == expected.tolist()
