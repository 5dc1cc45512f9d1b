"""The whole model against the official numbers, case by case.

Tolerances: the official float32 runs differ from a float64 recomputation by
up to 6e-6 on logits and 1e-6 on losses (golden/README.md); ours may differ
as much the other way.
"""

import dataclasses
import functools
from unittest import mock

import jax
import numpy as np
import pytest

from hourjax.batch import IGNORE, Batch
from hourjax.data import forgetting, repository, rows
from hourjax.inference.engine import Engine
from hourjax.inference.sampling import GREEDY, row_sampling
from hourjax.models.hourllava import HourLLaVA
from hourjax.models.params import param_shapes, with_params
from hourjax.parallel.mesh import MeshConfig, make_mesh
from hourjax.training.train_step import loss_sum, token_losses
from tests import golden_cases, golden_files, official

ACTIVATIONS = 2e-5
LOSS = 1e-5


def _params(names):
  quick = golden_cases.quick()
  return [
    pytest.param(name, marks=[] if name in quick else pytest.mark.slow)
    for name in names
  ]


NAMES = golden_cases.names()
pytestmark = pytest.mark.skipif(not NAMES, reason=golden_files.NO_GOLDEN)


@pytest.fixture(scope="module", params=_params(NAMES))
def case(request):
  return golden_cases.load(request.param)


@dataclasses.dataclass(frozen=True)
class Outputs:
  """What the model makes of a batch."""

  memory: np.ndarray | None
  queries: np.ndarray | None
  augmented: np.ndarray | None
  embeddings: np.ndarray
  logits: np.ndarray
  losses: np.ndarray


@functools.partial(jax.jit, static_argnames="config")
def _forward(params, batch, config):
  """Outputs of all stages, each computed once: `embeddings` runs them all."""
  found = dict.fromkeys(("memory", "_queries", "augment"))

  def recorded(name):
    function = getattr(HourLLaVA, name)

    def call(self, *args):
      found[name] = function(self, *args)
      return found[name]

    return mock.patch.object(HourLLaVA, name, call)

  model = with_params(config, params)
  with recorded("memory"), recorded("_queries"), recorded("augment"):
    embeddings = model.embeddings(batch)
  hidden = model.decode(embeddings, batch)
  return {
    "memory": found["memory"],
    "queries": found["_queries"],
    "augmented": found["augment"],
    "embeddings": embeddings,
    "logits": model.logits(hidden),
    "losses": token_losses(model, hidden, batch.target),
  }


@functools.partial(jax.jit, static_argnames="config")
def _summed_gradients(params, batch, config):
  def loss(params):
    return loss_sum(with_params(config, params), batch)

  return jax.grad(loss)(params)


def _run(batch, case) -> Outputs:
  outputs = _forward(case.params, batch, case.config)
  return Outputs(**jax.tree.map(np.asarray, outputs))


def _gradients(batch, case) -> dict[str, np.ndarray]:
  grads = _summed_gradients(case.params, batch, case.config)
  return jax.tree.map(np.asarray, grads)


@functools.cache
def _batch(name: str) -> Batch:
  """The case as a row of the capacity that packed rows have, if it fits.

  Cases of one capacity share a compiled program. Those that are larger, have
  several samples, or have no memory at all keep rows of their own size.
  """
  case, common = golden_cases.load(name), _common_capacity()
  sample = case.samples[0]
  own = case.params["projector/fc1/kernel"].shape
  shapes = param_shapes(case.config)
  if (
    len(case.samples) > 1
    or not sample.size.memory
    or own != shapes["projector/fc1/kernel"]
    or any(a > b for a, b in zip(sample.size.astuple(), common.astuple()))
  ):
    return case.batch
  return _common_row([sample], case.config)


@functools.cache
def _common_capacity() -> rows.Size:
  """What holds each of the packed rows, with room left."""
  sizes = []
  for kinds in PACKED_KINDS:
    total = rows.Size()
    for name in _packed_cases(kinds):
      for sample in golden_cases.load(name).samples if name else ():
        total += sample.size
    sizes.append((total + SPARE).astuple())
  return rows.Size(*(max(column) for column in zip(*sizes)))


def _common_row(samples, config) -> Batch:
  spec = golden_cases.row_spec((), config)
  spec = dataclasses.replace(spec, capacity=_common_capacity())
  batch = golden_cases.stack([samples], spec)
  # Unused places are bytes and pixels of cases floats: one dtype, one program.
  return batch._replace(
    frames=batch.frames.astype(np.float32),
    tiles=batch.tiles.astype(np.float32),
  )


@functools.cache
def _outputs(name: str) -> Outputs:
  return _run(_batch(name), golden_cases.load(name))


@functools.cache
def _case_gradients(name: str) -> dict[str, np.ndarray]:
  return _gradients(_batch(name), golden_cases.load(name))


def _close(got, expected, atol=ACTIVATIONS):
  np.testing.assert_allclose(got, expected, rtol=0, atol=atol)


