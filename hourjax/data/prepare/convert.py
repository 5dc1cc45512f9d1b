"""Conversion of one raw record to what is stored; runs in several processes.

It needs the duration and number of frames of the record's video, which are
found once for each video.
"""

import concurrent.futures
import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

from hourjax.data.columns import LONGEST, Measures, measure_record
from hourjax.data.media import video, video_probe
from hourjax.data.prepare.holdout import Holdout, record_number
from hourjax.data.records.example import encode_record
from hourjax.data.records.media_keys import media_key, read_media
from hourjax.data.records.questions import question_facts
from hourjax.data.records.record import Record, media_problem, parse_record
from hourjax.data.store.features import FeatureStore
from hourjax.data.tokenizer import Tokenizer
from hourjax.errors import UserError

THREADS = 8  # more than cores, since reading headers waits for the disk


class VideoFact(NamedTuple):
  """Holds what is known about a video.

  Attributes:
    duration: in seconds, None if it is not known.
    num_frames: frames in the file, 0 if they are not known.
    fps: average frames a second of the file, None if they are not known.
    problem: (kind, reason) why its records must be left out, or None.
  """

  duration: float | None = None
  num_frames: int = 0
  fps: float | None = None
  problem: tuple[str, str] | None = None


class Videos:
  """Looks videos up in the feature store, or else opens their files.

  Attributes:
    unstored: requested names that the feature store does not have.
  """

  def __init__(self, media: pathlib.Path | None, store: FeatureStore | None):
    """Opens nothing yet.

    Args:
      media: folder of the files, or None to open no file.
      store: feature store that durations are taken from first, or None.
    """
    self._media, self._store = media, store
    self._facts: dict[str, VideoFact | concurrent.futures.Future] = {}
    self._pool = concurrent.futures.ThreadPoolExecutor(THREADS)
    self.unstored: set[str] = set()

  def request(self, name: str) -> None:
    """Starts to look a video up; `fact` waits for the result."""
    if name in self._facts:
      return
    if self._store is not None and name in self._store:
      self._facts[name] = VideoFact(self._store.stored(name).duration)
      return
    if self._store is not None:
      self.unstored.add(name)
    if self._media is None:
      self._facts[name] = VideoFact()
    else:
      self._facts[name] = self._pool.submit(_probe, self._media, name)

  def fact(self, name: str) -> VideoFact:
    """Returns what is known about a video that was requested."""
    found = self._facts[name]
    if isinstance(found, concurrent.futures.Future):
      found = self._facts[name] = found.result()
    return found

  def close(self) -> None:
    """Ends the threads."""
    self._pool.shutdown(cancel_futures=True)


def _probe(media: pathlib.Path, name: str) -> VideoFact:
  """Opens a video file for its duration and number of frames."""
  problem = media_problem(media, name)
  if problem:
    return VideoFact(problem=("missing file", problem))
  try:
    info = video_probe.probe(media / name)
    video.check_whole(media / name, info)
  except UserError as error:
    return VideoFact(problem=("unreadable video", str(error)))
  return VideoFact(info.duration, info.frames, float(info.fps))


class Job(NamedTuple):
  """Holds a raw record, its place, and what is known about its video.

  Attributes:
    where: file and place in it.
    raw: the record as it was read.
    stream: stream that the record belongs to.
    fact: facts about its video.
    repairs: how its names were repaired.
  """

  where: str
  raw: Any
  stream: str
  fact: VideoFact | None = None
  repairs: tuple[str, ...] = ()


class Kept(NamedTuple):
  """Holds a conversation that is ready to be written.

  Attributes:
    where: file and place in it.
    id: id of the record.
    encoded: result of `encode_record`.
    measures: the conversation's numbers.
    source: source of the record.
    stream: stream that the record belongs to.
    video: name of its video, or None.
    duration: duration of the video in seconds, None if it is not known.
    num_frames: frames in the video's file, 0 if they are not known.
    fps: frames a second of the video's file, None if they are not known.
    content: digest, the same for equal records.
    number: of `record_number`, by which it may be held out.
    questions: (topic, task, format) of each question, "" if not known.
    repairs: repairs that reading the record took.
  """

  where: str
  id: str
  encoded: bytes
  measures: Measures
  source: str
  stream: str
  video: str | None
  duration: float | None
  num_frames: int
  fps: float | None
  content: int
  number: float
  questions: list[tuple[str, ...]]
  repairs: tuple[str, ...] = ()


