"""Causal attention of the TPU path, in interpret mode, against float64."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hourjax.kernels import splash
from tests.kernels.test_attention import _draw, _segments, dense

ATOL = 2e-5


# To compile takes longer than to run, so LLVM optimises nothing.
@functools.partial(
  jax.jit,
  static_argnames="interpret",
  compiler_options={"xla_backend_optimization_level": 0},
)
def _ours(q, k, v, query_segment, key_segment, d_out, interpret=True):
  call = functools.partial(
    splash.attention,
    query_segment=query_segment,
    key_segment=key_segment,
    interpret=interpret,
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
  key_segment = segment.copy()
  key_segment[1, :20] = 0  # the first queries of this row see nothing
  got = _ours(*map(jnp.asarray, (q, k, v, segment, key_segment, d_out)))
  expected = dense(q, k, v, segment, key_segment, True, d_out)
  for name, x, reference in zip(("out", "dq", "dk", "dv"), got, expected):
    np.testing.assert_allclose(x, reference, atol=ATOL, rtol=0, err_msg=name)
  blind = segment == 0
  assert blind.any()
  for x in got:
    assert not np.asarray(x)[blind].any()
  assert not np.asarray(got[0])[1, :20].any()


@pytest.mark.parametrize(
  "dtype, precision", [("float32", "HIGHEST"), ("bfloat16", "DEFAULT")]
)
def test_precision_of_every_product(dtype, precision):
  """Whatever is set around it, and in the backward pass too."""
  x = jnp.zeros((1, 128, 2, 128), dtype)
  ids = jnp.ones((1, 128), jnp.int32)
  with jax.default_matmul_precision(
    "highest" if dtype == "bfloat16" else "bfloat16"
  ):
    traced = jax.make_jaxpr(
      jax.grad(
        lambda *qkv: splash.attention(*qkv, ids, ids).sum(), argnums=(0, 1, 2)
      )
    )(x, x, x)
  found = re.findall(r"precision=(?:\(Precision\.)?(\w+)", str(traced))
  assert len(found) >= 8
  assert set(found) == {precision}


def test_dtypes_that_are_refused():
  x = jnp.zeros((1, 8, 2, 8), jnp.float16)
  ids = jnp.ones((1, 8), jnp.int32)
  with pytest.raises(ValueError, match="not float16, float16, float16"):
    splash.attention(x, x, x, ids, ids)


@pytest.mark.parametrize(
  "length, block",
  [(16640, 640), (10240, 1024), (100, 128), (384, 384), (1664, 896)],
)
def test_block(length, block):
  """Pads little; of the blocks that pad least the largest."""
  assert splash._block(length, 1024) == block


@pytest.mark.parametrize("length, block", [(2048, 512), (1792, 896)])
def test_the_mask_is_the_librarys(monkeypatch, length, block):
  """The same lists of blocks, from no more than blocks on the diagonal."""
  made = []

  def counted(self, index):
    made.append(real(self, index))
    return made[-1]

  real = splash.library.CausalMask.__getitem__
  with monkeypatch.context() as patch:
    patch.setattr(splash.library.CausalMask, "__getitem__", counted)
    ours = splash._kernel(length, 2, block, interpret=True)
  monkeypatch.setattr(splash, "_Causal", splash.library.CausalMask)
  theirs = splash._kernel(length, 2, block, interpret=True)
  for name in ("fwd_mask_info", "dq_mask_info", "dkv_mask_info"):
    pair = getattr(ours, name), getattr(theirs, name)
    assert pair[0] is not None
    jax.tree.map(np.testing.assert_array_equal, *pair)
  assert sum(x.size > 1 for x in made) * block < 7 * length