def _needs(case, key):
  if key not in case.arrays:
    pytest.skip(f"{case.name} has no {key}")


# --- indices ----------------------------------------------------------------


def test_positions(case):
  for b, sample in enumerate(case.samples):
    layout = sample.layout
    if not layout.repository.slots:
      assert sample.size == rows.Size(decoder=sample.size.decoder)
      continue
    for key, ours in [
      ("q_position_ids", layout.query_position),
      ("k_position_ids", layout.repository.position),
      ("image_position_ids", np.flatnonzero(layout.query_source >= 0)),
    ]:
      expected = case.arrays.get(f"memaug.{b}.{key}", ours)
      np.testing.assert_array_equal(ours, expected, err_msg=key)


def test_labels(case):
  _needs(case, "out_labels")
  for b, length in enumerate(case.lengths):
    labels = case.arrays["out_labels"][b]
    np.testing.assert_array_equal(
      case.samples[b].layout.labels, labels[:length]
    )
    assert (labels[length:] == IGNORE).all()
    assert case.arrays["out_attention_mask"][b].sum() == length


def test_frames(case):
  """Each linspace call either repeats a short video or forgets frames."""
  for n, (first, last, count) in enumerate(case.meta.get("linspace_calls", [])):
    assert first == 0
    if last + 1 < repository.MIN_FRAMES:
      ours = repository.repeated_frames(last + 1)
    else:
      rule = forgetting.Forgetting()
      ours = rule.kept_frames(last + 1, np.random.default_rng(0))
    assert len(ours) == count
    np.testing.assert_array_equal(ours, case.arrays[f"linspace.{n}.result"])


# --- numbers ----------------------------------------------------------------


def test_spliced_embeddings(case):
  got = _outputs(case.name).embeddings
  for b, length in enumerate(case.lengths):
    expected = case.arrays["out_inputs_embeds"][b][:length]
    _close(got[b, : len(expected)][:length], expected)


def test_memaug(case):
  outputs = _outputs(case.name)
  for b, sample in enumerate(case.samples):
    if not sample.layout.repository.slots:
      continue
    count = len(sample.layout.query_token)
    for key, ours in [("x_q", outputs.queries), ("out", outputs.augmented)]:
      if f"memaug.{b}.{key}" in case.arrays:
        _close(ours[b, :count], case.arrays[f"memaug.{b}.{key}"])
    if f"memaug.{b}.x_kv_sub" in case.arrays:
      chosen = case.arrays[f"memaug.{b}.x_kv_rows"]
      _close(outputs.memory[b, chosen], case.arrays[f"memaug.{b}.x_kv_sub"])


def test_logits(case):
  _needs(case, "logits")
  b, at = case.arrays["logits_index"].T
  real = at < np.array(case.lengths)[b]  # padding rows mean nothing
  assert real.any()
  got = _outputs(case.name).logits[b, at]
  _close(got[real], case.arrays["logits"][real])


def test_loss(case):
  _needs(case, "loss")
  target = _batch(case.name).target
  count = (target != IGNORE).sum()
  assert count == case.meta["n_label_tokens"]
  losses = _outputs(case.name).losses
  _close(losses.sum() / count, case.arrays["loss"][0], LOSS)
  assert (losses[target == IGNORE] == 0).all()


@pytest.mark.parametrize(
  "name", _params(filter(golden_cases.has_gradients, NAMES))
)
def test_gradients(name):
  case = golden_cases.load(name)
  expected = case.gradients()
  count = (case.batch.target != IGNORE).sum()
  ours = official.to_official(_case_gradients(name), case.config)
  for key in set(ours) - set(expected):
    assert not ours[key].any(), f"{key} officially has no gradient"
  ours = {key: ours[key] / count for key in expected}
  official.assert_gradients(ours, expected)


def test_text_costs_no_encoder():
  name = golden_cases.lightest("text")
  if name is None:
    pytest.skip("no text case")
  case = golden_cases.load(name)
  batch = case.batch
  assert batch.memory_source.shape[1] == batch.query_token.shape[1] == 0
  assert batch.tiles.shape[1] == batch.frames.shape[1] == 0
  for path, gradient in _case_gradients(name).items():
    if not path.startswith("decoder/"):
      assert not gradient.any(), path


# --- inference --------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
  "name", [n for n in NAMES if golden_cases.kind(n) == "inference"]
)
def test_prompt_logits_and_greedy_answer(name):
  case = golden_cases.load(name)
  logits = _outputs(name).logits
  for b, length in enumerate(case.lengths):
    tail = case.arrays["logits_last16"][b]
    _close(logits[b, length - len(tail) : length], tail)
  # The engine keeps memory and cache; the official code kept its cache too.
  engine = Engine(case.params, case.config, make_mesh(MeshConfig(fsdp=1)))
  expected = case.arrays["greedy_tokens"]
  for sample, tokens in zip(case.samples, expected, strict=True):
    source = sample.layout.query_source
    memory = engine.encode_memory(
      sample.layout.repository,
      sample.kind,
      sample.visual,
      np.unique(source[source >= 0]),
    )
    # Alone, and three times in a row.
    for layouts in ([sample.layout], [sample.layout] * 3):
      answer = _answer(engine, memory, layouts, len(tokens))
      np.testing.assert_array_equal(answer, [tokens] * len(layouts))


