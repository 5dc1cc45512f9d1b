"""Products of tiles, and where queries lie in them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hourjax.kernels.tpu import tile_layout
from hourjax.kernels.tpu.tiles import Tiles, cut


@pytest.mark.parametrize(
  "dtype, precision", [("float32", "HIGHEST"), ("bfloat16", "DEFAULT")]
)
@pytest.mark.parametrize("around", ["highest", "bfloat16"])
def test_precision_does_not_depend_on_what_is_set(dtype, precision, around):
  x = jnp.zeros((8, 8), dtype)
  with jax.default_matmul_precision(around):
    for dot in (tile_layout.dot, tile_layout.dot_transposed):
      traced = str(jax.make_jaxpr(dot)(x, x))
      assert f"precision=Precision.{precision}" in traced or (
        f"(Precision.{precision}" in traced
      )
      assert "preferred_element_type=float32" in traced


def test_places_are_of_the_queries_that_are_folded():
  shape = cut(Tiles(512, 128, 128, 128), queries=8, keys=1, groups=2, dim=1)
  index = jnp.arange(2 * shape.queries)[None, :, None]
  shape = shape._replace(query_tiles=2)
  numbers = tile_layout.fold_numbers(jnp.tile(index, (1, 1, 2)), shape, 0)
  found = tile_layout.places(shape) + shape.queries
  np.testing.assert_array_equal(numbers[0, 0, 1], found)
