"""The search for the mesh and the rows per device with the shortest step.

Every mesh that divides devices and rows is judged by formulas first, with
every rematerialisation. Only the best of them are compiled, and the numbers of
the compiler decide.
"""

import dataclasses
import math
from collections.abc import (
  Callable,
  Collection,
  Iterator,
  Mapping,
  Sequence,
)
from typing import Any, get_args

from hourjax import progress
from hourjax.data.rows import RowSpec, Size
from hourjax.data.sequence_sharding import check_sequence_sharding
from hourjax.errors import UserError
from hourjax.models.config import Remat
from hourjax.models.params import param_axes, param_shapes
from hourjax.parallel.mesh import MeshConfig, divisors
from hourjax.parallel.rules import RULES
from hourjax.planning.compiler.compiled_step import (
  LIMIT,
  Compiled,
  compile_step,
)
from hourjax.planning.one_host import parameter_bytes, temporaries
from hourjax.planning.plan import Plan, evaluate
from hourjax.planning.topology import Topology
from hourjax.planning.workload import Workload, trained
from hourjax.training.config import Experiment
from hourjax.training.optimizer import component
from hourjax.training.train_step import accumulate_name

COMPILED = 4  # candidates of a topology
_ROWS = (1, 2, 3, 4, 6, 8, 12, 16)  # of a device group in a micro-batch
_STEP = (0.75, 1.34)  # of the configured rows of a step that are accepted
# Share of HBM that the formulas may fill: they leave out what they do not
# know. The compiler then decides.
ROOM = 0.95


def search(
  experiment: Experiment,
  topology: Topology,
  workload: Workload,
  *,
  price: float | None = None,
  count: int = COMPILED,
  limit: float = LIMIT,
  log: Callable[[str], None] = print,
) -> list[Plan]:
  """Compiles the best candidates and ranks their plans.

  Args:
    experiment: a configuration; its samples of a step are kept, or about its
      rows of a step.
    topology: the topology to run on.
    workload: the rows.
    price: $ of a chip-hour; None takes the example of the generation.
    count: candidates to compile.
    limit: seconds that the compiler may take for each candidate.
    log: called with a line about each candidate that is compiled.

  Returns:
    Plans, the shortest epoch first, and last those that do not fit.

  Raises:
    UserError: no mesh divides the rows, or no candidate could be compiled.
  """
  with progress.step("judging meshes by formulas"):
    judged = judge(experiment, topology, workload)
  if not judged:
    what, keys = (
      ("samples", "config.batch_samples")
      if experiment.batch_samples
      else ("rows", "config.batch_rows or config.accumulate")
    )
    raise UserError(
      f"--search: no mesh of {topology.devices} devices suits"
      f" {experiment.step_rows} {what} of a step; change {keys}"
    )
  fitting = [plan for plan in judged if _filled(plan) <= ROOM]
  if not fitting:
    fitting = [min(judged, key=_filled)]
  plans = []
  for number, plan in enumerate(fitting[:count]):
    log(f"compiling {number + 1} of {min(count, len(fitting))}:"
        f" {describe(plan.experiment)}")  # fmt: skip
    try:
      compiled = compile_step(plan.experiment, topology, workload, limit=limit)
    except UserError as error:
      log(f"  left out: {error}")
      continue
    plans.append(evaluate(plan.experiment, topology, workload, compiled, price))
  if not plans:
    raise UserError("--search: none of the candidates could be compiled")
  return sorted(plans, key=_order)


def search_slices(
  experiment: Experiment,
  topologies: Sequence[Topology],
  workload: Workload,
  *,
  price: float | None = None,
  count: int = COMPILED,
  limit: float = LIMIT,
  log: Callable[[str], None] = print,
) -> list[Plan]:
  """Searches several topologies; returns the best plan of each.

  Arguments are those of `search`, with several topologies.

  Returns:
    Plans, the cheapest epoch first. Topologies without a plan that fits are
    left out, and named by `log`. Of one topology all plans, as `search`.

  Raises:
    UserError: there is no plan that fits on any of them.
  """
  if len(topologies) == 1:
    return search(
      experiment, topologies[0], workload,
      price=price, count=count, limit=limit, log=log,
    )  # fmt: skip
  found = []
  for topology in topologies:
    log(f"{topology.name}:")
    try:
      plans = search(
        experiment, topology, workload,
        price=price, count=count, limit=limit, log=log,
      )  # fmt: skip
    except UserError as error:
      log(f"  left out: {error}")
      continue
    if plans[0].fits:
      found.append(plans[0])
    else:
      log("  left out: no candidate fits")
  if not found:
    names = ", ".join(topology.name for topology in topologies)
    raise UserError(f"--search: nothing fits on {names}; try larger slices")
  return sorted(found, key=lambda p: p.estimate.cost if p.estimate else 0.0)


