"""The rows of a stage or of a dataset: samples, packed as training packs them.

The samples of a published stage are drawn (`stage_data`), those of a dataset
read; they are measured and packed by the code that does it in training.
"""

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float64, Int64

from hourjax.data import synthetic
from hourjax.data.columns import Columns
from hourjax.data.media.frame_rules import MIN_FRAMES, stored_feature_count
from hourjax.data.packing.row_plan import PlanOptions, RowPlan
from hourjax.data.pipeline import heavy_with_light
from hourjax.data.sample_sizes import (
  FIELDS,
  VideoInput,
  sample_sizes,
  video_input,
)
from hourjax.errors import UserError
from hourjax.models.flops import Work, sample_flops, sample_work
from hourjax.planning.stage_data import STAGES, Part, draw
from hourjax.training.config import Experiment
from hourjax.training.data_loader import open_dataset, plan_by_work

_DRAWN = 20_000  # samples; the stage's numbers are scaled up from them
_NO_STEPS = np.zeros(0, np.int64)


@dataclasses.dataclass(frozen=True)
class Workload:
  """Holds the rows of a training run, N of which have been drawn.

  Attributes:
    name: "stage3", or "video=3600".
    samples: how many samples an epoch has.
    rows: how many rows an epoch has.
    work: the work of each drawn row, arrays `[N]`.
    useful: operations of each drawn row that count for MFU.
    seconds: seconds of video in each drawn row.
    sizes: what the samples of each drawn row take of its capacities, `[N, 7]`.
    streams: names of the streams whose rows have a capacity of their own, as
      in `Experiment.row_specs`; "" for all others.
    stream: number in `streams` of each drawn row's, `[N]`.
    steps: rows of each drawn step of `config.batch_samples` samples, which
      follow one another; empty where a step is a number of rows, or each row
      is one sample.
    assumptions: what was assumed, a sentence each.
    drawn: the samples of each drawn row; None where each row is one sample.
  """

  name: str
  samples: float
  rows: float
  work: Work
  useful: Float64[np.ndarray, "N"]
  seconds: Float64[np.ndarray, "N"]
  sizes: Int64[np.ndarray, "N 7"]
  streams: tuple[str, ...]
  stream: Int64[np.ndarray, "N"]
  steps: Int64[np.ndarray, "K"]
  assumptions: tuple[str, ...]
  drawn: synthetic.DrawnRows | None = None


class Steps(NamedTuple):
  """Holds the micro-batches of a run's steps, and how large a step is.

  Attributes:
    order: the drawn rows of each micro-batch, by their numbers; an empty row
      of stream s has the number of all drawn rows, plus s.
    stream: of each micro-batch.
    micro_batches: of a step, on average.
    rows: of a step, on average; empty ones do not count.
    samples: of a step, on average.
    number: of steps of an epoch.
  """

  order: Int64[np.ndarray, "M R"]
  stream: Int64[np.ndarray, "M"]
  micro_batches: float
  rows: float
  samples: float
  number: float


