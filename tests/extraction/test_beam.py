import dataclasses
import json
import pickle
import sys

import numpy as np
import pytest

from hourjax.data.store.features import FeatureStore
from hourjax.errors import UserError
from hourjax.extraction import beam, worker
from hourjax.extraction.streaming import FeatureWriter
from hourjax.training.config import build_experiment
from hourjax.weights.shards import save_params
from tests import videos
from tests.extraction import towers

SEVERAL = "--direct_running_mode=multi_processing --direct_num_workers=2"
IN_MEMORY = "--direct_running_mode=in_memory --direct_num_workers=1"


@pytest.fixture
def job(tmp_path):
  folder = tmp_path / "videos"
  for i in range(4):
    videos.write(folder / f"é {i}.mp4", 20 + i)
  (folder / "bad.mp4").touch()
  parts = ("forgetting", "data", "rows", "optimizer", "read")
  model = {"model": dataclasses.asdict(towers.MODEL)}
  experiment = build_experiment(model | {name: {} for name in parts})
  save_params(towers.params(), towers.MODEL, tmp_path / "tower")
  return beam.ExtractionJob(
    experiment,
    str(tmp_path / "tower"),
    str(folder),
    str(tmp_path / "store"),
    batch_frames=8,
  )


def _same_as_in_one_process(job, tmp_path):
  worker.extract_videos(
    towers.params(),
    towers.MODEL,
    videos=job.videos,
    out=tmp_path / "one",
    batch_frames=8,
  )
  one, many = FeatureStore(tmp_path / "one"), FeatureStore(job.out)
  assert sorted(one.videos()) == sorted(many.videos())
  for name in one.videos():
    assert one.stored(name) == many.stored(name)
    frames = np.arange(one.stored(name).frames)
    np.testing.assert_array_equal(
      one.read(name, frames, towers.SHAPE),
      many.read(name, frames, towers.SHAPE),
    )


def test_a_job_goes_to_other_processes(job):
  again = pickle.loads(pickle.dumps(job))
  assert again == job and hash(again) == hash(job)
  assert beam.ExtractionJob(job.experiment, None, "a", "b").run != job.run


def test_rows_of_the_function(job):
  row = beam.extract_video("é 1.mp4", job)
  assert row == {"video": "é 1.mp4", "frames": 21, "duration": 0.7}
  row = beam.extract_video("bad.mp4", job)
  assert row["file"] == "bad.mp4" and "has 0 bytes" in row["reason"]
  worker_process = beam._worker_process(job)
  assert beam._worker_process(job) is worker_process  # the tower loads once
  worker_process.close()


@pytest.mark.slow
def test_a_pipeline_of_several_processes(job, tmp_path, capsys):
  pytest.importorskip("apache_beam")
  failed = beam.extract_videos(job, runner="DirectRunner", options=SEVERAL)
  assert "4 of 5 videos" in capsys.readouterr().out
  assert [item.id for item in failed] == ["bad.mp4"]
  assert "has 0 bytes" in failed[0].reason
  _same_as_in_one_process(job, tmp_path)
  store = FeatureStore(job.out)
  indices = store.storage.list("index-beam-")
  assert len(indices) == 2  # two processes, none of which is this one
  failure_files = store.storage.list(f"failures-beam-{job.run}-")
  (row,) = [
    json.loads(line)
    for key in failure_files
    for line in store.storage.read(key).splitlines()
  ]
  assert row["file"] == "bad.mp4"
  # A second start tries only what failed.
  again = dataclasses.replace(job, run="again")
  failed = beam.extract_videos(again, runner="DirectRunner", options=IN_MEMORY)
  beam._worker_process(again).close()
  assert [item.id for item in failed] == ["bad.mp4"]
  assert "(4 were there), 1 failed" in capsys.readouterr().out


@pytest.mark.slow
def test_videos_without_a_row_are_an_error(job, monkeypatch):
  pytest.importorskip("apache_beam")
  monkeypatch.setattr(beam, "extract_video", _nothing)
  with pytest.raises(UserError, match=r"5 videos have no row, e.g. bad.mp4"):
    beam.extract_videos(job, runner="DirectRunner", options=IN_MEMORY)


def _nothing(name, job):
  return {}


@pytest.mark.slow
def test_a_full_disk_ends_the_pipeline(job, monkeypatch):
  pytest.importorskip("apache_beam")

  def full(self):
    raise OSError(28, "No space left on device")

  monkeypatch.setattr(FeatureWriter, "finish", full)
  with pytest.raises(Exception, match="No space left on device"):
    beam.extract_videos(job, runner="DirectRunner", options=IN_MEMORY)
  beam._worker_process(job).close()
  assert len(FeatureStore(job.out, create=True)) == 0


def test_beam_is_not_installed(job, monkeypatch):
  monkeypatch.setitem(sys.modules, "apache_beam", None)
  with pytest.raises(UserError, match=r"pip install -e '\.\[prep\]'"):
    beam.extract_videos(job, runner="DirectRunner")
