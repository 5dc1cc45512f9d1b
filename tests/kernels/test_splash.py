"""Causal attention of the TPU path, in interpret mode, against float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hourjax.kernels import splash
from tests.kernels.test_attention import _draw, _segments, dense

ATOL = 2e-5


@functools.partial(jax.jit, static_argnames="interpret")
def _ours(q, k, v, segment, d_out, interpret=True):
  call = functools.partial(
    splash.attention, segment=segment, interpret=interpret
  )
  out, pull = jax.vjp(call, q, k, v)
  return out, *pull(d_out)


@pytest.mark.parametrize(
  "length, heads",
  [
    (130, (4, 2)),
    pytest.param(256, (4, 1), marks=pytest.mark.slow),
    pytest.param(640, (2, 2), marks=pytest.mark.slow),
  ],
)
def test_float64(length, heads):
  q, k, v, d_out = _draw(0, 2, length, length, *heads, dim=16)
  segment = np.concatenate(
    [_segments(60, 50, total=length), _segments(length - 9, total=length)]
  )
  got = _ours(*map(jnp.asarray, (q, k, v, segment, d_out)))
  expected = dense(q, k, v, segment, segment, True, d_out)
  for name, x, reference in zip(("out", "dq", "dk", "dv"), got, expected):
    np.testing.assert_allclose(x, reference, atol=ATOL, rtol=0, err_msg=name)
  blind = segment == 0
  assert blind.any()
  for x in got:
    assert not np.asarray(x)[blind].any()


@pytest.mark.parametrize(
  "length, block",
  [(16640, 640), (10240, 1024), (100, 128), (384, 384), (1664, 896)],
)
def test_block(length, block):
  """Pads little; of the blocks that pad least the largest."""
  assert splash._block(length) == block
