import dataclasses
import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from hourjax.batch import IGNORE, Batch
from hourjax.data import repository, rows
from hourjax.data.conversations import IMAGE, Conversation
from hourjax.data.forgetting import Forgetting
from hourjax.data.layout import build_layout
from hourjax.models.config import TINY
from hourjax.models.layers import rematerialised
from hourjax.models.params import init_params, with_params
from hourjax.parallel import vocabulary
from hourjax.training import train_step as loss
from hourjax.training.optimizer import (
  OptimizerConfig,
  make_optimizer,
  split_params,
)
from hourjax.training.train_step import TrainState, train_step, zero_sums

SIDE, PIXELS = 2, 8
CONFIG = dataclasses.replace(
  TINY,
  vision=dataclasses.replace(TINY.vision, image_size=PIXELS, layers=1),
  decoder=dataclasses.replace(TINY.decoder, layers=1, vocab=96),
  pool_side=SIDE,
  memaug_layers=1,
)
WIDTH = CONFIG.vision.width
# The epsilon keeps Adam from blowing up the rounding of tiny gradients.
RATES = OptimizerConfig(
  vision=1e-2, projector=1e-2, memaug=1e-2, decoder=1e-2, eps=1e-3, warmup=0.0
)

WEIGHTS = pytest.mark.parametrize("weights", ["samples", "tokens"])


def _sample(kind, labelled, seed, frames=4):
  """A sample of 20 words, the last `labelled` of them trained."""
  rng = np.random.default_rng(seed)
  words = rng.integers(1, CONFIG.decoder.vocab, 20).astype(np.int32)
  memory, source, visual = repository.empty_repository(), "features", None
  if kind != "text":
    words[3] = IMAGE
    memory = repository.video_repository(frames, SIDE)
  if kind == "video":
    visual = rng.normal(size=(frames, SIDE**2, WIDTH)).astype(
      ml_dtypes.bfloat16
    )
  if kind == "frames":
    source = "frames"
    visual = rng.integers(0, 256, (frames, PIXELS, PIXELS, 3)).astype(np.uint8)
  first = len(words) - labelled
  labels = np.where(np.arange(len(words)) < first, np.int32(IGNORE), words)
  layout = build_layout(
    Conversation(words, labels), memory, Forgetting().kept_tokens(memory, rng)
  )
  return rows.Sample(f"{kind} {seed}", layout, source, visual)


def _batches(samples, shape, weights="samples") -> list[Batch]:
  """One row a sample: A micro-batches of B rows."""
  sizes = np.array([sample.size.astuple() for sample in samples])
  spec = rows.RowSpec(
    capacity=rows.Size(
      *(int(n) for n in sizes.max(0) + 2 * (sizes.max(0) > 0))
    ),
    frame_tokens=SIDE**2,
    tile_tokens=CONFIG.vision.side**2,
    width=WIDTH,
    image_size=PIXELS,
    loss=weights,
  )
  stacked = rows.stack_rows([rows.build_row([s], spec) for s in samples])
  return [
    Batch(*(jnp.asarray(x.reshape(*shape, *x.shape[1:])[a]) for x in stacked))
    for a in range(shape[0])
  ]


@pytest.fixture(scope="module")
def params():
  return init_params(CONFIG, 0)


def _start(params, rates=RATES):
  trained, frozen = split_params(params, rates)
  optimizer = make_optimizer(rates, 100, trained)
  state = TrainState(
    jnp.zeros((), jnp.int32), trained, frozen, optimizer.init(trained)
  )
  step = functools.partial(train_step, config=CONFIG, optimizer=optimizer)
  return state, step


def _compiled(step):
  # Compiling takes longer than running, most of it in LLVM.
  quick = {
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
  }
  return jax.jit(step, compiler_options=quick)


@jax.jit
def _sums(params, batch):
  """Sums of one micro-batch with every parameter trained."""
  return loss.accumulate(zero_sums(params), params, {}, batch, config=CONFIG)


@pytest.fixture(scope="module")
def all_trained(params):
  """A state with every parameter trained, and the compiled step."""
  state, step = _start(params)
  return state, _compiled(step)


@pytest.fixture(scope="module")
def pair():
  """Two rows with 3 and 9 labels."""
  return [_sample("video", 3, 1), _sample("text", 9, 2)]


