"""Rows that are built of drawn samples hold what was drawn."""

import dataclasses

import numpy as np
import pytest

from hourjax.batch import IGNORE
from hourjax.data import synthetic
from hourjax.data.rows import Size
from hourjax.planning.workload import make_workload
from tests.planning.examples import experiment, in_rows

# Small frames and tiles of the published numbers of tokens.
SIDE = 27 * 2


@pytest.fixture(scope="module", params=[1, 2, 3])
def stage(request):
  found = in_rows(experiment(stage=request.param, frames=512), 1)
  vision = dataclasses.replace(
    found.model.vision, image_size=SIDE, patch_size=2, width=8, heads=2
  )
  model = dataclasses.replace(found.model, vision=vision)
  return dataclasses.replace(found, model=model)


def test_rows_hold_the_samples_that_were_drawn(stage):
  workload = make_workload(stage)
  kinds = [
    int(np.argmax(workload.sizes[:, column]))
    for column in range(len(Size.names()))
  ]
  batch = synthetic.build_rows(
    workload.drawn,
    kinds,
    stage.row_spec,
    stage.sample_options,
    stage.model.decoder.vocab,
  )
  for place, row in enumerate(kinds):
    drawn = dict(zip(Size.names(), workload.sizes[row].tolist()))
    samples = len(workload.drawn.rows[row])
    # A video's instruction and the newlines of a tiled image may be planned
    # with a few tokens more than this sample has.
    slack = 0.02 * drawn["decoder"] + 8 * samples
    memory = (batch.memory_segment[place] > 0).sum()
    assert memory == drawn["memory"]
    queries = (batch.query_segment[place] > 0).sum()
    assert 0 <= drawn["queries"] - queries < slack
    decoder = (batch.decoder_segment[place] > 0).sum()
    assert 0 <= drawn["decoder"] - decoder < slack
    assert batch.decoder_segment[place].max() == samples
    labels = (batch.target[place] != IGNORE).sum()
    assert labels == pytest.approx(workload.work.labels[row], abs=2 * samples)
    # Each query reads the memory of its own sample.
    own = batch.query_segment[place]
    assert (batch.query_reads[place] == own).all()
    assert batch.decoder_token[place].max() < stage.model.decoder.vocab
