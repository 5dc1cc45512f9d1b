"""What each kind of rematerialisation keeps, and that it changes nothing."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hourjax.models import decoder
from hourjax.models.config import TINY
from hourjax.models.layers import rematerialised
from tests.drawn_params import draw_module


def _layer():
  return decoder.DecoderLayer(TINY.decoder, "float32", nnx.Rngs(0))


def _loss(remat):
  graph, params = draw_module(_layer)
  where = {
    "position": jnp.arange(16)[None],
    "segment": jnp.ones((1, 16), jnp.int32),
  }
  run = rematerialised(lambda x, p: nnx.merge(graph, p)(x, **where), remat)
  return lambda params, x: jnp.square(run(x, params)).sum(), params


def _products(remat):
  """Matrix products of the gradient, the layer's seven weights' and others."""
  loss, params = _loss(remat)
  x = jnp.ones((1, 16, TINY.decoder.width))
  return str(jax.make_jaxpr(jax.grad(loss))(params, x)).count("dot_general[")


@pytest.mark.slow
def test_dots_computes_no_product_again():
  none, dots, full = map(_products, ("none", "dots", "full"))
  # The last product is needed by nothing: six of seven are taken again.
  assert dots == none
  assert full == none + 6


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["dots", "full"])
def test_gradients_are_the_same(remat):
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5),
    _gradients(remat),
    _gradients("none"),
  )


@functools.cache
def _gradients(remat):
  loss, params = _loss(remat)
  x = np.random.default_rng(1).normal(size=(1, 16, TINY.decoder.width))
  return jax.jit(jax.grad(loss))(params, x.astype(np.float32))