@pytest.mark.slow
@WEIGHTS
def test_loss_is_the_dense_cross_entropy(params, all_trained, pair, weights):
  (flat,) = _batches(pair, (1, 2), weights)
  state, step = all_trained
  _, scalars = step(state, [flat])
  model = with_params(CONFIG, params)
  logits = np.asarray(model.logits(model(flat)), np.float64)
  total = np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1))
  total += logits.max(-1)
  losses = [
    [
      total[row, place] - logits[row, place, word]
      for place, word in enumerate(words)
      if word != IGNORE
    ]
    for row, words in enumerate(np.asarray(flat.target))
  ]
  assert list(map(len, losses)) == [3, 9] and scalars["tokens"] == 12
  expected = {
    "samples": np.mean([np.mean(part) for part in losses]),
    "tokens": np.mean(np.concatenate(losses)),
  }
  assert abs(expected["samples"] - expected["tokens"]) > 1e-3
  assert scalars["loss"] == pytest.approx(expected[weights], rel=1e-5)


@pytest.mark.parametrize("chunk", [7, 1024])
def test_chunks_change_neither_loss_nor_gradient(params, monkeypatch, chunk):
  rng = np.random.default_rng(0)
  hidden = jnp.asarray(
    rng.normal(size=(2, 15, CONFIG.decoder.width)), jnp.float32
  )
  target = rng.integers(0, CONFIG.decoder.vocab, (2, 15)).astype(np.int32)
  target[:, ::3] = IGNORE
  weight = rng.uniform(0.1, 2, (2, 15)).astype(np.float32)
  model = with_params(CONFIG, params)

  def dense(hidden):
    rates = jax.nn.log_softmax(model.logits(hidden))
    own = jnp.take_along_axis(
      rates, jnp.maximum(target, 0)[..., None], axis=-1
    )[..., 0]
    return jnp.where(target == IGNORE, 0.0, -own)

  monkeypatch.setattr(vocabulary, "CHUNK", chunk)
  target = jnp.asarray(target)
  losses = loss.token_losses(model, hidden, target)
  np.testing.assert_allclose(losses, dense(hidden), atol=1e-5)
  assert (np.asarray(losses)[target == IGNORE] == 0).all()

  def summed(hidden):
    return vocabulary.cross_entropy(
      hidden, model.output_embedding, target, jnp.asarray(weight)
    )

  def weighted(hidden):
    return (dense(hidden) * weight).sum()

  # Without a gradient, it is computed in another way.
  np.testing.assert_allclose(summed(hidden), weighted(hidden), rtol=1e-5)
  got, expected = (
    jax.value_and_grad(lambda h, f=f: 3 * f(h))(hidden)
    for f in (summed, weighted)
  )
  np.testing.assert_allclose(got[0], expected[0], rtol=1e-5)
  np.testing.assert_allclose(got[1], expected[1], atol=1e-5)


@pytest.mark.parametrize("chunk", [7, 1024])
def test_the_most_likely_token_is_that_of_argmax(monkeypatch, chunk):
  """Of equal ones the first, and none where there is no target."""
  rng = np.random.default_rng(0)
  hidden = rng.normal(size=(2, 15, 6)).astype(np.float32)
  hidden[0, 4:9] = 0  # all words are equally likely
  table = rng.normal(size=(9, 6)).astype(np.float32)
  best = (hidden @ table.T).argmax(-1)
  target = np.where(rng.random(best.shape) < 0.5, best, 3).astype(np.int32)
  target[:, ::4] = IGNORE
  target[0, 5] = 1
  monkeypatch.setattr(vocabulary, "CHUNK", chunk)
  found = vocabulary.most_likely(*map(jnp.asarray, (hidden, table, target)))
  np.testing.assert_array_equal(found, target == best)
  assert 5 < found.sum() < 20 and not found[0, 5]


@pytest.mark.slow
@WEIGHTS
def test_micro_batches_with_different_label_counts_equal_one_batch(
  params, all_trained, pair, weights
):
  state, step = all_trained
  one, first = step(state, _batches(pair, (1, 2), weights))
  two, second = step(state, _batches(pair, (2, 1), weights))
  assert first["tokens"] == second["tokens"] == 12
  assert first["loss"] == pytest.approx(float(second["loss"]), rel=1e-6)
  moved = 0.0
  for path, value in one.trained.items():
    np.testing.assert_allclose(
      value, two.trained[path], rtol=0, atol=1e-6, err_msg=path
    )
    moved = max(moved, float(abs(value - params[path]).max()))
  assert moved > 1e-3


