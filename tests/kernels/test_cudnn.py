"""Attention by cuDNN: what surrounds the library, and how it is called.

The library itself is replaced by `cudnn_double`, in float64. So these tests
say that segments, heads, masks and an outside log-sum-exp are handed over and
brought back right, if cuDNN does what it says; not what a GPU computes, and
not its speed.
"""

import functools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

from hourjax.kernels import cudnn
from hourjax.kernels.attention import attention, key_attention
from tests.kernels.cudnn_double import use_cudnn_double
from tests.kernels.test_attention import dense
from tests.kernels.test_triton import NAMES, _draw, _lse, _segments

# float32 against float64 on numbers of order 1.
ATOL = 2e-5
_3B, _7B = (16, 2), (28, 4)
slow = pytest.mark.slow


@pytest.fixture(autouse=True)
def double(monkeypatch):
  use_cudnn_double(monkeypatch)


# To compile takes longer than to run.
jit = functools.partial(
  jax.jit, compiler_options={"xla_backend_optimization_level": 0}
)


def call(*inputs, causal=False):
  """(out, dq, dk, dv, lse)"""
  limits = cudnn._MOST_SEQUENCES, cudnn._MAX_ELEMENTS
  return _compiled(*map(jnp.asarray, inputs), causal=causal, limits=limits)


@functools.partial(jit, static_argnames=("causal", "limits"))
def _compiled(q, k, v, query_segment, key_segment, d_out, causal, limits):
  """As `call`. `limits` are only a part of the key."""
  del limits
  segments = query_segment, key_segment
  out, lse = cudnn.forward(q, k, v, *segments, causal=causal)
  all_lse = jnp.where(lse == -1e30, 1e30, lse)
  gradients = cudnn.backward(
    q, k, v, *segments, all_lse, out, d_out, causal=causal
  )
  return out, *gradients, lse


def _check(inputs, query_segment, key_segment, causal=False, atol=ATOL):
  q, k, v, d_out = inputs
  segments = query_segment, key_segment
  got = call(q, k, v, *segments, d_out, causal=causal)
  expected = dense(q, k, v, *segments, causal, d_out)
  expected = (*expected, _lse(q, k, *segments, causal))
  _close((*NAMES, "lse"), got, expected, atol=atol)
  return got


def _close(names, got, expected, atol=ATOL):
  for name, x, reference in zip(names, got, expected, strict=True):
    x = np.asarray(x, np.float64)
    # rtol for -1e30, which float32 rounds.
    np.testing.assert_allclose(x, reference, 1e-6, atol, err_msg=name)


# --- numbers ----------------------------------------------------------------


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("heads", [_3B, _7B, (3, 3)])
def test_heads(heads, causal):
  segment = _segments(30, 27, total=61)
  _check(_draw(0, 1, 61, 61, *heads), segment, segment, causal)


@pytest.mark.parametrize("ordered", [True, False])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("most", [2, 64])
def test_any_segments(monkeypatch, most, causal, ordered):
  """Also gaps, ids that no key or no query has, and a row of padding alone.

  With two sequences a call, the rows take three calls.
  """
  monkeypatch.setattr(cudnn, "_MOST_SEQUENCES", most)
  rng = np.random.default_rng(most)
  keys = 70 if causal else 101
  query_segment = rng.integers(0, 7, (3, 70), np.int32)
  key_segment = rng.integers(0, 7, (3, keys), np.int32)
  key_segment[key_segment == 3] = 4
  query_segment[query_segment == 5] = 1000
  query_segment[1] = 0
  if ordered:
    query_segment.sort(1)
    key_segment.sort(1)
  if causal:
    key_segment = query_segment
  _check(_draw(3, 3, 70, keys, 4, 2), query_segment, key_segment, causal)


