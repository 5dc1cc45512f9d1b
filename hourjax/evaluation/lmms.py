r"""This package's models as a model of lmms-eval, to run its tasks on.

  python -m lmms_eval --model hourjax --model_args pretrained=DIR \
      --tasks videomme --batch_size 8 --output_path work/lmms

lmms_eval finds `manifest` through the entry point in pyproject.toml. No other
module of this package imports this one, because it imports lmms_eval, which
needs PyTorch. The interface is the one that lmms_eval calls "simple": a
question is a text and a list of visuals; `<image>` in the text marks the place
of a visual, and without it the visuals come first.
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
# Options of a task that are followed, and values of others that change nothing.
_USED = ("do_sample", "max_new_tokens", "temperature", "top_p", "until")
_NEUTRAL = {"num_beams": 1, "repetition_penalty": 1}


def manifest() -> ModelManifest:
  """Returns the name and class under which lmms_eval registers the model."""
  return ModelManifest("hourjax", simple_class_path=f"{__name__}.HourJax")


@dataclasses.dataclass(frozen=True)
class Generation:
  """Describes how to answer.

  Attributes:
    max_tokens: most tokens of an answer.
    temperature: temperature of sampling; 0 takes the likeliest token.
    top_p: probability mass from which tokens are drawn.
    until: stop strings; the answer ends before the first one.
  """

  max_tokens: int
  temperature: float = 0.0
  top_p: float = 1.0
  until: tuple[str, ...] = ()

  @classmethod
  def parse(cls, options: Mapping[str, Any], max_tokens: int) -> "Generation":
    """Reads a task's `generation_kwargs`.

    As in transformers, `do_sample: false` is greedy whatever the temperature
    is. If a task does not mention `do_sample`, its temperature decides.

    Args:
      options: the task's `generation_kwargs`.
      max_tokens: used if the task has no `max_new_tokens`.
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
    """Returns the text before the first stop string.

    Args:
      text: an answer.
    """
    ends = [text.find(stop) for stop in self.until if stop]
    return text[: min((end for end in ends if end >= 0), default=None)].rstrip()


@dataclasses.dataclass(frozen=True)
class Question:
  """Holds one request.

  Attributes:
    text: text of the question.
    visuals: paths of videos or images, or PIL images.
    subject: name of the visuals; questions with the same one have the same
      visuals.
    generation: how to answer.
  """

  text: str
  visuals: tuple[Any, ...]
  subject: str
  generation: Generation