def _filled(plan: Plan) -> float:
  """Returns the share of a device's memory that a plan takes."""
  if plan.memory is None:
    return math.inf
  return plan.memory.total / plan.memory.limit


def _order(plan: Plan) -> tuple[bool, float]:
  """Returns the key by which plans are sorted, the best first."""
  days = plan.estimate.days if plan.estimate else math.inf
  return not plan.fits, days


def describe(experiment: Experiment) -> str:
  """Returns the mesh and the rows in one line of text."""
  rows = ", ".join(f"{k}={v}" for k, v in row_options(experiment).items())
  return f"{experiment.mesh}; {rows}, remat={experiment.model.remat}"


def row_options(experiment: Experiment) -> dict[str, int]:
  """Returns the options of micro-batches, by their keys in the configuration.

  In batches of samples, `accumulate` is none of them.
  """
  options = {"batch_rows": experiment.batch_rows}
  if not experiment.batch_samples:
    options["accumulate"] = experiment.accumulate
  return options


def judge(
  experiment: Experiment, topology: Topology, workload: Workload
) -> list[Plan]:
  """Judges all candidates by formulas.

  Args:
    experiment: see `search`.
    topology: see `search`.
    workload: see `search`.

  Returns:
    Plans, the shortest epoch first.
  """
  judged = []
  counted = count_parameters(experiment)
  for candidate in candidates(experiment, topology):
    answer = formulas(candidate, topology, counted, workload.streams)
    judged.append(
      evaluate(candidate, topology, workload, Compiled(answer), 0.0)
    )
  return sorted(judged, key=_order)


def candidates(
  experiment: Experiment, topology: Topology
) -> Iterator[Experiment]:
  """Yields the experiment on every mesh that it can be split over.

  A mesh must divide the devices, the rows and the parameters.

  Args:
    experiment: its samples of a step are kept, or about its rows of a step.
    topology: the devices.
  """
  shapes, axes = param_shapes(experiment.model), param_axes(experiment.model)
  kv_heads = experiment.model.decoder.kv_heads
  for sizes in _meshes(topology.devices, kv_heads):
    mesh = MeshConfig(*sizes)
    if sizes[0] % topology.slices or not _divides(sizes, shapes, axes):
      continue
    try:
      for spec in experiment.row_specs.values():
        check_sequence_sharding(spec, mesh.seq)
    except UserError:
      continue
    for rows in _ROWS:
      batch = mesh.data * mesh.fsdp * rows
      accumulate = 1
      if experiment.batch_samples:
        if batch > experiment.batch_samples:
          continue
      else:
        accumulate = max(1, round(experiment.step_rows / batch))
        share = batch * accumulate / experiment.step_rows
        if not _STEP[0] <= share <= _STEP[1]:
          continue
      for remat in get_args(Remat):
        yield dataclasses.replace(
          experiment,
          model=dataclasses.replace(experiment.model, remat=remat),
          mesh=mesh,
          batch_rows=batch,
          accumulate=accumulate,
        )


