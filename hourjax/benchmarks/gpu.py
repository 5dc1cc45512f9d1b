"""What one NVIDIA GPU does: attention, a training step, answering.

  python -m hourjax.bench gpu --json

Every part runs in a worker process of its own, with a time limit, so that one
that hangs, fails or fills the memory costs only its own figures. Together they
take at most eight minutes. Without a GPU all of them run at tiny sizes, which
says that they run and nothing about speed. This module is the worker, too: it
reads the name of its part from standard input.
"""

import dataclasses
import functools
import importlib.util
import json
import math
import pathlib
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from hourjax import progress
from hourjax.batch import IGNORE
from hourjax.benchmarks.ask import TINY_ASKED, random_model
from hourjax.benchmarks.attention import measure_here, median, peak, rates
from hourjax.data.conversations import IMAGE, Conversation
from hourjax.data.forgetting import Forgetting
from hourjax.data.layout import build_layout
from hourjax.data.pipeline import ReadOptions
from hourjax.data.repository import video_repository
from hourjax.data.rows import Sample, Size, build_row, stack_rows
from hourjax.kernels import attention, cudnn
from hourjax.kernels.constants import NO_KEYS, NO_PART
from hourjax.models.config import HOUR_LLAVA_3B, ModelConfig
from hourjax.models.flops import sample_flops
from hourjax.models.params import param_shapes
from hourjax.parallel.mesh import MeshConfig, make_mesh
from hourjax.planning.compiler.compile_pool import run_worker
from hourjax.training.batch_sharding import batch_shardings
from hourjax.training.config import DataConfig, Experiment
from hourjax.training.optimizer import OptimizerConfig, component
from hourjax.training.train_state import (
  abstract_state,
  fresh_state,
  state_shardings,
)
from hourjax.training.train_step import TrainStep

# Most seconds of each part.
LIMITS = {"attention": 100, "torch": 60, "numerics": 60, "step": 170,
          "answer": 90}  # fmt: skip
# Without it jax takes three quarters of the memory, and no more.
_ENVIRONMENT = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.92"}
_GIB = 1 << 30
_STEPS = 3
# Bytes of a trained parameter: itself, its summed and its own gradient and its
# second moment in float32, its first moment in bfloat16. A frozen one has 4.
_TRAINED_BYTES, _FROZEN_BYTES = 18, 4
# Set aside for activations, and for what is cast and copied.
_ACTIVATION_BYTES = 24 * _GIB
_QUESTION = "What does the person in the kitchen pick up?"


class Sizes(NamedTuple):
  """Says how large everything is.

  Attributes:
    model: what is trained and asked.
    heads: query and KV heads of attention.
    dim: head dim of attention.
    queries: of attention alone, as of a row with an hour of video.
    keys: memory tokens of attention alone.
    small: queries and keys that are compared with float64.
    frames: of the video that a step is trained on and questions are about.
    tokens: of an answer.
    questions: that are asked at once.
  """

  model: ModelConfig
  heads: tuple[int, int]
  dim: int
  queries: int
  keys: int
  small: tuple[int, int]
  frames: int
  tokens: int
  questions: tuple[int, ...]


FULL = Sizes(
  model=HOUR_LLAVA_3B,
  heads=(16, 2),
  dim=128,
  queries=9_728,
  keys=235_520,
  small=(640, 2048),
  frames=3600,
  tokens=64,
  questions=(1, 4),
)
SMALL = Sizes(
  model=TINY_ASKED,
  heads=(4, 2),
  dim=16,
  queries=64,
  keys=256,
  small=(40, 90),
  frames=8,
  tokens=4,
  questions=(1,),
)


