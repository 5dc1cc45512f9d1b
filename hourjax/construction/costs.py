"""What calls cost: prices, a budget, a forecast, and bars that show it.

The forecast measures captions on sampled clips, whose answers are kept. Stages
that have run before, in the same folder, are measured on that; the others are
estimated from the prompts that the sampled captions give.
"""

import asyncio
import collections
import dataclasses
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from hourjax import progress
from hourjax.construction.call_store import Reply, Spent
from hourjax.construction.options import (
  MAX_TOKENS,
  ROLE_OF,
  ROLES,
  STAGES,
  Clip,
  Options,
)
from hourjax.construction.prompts import Prompts
from hourjax.construction.tasks import FORMATS, Tasks
from hourjax.errors import UserError

_TICK = 1.0  # seconds between two updates of what stands beside the bars
# Ticks after which a log shows again that calls are waited for, and after which
# it is read what other workers have spent.
_QUIET, _OTHERS = 5, 30
# Assumed of answers that were not measured yet, in tokens.
_OUT = {"events": 25, "event": 150, "video": 400, "blind": 12, "judge": 60}
_OUT_QUESTION = {"open": 60, "multiple_choice": 110}
_CLIPS_OF_EVENT = 3  # on which an event is assumed to rest
_BLIND_TRIES = 1.4  # a test without video ends with the first wrong answer


class BudgetSpent(Exception):
  """Says that the next call might cost more than what is left."""


class Prices:
  """Holds what a million tokens cost in dollars, in and out, by role."""

  def __init__(self, by_role: Mapping[str, tuple[float, float]]):
    self.by_role = dict(by_role)

  @classmethod
  def parse(cls, text: str) -> "Prices":
    """Parses "captioner=0.2/0.6,writer=0.3/1.1".

    A judge without a price has the writer's.

    Raises:
      UserError: it has another form.
    """
    found = {}
    for part in filter(None, text.split(",")):
      role, _, numbers = part.partition("=")
      try:
        price_in, price_out = map(float, numbers.split("/"))
      except ValueError:
        price_in = price_out = -1.0
      if role not in ROLES or not (
        0 <= price_in < float("inf") and 0 <= price_out < float("inf")
      ):
        raise UserError(
          f"--prices: {part!r}; write ROLE=IN/OUT,... in dollars for a million"
          f" tokens, with a role of {', '.join(ROLES)}"
        )
      found[role] = price_in, price_out
    if "writer" in found:
      found.setdefault("judge", found["writer"])
    return cls(found)

  def cost(self, stage: str, spent: Spent) -> float:
    """Returns the cost of some calls of a stage, in dollars."""
    price_in, price_out = self.by_role.get(ROLE_OF[stage], (0.0, 0.0))
    return 1e-6 * (price_in * spent.tokens_in + price_out * spent.tokens_out)