def test_scratch_memory_limits_the_sequences_of_a_call(monkeypatch):
  q, k = jnp.ones((2, 60, 4, 8)), jnp.ones((2, 90, 2, 8))
  ids = jnp.ones((2, 60), jnp.int32), jnp.ones((2, 90), jnp.int32)

  def most(scratch):
    monkeypatch.setattr(cudnn, "_SCRATCH", scratch)
    return cudnn._Packing(q, k, *ids, causal=False).most

  each = 4 * 2 * 60 * 4 * 8
  assert [most(n * each) for n in (0, 5, 1000)] == [2, 5, 64]
  monkeypatch.setattr(cudnn, "_MAX_ELEMENTS", 7 * 2 * 60 * 4 * 8)
  assert most(1000 * each) == 7


def test_large_scores_do_not_overflow():
  q, k, v, d_out = _draw(4, 1, 64, 96, 4, 2)
  segments = _segments(64, total=64), _segments(96, total=96)
  got = call(q * 100, k * 100, v, *segments, d_out)
  assert all(np.isfinite(x).all() for x in got)
  out = dense(q * 100, k * 100, v, *segments, False, d_out)[0]
  np.testing.assert_allclose(got[0], out, rtol=0, atol=1e-2)


@pytest.mark.parametrize("causal", [False, True])
def test_bfloat16(causal):
  inputs = [jnp.asarray(x, jnp.bfloat16) for x in _draw(5, 1, 60, 60, 4, 2)]
  segment = _segments(40, 18, total=60)
  out, dq, dk, dv, lse = _check(inputs, segment, segment, causal, atol=0.06)
  assert {x.dtype for x in (out, dk, dv)} == {jnp.dtype(jnp.bfloat16)}
  assert {x.dtype for x in (dq, lse)} == {jnp.dtype(jnp.float32)}


def test_keys_over_two_devices():
  """Half of the keys at a time, with the LSE and the output of all.

  Segment 1 lies in the first half, 3 in the second, 2 in both, and queries
  of segment 4 see nothing in either.
  """
  q, k, v, d_out = map(jnp.asarray, _draw(8, 1, 60, 90, 4, 2))
  query_segment = jnp.asarray(_segments(10, 20, 15, 10, total=60))
  key_segment = jnp.asarray(_segments(30, 31, 20, total=90))
  halves = [(x[:, :45], x[:, 45:]) for x in (k, v, key_segment)]
  memory = [(q, k, v, query_segment, ids) for k, v, ids in zip(*halves)]
  forward = jit(functools.partial(cudnn.forward, out_dtype=jnp.float32))
  backward = jit(cudnn.backward)
  parts = [forward(*half) for half in memory]
  lse = jnp.logaddexp(parts[0][1], parts[1][1])
  out = sum(x * jnp.exp(part - lse)[..., None] for x, part in parts)
  lse = jnp.where(lse < -1e29, 1e30, lse)
  gradients = [backward(*half, lse, out, d_out) for half in memory]
  (dq0, dk0, dv0), (dq1, dk1, dv1) = gradients
  got = out, dq0 + dq1, jnp.hstack([dk0, dk1]), jnp.hstack([dv0, dv1])
  expected = dense(q, k, v, query_segment, key_segment, False, d_out)
  _close(NAMES, got, expected)
  assert not got[0][0, 45:].any() and not got[1][0, 45:].any()


def test_key_attention():
  """Its output has other values than the one that is differentiated."""
  q, k, _, _ = map(jnp.asarray, _draw(6, 1, 40, 60, 4, 2))
  ids = _segments(20, 15, total=40), _segments(25, 30, total=60)
  ids = tuple(map(jnp.asarray, ids))
  got = jit(functools.partial(key_attention, implementation="cudnn"))(
    q, k, *ids
  )
  np.testing.assert_allclose(got, key_attention(q, k, *ids), rtol=1e-4)
  np.testing.assert_allclose(got.sum(), 4 * 35, rtol=1e-5)


# --- padding ----------------------------------------------------------------