def measure_gpu(limits: Mapping[str, int] = LIMITS) -> dict[str, Any]:
  """Returns the figures of every part, or in their place why there are none.

  Args:
    limits: most seconds of each part, by name.
  """
  figures: dict[str, Any] = {}
  began = time.monotonic()
  for number, (part, limit) in enumerate(limits.items(), 1):
    text = f"bench gpu {number}/{len(limits)}: {part}, at most {limit} s"
    print(text, file=sys.stderr, flush=True)
    with progress.step(part):
      outcome = run_worker(
        "hourjax.benchmarks.gpu", part, limit=limit, environment=_ENVIRONMENT
      )
    late = f"not done within {limit} s" if outcome.late else outcome.reason
    figures[part] = late or outcome.answer
  return figures | {"seconds": round(time.monotonic() - began, 1)}


def measure_part(part: str) -> dict[str, Any]:
  """Returns the figures of a part, measured in this process."""
  sizes = FULL if jax.default_backend() == "gpu" else SMALL
  return PARTS[part](sizes)


def _attempt(function: Callable[..., Any], *arguments: Any) -> Any:
  """Returns the result of a function, or in one line why it failed."""
  try:
    return function(*arguments)
  # It may fail in any way, in a compiler or in another library.
  except Exception as error:
    lines = f"{type(error).__name__}: {error}".splitlines()
    return lines[0][:300]


def _attention(sizes: Sizes) -> dict[str, Any]:
  """Times the attention calls of a row with an hour of video.

  Returns:
    The device; `memaug`, attention to the memory; `decoder`, causal attention;
    on a GPU `memaug_triton`, by the kernels that cuDNN replaces.
  """
  device = jax.devices()[0]
  call = functools.partial(measure_here, *sizes.heads, sizes.dim, sizes.queries)
  calls = {
    "memaug": functools.partial(call, sizes.keys),
    "decoder": functools.partial(call, sizes.queries, causal=True),
  }
  if device.platform == "gpu":
    triton = functools.partial(call, sizes.keys, implementation="triton")
    calls["memaug_triton"] = triton
  return {
    "device": device.device_kind,
    "jax": jax.__version__,
    "memory_gib": round(_memory("bytes_limit") / _GIB, 1),
    "implementation": _chosen(sizes.dim),
    "without_cudnn": cudnn.unsupported(
      jnp.bfloat16, sizes.dim, getattr(device, "compute_capability", None)
    ),
    **{name: _attempt(timed) for name, timed in calls.items()},
  }


def _chosen(dim: int) -> str:
  """Returns the implementation of attention that this device gets."""
  q = jnp.zeros((1, 1, 1, dim), jnp.bfloat16)
  return attention.choose_implementation(None, q=q)


def _memory(name: str) -> int:
  """Returns a statistic of the first device's memory; 0 if it has none."""
  return (jax.local_devices()[0].memory_stats() or {}).get(name, 0)


def _torch(sizes: Sizes) -> dict[str, Any]:
  """Times torch's attention on the same shapes, by back end."""
  if importlib.util.find_spec("torch") is None:
    return {"missing": "torch is not installed"}
  from torch.nn.attention import SDPBackend  # not among the requirements

  backends = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
  }
  return {
    name: _attempt(_torch_rates, sizes, backend)
    for name, backend in backends.items()
  }


def _torch_rates(sizes: Sizes, backend: Any) -> dict[str, Any]:
  """Returns the figures of one back end, as `rates` does."""
  import torch  # not among the requirements
  from torch.nn.attention import sdpa_kernel

  on_gpu = torch.cuda.is_available()

  def array(heads: int, length: int) -> torch.Tensor:
    return torch.randn(
      (1, heads, length, sizes.dim),
      dtype=torch.bfloat16,
      device="cuda" if on_gpu else "cpu",
      requires_grad=True,
    )

  heads, kv_heads = sizes.heads
  q = array(heads, sizes.queries)
  k, v = array(kv_heads, sizes.keys), array(kv_heads, sizes.keys)
  d_out = torch.randn_like(q)

  def finish() -> None:
    if on_gpu:
      torch.cuda.synchronize()

  def forward() -> torch.Tensor:
    with sdpa_kernel(backend):
      out = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, enable_gqa=True
      )
    finish()
    return out

  out = forward()

  def backward() -> None:
    torch.autograd.grad(out, (q, k, v), d_out, retain_graph=True)
    finish()

  product = 2.0 * sizes.dim * heads * sizes.queries * sizes.keys
  kind = torch.cuda.get_device_name() if on_gpu else "CPU"
  return rates(product, peak(kind), median(forward), median(backward))