def steps_of(experiment: Experiment, workload: Workload) -> Steps:
  """Puts the drawn rows into micro-batches, as training does.

  Steps that are a number of rows take consecutive ones; few drawn rows are
  repeated, in another place each time. In batches of samples, with
  `batch_rows` 2 and steps of 3 and 1 rows, of 4 drawn rows:

      0 1    2 4    3 4        4 is the empty row
  """
  each, count = experiment.batch_rows, len(workload.useful)
  if experiment.batch_samples:
    order, first = [], 0
    steps = workload.steps.tolist() or [experiment.batch_samples]
    for rows in steps:
      stream = int(workload.stream[first % count])
      filled = np.full(-(-rows // each) * each, count + stream)
      filled[:rows] = (first + np.arange(rows)) % count
      order += [
        heavy_with_light(part) for part in filled.reshape(-1, each).tolist()
      ]
      first += rows
    micro = np.array(order)
    return Steps(
      micro,
      _stream_of(workload, micro),
      len(micro) / len(steps),
      sum(steps) / len(steps),
      float(experiment.batch_samples),
      workload.samples / experiment.batch_samples,
    )
  times = max(1, -(-4 * each // count))
  numbers = np.arange(count)
  rows = np.concatenate([np.roll(numbers, 7919 * i) for i in range(times)])
  micro = rows[: len(rows) // each * each].reshape(-1, each)
  mean = workload.samples / workload.rows
  return Steps(
    micro,
    _stream_of(workload, micro),
    float(experiment.accumulate),
    float(experiment.step_rows),
    mean * experiment.step_rows,
    workload.rows / experiment.step_rows,
  )


def _stream_of(
  workload: Workload, order: Int64[np.ndarray, "M R"]
) -> Int64[np.ndarray, "M"]:
  """Returns the stream of each micro-batch: that of its first row."""
  empty = np.arange(len(workload.streams))
  return np.append(workload.stream, empty)[order[:, 0]]


def trained(experiment: Experiment) -> frozenset[str]:
  """Returns the components that are trained: their learning rate is not 0.

  With "adapters" among them, adapters of these are.
  """
  return experiment.trained_components


def stage_of(experiment: Experiment) -> str:
  """Returns the stage whose data a configuration takes, by what it trains."""
  found = trained(experiment)
  if "vision" in found:
    return "stage2"
  return "stage1" if found - {"adapters"} == {"memaug"} else "stage3"


def make_workload(experiment: Experiment, name: str = "") -> Workload:
  """Draws the rows of a stage, or makes rows that hold one sample each.

  Args:
    experiment: capacities, forgetting, and what is trained.
    name: "stage1" to "stage3"; the folder of a dataset; "video=SECONDS" for
      rows of one video each; "full" for rows that one sample fills; empty for
      `stage_of`.

  Raises:
    UserError: the name is unknown, or no row holds a sample.
  """
  name = name or stage_of(experiment)
  if name.startswith("video="):
    return _one_video(experiment, name)
  if name == "full":
    return _full(experiment)
  samples = take_samples(experiment, name)
  workload = pack(experiment, samples)
  left_out = _left_out(experiment, samples)
  return dataclasses.replace(
    workload, assumptions=(*workload.assumptions, *left_out)
  )


class Samples(NamedTuple):
  """Holds samples of a stage or a dataset, measured and not yet packed.

  Attributes:
    name: of the stage, or of the dataset's folder.
    columns: of the samples.
    video: the frames of their videos.
    sizes: what each takes of a row, `[N, 7]`.
    problems: why a sample fits no row whatever its stream's capacity, by its
      number.
    members: the samples to use, those with problems among them.
    total: how many samples the stage or dataset has.
    note: where they come from, a sentence.
  """

  name: str
  columns: Columns
  video: VideoInput
  sizes: Int64[np.ndarray, "N 7"]
  problems: dict[int, str]
  members: Int64[np.ndarray, "n"]
  total: float
  note: str


def take_samples(
  experiment: Experiment, name: str, option: str = "--data"
) -> Samples:
  """Takes samples of a stage, or of a dataset that `prepare` wrote.

  Args:
    experiment: forgetting, and the capacities of rows (`config.rows`; those of
      streams do not count yet).
    name: "stage1" to "stage3", or a folder.
    option: that gave the name, for the message.

  Raises:
    UserError: the name is unknown, or the dataset cannot be opened.
  """
  if pathlib.Path(name).is_dir():
    return _of_dataset(experiment, name)
  if name not in STAGES:
    others = ", video=SECONDS, full" if option == "--data" else ""
    raise UserError(
      f"{option}={name}: known are {', '.join(STAGES)}{others} and the folder"
      " of a dataset"
    )
  parts = STAGES[name]
  total = sum(part.samples for part in parts)
  scale = total / _DRAWN
  columns = draw(parts, scale, np.random.default_rng(0))
  stored = _stored(experiment, columns)
  sizes, problems = _measure(experiment, columns, stored)
  note = (
    f"{total / 1e6:.2f}M samples of {name} drawn 1 in {scale:.0f} from"
    " published counts and durations; texts, images and short videos as"
    " planning/stage_data.py assumes them"
  )
  return Samples(
    name, columns, _video_input(columns, stored), sizes, problems,
    np.arange(len(columns)), total, note,
  )  # fmt: skip


def _of_dataset(experiment: Experiment, folder: str) -> Samples:
  """Takes samples of a dataset; see `take_samples`."""
  dataset = open_dataset(
    dataclasses.replace(
      experiment,
      stream_rows={},
      data=dataclasses.replace(
        # A plan reads no pixels.
        experiment.data,
        dataset=folder,
        media=experiment.data.media or folder,
      ),
    )
  )
  total = len(dataset.usable)
  rng = np.random.default_rng(0)
  members = np.sort(rng.permutation(dataset.usable)[:_DRAWN])
  note = f"{len(members):,} of the {total:,} samples of {folder} were taken"
  return Samples(
    folder, dataset.columns, dataset.visual, dataset.sizes, {}, members, total,
    note,
  )  # fmt: skip


def fitting(experiment: Experiment, samples: Samples) -> np.ndarray:
  """Returns which of the samples' members fit a row of their stream, bool."""
  most = _most(experiment, samples.columns)[samples.members]
  within = (samples.sizes[samples.members] <= most).all(axis=1)
  return within & ~np.isin(samples.members, list(samples.problems))


def _most(experiment: Experiment, columns: Columns) -> np.ndarray:
  """Returns the capacities of the rows of each sample's stream, `[N, 7]`."""
  own = experiment.rows_by_stream
  most = [own.get(name, experiment.rows).astuple() for name in columns.streams]
  return np.array(most)[columns.stream]


def pack(
  experiment: Experiment, samples: Samples, stream: str | None = None
) -> Workload:
  """Packs samples into rows.

  Args:
    experiment: capacities, and what makes a step.
    samples: measured.
    stream: a name in `experiment.row_specs`, to pack its samples alone; None
      for all.

  Raises:
    UserError: no row holds a sample.
  """
  name, columns, sizes = samples.name, samples.columns, samples.sizes
  own = [name if name in experiment.rows_by_stream else ""
         for name in columns.streams]  # fmt: skip
  names = tuple(dict.fromkeys(own))
  of_stream = np.array([names.index(name) for name in own])[columns.stream]
  good = samples.members[fitting(experiment, samples)]
  usable = good
  if stream is not None:
    usable = good[of_stream[good] == names.index(stream)]
    names, of_stream = (stream,), np.zeros_like(of_stream)
  if not len(usable):
    raise UserError(
      f"--data={name}: no sample fits a row:"
      f" {next(iter(samples.problems.values()), 'of a stream')};"
      " --data=full takes rows that are filled"
    )
  batch = experiment.batch_samples
  # Of so few samples what is left over would count too much. Where a stream has
  # less than a step, its steps are made of what there is.
  fewest = np.bincount(columns.stream[usable])
  plan = RowPlan(
    sizes,
    experiment.rows,
    PlanOptions(
      batch_samples=batch,
      drop_last=bool(batch and fewest[fewest > 0].min() >= batch),
    ),
    members=usable,
    stream=columns.stream,
    **plan_by_work(experiment, sizes, columns.streams),
  )
  rows = [
    np.concatenate([np.array(group) for group in row])
    for row in plan.epoch_rows(0)
  ]
  seconds = np.where(
    columns.video >= 0, samples.video.duration[columns.video], 0
  )
  scale = samples.total / len(samples.members)
  return Workload(
    name,
    len(usable) * scale,
    # Scaled by samples, of which some may be left out of the drawn rows.
    len(rows) * scale * len(usable) / sum(map(len, rows)),
    **_rows(experiment, sizes, rows, seconds),
    streams=names,
    stream=of_stream[[row[0] for row in rows]],
    steps=np.array(plan.rows_by_window(0)) if batch else _NO_STEPS,
    assumptions=(samples.note,),
    drawn=synthetic.DrawnRows(columns, samples.video, rows),
  )


def _one_video(experiment: Experiment, name: str) -> Workload:
  """Returns rows that hold one video each, of the duration in the name."""
  text = name.removeprefix("video=")
  if not text.isdigit() or not int(text):
    raise UserError(f"--data={name}: give whole seconds, such as video=3600")
  parts = (Part("marathon", 1, ""),)
  columns = draw(parts, 1.0, np.random.default_rng(0))
  columns = dataclasses.replace(columns, duration=np.array([float(text)]))
  sizes, problems = _measure(experiment, columns, np.ones(1, bool))
  if problems:
    raise UserError(f"--data={name}: a row does not hold it: {problems[0]}")
  return Workload(
    name,
    1,
    1,
    **_rows(experiment, sizes, [np.array([0])], columns.duration),
    streams=("",),
    stream=np.zeros(1, np.int64),
    steps=_NO_STEPS,
    assumptions=(f"every row holds one video of {text} s and 5 questions",),
  )


def _full(experiment: Experiment) -> Workload:
  """Returns rows that one sample fills."""
  size = np.array([experiment.rows.astuple()], np.int64)
  frames = experiment.rows.frames
  frames += experiment.rows.features / experiment.row_spec.frame_tokens
  return Workload(
    "full",
    1,
    1,
    **_rows(experiment, size, [np.array([0])], np.array([frames])),
    streams=("",),
    stream=np.zeros(1, np.int64),
    steps=_NO_STEPS,
    assumptions=("every row is filled by one sample, at one frame a second",),
  )


def _rows(
  experiment: Experiment,
  sizes: np.ndarray,
  rows: Sequence[np.ndarray],
  seconds: np.ndarray,
) -> dict[str, Any]:
  """Returns sums over the samples of each row, as fields of a `Workload`.

  Args:
    experiment: the model, and what is trained.
    sizes: sizes of all samples, `[samples, 7]`.
    rows: for each row the numbers of its samples.
    seconds: seconds of video of each sample.
  """
  config = experiment.model
  order = np.concatenate(rows)
  starts = np.cumsum([0, *(len(row) for row in rows[:-1])])

  def summed(values: Any) -> np.ndarray:
    return np.add.reduceat(np.asarray(values)[order], starts, axis=0)

  work = sample_work(config, sizes)
  return {
    "work": Work(*(summed(column) for column in work)),
    "useful": summed(sample_flops(config, sizes, trained(experiment))),
    "seconds": summed(seconds.astype(np.float64)),
    "sizes": summed(sizes),
  }


def _measure(
  experiment: Experiment, columns: Columns, stored: np.ndarray
) -> tuple[np.ndarray, dict[int, str]]:
  """Returns the sizes of samples, and problems by the number of the sample."""
  return sample_sizes(
    columns,
    _video_input(columns, stored),
    tokenizer=synthetic.tokenizer(),
    spec=experiment.row_spec,
    forgetting=experiment.forgetting,
    max_length=experiment.max_length,
    single_image=experiment.data.single_image,
  )


def _stored(experiment: Experiment, columns: Columns) -> np.ndarray:
  """Returns which of the drawn videos come as stored features, bool `[M]`.

  VideoMarathon's do. Short videos come as pixels, as in the published stages 2
  and 3, where rows of their stream have room for frames, and else as features.
  """
  if not experiment.rows_by_stream.get("short", experiment.rows).frames:
    return np.ones(len(columns.videos), bool)
  stored = np.zeros(len(columns.videos), bool)
  if "marathon" in columns.sources:
    of_marathon = columns.source == columns.sources.index("marathon")
    stored[columns.video[of_marathon & (columns.video >= 0)]] = True
  return stored


def _video_input(columns: Columns, stored: np.ndarray) -> VideoInput:
  """Returns the frames of the drawn videos.

  Args:
    columns: the samples.
    stored: bool `[M]`, whether a video's frames are features that extraction
      stores, or pixels.
  """
  found = video_input(columns, None)
  for i in np.flatnonzero(stored).tolist():
    seconds = float(columns.duration[i])
    count = max(int(seconds), MIN_FRAMES)
    found.num_frames[i] = stored_feature_count(count, seconds)
  return found._replace(stored=stored)


def _left_out(experiment: Experiment, samples: Samples) -> list[str]:
  """Returns sentences on the samples that fit no row, by kind.

  Args:
    experiment: with the capacities of rows.
    samples: measured.
  """
  columns, problems = samples.columns, samples.problems
  over = samples.sizes > _most(experiment, columns)
  unfit = samples.members[~fitting(experiment, samples)]
  notes = []
  for number, kind in enumerate(columns.sources):
    left = unfit[columns.source[unfit] == number].tolist()
    if not left:
      continue
    names = [FIELDS[k] for k in np.flatnonzero(over[left].any(axis=0))]
    why = (
      f"they fit no row's {', '.join(names)}" if names else problems[left[0]]
    )
    of_kind = (columns.source[samples.members] == number).sum()
    share = len(left) / of_kind
    notes.append(f"{share:.1%} of the samples of kind {kind} left out: {why}")
  return notes