def test_queries_that_see_nothing_get_zeros_and_pass_no_gradient():
  inputs = _draw(9, 1, 64, 96, 4, 2)
  query_segment = _segments(20, 17, total=64)  # 27 of padding
  key_segment = np.where(_segments(40, total=96) == 1, 2, 0).astype(np.int32)
  out, dq, dk, dv, lse = _check(inputs, query_segment, key_segment)
  blind = query_segment[0] != 2
  assert blind.sum() == 47
  assert not out[0, blind].any() and not dq[0, blind].any()
  assert (lse[0, blind] == np.float32(-1e30)).all()
  assert not dk[0, 40:].any() and not dv[0, 40:].any()
  assert dk[0, :40].all() and dv[0, :40].all()


@pytest.mark.parametrize("causal", [False, True])
def test_padding_may_hold_anything(causal):
  """Bit for bit the same with large numbers in all unused places."""
  clean = [jnp.asarray(x, "bfloat16") for x in _draw(10, 1, 60, 60, 4, 2)]
  segment = _segments(9, 36, total=60)
  segment[0, 20:23] = 0
  unused = (segment == 0)[:, :, None, None]
  dirty = [jnp.where(unused, 1e4, x) for x in clean]
  results = [
    call(q, k, v, segment, segment, d_out, causal=causal)
    for q, k, v, d_out in (clean, dirty)
  ]
  for x, reference in zip(*results):
    np.testing.assert_array_equal(x, reference)


# --- parts ------------------------------------------------------------------


def test_more_elements_than_an_offset_counts(monkeypatch):
  """Three parts of the keys, the last of padding and segment 3, two of q."""
  monkeypatch.setattr(cudnn, "_MAX_ELEMENTS", 2200)
  inputs = [jnp.asarray(x) for x in _draw(12, 1, 61, 150, 4, 2)]
  ids = _segments(20, 30, total=61), _segments(64, 64, 9, total=150)
  found = cudnn._check(*inputs[:3], causal=False)
  assert found == {"queries": 31, "keys": 50}
  *got, lse = _check(inputs, *ids)
  assert (lse[0, 50:] == np.float32(-1e30)).all()
  assert not got[2][0, 137:].any() and not got[3][0, 137:].any()


# --- lowering for a GPU, without one ----------------------------------------

_FORWARD, _BACKWARD = "__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward"


def _export(function, *shapes):
  # JAX promises no stability of these calls between versions; we only look.
  check = jax.export.DisabledSafetyCheck.custom_call
  checks = [check(_FORWARD), check(_BACKWARD)]
  exported = jax.export.export(
    jax.jit(function), platforms=["cuda"], disabled_checks=checks
  )
  return exported(*shapes).mlir_module()


def _calls(module):
  """Target -> (types of its operands, what it is configured with)."""
  found = {}
  for line in module.splitlines():
    match = re.search(r"custom_call @(__cudnn\$\w+)\(", line)
    if match:
      config = re.search(r'backend_config = "(.*?)", operand', line).group(1)
      config = json.loads(config.replace(r"\22", '"'))
      types = re.findall(r"tensor<(\S+?)>", line.rsplit(" : (", 1)[1])
      assert match.group(1) not in found
      found[match.group(1)] = types, config["cudnn_fmha_backend_config"]
  return found


def _shapes(queries, keys, heads, rows=1):
  shape, (heads, kv_heads) = jax.ShapeDtypeStruct, heads
  q = shape((rows, queries, heads, 128), jnp.bfloat16)
  k = shape((rows, keys, kv_heads, 128), jnp.bfloat16)
  return q, k, k, *(shape((rows, n), jnp.int32) for n in (queries, keys))


