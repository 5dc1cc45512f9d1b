"""Extraction over many machines as an Apache Beam pipeline.

    names -> Create -> Reshuffle -> Map(extract_video) -> rows

The function is that of one process (`streaming.Stream`), for one video. A
worker process loads the tower once, and writes the row of each video that it
finishes into an index or ledger of its own at once, so a pipeline that is
killed loses only the videos in hand, on any runner. On TPUs run one worker
process a machine, since a chip belongs to one process.
"""

import atexit
import contextlib
import dataclasses
import functools
import os
import socket
import threading
import uuid

from hourjax.data.media.video import MIN_SHARE
from hourjax.data.records.record import Skipped
from hourjax.data.store.features import FeatureStore
from hourjax.errors import UserError
from hourjax.extraction.encoder import Encoder, tower_params
from hourjax.extraction.streaming import Outcome, Stream
from hourjax.extraction.video_list import find_videos
from hourjax.extraction.worker import part_row
from hourjax.jsonl import JsonlWriter, read_rows
from hourjax.training.config import Experiment

_MAKING = threading.Lock()


@dataclasses.dataclass(frozen=True)
class Work:
  """What worker processes need to know; small, hashable and picklable.

  Attributes:
    experiment, tower: as for `tower_params`.
    videos: folder of videos, the same on every machine.
    out: root of the feature store, the same on every machine.
    batch_frames: frames encoded at a time; 32 a device if not given.
    min_share: of a damaged video's frames, that must be read.
    run: label of this run's indices and ledgers.
  """

  experiment: Experiment
  tower: str | None
  videos: str
  out: str
  batch_frames: int | None = None
  min_share: float = MIN_SHARE
  run: str = dataclasses.field(default_factory=lambda: uuid.uuid4().hex[:8])


def extract_video(name: str, work: Work) -> dict:
  """Extracts one video in a worker process: the function of the `Map`.

  Returns:
    Its row: video, frames and duration as in the index; or file and reason.

  Raises:
    OSError: the store cannot be written.
  """
  return _process(work).extract(name)


def extract_videos(
  work: Work,
  *,
  runner: str,
  options: str = "",
  names: str | os.PathLike | None = None,
) -> list[Skipped]:
  """Runs the pipeline over the videos that the store does not hold yet.

  Args:
    work: what to do.
    runner: name of Beam's runner, e.g. "DirectRunner".
    options: of the runner, separated by spaces, e.g.
      "--direct_running_mode=multi_processing --direct_num_workers=8".
    names: file with one name a line; only these are taken.

  Returns:
    Videos that could not be read, with the reason.

  Raises:
    UserError: Apache Beam is not installed, no videos, or rows are lost.
  """
  beam = _beam()
  share = find_videos(work.videos, names)
  store = FeatureStore(work.out, create=True)
  with store.temp_files.locked():
    todo = [name for name in share if name not in store]
    arguments = [f"--runner={runner}", *options.split()]
    pipeline_options = beam.options.pipeline_options.PipelineOptions(arguments)
    with beam.Pipeline(options=pipeline_options) as pipeline:
      (
        pipeline
        | beam.Create(todo)
        | beam.Reshuffle()
        | beam.Map(extract_video, work=work)
      )
  return _collect(work, share, todo)


class _Process:
  """A worker process: its encoder, store, index and list of failures."""

  def __init__(self, work: Work):
    self._work = work
    params = tower_params(work.experiment, work.tower)
    self._encoder = Encoder(
      params, work.experiment.model, batch_frames=work.batch_frames
    )
    host = socket.gethostname().replace("/", "-")
    label = f"beam-{work.run}-{host}-{os.getpid()}"
    self._store = FeatureStore(work.out, create=True, worker=label)
    self._failures = JsonlWriter(self._store.storage, f"failures-{label}.jsonl")
    self._store.claim(self._encoder.fingerprint, self._encoder.shape)
    # Held until the process ends, so that nobody cleans up behind its back.
    self._held = contextlib.ExitStack()
    self._held.enter_context(self._store.temp_files.locked())
    atexit.register(self.close)

  def close(self) -> None:
    """Gives up the temporary folder."""
    self._held.close()

  def extract(self, name: str) -> dict:
    rows = []

    def done(outcome: Outcome):
      if outcome.stored:
        self._store.record(name, outcome.stored, outcome.share)
        rows.append({"video": name, **outcome.stored._asdict()})
        if outcome.share < 1:
          rows[0]["share"] = outcome.share
          self._failures.add(part_row(outcome))
      else:
        rows.append({"file": name, "reason": outcome.reason})
        self._failures.add(rows[0])

    Stream(
      [name],
      root=self._work.videos,
      store=self._store,
      encoder=self._encoder,
      done=done,
      min_share=self._work.min_share,
    ).run()
    return rows[0]


def _process(work: Work) -> _Process:
  with _MAKING:  # runners call from several threads
    return _make_process(work)


@functools.cache
def _make_process(work: Work) -> _Process:
  return _Process(work)


def _collect(work: Work, share: list[str], todo: list[str]) -> list[Skipped]:
  """Reads the rows that the workers wrote, and says what they amount to."""
  store = FeatureStore(work.out, create=True)
  told = {
    row["file"]: row
    for key in store.storage.list(f"failures-beam-{work.run}-")
    for row in read_rows(store.storage, key)
  }
  told = {name: told[name] for name in todo if name in told}
  parts = {n: row["share"] for n, row in told.items() if "share" in row}
  failed = {n: row["reason"] for n, row in told.items() if n not in parts}
  lost = [n for n in todo if n not in store and n not in failed]
  stored = len(share) - len(failed) - len(lost)
  print(
    f"{stored} of {len(share)} videos in {store.root}"
    f" ({len(share) - len(todo)} were there),"
    f"{f' {len(parts)} read in part,' if parts else ''} {len(failed)} failed"
  )
  for name, part in parts.items():
    print(f"  read in part {name}: {part:.2%} of its frames")
  for name, reason in failed.items():
    print(f"  failed {name}: {reason}")
  if lost:
    raise UserError(
      f"{len(lost)} videos have no row, e.g. {lost[0]}; do all workers see"
      f" {work.out}? Start again to go on"
    )
  return [Skipped(name, reason) for name, reason in failed.items()]


def _beam():
  try:
    import apache_beam
  except ImportError:
    raise UserError(
      "--beam_runner needs Apache Beam; pip install -e '.[prep]'"
    ) from None
  return apache_beam
