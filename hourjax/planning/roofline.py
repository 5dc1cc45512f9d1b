"""The estimate of how long a step takes.

Operations, bytes in memory and bytes between devices are counted; how fast a
chip works is assumed (`parallel.chips`), or what a user has measured
(`calibration`). No TPU was timed to check what is assumed.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float64

from hourjax.data.rows import Size
from hourjax.kernels.ulysses import head_blocks
from hourjax.models.config import ModelConfig
from hourjax.models.flops import Flops, Work, count_flops
from hourjax.parallel.chips import Chip
from hourjax.planning.topology import Topology
from hourjax.planning.workload import Workload, steps_of, trained
from hourjax.training.config import Experiment
from hourjax.training.train_step import accumulate_name

HOP = 1e-6  # seconds that a collective takes for each device of its group
# Bytes of features that a host reads a second, as measured; see
# hourjax/benchmarks/README.md.
HOST_READS = 5e9


def collective_seconds(
  line: Mapping[str, Any], links: Mapping[str, Any], chip: Chip
) -> float:
  """Returns the seconds that one line of `traffic.by_axis` takes.

  A ring along a dimension of the torus uses both of a chip's links if the
  dimension is closed to a ring, else one of them at a time; dimensions add
  up. Where a group takes every k-th chip, k groups share the links. Between
  slices everything goes over the data-centre network.

  Args:
    line: one total, with `sent` bytes, `count` and `devices`.
    links: where the devices of its axes lie, as `compiled_step.group_links`
      describes it.
    chip: the generation.
  """
  latency = line["count"] * line["devices"] * HOP
  if links["slices"] > 1:
    near = links["devices"] / links["slices"]
    return line["sent"] / near / chip.dcn * chip.devices + latency
  ways = 0.0
  for places, distance, whole in links["dims"]:
    ring = whole % chip.wraps == 0 and distance == whole
    ways += (2 if ring else 1) * places / distance
  if not ways:  # two devices of one chip
    return line["sent"] / (chip.hbm_bandwidth / chip.devices) + latency
  return line["sent"] * chip.devices / (chip.link * ways) + latency


def axis_seconds(
  program: Mapping[str, Any], links: Mapping[str, Any], chip: Chip
) -> dict[str, tuple[float, float]]:
  """Returns the seconds that a program's traffic takes, by axes.

  Args:
    program: a program with its `traffic`.
    links: by axes, where the devices lie.
    chip: the generation.

  Returns:
    By axes, seconds of the traffic that the program waits for, and of the
    traffic that runs beside other work.
  """
  found: dict[str, list[float]] = {}
  for line in program["traffic"]:
    entry = found.setdefault(line["axes"], [0.0, 0.0])
    took = collective_seconds(line, links[line["axes"]], chip)
    entry[line["asynchronous"]] += took
  return {axes: (waited, beside) for axes, (waited, beside) in found.items()}


# Factor of the operations that attention adds in tiles that hold several
# segments, or that lie partly outside of a row.
PACKED = 1.05
# Causal attention skips above the diagonal only whole chunks of keys for whole
# tiles of queries, and masks what the diagonal crosses: about as much work as
# half of this many keys for each query.
CAUSAL_BLOCK = 1024
_ATTENTION = {
  "memaug_self_attention": "memaug",
  "memaug_cross_attention": "memaug",
  "decoder_attention": "causal",
}


@dataclasses.dataclass(frozen=True)
class Estimate:
  """Holds the estimated seconds of a step, and what follows from them.

  Attributes:
    components: by component, operations of a step of all chips: forward,
      backward, and again (what the backward pass computes a second time).
    useful: operations of a step that count for MFU.
    compute: seconds that the products of a step take on the slowest chip.
    balanced: the same if all rows held the same work.
    memory: seconds that a step's HBM traffic takes.
    axes: by axes of the mesh, seconds of the traffic that a step waits for,
      and of the traffic beside other work.
    update: seconds of the optimizer, traffic included.
    step: seconds of a step.
    hidden: seconds of a step if all traffic ran beside other work.
    exposed: seconds of a step if none did.
    mfu: useful operations a second as a share of the chips' bf16 peak.
    rows: rows of a step, on average; empty ones do not count.
    samples: samples of a step, on average.
    micro_batches: micro-batches of a step, on average.
    empty: share of the rows of micro-batches that are empty, which cost as
      much as others but for attention and the vocabulary.
    steps: steps of an epoch.
    video_hours_a_day: hours of video that are trained on in a day.
    days: days of an epoch.
    cost: $ of an epoch.
    host_bytes: bytes of features that a host must read a second.
  """

  components: dict[str, Flops]
  useful: float
  compute: float
  balanced: float
  memory: float
  axes: dict[str, tuple[float, float]]
  update: float
  step: float
  hidden: float
  exposed: float
  mfu: float
  rows: float
  samples: float
  micro_batches: float
  empty: float
  steps: float
  video_hours_a_day: float
  days: float
  cost: float
  host_bytes: float


def executed_work(
  experiment: Experiment, workload: Workload, mesh: Mapping[str, int]
) -> Work:
  """Returns the work that the compiled step does for each row.

  Linear layers and the tower compute whole capacities, padding included, and
  images are filled up to a multiple of the devices that share a row.
  Attention computes only tiles whose queries and keys share a segment, and
  the vocabulary only positions with a label. Where the decoder has fewer
  blocks of heads than `seq` has devices, several compute the same block.

  Args:
    experiment: the configuration.
    workload: the N drawn rows.
    mesh: sizes of the mesh by axis.

  Returns:
    Counts of work of each drawn row and, last, of an empty row of each of the
    K streams, arrays `[N + K]`.
  """
  spec, specs = experiment.row_spec, experiment.row_specs
  none = np.zeros(len(workload.streams))
  drawn = Work(*(np.append(column, none) for column in workload.work))
  of_stream = [specs[name].capacity.astuple() for name in workload.streams]
  rows = np.append(workload.stream, np.arange(len(none)))
  columns = np.array(of_stream, np.float64)[rows].T
  capacity = dict(zip(Size.names(), columns))
  sharing = mesh["seq"] * mesh["tensor"]
  images = sum(
    np.ceil(count / sharing) * sharing
    for count in (capacity["frames"], capacity["tiles"])
  )
  copies = mesh["seq"] / head_blocks(
    experiment.model.decoder.heads // mesh["tensor"],
    max(1, experiment.model.decoder.kv_heads // mesh["tensor"]),
    mesh["seq"],
  )
  return Work(
    images=images,
    stored=capacity["features"],
    encoded=capacity["frames"] * spec.frame_tokens
    + capacity["tiles"] * spec.tile_tokens,
    memory=capacity["memory"],
    queries=capacity["queries"],
    decoder=capacity["decoder"],
    labels=drawn.labels,
    self_pairs=drawn.self_pairs * PACKED,
    cross_pairs=drawn.cross_pairs * PACKED,
    causal_pairs=copies
    * (drawn.causal_pairs + drawn.decoder * CAUSAL_BLOCK / 2),
  )


def row_seconds(
  config: ModelConfig, work: Work, learnt: frozenset[str], chip: Chip
) -> Float64[np.ndarray, "N"]:
  """Returns the seconds that one device would need for each row's products.

  Args:
    config: the model.
    work: the work of each row, arrays `[N]`.
    learnt: components that are trained.
    chip: the generation.
  """
  parts = component_seconds(config, work, learnt, chip)
  return np.asarray(sum(parts.values()), np.float64)


def component_seconds(
  config: ModelConfig, work: Work, learnt: frozenset[str], chip: Chip
) -> dict[str, Float64[np.ndarray, "N"]]:
  """Returns the seconds of `row_seconds` by component.

  Args:
    config: the model.
    work: the work of each row, arrays `[N]`.
    learnt: components that are trained.
    chip: the generation.
  """
  parts = count_flops(config, work, learnt, executed=True)
  rates, found = chip.efficiency, {}
  for name, part in parts.items():
    if name in _ATTENTION:
      forward, backward = getattr(rates, _ATTENTION[name])
      slowed = part.forward / forward + part.backward / backward
    elif name == "tower":
      share = tower_attention_share(config)
      slowed = part.total * (share / rates.tower + (1 - share) / rates.dense)
    else:
      slowed = part.total / rates.dense
    found[name] = np.asarray(slowed) / chip.device_flops
  return found


def tower_attention_share(config: ModelConfig) -> float:
  """Returns the share of the tower's operations that is its attention.

  It runs at another rate than the rest, which are products with weights.
  """
  vision = config.vision
  patches, width = vision.side**2, vision.width
  # For each patch of a layer: products with weights, and both of attention's.
  dense = 2 * (4 * width**2 + 2 * width * vision.mlp)
  meet = 4 * patches * width
  return meet / (meet + dense)


def slowest(
  seconds: Float64[np.ndarray, "M R"], shards: int
) -> tuple[float, float]:
  """Returns the expected time of a micro-batch.

  Devices wait for one another at every gather of parameters, so a micro-batch
  takes as long as the shard whose rows are the most work.

  Args:
    seconds: seconds of each row of each micro-batch.
    shards: shards among which the rows are split.

  Returns:
    The time of the slowest shard on average, and the time of a shard if all
    were alike.
  """
  split = seconds.reshape(len(seconds), shards, -1).sum(axis=2)
  return float(split.max(axis=1).mean()), float(split.mean())


def memory_bytes(
  experiment: Experiment,
  capacity: Size,
  kinds: Mapping[str, int],
  mesh: Mapping[str, int],
) -> float:
  """Estimates the bytes that a device moves from and to HBM in a micro-batch.

  Parameters of every layer are gathered in bfloat16, and read, for each of
  three passes; gradients are written, summed and added in float32; each
  layer reads and writes the activations of its tokens several times; MemAug's
  attention reads all keys once for each tile of queries.

  Args:
    experiment: the configuration.
    capacity: of the rows.
    kinds: bytes of a device by what they are, see
      `compiled_step.argument_kinds`.
    mesh: sizes of the mesh by axis.
  """
  model = experiment.model
  decoder = model.decoder
  split = mesh["fsdp"] * mesh["seq"]
  weights = kinds["parameters"] * split / 4 * 2
  parameters = 3 * 2 * weights + kinds["gradients"] * (split / 2 + 2)
  shards = mesh["data"] * mesh["fsdp"]
  rows = experiment.batch_rows / shards / mesh["seq"]
  passes = 3 * 2  # in bfloat16
  narrow = 14 * decoder.width
  tokens = capacity.decoder * decoder.layers * (
    narrow + 5 * decoder.mlp / mesh["tensor"]
  ) + model.memaug_layers * (
    capacity.queries * (narrow + 12 * decoder.width)
    + 6 * capacity.memory * decoder.width
  )
  tower = (
    (capacity.frames + capacity.tiles)
    * model.vision.side**2
    * model.vision.layers
    * (14 * model.vision.width + 3 * model.vision.mlp)
    * 2
    / mesh["tensor"]
  )
  keys = 2 * decoder.kv_heads * decoder.head_size * 2
  sweeps = capacity.queries / (1024 * decoder.kv_heads / decoder.heads)
  sweep = 2 * model.memaug_layers * capacity.memory * keys * sweeps
  return float(
    parameters
    + rows * (passes * tokens + tower)
    + rows * sweep / mesh["tensor"]
  )


@dataclasses.dataclass
class _Passes:
  """Adds up seconds of a step's micro-batches; fields as in `Estimate`."""

  compute: float = 0.0
  balanced: float = 0.0
  memory: float = 0.0
  step: float = 0.0
  hidden: float = 0.0
  exposed: float = 0.0
  axes: dict[str, tuple[float, float]] = dataclasses.field(default_factory=dict)

  def add(
    self,
    times: float,
    compute: float,
    balanced: float,
    memory: float,
    axes: Mapping[str, tuple[float, float]],
  ) -> None:
    """Adds micro-batches of one stream.

    Args:
      times: how many a step has.
      compute: seconds of one of them; so are the following.
      balanced: see `Estimate`.
      memory: see `Estimate`.
      axes: see `Estimate`.
    """
    waited = sum(a for a, _ in axes.values())
    beside = sum(b for _, b in axes.values())
    busy = max(compute, memory)
    self.compute += times * compute
    self.balanced += times * balanced
    self.memory += times * memory
    self.step += times * (max(busy, beside) + waited)
    self.hidden += times * max(busy, beside + waited)
    self.exposed += times * (busy + beside + waited)
    for name, (a, b) in axes.items():
      before = self.axes.get(name, (0.0, 0.0))
      self.axes[name] = (before[0] + times * a, before[1] + times * b)


