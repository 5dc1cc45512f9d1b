"""How calls are cut into tiles."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hourjax.kernels.tpu.tiles import Tiles, cut
from hourjax.parallel.chips import CHIPS

OF_CHIPS = sorted(
  {x for chip in CHIPS.values() for pair in chip.tiles.values() for x in pair}
)


@given(
  of=st.sampled_from([*OF_CHIPS, Tiles(128, 256, 128, 128)]),
  queries=st.integers(1, 10_000),
  keys=st.integers(1, 300_000),
  groups=st.sampled_from([1, 2, 3, 4, 7, 8, 12, 13, 16, 64]),
  dim=st.sampled_from([8, 64, 80, 128, 129, 256]),
)
def test_a_cut_covers_everything_once(of, queries, keys, groups, dim):
  shape = cut(of, queries=queries, keys=keys, groups=groups, dim=dim)
  assert shape.groups == groups
  assert shape.rows == groups * shape.queries
  assert shape.rows % 128 == 0 and shape.dim % 128 == 0
  assert dim <= shape.dim < dim + 128
  # No tile of padding alone.
  assert 0 <= shape.query_tiles * shape.queries - queries < shape.queries
  assert 0 <= shape.key_tiles * shape.keys - keys < shape.keys
  # As asked for, or as little above as whole lanes of all heads allow.
  assert shape.rows <= max(of.rows, groups * 128)
  assert shape.keys <= of.keys and shape.chunk <= of.chunk
  assert shape.chunk % 128 == 0 and shape.chunks * shape.chunk == shape.keys
  assert shape.unit % 128 == 0 and shape.unit <= 1024
  assert shape.units == [
    (key, slice(row, row + shape.unit))
    for key in range(0, shape.keys, shape.chunk)
    for row in range(0, shape.rows, shape.unit)
  ]
  assert shape.units[-1][1].stop == shape.rows


@pytest.mark.parametrize(
  "groups, queries", [(1, 128), (2, 64), (3, 128), (7, 128), (8, 16), (16, 8)]
)
def test_few_queries_and_keys_get_small_tiles(groups, queries):
  for of in OF_CHIPS:
    shape = cut(of, queries=1, keys=1, groups=groups, dim=128)
    assert shape.queries == queries
    assert shape.keys == shape.chunk == 128
    assert shape.query_tiles == shape.key_tiles == 1


@pytest.mark.parametrize(
  "groups, rows, unit", [(8, 1024, 512), (7, 896, 896), (3, 768, 768)]
)
def test_the_rows_of_a_unit_divide_those_of_a_tile(groups, rows, unit):
  """3B, 7B, and rows that 512 does not divide."""
  of = Tiles(1024, 1024, 512, 512)
  shape = cut(of, queries=9728, keys=235520, groups=groups, dim=128)
  assert (shape.rows, shape.unit) == (rows, unit)