def _numerics(sizes: Sizes) -> dict[str, Any]:
  """Compares attention and its gradients in bfloat16 with float64.

  Returns:
    For `packed` rows of several segments and padding, for `causal` ones, and
    for a memory in `halves`, whose gradients are computed one half at a time
    from the log-sum-exp and the output of both: the largest difference of each
    output, as a share of the largest number in it. `reference` is plain JAX on
    the same inputs: what bfloat16 itself costs.
  """
  queries, keys = sizes.small
  rng = np.random.default_rng(0)
  segment = {
    n: np.sort(rng.integers(0, 5, (2, n)), axis=1).astype(np.int32)
    for n in (queries, keys)
  }
  cases = {"packed": keys, "causal": queries, "halves": keys}

  def errors(case: str, implementation: str) -> dict[str, float]:
    keys = cases[case]
    q, k, v, d_out = (
      jnp.asarray(rng.normal(size=(2, n, heads, sizes.dim)), jnp.bfloat16)
      for n, heads in zip(
        (queries, keys, keys, queries), (*sizes.heads, *sizes.heads[::-1])
      )
    )
    ids = jnp.asarray(segment[queries]), jnp.asarray(segment[keys])
    causal = case == "causal"
    backend = attention.backend(implementation, causal)
    parts = 2 if case == "halves" else 1
    run = jax.jit(functools.partial(_in_parts, backend, parts))
    got = run(q, k, v, *ids, d_out)
    expected = _float64(causal, q, k, v, *ids, d_out)
    return {
      name: float(np.abs(np.asarray(x, np.float64) - y).max() / np.abs(y).max())
      for name, x, y in zip(("out", "dq", "dk", "dv"), got, expected)
    }

  ways = {"ours": _chosen(sizes.dim), "reference": "reference"}
  return {
    name: {case: _attempt(errors, case, how) for case in cases}
    for name, how in ways.items()
  }


def _in_parts(
  backend: attention.Backend,
  parts: int,
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  query_segment: jax.Array,
  key_segment: jax.Array,
  d_out: jax.Array,
) -> tuple[jax.Array, ...]:
  """Returns out, dq, dk and dv, as so many devices compute them."""
  split = [jnp.split(x, parts, axis=1) for x in (k, v, key_segment)]
  memory = [(q, k, v, query_segment, ids) for k, v, ids in zip(*split)]
  found = [backend.forward(*part, out_dtype=jnp.float32) for part in memory]
  lse = functools.reduce(jnp.logaddexp, (lse for _, lse in found))
  weighed = [x * jnp.exp(part - lse)[..., None] for x, part in found]
  out = functools.reduce(jnp.add, weighed).astype(q.dtype)
  lse = jnp.where(lse <= NO_PART / 2, NO_KEYS, lse)
  delta = (out.astype(jnp.float32) * d_out.astype(jnp.float32)).sum(-1)
  summary = out if backend.takes_out else delta
  gradients = [backend.backward(*part, lse, summary, d_out) for part in memory]
  dq, dk, dv = zip(*gradients)
  dq = functools.reduce(jnp.add, dq)
  return out, dq, jnp.hstack(dk), jnp.hstack(dv)


