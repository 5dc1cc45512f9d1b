"""From one video to its questions: the stages, in order.

  clips -> captions -> events -> event descriptions -> video description
        -> questions of each topic and format -> checks

Every step depends on the answers before it alone, so that a start after a kill
takes the same way through the stored answers, to where they end.
"""

import asyncio
import concurrent.futures
import contextlib
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from hourjax.construction import answers, checks, clips
from hourjax.construction.answers import Event, Refused, Unusable
from hourjax.construction.asking import Asker, VideoAnswers, gather
from hourjax.construction.checks import Benchmarks, Question
from hourjax.construction.options import Clip, Made, Options
from hourjax.construction.tasks import FORMATS, Task, Tasks
from hourjax.data.media.video_probe import VideoInfo

# A video goes on if so much of its clips has captions.
_CAPTIONED = 0.9


class Constructor:
  """Takes videos through all stages."""

  def __init__(
    self,
    asker: Asker,
    tasks: Tasks,
    options: Options,
    benchmarks: Benchmarks,
    pool: concurrent.futures.Executor,
    *,
    ahead: int = 16,
    decode: Callable[..., Iterator[list[dict[str, Any]]]] = clips.message_parts,
  ):
    """Keeps what all videos share.

    Args:
      asker: asks the models.
      tasks: that questions are written for.
      options: of the construction.
      benchmarks: whose videos and questions are left out.
      pool: of threads that decode.
      ahead: most clips of all videos whose frames are held at a time, those
        that are being captioned among them.
      decode: makes the parts of messages, as `clips.message_parts` does.
    """
    self.asker, self.tasks, self.options = asker, tasks, options
    self.benchmarks, self.pool = benchmarks, pool
    self.ahead = asyncio.Semaphore(ahead)
    self.decode = decode

  async def construct(
    self, path: pathlib.Path, info: VideoInfo, video: VideoAnswers
  ) -> tuple[str, dict[str, Any]]:
    """Takes one video through all stages.

    Args:
      path: of the file.
      info: result of `probe`.
      video: its stored answers.

    Returns:
      "done" or "dropped", "partial" or "failed" if a request was refused; and
      what was made of it: `captions`, `events`, `description`, `questions`,
      `dropped`, `unusable`; if it has no questions, the `kind` and `reason`.

    Raises:
      UserError: the video cannot be decoded.
      Lost, BudgetSpent: a call got no answer.
    """
    if self.benchmarks.has_video(video.name):
      return "dropped", {"kind": "a benchmark's video", "reason": video.name}
    work = _Work(self, path, info, video)
    made = work.made
    try:
      found = await work.describe() or await work.ask()
    except Unusable as error:
      made.refused |= isinstance(error, Refused)
      found = f"no usable {made.stage}", str(error)
    if found is not None:
      # What was refused may be answered by another start.
      state = "failed" if made.refused else "dropped"
      return state, {**made.values(), "kind": found[0], "reason": found[1]}
    return "partial" if made.refused else "done", made.values()

  async def sample(
    self, path: pathlib.Path, info: VideoInfo, video: VideoAnswers
  ) -> Clip | None:
    """Captions the middle clip of a video, for a forecast.

    Args:
      path: of the file.
      info: result of `probe`.
      video: its stored answers, which get this one.

    Returns:
      The clip, or None without a usable caption.
    """
    work = _Work(self, path, info, video)
    spans = clips.cut(float(info.duration), self.options.clip.seconds)
    span = spans[len(spans) // 2]
    (caption,) = await work.captions([span])
    return None if caption is None else Clip(*span, caption.aspects())

  async def sample_writing(self, video: VideoAnswers, clip: Clip) -> int:
    """Asks for the description of one clip, to measure the writer.

    Args:
      video: of the clip.
      clip: with its caption.

    Returns:
      The number of characters of the prompt.
    """
    event = Event(title="This part", start=clip.start, end=clip.end)
    prompt = self.asker.prompts.render(
      "event", event=event, before=None, after=None, clips=[clip]
    )
    with contextlib.suppress(Unusable):
      await self.asker.ask(video, "event", prompt, answers.Description)
    return len(prompt)


class _Work:
  """Takes one video through the stages.

  Attributes:
    made: of the video so far.
  """

  def __init__(
    self,
    constructor: Constructor,
    path: pathlib.Path,
    info: VideoInfo,
    video: VideoAnswers,
  ):
    self.made = Made(float(info.duration))
    self._asker, self._options = constructor.asker, constructor.options
    self._tasks, self._benchmarks = constructor.tasks, constructor.benchmarks
    self._pool, self._ahead = constructor.pool, constructor.ahead
    self._decode = constructor.decode
    self._path, self._info, self._video = path, info, video

  async def describe(self) -> tuple[str, str] | None:
    """Runs the stages up to the description of the video.

    Returns:
      Kind and text of a reason to drop the video, or None.
    """
    self.made.stage = "captions"
    spans = clips.cut(self.made.duration, self._options.clip.seconds)
    captions = await self.captions(spans)
    self.made.clips = [
      Clip(start, end, caption.aspects())
      for (start, end), caption in zip(spans, captions)
      if caption is not None
    ]
    if len(self.made.clips) < _CAPTIONED * len(spans):
      return (
        "too few captions",
        f"{len(self.made.clips)} of {len(spans)} clips have one",
      )
    self.made.stage = "events"
    events = await self._find_events()
    least = self._options.min_events
    if len(events) < least:
      return (
        "too few events",
        f"{len(events)} different ones, {least} are wanted",
      )
    self.made.stage = "event descriptions"
    described = await gather(
      *(self._describe_event(events, i) for i in range(len(events)))
    )
    self.made.events = [event for event in described if event is not None]
    if len(self.made.events) < least:
      count = len(self.made.events)
      return "too few events", f"{count} are described, {least} are wanted"
    self.made.stage = "video description"
    prompt = self._asker.prompts.render(
      "video", duration=self.made.duration, events=self.made.events
    )
    answer = await self._asker.ask(
      self._video, "video", prompt, answers.Description, check=_in_english
    )
    self.made.description = answer.description
    return None

  async def captions(
    self, spans: Sequence[tuple[float, float]]
  ) -> list[answers.Caption | None]:
    """Captions all clips; None where no answer could be used.

    Frames are decoded in one pass, for the clips that have no stored answer.
    """
    options = self._options.clip
    loop = asyncio.get_running_loop()
    turns = [loop.create_future() for _ in spans]  # whether frames are wanted
    frames = [loop.create_future() for _ in spans]
    held: set[int] = set()  # clips whose frames are counted in `ahead`
    media = f"{options.rate:g}/s {options.size} px {options.media}"

    async def caption(number: int) -> answers.Caption | None:
      start, end = spans[number]
      numbers = clips.frame_numbers(self._info, start, end, options.rate)
      prompt = self._asker.prompts.render(
        "caption",
        frames=len(numbers),
        start=start,
        end=end,
        duration=self.made.duration,
      )

      async def parts() -> list[dict[str, Any]]:
        # Whoever needs frames says so, and gets them in the clips' order.
        turns[number].set_result(True)
        return await frames[number]

      try:
        return await self._asker.ask(
          self._video,
          "caption",
          prompt,
          answers.Caption,
          check=_in_english,
          media=media,
          parts=parts,
        )
      except Unusable as error:
        self.made.give_up(f"caption of {start:g} to {end:g} s", error)
        return None
      finally:
        if not turns[number].done():
          turns[number].set_result(False)
        elif number in held:
          held.discard(number)
          frames[number] = loop.create_future()  # frees what it holds
          self._ahead.release()

    async def decode() -> None:
      """Hands each clip that needs them its frames, a few clips ahead."""
      wanted = [n for n, turn in enumerate(turns) if await turn]
      decoded = self._decode(
        self._path, self._info, [spans[n] for n in wanted], options
      )
      for number in wanted:
        await self._ahead.acquire()
        held.add(number)
        made = await loop.run_in_executor(self._pool, next, decoded)
        frames[number].set_result(made)

    found = await gather(decode(), *(caption(n) for n in range(len(spans))))
    return found[1:]

  async def _find_events(self) -> list[Event]:
    """Returns the different events of the video."""
    prompt = self._asker.prompts.render(
      "events",
      duration=self.made.duration,
      clip_seconds=f"{self._options.clip.seconds:g}",
      clips=self.made.clips,
    )

    def check(answer: answers.Events) -> answers.Events:
      answers.check_script([event.title for event in answer.events])
      found = answers.check_events(answer.events, self.made.duration)
      return answer.model_copy(update={"events": found})

    answer = await self._asker.ask(
      self._video, "events", prompt, answers.Events, check=check
    )
    return answer.events

  async def _describe_event(
    self, events: Sequence[Event], number: int
  ) -> dict[str, Any] | None:
    """Returns an event with its description, None without a usable one."""
    event = events[number]
    prompt = self._asker.prompts.render(
      "event",
      event=event,
      before=events[number - 1] if number else None,
      after=events[number + 1] if number + 1 < len(events) else None,
      clips=[
        clip
        for clip in self.made.clips
        if clip.start < event.end and clip.end > event.start
      ],
    )
    try:
      answer = await self._asker.ask(
        self._video, "event", prompt, answers.Description, check=_in_english
      )
    except Unusable as error:
      self.made.give_up(f"description of event {event.title!r}", error)
      return None
    return {**event.model_dump(), "description": answer.description}

  async def ask(self) -> tuple[str, str] | None:
    """Writes the questions of all topics and formats, and checks them.

    Returns:
      Kind and text of a reason to drop the video, or None.
    """
    self.made.stage = "questions"
    sets = [
      (topic, form, group)
      for topic in self._tasks.topics
      for form in FORMATS
      for group in self._tasks.groups(topic, form, self._options.count)
    ]
    written = await gather(*(self._write(*each) for each in sets))
    found = [question for questions in written for question in questions]
    if sets and not found:
      return "no usable questions", f"of {len(sets)} sets of them"
    found += [self._summary(task) for task in self._tasks.by_description()]
    found = checks.shuffle(found, self._video.name)
    self.made.stage = "checks"
    wrong = self._check_rules(found)
    marks = await gather(
      *(
        self._check_by_models(number, question, wrong.get(number))
        for number, question in enumerate(found)
      )
    )
    # In another order, so that a conversation's questions are of many tasks.
    order = checks.random_of("order", self._video.name).permutation(len(found))
    for question, (reason, blind) in [
      (found[i], marks[i]) for i in order.tolist()
    ]:
      item = {
        "task": question.task,
        "topic": question.topic,
        "format": question.format,
        "question": question.text,
        "answer": question.answer,
        "options": list(question.options) or None,
      }
      if reason:
        self.made.dropped.append({**item, "reason": reason})
      else:
        self.made.questions.append({**item, "blind": blind})
    return None

  def _sources(self, topic: str) -> dict[str, Any]:
    """Returns what the writer and the judge of a topic see."""
    aspects = self._tasks.topics[topic]
    return {
      "topic": topic,
      "duration": self.made.duration,
      "description": self.made.description,
      "clips": [clip.about(aspects) for clip in self.made.clips],
    }

  async def _write(
    self, topic: str, form: str, tasks: Sequence[Task]
  ) -> list[Question]:
    """Writes the questions of some tasks of a topic in one format."""
    counts = {task.name: task.count or self._options.count for task in tasks}
    several = form == "multiple_choice"
    kind = answers.ChoiceQuestions if several else answers.OpenQuestions
    prompt = self._asker.prompts.render(
      "questions",
      **self._sources(topic),
      tasks=tasks,
      counts=counts,
      multiple_choice=several,
    )

    def check(answer: Any) -> Any:
      answers.check_counts(answer.questions, counts)
      answers.check_english(
        [f"{item.question} {item.answer}" for item in answer.questions]
      )
      return answer

    try:
      answer: Any = await self._asker.ask(
        self._video, "questions", prompt, kind, check=check
      )
    except Unusable as error:
      self.made.give_up(f"{form} questions about {topic}", error)
      return []
    return [
      Question(
        item.task,
        topic,
        item.question,
        item.answer,
        tuple(item.options) if several else (),
      )
      for item in answer.questions
    ]

  def _summary(self, task: Task) -> Question:
    """Returns the question that the description of the video answers."""
    rng = checks.random_of("summary", task.name, self._video.name)
    text = task.questions[int(rng.integers(len(task.questions)))]
    return Question(task.name, task.topic, text, self.made.description)

  def _check_rules(self, found: Sequence[Question]) -> dict[int, str]:
    """Returns the reason to drop each question that breaks a rule."""
    if "rules" not in self._options.checks:
      return {}
    written = {
      task.name for task in self._tasks.tasks if task.answer == "written"
    }
    wrong: dict[int, str] = {}
    repeated = checks.repetitions(found)
    for number, question in enumerate(found):
      if question.task not in written:
        continue  # its answer is the whole description
      reason = (
        checks.options_fault(question)
        or checks.times_fault(question, self.made.duration)
        or checks.leak_fault(question)
      )
      if not reason and number in repeated:
        reason = "it repeats another question"
      if not reason and self._benchmarks.has_question(question):
        reason = "it is a benchmark's question"
      if reason:
        wrong[number] = reason
    return wrong

  async def _check_by_models(
    self, number: int, question: Question, reason: str | None
  ) -> tuple[str | None, bool]:
    """Returns a reason to drop a question, and whether it needs no video."""
    if reason or not question.options:
      return reason, False
    blind = False
    try:
      # The blind test first: its prompts are short, a judge's are long.
      if "blind" in self._options.checks:
        blind = await self._is_blind(number, question)
      if blind and not self._options.mark:
        return "it is answered without the video", True
      if "judge" in self._options.checks:
        reason = await self._judge(question)
    except Unusable as error:
      self.made.give_up(f"check of {question.text!r}", error)
      return f"it could not be checked: {error.kind}", False
    return reason, blind

  async def _judge(self, question: Question) -> str | None:
    """Asks which options are right; returns a reason if not just the answer."""
    prompt = self._asker.prompts.render(
      "judge",
      **self._sources(question.topic),
      question=question.text,
      options=question.by_letter(),
    )
    answer = await self._asker.ask(
      self._video, "judge", prompt, answers.Judgement
    )
    right = set(answer.right)
    if not right:
      return "the judge finds no option right"
    if len(right) > 1:
      return "the judge finds several options right"
    if right != {question.letter}:
      return "the judge finds another option right"
    return None

  async def _is_blind(self, number: int, question: Question) -> bool:
    """Returns whether all tries without the video are right.

    Options are in another order in each, so that a model that prefers a letter
    is not taken for one that knows.
    """
    for sample in range(self._options.blind_tries):
      rng = checks.random_of("blind", self._video.name, number, sample)
      order = rng.permutation(len(question.options)).tolist()
      options = question.by_letter(order)
      prompt = self._asker.prompts.render(
        "blind", question=question.text, options=options
      )
      answer = await self._asker.ask(
        self._video, "blind", prompt, answers.Blind, sample=sample
      )
      if options[answer.answer] != question.answer:
        return False
    return self._options.blind_tries > 0


def _in_english(answer: Any) -> Any:
  """Returns an answer if its texts are English."""
  answers.check_english([str(text) for text in answer.model_dump().values()])
  return answer
