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
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from fractions import Fraction
from typing import Any

from hourjax import progress
from hourjax.construction import clips, dataset
from hourjax.construction.asking import Asker, VideoAnswers
from hourjax.construction.call_store import CallStore, VideoRow
from hourjax.construction.checks import Benchmarks, read_benchmarks
from hourjax.construction.costs import (
  BudgetSpent,
  Forecast,
  Prices,
  Tally,
  forecast,
)
from hourjax.construction.endpoint import Endpoint, EndpointError, Gate, Lost
from hourjax.construction.options import ROLES, Clip, Options
from hourjax.construction.pipeline import Constructor
from hourjax.construction.prompts import Prompts
from hourjax.construction.tasks import TASKS, Tasks, read_tasks
from hourjax.data.media.video_probe import VideoInfo
from hourjax.errors import UserError
from hourjax.extraction.video_list import find_videos, worker_slice

_STOPPED = "SIGTERM"
_PROBED = 64  # videos that tell the mean duration of all, for the forecast
_TICK = 1.0  # seconds between two updates of what stands beside the bars
_QUIET = 5  # ticks after which a line says in a log that calls are waited for


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
  if budget is not None and "captioner" not in settings.prices.by_role:
    raise UserError(
      f"--budget={budget:g} without --prices; give them, as"
      " --prices=captioner=0.2/0.6,writer=0.3/1.1"
    )
  tasks = read_tasks(settings.tasks)
  prompts = Prompts(settings.templates)
  benchmarks = read_benchmarks(settings.exclude)
  names = find_videos(settings.videos, settings.names)
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
        total=len(names),
      )
  return summary | {
    "ended": ended,
    "failures": dict(run.failures().most_common()),
  }


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
    self._bars: _Bars | None = None
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
    info = clips.probe(path)
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
    number = self._store.add_video(
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
    with progress.step("reading the durations of some videos"):
      for name in names[::step][:_PROBED]:
        with contextlib.suppress(UserError):
          info, video = await self._open(name)
          durations.append(float(info.duration))
          opened.append((name, info, video))
    if not opened:
      raise UserError(
        f"none of {len(names[::step][:_PROBED])} videos in"
        f" {settings.videos} that were tried can be read; see"
        " `python -m hourjax.extract` for what each of them lacks"
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
    characters: list[int] = []
    before = self._tally.spent["event"].tokens_in
    for (_, _, video), each in zip(sampled, found):
      if isinstance(each, EndpointError | BudgetSpent):
        raise each
      if isinstance(each, Clip):
        captions.append(each)
        if not characters and not self._tally.total("event").calls:
          with contextlib.suppress(Lost):
            characters.append(await constructor.sample_writing(video, each))
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
      characters=sum(characters) / tokens if characters and tokens else 4.0,
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
    bars = _Bars(len(names), expected, self._tally, self.failures)
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
        bars.done += 1

    workers = [
      asyncio.create_task(work())
      for _ in range(min(self._settings.limits.videos, len(names)))
    ]
    try:
      await asyncio.gather(*workers)
    finally:
      for each in (*workers, ticking):
        each.cancel()
      await asyncio.gather(*workers, ticking, return_exceptions=True)
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
    except EndpointError:
      raise
    except (UserError, Lost) as error:
      state, result = "failed", {"reason": f"{error}"}
      if number is None:
        about = {"duration": 0.0}
        number = self._store.add_video(name, 0, 0, "", about)
      kind = "lost" if isinstance(error, Lost) else "unreadable video"
      self._tally.failures[kind] += 1
    await self._store.put_result(number, self._plan, state, result)


class _Bars:
  """Shows a bar for each stage, and what the calls take beside it.

  Attributes:
    done: videos that have ended.
  """

  def __init__(
    self,
    videos: int,
    expected: Mapping[str, float],
    tally: Tally,
    failures: Callable[[], collections.Counter[str]],
  ):
    self.done = 0
    self._expected, self._failures = expected, failures
    self._videos, self._tally = videos, tally
    self._calls: collections.Counter[str] = collections.Counter()
    self._bars: dict[str, Any] = {}
    self._tokens: dict[str, float] = {}
    self._time, self._ticks = time.monotonic(), 0

  def called(self, stage: str) -> None:
    """Counts an answer that was stored, or a call that begins."""
    self._calls[stage] += 1
    if stage not in self._bars:
      total = max(1, round(self._expected.get(stage, 0)))
      self._bars[stage] = progress.bar(total, unit="call", desc=stage)
    self._bars[stage].update(1)

  async def tick(self) -> None:
    """Updates what stands beside the bars, again and again."""
    while True:
      await asyncio.sleep(_TICK)
      self._ticks += 1
      self._update()

  def _update(self) -> None:
    """Writes what the calls of each stage take."""
    passed = max(time.monotonic() - self._time, 1e-6)
    self._time += passed
    failures = self._failures().most_common(4)
    listed = ", ".join(f"{kind} {number}" for kind, number in failures)
    for stage, each in self._bars.items():
      spent = self._tally.spent[stage]
      tokens = spent.tokens_in + spent.tokens_out
      speed = (tokens - self._tokens.get(stage, 0.0)) / passed
      self._tokens[stage] = tokens
      if self.done:
        # All videos are taken to need as many calls as those that have ended.
        mean = self._calls[stage] / max(self.done, 1)
        each.total = max(self._calls[stage], round(mean * self._videos))
      said = f"videos {self.done}/{self._videos}, {speed:,.0f} tokens/s"
      if self._tally.prices.by_role:
        cost = self._tally.prices.cost(stage, self._tally.total(stage))
        said += f", ${cost:,.2f}"
      if listed and stage == next(iter(self._bars)):
        said += f", failures: {listed}"
      each.set_postfix_str(said, refresh=False)
    # Calls may take minutes: the bars show that it still waits for them.
    if sys.stderr.isatty() or self._ticks % _QUIET == 0:
      for each in list(self._bars.values())[-1:]:
        each.refresh()

  def close(self) -> None:
    """Leaves the last state of the bars."""
    self._update()
    for each in self._bars.values():
      each.total = self._calls[each.desc.rstrip(": ")] or each.total
      each.close()