def _float64(causal: bool, *arrays: Any) -> tuple[np.ndarray, ...]:
  """Returns out, dq, dk and dv in float64, with all scores at once.

  Args:
    causal: whether a query reads only the keys up to its own place.
    *arrays: q, k, v, the ids of queries and keys, and the gradient of out.
  """
  ids, key_ids = (np.asarray(x) for x in arrays[3:5])
  q, k, v, d_out = (np.asarray(arrays[n], np.float64) for n in (0, 1, 2, 5))
  kv_heads, dim = k.shape[2:]
  q, d_out = (
    rearrange(x, "b t (k g) c -> b k g t c", k=kv_heads) for x in (q, d_out)
  )
  seen = (ids[:, :, None] == key_ids[:, None]) & (ids > 0)[:, :, None]
  if causal:
    seen &= np.tri(*seen.shape[1:], dtype=bool)
  score = np.einsum("bkgtc,bskc->bkgts", q, k) * dim**-0.5
  score = np.where(seen[:, None, None], score, -np.inf)
  top = np.maximum(score.max(-1, keepdims=True), -1e300)
  weight = np.exp(score - top)
  weight /= np.maximum(weight.sum(-1, keepdims=True), 1e-300)
  out = np.einsum("bkgts,bskc->bkgtc", weight, v)
  d_score = np.einsum("bkgtc,bskc->bkgts", d_out, v)
  d_score -= (out * d_out).sum(-1, keepdims=True)
  d_score *= weight * dim**-0.5
  dq = np.einsum("bkgts,bskc->bkgtc", d_score, k)
  out, dq = (rearrange(x, "b k g t c -> b t (k g) c") for x in (out, dq))
  dk = np.einsum("bkgts,bkgtc->bskc", d_score, q)
  return out, dq, dk, np.einsum("bkgts,bkgtc->bskc", weight, d_out)


