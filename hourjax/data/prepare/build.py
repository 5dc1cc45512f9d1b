"""From files of records to a prepared dataset, in bounded memory.

A dataset records what it was made of, so that the same files and options find
it again instead of preparing it twice.
"""

import collections
import concurrent.futures
import contextlib
import itertools
import json
import os
import pathlib
from collections.abc import Iterator
from typing import Any

import pydantic

from hourjax import processes, progress, schema
from hourjax.data.prepare.convert import (
  Converter,
  Dropped,
  Job,
  Kept,
  Videos,
  video_of,
)
from hourjax.data.prepare.dataset_plots import draw_plots
from hourjax.data.prepare.holdout import parse_holdout
from hourjax.data.prepare.inputs import Names, jobs, open_inputs
from hourjax.data.prepare.lists import Options
from hourjax.data.prepare.parquet import EmbeddedImages
from hourjax.data.prepare.report import (
  REPAIRED,
  SKIPPED,
  Report,
)
from hourjax.data.prepared import Prepared, PreparedWriter
from hourjax.data.records.record import check_root
from hourjax.data.store.features import FeatureStore
from hourjax.data.tokenizer import Tokenizer
from hourjax.errors import UserError

_SUMMARY = "summary.json"


class _Count(schema.Schema):
  """Describes the numbers of a source, a stream or the whole."""

  conversations: int
  questions: int
  videos: int
  hours: float
  videos_of_unknown_duration: int


class _Kind(schema.Schema):
  """Describes how many records have one reason, with some examples."""

  count: int
  examples: list[str] = pydantic.Field(min_length=1)


class _Unstored(schema.Schema):
  """Describes the videos that the feature store lacks."""

  count: int
  as_pixels: int = 0
  examples: list[str]

  @pydantic.model_validator(mode="after")
  def _check(self) -> "_Unstored":
    if self.count and not self.examples:
      raise ValueError(f"count is {self.count} and examples are none")
    return self


class _Summary(schema.Schema):
  """Describes the keys of a summary that are printed."""

  kept: _Count
  held_out: _Count | None = None
  sources: dict[str, _Count]
  streams: dict[str, _Count]
  dropped: dict[str, _Kind]
  repaired: dict[str, _Kind] = pydantic.Field(default_factory=dict)
  videos_without_features: _Unstored | None = None
  repeated_ids: int


def describe(
  options: Options, tokenizer: Tokenizer, store: FeatureStore | None
) -> dict[str, Any]:
  """Returns everything that the dataset depends on, as JSON values.

  A file is identified by its size and time of change, a feature store by its
  number of videos.

  Args:
    options: of the dataset.
    tokenizer: counts tokens.
    store: feature store that durations are taken from, or None.

  Raises:
    UserError: a file is missing.
  """
  stored = None if store is None else [options.features, len(store)]
  described: dict[str, Any] = {
    "tokenizer": tokenizer.fingerprint,
    "media": options.media,
    "features": stored,
    "check_media": options.check_media,
    "columns": {k: list(v) for k, v in options.columns.items()},
    "seed": options.seed,
  }
  if options.parquet_images != "unpack":
    described["parquet_images"] = options.parquet_images
  if holdout := parse_holdout(options.holdout):
    described["holdout"] = str(holdout)
  for item in options.items:
    rule = f"{item.rule.which}:{item.rule.amount}"
    rule += "%" if item.rule.percent else ""
    for path in item.paths:
      what = [item.format, rule, item.stream, item.media_prefix]
      roots = {"images": item.image_prefix, "videos": item.video_prefix}
      what += [f"{k}:{v}" for k, v in roots.items() if v is not None]
      stat = _stat(path, pathlib.Path(item.name).absolute())
      key, value = f"file {path.absolute()}", [*stat, *what]
      described.setdefault(key, []).append(value)
  return described


