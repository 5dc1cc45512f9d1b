"""The engine's caches hold what the whole model computes, to rounding."""

import dataclasses
import gc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from hourjax.data.conversations import follow_up
from hourjax.data.forgetting import Forgetting
from hourjax.data.layout import Layout
from hourjax.data.media.frame_rules import stored_feature_frames
from hourjax.data.records.record import Turn
from hourjax.data.repository import empty_repository
from hourjax.data.rows import Size
from hourjax.data.visual_input import read_images
from hourjax.errors import UserError
from hourjax.inference import engine
from hourjax.inference.answering import Answering
from hourjax.inference.engine import rounded, row_spec
from hourjax.inference.memory import Memory, _batch_sizes
from hourjax.inference.sampling import GREEDY, Sampling, row_sampling, sample
from hourjax.models.params import with_params
from hourjax.parallel.mesh import AXES
from tests.inference import models
from tests.inference.models import answer_ids

HOT = Sampling(2.0, 0.9, seed=4)
NEAR = {"rtol": 0, "atol": 1e-2}  # of logits that spread by 3; sharp softmax
WHY = "Why? "


def _layout(memory, *texts) -> Layout:
  roles = ["human", "gpt"] * len(texts)
  return models.layout_of(
    memory, [Turn(role, text) for role, text in zip(roles, texts)]
  )


def _long(memory, length: int) -> str:
  """A question whose prompt has about so many tokens, and no fewer."""
  question = "Who?"
  while len(_layout(memory, question).decoder_token) < length:
    question = f"{question} Why?"
  return question


def _sampled(logits, sampling, count: int) -> list[int]:
  """Samples the first `count` tokens of a turn with these logits."""
  sampling = sampling._replace(keys=jnp.repeat(sampling.keys, count))
  index = jnp.arange(count)
  return jax.jit(sample)(jnp.asarray(logits[:count]), sampling, index).tolist()


def _between(model, first, question):
  """What the decoder reads between two answers."""
  end = [] if first[-1] == model.tokenizer.im_end else [model.tokenizer.im_end]
  return [*end, *follow_up(question, model.tokenizer)]


# --- a session ---------------------------------------------------------


@pytest.mark.filterwarnings("error:Some donated buffers")
@pytest.mark.parametrize("sampling", [GREEDY, HOT], ids=["greedy", "drawn"])
@pytest.mark.slow
def test_answers_that_cross_capacities(model, sampling, monkeypatch):
  """Both answers begin in one capacity of the cache and end in the next."""
  # No token ends an answer, so that both are as long as they may be.
  monkeypatch.setattr(Answering, "stop_tokens", [-1])
  memory = model.empty_memory()
  first_question, later = _long(memory, 120), WHY
  session = memory.chat()
  session.ask(first_question, max_tokens=20, sampling=sampling)
  first = answer_ids(session)
  layout = _layout(memory, first_question)
  prompt = len(layout.decoder_token)
  assert rounded(prompt) < rounded(prompt + 20)
  between, before = [], prompt
  while rounded(before) == rounded(before + 20) or not between:
    later += WHY
    between = _between(model, first, later)
    before = prompt + len(first) + len(between)
  # A longer answer than the first one had room for.
  session.ask(later, max_tokens=40, sampling=sampling)
  second = answer_ids(session)
  assert (len(first), len(second)) == (20, 40)

  words = [*first, *between, *second]
  logits = models.slow_logits(model, layout, None, words)
  assert int(session._state.length[0]) == before + 40 - 1
  np.testing.assert_allclose(
    models.next_logits(model, session._state), logits[-1:], **NEAR
  )
  # Draws differ by turn and by token.
  for turn, start, ids in [(0, 0, first), (2, 20 + len(between), second)]:
    rows = row_sampling(sampling, turn, 1)
    assert _sampled(logits[start:], rows, len(ids)) == ids


@pytest.mark.parametrize("end", ["im_end", "pad"])
def test_a_turn_after_one_that_ended_by_itself(model, monkeypatch, end):
  memory = model.empty_memory()
  free = memory.chat()
  free.ask("Who?", max_tokens=6)
  ids = answer_ids(free)
  stop = ids[2]
  monkeypatch.setattr(model.tokenizer, end, stop)
  assert memory._answering.stop_tokens == [
    model.tokenizer.im_end,
    model.tokenizer.pad,
  ]
  session = memory.chat()
  answer = session.ask("Who?", max_tokens=6)
  first = ids[: ids.index(stop) + 1]
  assert answer.finished and answer_ids(session) == first
  again = session.ask("Why?", max_tokens=1)
  assert again.tokens == 1
  # The end of the answer is read once, as the end of a turn.
  words = [*first, *follow_up("Why?", model.tokenizer)]
  prompt = len(_layout(memory, "Who?").decoder_token)
  assert int(session._state.length[0]) == prompt + len(words)


