"""Our models for lmms-eval, whose tasks then run on them.

  python -m lmms_eval --model hourjax --model_args pretrained=DIR \
      --tasks videomme --batch_size 8 --output_path work/lmms

lmms_eval finds `manifest` through the entry point in pyproject.toml; nothing of
ours imports this module, and only lmms_eval brings torch. Its "simple" dialect
is spoken: a question is a text and a list of visuals; `<image>` in the text
stands for one of them, and without it they come first.
"""

import dataclasses
import itertools
import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest
from loguru import logger
from PIL import Image

from hourjax import progress
from hourjax.errors import UserError
from hourjax.inference.load import load
from hourjax.inference.memory import Memory
from hourjax.inference.sampling import Sampling

_IMAGES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
_USED = ("do_sample", "max_new_tokens", "temperature", "top_p", "until")
_NEUTRAL = {"num_beams": 1, "repetition_penalty": 1}


def manifest() -> ModelManifest:
  """What lmms_eval registers: the name of the model and its class."""
  return ModelManifest("hourjax", simple_class_path=f"{__name__}.HourJax")


@dataclasses.dataclass(frozen=True)
class Generation:
  """How to answer.

  Attributes:
    max_tokens: of an answer, at most.
    temperature: 0 is greedy.
    top_p: the share of the probability that is drawn from.
    until: the answer ends before the first of these.
  """

  max_tokens: int
  temperature: float = 0.0
  top_p: float = 1.0
  until: tuple[str, ...] = ()

  @classmethod
  def parse(cls, options: Mapping[str, Any], max_tokens: int) -> "Generation":
    """Reads a task's `generation_kwargs`.

    As in transformers, `do_sample: false` is greedy whatever the temperature.
    Where a task says nothing about it, its temperature decides.

    Args:
      options: of the task.
      max_tokens: where the task names no `max_new_tokens`.
    """
    sample, temperature = options.get("do_sample"), options.get("temperature")
    if temperature is None:
      temperature = 1.0 if sample else 0.0
    top_p = options.get("top_p")
    top_p = 1.0 if top_p is None else float(top_p)
    greedy = sample is False or top_p <= 0 or temperature <= 0
    until = options.get("until") or ()
    return cls(
      max_tokens=int(options.get("max_new_tokens") or max_tokens),
      temperature=0.0 if greedy else float(temperature),
      top_p=1.0 if greedy else min(top_p, 1.0),
      until=(until,) if isinstance(until, str) else tuple(until),
    )

  def cut(self, text: str) -> str:
    """The text before the first stop string."""
    ends = [text.find(stop) for stop in self.until if stop]
    return text[: min((end for end in ends if end >= 0), default=None)].rstrip()


@dataclasses.dataclass(frozen=True)
class Question:
  """One request.

  Attributes:
    text: of the question.
    visuals: paths of videos or images, or PIL images.
    subject: questions with the same subject have the same visuals.
    generation: how to answer.
  """

  text: str
  visuals: tuple[Any, ...]
  subject: str
  generation: Generation