def find(
  folder: pathlib.Path, wanted: dict[str, Any], overwrite: bool
) -> dict | None:
  """Looks for a dataset that was made of the same files and options.

  Args:
    folder: of the dataset.
    wanted: result of `describe`.
    overwrite: whether another dataset may be replaced.

  Returns:
    Its summary; None if a dataset must be written.

  Raises:
    UserError: the folder holds another dataset that may not be replaced, or
      something that is not a dataset.
  """
  if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
    return None
  try:
    found = Prepared(folder).about.get("options", {})
  except UserError as error:
    if overwrite and (folder / "about.json").is_file():
      return None
    raise UserError(
      f"{folder} exists and is no prepared dataset of this version ({error});"
      " choose another --out"
    ) from error
  keys = [k for k in {**found, **wanted} if found.get(k) != wanted.get(k)]
  if not keys:
    remedy = "give --overwrite to prepare again"
    summary = schema.read_json(folder / _SUMMARY, remedy=remedy)
    schema.validate(_Summary, summary, _SUMMARY, remedy=remedy)
    return summary
  if overwrite:
    return None
  lines = [f"\n  {k}: {found.get(k)!r} -> {wanted.get(k)!r}" for k in keys]
  raise UserError(
    f"{folder} holds a dataset made of something else; give --overwrite to"
    f" replace it, or another --out:{''.join(lines)}"
  )


def write_summary(folder: pathlib.Path, summary: dict) -> None:
  """Writes the summary that `find` reads."""
  text = json.dumps(summary, indent=1, ensure_ascii=False)
  (folder / _SUMMARY).write_text(text, encoding="utf-8")


def _stat(path: pathlib.Path, here: pathlib.Path) -> list[int]:
  """Returns size and time of change of a file."""
  try:
    stat = os.stat(path)
  except (OSError, ValueError) as error:  # ValueError: a NUL in the name
    reason = getattr(error, "strerror", None) or error
    # The path of a list was looked for in the working directory as well.
    nor = "" if here == path.absolute() else f", nor is there {here}"
    raise UserError(f"cannot read {path}: {reason}{nor}") from error
  return [stat.st_size, stat.st_mtime_ns]


CHUNK = 64  # records that one process converts at a time
AHEAD = 32  # chunks whose videos are looked up in advance
# With fewer records a process, starting it takes longer than its work.
WORTH_A_PROCESS = 4000


def build(
  folder: str | os.PathLike,
  options: Options,
  *,
  overwrite: bool = False,
  workers: int | None = None,
) -> tuple[dict, bool]:
  """Writes a prepared dataset, or reuses one of the same files and options.

  Args:
    folder: of the dataset.
    options: of the dataset.
    overwrite: whether a dataset of other options may be replaced.
    workers: number of processes; as many as there are cores if None.

  Returns:
    The summary, and whether the dataset was there already.

  Raises:
    UserError: an input is missing or cannot be read at all, no conversation is
      left, or the folder holds something else.
  """
  _check_names(os.fspath(folder), options)
  holdout = parse_holdout(options.holdout)
  folder = pathlib.Path(folder)
  tokenizer = Tokenizer.from_folder(options.tokenizer)
  media = None if options.media is None else pathlib.Path(options.media)
  if media is not None:
    check_root(media)
  with progress.step("reading what the inputs are"):
    store = FeatureStore(options.features) if options.features else None
    wanted = describe(options, tokenizer, store)
  if summary := find(folder, wanted, overwrite):
    return summary, True
  videos = Videos(media if options.check_media else None, store)
  writer = PreparedWriter(
    folder, tokenizer_id=tokenizer.fingerprint, about={"options": wanted}
  )
  names = Names(media, store, EmbeddedImages(media, options.parquet_images))
  with writer, contextlib.closing(videos):
    with (
      open(writer.partial / SKIPPED, "w", encoding="utf-8") as skipped,
      open(writer.partial / REPAIRED, "w", encoding="utf-8") as repaired,
    ):
      report = Report(skipped, repaired)
      files = open_inputs(options, writer.partial, report)
      convert = Converter(tokenizer, media, options.check_media, holdout)
      found = jobs(files, names)
      total = sum(int(file.chosen.sum()) for file in files)
      _convert_all(found, total, convert, videos, writer, report, workers)
    with progress.step("writing columns, summary and plots"):
      if holdout is not None and len(report.numbers):
        writer.held_out = holdout.select(report.numbers, writer.columns())
      summary = _finish(writer, report, videos.unstored if store else None)
  return summary, False