class Dropped(NamedTuple):
  """Names a record or row that is left out, and the reason."""

  where: str
  id: str | None
  kind: str
  reason: str


@dataclasses.dataclass(frozen=True)
class Converter:
  """Checks, measures and encodes records.

  Attributes:
    tokenizer: counts tokens.
    media: folder of images, or None.
    check_media: whether all images of a record must exist.
    holdout: how much is held out, None for nothing.
  """

  tokenizer: Tokenizer
  media: pathlib.Path | None
  check_media: bool
  holdout: Holdout | None = None

  def __call__(self, jobs: Sequence[Job]) -> list[Kept | Dropped]:
    """Converts records, in order; an invalid one becomes `Dropped`."""
    return [self._convert(job) for job in jobs]

  def _convert(self, job: Job) -> Kept | Dropped:
    """Converts one record, or says why it is left out."""
    try:
      return self._keep(job)
    except UserError as error:
      name = job.raw.get("id") if isinstance(job.raw, dict) else None
      name = None if name is None else str(name)
      return Dropped(job.where, name, error.kind, str(error))

  def _keep(self, job: Job) -> Kept:
    """Converts one record.

    Raises:
      UserError: the record is left out; `kind` counts the reason.
    """
    record = _checked(job)
    fact = job.fact or VideoFact()
    if fact.problem:
      kind, reason = fact.problem
      raise UserError(f"record {record.id}: {reason}", kind=kind)
    duration = fact.duration
    if duration is None:
      duration = _own_duration(record)
    measures = self._measure(record)
    return Kept(
      where=job.where,
      id=record.id,
      encoded=encode_record(
        record,
        measures,
        stream=job.stream,
        duration=duration,
        frames=fact.num_frames,
      ),
      measures=measures,
      source=record.source,
      video=record.media[0] if record.modality == "video" else None,
      content=_content(record),
      number=(self.holdout.number if self.holdout else record_number)(record),
      questions=question_facts(record),
      repairs=(*job.repairs, *record.repairs),
      stream=job.stream,
      duration=duration,
      num_frames=fact.num_frames,
      fps=fact.fps,
    )

  def _measure(self, record: Record) -> Measures:
    """Counts a record's tokens, after looking for its images."""
    if record.modality == "image":
      if self.media is None:
        raise UserError(
          f"record {record.id}: the size of {record.media[0]} is needed; give"
          " --media",
          kind="no media folder",
        )
      for name in record.media if self.check_media else ():
        problem = media_problem(self.media, name)
        if problem:
          raise UserError(f"record {record.id}: {problem}", kind="missing file")
    try:
      return measure_record(record, self.tokenizer, self.media)
    except UserError as error:
      raise UserError(str(error), kind="unreadable image") from error


def video_of(raw: Any) -> str | None:
  """Returns the video that a raw record names, None if there is none."""
  if not isinstance(raw, dict):
    return None
  try:
    key = media_key(raw, "")
    kind, paths = read_media(raw, key, "") if key else ("text", ())
  except UserError:  # `parse_record` reports it
    return None
  return paths[0] if kind == "video" else None


def _checked(job: Job) -> Record:
  """Parses a raw record.

  Raises:
    UserError: the record is malformed.
  """
  if isinstance(job.raw, json.JSONDecodeError):
    raise UserError(f"{job.where}: not JSON ({job.raw})", kind="broken line")
  try:
    record = parse_record(job.raw, job.where)
    json.dumps(job.raw, ensure_ascii=False).encode()
  except UnicodeEncodeError as error:
    raise UserError(
      f"{job.where}: half a character ({error.reason}); write it as UTF-8",
      kind="malformed record",
    ) from error
  except UserError as error:
    raise UserError(str(error), kind="malformed record") from error
  return record


def _own_duration(record: Record) -> float | None:
  """Returns the duration that the record itself states, if it is plausible."""
  value = record.extra.get("duration")
  if isinstance(value, bool) or not isinstance(value, int | float):
    return None
  # A larger number is probably in milliseconds, and taken as unknown.
  return float(value) if 0 < value <= LONGEST else None


def _content(record: Record) -> int:
  """Returns a digest of id, media and turns."""
  turns = [(turn.role, turn.text) for turn in record.turns]
  text = json.dumps([record.id, record.modality, record.media, turns])
  digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
  return int.from_bytes(digest)