def _step(sizes: Sizes) -> dict[str, Any]:
  """Times training steps on one video, whose features are there.

  Everything is computed again in the backward pass but the layers' inputs, and
  the first moments are bfloat16. Where the memory does not hold gradients and
  moments of the decoder, MemAug and the projector are trained alone.
  """
  sample = make_sample(sizes)
  experiment = make_experiment(sizes, sample, _memory("bytes_limit"))
  model = experiment.model
  mesh = make_mesh(MeshConfig(fsdp=1), jax.local_devices()[:1])
  like, optimizer = abstract_state(experiment, mesh, 1000)
  state = fresh_state(experiment, like, optimizer)
  step = TrainStep(model, optimizer, state_shardings(like))
  row = stack_rows([build_row([sample], experiment.row_spec)])
  batch = jax.device_put(row, batch_shardings(mesh))
  seconds, losses = [], []
  for _ in range(1 + _STEPS):
    began = time.perf_counter()
    state, scalars = step(state, [batch])
    losses.append(float(scalars["loss"]))
    seconds.append(time.perf_counter() - began)
  trained = {component(path) for path in like.trained}
  useful = sample_flops(model, np.array([sample.size.astuple()]), trained)[0]
  took = sorted(seconds[1:])[_STEPS // 2]
  most = peak(jax.devices()[0].device_kind)
  return {
    "trained": ", ".join(sorted(trained)),
    "memory_tokens": sample.size.memory,
    "queries": sample.size.queries,
    "positions": sample.size.decoder,
    "first_step_seconds": round(seconds[0], 2),
    "seconds": round(took, 4),
    "video_hours_per_second": round(sizes.frames / 3600 / took, 4),
    "useful_tflop_per_second": round(useful / took / 1e12, 2),
    "mfu": round(useful / took / 1e12 / most, 3) if most else None,
    "losses": [round(loss, 4) for loss in losses],
    "state_gib": round(_held(model, experiment.optimizer) / _GIB, 1),
    "peak_gib": round(_memory("peak_bytes_in_use") / _GIB, 1),
  }


def make_experiment(sizes: Sizes, sample: Sample, limit: int) -> Experiment:
  """Returns a training on rows that hold just this sample.

  Args:
    sizes: of which the model is trained.
    sample: decides the capacities.
    limit: as for `fitting_optimizer`.
  """
  model = dataclasses.replace(sizes.model, remat="full")
  capacity = Size(*(-(-n // 128) * 128 for n in sample.size.astuple()))
  optimizer = fitting_optimizer(model, limit)
  parts = (Forgetting(), DataConfig(), capacity, optimizer, ReadOptions())
  return Experiment(model, *parts, batch_rows=1)


def fitting_optimizer(model: ModelConfig, limit: int) -> OptimizerConfig:
  """Returns an optimizer of what can be trained in so much memory.

  Args:
    model: that is trained, all of it but the tower if it fits.
    limit: bytes of the device's memory; 0 if it is not known.
  """
  whole = OptimizerConfig(mu_dtype="bfloat16")
  if not limit or _held(model, whole) + _ACTIVATION_BYTES <= limit:
    return whole
  return dataclasses.replace(whole, decoder=0.0)


def _held(model: ModelConfig, optimizer: OptimizerConfig) -> int:
  """Returns bytes of parameters, gradients and moments."""
  each = {True: _TRAINED_BYTES, False: _FROZEN_BYTES}
  return sum(
    math.prod(shape) * each[optimizer.rate(component(path)) > 0]
    for path, shape in param_shapes(model).items()
  )


def make_sample(sizes: Sizes) -> Sample:
  """Returns a video of random features with a question and its answer."""
  rng, config = np.random.default_rng(0), sizes.model
  repository = video_repository(sizes.frames, config.pool_side)
  words = rng.integers(1, config.decoder.vocab, 128).astype(np.int32)
  words[8] = IMAGE
  labels = np.where(np.arange(len(words)) < 64, np.int32(IGNORE), words)
  kept = Forgetting().kept_tokens(repository, rng)
  layout = build_layout(
    Conversation(words, labels.astype(np.int32)), repository, kept
  )
  return Sample("video", layout, "features", _features(sizes))


def _features(sizes: Sizes) -> np.ndarray:
  """Returns random features [F, Q, V] in bfloat16, of a few frames repeated."""
  shape = (8, sizes.model.pool_side**2, sizes.model.vision.width)
  frames = np.random.default_rng(0).normal(size=shape).astype(jnp.bfloat16)
  return frames[np.arange(sizes.frames) % len(frames)]


def _answer(sizes: Sizes) -> dict[str, Any]:
  """Times answers about a video, by a model with random weights.

  Returns:
    Seconds to encode the memory, and by the number of questions the seconds to
    their first tokens and decoded tokens a second.
  """
  with tempfile.TemporaryDirectory() as folder:
    model = random_model(pathlib.Path(folder), sizes.model)
  features = _features(sizes)
  model.encode_memory(features)
  began = time.perf_counter()
  memory = model.encode_memory(features)
  figures: dict[str, Any] = {
    "memory_seconds": round(time.perf_counter() - began, 3)
  }

  def timed(questions: int, tokens: int) -> tuple[float, int]:
    asked = [_QUESTION] * questions
    memory.answer(asked, max_tokens=tokens)
    began = time.perf_counter()
    answers = memory.answer(asked, max_tokens=tokens)
    return time.perf_counter() - began, sum(x.tokens for x in answers)

  def asked(questions: int) -> dict[str, float]:
    first, few = timed(questions, 1)
    whole, many = timed(questions, 1 + sizes.tokens)
    speed = (many - few) / max(whole - first, 1e-9)
    return {
      "first_token_seconds": round(first, 3),
      "tokens_per_second": round(speed, 1),
    }

  for questions in sizes.questions:
    figures[f"questions_{questions}"] = _attempt(asked, questions)
  return figures


_FUNCTIONS = (_attention, _torch, _numerics, _step, _answer)
PARTS = dict(zip(LIMITS, _FUNCTIONS, strict=True))


if __name__ == "__main__":
  print(json.dumps(measure_part(json.load(sys.stdin))))