@pytest.mark.slow
def test_frozen_parts_get_no_gradient_and_stay(params, pair):
  only = OptimizerConfig(projector=0, memaug=1e-2, decoder=0, warmup=0.0)
  state, step = _start(params, only)
  batch = _batches(pair, (2, 1))
  after, _ = _compiled(step)(state, batch)
  assert {path.split("/")[0] for path in after.trained} == {"memaug"}
  assert {**state.frozen, **state.trained}.keys() == params.keys()
  for path, value in after.frozen.items():
    np.testing.assert_array_equal(value, params[path], err_msg=path)
  changed = [(v != params[p]).any() for p, v in after.trained.items()]
  assert any(changed)
  sums = jax.eval_shape(zero_sums, state.trained)
  assert sums.grads.keys() == state.trained.keys()


@pytest.mark.slow
def test_no_label_no_nan(params, all_trained, pair):
  state, step = all_trained
  batch = _batches(pair, (2, 1))
  batch = [
    b._replace(
      target=jnp.full_like(b.target, IGNORE),
      target_weight=jnp.zeros_like(b.target_weight),
    )
    for b in batch
  ]
  after, scalars = step(state, batch)
  assert scalars["tokens"] == scalars["loss"] == scalars["grad_norm"] == 0
  for path, value in after.trained.items():
    np.testing.assert_array_equal(value, params[path], err_msg=path)
  assert after.step == 1


@pytest.mark.slow
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_leaves_the_state_alone(
  params, all_trained, pair, bad
):
  """One bad feature of one micro-batch; the next step is as if it were not."""
  state, step = all_trained
  good = _batches(pair, (2, 1))
  features = good[0].features.at[0, 0, 0].set(bad)
  after, scalars = step(state, [good[0]._replace(features=features), good[1]])
  assert scalars["finite"] == 0 and after.step == 1
  left_out = (after.trained, after.opt_state)
  jax.tree.map(
    np.testing.assert_array_equal, left_out, (state.trained, state.opt_state)
  )
  one, scalars = step(after, good)
  two, _ = step(state, good)
  assert scalars["finite"] == 1
  jax.tree.map(np.testing.assert_array_equal, one.trained, two.trained)


def test_norms_of_components_add_up(all_trained, pair):
  state, step = all_trained
  _, scalars = step(state, _batches(pair, (2, 1)))
  parts = [v for k, v in scalars.items() if k.startswith("grad_norm/")]
  # The tower sees no pixels here: its gradient is zero and is counted.
  assert len(parts) == 4
  whole = np.sqrt(np.square(np.array(parts, np.float64)).sum())
  assert scalars["grad_norm"] == pytest.approx(whole, rel=1e-6)


@pytest.mark.slow
def test_same_inputs_same_bits(all_trained, pair):
  state, step = all_trained
  batch = _batches(pair, (2, 1))
  one, two = step(state, batch), step(state, batch)
  jax.tree.map(np.testing.assert_array_equal, one, two)


@pytest.mark.slow
def test_pixels_train_the_tower(params):
  state, step = _start(params)
  batch = _batches([_sample("frames", 3, 1)], (1, 1))
  assert "conv_general_dilated" in str(jax.make_jaxpr(step)(state, batch))
  after, scalars = _compiled(step)(state, batch)
  assert np.isfinite(scalars["loss"])
  moved = after.trained["vision/patch/kernel"] - params["vision/patch/kernel"]
  assert float(abs(moved).max()) > 1e-5


@pytest.mark.slow
def test_videos_of_more_than_128_frames_do_not_train_the_tower(params):
  """Gradients of a row of a short and a long one: the tower's of the short."""
  short, long = _sample("frames", 3, 1), _sample("frames", 5, 2, frames=129)
  spec = rows.RowSpec(
    short.size + long.size, SIDE**2, CONFIG.vision.side**2, WIDTH, PIXELS
  )
  parts = {p: x for p, x in params.items() if p.startswith(("vis", "proj"))}

  @_compiled
  def gradients(parts, batch):
    def summed(parts):
      model = with_params(CONFIG, params | parts)
      return jnp.square(model.encoded(batch)).sum()

    return jax.grad(summed)(parts)

  def of(*samples):
    batch = rows.stack_rows([rows.build_row(samples, spec)])
    return gradients(parts, Batch(*map(jnp.asarray, batch)))

  both, first, second = of(short, long), of(short), of(long)
  for path in parts:
    if path.startswith("vision/"):
      assert not np.asarray(second[path]).any(), path
      scale = np.abs(first[path]).max()
      np.testing.assert_allclose(
        both[path], first[path], atol=1e-4 * scale + 1e-7, err_msg=path
      )
  assert np.asarray(first["vision/patch/kernel"]).any()
  assert np.asarray(second["projector/fc1/kernel"]).any()


