"""What MemAug attends to: brute force, and what the model makes of it."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hourjax.batch import IGNORE
from hourjax.data import repository
from hourjax.data.conversations import IMAGE, Conversation
from hourjax.data.forgetting import Forgetting
from hourjax.data.layout import build_layout
from hourjax.data.memory_options import WHOLE_MEMORY, MemoryOptions
from hourjax.data.rows import RowSpec, Sample, Size, build_row
from hourjax.errors import UserError

SIDE = 2
TOKENS = SIDE * SIDE + 1  # of a frame


def _kept(memory, seed=0):
  return Forgetting().kept_tokens(memory, np.random.default_rng(seed))


@given(frames=st.integers(1, 300), scale=st.sampled_from([0.25, 0.5, 0.9]))
def test_scale_leaves_whole_frames_evenly(frames, scale):
  memory = repository.video_repository(frames, SIDE)
  limited = MemoryOptions(scale=scale).limit_memory(memory, _kept(memory))
  shown = max(frames, repository.MIN_FRAMES)
  count = round(scale * shown)
  expected = [False] * (shown * TOKENS)
  step = (shown - 1) / (count - 1)
  for n in range(count):
    # As linspace rounds: 3 * (5 / 3) may be just below 5.
    frame = int(n * step) if n < count - 1 else shown - 1
    for token in range(TOKENS):
      expected[frame * TOKENS + token] = True
  assert sum(expected) == count * TOKENS  # no frame twice
  np.testing.assert_array_equal(limited.attended, expected)


@given(frames=st.integers(1, 300), seed=st.integers(0, 5))
def test_scale_0_leaves_what_is_kept(frames, seed):
  memory = repository.video_repository(frames, SIDE)
  (tokens,) = kept = _kept(memory, seed)
  limited = MemoryOptions(scale=0).limit_memory(memory, kept)
  expected = [i in set(tokens.tolist()) for i in range(len(memory.source))]
  assert limited.attended.tolist() == expected


def test_example_of_the_docstring(monkeypatch):
  monkeypatch.setattr(repository, "MIN_FRAMES", 4)
  memory, kept = repository.video_repository(4, 1), [np.array([2, 3])]
  for scale, expected in [(0.5, "11000011"), (0, "00110000")]:
    limited = MemoryOptions(scale=scale).limit_memory(memory, kept)
    assert "".join(map(str, limited.attended.astype(int))) == expected


@pytest.mark.parametrize("scale", [0, 0.25])
def test_images_are_read_whole(scale):
  memory = repository.images_repository(3, SIDE)
  limited = MemoryOptions(scale=scale).limit_memory(memory, _kept(memory))
  assert limited.attended.all()


def _layout(memory, options=WHOLE_MEMORY):
  ids = np.array([7, IMAGE, 8, 9], np.int32)
  labels = np.array([IGNORE, IGNORE, IGNORE, 9], np.int32)
  return build_layout(
    Conversation(ids, labels), memory, _kept(memory), memory=options
  )


def test_positions():
  """Structured ones tie a kept token to its memory token; others do not."""
  memory = repository.video_repository(130, SIDE)
  whole = _layout(memory)
  visual = whole.query_source >= 0
  tied = whole.query_position[visual] - 1
  np.testing.assert_array_equal(tied, whole.query_source[visual])
  for name, queries, keys in [
    ("structured", whole.query_position, memory.position),
    ("counted", range(len(visual)), range(len(memory.source))),
    ("none", [0] * len(visual), [0] * len(memory.source)),
  ]:
    layout = _layout(memory, MemoryOptions(positions=name))
    assert layout.query_position.tolist() == list(queries)
    assert layout.repository.position.tolist() == list(keys)
    # Nothing else changes.
    np.testing.assert_array_equal(layout.query_source, whole.query_source)
    np.testing.assert_array_equal(layout.decoder_source, whole.decoder_source)


def test_tokens_that_are_not_attended_to_are_in_the_row():
  """They are padding to attention, and queries still start from them."""
  memory = repository.video_repository(3, SIDE)
  size = len(memory.source)
  spec = RowSpec(
    Size(features=12, memory=size + 7, queries=200, decoder=200), 4, 9, 3, 6
  )
  visual = np.zeros((3, 4, 3), np.float32)
  rows = {}
  for scale in (1.0, 0.5):
    layout = _layout(memory, MemoryOptions(scale=scale))
    sample = Sample("x", layout, visual=visual)
    rows[scale] = build_row([sample], spec)
    attended = layout.repository.attended
    expected = np.ones(size) if attended is None else attended
    assert expected.mean() == scale
    got = rows[scale].memory_segment
    np.testing.assert_array_equal(got, [*expected, *[0] * 7])
  for name in rows[1.0]._fields:
    if name != "memory_segment":
      np.testing.assert_array_equal(*(getattr(r, name) for r in rows.values()))


def test_kept_tokens_of_a_question_are_no_memory():
  rule = Forgetting(temporal="question")
  MemoryOptions(scale=0.25).check_forgetting(rule)
  MemoryOptions(scale=0).check_forgetting(Forgetting())
  with pytest.raises(UserError, match=r"scale is 0.*temporal=question"):
    MemoryOptions(scale=0).check_forgetting(rule)
