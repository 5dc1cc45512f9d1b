"""Masks of a chunk, and which chunk needs which, against a search."""

import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl

from hourjax.kernels.tpu import masks
from hourjax.kernels.tpu.tiles import Tiles, cut

KEYS = np.array([[0, 1, 2, 2, 2]], np.int32)
QUERIES = np.array([[2, 0, 1, 2]], np.int32)
LAST = np.array([[3, 9, 0, -4]], np.int32)
SHAPE = cut(Tiles(128, 256, 128, 128), queries=64, keys=256, groups=2, dim=8)


def test_several_segments():
  same = (QUERIES == KEYS.T) & (KEYS.T > 0)
  ids = masks.column(jnp.asarray(KEYS))
  queries, last = jnp.asarray(QUERIES), jnp.asarray(LAST)
  found = masks.allowed(ids, None, queries, None, 5)
  np.testing.assert_array_equal(found, same)
  found = masks.allowed(ids, None, queries, last, 5)
  before = np.arange(5)[:, None] <= LAST
  np.testing.assert_array_equal(found, same & before)


def test_one_segment():
  only, queries = jnp.int32(2), jnp.asarray(QUERIES)
  found = masks.allowed(None, only, queries, jnp.asarray(LAST), 5)
  before = np.arange(5)[:, None] <= LAST
  np.testing.assert_array_equal(found, before & (QUERIES == 2))
  assert masks.allowed(None, only, queries, None, 5) is None


@pytest.mark.parametrize("only", [0, 3])
@pytest.mark.parametrize("meets", [True, False])
@pytest.mark.parametrize("first", [-65, -64, -63, 0, 126, 127, 128])
def test_kinds(monkeypatch, only, meets, first):
  """64 queries from `first` on, and keys 0 to 127."""
  added = []
  monkeypatch.setattr(pl, "when", lambda yes: lambda f: f() if yes else None)
  masks.by_kind(
    lambda only, diagonal: added.append((only, diagonal)),
    meets=jnp.asarray(meets),
    only=jnp.int32(only),
    first=jnp.int32(first),
    shape=SHAPE,
  )
  seen = np.arange(128)[:, None] <= first + np.arange(64)
  if not meets or not seen.any():
    assert not added
  elif only:
    assert added == [(only, not seen.all())]
  else:
    assert added == [(None, True)]
