"""How long each stage will take, from what is measured on these devices.

Extraction: frames of all videos, by the speeds of the tower and of decoding,
each timed on some of them. Training: a step on rows of real lengths with random
contents, timed. An evaluation: its share of that. Times are meant to tell a
coffee from a night; a table at the end compares them with what stages took.
"""

import dataclasses
import os
import pathlib
import time
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from hourjax import progress
from hourjax.data import synthetic
from hourjax.data.dataset import Dataset
from hourjax.data.media import video
from hourjax.data.media.frame_rules import extraction_frames
from hourjax.data.prepare.convert import VideoFact, Videos
from hourjax.errors import UserError
from hourjax.extraction.encoder import Encoder, tower_params
from hourjax.parallel.mesh import make_mesh
from hourjax.training.batch_sharding import BatchSharding
from hourjax.training.config import Experiment
from hourjax.training.data_loader import row_plan
from hourjax.training.train_state import abstract_state, state_shardings
from hourjax.training.train_step import TrainStep
from hourjax.training.workdir import count_epoch, epoch_steps, total_steps

_DECODED = 3  # videos of which frames are decoded to time it
_FRAMES = 64  # of each of them
# A training row is passed forward, forward again and, for twice that, backward.
_FORWARD = 1 / 4
_QUESTION = 0.1  # seconds of decoding an answer, beside reading the video
_LOAD = 20.0  # seconds of reading the weights and compiling, for each stage


@dataclasses.dataclass(frozen=True)
class Stage:
  """Holds what a stage is expected to take.

  Attributes:
    name: of the stage.
    seconds: in all.
    detail: what they are of.
  """

  name: str
  seconds: float
  detail: str


def probe(
  folder: str | os.PathLike, names: Sequence[str]
) -> dict[str, VideoFact]:
  """Reads length and rate of videos from their headers, several at a time.

  Args:
    folder: of the videos.
    names: below it.

  Returns:
    By name; those that cannot be read have a problem.
  """
  videos = Videos(pathlib.Path(folder), None)
  try:
    for name in names:
      videos.request(name)
    with progress.bar(len(names), unit="video", desc="look at videos") as bar:
      found = {}
      for name in names:
        found[name] = videos.fact(name)
        bar.update()
    return found
  finally:
    videos.close()


def extraction(
  experiment: Experiment,
  folder: str | os.PathLike,
  facts: Mapping[str, VideoFact],
) -> Stage:
  """Forecasts the extraction of videos.

  Args:
    experiment: of the model.
    folder: of the videos.
    facts: of the videos that are not stored yet.
  """
  frames = {name: _frames(fact) for name, fact in facts.items()}
  total, name = sum(map(len, frames.values())), "extract features"
  if not total:
    return Stage(name, 0.0, "all are there")
  with progress.step("timing the tower and the decoding of videos"):
    encoder = Encoder(tower_params(experiment), experiment.model)
    encoded = _encoding_rate(encoder)
    decoded = _decoding_rate(folder, frames, encoder.image_size)
  # On a CPU both share the cores; else they run side by side.
  on_cpu = jax.default_backend() == "cpu"
  rate = 1 / (1 / encoded + 1 / decoded) if on_cpu else min(encoded, decoded)
  hours = sum(fact.duration or 0.0 for fact in facts.values()) / 3600
  return Stage(
    name,
    total / rate + _LOAD,
    f"{total:,} frames of {hours:.1f} h of video, {rate:,.0f} a second"
    f" ({'decoding' if decoded < encoded else 'the tower'} limits)",
  )


def _frames(fact: VideoFact) -> np.ndarray:
  """Returns the indices of the frames that are extracted of a video."""
  try:
    return extraction_frames(fact.num_frames, fact.fps or 0.0)[0]
  except UserError:  # reported when it is extracted
    return np.zeros(0, np.int32)


def _encoding_rate(encoder: Encoder) -> float:
  """Returns how many frames a second the tower encodes."""
  side = encoder.image_size
  pixels = np.zeros((encoder.batch, side, side, 3), np.uint8)
  jax.block_until_ready(encoder(pixels))
  began, count = time.perf_counter(), 0
  while time.perf_counter() - began < 1.0:
    jax.block_until_ready(encoder(pixels))
    count += encoder.batch
  return count / (time.perf_counter() - began)