def _answer(engine, memory, layouts, count):
  state, _ = engine.prefill(memory, layouts, max_tokens=count)
  state = engine.decode(
    state,
    row_sampling(GREEDY, 0, len(state.done)),
    stop_tokens=[-1],
    max_tokens=count,
    num_steps=count,
  )
  assert np.asarray(state.count)[: len(layouts)].tolist() == [count] * len(
    layouts
  )
  return np.asarray(state.answer)[: len(layouts), :count]


# --- rows -------------------------------------------------------------------


PACKED_KINDS = [
  ("tiled", "video", "text"),
  ("image", "text", "images", "video"),
]
SPARE = rows.Size(128, 1, 1, 3, 130, 70, 50)
PACKED = pytest.mark.parametrize(
  "kinds",
  [PACKED_KINDS[0], pytest.param(PACKED_KINDS[1], marks=pytest.mark.slow)],
  ids="-".join,
)


def _packed_cases(kinds) -> list[str | None]:
  """The lightest case of each kind, with official gradients if there is one.

  Those have their gradients computed by other tests already; but tiled cases
  with gradients are large.
  """
  return [
    golden_cases.lightest(kind, kind != "tiled") or golden_cases.lightest(kind)
    for kind in kinds
  ]


def _packed(kinds):
  """Cases of these kinds, and their samples in one row with room left."""
  found = _packed_cases(kinds)
  if None in found:
    pytest.skip(f"no case for each of {kinds}")
  cases = [golden_cases.load(name) for name in found]
  samples = [sample for case in cases for sample in case.samples]
  return (
    cases,
    samples,
    _common_row(samples, cases[0].config),
  )


@PACKED
def test_packed_row_equals_samples_alone(kinds):
  cases, samples, batch = _packed(kinds)
  together = _run(batch, cases[0])
  start = 0
  for case in cases:
    alone = _outputs(case.name)
    for b, length in enumerate(case.lengths):
      part = slice(start, start + length)
      _close(together.logits[0, part], alone.logits[b, :length])
      _close(together.losses[0, part], alone.losses[b, :length], LOSS)
      start += length
  assert not together.losses[0, start:].any()
  assert start == sum(sample.size.decoder for sample in samples)

  got = _gradients(batch, cases[0])
  alone = [_case_gradients(case.name) for case in cases]
  summed = {path: sum(grads[path] for grads in alone) for path in got}
  official.assert_gradients(got, summed, relative=1e-5)


@PACKED
def test_padding_is_never_read(kinds):
  """Garbage in every unused place of a row changes nothing, bit for bit."""
  cases, samples, clean = _packed(kinds)
  used = rows.Size()
  for sample in samples:
    used += sample.size
  dirty = _poisoned(clean, used)
  length = used.decoder
  expected, got = _run(clean, cases[0]), _run(dirty, cases[0])
  assert not np.array_equal(got.memory, expected.memory)  # poison is there
  for field in ("embeddings", "logits", "losses"):
    np.testing.assert_array_equal(
      getattr(got, field)[:, :length],
      getattr(expected, field)[:, :length],
      err_msg=field,
    )
  expected = _gradients(clean, cases[0])
  for path, gradient in _gradients(dirty, cases[0]).items():
    np.testing.assert_array_equal(gradient, expected[path], err_msg=path)


def _poisoned(batch, used: rows.Size):
  rng = np.random.default_rng(0)
  visual = int(batch.memory_source.max())
  places = {  # field: (capacity that it belongs to, what may stand there)
    "features": ("features", 1e3),
    "frames": ("frames", 1e3),
    "tiles": ("tiles", 1e3),
    "blend_source": ("blends", visual),
    "blend_weight": ("blends", 1e3),
    "memory_source": ("memory", visual),
    "memory_position": ("memory", 9_999),
    "query_token": ("queries", 99),
    "query_source": ("queries", used.memory),
    "query_position": ("queries", 9_999),
    "decoder_token": ("decoder", 99),
    "decoder_source": ("decoder", used.queries),
    "decoder_position": ("decoder", 9_999),
  }
  changed = {}
  for field, (part, top) in places.items():
    array = getattr(batch, field).copy()
    rest = array[:, getattr(used, part) :]
    if array.dtype.kind == "f":
      rest[:] = rng.uniform(-top, top, rest.shape)
    else:
      rest[:] = rng.integers(-1, top, rest.shape)
    assert rest.size
    changed[field] = array
  return batch._replace(**changed)
