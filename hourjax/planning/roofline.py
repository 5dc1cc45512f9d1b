"""How long a step takes: an estimate, and what it takes for granted.

Operations, bytes in memory and bytes between devices are counted; how fast a
chip works them off is assumed (`parallel.chips`). Nothing here has been held
against a stopwatch on a TPU.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float64

from hourjax.kernels.ulysses import head_blocks
from hourjax.models.config import ModelConfig
from hourjax.models.flops import Flops, Work, count_flops
from hourjax.parallel.chips import Chip
from hourjax.planning.topology import Topology
from hourjax.planning.workload import Workload, trained
from hourjax.training.config import Experiment

HOP = 1e-6  # seconds that a collective takes for each device of its group
HOST_READS = 5e9  # bytes of features a second that a host reads (README)


def collective_seconds(
  line: Mapping[str, Any], links: Mapping[str, Any], chip: Chip
) -> float:
  """Time of one line of `traffic.by_axis`.

  A ring along a dimension of the torus uses both of a chip's links if the
  dimension is closed to a ring, else one of them at a time; dimensions add
  up. Where a group takes every k-th chip, k groups share the links. Between
  slices everything goes over the data-centre network.

  Args:
    line: with `sent` bytes, `count` and `devices`.
    links: of its axes, as `child.group_links` gives them.
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
  """Seconds of a program's traffic by axes: (waited for, beside others)."""
  found: dict[str, list[float]] = {}
  for line in program["traffic"]:
    entry = found.setdefault(line["axes"], [0.0, 0.0])
    took = collective_seconds(line, links[line["axes"]], chip)
    entry[line["asynchronous"]] += took
  return {axes: (waited, beside) for axes, (waited, beside) in found.items()}


# Operations that tiles of several segments, or half outside of a row, add.
PACKED = 1.05
CAUSAL_BLOCK = 1024  # splash skips whole blocks above the diagonal only
_ATTENTION = {
  "memaug_self_attention": "memaug",
  "memaug_cross_attention": "memaug",
  "decoder_attention": "causal",
}


@dataclasses.dataclass(frozen=True)
class Estimate:
  """Seconds of a step of one chip, and what follows from them.

  Attributes:
    components: operations of a step by component, of all chips: forward,
      backward, again.
    useful: operations that count for MFU.
    compute: seconds that the products of a step take on the slowest chip.
    balanced: the same if all rows held the same work.
    memory: seconds that a step's HBM traffic takes.
    axes: seconds of traffic by axes of the mesh, (waited for, overlapped).
    update: seconds of the optimizer, traffic included.
    step: seconds of a step; between `hidden` and `exposed`, which are those
      of all traffic overlapped and of none.
    mfu: useful operations a second as a share of the chips' bf16 peak.
    rows: of a step.
    video_hours_a_day: of video that is trained on.
    days: of an epoch.
    cost: of it.
    host_bytes: of features that a host must read a second.
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
  rows: int
  video_hours_a_day: float
  days: float
  cost: float
  host_bytes: float


def executed_work(
  experiment: Experiment, workload: Workload, mesh: Mapping[str, int]
) -> Work:
  """What the compiled step does for each drawn row, arrays [N].

  Linear layers see whole capacities, the tower too, and as many images as
  the devices that share a row divide; attention visits only tiles that meet,
  and the vocabulary only labelled positions. Where the decoder has fewer
  blocks of heads than `seq` has devices, several compute the same one.
  """
  spec, capacity = experiment.row_spec, experiment.rows
  drawn = workload.work
  whole = np.ones(len(workload.useful))
  sharing = mesh["seq"] * mesh["tensor"]
  images = sum(
    -(-count // sharing) * sharing
    for count in (capacity.frames, capacity.tiles)
  )
  copies = mesh["seq"] / head_blocks(
    experiment.model.decoder.heads // mesh["tensor"],
    max(1, experiment.model.decoder.kv_heads // mesh["tensor"]),
    mesh["seq"],
  )
  return Work(
    images=whole * images,
    stored=whole * capacity.features,
    encoded=whole
    * (capacity.frames * spec.frame_tokens + capacity.tiles * spec.tile_tokens),
    memory=whole * capacity.memory,
    queries=whole * capacity.queries,
    decoder=whole * capacity.decoder,
    labels=drawn.labels,
    self_pairs=drawn.self_pairs * PACKED,
    cross_pairs=drawn.cross_pairs * PACKED,
    causal_pairs=copies
    * (drawn.causal_pairs + drawn.decoder * CAUSAL_BLOCK / 2),
  )


def row_seconds(
  config: ModelConfig, work: Work, learnt: frozenset[str], chip: Chip
) -> Float64[np.ndarray, "N"]:
  """Seconds that one device would need for each row's products."""
  parts = count_flops(config, work, learnt, executed=True)
  rates = chip.efficiency
  seconds = np.zeros(np.shape(work.memory))
  for name, part in parts.items():
    if name in _ATTENTION:
      forward, backward = getattr(rates, _ATTENTION[name])
      seconds += part.forward / forward + part.backward / backward
    elif name == "tower":
      seconds += _tower_seconds(config, part, rates)
    else:
      seconds += part.total / rates.dense
  return seconds / chip.device_flops


