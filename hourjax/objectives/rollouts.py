"""Rollouts: several sampled answers to each question, from one prefill.

    video -> encode_memory    once for all questions about it
    questions -> prefill      once for all answers to them
    repeat -> decode          every answer with a random key of its own

The engine reads the arrays of the train state, so the answers are those of the
very weights that are then trained, and no second copy of them is held.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from hourjax.data.dataset import Dataset
from hourjax.data.forgetting import KeptTokens
from hourjax.data.layout import Layout
from hourjax.data.records.record import Record
from hourjax.data.repository import Repository, video_repository
from hourjax.data.rows import Visual
from hourjax.errors import UserError
from hourjax.evaluation.benchmarks.record_questions import last_question
from hourjax.evaluation.questions import Question
from hourjax.inference.answering import Answering
from hourjax.inference.engine import EncodedMemory, Engine
from hourjax.inference.load import run_rules
from hourjax.inference.prompts import Prompts
from hourjax.inference.sampling import RowSampling
from hourjax.inference.steps import DecodeState
from hourjax.models.params import param_axes, param_shapes
from hourjax.objective_config import ObjectiveConfig
from hourjax.parallel.mesh import AXES
from hourjax.parallel.rules import param_shardings
from hourjax.training.config import Experiment
from hourjax.training.train_state import TrainState

# Most positions in the KV caches that are decoded together; 2.4 GB of 3B.
_CACHE = 65_536


class Prompted(NamedTuple):
  """Holds questions about one memory, laid out.

  Attributes:
    kind: of the visual input, as in `Sample`.
    visual: the visual input, as in `Sample`.
    repository: where the memory's tokens come from.
    kept: which of them forgetting keeps.
    video: duration and frames; None if the memory is not of a video.
    indices: of the records.
    questions: the last one of each record.
    layouts: of their prompts.
  """

  kind: Visual
  visual: np.ndarray | None
  repository: Repository
  kept: KeptTokens
  video: tuple[float, int] | None
  indices: tuple[int, ...]
  questions: tuple[Question, ...]
  layouts: tuple[Layout, ...]


@dataclasses.dataclass(frozen=True)
class Group:
  """Holds the answers that were sampled to one question.

  Attributes:
    prompted: the memory that it is about.
    number: of the question among those about this memory.
    ids: tokens of each answer, with the end of its turn if it ended.
    texts: of the answers, as they are rewarded.
    finished: share of the answers that ended by themselves.
  """

  prompted: Prompted
  number: int
  ids: tuple[tuple[int, ...], ...]
  texts: tuple[str, ...]
  finished: float

  @property
  def question(self) -> Question:
    """Returns the question."""
    return self.prompted.questions[self.number]

  @property
  def layout(self) -> Layout:
    """Returns the layout of its prompt."""
    return self.prompted.layouts[self.number]


class Sampler:
  """Samples answers with the weights of a train state."""

  def __init__(self, experiment: Experiment, dataset: Dataset, mesh: Mesh):
    """Compiles nothing yet.

    Args:
      experiment: of the run.
      dataset: of its questions.
      mesh: of the training.

    Raises:
      UserError: the memory cannot be split over the devices.
    """
    self._experiment, self._dataset = experiment, dataset
    self._asked: ObjectiveConfig = experiment.objective
    model = experiment.model
    self._same_mesh = mesh.shape["data"] * mesh.shape["fsdp"] == 1
    if not self._same_mesh:
      mesh = _memory_mesh(mesh)
      devices = mesh.shape["seq"]
      if model.pool_side**2 % devices:
        raise UserError(
          f"config.objective.name=grpo splits a memory over {devices} devices,"
          f" which do not divide the {model.pool_side**2} tokens of a frame;"
          " use fewer devices, or raise config.mesh.tensor"
        )
    self._shardings = param_shardings(
      mesh, param_shapes(model), param_axes(model)
    )
    self._whole = NamedSharding(mesh, PartitionSpec())
    self._engine = Engine({}, model, mesh)
    self._prompts = Prompts(dataset.tokenizer, run_rules(experiment))

  def use(self, state: TrainState) -> None:
    """Samples with these weights from now on.

    They are not copied, unless the training's mesh has `data` or `fsdp`.
    """
    params = state.trained | state.frozen
    if not self._same_mesh:
      params = {
        # Adapters are small, and whole on every device.
        path: jax.device_put(value, self._shardings.get(path, self._whole))
        for path, value in params.items()
      }
    self._engine.share_params(params)

  def read(self, group: Sequence[int]) -> Prompted:
    """Reads the visual input of records that share it, and lays out prompts.

    It uses no device, so several threads may read.

    Args:
      group: indices of the records.

    Raises:
      UserError: a record cannot be read, or has no question.
    """
    sample = self._dataset.sample(group[0])
    records = [self._dataset.record(index) for index in group]
    repository, video = sample.layout.repository, None
    if records[0].modality == "video" and sample.visual is not None:
      number = int(self._dataset.columns.video[group[0]])
      duration = float(self._dataset.visual.duration[number])
      video = duration, len(sample.visual)
      side = self._experiment.model.pool_side
      repository = video_repository(len(sample.visual), side)
    rules = self._prompts.rules
    features = sample.visual if sample.kind == "features" else None
    kept = KeptTokens(
      rules.forgetting, repository, rules.seed, features, self._dataset.embedder
    )
    return Prompted(
      sample.kind,
      sample.visual,
      repository,
      kept,
      video,
      tuple(group),
      tuple(last_question(record) for record in records),
      tuple(self._layout(r, repository, kept, video) for r in records),
    )

  def sample(self, prompts: Sequence[Prompted], step: int) -> list[Group]:
    """Samples answers to questions: a function of (seed, step, record).

    Args:
      prompts: of one micro-batch.
      step: number of the step.
    """
    groups: list[Group] = []
    longest = max(
      (len(x.decoder_token) for p in prompts for x in p.layouts), default=1
    )
    each = (longest + self._asked.max_tokens) * self._asked.group
    some: list[Prompted] = []
    for prompted in prompts:
      questions = sum(len(p.layouts) for p in (*some, prompted))
      if some and questions * each > _CACHE:
        groups += self._sample(some, step)
        some = []
      some.append(prompted)
    return groups + (self._sample(some, step) if some else [])

  def _sample(self, prompts: Sequence[Prompted], step: int) -> list[Group]:
    """Samples answers that are decoded together."""
    asked, tokenizer = self._asked, self._dataset.tokenizer
    states = []
    for prompted in prompts:
      answering = self._encode(prompted)
      state = answering.prefill(prompted.layouts, asked.max_tokens)
      states.append((state, len(prompted.layouts)))
    stop = [tokenizer.im_end, tokenizer.pad]
    indices = [index for p in prompts for index in p.indices]
    rows = decode_groups(
      self._engine,
      states,
      asked,
      functools.partial(self._row_sampling, indices, step),
      stop,
    )
    found, first = [], 0
    for prompted in prompts:
      for number in range(len(prompted.layouts)):
        ids = tuple(rows[first : first + asked.group])
        first += asked.group
        texts = tuple(
          tokenizer.decode([i for i in a if i not in stop], skip_special=True)
          for a in ids
        )
        ended = sum(a[-1] in stop for a in ids) / len(ids)
        texts = tuple(text.strip() for text in texts)
        found.append(Group(prompted, number, ids, texts, ended))
    return found

  def _row_sampling(
    self, indices: Sequence[int], step: int, rows: int
  ) -> RowSampling:
    """Returns a random key for each answer, of (seed, step, record, answer)."""
    key = jax.random.fold_in(jax.random.key(self._experiment.seed), step)
    count = len(indices) * self._asked.group
    record, answer = np.zeros(rows, np.int32), np.zeros(rows, np.int32)
    record[:count] = np.repeat(indices, self._asked.group)
    answer[:count] = np.tile(np.arange(self._asked.group), len(indices))
    return RowSampling(
      jnp.float32(self._asked.temperature),
      jnp.float32(self._asked.top_p),
      _keys(key, record, answer),
    )

  def _encode(self, prompted: Prompted) -> Answering:
    """Encodes a memory once, for all questions and answers."""
    encoded = EncodedMemory()
    if prompted.visual is not None:
      rules, kept = self._prompts.rules, prompted.kept
      encoded = self._engine.encode_memory(
        rules.memory.limit_memory(prompted.repository, kept.fixed),
        prompted.kind,
        prompted.visual,
        kept.candidates,
      )
    return Answering(
      self._engine,
      self._prompts,
      encoded,
      prompted.repository,
      prompted.kept,
      prompted.video,
    )

  def _layout(
    self,
    record: Record,
    repository: Repository,
    kept: KeptTokens,
    video: tuple[float, int] | None,
  ) -> Layout:
    """Lays out a record up to its last answer, as inference lays it out."""
    return self._prompts.layout(
      record.turns[:-1], repository, kept, video, self._asked.max_tokens
    )


def decode_groups(
  engine: Engine,
  states: list[tuple[DecodeState, int]],
  asked: ObjectiveConfig,
  sampling: Callable[[int], RowSampling],
  stop: Sequence[int],
) -> list[tuple[int, ...]]:
  """Decodes several answers to each prompt; returns their tokens.

  Args:
    engine: that has read the prompts.
    states: of prompts, with their number; the list is emptied, so that the
      memory of the prefill is free while answers are decoded.
    asked: how many answers, and how long they may be.
    sampling: returns the sampling of so many rows, in the order of the answers.
    stop: tokens that end an answer.
  """
  answers = asked.group * sum(prompts for _, prompts in states)
  state = engine.repeat(states, asked.group)
  states.clear()
  state = engine.decode(
    state,
    sampling(len(state.done)),
    stop_tokens=stop,
    max_tokens=asked.max_tokens,
    num_steps=asked.max_tokens,
  )
  ids, counts = jax.device_get((state.answer, state.count))
  return [tuple(a[:n].tolist()) for a, n in zip(ids[:answers], counts)]


@jax.jit
def _keys(key: jax.Array, record: jax.Array, answer: jax.Array) -> jax.Array:
  fold = jax.vmap(jax.random.fold_in)
  keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, record)
  return fold(keys, answer)


def _memory_mesh(mesh: Mesh) -> Mesh:
  """Returns a mesh of the same devices that splits memories over all rows."""
  tensor = mesh.shape["tensor"]
  shape = {"data": 1, "fsdp": 1, "seq": -1, "tensor": tensor}
  devices = mesh.devices.reshape([shape[name] for name in AXES])
  assert math.prod(devices.shape) == mesh.size
  return Mesh(devices, AXES, axis_types=mesh.axis_types)