def estimate(
  experiment: Experiment,
  topology: Topology,
  workload: Workload,
  compiled: Mapping[str, Any],
  price: float,
) -> Estimate:
  """Estimates the time of a step from what was counted and compiled.

  A micro-batch takes as long as the longest of three: its products, its HBM
  traffic, and the traffic that the compiler runs beside them. To this the
  traffic is added for which it waits by the compiler's schedule.

  Args:
    experiment: rows, accumulation and the model.
    topology: what it runs on.
    workload: the rows.
    compiled: what `compile_worker.compile_programs` returned.
    price: $ of a chip-hour.
  """
  chip, mesh = topology.chip, compiled["mesh"]
  programs = compiled["programs"]
  learnt = trained(experiment)
  work = executed_work(experiment, workload, mesh)
  within = mesh["seq"] * mesh["tensor"]
  shards = mesh["data"] * mesh["fsdp"]
  seconds = row_seconds(experiment.model, work, learnt, chip) / within
  steps = steps_of(experiment, workload)
  bandwidth = chip.hbm_bandwidth / chip.devices
  times = steps.micro_batches
  total = _Passes()
  for number, stream in enumerate(workload.streams):
    program = programs[accumulate_name(stream)]
    capacity = experiment.row_specs[stream].capacity
    own = steps.stream == number
    total.add(
      times * float(own.mean()),
      *slowest(seconds[steps.order[own]], shards),
      memory_bytes(experiment, capacity, program["kinds"], mesh) / bandwidth,
      axis_seconds(program, compiled["links"], chip),
    )
  state = programs["update"]["arguments"]
  update_axes = axis_seconds(programs["update"], compiled["links"], chip)
  update = 2 * state / bandwidth + sum(map(sum, update_axes.values()))
  step = total.step + update
  useful = float(workload.useful.mean()) * steps.rows
  per_second = steps.rows / step
  features = workload.sizes[:, 0].mean() * experiment.model.vision.width * 2
  components = count_flops(experiment.model, work, learnt, executed=True)
  # Rows of a step with the empty ones, each of which is as often in `order`.
  filled = times * experiment.batch_rows
  row_of_step = filled * np.bincount(
    steps.order.ravel(), minlength=len(seconds)
  ) / steps.order.size  # fmt: skip
  days = steps.number * step / 86400
  return Estimate(
    components={
      name: Flops(*(float(np.sum(x * row_of_step)) for x in part))
      for name, part in components.items()
    },
    useful=useful,
    compute=total.compute,
    balanced=total.balanced,
    memory=total.memory,
    axes={k: (a, b) for k, (a, b) in total.axes.items()},
    update=update,
    step=step,
    hidden=total.hidden + update,
    exposed=total.exposed + update,
    mfu=useful / step / (topology.devices * chip.device_flops),
    rows=steps.rows,
    samples=steps.samples,
    micro_batches=times,
    empty=float((steps.order >= len(workload.useful)).mean()),
    steps=steps.number,
    video_hours_a_day=float(workload.seconds.mean()) * per_second * 24,
    days=days,
    cost=days * 24 * topology.chips * price,
    host_bytes=float(features) * per_second / topology.hosts,
  )