def _tower_seconds(config, part, rates):
  """Of its operations a fixed share is attention: 4 P V of P x V x 8 V ..."""
  vision = config.vision
  patches, width = vision.side**2, vision.width
  dense = 2 * (4 * width**2 + 2 * width * vision.mlp)
  meet = 4 * patches * width
  share = meet / (meet + dense)
  return part.total * (share / rates.tower + (1 - share) / rates.dense)


def slowest(
  seconds: Float64[np.ndarray, "N"], rows: int, shards: int
) -> tuple[float, float]:
  """(expected time of a micro-batch, the same if it were spread evenly).

  Devices wait for one another at every gather of parameters, so a micro-batch
  takes as long as the shard whose rows are the most work. Micro-batches are
  consecutive rows of the plan.

  Args:
    seconds: of each drawn row, in the plan's order.
    rows: of a micro-batch.
    shards: among which they are split.
  """
  times = max(1, -(-4 * rows // len(seconds)))
  repeated = np.concatenate([np.roll(seconds, 7919 * i) for i in range(times)])
  batches = len(repeated) // rows
  split = repeated[: batches * rows].reshape(batches, shards, -1).sum(axis=2)
  return float(split.max(axis=1).mean()), float(split.mean())


def memory_bytes(
  experiment: Experiment, kinds: Mapping[str, int], mesh: Mapping[str, int]
) -> float:
  """Bytes that a device moves from and to HBM in a micro-batch, roughly.

  Parameters of every layer are gathered in bfloat16, and read, for each of
  three passes; gradients are written, summed and added in float32; each
  layer reads and writes its tokens' activations some times over; a sweep of
  MemAug's attention reads all keys for each tile of queries.
  """
  model, capacity = experiment.model, experiment.rows
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


def estimate(
  experiment: Experiment,
  topology: Topology,
  workload: Workload,
  compiled: Mapping[str, Any],
  price: float,
) -> Estimate:
  """The step's time from what was counted and compiled.

  A micro-batch takes the longest of its products, of its HBM traffic and of
  the traffic that the compiler runs beside them, and then the traffic that it
  waits for, by the compiler's schedule.

  Args:
    experiment: rows, accumulation and the model.
    topology: what it runs on.
    workload: the rows.
    compiled: as `child.compile_step` answers.
    price: $ of a chip-hour.
  """
  chip, mesh = topology.chip, compiled["mesh"]
  programs = compiled["programs"]
  learnt = trained(experiment)
  work = executed_work(experiment, workload, mesh)
  within = mesh["seq"] * mesh["tensor"]
  shards = mesh["data"] * mesh["fsdp"]
  seconds = row_seconds(experiment.model, work, learnt, chip) / within
  compute, balanced = slowest(seconds, experiment.batch_rows, shards)
  kinds = programs["accumulate"]["kinds"]
  bandwidth = chip.hbm_bandwidth / chip.devices
  memory = memory_bytes(experiment, kinds, mesh) / bandwidth
  axes = axis_seconds(programs["accumulate"], compiled["links"], chip)
  waited = sum(a for a, _ in axes.values())
  beside = sum(b for _, b in axes.values())
  state = programs["update"]["arguments"]
  update_axes = axis_seconds(programs["update"], compiled["links"], chip)
  update = 2 * state / bandwidth + sum(map(sum, update_axes.values()))
  times = experiment.accumulate
  busy = max(compute, memory)
  step = times * (max(busy, beside) + waited) + update
  rows = experiment.step_rows
  useful = float(workload.useful.mean()) * rows
  per_second = rows / step
  features = workload.sizes[:, 0].mean() * experiment.model.vision.width * 2
  components = count_flops(experiment.model, work, learnt, executed=True)
  days = workload.rows / per_second / 86400
  return Estimate(
    components={
      name: Flops(*(float(np.mean(x)) * rows for x in part))
      for name, part in components.items()
    },
    useful=useful,
    compute=times * compute,
    balanced=times * balanced,
    memory=times * memory,
    axes={k: (times * a, times * b) for k, (a, b) in axes.items()},
    update=update,
    step=step,
    hidden=times * max(busy, beside + waited) + update,
    exposed=times * (busy + beside + waited) + update,
    mfu=useful / step / (topology.devices * chip.device_flops),
    rows=rows,
    video_hours_a_day=float(workload.seconds.mean()) * per_second * 24,
    days=days,
    cost=days * 24 * topology.chips * price,
    host_bytes=float(features) * per_second / topology.hosts,
  )
