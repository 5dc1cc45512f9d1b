"""The block schedule against a search through all pairs of tiles."""

import functools

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hourjax.kernels.tpu import block_schedule

QUERY_TILES, KEY_TILES, CHUNKS, EACH = 4, 5, 2, 3
QUERIES, KEYS = QUERY_TILES * EACH, KEY_TILES * CHUNKS * EACH
FLAGS = ("FIRST", "LAST", "WHOLE", "PARTLY", "NEW")


def listed(schedule):
  """Of each row: [(query tile, key tile, set of flags)], with the padding."""
  parts = (
    block_schedule.query_tile(schedule.blocks),
    block_schedule.key_tile(schedule.blocks),
    schedule.blocks,
  )
  return [
    [
      (i, j, {x for x in FLAGS if block & getattr(block_schedule, x)})
      for i, j, block in zip(*row)
    ]
    for row in zip(*(np.asarray(x).tolist() for x in parts))
  ]


def shared(
  query_segment, key_segment, query_tiles=QUERY_TILES, tiles=KEY_TILES
):
  """The pairs of tiles of one row with an id in common."""
  queries = [set(x) - {0} for x in np.split(query_segment, query_tiles)]
  keys = [set(x) - {0} for x in np.split(key_segment, tiles)]
  return {
    (i, j)
    for i, query in enumerate(queries)
    for j, key in enumerate(keys)
    if query & key
  }


# To compile takes longer than to run.
@functools.partial(
  jax.jit,
  static_argnames=("by_key", "query_tiles", "key_tiles"),
  compiler_options={"xla_backend_optimization_level": 0},
)
def make_schedule(
  query_segment,
  key_segment,
  by_key,
  query_tiles=QUERY_TILES,
  key_tiles=KEY_TILES,
  offset=None,
):
  return block_schedule.make_schedule(
    query_segment,
    key_segment,
    query_tiles=query_tiles,
    key_tiles=key_tiles,
    chunks=CHUNKS,
    by_key=by_key,
    offset=offset,
  )


def check_row(row, count, query_segment, key_segment, by_key, exact):
  """One row's schedule, all of it; the first `count` entries are blocks."""
  axis = 1 if by_key else 0
  keys = [set(x.tolist()) for x in np.split(key_segment, KEY_TILES)]
  active = [x for x in row if x[2] & {"WHOLE", "PARTLY"}]
  real = [x for x in row if x[2]]
  assert row[: len(real)] == real and len(real) <= count
  # Afterwards the last one again, which does nothing and fetches no tile.
  assert all(x == (*real[-1][:2], set()) for x in row[len(real) :])
  pairs = [x[:2] for x in real]
  assert len(set(pairs)) == len(pairs)
  assert pairs == sorted(pairs, key=lambda pair: (pair[axis], pair[1 - axis]))
  # Every output tile has a first block and a last, perhaps the same one.
  tiles = [pair[axis] for pair in pairs]
  assert set(tiles) == set(range(KEY_TILES if by_key else QUERY_TILES))
  for n, (_, j, flags) in enumerate(real):
    assert ("FIRST" in flags) == (n == 0 or tiles[n - 1] != tiles[n])
    assert ("LAST" in flags) == (n + 1 == len(real) or tiles[n + 1] != tiles[n])
    if not flags & {"WHOLE", "PARTLY"}:
      assert tiles.count(tiles[n]) == 1  # there to write zeros
      continue
    whole = len(keys[j]) == 1 and keys[j] != {0}
    assert flags & {"WHOLE", "PARTLY"} == {"WHOLE" if whole else "PARTLY"}
    if not whole:
      assert "NEW" not in flags
    elif exact:
      assert ("NEW" in flags) == (j == 0 or not keys[j] & keys[j - 1])
    elif j == 0:
      assert "NEW" in flags
  found = {x[:2] for x in active}
  wanted = shared(query_segment, key_segment)
  assert found == wanted if exact else found >= wanted


@st.composite
def _packed(draw, segments, length):
  """Ids 1 ... segments in order, each at least once, and padding."""
  cuts = st.integers(1, length)
  ends = draw(st.lists(cuts, min_size=segments, max_size=segments, unique=True))
  return np.searchsorted(sorted(ends), np.arange(length), side="right") + 1


def _padded(ids, segments):
  return np.where(ids <= segments, ids, 0).astype(np.int32)


@given(data=st.data(), by_key=st.booleans())
def test_packed_rows_have_just_the_blocks_that_meet(data, by_key):
  rows = []
  for _ in range(2):
    n = data.draw(st.integers(0, 5))
    rows.append([_padded(data.draw(_packed(n, x)), n) for x in (QUERIES, KEYS)])
  queries, keys = (np.stack(x) for x in zip(*rows))
  made = make_schedule(queries, keys, by_key)
  longest = 0
  for row, query, key in zip(listed(made), queries, keys):
    longest = max(longest, sum(bool(x[2]) for x in row))
    check_row(row, int(made.count), query, key, by_key, exact=True)
  assert int(made.count) == longest


@given(data=st.data(), by_key=st.booleans())
def test_ids_in_any_order_have_all_blocks_that_meet(data, by_key):
  def ids(n):
    return st.lists(st.integers(0, 5), min_size=n, max_size=n)

  queries, keys = (
    np.array([data.draw(ids(n)) for _ in range(2)], np.int32)
    for n in (QUERIES, KEYS)
  )
  made = make_schedule(queries, keys, by_key)
  for row, query, key in zip(listed(made), queries, keys):
    check_row(row, int(made.count), query, key, by_key, exact=False)