class Tally:
  """Counts what this start did, beside what earlier ones did.

  Attributes:
    spent: of this start, by stage.
    before: of earlier starts and other workers, by stage.
    failures: of answers, by reason.
  """

  def __init__(
    self,
    before: Mapping[tuple[str, str], Spent],
    prices: Prices,
    budget: float | None = None,
  ):
    self.spent: dict[str, Spent] = collections.defaultdict(Spent)
    self.before: dict[str, Spent] = collections.defaultdict(Spent)
    self.set_before(before)
    self.failures: collections.Counter[str] = collections.Counter()
    self.prices, self._budget = prices, budget
    self._flying: collections.Counter[str] = collections.Counter()

  def set_before(self, before: Mapping[tuple[str, str], Spent]) -> None:
    """Replaces what earlier starts and other workers did."""
    self.before.clear()
    for (stage, _), spent in before.items():
      self.before[stage].add(spent)

  def total(self, stage: str) -> Spent:
    """Returns what a stage took, earlier starts included."""
    total = dataclasses.replace(self.before[stage])
    total.add(self.spent[stage])
    return total

  def cost(self) -> float:
    """Returns the dollars spent so far, earlier starts included."""
    return sum(
      self.prices.cost(stage, self.total(stage))
      for stage in {*self.before, *self.spent}
    )

  def start(self, stage: str) -> None:
    """Counts a call that begins.

    Raises:
      BudgetSpent: it would exceed the budget, if it costs what those before it
        did on average.
    """
    if self._budget is not None:
      self._flying[stage] += 1
      planned = sum(n * self._mean(s) for s, n in self._flying.items())
      if self.cost() + planned > self._budget:
        self._flying[stage] -= 1
        raise BudgetSpent(
          f"the budget of ${self._budget:g} is spent (${self.cost():.2f}, and"
          f" the next call may exceed it)"
        )

  def _mean(self, stage: str) -> float:
    """Returns the mean cost of a call of a stage."""
    total = self.total(stage)
    if total.calls:
      return self.prices.cost(stage, total) / total.calls
    # Unknown so far: as if it wrote half of what it may, to a prompt as long.
    guess = Spent(1, MAX_TOKENS[stage], MAX_TOKENS[stage] // 2)
    return self.prices.cost(stage, guess)

  def end(self, stage: str, reply: Reply | None) -> None:
    """Counts a call that has ended, with its answer if there was one."""
    if self._budget is not None:
      self._flying[stage] -= 1
    if reply is not None:
      self.spent[stage].add(
        Spent(1, reply.tokens_in, reply.tokens_out, reply.seconds)
      )


@dataclasses.dataclass
class Stage:
  """Holds what a stage will take.

  Attributes:
    spent: calls, tokens, and seconds if they were made one after another.
    measured: whether calls of this stage were made before.
  """

  spent: Spent
  measured: bool


@dataclasses.dataclass
class Forecast:
  """Holds what all stages will take.

  Attributes:
    videos: that are left.
    clips: of these.
    stages: by name.
    hours: by role, at the given number of calls at a time.
    prices: of tokens.
  """

  videos: int
  clips: float
  stages: dict[str, Stage]
  hours: dict[str, float]
  prices: Prices

  def table(self) -> str:
    """Returns the forecast as lines of text."""
    head = ("stage", "calls", "tokens in", "tokens out", "$", "")
    rows: list[tuple[str, ...]] = [head]
    total, cost = Spent(), 0.0
    for name, stage in self.stages.items():
      spent, dollars = stage.spent, self.prices.cost(name, stage.spent)
      total.add(spent)
      cost += dollars
      said = "measured" if stage.measured else "estimated"
      rows.append((*self._cells(name, spent, dollars), said))
    rows.append((*self._cells("all", total, cost), ""))
    lines = [f"forecast for {self.videos:,} videos, {self.clips:,.0f} clips:"]
    for row in rows:
      cells = "".join(f"{cell:>16}" for cell in row[1:5])
      lines.append(f"{row[0]:<10}{cells}  {row[5]}".rstrip())
    each = ", ".join(f"{role} {_time(h)}" for role, h in self.hours.items())
    lines.append(
      f"at the measured rate {_time(max(self.hours.values(), default=0))}"
      f" ({each}, at the same time)"
    )
    if not self.prices.by_role:
      lines.append("for costs give --prices=captioner=IN/OUT,writer=...")
    return "\n".join(lines)

  def _cells(self, name: str, spent: Spent, dollars: float) -> tuple[str, ...]:
    """Returns the cells of a line."""
    counts = (spent.calls, spent.tokens_in, spent.tokens_out)
    return (name, *(f"{count:,.0f}" for count in counts), f"{dollars:,.2f}")


def _time(hours: float) -> str:
  """Returns hours, or minutes of less than two hours."""
  return f"{hours:,.1f} h" if hours >= 2 else f"{60 * hours:.0f} min"


def forecast(
  *,
  videos: int,
  clips_of_video: float,
  duration: float,
  captions: Sequence[Clip],
  done: int,
  tally: Tally,
  at_a_time: Mapping[str, float],
  characters: float,
  options: Options,
  tasks: Tasks,
  prompts: Prompts,
) -> Forecast:
  """Computes a forecast.

  Args:
    videos: that are left.
    clips_of_video: mean number of clips.
    duration: mean, in seconds.
    captions: of sampled clips.
    done: number of videos that were constructed before.
    tally: of the calls made so far.
    at_a_time: number of calls at a time, by role.
    characters: in a token.
    options: of the construction.
    tasks: that questions are written for.
    prompts: the templates.
  """
  mean = assumed(
    clips_of_video,
    duration,
    captions,
    tally,
    characters,
    options,
    tasks,
    prompts,
  )
  stages: dict[str, Stage] = {}
  for name in STAGES:
    total = tally.total(name)
    each = mean[name]
    # The writer was measured on one call, which tells its speed and no more.
    measured = total.calls > 0 and (name == "caption" or done > 0)
    calls = each.calls
    if measured and done and name != "caption":
      calls = total.calls / done
    if measured:
      mean_in = total.tokens_in / total.calls
      mean_out = total.tokens_out / total.calls
      seconds = total.seconds / total.calls
    else:
      mean_in = each.tokens_in / max(each.calls, 1e-9)
      mean_out = each.tokens_out / max(each.calls, 1e-9)
      seconds = _seconds(tally, ROLE_OF[name]) * mean_out
    stages[name] = Stage(
      Spent(
        round(videos * calls),
        round(videos * calls * mean_in),
        round(videos * calls * mean_out),
        videos * calls * seconds,
      ),
      measured,
    )
  hours: dict[str, float] = {}
  for name, stage in stages.items():
    role = ROLE_OF[name]
    took = stage.spent.seconds / max(at_a_time[role], 1) / 3600
    hours[role] = hours.get(role, 0.0) + took
  return Forecast(videos, videos * clips_of_video, stages, hours, tally.prices)


def _seconds(tally: Tally, role: str) -> float:
  """Returns the seconds that a token took a role; of all, if it had none."""
  for stages in ([s for s in STAGES if ROLE_OF[s] == role], STAGES):
    totals = [tally.total(stage) for stage in stages]
    tokens = sum(total.tokens_out for total in totals)
    if tokens:
      return sum(total.seconds for total in totals) / tokens
  return 0.0


def assumed(
  count: float,
  duration: float,
  captions: Sequence[Clip],
  tally: Tally,
  characters: float,
  options: Options,
  tasks: Tasks,
  prompts: Prompts,
) -> dict[str, Spent]:
  """Returns what a mean video takes if its answers are as long as usual.

  The arguments are those of `forecast`.
  """
  whole = max(1, round(count))
  clips = (
    [captions[i % len(captions)] for i in range(whole)] if captions else []
  )
  events = max(options.min_events, round(whole / _CLIPS_OF_EVENT))

  def tokens(name: str, **values: object) -> float:
    text = prompts.render("system", language="English")
    return len(text + prompts.render(name, **values)) / characters

  def spent(calls: float, tokens_in: float, tokens_out: float) -> Spent:
    # Parts of calls are kept: they are means over many videos.
    return Spent(calls, calls * tokens_in, calls * tokens_out)

  description = "x" * int(_OUT["video"] * characters)
  event = {
    "title": "x" * 40,
    "start": 0.0,
    "end": duration,
    "description": "x" * int(_OUT["event"] * characters),
  }
  caption = tally.total("caption")
  mean = max(caption.calls, 1)
  found = {
    "caption": spent(
      count, caption.tokens_in / mean, caption.tokens_out / mean
    ),
    "events": spent(
      1,
      tokens(
        "events",
        duration=duration,
        clip_seconds=f"{options.clip.seconds:g}",
        clips=clips,
      ),
      _OUT["events"] * events,
    ),
    "event": spent(
      events,
      tokens(
        "event",
        event=event,
        before=event,
        after=event,
        clips=clips[:_CLIPS_OF_EVENT],
      ),
      _OUT["event"],
    ),
    "video": spent(
      1,
      tokens("video", duration=duration, events=[event] * events),
      _OUT["video"],
    ),
  }
  total_in = total_out = calls = judged_in = choices = 0.0
  for topic, aspects in tasks.topics.items():
    source = {
      "topic": topic,
      "duration": duration,
      "description": description,
      "clips": [clip.about(aspects) for clip in clips],
    }
    for form in FORMATS:
      several = form == "multiple_choice"
      for written in tasks.groups(topic, form, options.count):
        counts = {task.name: task.count or options.count for task in written}
        number = sum(counts.values())
        calls += 1
        total_in += tokens(
          "questions",
          **source,
          tasks=written,
          counts=counts,
          multiple_choice=several,
        )
        total_out += number * _OUT_QUESTION[form]
        if several:
          letters = dict.fromkeys("ABCD", "x" * 24)
          judged_in += number * tokens(
            "judge", **source, question="x" * 80, options=letters
          )
          choices += number
  blind = tokens(
    "blind", question="x" * 80, options=dict.fromkeys("ABCD", "x" * 24)
  )
  tested = _BLIND_TRIES * choices if "blind" in options.checks else 0.0
  judged = choices if "judge" in options.checks else 0.0
  return found | {
    "questions": Spent(calls, total_in, total_out),
    "blind": spent(tested, blind, _OUT["blind"]),
    "judge": spent(judged, judged_in / max(choices, 1), _OUT["judge"]),
  }


class Bars:
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
    read_others: Callable[[], None],
  ):
    """Draws nothing before the first call of a stage.

    Args:
      videos: number of them.
      expected: numbers of calls by stage, if there was a forecast.
      tally: of the calls.
      failures: returns how many calls failed, by reason.
      read_others: reads what other workers have spent.
    """
    self.done = 0
    self._read_others = read_others
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
      if self._ticks % _OTHERS == 0:
        self._read_others()
      self._update()

  def _update(self) -> None:
    """Writes what the calls of each stage take."""
    passed = max(time.monotonic() - self._time, 1e-6)
    self._time += passed
    listed = ", ".join(f"{k} {n}" for k, n in self._failures().most_common(4))
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
      said += f", failures: {listed}" if listed else ""
      each.set_postfix_str(said, refresh=False)
    # Calls may take minutes: the bars show that it still waits for them.
    if sys.stderr.isatty() or self._ticks % _QUIET == 0:
      for each in list(self._bars.values())[-1:]:
        each.refresh()

  def close(self) -> None:
    """Leaves the last state of the bars."""
    self._update()
    for stage, each in self._bars.items():
      each.total = self._calls[stage]
      each.close()