class HourJax(lmms):
  """A model of ours behind lmms_eval's interface."""

  def __init__(
    self,
    pretrained: str = "",
    tokenizer: str | None = None,
    max_tokens: int = 1024,
    batch_size: int | str = 1,
    max_batch_size: int | None = None,
    device: str | None = None,
  ):
    """Loads the model.

    Args:
      pretrained: folder of the model: a workdir or official weights.
      tokenizer: folder of its tokenizer, if it is elsewhere.
      max_tokens: of an answer, where a task does not say.
      batch_size: questions about the same video that are answered at once.
      max_batch_size: refused.
      device: refused.

    Raises:
      UserError: no such model, or an option that means nothing here.
    """
    super().__init__()
    _check(pretrained, batch_size, max_batch_size, device)
    self._model = load(
      str(pretrained), tokenizer=None if tokenizer is None else str(tokenizer)
    )
    logger.info(f"hourjax answers with {self._model.name}")
    self._max_tokens = int(max_tokens)
    self._batch_size = int(batch_size)
    self._subject: str | None = None
    self._memory: Memory | None = None
    # Seeds draws, so that a question asked again is answered anew.
    self._asked = 0
    self._warned: set[str] = set()

  def generate_until(self, requests: list[Instance]) -> list[GenerationResult]:
    """Answers, in the order of the requests.

    Requests in a row about one video share its memory and are answered in
    batches.

    Raises:
      UserError: from the model, or visuals that it does not take.
    """
    results: list[GenerationResult] = []
    bar = progress.bar(len(requests), unit="question", desc="answer")
    questions = map(self._question, requests)
    for _, group in itertools.groupby(
      questions, key=lambda q: (q.subject, q.generation)
    ):
      while batch := list(itertools.islice(group, self._batch_size)):
        results += self._answer(batch)
        bar.update(len(batch))
    bar.close()
    return results

  def generate_until_multi_round(
    self, requests: list[Instance]
  ) -> list[list[str]]:
    """The answers of all rounds of each request.

    A round is a question of its own: the task writes it from the answers so
    far, and chooses what is shown with it.
    """
    bar = progress.bar(len(requests), unit="question", desc="answer")
    results = []
    for request in requests:
      results.append(self._rounds(request))
      bar.update()
    bar.close()
    return results

  def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
    """Not supported: raises NotImplementedError."""
    raise NotImplementedError(
      f"{requests[0].task_name} compares likelihoods of given answers; hourjax "
      "only writes answers. Take a task with `output_type: generate_until`"
    )

  def _question(self, request: Instance) -> Question:
    text, options, doc_to_visual, doc_id, task, split = request.args
    visuals = doc_to_visual(self.task_dict[task][split][doc_id])
    subject = f"{task}/{split}/{doc_id}"
    return self._make_question(text, visuals, subject, options)

  def _make_question(
    self,
    text: str,
    visuals: Iterable[Any] | None,
    name: str,
    options: Mapping[str, Any],
  ) -> Question:
    self._warn(options)
    visuals = tuple(visuals or ())
    if not visuals:
      subject = "text"
    elif len(visuals) == 1 and _is_video(visuals[0], name):
      subject = f"video {os.fspath(visuals[0])}"
    else:
      subject = f"images of {name}"
    generation = Generation.parse(options, self._max_tokens)
    return Question(text, visuals, subject, generation)

  def _rounds(self, request: Instance) -> list[str]:
    text, options, doc_to_visual, doc_to_text, doc_id, task, split = (
      request.args
    )
    doc = self.task_dict[task][split][doc_id]
    visuals, answers, state = doc_to_visual(doc), [], None
    number, ended = 0, False
    while not ended:
      number += 1
      name = f"{task}/{split}/{doc_id}, round {number}"
      question = self._make_question(text, visuals, name, options)
      (result,) = self._answer([question])
      visuals, text, ended, answers, state = doc_to_text(
        doc,
        previous_output=[*answers, result.text],
        round_idx=number,
        previous_round_info=state,
      )
    return list(answers)

  def _answer(self, questions: Sequence[Question]) -> list[GenerationResult]:
    """Answers to questions of one subject and one way of generation."""
    generation = questions[0].generation
    answers = self._look(questions[0]).answer(
      [question.text for question in questions],
      max_tokens=generation.max_tokens,
      sampling=Sampling(
        generation.temperature, generation.top_p, seed=self._asked
      ),
    )
    self._asked += len(questions)
    return [
      GenerationResult(
        generation.cut(answer.text), TokenCounts(output_tokens=answer.tokens)
      )
      for answer in answers
    ]

  def _look(self, question: Question) -> Memory:
    """The memory of what a question is about; the last one is kept."""
    if question.subject != self._subject:
      # Forgotten first: two memories of hour-long videos may not fit.
      self._subject = self._memory = None
      self._memory = self._remember(question)
      self._subject = question.subject
    return self._memory

  def _remember(self, question: Question) -> Memory:
    visuals, subject = question.visuals, question.subject
    if not visuals:
      return self._model.empty_memory()
    if len(visuals) == 1 and _is_video(visuals[0], subject):
      return self._model.encode_memory(os.fspath(visuals[0]))
    if any(_is_video(visual, subject) for visual in visuals):
      raise UserError(
        f"{subject}: {len(visuals)} visuals with a video among them; a "
        "question is about one video or about images. Leave this task out"
      )
    with tempfile.TemporaryDirectory() as folder:
      return self._model.encode_images(
        [_file(visual, folder, n) for n, visual in enumerate(visuals)]
      )

  def _warn(self, options: Mapping[str, Any]) -> None:
    """Tells once of each option of a task that is not followed."""
    for key in options.keys() - {*_USED, *self._warned}:
      value = options[key]
      if value is not None and value != _NEUTRAL.get(key):
        self._warned.add(key)
        logger.warning(f"hourjax does not follow {key}={value} of the task")


def _check(pretrained, batch_size, max_batch_size, device) -> None:
  if not pretrained:
    raise UserError(
      "no model is named; say --model_args pretrained=DIR, a workdir or a "
      "folder of official weights"
    )
  if not str(batch_size).isdecimal() or int(batch_size) < 1:
    raise UserError(
      f"--batch_size={batch_size}: expected a number of 1 or more, the "
      "questions about one video that are answered at once"
    )
  if max_batch_size is not None:
    raise UserError(
      f"--max_batch_size={max_batch_size} means nothing here; say --batch_size"
    )
  if device is not None:
    raise UserError(
      f"--device={device} means nothing here: jax chooses; set JAX_PLATFORMS"
    )
  if int(os.environ.get("WORLD_SIZE") or 1) > 1:
    raise UserError(
      f"WORLD_SIZE={os.environ['WORLD_SIZE']}: lmms_eval would share the work "
      "by torch.distributed; hourjax runs in one process with all its devices. "
      "Unset WORLD_SIZE and start one process"
    )


def _is_video(visual: Any, where: str) -> bool:
  """Whether a visual is a video and not an image."""
  if isinstance(visual, Image.Image):
    return False
  if isinstance(visual, str | os.PathLike):
    return not os.fspath(visual).lower().endswith(_IMAGES)
  raise UserError(
    f"{where}: a visual is a {type(visual).__name__}; expected the path of a "
    "video or of an image, or an image. Leave this task out"
  )


def _file(visual: Any, folder: str, number: int) -> str:
  """An image as a file; written into the folder if it is none."""
  if not isinstance(visual, Image.Image):
    return os.fspath(visual)
  path = os.path.join(folder, f"{number}.png")
  visual.convert("RGB").save(path)
  return path
