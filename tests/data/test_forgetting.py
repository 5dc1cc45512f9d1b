import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hourjax.data import repository
from hourjax.data.forgetting import (
  Forgetting,
  keep,
  kept_cells,
  kept_frames,
  kept_tokens,
  neighbour_similarity,
)
from hourjax.data.media import images
from hourjax.errors import UserError
from tests import golden_files

SWEEP = golden_files.npz("index_sweep.npz")
SWEEP_META = golden_files.meta_of("index_sweep.npz").get("sweep", {})


def _rng(*seed):
  return np.random.default_rng(seed)


@pytest.mark.parametrize("frames", SWEEP_META)
def test_kept_frames_of_many_lengths(frames):
  meta = SWEEP_META[frames]
  got = kept_frames(meta["frames_after"], Forgetting(), _rng())
  assert len(got) == meta["n_sampled"]
  assert (got[-1] == meta["frames_after"] - 1) == meta["last_frame_in_linspace"]
  np.testing.assert_array_equal(got, SWEEP[f"T{frames}.temporal_frames"])


def test_kept_frames_example():
  assert kept_frames(16, Forgetting(), _rng()).tolist() == [0, 5, 10, 15]


@given(
  frames=st.integers(128, 5000),
  temporal=st.sampled_from(["uniform", "random"]),
  seed=st.integers(0, 9),
)
def test_kept_frames_ascend_and_count(frames, temporal, seed):
  rule = Forgetting(temporal=temporal)
  got = kept_frames(frames, rule, _rng(seed))
  assert len(got) == min(512, frames // 4)
  assert (np.diff(got) > 0).all()
  assert got[0] >= 0 and got[-1] < frames
  if temporal == "uniform":
    assert got[0] == 0 and got[-1] == frames - 1
  np.testing.assert_array_equal(got, kept_frames(frames, rule, _rng(seed)))


@given(
  high=st.integers(1, 9),
  wide=st.integers(1, 9),
  frames=st.integers(1, 5),
  spatial=st.sampled_from(["random", "uniform"]),
)
def test_kept_cells_ascend_and_count(high, wide, frames, spatial):
  index = np.zeros((frames, high, wide), np.int32)
  grid = repository.Grid(index, np.zeros((frames, 0), np.int32))
  got = kept_cells(grid, frames, Forgetting(spatial=spatial), _rng(0))
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
  cells = kept_cells(grid, 2, rule, _rng())
  assert cells.tolist() == [[0, 2, 8, 10]] * 2
  (kept,) = kept_tokens(memory, rule, _rng())
  assert kept[:5].tolist() == [0, 2, 8, 10, 16]  # 16 is the newline


def test_keep_takes_newlines_of_kept_frames():
  memory = repository.video_repository(130, 2)
  ((grid,),) = memory.slots
  cells = np.array([[1], [3]])
  got = keep(grid, np.array([0, 129]), cells)
  assert got.tolist() == [1, 4, 129 * 5 + 3, 129 * 5 + 4]


@given(frames=st.integers(1, 300), seed=st.integers(0, 99))
def test_random_choice_is_a_function_of_seed_epoch_and_sample(frames, seed):
  memory = repository.video_repository(frames, 8)

  def kept(epoch):
    (tokens,) = kept_tokens(memory, Forgetting(), _rng(seed, epoch, 7))
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
  cells = kept_cells(grid, 1024, Forgetting(), _rng(0))
  assert len(np.unique(cells, axis=0)) == 1024
  counts = np.bincount(cells.ravel(), minlength=64)
  expected = 1024 * 16 / 64
  assert (np.abs(counts - expected) < 5 * (expected * 0.75) ** 0.5).all()


def test_base_and_grid_of_a_tiled_image_are_kept_apart():
  """Each gives a quarter; the grid's newlines stand where they stood."""
  geometry = images.anyres_geometry(30, 20, tile=10, side=4)
  memory = repository.tiled_repository(geometry, 4)
  ((base, grid),) = memory.slots
  (kept,) = kept_tokens(memory, Forgetting(), _rng(0))
  assert (np.diff(kept) > 0).all()
  assert np.isin(kept, base.index).sum() == 4
  cells = geometry.unpadded_h * geometry.unpadded_w
  assert np.isin(kept, grid.index).sum() == -(-cells // 4)
  newlines = kept[memory.source[kept] == repository.NEWLINE]
  np.testing.assert_array_equal(newlines, grid.newline[0])


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
  got = kept_frames(200, rule, _rng(), features)
  np.testing.assert_array_equal(got, odd)


def test_keyframes_need_features():
  rule = Forgetting(temporal="keyframe")
  with pytest.raises(UserError, match="needs stored features"):
    kept_frames(200, rule, _rng())


@pytest.mark.parametrize("field", ["spatial", "temporal"])
def test_unknown_rules_are_refused(field):
  rule = Forgetting()
  # The type checks of these tests would stop the constructor earlier.
  object.__setattr__(rule, field, "best")
  with pytest.raises(UserError, match=f"forgetting.{field} is 'best'; choose"):
    rule.__post_init__()
