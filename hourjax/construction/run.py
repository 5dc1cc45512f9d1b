"""A construction, from a folder of videos to the dataset."""

import asyncio
import collections
import concurrent.futures
import contextlib
import dataclasses
import os
import pathlib
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from typing import Any

from hourjax import progress
from hourjax.construction import clips, dataset
from hourjax.construction.asking import Asker, VideoAnswers, gather
from hourjax.construction.call_store import CallStore, Spent, VideoRow
from hourjax.construction.checks import Benchmarks, read_benchmarks
from hourjax.construction.costs import (
  Bars,
  BudgetSpent,
  Forecast,
  Prices,
  Tally,
  assumed,
  forecast,
)
from hourjax.construction.endpoint import Endpoint, EndpointError, Gate, Lost
from hourjax.construction.options import ROLES, Clip, Options
from hourjax.construction.pipeline import Constructor
from hourjax.construction.prompts import Prompts, TemplateError
from hourjax.construction.tasks import ASPECTS, TASKS, Tasks, read_tasks
from hourjax.data.media.video_probe import VideoInfo, probe
from hourjax.errors import UserError
from hourjax.extraction.video_list import find_videos, worker_slice

_STOPPED = "SIGTERM"
_PROBED = 64  # videos that tell the mean duration of all, for the forecast


@dataclasses.dataclass(frozen=True)
class Limits:
  """Bounds the calls.

  Attributes:
    concurrency: most calls at a time, to each endpoint.
    timeout: seconds after which a call is lost.
    retry_wait: longest wait before a second try, in seconds.
    budget: dollars after which the construction ends; None for no limit.
    videos: that are worked on at a time.
  """

  concurrency: int = 32
  timeout: float = 600.0
  retry_wait: float = 1.0
  budget: float | None = None
  videos: int = 32


@dataclasses.dataclass(frozen=True)
class Settings:
  """Holds all options of a construction.

  Attributes:
    videos: folder of the videos.
    out: folder of the dataset.
    options: that results depend on.
    limits: of the calls.
    prices: of tokens.
    tasks: file of tasks.
    templates: folder of templates that replace the defaults.
    exclude: files of benchmarks' videos and questions.
    names: file of names; only these videos.
    worker: index and count of workers.
    sample: clips that are captioned for the forecast; 0 for no forecast.
    dry_run: whether to end after the forecast.
  """

  videos: str
  out: str
  options: Options
  limits: Limits
  prices: Prices
  tasks: str = str(TASKS)
  templates: str | None = None
  exclude: tuple[str, ...] = ()
  names: str | None = None
  worker: tuple[int, int] = (0, 1)
  sample: int = 8
  dry_run: bool = False


def construct(settings: Settings) -> dict[str, Any] | None:
  """Constructs a dataset, or goes on with it.

  Returns:
    The summary of the dataset, with `ended`, why it ended before its end if it
    did, and `failures` of calls; None after a dry run.

  Raises:
    UserError: an option does not fit, or an endpoint answers no call.
  """
  budget = settings.limits.budget
  unpriced = {"captioner", "writer"} - settings.prices.by_role.keys()
  if budget is not None and unpriced:
    raise UserError(
      f"--budget={budget:g} but --prices lacks"
      f" {' and '.join(sorted(unpriced))}; give both, 0/0 for what is free, as"
      " --prices=captioner=0/0,writer=0.3/1.1"
    )
  tasks = read_tasks(settings.tasks)
  prompts = Prompts(settings.templates)
  _check(prompts, tasks, settings.options)
  benchmarks = read_benchmarks(settings.exclude)
  names = [*_storable(find_videos(settings.videos, settings.names))]
  out = pathlib.Path(settings.out)
  try:
    out.mkdir(parents=True, exist_ok=True)
  except FileExistsError:
    raise UserError(f"--out={out} is a file; give a folder") from None
  index, count = settings.worker
  label = "calls" if count == 1 else f"calls-{index}-of-{count}"
  with CallStore(out, label) as store:
    plan = settings.options.plan(prompts.digest, tasks, benchmarks.digest)
    parts = tasks, prompts, benchmarks
    run = _Run(settings, store, plan, worker_slice(names, index, count), parts)
    ended = asyncio.run(run.main())
    if ended is None:
      return None
    with progress.step("writing the dataset"):
      summary = dataset.write(
        store,
        plan,
        settings.out,
        options=settings.options,
        prices=settings.prices,
        names=names,
      )
  return summary | {
    "ended": ended,
    "failures": dict(run.failures().most_common()),
  }


def _check(prompts: Prompts, tasks: Tasks, options: Options) -> None:
  """Renders every prompt once, so that a fault is found before the first call.

  Raises:
    TemplateError: a template uses a value that does not exist, or fails.
  """
  prompts.render("caption", frames=1, start=0.0, end=30.0, duration=30.0)
  prompts.render("again", problem="it is empty")
  clip = Clip(0.0, 30.0, dict.fromkeys(ASPECTS, "Nothing is seen."))
  tally = Tally({}, Prices({}))
  assumed(1, 30.0, [clip], tally, 4.0, options, tasks, prompts)


