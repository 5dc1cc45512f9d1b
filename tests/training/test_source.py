"""A prepared dataset as a run opens it."""

import types

import pytest

from hourjax.data.columns import ColumnsBuilder, Measures
from hourjax.data.media.frame_rules import sparse_note
from hourjax.errors import UserError
from hourjax.training import loop
from hourjax.training.data_loader import sample_weights


def _columns():
  builder = ColumnsBuilder()
  measures = Measures(0, 9, 0, 5)
  for source, stream in [
    ("ego4d", "long"),
    ("panda", "long"),
    ("panda", "short"),
    ("images", "short"),
  ]:
    builder.add(measures, source, stream)
  return builder.build()


@pytest.mark.parametrize(
  "text, expected",
  [
    ("", [1, 1, 1, 1]),
    ("panda=2", [1, 2, 2, 1]),
    ("long=0.5", [0.5, 0.5, 1, 1]),
    ("long=0.5, panda=3", [0.5, 1.5, 3, 1]),
    ("images=0", [1, 1, 1, 0]),
  ],
)
def test_weights_of_streams_and_sources(text, expected):
  assert sample_weights(_columns(), text).tolist() == expected


def test_a_name_that_is_both_stream_and_source():
  builder = ColumnsBuilder()
  for source, stream in [("a", "b"), ("b", "a"), ("a", "a")]:
    builder.add(Measures(0, 9, 0, 5), source, stream)
  columns = builder.build()
  with pytest.raises(UserError, match="stream:NAME or source:NAME if it is"):
    sample_weights(columns, "a=2")
  assert sample_weights(columns, "stream:a=2").tolist() == [1, 2, 2]
  assert sample_weights(columns, "source:a=3").tolist() == [3, 1, 3]


@pytest.mark.parametrize(
  "text", ["panda", "panda=", "panda=x", "panda=-1", "lng=2", "panda=inf"]
)
def test_weights_that_make_no_sense(text):
  with pytest.raises(UserError) as error:
    sample_weights(_columns(), text)
  for part in (text, "NAME=WEIGHT", "long, short", "ego4d, panda, images"):
    assert part in str(error.value)


def test_the_start_says_what_is_not_shown_of_short_videos():
  class Samples:
    sparse = ()

    def __len__(self):
      return 5

  dataset = Samples()
  state = types.SimpleNamespace(trained={}, frozen={}, step=0)
  experiment = types.SimpleNamespace(step_rows=2)

  def said():
    return loop._summary(experiment, dataset, {"rows": 3}, state, 4)

  assert "note" not in said()
  dataset.sparse = ["a.mp4", "b.mp4"]
  assert f"\nnote: {sparse_note(2)}" in said()