@pytest.mark.parametrize(
  "keys, heads, causal, packed",
  [
    # 26 sequences hold 2 GiB of dq; G queries of 2 or 4 heads.
    (235_520, _3B, False, ("1x77824x2", "1x235520x2", 26)),
    (235_520, _7B, False, ("1x68096x4", "1x235520x4", 15)),
    (9_728, _3B, True, ("1x9728x16", "1x9728x16", 26)),
  ],
)
def test_lowers_for_cuda(keys, heads, causal, packed):
  """As training calls it, without being told, on a GPU."""

  def step(q, k, v, query_segment, key_segment, d_out):
    def run(q, k, v):
      return attention(q, k, v, query_segment, key_segment, causal=causal)

    out, pull = jax.vjp(run, q, k, v)
    return out, *pull(d_out)

  device = AbstractDevice(device_kind="any", num_cores=1, platform="gpu")
  mesh = AbstractMesh((1,), ("data",), abstract_device=device)
  shapes = _shapes(9_728, keys, heads)
  with jax.sharding.use_abstract_mesh(mesh):
    calls = _calls(_export(step, *shapes, shapes[0]))
  q, k, most = packed
  q_type, k_type = f"{q}x128xbf16", f"{k}x128xbf16"
  _, length, n = q.split("x")
  stats = f"{most}x{n}x{length}xf32"
  sequences = [f"1x{most}xi32"] * 2 + [f"1x{most + 1}xi32"] * 2
  assert set(calls) == {_FORWARD, _BACKWARD}
  types, config = calls[_FORWARD]
  assert types[:7] == [q_type, k_type, k_type, *sequences]
  assert types[7:9] == [f"1x{n}x{length}x128xbf16", stats]
  types, backward_config = calls[_BACKWARD]
  inputs = [q_type, k_type, k_type, stats, q_type, q_type, *sequences]
  assert types[: len(inputs)] == inputs
  for options in (config, backward_config):
    assert options["mask_type"] == ("PADDING_CAUSAL" if causal else "PADDING")
    assert options["max_seg_per_batch"] == most
    assert options["fmha_scale"] == 128**-0.5
    assert options["dropout_rate"] == 0
    dimensions = options["intermediate_tensor_shape"]["dimensions"]
    assert dimensions == ["1", n, length, k.split("x")[1]]


@slow
def test_a_day_of_video_lowers_for_cuda():
  """7B: more elements of keys than an offset has numbers for."""
  shapes = _shapes(9_728, 24 * 3600 * 65, _7B)
  stats = jax.ShapeDtypeStruct((1, 9_728, 28), jnp.float32)
  q = shapes[0]
  assert set(_calls(_export(cudnn.forward, *shapes))) == {_FORWARD}
  module = _export(cudnn.backward, *shapes, stats, q, q)
  assert set(_calls(module)) == {_BACKWARD}


# --- refusals ---------------------------------------------------------------


@pytest.mark.parametrize(
  "dim, dtypes, message",
  [
    (256, ("bfloat16", "bfloat16"), "up to 128, not 256; convert them"),
    (12, ("float16", "float16"), "multiples of 8 up to 128, not 12"),
    (8, ("bfloat16", "float16"), "one dtype, not bfloat16, float16, float16"),
    (8, ("float8_e5m2",) * 2, "bfloat16 and float16, not float8_e5m2"),
  ],
)
def test_refusals(dim, dtypes, message):
  q = jax.ShapeDtypeStruct((1, 4, 2, dim), dtypes[0])
  k = jax.ShapeDtypeStruct((1, 9, 1, dim), dtypes[1])
  ids = [jax.ShapeDtypeStruct((1, n), jnp.int32) for n in (4, 9)]
  with pytest.raises(ValueError, match=message):
    jax.eval_shape(cudnn.forward, q, k, k, *ids)


def test_a_causal_row_of_more_elements_than_an_offset_is_refused(monkeypatch):
  """Which takes 300,000 positions; others are computed in parts."""
  monkeypatch.setattr(cudnn, "_MAX_ELEMENTS", 2 * 2 * 64 * 8)
  q = jax.ShapeDtypeStruct((1, 65, 2, 8), jnp.float32)
  k = jax.ShapeDtypeStruct((1, 65, 1, 8), jnp.float32)
  ids = [jax.ShapeDtypeStruct((1, 65), jnp.int32)] * 2
  message = "at most 64 queries of 2 heads in 1 rows, got 65; shard them"
  with pytest.raises(ValueError, match=message):
    jax.eval_shape(functools.partial(cudnn.forward, causal=True), q, k, k, *ids)