def _check_names(folder: str, options: Options) -> None:
  """Refuses paths that the file system or a JSON file cannot hold."""
  given: dict[str, str | None] = {
    "--out": folder,
    "--tokenizer": options.tokenizer,
    "--media": options.media,
    "--features": options.features,
  }
  for name, path in given.items():
    if path == "":
      raise UserError(f"{name} is empty; name a folder, or leave it out")
  paths = [str(path) for item in options.items for path in item.paths]
  for path in [*given.values(), *paths]:
    if path is None:
      continue
    try:
      path.encode()
      os.lstat(path)
    except UnicodeEncodeError:
      raise UserError(
        f"{path.encode(errors='surrogateescape')!r} is no UTF-8 name; rename it"
      ) from None
    except (FileNotFoundError, NotADirectoryError, PermissionError):
      pass  # reported where the path is used, with a remedy
    except (OSError, ValueError) as error:  # ValueError: a NUL
      reason = getattr(error, "strerror", None) or error
      raise UserError(
        f"{path:.80}... cannot be used: {reason}; choose another path"
      ) from None


def _convert_all(
  found: Iterator[Job],
  total: int,
  convert: Converter,
  videos: Videos,
  writer: PreparedWriter,
  report: Report,
  workers: int | None,
) -> None:
  """Converts `total` records and writes what is kept."""
  workers = min(workers or os.cpu_count() or 1, total // WORTH_A_PROCESS)
  chunks = _with_facts(found, videos)
  with progress.bar(total, unit="conversation", desc="prepare") as bar:
    for results in _converted(convert, chunks, workers):
      _write(results, writer, report)
      bar.update(len(results))


def _with_facts(found: Iterator[Job], videos: Videos) -> Iterator[list[Job]]:
  """Yields chunks of jobs with facts of their videos, looked up in advance."""
  waiting: collections.deque[list[Job]] = collections.deque()

  def ready() -> list[Job]:
    chunk = waiting.popleft()
    names = [video_of(job.raw) for job in chunk]
    return [
      job._replace(fact=videos.fact(name)) if name else job
      for job, name in zip(chunk, names)
    ]

  while chunk := list(itertools.islice(found, CHUNK)):
    for name in filter(None, (video_of(job.raw) for job in chunk)):
      videos.request(name)
    waiting.append(chunk)
    if len(waiting) > AHEAD:
      yield ready()
  while waiting:
    yield ready()


def _converted(
  convert: Converter, chunks: Iterator[list[Job]], workers: int
) -> Iterator[list[Kept | Dropped]]:
  """Yields the converted chunks, in order, some of them in advance."""
  if workers < 2:
    yield from map(convert, chunks)
    return
  pool = processes.pool(workers, _start, (convert,))
  running: collections.deque[concurrent.futures.Future] = collections.deque()
  try:
    for chunk in chunks:
      running.append(pool.submit(_run, chunk))
      if len(running) >= 4 * workers:
        yield running.popleft().result()
    while running:
      yield running.popleft().result()
  except concurrent.futures.process.BrokenProcessPool as error:
    raise UserError(
      f"one of {workers} processes was killed, perhaps for memory; set"
      " --workers lower"
    ) from error
  finally:
    pool.shutdown(wait=True, cancel_futures=True)


_convert: Converter | None = None  # the converter of a worker process


def _start(convert: Converter) -> None:
  """Prepares a worker process."""
  global _convert
  _convert = convert
  # There is a process for each core already.
  os.environ["TOKENIZERS_PARALLELISM"] = "false"


def _run(chunk: list[Job]) -> list[Kept | Dropped]:
  """Converts a chunk in a worker process."""
  assert _convert is not None  # `_start` has run
  return _convert(chunk)


def _write(
  results: list[Kept | Dropped], writer: PreparedWriter, report: Report
) -> None:
  """Counts results and writes what is kept."""
  for item in results:
    if isinstance(item, Dropped):
      report.drop(item)
    elif report.keep(item):
      writer.add_encoded(
        item.encoded,
        item.measures,
        item.source,
        item.stream,
        item.video,
        item.duration,
        item.num_frames,
        item.fps,
      )


def _finish(
  writer: PreparedWriter, report: Report, unstored: set[str] | None
) -> dict:
  """Writes summary and plots; returns the summary."""
  columns = writer.columns()
  if not len(columns):
    reasons = [r for k in report.dropped.values() for r in k["examples"]]
    lines = "\n  ".join(reasons) or "the files hold no records"
    raise UserError(f"no conversation is left of these files:\n  {lines}")
  summary = report.summary(columns, unstored)
  if writer.held_out is not None:
    summary["held_out"] = report.count(columns, writer.held_out)
  summary["pictures"] = draw_plots(writer.partial, summary)
  write_summary(writer.partial, summary)
  return summary
