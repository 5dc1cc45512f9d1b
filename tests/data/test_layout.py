import hashlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hourjax.batch import IGNORE
from hourjax.data import forgetting, repository
from hourjax.data.conversations import IMAGE, Conversation
from hourjax.data.layout import build_layout
from hourjax.errors import UserError
from tests import golden_files

SWEEP = golden_files.npz("index_sweep.npz")
SWEEP_META = golden_files.meta_of("index_sweep.npz").get("sweep", {})


def _conversation(ids, labels):
  return Conversation(np.array(ids, np.int32), np.array(labels, np.int32))


def _sha(array):
  return hashlib.sha256(array.astype(np.int64).tobytes()).hexdigest()


# --- against golden ---------------------------------------------------------


@pytest.mark.parametrize("frames", SWEEP_META)
def test_videos_of_many_lengths(frames):
  meta = SWEEP_META[frames]
  side = round((meta["kv_len"] / meta["frames_after"] - 1) ** 0.5)
  memory = repository.video_repository(int(frames), side)
  ((grid,),) = memory.slots
  rng = np.random.default_rng(0)
  rule = forgetting.Forgetting()
  shown = rule.kept_frames(meta["frames_after"], rng)
  drawn = SWEEP.get(f"T{frames}.indices")
  if drawn is None:  # long ones keep hashes and lengths only
    cells = rule.kept_cells(grid, len(shown), rng)
    visual = len(shown) * (cells.shape[1] + 1)
    prompts = meta["q_len"] - visual
    answers = meta["final_len"] - meta["q_len"]
    ids = [5] * 3 + [IMAGE] + [5] * (prompts - 3) + [6] * answers
    labels = [IGNORE] * (1 + prompts) + [6] * answers
  else:
    assert _sha(drawn) == meta["sha256_indices_int64"]
    cells = drawn[shown].astype(int)
    ids, labels = (SWEEP[f"T{frames}.{k}"][0] for k in ("input_ids", "labels"))
  kept = [forgetting.memory_indices(grid, shown, cells)]
  layout = build_layout(_conversation(ids, labels), memory, kept)
  assert len(layout.query_token) == meta["q_len"]
  assert len(layout.labels) == meta["final_len"]
  assert layout.query_position.max() == meta["max_q_pos"]
  if drawn is not None:
    expected = SWEEP[f"T{frames}.q_position_ids"]
    np.testing.assert_array_equal(layout.query_position, expected)
    assert _sha(layout.query_position) == meta["sha256_q_position_ids_int64"]


# --- without golden ---------------------------------------------------------


def test_example_of_the_docstring():
  memory = repository.images_repository(1, 2)
  layout = build_layout(
    _conversation([7, IMAGE, 8, 9], [IGNORE, IGNORE, IGNORE, 9]),
    memory,
    [np.array([0, 4], np.int32)],
  )
  assert layout.query_token.tolist() == [7, -1, -1, 8]
  assert layout.query_source.tolist() == [-1, 0, 4, -1]
  assert layout.query_position.tolist() == [0, 1, 5, 6]
  assert layout.decoder_token.tolist() == [7, -1, -1, 8, 9]
  assert layout.decoder_source.tolist() == [-1, 1, 2, -1, -1]
  assert layout.labels.tolist() == [IGNORE] * 4 + [9]
  assert layout.targets.tolist() == [IGNORE] * 3 + [9, IGNORE]


def _reference(ids, labels, positions, kept):
  """Token by token, as hourjax/README.md, MemAug, specifies it."""
  queries, decoder = [], []
  count, slot = 0, 0
  for word, label in zip(ids, labels):
    if word == IMAGE:
      shift, top = count, -1
      for memory in kept[slot]:
        decoder.append((-1, len(queries), IGNORE))
        queries.append((-1, memory, positions[memory] + shift))
        top = max(top, positions[memory] + shift)
      count, slot = top + 1, slot + 1
      continue
    if label == IGNORE and kept:
      queries.append((word, -1, count))
      count += 1
    decoder.append((word, -1, label))
  return queries, decoder


@st.composite
def conversations(draw, max_slots=3):
  """Text with visual slots; labels on some words."""
  slots = draw(st.integers(0, max_slots))
  words = st.lists(st.tuples(st.integers(0, 99), st.booleans()), max_size=6)
  ids, labels = [], []
  for n in range(slots + 1):
    for word, trained in draw(words):
      ids.append(word)
      labels.append(word if trained else IGNORE)
    if n < slots:
      ids.append(IMAGE)
      labels.append(IGNORE)
  return ids, labels, slots


@given(
  case=conversations(),
  cut=st.none() | st.integers(1, 30),
  seed=st.integers(0, 9),
)
def test_any_conversation(case, cut, seed):
  ids, labels, slots = case
  memory = repository.empty_repository()
  if slots:
    memory = repository.images_repository(slots, 3)
  rng = np.random.default_rng(seed)
  kept = forgetting.Forgetting().kept_tokens(memory, rng)
  layout = build_layout(
    _conversation(ids, labels), memory, kept, max_length=cut
  )
  queries, decoder = _reference(ids, labels, memory.position, kept)
  got = zip(layout.query_token, layout.query_source, layout.query_position)
  assert list(got) == queries
  got = zip(layout.decoder_token, layout.decoder_source, layout.labels)
  assert list(got) == decoder[:cut]
  for column in (layout.query_position, layout.labels, layout.targets):
    assert column.dtype == np.int32
  trained = layout.targets >= 0
  np.testing.assert_array_equal(
    layout.targets[trained], layout.decoder_token[1:][trained[:-1]]
  )


def test_text_makes_no_queries():
  layout = build_layout(
    _conversation([1, 2, 3], [IGNORE, 2, 3]), repository.empty_repository(), []
  )
  assert layout.query_token.size == 0
  assert layout.decoder_token.tolist() == [1, 2, 3]


@pytest.mark.parametrize("marks", [0, 2])
def test_slots_and_marks_must_agree(marks):
  memory = repository.images_repository(1, 2)
  kept = [np.array([0], np.int32)]
  ids = [1] + [IMAGE] * marks
  with pytest.raises(
    UserError, match=rf"record 9: the text has {marks} .*brings 1; write"
  ):
    build_layout(
      _conversation(ids, [IGNORE] * len(ids)), memory, kept, name="record 9"
    )
