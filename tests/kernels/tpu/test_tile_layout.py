"""Products of tiles, and masks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hourjax.kernels.tpu import tile_layout


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


def test_mask():
  keys, queries = np.array([[0, 1, 2, 2]]), np.array([[2, 0, 1]])
  got = tile_layout.mask(jnp.asarray(keys), jnp.asarray(queries))
  np.testing.assert_array_equal(got, (queries == keys.T) & (keys.T > 0))
