"""A prepared dataset as a run opens it."""

import pytest

from hourjax.data.columns import ColumnsBuilder, Measures
from hourjax.errors import UserError
from hourjax.training.source import sample_weights


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


@pytest.mark.parametrize(
  "text", ["panda", "panda=", "panda=x", "panda=-1", "lng=2", "panda=inf"]
)
def test_weights_that_make_no_sense(text):
  with pytest.raises(UserError) as error:
    sample_weights(_columns(), text)
  for part in (text, "NAME=WEIGHT", "long, short", "ego4d, panda, images"):
    assert part in str(error.value)