@given(data=st.data(), by_key=st.booleans(), offset=st.integers(-40, 40))
def test_causal_blocks(data, by_key, offset):
  """Query t has the index t + offset; whole blocks need no mask of indices."""
  n = data.draw(st.integers(0, 5))
  queries, keys = (
    _padded(data.draw(_packed(n, x)), n) for x in (QUERIES, KEYS)
  )
  made = make_schedule(queries[None], keys[None], by_key, offset=offset)
  assert made.offset == offset
  (row,) = listed(made)
  same = (queries[:, None] == keys) & (keys > 0)
  before = np.arange(KEYS) <= np.arange(QUERIES)[:, None] + offset
  tiles = QUERY_TILES, EACH, KEY_TILES, CHUNKS * EACH

  def each(pairs, reduce):
    return reduce(reduce(pairs.reshape(tiles), axis=3), axis=1)

  meets, inner = each(same & before, np.any), each(before, np.all)
  one = [len(set(x.tolist())) == 1 for x in np.split(keys, KEY_TILES)]
  found = {(i, j): flags for i, j, flags in row if flags & {"WHOLE", "PARTLY"}}
  for i in range(QUERY_TILES):
    for j in range(KEY_TILES):
      flags = found.get((i, j), set())
      if meets[i, j]:
        assert flags & {"WHOLE", "PARTLY"} == {
          "WHOLE" if one[j] and inner[i, j] else "PARTLY"
        }
      # By tile it may seem so although no single query sees a key.
      elif not each(before, np.any)[i, j]:
        assert not flags
  written = {pair[by_key] for *pair, flags in row if "LAST" in flags}
  assert written == set(range(KEY_TILES if by_key else QUERY_TILES))


def test_no_causal_block_too_many():
  """Of one segment, with the first query before, among and after the keys."""
  queries, keys = (np.ones((1, n), np.int32) for n in (QUERIES, KEYS))
  first = np.arange(KEY_TILES) * CHUNKS * EACH
  last = (np.arange(QUERY_TILES) + 1) * EACH - 1
  for offset in range(-QUERIES, KEYS + 1):
    (row,) = listed(make_schedule(queries, keys, False, offset=offset))
    wanted = (first[None] <= last[:, None] + offset).sum()
    assert sum(bool(x[2] & {"WHOLE", "PARTLY"}) for x in row) == wanted


def test_ranges_of_tiles_and_chunks():
  """What the kernels ask about chunks: least id, largest id, the only one."""
  keys = np.repeat([1, 1, 1, 2, 2, 2, 2, 3, 0, 0], EACH).astype(np.int32)
  keys[2] = 0
  made = make_schedule(keys[None, :QUERIES], keys[None], False)
  huge = np.iinfo(np.int32).max
  low, high, only = (np.asarray(x[0]).tolist() for x in made.key)
  assert low == [1, 1, 1, 2, 2, 2, 2, 3, huge, huge]
  assert high == [1, 1, 1, 2, 2, 2, 2, 3, 0, 0]
  assert only == [0, 1, 1, 2, 2, 2, 2, 3, 0, 0]
  assert np.asarray(made.query.low[0]).tolist() == [1, 1, 1, 2]


def test_scalars_are_flat_and_in_the_kernels_order():
  ones = np.ones((2, KEYS), np.int32)
  made = make_schedule(ones[:, :QUERIES], ones, False)
  sizes = [x.shape for x in made.scalars()]
  tiles = QUERY_TILES * KEY_TILES
  ranges = *[QUERY_TILES] * 2, *[KEY_TILES * CHUNKS] * 3
  assert sizes == [(2 * tiles,), (1,), *((2 * n,) for n in ranges)]
  assert (made.scalars()[0] == made.blocks.reshape(-1)).all()


def test_the_most_tiles_have_their_own_numbers():
  """The last of 8,192 query tiles, with flags, is still a positive number."""
  last = block_schedule.MOST_TILES - 1
  ids = np.zeros((1, block_schedule.MOST_TILES), np.int32)
  ids[0, last] = 1
  made = make_schedule(
    ids,
    np.ones((1, CHUNKS), np.int32),
    False,
    query_tiles=block_schedule.MOST_TILES,
    key_tiles=1,
  )
  assert listed(made)[0][last] == (last, 0, set(FLAGS) - {"PARTLY"})
  assert (made.blocks > 0).all()


@pytest.mark.parametrize("by_key", [False, True])
def test_a_packed_row_costs_the_sum_of_its_segments(by_key):
  """Six videos in a row of real size: not all 76 x 230 tiles meet."""
  queries = np.array([3000, 1200, 900, 2500, 1100, 1000])
  keys = queries * 24
  made = make_schedule(
    _filled(queries, 76 * 128),
    _filled(keys, 230 * 1024),
    by_key,
    query_tiles=76,
    key_tiles=230,
  )
  least = (queries / 128 * keys / 1024).sum()
  most = ((queries / 128 + 2) * (keys / 1024 + 2)).sum()
  assert least < int(made.count) < most < 76 * 230 / 3


def _filled(lengths, total):
  ids = np.repeat(np.arange(1, len(lengths) + 1), lengths)
  return np.pad(ids, (0, total - len(ids))).astype(np.int32)[None]
