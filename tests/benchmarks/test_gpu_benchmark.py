"""The benchmark of a GPU, without one: it runs, and says what it could not do.

What needs a GPU is lowered for one.
"""

import dataclasses
import json
import re
import subprocess
import sys

import jax
import numpy as np
import pytest

from hourjax.benchmarks import gpu
from hourjax.models.config import HOUR_LLAVA_3B, AttentionConfig
from hourjax.parallel.mesh import MeshConfig, make_mesh
from hourjax.training.batch_sharding import abstract_batch
from hourjax.training.train_state import abstract_state, state_shardings
from hourjax.training.train_step import TrainStep, zero_sums
from tests.kernels.cudnn_double import use_cudnn_double
from tests.kernels.test_attention import dense

_RATES = {"seconds", "tflop_per_second", "share_of_peak"}


def test_errors_are_those_of_bfloat16():
  """cuDNN's too, by its double, also where the memory is in two halves."""
  with pytest.MonkeyPatch.context() as patch:
    use_cudnn_double(patch)
    choose = gpu.attention.choose_implementation
    patch.setattr(
      gpu.attention,
      "choose_implementation",
      lambda name, q: choose(name or "cudnn", q=q),
    )
    figures = gpu.measure_part("numerics")
  for implementation in ("ours", "reference"):
    for case in ("packed", "causal", "halves"):
      errors = figures[implementation][case]
      assert set(errors) == {"out", "dq", "dk", "dv"}, errors
      assert all(0 < error < 0.01 for error in errors.values()), errors
  assert figures["ours"] != figures["reference"]


@pytest.mark.parametrize("causal", [False, True])
def test_float64_is_that_of_the_tests(causal):
  rng = np.random.default_rng(0)
  q, k, v, d_out = (rng.normal(size=(1, 7, heads, 4)) for heads in (4, 2, 2, 4))
  ids = np.array([[1, 1, 1, 1, 2, 2, 0]]), np.array([[1, 1, 2, 2, 2, 3, 0]])
  got = gpu._float64(causal, q, k, v, *ids, d_out)
  for x, expected in zip(got, dense(q, k, v, *ids, causal, d_out)):
    np.testing.assert_allclose(x, expected, rtol=0, atol=1e-12)


def test_a_part_that_fails_or_hangs_costs_its_own_figures():
  figures = gpu.measure_gpu({"torch": 1, "nothing": 60})
  assert figures["torch"] == "not done within 1 s"
  assert figures["nothing"] == "KeyError: 'nothing'"
  assert 1 <= figures.pop("seconds") < 120
  assert sum(gpu.LIMITS.values()) <= 8 * 60 and set(gpu.LIMITS) == set(
    gpu.PARTS
  )


def test_an_error_becomes_one_line():
  def fail(size):
    raise RuntimeError(f"out of memory: {size}\nmore lines")

  assert gpu._attempt(fail, 3) == "RuntimeError: out of memory: 3"


@pytest.mark.parametrize(
  "gib, trained", [(0, True), (69, False), (75, False), (128, True)]
)
def test_the_decoder_is_trained_where_it_fits(gib, trained):
  """69 GiB are what jax takes of an H100, 128 of an H200."""
  optimizer = gpu.fitting_optimizer(HOUR_LLAVA_3B, gib << 30)
  assert (optimizer.decoder > 0) == trained
  assert optimizer.memaug and optimizer.projector and not optimizer.vision


def test_the_step_lowers_for_cuda(monkeypatch):
  """Each attention forward and backward by cuDNN, in the scan over layers."""
  use_cudnn_double(monkeypatch)  # on this platform, too, it may be named
  model = dataclasses.replace(
    gpu.SMALL.model,
    dtype="bfloat16",
    attention=AttentionConfig(implementation="cudnn"),
  )
  sizes = gpu.SMALL._replace(model=model)
  experiment = gpu.make_experiment(sizes, gpu.make_sample(sizes), 0)
  mesh = make_mesh(MeshConfig(fsdp=1), jax.local_devices()[:1])
  state, optimizer = abstract_state(experiment, mesh, 1000)
  step = TrainStep(experiment.model, optimizer, state_shardings(state))
  batch = abstract_batch(experiment.row_spec, 1, mesh)
  with jax.set_mesh(mesh):
    sums = jax.eval_shape(zero_sums, state.trained)
    traced = step.programs["accumulate"].trace(
      sums, state.trained, state.frozen, batch
    )
    lowered = traced.lower(lowering_platforms=("cuda",))
  calls = re.findall(r"custom_call @__cudnn\$(\w+)\(", lowered.as_text())
  # Self and cross in MemAug's stack, and the decoder's; their outputs are
  # saved, so that rematerialisation repeats none of them.
  assert sorted(calls) == ["fmhaSoftmax"] * 3 + ["fmhaSoftmaxBackward"] * 3


@pytest.mark.slow
def test_command():
  done = subprocess.run(
    [sys.executable, "-m", "hourjax.bench", "gpu", "--json"],
    capture_output=True,
    text=True,
    timeout=500,
  )
  assert not done.returncode, done.stderr[-3000:]
  figures = json.loads(done.stdout)
  attention = figures["attention"]
  assert attention["device"] == "cpu" and "memaug_triton" not in attention
  for call in ("memaug", "decoder"):
    for name in ("forward", "backward", "forward_and_backward"):
      assert set(attention[call][name]) == _RATES
      assert attention[call][name]["seconds"] >= 0
  assert "bench gpu 4/5: step, at most 170 s" in done.stderr
  assert figures["torch"]["flash"]["forward"]["seconds"] > 0
  assert figures["torch"]["cudnn"].startswith("RuntimeError")
  step = figures["step"]
  assert step["trained"] == "decoder, memaug, projector"
  assert step["losses"][-1] < step["losses"][0]
  assert figures["answer"]["questions_1"]["tokens_per_second"] > 0