def test_stop_on_the_first_token(memory, monkeypatch):
  session = memory.chat()
  session.ask("Who?", max_tokens=1)
  monkeypatch.setattr(
    Answering, "stop_tokens", [10**6, *answer_ids(session), 10**6 + 1]
  )
  for answer in [memory.ask("Who?"), *memory.answer(["Who?", "Who?"])]:
    assert (answer.text, answer.tokens, answer.finished) == ("", 1, True)


def test_no_room_for_an_answer(model):
  memory = model.empty_memory()
  for ask in (memory.ask, lambda *a, **o: memory.answer([*a], **o)):
    with pytest.raises(UserError, match="max_tokens is 0; an answer has at"):
      ask("Who?", max_tokens=0)


def test_rules_bound_prompt_and_answer_exactly(model):
  def reading(most):
    answering = model.empty_memory()._answering
    rules = dataclasses.replace(model.rules, max_length=most)
    prompts = dataclasses.replace(answering.prompts, rules=rules)
    return Memory(dataclasses.replace(answering, prompts=prompts))

  length = len(_layout(model.empty_memory(), "Who?").decoder_token)
  assert reading(length + 3).ask("Who?", max_tokens=3).tokens == 3
  with pytest.raises(UserError, match=f"take {length} \\+ 3 tokens"):
    reading(length + 2).ask("Who?", max_tokens=3)
  words = 3 + 1 + len(follow_up("Why?", model.tokenizer))
  whole = length + words
  for most in (whole + 2, whole + 1):
    session = reading(most).chat()
    session.ask("Who?", max_tokens=3)
    if most == whole + 2:
      assert session.ask("Why?", max_tokens=2).tokens == 2
      continue
    with pytest.raises(UserError, match=f"take {whole} \\+ 2 tokens"):
      session.ask("Why?", max_tokens=2)


# --- batches ----------------------------------------------------------------


@pytest.mark.slow
def test_nine_questions_of_unequal_length(model, memory):
  """Every row's cache is that of the whole model, padded rows aside."""
  texts = ["Who?", WHY * 90, "What is shown on the card in the garden?"]
  texts = [texts[n % 3] for n in range(9)]
  layouts = [_layout(memory, text) for text in texts]
  state, attention = model.engine.prefill(
    memory._answering.memory, layouts, max_tokens=4
  )
  assert attention is None and state.done.tolist() == [False] * 9 + [True] * 7
  found = models.next_logits(model, state)
  for n in range(3):
    expected = models.slow_logits(model, layouts[n], models.features(), [])
    np.testing.assert_allclose(
      found[n:9:3], np.repeat(expected, 3, axis=0), **NEAR
    )


def test_draws_do_not_depend_on_batch_sizes(model, monkeypatch):
  memory = model.empty_memory()

  def drawn():
    answers = memory.answer(["Who?"] * 3, max_tokens=8, sampling=HOT)
    return [answer.text for answer in answers]

  together = drawn()
  assert len(set(together)) == 3
  monkeypatch.setattr("hourjax.inference.memory._BATCH_QUERIES", 1)
  assert drawn() == together


def test_text_is_read_in_groups_too(model, monkeypatch):
  memory, seen = model.empty_memory(), []
  prefill = model.engine.prefill

  def counting(memory, layouts, **options):
    seen.append(len(layouts))
    return prefill(memory, layouts, **options)

  monkeypatch.setattr(model.engine, "prefill", counting)
  length = len(_layout(memory, "Who?").decoder_token)
  monkeypatch.setattr("hourjax.inference.memory._BATCH_QUERIES", 2 * length)
  memory.answer(["Who?"] * 3, max_tokens=1)
  assert seen == [2, 1]
  memory.answer([], max_tokens=1)


def test_prompts_that_are_read_together(monkeypatch):
  monkeypatch.setattr("hourjax.inference.memory._BATCH_QUERIES", 10)
  assert list(_batch_sizes([], 1)) == []
  assert list(_batch_sizes([5, 5, 5], 1)) == [2, 1]
  assert list(_batch_sizes([11, 1, 9, 10, 1], 1)) == [1, 2, 1, 1]


