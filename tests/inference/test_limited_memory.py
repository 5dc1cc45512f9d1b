"""A smaller memory answers as if nothing else had been in it."""

import dataclasses

import numpy as np
import pytest

from hourjax.data.memory_options import MemoryOptions
from hourjax.data.records.record import Turn
from tests.inference import models

NEAR = {"rtol": 0, "atol": 1e-2}  # of logits that spread by 3; sharp softmax
FRAMES = 150  # 37 are kept; a quarter are 38


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory):
  return tmp_path_factory.mktemp("tokenizer")


def _asked(model, visual):
  """The first logits of an answer by the caches, and the prompt's layout."""
  memory = model.encode_memory(visual)
  layout = models.layout_of(memory, [Turn("human", "Who?")])
  state, _ = model.engine.prefill(
    memory._answering.memory, [layout], max_tokens=1
  )
  return models.next_logits(model, state)[0], layout


def _without_the_rest(layout):
  """The same layout over a memory that holds only what is attended to.

  Queries that start from another token are not possible there.
  """
  memory = layout.repository
  left = np.flatnonzero(memory.attended)
  place = np.full(len(memory.source), -1, np.int32)
  place[left] = np.arange(len(left))
  source = layout.query_source
  moved = np.where(source < 0, -1, place[source])
  assert ((moved < 0) == (source < 0)).all()
  reduced = dataclasses.replace(
    memory,
    source=memory.source[left],
    position=memory.position[left],
    attended=None,
  )
  return dataclasses.replace(layout, repository=reduced, query_source=moved)


@pytest.mark.slow
@pytest.mark.parametrize("positions", ["structured", "counted", "none"])
@pytest.mark.parametrize("scale", [1.0, 0.5, 0.0])
def test_caches_hold_what_training_computes(
  scale, positions, tokenizer_folder, visual
):
  options = MemoryOptions(scale, positions)
  model = models.tiny(tokenizer_folder, memory=options)
  found, layout = _asked(model, visual)
  (expected,) = models.slow_logits(model, layout, visual, [])
  np.testing.assert_allclose(found, expected, **NEAR)
  assert (layout.repository.attended is None) == (scale == 1)
  if scale == 0:
    alone = _without_the_rest(layout)
    (expected,) = models.slow_logits(model, alone, visual, [])
    np.testing.assert_allclose(found, expected, **NEAR)


@pytest.mark.slow
def test_every_option_changes_the_answer(tokenizer_folder, visual):
  logits = []
  for options in (
    MemoryOptions(),
    MemoryOptions(scale=0.25),
    MemoryOptions(scale=0.0),
    MemoryOptions(positions="counted"),
    MemoryOptions(positions="none"),
  ):
    model = models.tiny(tokenizer_folder, memory=options)
    logits.append(_asked(model, visual)[0])
  for n, one in enumerate(logits):
    assert all(np.abs(one - other).max() > 0.05 for other in logits[:n])