class HourJax(lmms):
  """Answers the requests of lmms_eval with a model of this package."""

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
      tokenizer: folder of its tokenizer, if it lies elsewhere.
      max_tokens: most tokens of an answer, where a task does not say.
      batch_size: questions about the same video that are answered at once.
      max_batch_size: must be None.
      device: must be None.

    Raises:
      UserError: there is no such model, or an option means nothing here.
    """
    super().__init__()
    _check_options(pretrained, batch_size, max_batch_size, device)
    self._model = load(
      str(pretrained), tokenizer=None if tokenizer is None else str(tokenizer)
    )
    logger.info(f"hourjax answers with {self._model.name}")
    self._max_tokens = int(max_tokens)
    self._batch_size = int(batch_size)
    self._subject: str | None = None
    self._memory: Memory | None = None
    # Number of answered questions. It seeds the sampling, so that a question
    # that is asked again can get another answer.
    self._num_answered = 0
    self._warned: set[str] = set()

  # lmms_eval declares list[str] and takes GenerationResult, too, of which it
  # counts the tokens (lmms_eval/evaluator.py).
  def generate_until(  # pyrefly: ignore[bad-override]
    self, requests: list[Instance]
  ) -> list[GenerationResult]:
    """Answers requests, in their order.

    Consecutive requests about one video share its memory and are answered in
    batches.

    Args:
      requests: requests of lmms_eval.

    Raises:
      UserError: the model cannot answer, or visuals are of an unknown kind.
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

  # Declared list[str], too, though all rounds' answers are expected.
  def generate_until_multi_round(  # pyrefly: ignore[bad-override]
    self, requests: list[Instance]
  ) -> list[list[str]]:
    """Answers requests of several rounds.

    A round is a question of its own: the task writes its text from the answers
    so far, and chooses its visuals.

    Args:
      requests: requests of lmms_eval.

    Returns:
      The answers of all rounds of each request.
    """
    bar = progress.bar(len(requests), unit="question", desc="answer")
    results = []
    for request in requests:
      results.append(self._answer_rounds(request))
      bar.update()
    bar.close()
    return results

  def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
    """Raises NotImplementedError, since only answers can be written.

    Args:
      requests: requests of lmms_eval.

    Raises:
      NotImplementedError: always.
    """
    raise NotImplementedError(
      f"{requests[0].task_name} compares likelihoods of given answers; hourjax "
      "only writes answers. Take a task with `output_type: generate_until`"
    )

  def _question(self, request: Instance) -> Question:
    """Returns the question of a request of a single round."""
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

  def _answer_rounds(self, request: Instance) -> list[str]:
    """Returns the answers of all rounds of one request."""
    text, options, doc_to_visual, doc_to_text, doc_id, task, split = (
      request.args
    )
    doc = self.task_dict[task][split][doc_id]
    visuals, answers, state = doc_to_visual(doc), [], None
    number, ended = 0, False
    # `doc_to_text` gets all answers so far and may change them; `state` is its
    # own, handed back to it in the next round.
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
    """Answers questions of one subject and one way of generation."""
    generation = questions[0].generation
    answers = self._get_memory(questions[0]).answer(
      [question.text for question in questions],
      max_tokens=generation.max_tokens,
      sampling=Sampling(
        generation.temperature, generation.top_p, seed=self._num_answered
      ),
    )
    self._num_answered += len(questions)
    return [
      GenerationResult(
        generation.cut(answer.text), TokenCounts(output_tokens=answer.tokens)
      )
      for answer in answers
    ]

  def _get_memory(self, question: Question) -> Memory:
    """Returns the memory of a question's visuals, kept for the next one."""
    if self._memory is None or question.subject != self._subject:
      # The last memory is dropped before the next one is encoded, because two
      # memories of hour-long videos may not fit on the device.
      self._subject = self._memory = None
      self._memory = self._encode_memory(question)
      self._subject = question.subject
    return self._memory

  def _encode_memory(self, question: Question) -> Memory:
    """Encodes the memory of a question's video, images or nothing."""
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
        [_image_file(visual, folder, n) for n, visual in enumerate(visuals)]
      )

  def _warn(self, options: Mapping[str, Any]) -> None:
    """Warns once of each option of a task that is not followed."""
    for key in options.keys() - {*_USED, *self._warned}:
      value = options[key]
      if value is not None and value != _NEUTRAL.get(key):
        self._warned.add(key)
        logger.warning(f"hourjax does not follow {key}={value} of the task")


def _check_options(
  pretrained: str,
  batch_size: int | str,
  max_batch_size: int | None,
  device: str | None,
) -> None:
  """Raises a UserError about an option that is missing or means nothing."""
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
  """Returns whether a visual is a video and not an image."""
  if isinstance(visual, Image.Image):
    return False
  if isinstance(visual, str | os.PathLike):
    return not os.fspath(visual).lower().endswith(_IMAGES)
  raise UserError(
    f"{where}: a visual is a {type(visual).__name__}; expected the path of a "
    "video or of an image, or an image. Leave this task out"
  )


def _image_file(visual: Any, folder: str, number: int) -> str:
  """Returns an image's path; a PIL image is written to the folder."""
  if not isinstance(visual, Image.Image):
    return os.fspath(visual)
  path = os.path.join(folder, f"{number}.png")
  visual.convert("RGB").save(path)
  return path