def test_caches_of_short_prompts_are_padded(monkeypatch):
  """Rows to a power of two, each to the longest prompt and its answer."""
  monkeypatch.setattr("hourjax.inference.memory._BATCH_CACHE", 4 * 1024)
  assert list(_batch_sizes([9] * 6, 1000)) == [4, 2]
  assert list(_batch_sizes([9] * 6, 1500)) == [2, 2, 2]  # 1500 are 1536
  assert list(_batch_sizes([2000, 9, 9, 9, 9, 9], 20)) == [2, 4]
  assert list(_batch_sizes([9, 9, 9, 9, 9, 2000], 20)) == [5, 1]
  assert list(_batch_sizes([9000, 9], 20)) == [1, 1]


# --- what there is to see ---------------------------------------------------


@pytest.mark.slow
def test_attention_is_the_softmax_of_the_probe_queries(model, memory):
  """Against float64 softmax in each block, of another prompt beside it."""
  layouts = [_layout(memory, text) for text in ("Who?", "Why so late?")]
  probes = np.flatnonzero(layouts[0].query_token < 0)[5:40:3]
  encoded = memory._answering.memory
  _, attention = model.engine.prefill(
    encoded, layouts, max_tokens=1, probe_queries=probes
  )
  stored, kept = encoded.cache.keys_values, encoded.cache.kept
  layout = layouts[0]
  whole = with_params(model.config, model.engine.params)
  at = engine._count_kept(layout, encoded.kept).query_source
  words = whole.decoder.embed(jnp.asarray(layout.query_token)[None])
  x = jnp.where(layout.query_token[None, :, None] >= 0, words, kept[:, at])
  position = jnp.asarray(layout.query_position)[None]
  one = jnp.ones_like(position)
  segment = encoded.cache.segment
  assert int(segment.sum()) == 150 * (model.config.pool_side**2 + 1)
  for n in range(model.config.memaug_layers):
    block = whole.memaug.layer(n)
    inner = block.norm1(x + block.self_attn(x, position, one))
    q = np.asarray(block.cross_attn.queries(inner, position), np.float64)
    q, k = q[0, probes], np.asarray(stored.k[n, 0], np.float64)
    k = np.repeat(k, q.shape[1] // k.shape[1], axis=1)
    score = np.einsum("nhc,shc->nhs", q, k) * q.shape[-1] ** -0.5
    score = np.where(np.asarray(segment[0]) == 1, score, -np.inf)
    weight = np.exp(score - score.max(-1, keepdims=True))
    expected = (weight / weight.sum(-1, keepdims=True)).sum((0, 1))
    np.testing.assert_allclose(attention[n], expected, rtol=0, atol=2e-3)
    read = block.cross_attn.attend(
      inner,
      position,
      one,
      type(stored)(stored.k[n], stored.v[n]),
      segment,
      kind="cross",
    )
    x = block.norm2(inner + read)
    x = block.norm3(x + block.mlp(x))


@pytest.mark.slow
@pytest.mark.parametrize("frames, duration", [(1, 1.0), (150, 97.9)])
def test_videos_that_are_short(model, frames, duration):
  """Few frames repeat in the memory; the prompt says how many there are."""
  visual = models.features(frames)
  memory = model.encode_memory(visual, duration=duration)
  chosen = visual[stored_feature_frames(frames, duration)]
  assert memory.num_frames == len(chosen) == min(frames, 128)
  state = memory._answering.prefill([_layout(memory, "Who?")], 1)
  layout = _layout(memory, "Who?")
  text = model.tokenizer.decode([int(i) for i in layout.query_token if i >= 0])
  assert f"{duration:.2f} seconds, and {len(chosen)} frames" in text
  expected = models.slow_logits(model, layout, chosen, [])
  np.testing.assert_allclose(models.next_logits(model, state), expected, **NEAR)


@pytest.mark.slow
def test_images_with_text_between(model, tmp_path):
  rng = np.random.default_rng(0)
  paths = [tmp_path / f"{n}.png" for n in range(2)]
  for path, size in zip(paths, [(40, 30), (9, 70)], strict=True):
    pixels = rng.integers(0, 256, (*size, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(path)
  both = "Here <image> and there <image>: who?"
  for images, text in [(paths, both), (paths[1:], "Who is <image>?")]:
    memory = model.encode_images(images)
    spec = row_spec(model.config, Size())
    tiles = read_images(images, spec, "tiled")
    layout = _layout(memory, text)
    slots = np.flatnonzero(np.diff(layout.decoder_token < 0))
    assert len(slots) == 2 * len(images)
    state = memory._answering.prefill([layout], 1)
    np.testing.assert_allclose(
      models.next_logits(model, state),
      models.slow_logits(model, layout, tiles, [], "tiles"),
      **NEAR,
    )
    with pytest.raises(UserError, match="<image>"):
      memory.ask(f"{both} <image>")


@pytest.mark.parametrize("with_image", [False, True])
def test_a_marker_in_an_answer_is_no_image(model, tmp_path, with_image):
  """What the model said may hold the marker, e.g. of a feed's items."""
  Image.fromarray(np.zeros((9, 9, 3), np.uint8)).save(tmp_path / "a.png")
  memory = model.empty_memory()
  if with_image:
    memory = model.encode_images([tmp_path / "a.png"])

  def laid_out(said):
    turns = [Turn("human", "Who?"), Turn("gpt", said), Turn("human", "Why?")]
    return models.layout_of(memory, turns)

  found, expected = laid_out("<rss><image>"), laid_out("<rss>")
  np.testing.assert_array_equal(found.decoder_token, expected.decoder_token)
  np.testing.assert_array_equal(found.decoder_source, expected.decoder_source)


def test_kept_tokens_are_found_in_any_order():
  source = np.array([-1, 30, 10, -1, 20, 30], np.int32)
  empty = np.zeros(0, np.int32)
  layout = Layout(empty_repository(), empty, source, *[empty] * 4)
  found = engine._count_kept(layout, np.array([20, 30, 10], np.int32))
  assert found.query_source.tolist() == [-1, 1, 2, -1, 0, 1]


def _kept(model, visual):
  """Memory indices that forgetting keeps of features."""
  return model.encode_memory(visual)._answering.kept.candidates


@pytest.mark.slow
def test_forgetting_is_as_the_rules_say(model, memory, tmp_path):
  visual = models.features()
  again, other = _kept(model, visual), memory._answering.kept.candidates
  np.testing.assert_array_equal(again, other)
  seeded = _kept(models.tiny(tmp_path, seed=1), visual)
  assert len(seeded) == len(again) and (seeded != again).any()
  rule = Forgetting(temporal="keyframe", ratio=4)
  chosen = models.tiny(tmp_path, forgetting=rule)
  # Three frames repeated to 128, of which a quarter is kept.
  visual = models.features(3)
  assert len(np.unique(_kept(chosen, visual) // 17)) == 128 // 4
  visual = models.features()
  visual[40:100] = visual[40]  # alike: of no interest, but for the ends
  kept = np.unique(_kept(chosen, visual) // 17)
  assert len(kept) == 150 // 4 and not ((kept > 45) & (kept < 94)).any()


@pytest.fixture(scope="module")
def guided(tmp_path_factory):
  """A model whose forgetting is guided by the question."""
  rule = Forgetting(temporal="question", ratio=4)
  return models.tiny(tmp_path_factory.mktemp("guided"), forgetting=rule)


def _seen_frames(memory, *questions):
  """Frames that the decoder sees of a memory after these questions."""
  layout = models.layout_of(memory, [Turn("human", q) for q in questions])
  source = layout.query_source
  return np.unique(source[source >= 0] // 17)


def test_the_frames_kept_depend_on_the_question(guided):
  visual = models.features()
  memory = guided.encode_memory(visual)
  who, card = (_seen_frames(memory, q) for q in models.QUESTIONS[:2])
  assert len(who) == len(card) == 150 // 4
  assert (who != card).any()
  # By hand: the model's own projector and words.
  params = guided.engine.params
  model = with_params(models.CONFIG, params)
  means = np.asarray(model.projector(jnp.asarray(visual, jnp.float32)))
  means = means.astype(np.float32).mean(axis=1)
  ids = guided.tokenizer.encode(models.QUESTIONS[1])
  word = np.asarray(params["decoder/embedding"], np.float32)[ids].mean(axis=0)
  cosine = means @ word / np.linalg.norm(means, axis=1)
  expected = np.sort(np.argsort(-cosine, kind="stable")[: 150 // 4])
  np.testing.assert_array_equal(card, expected)


@pytest.mark.slow
def test_questions_asked_together_keep_what_each_keeps_alone(guided):
  memory = guided.encode_memory(models.features())
  together = memory.answer(models.QUESTIONS, max_tokens=4)
  alone = [memory.ask(q, max_tokens=4).text for q in models.QUESTIONS]
  assert [answer.text for answer in together] == alone


@pytest.mark.slow
def test_a_prompt_guided_by_its_question_is_laid_out_as_in_training(guided):
  """The whole row through the training's model gives the same logits."""
  visual = models.features()
  memory = guided.encode_memory(visual)
  conversation = memory.chat()
  conversation.ask(models.QUESTIONS[1], max_tokens=3)
  words = answer_ids(conversation)
  layout = _layout(memory, models.QUESTIONS[1])
  logits = models.slow_logits(guided, layout, visual, words)
  np.testing.assert_allclose(
    models.next_logits(guided, conversation._state), logits[-1:], **NEAR
  )


# --- other models -----------------------------------------------------------


def _other(**changes):
  decoder = dataclasses.replace(
    models.CONFIG.decoder, tied=changes.pop("tied", False)
  )
  return dataclasses.replace(models.CONFIG, decoder=decoder, **changes)


@pytest.mark.slow
def test_without_memaug_and_with_tied_words(tmp_path):
  model = models.tiny(tmp_path, config=_other(memaug_layers=0, tied=True))
  visual = models.features()
  memory = model.encode_memory(visual)
  session = memory.chat()
  assert session.ask("Who?", max_tokens=3).attention is None
  first = answer_ids(session)
  session.ask("Why?", max_tokens=3)
  second = answer_ids(session)
  words = [*first, *_between(model, first, "Why?"), *second]
  logits = models.slow_logits(model, _layout(memory, "Who?"), visual, words)
  np.testing.assert_allclose(
    models.next_logits(model, session._state), logits[-1:], **NEAR
  )
  together = memory.answer(["Who?", "Why?"], max_tokens=3)
  assert together[0].text == memory.ask("Who?", max_tokens=3).text


@pytest.mark.slow
def test_bfloat16(tmp_path):
  """Caches cost no more precision than bfloat16 does by itself."""
  model = models.tiny(tmp_path, config=_other(dtype="bfloat16"))
  exact = models.tiny(tmp_path)
  kinds = {path: x.dtype for path, x in model.engine.params.items()}
  assert kinds["decoder/layers/layers/attn/q/kernel"] == jnp.bfloat16
  assert kinds["decoder/layers/layers/norm1/scale"] == jnp.float32
  visual = models.features()
  memory = model.encode_memory(visual)
  session = memory.chat()
  attention = session.ask("Who?", max_tokens=6).attention
  words = answer_ids(session)
  state = session._state
  assert state.cache.k.dtype == jnp.bfloat16
  layout = _layout(memory, "Who?")
  cached = models.next_logits(model, state)[0]
  slow = models.slow_logits(model, layout, visual, words)[-1]
  true = models.slow_logits(exact, layout, visual, words)[-1]
  rounding = np.abs(slow - true).mean()
  assert np.abs(cached - true).mean() < 1.5 * rounding
  assert np.abs(cached - slow).mean() < 1.5 * rounding
  there = exact.encode_memory(visual).ask("Who?", max_tokens=6).attention
  assert np.abs(attention.attention - there.attention).sum() / 2 < 0.1


# --- memory and shapes ------------------------------------------------------


def test_what_is_forgotten_is_freed(model):
  def held():
    gc.collect()
    return sum(x.nbytes for x in jax.live_arrays())

  memory = model.encode_memory(models.features())
  memory.ask("Who?", max_tokens=1)
  before = held()
  for seed in range(2):
    memory = model.encode_memory(models.features(seed=seed))
    memory.ask("Who?", max_tokens=1)
    assert held() == before


def test_a_mesh_that_divides_no_heads(tmp_path):
  """Before any parameter is placed; 2 KV heads over 4 devices."""
  devices = np.array(jax.devices()[:1] * 4).reshape(1, 1, 1, 4)
  mesh = jax.sharding.Mesh(devices, AXES)
  with pytest.raises(UserError, match=r"2 KV heads cannot .* tensor = 4"):
    engine.Engine({}, models.CONFIG, mesh)


def test_sizes_are_few():
  sizes = sorted({rounded(n, 128) for n in range(2000)})
  assert sizes == [0, 128, 256, 384, 512, 768, 1024, 1536, 2048]
  for least in (1, 16, 128):
    found = [rounded(n, least) for n in range(1, 3000)]
    assert all(n <= size for n, size in enumerate(found, 1))
    assert all(size % least == 0 for size in found)