def _meshes(devices: int, kv_heads: int) -> Iterator[tuple[int, int, int, int]]:
  """Yields sizes of (data, fsdp, seq, tensor) whose product is `devices`."""
  for tensor in (1, 2, 4):
    if kv_heads % tensor or devices % tensor:
      continue
    for seq in divisors(devices // tensor):
      rest = devices // tensor // seq
      for data in divisors(rest):
        yield data, rest // data, seq, tensor


def _divides(
  sizes: tuple[int, ...],
  shapes: Mapping[str, tuple[int, ...]],
  axes: Mapping[str, tuple[str | None, ...]],
) -> bool:
  """Returns whether a mesh divides all dimensions that are split over it."""
  mesh = dict(zip(("data", "fsdp", "seq", "tensor"), sizes))
  return all(
    axis is None
    or size % math.prod(mesh[name] for name in RULES.get(axis, ())) == 0
    for path, shape in shapes.items()
    for axis, size in zip(axes[path], shape)
  )


def count_parameters(experiment: Experiment) -> dict[str, float]:
  """Counts parameters.

  Returns:
    Numbers of float32 parameters, or as many as take the same memory: `tower`,
    of the tower; and of the rest `learnt`, which are trained, and `frozen`.
  """
  learnt = trained(experiment)
  if experiment.lora.rank:
    frozen, own = parameter_bytes(
      experiment.model, experiment.lora, tower=experiment.reads_pixels
    )
    return {"tower": 0.0, "learnt": own / 4, "frozen": frozen / 4}
  found = {"tower": 0.0, "learnt": 0.0, "frozen": 0.0}
  for path, shape in param_shapes(experiment.model).items():
    name = component(path)
    kind = "learnt" if name in learnt else "frozen"
    found["tower" if name == "vision" else kind] += math.prod(shape)
  return found


def formulas(
  experiment: Experiment,
  topology: Topology,
  counted: Mapping[str, float],
  streams: Collection[str] | None = None,
) -> dict[str, Any]:
  """Returns roughly what the compiler would find, without it.

  Args:
    experiment: what runs.
    topology: what it runs on.
    counted: what `count_parameters` returned for any mesh.
    streams: names in `experiment.row_specs`; None for all of them.

  Returns:
    Data of the form that `compile_worker.compile_programs` returns.
  """
  sizes = experiment.mesh.sizes(topology.devices)
  mesh = dict(zip(("data", "fsdp", "seq", "tensor"), sizes))
  split = mesh["fsdp"] * mesh["seq"] * mesh["tensor"]
  learns_tower = "vision" in trained(experiment)
  state = (counted["learnt"] / split
           + learns_tower * counted["tower"] / mesh["fsdp"])  # fmt: skip
  parameters = (counted["learnt"] + counted["frozen"]) / split + counted[
    "tower"
  ] / mesh["fsdp"]
  moments = 6 if experiment.optimizer.mu_dtype == "bfloat16" else 8
  rows = experiment.batch_rows / (mesh["data"] * mesh["fsdp"])
  kinds = {"parameters": int(4 * parameters), "gradients": int(4 * state)}
  programs = {}
  for stream, spec in experiment.row_specs.items():
    if streams is not None and stream not in streams:
      continue
    batch = int(rows * _batch_bytes(spec, mesh["seq"]))
    programs[accumulate_name(stream)] = {
      "kinds": kinds | {"batches": batch},
      "arguments": sum(kinds.values()) + batch,
      "temporaries": int(_temporaries(experiment, spec, mesh, rows)),
      "traffic": _traffic(experiment, spec.capacity, mesh, rows, counted),
      "seconds": 0.0,
    }
  return {
    "mesh": mesh,
    "links": _links(mesh, topology),
    "programs": programs
    | {
      "update": {
        "kinds": kinds | {"optimizer": int(moments * state)},
        "arguments": int((8 + moments) * state),
        "temporaries": 0,
        "traffic": [],
        "seconds": 0.0,
      },
    },
  }


def _batch_bytes(spec: RowSpec, seq: int) -> float:
  """Returns the bytes of one row's batch on one device."""
  rows = spec.capacity
  pixels = (rows.frames + rows.tiles) * spec.image_size**2 * 3
  numbers = 12 * rows.memory + 20 * rows.queries + 16 * rows.decoder
  return pixels + (rows.features * spec.width * 2 + numbers) / seq


def _temporaries(
  experiment: Experiment, spec: RowSpec, mesh: Mapping[str, int], rows: float
) -> float:
  """Returns bytes of temporaries of a device with so many rows.

  They are what layers keep, what is gathered, and the buffers of one layer.
  """
  model, capacity = experiment.model, spec.capacity
  decoder = model.decoder
  if model.memory_chunk:
    parts = temporaries(model, capacity, experiment.lora, model.offload)
    return rows * sum(parts.values())
  width, seq = decoder.width, mesh["seq"]
  full = model.remat == "full"
  # Bytes of a token in a layer: its input and attention's output; all outputs
  # of products; everything.
  kept = {
    "full": 4 * width,
    "dots": 12 * width + 4 * decoder.mlp,
    "none": 34 * width + 12 * decoder.mlp,
  }[model.remat]
  tokens = capacity.decoder * decoder.layers * kept / seq
  kept = {"full": 8, "dots": 36, "none": 60}[model.remat] * width
  memaug = model.memaug_layers * capacity.queries * kept
  memory = capacity.memory * width * 2 * 4 / seq
  queries = capacity.queries * width * 12
  vision = model.vision
  images = -(-(capacity.frames + capacity.tiles) // (seq * mesh["tensor"]))
  patch = vision.side**2 * vision.width * 2
  learns = "vision" in trained(experiment)
  tower = images * patch * (12 + (2 if full else 14) * vision.layers * learns)
  tower += (capacity.frames * spec.frame_tokens
            + capacity.tiles * vision.side**2) * width * 4  # fmt: skip
  # Embeddings gathered, and their gradient before it is summed.
  words = decoder.vocab * width * 18 / (seq * mesh["tensor"])
  # Gathered weights of a layer, and one gradient before it is summed.
  layer = 10 * width * decoder.mlp / mesh["tensor"]
  row = tokens + memaug / seq + memory + queries + tower
  code = 150 << 20
  # Of nine schedules of the compiler, for 3B in stage 3 on v5e, v5p and v6e, it
  # is between 9 % too little and 20 % too much; of "none" there was but one.
  return 1.07 * (rows * row + words + layer) + code


def _traffic(
  experiment: Experiment,
  capacity: Size,
  mesh: Mapping[str, int],
  rows: float,
  counted: Mapping[str, float],
) -> list[dict[str, Any]]:
  """Returns traffic in the form of `traffic.by_axis`.

  Counted are the weights three times in bfloat16, the gradients, MemAug's
  queries and the heads of the decoder's attention. Gradients are summed beside
  the product along the first axis, and what is left of them along the second.
  """
  model = experiment.model
  decoder = model.decoder
  weights = (counted["learnt"] + counted["frozen"]) / mesh["tensor"]
  width = decoder.width
  queries = model.memaug_layers * capacity.queries * width * 40 * rows
  heads = decoder.layers * capacity.decoder * width * 24 * rows / mesh["seq"]
  own = counted["learnt"] / (mesh["fsdp"] * mesh["seq"] * mesh["tensor"])
  hidden = (capacity.decoder * decoder.layers + 3 * capacity.queries
            * model.memaug_layers) * width * 2 / mesh["seq"]  # fmt: skip
  gradients = 4 * counted["learnt"] / mesh["tensor"]
  both = mesh["fsdp"] > 1 and mesh["seq"] > 1
  lines = {
    "fsdp+seq": (
      6 * weights + gradients,
      both * gradients / mesh["fsdp"],
      1000,
    ),
    "seq": (0.0, queries + heads, 40 * decoder.layers),
    "tensor": (0.0, 12 * hidden * rows, 8 * decoder.layers),
    "data": (0.0, 8 * own, 20),
  }
  found = []
  for axes, (beside, waited, count) in lines.items():
    devices = math.prod(mesh[name] for name in axes.split("+"))
    for asynchronous, sent in ((True, beside), (False, waited)):
      if devices > 1 and sent:
        found.append(
          {
            "axes": axes,
            "kind": "all",
            "dtype": "bf16",
            "devices": devices,
            "asynchronous": asynchronous,
            "guessed": False,
            "count": count,
            "sent": sent * (devices - 1) / devices,
          }
        )
  return found


def _links(mesh: Mapping[str, int], topology: Topology) -> dict[str, Any]:
  """Returns links in the form of `compiled_step.group_links`.

  Each axis is taken to lie along one dimension of the torus, and two axes
  along two; an axis of the dimension's length is a closed ring. GPUs are
  listed machine by machine, the devices of the last axis side by side.
  """
  if topology.gpus:
    return {
      axes: _links_of_gpus(mesh, axes.split("+"), topology.chip.host)
      for axes in ("fsdp+seq", "seq", "tensor", "data")
    }
  whole = max(topology.shape)

  def dim(devices: int) -> list[int]:
    return [min(devices, whole)] * 2 + [whole]

  both = [dim(mesh[name]) for name in ("fsdp", "seq") if mesh[name] > 1]
  slices = topology.slices
  return {
    "fsdp+seq": {"devices": 1, "slices": 1, "dims": both},
    **{
      name: {
        "devices": mesh[name],
        "slices": slices if name == "data" else 1,
        "dims": [dim(mesh[name])],
      }
      for name in ("seq", "tensor", "data")
    },
  }


def _links_of_gpus(
  mesh: Mapping[str, int], axes: Sequence[str], machine: int
) -> dict[str, Any]:
  """Returns the links of a group of GPUs that differ along these axes."""
  first = max(list(mesh).index(name) for name in axes)
  stride = math.prod([*mesh.values()][first + 1 :])
  count = math.prod(mesh[name] for name in axes)
  machines = max(1, min(count, count * stride // machine))
  return {"devices": count, "slices": machines, "dims": [[count] * 3]}