def _decoding_rate(
  folder: str | os.PathLike, frames: Mapping[str, np.ndarray], side: int
) -> float:
  """Returns how many frames a second all cores decode of such videos."""
  names = sorted(frames, key=lambda name: (len(frames[name]), name))
  names = [name for name in names if len(frames[name])]
  chosen = [
    names[i] for i in np.linspace(0, len(names) - 1, _DECODED).astype(int)
  ]
  began, count = time.perf_counter(), 0
  for name in dict.fromkeys(chosen):
    try:
      for part in video.decode_frames(
        pathlib.Path(folder) / name, frames[name][:_FRAMES], side, threads=1
      ):
        count += len(part)
    except UserError:
      continue
  took = time.perf_counter() - began
  return max(count, 1) / took * (os.cpu_count() or 1)


def training(
  experiment: Experiment, dataset: Dataset, workdir: pathlib.Path
) -> tuple[Stage, float]:
  """Forecasts the training, by a step that is taken on random contents.

  Args:
    experiment: of the training.
    dataset: see `settings.measure`.
    workdir: of the run.

  Returns:
    The stage, and the seconds in which a sample is read forward.

  Raises:
    UserError: the devices' memory does not hold the step.
  """
  plan = row_plan(experiment, dataset)
  counts = count_epoch(experiment, plan, workdir)
  steps, rows = total_steps(experiment, counts), experiment.batch_rows
  micro = sum(-(-n // rows) * k for n, k in counts.step_rows.items())
  micro = max(1.0, micro / epoch_steps(experiment, counts))
  try:
    with progress.step("timing a training step"):
      compiled, one, more = _time_step(experiment, dataset)
  except jax.errors.JaxRuntimeError as error:
    if "RESOURCE_EXHAUSTED" not in str(error):
      raise
    raise UserError(
      "the memory of the devices does not hold a training step of"
      f" {experiment.batch_rows} rows ({str(error).splitlines()[0]:.200}); use"
      " more devices, --set=model.remat=full, --set=batch_rows=N or a smaller"
      " model"
    ) from None
  step = one + (micro - 1) * more
  samples = counts.samples / counts.rows * rows
  forward = more * _FORWARD / samples
  every = experiment.eval_every
  evaluations = -(-steps // every) if every else 0
  rows_held = min(experiment.eval_rows, len(dataset.held_out))
  seconds = steps * step + evaluations * -(-rows_held // rows) * more * _FORWARD
  early = "; less if held-out answers stop getting better" if every else ""
  return (
    Stage(
      "train",
      seconds + compiled + _LOAD,
      f"at most {steps:,} steps of {experiment.batch_samples} samples,"
      f" {step:.2g} s each{early}",
    ),
    forward,
  )


def _time_step(
  experiment: Experiment, dataset: Dataset
) -> tuple[float, float, float]:
  """Returns seconds of compiling, of a step, and of a further micro-batch."""
  mesh = make_mesh(experiment.mesh)
  like, optimizer = abstract_state(experiment, mesh, 1000)
  state = jax.tree.map(
    lambda x: jnp.zeros(x.shape, x.dtype, device=x.sharding), like
  )
  step = TrainStep(experiment.model, optimizer, state_shardings(like))
  place = BatchSharding(mesh, experiment.row_spec, experiment.batch_rows)
  which = np.linspace(0, len(dataset.usable) - 1, experiment.batch_rows)
  drawn = synthetic.DrawnRows(
    dataset.columns,
    dataset.visual,
    [dataset.usable[[int(number)]] for number in which],
  )
  batch = place(
    synthetic.build_rows(
      drawn,
      list(place.local_rows),
      experiment.row_spec,
      experiment.sample_options,
      experiment.model.decoder.vocab,
    )
  )
  seconds = []
  for count in (1, 1, 1, 2, 2):
    began = time.perf_counter()
    state, _ = step(state, [batch] * count)
    jax.block_until_ready(state)
    seconds.append(time.perf_counter() - began)
  one, two = min(seconds[1:3]), min(seconds[3:])
  return max(seconds[0] - one, 0.0), one, max(two - one, 0.1 * one)


def asking(name: str, questions: int, forward: float) -> Stage:
  """Forecasts an evaluation.

  Args:
    name: of the stage.
    questions: that are asked.
    forward: seconds in which a sample is read forward.
  """
  return Stage(
    name,
    questions * (forward + _QUESTION) + _LOAD,
    f"{questions:,} held-out questions",
  )


def table(stages: Sequence[Stage]) -> str:
  """Returns the forecast as it is printed."""
  device = jax.devices()[0]
  lines = [f"about, on {jax.device_count()} x {device.device_kind}:"]
  lines += [
    f"  {stage.name:<18} {progress.duration(stage.seconds):>9}  {stage.detail}"
    for stage in stages
  ]
  total = sum(stage.seconds for stage in stages)
  return "\n".join([*lines, f"  {'all':<18} {progress.duration(total):>9}"])