@pytest.mark.slow
def test_stored_features_skip_the_tower(params, pair):
  state, step = _start(params)
  jaxpr = str(jax.make_jaxpr(step)(state, _batches(pair, (2, 1))))
  assert "conv_general_dilated" not in jaxpr


@pytest.mark.slow
def test_a_sample_without_labels_counts_nothing(all_trained, pair):
  """Its sequence was cut before its first answer: as if it were not there."""
  state, step = all_trained
  cut = _sample("text", 0, 3)
  assert (cut.layout.targets == IGNORE).all()
  with_it, first = step(state, _batches([*pair, cut, cut], (2, 2)))
  without, second = step(state, _batches(pair, (1, 2)))
  assert first["loss"] == pytest.approx(float(second["loss"]), rel=1e-6)
  assert first["tokens"] == second["tokens"] == 12
  for path, value in without.trained.items():
    np.testing.assert_allclose(
      value, with_it.trained[path], rtol=0, atol=1e-6, err_msg=path
    )


@pytest.mark.slow
@WEIGHTS
def test_sharing_a_memory_changes_neither_loss_nor_gradients(params, weights):
  """Three conversations about one video, alone and around one memory."""
  first, *others = (_sample("video", 3 + n, n) for n in range(3))
  others = [dataclasses.replace(s, visual=first.visual) for s in others]
  shared = [
    first,
    *(dataclasses.replace(s, reuses_memory=True) for s in others),
  ]
  capacity = sum((s.size for s in shared), rows.Size())
  spec = rows.RowSpec(
    capacity, SIDE**2, CONFIG.vision.side**2, WIDTH, PIXELS, weights
  )

  def batch(*packed):
    made = rows.stack_rows([rows.build_row(part, spec) for part in packed])
    return Batch(*map(jnp.asarray, made))

  one = _sums(params, batch(shared))
  alone = _sums(params, batch([first], *([s] for s in others)))
  assert int(one.tokens) == int(alone.tokens) == 3 + 4 + 5
  np.testing.assert_allclose(one.loss, alone.loss, rtol=1e-5)
  whole = {"samples": 3, "tokens": 12}[weights]
  np.testing.assert_allclose([one.weight, alone.weight], whole, rtol=1e-6)
  for path, grad in alone.grads.items():
    scale = np.abs(grad).max()
    np.testing.assert_allclose(
      one.grads[path], grad, atol=1e-4 * scale + 1e-7, err_msg=path
    )
  memory = np.asarray(batch(shared).memory_segment)
  assert set(memory[0]) == {1}  # there once, and nothing else


@pytest.fixture(scope="module")
def with_pixels(params):
  """A row of stored features and one of pixels, and its sums."""
  samples = [_sample("video", 5, 1), _sample("frames", 5, 2, frames=3)]
  (batch,) = _batches(samples, (1, 2))
  return batch, _sums_of(CONFIG, params, batch)


def _sums_of(config, params, batch):
  program = _compiled(functools.partial(loss.accumulate, config=config))
  return program(zero_sums(params), params, {}, batch)


def _assert_same(found, expected):
  np.testing.assert_allclose(found.loss, expected.loss, rtol=1e-5)
  largest = max(float(jnp.abs(g).max()) for g in expected.grads.values())
  for path, grad in expected.grads.items():
    # Those that are zero, as of the biases of keys, are rounding.
    scale = max(float(jnp.abs(grad).max()), 1e-3 * largest)
    np.testing.assert_allclose(
      found.grads[path], grad, atol=1e-5 * scale, rtol=0, err_msg=path
    )


def test_a_memory_in_chunks_and_layers_on_the_host_are_the_same(
  params, with_pixels
):
  batch, expected = with_pixels
  assert batch.memory_source.shape[1] % 7
  config = dataclasses.replace(
    CONFIG, memory_chunk=7, remat="full", offload="host"
  )
  _assert_same(_sums_of(config, params, batch), expected)
  traced = jax.make_jaxpr(functools.partial(loss.accumulate, config=config))
  text = str(traced(zero_sums(params), params, {}, batch))
  assert "pinned_host" in text or "Host" in text


def test_what_is_kept_by_dots_is_not_moved_to_the_host(params):
  with pytest.raises(ValueError, match="choose remat 'full'"):
    rematerialised(lambda x: x, "dots", "host")
