import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hourjax.data import repository
from hourjax.data.media import images
from hourjax.data.repository import NEWLINE
from hourjax.errors import UserError
from tests import golden_files

SWEEP = golden_files.npz("index_sweep.npz")
SWEEP_META = golden_files.meta_of("index_sweep.npz").get("sweep", {})
NEAREST = golden_files.npz("linspace_round_27.npz").get("table")
ANYRES = golden_files.load_json("anyres_table.json") or []

sizes = st.integers(1, 400)


# --- against golden ---------------------------------------------------------


@pytest.mark.parametrize("frames", SWEEP_META)
def test_video_of_many_lengths(frames):
  meta, frames = SWEEP_META[frames], int(frames)
  side = round((meta["kv_len"] / meta["frames_after"] - 1) ** 0.5)
  shown = repository.repeated_frames(frames)
  assert len(shown) == meta["frames_after"]
  assert (frames != len(shown)) == meta["upsampled"]
  expected = SWEEP.get(f"T{frames}.upsample_frames", shown)
  np.testing.assert_array_equal(shown, expected)

  memory = repository.video_repository(frames, side)
  assert len(memory.source) == meta["kv_len"]
  assert memory.position.max() == meta["max_k_pos"]
  np.testing.assert_array_equal(
    memory.source[memory.source >= 0] // side**2, np.repeat(shown, side**2)
  )


@pytest.mark.skipif(NEAREST is None, reason=golden_files.NO_GOLDEN)
def test_nearest_positions_match_torch():
  for length, expected in enumerate(NEAREST):
    if length:  # a grid of nothing is marked by -1
      got = repository.nearest_positions(length, NEAREST.shape[1])
      np.testing.assert_array_equal(got, expected, err_msg=str(length))


@pytest.mark.parametrize(
  "row", ANYRES, ids=lambda row: "{}x{}".format(*row["size_wh"])
)
def test_tiled_image_of_real_size(row):
  side = 27
  geometry = images.anyres_geometry(*row["size_wh"])
  memory = repository.tiled_repository(geometry, side)
  high, wide = row["resized_hw"]
  assert memory.visual == row["tiles"] * side**2
  assert len(memory.source) == side**2 + high * (wide + 1)
  scaled = row["resized_hw"] != row["unpadded_hw"]
  assert len(memory.blend_source) == (high * wide if scaled else 0)
  if NEAREST is not None:
    base = NEAREST[high][:, None] * wide + NEAREST[wide][None]
    np.testing.assert_array_equal(memory.position[: side**2], base.ravel())
  _check_grid(memory, geometry, side)


# --- without golden ---------------------------------------------------------


def test_video_example():
  two = repository.video_repository(2, 1)
  assert len(two.source) == 2 * repository.MIN_FRAMES
  assert two.source[:2].tolist() == [0, NEWLINE]
  assert two.source[-2:].tolist() == [1, NEWLINE]
  assert two.visual == 2
  many = repository.video_repository(130, 2)
  assert many.source[:6].tolist() == [0, 1, 2, 3, NEWLINE, 4]
  assert many.position.tolist() == list(range(130 * 5))


@given(frames=sizes)
def test_repetition_is_even(frames):
  shown = repository.repeated_frames(frames)
  assert shown[0] == 0 and shown[-1] == frames - 1
  steps = np.diff(shown)
  assert (steps >= 0).all()
  if frames >= repository.MIN_FRAMES:
    assert shown.tolist() == list(range(frames))
  else:
    assert len(shown) == repository.MIN_FRAMES and set(steps) <= {0, 1}


@given(frames=st.integers(1, 200), side=st.integers(1, 4))
def test_video_grid_finds_its_tokens(frames, side):
  memory = repository.video_repository(frames, side)
  ((grid,),) = memory.slots
  assert grid.temporal
  assert (memory.source[grid.newline] == NEWLINE).all()
  shown = repository.repeated_frames(frames)
  cells = np.arange(side**2).reshape(side, side)
  expected = shown[:, None, None] * side**2 + cells
  np.testing.assert_array_equal(memory.source[grid.index], expected)
  every = np.concatenate([grid.index.ravel(), grid.newline.ravel()])
  assert sorted(every) == list(range(len(memory.source)))


def test_images_share_the_newline_position():
  memory = repository.images_repository(2, 1)
  assert memory.source.tolist() == [0, NEWLINE, 1, NEWLINE]
  assert memory.position.tolist() == [0, 2, 1, 2]
  assert len(memory.slots) == 2
  for n, (grid,) in enumerate(memory.slots):
    assert not grid.temporal
    assert grid.index.tolist() == [[[2 * n]]]
    assert grid.newline.tolist() == [[2 * n + 1]]


def test_text_has_no_memory():
  memory = repository.empty_repository()
  assert memory.slots == () and memory.visual == 0
  assert memory.source.size == memory.position.size == 0


@given(width=sizes, height=sizes, side=st.integers(2, 6))
def test_tiled_image(width, height, side):
  try:
    geometry = images.anyres_geometry(
      width, height, tile=54, side=side, max_tiles=4
    )
  except UserError:
    # Only what is thinner than one feature of a single tile may be refused.
    assert max(width, height) > side * min(width, height)
    return
  memory = repository.tiled_repository(geometry, side)
  _check_grid(memory, geometry, side)


def _check_grid(memory, geometry, side):
  """Cells read the right place of the grid of tiles, by bilinear weights.

  Each visual token is tagged with the row and column it has in the grid of
  tiles, cut to the unpadded part; interpolation keeps such tags exact.
  """
  (base, grid), *others = memory.slots
  assert not others and not base.temporal and not grid.temporal
  assert base.newline.size == 0
  np.testing.assert_array_equal(
    memory.source[base.index].ravel(), np.arange(side**2)
  )
  high, wide = geometry.resized_h, geometry.resized_w
  assert grid.index.shape == (1, high, wide)
  assert grid.newline.shape == (1, high)
  assert (memory.source[grid.newline] == NEWLINE).all()
  np.testing.assert_array_equal(
    memory.position[grid.index].ravel(), np.arange(high * wide)
  )
  assert set(memory.position[grid.newline].ravel()) == {high * wide}

  rows, columns = geometry.grid_h * side, geometry.grid_w * side
  tags = np.full((memory.visual, 2), np.nan)
  for tile in range(1, geometry.tiles):
    down, right = divmod(tile - 1, geometry.grid_w)
    y, x = np.mgrid[0:side, 0:side]
    y = y + down * side - (rows - geometry.unpadded_h) // 2
    x = x + right * side - (columns - geometry.unpadded_w) // 2
    part = slice(tile * side**2, (tile + 1) * side**2)
    tags[part] = np.stack([y, x], -1).reshape(-1, 2)
  blends = np.einsum(
    "rf,rfd->rd", memory.blend_weight, tags[memory.blend_source]
  )
  got = np.concatenate([tags, blends])[memory.source[grid.index[0]]]
  for axis, (old, new) in enumerate(
    [(geometry.unpadded_h, high), (geometry.unpadded_w, wide)]
  ):
    centres = np.clip((np.arange(new) + 0.5) * old / new - 0.5, 0, old - 1)
    expected = np.moveaxis(
      np.broadcast_to(centres, (got.shape[1 - axis], new)), 1, axis
    )
    np.testing.assert_allclose(got[..., axis], expected, atol=1e-4)
