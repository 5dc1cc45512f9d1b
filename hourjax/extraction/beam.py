"""Extraction over many machines as an Apache Beam pipeline.

    names -> Create -> Reshuffle -> Map(extract_video) -> rows

The function of the `Map` extracts one video, as `streaming.StreamingExtractor`
does in one process. A worker process loads the tower once. It writes the row
of each video that it finishes into an index or failures file of its own at
once, so a pipeline that is killed loses only the videos in work, on any runner.
On TPUs, run one worker process a machine, since a chip belongs to one process.
"""

import atexit
import contextlib
import dataclasses
import functools
import os
import socket
import threading
import types
import uuid
from typing import Any

from hourjax.data.media.video import MIN_SHARE
from hourjax.data.records.record import Skipped
from hourjax.data.store.features import FeatureStore
from hourjax.errors import UserError
from hourjax.extraction.encoder import Encoder, tower_params
from hourjax.extraction.streaming import Outcome, StreamingExtractor
from hourjax.extraction.video_list import find_videos
from hourjax.extraction.worker import damaged_row
from hourjax.jsonl import JsonlWriter, read_rows
from hourjax.training.config import Experiment

_WORKER_LOCK = threading.Lock()


@dataclasses.dataclass(frozen=True)
class ExtractionJob:
  """Describes an extraction to worker processes; hashable and picklable.

  Attributes:
    experiment: experiment whose tower extracts; see `tower_params`.
    tower: folder of the tower, if it is another one; see `tower_params`.
    videos: folder of the videos, the same on every machine.
    out: root of the feature store, the same on every machine.
    batch_frames: frames that are encoded at a time. By default 32 a device.
    min_share: fraction of a damaged video's frames that must be decoded for it
      to be stored.
    run: label of this run's index and failures files.
  """

  experiment: Experiment
  tower: str | None
  videos: str
  out: str
  batch_frames: int | None = None
  min_share: float = MIN_SHARE
  run: str = dataclasses.field(default_factory=lambda: uuid.uuid4().hex[:8])


def extract_video(name: str, job: ExtractionJob) -> dict[str, Any]:
  """Extracts one video in a worker process: the function of the `Map`.

  Args:
    name: name of the video.
    job: the extraction.

  Returns:
    The row of the video: `video`, `frames` and `duration` as in the index; or
    `file` and `reason` if it failed.

  Raises:
    OSError: the store cannot be written.
  """
  return _worker_process(job).extract(name)


def extract_videos(
  job: ExtractionJob,
  *,
  runner: str,
  options: str = "",
  names: str | os.PathLike | None = None,
) -> list[Skipped]:
  """Runs the pipeline over all videos that the store does not hold yet.

  Args:
    job: the extraction.
    runner: name of Beam's runner, e.g. "DirectRunner".
    options: options of the runner, separated by spaces, e.g.
      "--direct_running_mode=multi_processing --direct_num_workers=8".
    names: file with one name a line; only these videos are taken.

  Returns:
    Videos that failed, with the reason.

  Raises:
    UserError: Apache Beam is not installed, there are no videos, or some have
      neither features nor a reason.
  """
  beam = _beam()
  found = find_videos(job.videos, names)
  store = FeatureStore(job.out, create=True)
  with store.temp_files.locked():
    todo = [name for name in found if name not in store]
    arguments = [f"--runner={runner}", *options.split()]
    pipeline_options = beam.options.pipeline_options.PipelineOptions(arguments)
    with beam.Pipeline(options=pipeline_options) as pipeline:
      (
        pipeline
        | beam.Create(todo)
        | beam.Reshuffle()
        | beam.Map(extract_video, job=job)
      )
  return _collect(job, found, todo)


class _WorkerProcess:
  """Holds the encoder, the store, and the files of one worker process."""

  def __init__(self, job: ExtractionJob):
    """Loads the tower and opens the store."""
    self._job = job
    params = tower_params(job.experiment, job.tower)
    self._encoder = Encoder(
      params, job.experiment.model, batch_frames=job.batch_frames
    )
    host = socket.gethostname().replace("/", "-")
    label = f"beam-{job.run}-{host}-{os.getpid()}"
    self._store = FeatureStore(job.out, create=True, worker=label)
    self._failures = JsonlWriter(self._store.storage, f"failures-{label}.jsonl")
    self._store.claim(self._encoder.fingerprint, self._encoder.shape)
    # The temporary folder is held until the process ends; otherwise another
    # run would take it for one that a killed process left, and remove it.
    self._held = contextlib.ExitStack()
    self._held.enter_context(self._store.temp_files.locked())
    atexit.register(self.close)

  def close(self) -> None:
    """Gives up the temporary folder."""
    self._held.close()

  def extract(self, name: str) -> dict[str, Any]:
    """Extracts one video; see `extract_video`."""
    rows: list[dict[str, Any]] = []

    def on_outcome(outcome: Outcome) -> None:
      """Writes the row of the video."""
      if outcome.stored:
        self._store.record(name, outcome.stored, outcome.share)
        rows.append({"video": name, **outcome.stored._asdict()})
        if outcome.share < 1:
          rows[0]["share"] = outcome.share
          self._failures.add(damaged_row(outcome))
      else:
        rows.append({"file": name, "reason": outcome.reason})
        self._failures.add(rows[0])

    StreamingExtractor(
      [name],
      root=self._job.videos,
      store=self._store,
      encoder=self._encoder,
      on_outcome=on_outcome,
      min_share=self._job.min_share,
    ).run()
    return rows[0]


def _worker_process(job: ExtractionJob) -> _WorkerProcess:
  """Returns this process's worker for a job, made at the first call."""
  with _WORKER_LOCK:  # runners call from several threads
    return _make_worker_process(job)


@functools.cache
def _make_worker_process(job: ExtractionJob) -> _WorkerProcess:
  return _WorkerProcess(job)


def _collect(
  job: ExtractionJob, found: list[str], todo: list[str]
) -> list[Skipped]:
  """Reads the rows that the workers wrote, and prints a summary."""
  store = FeatureStore(job.out, create=True)
  rows = {
    row["file"]: row
    for key in store.storage.list(f"failures-beam-{job.run}-")
    for row in read_rows(store.storage, key)
  }
  rows = {name: rows[name] for name in todo if name in rows}
  shares = {n: row["share"] for n, row in rows.items() if "share" in row}
  failed = {n: row["reason"] for n, row in rows.items() if n not in shares}
  lost = [n for n in todo if n not in store and n not in failed]
  stored = len(found) - len(failed) - len(lost)
  print(
    f"{stored} of {len(found)} videos in {store.root}"
    f" ({len(found) - len(todo)} were there),"
    f"{f' {len(shares)} read in part,' if shares else ''} {len(failed)} failed"
  )
  for name, share in shares.items():
    print(f"  read in part {name}: {share:.2%} of its frames")
  for name, reason in failed.items():
    print(f"  failed {name}: {reason}")
  if lost:
    raise UserError(
      f"{len(lost)} videos have no row, e.g. {lost[0]}; do all workers see"
      f" {job.out}? Start again to go on"
    )
  return [Skipped(name, reason) for name, reason in failed.items()]


def _beam() -> types.ModuleType:
  """Imports Apache Beam, which is an optional requirement."""
  try:
    import apache_beam
    import apache_beam.options.pipeline_options
  except ImportError:
    raise UserError(
      "--beam_runner needs Apache Beam; pip install -e '.[prep]'"
    ) from None
  return apache_beam