def _storable(names: Sequence[str]) -> Iterator[str]:
  """Yields names that are UTF-8, and tells of the others."""
  for name in names:
    try:
      name.encode()
    except UnicodeEncodeError:
      print(f"left out: {name!a}, whose name is not UTF-8; rename it")
    else:
      yield name


class _Run:
  """Works on the videos of one worker."""

  def __init__(
    self,
    settings: Settings,
    store: CallStore,
    plan: str,
    names: list[str],
    parts: tuple[Tasks, Prompts, Benchmarks],
  ):
    self._parts = parts
    self._settings, self._store, self._plan = settings, store, plan
    self._names = names
    self._known = store.videos()
    self._before = store.spent()
    self._folder = pathlib.Path(settings.videos)

  async def main(self) -> str | None:
    """Runs all stages of all videos.

    Returns:
      "" at the end, None after a dry run, else why it ended before.
    """
    task = asyncio.current_task()
    assert task is not None
    with contextlib.suppress(NotImplementedError, RuntimeError):
      loop = asyncio.get_running_loop()
      loop.add_signal_handler(signal.SIGTERM, task.cancel, _STOPPED)
    try:
      return await self._main()
    except asyncio.CancelledError as error:
      if error.args == (_STOPPED,):
        sys.exit(128 + signal.SIGTERM)
      raise

  async def _main(self) -> str | None:
    """Runs as `main` does."""
    settings = self._settings
    tasks, prompts, benchmarks = self._parts
    names = [*self._todo()]
    self._tally = Tally(
      self._store.spent_by_all(), settings.prices, settings.limits.budget
    )
    gates: dict[str, Gate] = {}
    endpoints: dict[str, Endpoint] = {}
    for role, model in settings.options.models.items():
      gate = gates.setdefault(model.url, Gate(settings.limits.concurrency))
      endpoints[role] = Endpoint(
        model,
        role=role,
        gate=gate,
        timeout=settings.limits.timeout,
        first_wait=settings.limits.retry_wait,
      )
    self._endpoints = endpoints
    self._bars: Bars | None = None
    threads = len(os.sched_getaffinity(0))
    asker = Asker(
      endpoints,
      prompts,
      self._tally,
      again=settings.options.again,
      seed=settings.options.seed,
      on_call=self._on_call,
    )
    with concurrent.futures.ThreadPoolExecutor(threads, "decode") as self._pool:
      constructor = Constructor(
        asker,
        tasks,
        settings.options,
        benchmarks,
        self._pool,
        ahead=settings.limits.concurrency + 8,
      )
      try:
        expected: dict[str, float] = {}
        if names and (settings.sample or settings.dry_run):
          found = await self._forecast(names, constructor)
          print(found.table(), flush=True)
          expected = {n: s.spent.calls for n, s in found.stages.items()}
        if settings.dry_run:
          return None
        return await self._construct(names, constructor, expected)
      except BudgetSpent as error:
        return f"{error}; raise --budget to go on"
      finally:
        await self._store.flush()
        for endpoint in endpoints.values():
          await endpoint.close()

  def failures(self) -> collections.Counter[str]:
    """Returns how many calls failed or gave no usable answer, by reason."""
    total = collections.Counter(self._tally.failures)
    for endpoint in self._endpoints.values():
      total.update(endpoint.failures)
    return total

  def _read_others(self) -> None:
    """Counts what other workers have spent since."""
    before = self._store.spent_by_others()
    for key, spent in self._before.items():
      before.setdefault(key, Spent()).add(spent)
    self._tally.set_before(before)

  def _on_call(self, stage: str) -> None:
    if self._bars is not None:
      self._bars.called(stage)

  def _todo(self) -> Iterator[str]:
    """Yields the videos that are not done or dropped under this plan."""
    others = self._store.others()
    for name in self._names:
      row = self._known.get(name)
      for each in (row, others.get(name)):
        if (
          each is not None
          and each.plan == self._plan
          and each.state in ("done", "dropped")
          and self._is_same(name, each)
        ):
          break
      else:
        yield name

  def _is_same(self, name: str, row: VideoRow) -> bool:
    """Returns whether a file is the one that a row describes."""
    try:
      about = os.stat(self._folder / name)
    except OSError:
      return True  # a video that was removed since stays in the dataset
    if (about.st_size, about.st_mtime_ns) == (row.size, row.mtime):
      return True
    return clips.stamp(self._folder / name) == row.stamp

  def _probe(self, name: str) -> tuple[VideoInfo, VideoRow]:
    """Reads a video's properties, and writes down what tells it from others."""
    path = self._folder / name
    info = probe(path)
    about = os.stat(path)
    row = self._known.get(name)
    size, mtime = about.st_size, about.st_mtime_ns
    stamp = (
      row.stamp
      if row and (row.size, row.mtime) == (size, mtime)
      else clips.stamp(path)
    )
    kept = {
      "duration": info.duration,
      "frames": info.frames,
      "fps": str(Fraction(info.fps)),
    }
    return info, VideoRow(
      row.number if row else 0, size, mtime, stamp, kept, "", ""
    )

  async def _open(self, name: str) -> tuple[VideoInfo, VideoAnswers]:
    """Probes a video in a thread, and reads its stored answers."""
    loop = asyncio.get_running_loop()
    try:
      info, row = await loop.run_in_executor(self._pool, self._probe, name)
    except OSError as error:
      raise UserError(f"{name}: {error.strerror}") from None
    number = await self._store.add_video(
      name, row.size, row.mtime, row.stamp, row.info
    )
    return info, VideoAnswers(self._store, name, number, row.stamp)

  async def _forecast(
    self, names: Sequence[str], constructor: Constructor
  ) -> Forecast:
    """Captions sampled clips, and computes what everything will take."""
    settings = self._settings
    step = max(1, len(names) // _PROBED)
    durations: list[float] = []
    opened: list[tuple[str, VideoInfo, VideoAnswers]] = []
    unread: list[UserError] = []
    with progress.step("reading the durations of some videos"):
      for name in names[::step][:_PROBED]:
        try:
          info, video = await self._open(name)
        except UserError as error:
          unread.append(error)
          continue
        durations.append(float(info.duration))
        opened.append((name, info, video))
    if not opened:
      raise UserError(
        f"none of {len(unread)} videos in {settings.videos} that were tried can"
        f" be read, the first one because: {unread[0]}"
      )
    wanted = max(1, settings.sample)
    sampled = opened[:: max(1, len(opened) // wanted)][:wanted]
    with progress.step("captioning the sampled clips"):
      found = await asyncio.gather(
        *(
          constructor.sample(self._folder / name, info, video)
          for name, info, video in sampled
        ),
        return_exceptions=True,
      )
    captions: list[Clip] = []
    lost: list[str] = []
    characters = 0
    before = self._tally.spent["event"].tokens_in
    for (name, _, video), each in zip(sampled, found):
      if isinstance(each, Clip):
        captions.append(each)
        if not characters and not self._tally.total("event").calls:
          characters = await constructor.sample_writing(video, each)
      elif each is None or (
        # Of a single clip or video; anything else ends the run.
        type(each) in (Lost, UserError)
      ):
        lost.append(f"{name}: {each or 'no usable caption'}")
      else:
        raise each
    if not captions:
      raise UserError(
        f"none of {len(sampled)} sampled clips got a caption ({lost[0]});"
        " correct this before the construction"
      )
    tokens = self._tally.spent["event"].tokens_in - before
    rows = (*self._known.values(), *self._store.others().values())
    return forecast(
      videos=len(names),
      clips_of_video=sum(
        len(clips.cut(d, settings.options.clip.seconds)) for d in durations
      )
      / len(durations),
      duration=sum(durations) / len(durations),
      captions=captions,
      done=sum(row.state == "done" for row in rows),
      tally=self._tally,
      at_a_time=dict.fromkeys(ROLES, float(settings.limits.concurrency)),
      characters=characters / tokens if characters and tokens else 4.0,
      options=settings.options,
      tasks=self._parts[0],
      prompts=self._parts[1],
    )

  async def _construct(
    self,
    names: Sequence[str],
    constructor: Constructor,
    expected: Mapping[str, float],
  ) -> str:
    """Takes the videos through all stages, several at a time.

    Args:
      names: of the videos.
      constructor: takes them through the stages.
      expected: numbers of calls by stage, if there was a forecast.
    """
    queue = iter(names)
    ended: list[str] = []
    bars = Bars(
      len(names), expected, self._tally, self.failures, self._read_others
    )
    self._bars = bars
    ticking = asyncio.create_task(bars.tick())

    async def work() -> None:
      for name in queue:
        if ended:
          return
        try:
          await self._one(name, constructor)
        except BudgetSpent as error:
          ended.append(f"{error}; raise --budget to go on")
          return
        except EndpointError:
          ended.append("")  # the other videos end as well
          raise
        bars.done += 1

    count = min(self._settings.limits.videos, len(names))
    workers = [work() for _ in range(count)]
    try:
      await gather(*workers)
    finally:
      ticking.cancel()
      await asyncio.gather(ticking, return_exceptions=True)
      bars.close()
    return ended[0] if ended else ""

  async def _one(self, name: str, constructor: Constructor) -> None:
    """Takes one video through all stages, and writes how it ended."""
    number = None
    try:
      info, video = await self._open(name)
      number = video.number
      state, result = await constructor.construct(
        self._folder / name, info, video
      )
    except (EndpointError, TemplateError):
      raise
    except (UserError, Lost) as error:
      lost = isinstance(error, Lost)
      kind = "calls without an answer" if lost else "unreadable video"
      state, result = "failed", {"kind": kind, "reason": f"{error}"}
      if number is None:
        about = {"duration": 0.0}
        number = await self._store.add_video(name, 0, 0, "", about)
    await self._store.put_result(number, self._plan, state, result)
