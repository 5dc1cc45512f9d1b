"""Plans as text: a page for one plan, a table for several."""

import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from hourjax import schema
from hourjax.errors import UserError
from hourjax.parallel.chips import GIB
from hourjax.planning.compiler.compiled_step import Memory
from hourjax.planning.plan import Plan, as_data
from hourjax.planning.roofline import HOST_READS, Estimate
from hourjax.planning.search import describe, row_options
from hourjax.planning.topology import parse_topology

_WIDE = 79


def page(plan: Plan) -> str:
  """Returns a page of text with everything that is known of a plan."""
  data = as_data(plan)
  lines = [*_folded(_title(data), ""), *_heading(data)]
  if plan.memory is None:
    return "\n".join([*lines, "", f"DOES NOT FIT: {data['reason']}"])
  lines += ["", *_rule("computed: what the compiler allots, GiB a device")]
  lines += _memory(plan.memory)
  lines += ["", *_rule("computed: TFLOP of a step, all chips")]
  lines += _flops(data["computed"])
  lines += ["", *_rule("computed: MiB that a device sends in a step")]
  lines += _traffic(data)
  known = plan.topology.measured
  kind = "GPU" if plan.topology.gpus else "TPU"
  how = "with constants that were measured" if known else f"no {kind} was timed"
  lines += ["", *_rule(f"estimated: {how}")]
  lines += _estimate(plan, data["estimated"])
  lines += ["", *_rule("assumed")]
  lines += [line for text in data["assumed"] for line in _folded(text)]
  return "\n".join(lines)


def text(plans: Sequence[Plan], searched: bool, remedy: Sequence[str]) -> str:
  """Returns what the command prints.

  Args:
    plans: the best first.
    searched: whether a search found them, which are compared then.
    remedy: options with which the best one fits, if it does not.
  """
  parts = [page(plans[0])]
  if searched:
    parts.append(compared(plans))
  if plans[0].fits:
    parts.append(f"the same in training: {flags(plans[0])}")
  if remedy:
    parts.append(f"fits with {' '.join(remedy)}")
  return "\n\n".join(parts)


def number(value: float) -> str:
  """Formats a number: three digits, or all those before the point.

  For example 1,234, 56.7 and 0.00123.
  """
  if not value or abs(value) >= 100:
    return f"{value:,.0f}"
  return f"{value:.3g}" if abs(value) >= 1e-4 else f"{value:.1e}"


def _rule(title: str) -> list[str]:
  return [f"{title} {'-' * max(0, _WIDE - len(title) - 1)}"]


def _title(data: Mapping[str, Any]) -> str:
  slices = f"{data['slices']} x " if data["slices"] > 1 else ""
  kind = "GPUs" if parse_topology(data["topology"]).gpus else "chips"
  return (
    f"{slices}{data['topology']}: {data['chips']} {kind}, {data['hosts']}"
    f" hosts; data {data['data']}"
  )


def _heading(data: Mapping[str, Any]) -> list[str]:
  mesh = " x ".join(f"{k} {v}" for k, v in data["mesh"].items())
  rows, samples = data["batch_rows"], data["batch_samples"]
  step = (
    f"{samples} samples a step in micro-batches of {rows} rows" if samples else
    f"{rows * data['accumulate']} rows a step in {data['accumulate']}"
    " micro-batches"
  )  # fmt: skip
  lines = _folded(f"mesh {mesh}; {step}; remat {data['remat']}", "")
  if "computed" in data:
    found = data["estimated"]
    if samples:
      lines += _folded(
        f"a step has {found['rows']:.1f} rows in {found['micro_batches']:.2f}"
        f" micro-batches on average, {found['empty']:.0%} of whose rows are"
        f" empty; an epoch has {found['steps']:,.0f} steps",
        "",
      )
    else:
      lines += _folded(
        f"a step has {found['samples']:.0f} samples on average; an epoch has"
        f" {found['steps']:,.0f} steps",
        "",
      )
    filled = ", ".join(
      f"{k} {v:.0%}" for k, v in data["computed"]["fill"].items()
    )
    each = data["computed"]["samples_a_row"]
    lines += _folded(f"a row holds {each:.1f} samples on average: {filled}", "")
  return lines


def _memory(memory: Memory) -> list[str]:
  names = ("parameters", "optimizer", "gradients", "batches", "temporaries")
  note = {
    "batches": "two micro-batches",
    "temporaries": f"activations and all else, in {memory.program!r}",
  }
  lines = [
    f"  {name:<14}{getattr(memory, name) / GIB:8.2f}   {note.get(name, '')}"
    for name in names
  ]
  verdict = "fits" if memory.fits else "DOES NOT FIT"
  lines.append(
    f"  {'total':<14}{memory.total / GIB:8.2f}   of {memory.limit / GIB:.2f}"
    f" ({memory.total / memory.limit:.0%}): {verdict}"
  )
  return [line.rstrip() for line in lines]


def _flops(computed: Mapping[str, Any]) -> list[str]:
  lines = [f"  {'':<24}{'forward':>10}{'backward':>10}{'again':>10}"]
  sums = [0.0, 0.0, 0.0]
  for name, part in computed["flops"].items():
    values = [part[key] / 1e12 for key in ("forward", "backward", "again")]
    if not any(values):
      continue
    sums = [a + b for a, b in zip(sums, values)]
    numbers = "".join(f"{number(value):>10}" for value in values)
    lines.append(f"  {name.replace('_', ' '):<24}{numbers}")
  lines.append(f"  {'total':<24}" + "".join(f"{number(x):>10}" for x in sums))
  useful, all_of_it = computed["useful_flops"] / 1e12, sum(sums)
  return lines + _folded(
    f"of {number(all_of_it)} executed {number(useful)} are useful"
    f" ({useful / all_of_it:.0%}): the rest fills rows up or is done again"
  )


def _traffic(data: Mapping[str, Any]) -> list[str]:
  lines = [
    f"  {'along':<16}{'waited for':>12}{'beside work':>13}{'seconds':>10}"
  ]
  for axes, sent in data["computed"]["sent_by_axis"].items():
    total = sum(sent.values())
    if total < 1 << 16:
      continue
    took = sum(data["estimated"]["axes"].get(axes, (0.0,)))
    lines.append(
      f"  {axes:<16}{sent['waited'] / 2**20:>12,.0f}"
      f"{sent['beside'] / 2**20:>13,.0f}{number(took):>10}"
    )
  if len(lines) == 1:
    return ["  nothing"]
  return [*lines, "  (seconds are estimated)"]


def _estimate(plan: Plan, found: Mapping[str, Any]) -> list[str]:
  waited = sum(a for a, _ in found["axes"].values())
  beside = sum(b for _, b in found["axes"].values())
  seconds = {
    key: number(found[key])
    for key in ("step", "hidden", "exposed", "compute", "balanced", "memory",
                "update")
  }  # fmt: skip
  parts = (
    "products {compute} (evenly spread {balanced}), HBM {memory}, traffic"
    f" {number(waited)} waited for and {number(beside)} beside, optimizer"
    " {update}"
  ).format(**seconds)
  share = found["host_bytes"] / HOST_READS
  hours = found["video_hours_a_day"]
  lines = [
    "  step {step} s ({hidden} if all traffic were hidden, {exposed} if"
    " none)".format(**seconds),
    *_folded(parts, "    "),
    f"  MFU {found['mfu']:.1%}; {hours:,.0f} hours of video a day",
  ]
  if plan.workload.samples > 1:
    lines.append(
      f"  an epoch of {plan.workload.samples / 1e6:.2f}M samples:"
      f" {number(found['days'])} days, ${found['cost']:,.0f} at"
      f" ${plan.price:.2f} {plan.unit_hour}"
    )
  return lines + _folded(
    f"each host reads {number(found['host_bytes'] / 1e9)} GB of features a"
    f" second ({share:.0%} of the 5 GB/s that one was measured to read)"
  )


def _folded(text: str, indent: str = "  ") -> list[str]:
  """Folds text into lines of the page's width; later lines are indented."""
  lines, line = [], indent
  for word in text.split():
    if len(line) + len(word) > _WIDE:
      lines.append(line.rstrip())
      line = indent + "  "
    line += word + " "
  return [*lines, line.rstrip()]


def compared(plans: Sequence[Plan]) -> str:
  """Returns what a search found: candidates of a slice, or several slices."""
  slices = {plan.topology.name for plan in plans}
  return ranking(plans) if len(slices) == 1 else frontier(plans)


def ranking(plans: Sequence[Plan]) -> str:
  """Returns the candidates of a search as text, a line each."""
  lines = [f"  {'GiB':>6}{'step':>8}{'rows':>6}{'MFU':>8}{'days':>8}  mesh"]
  for plan in plans:
    if plan.estimate is None or plan.memory is None:
      lines.append(f"  {'--':>6}{'':30}  {describe(plan.experiment)}")
      continue
    found = plan.estimate
    mark = "" if plan.fits else "  DOES NOT FIT"
    lines.append(
      f"  {plan.memory.total / GIB:6.2f}{found.step:8.2f}{found.rows:6.0f}"
      f"{found.mfu:8.1%}{found.days:8.2f}  {describe(plan.experiment)}{mark}"
    )
  return "\n".join(lines)


def frontier(plans: Sequence[Plan]) -> str:
  """Returns the best plans of several slices as a Markdown table.

  Args:
    plans: that fit, one of each slice.
  """
  ordered = sorted(plans, key=lambda plan: plan.topology.chips)
  cheapest = min(plans, key=lambda plan: _estimate_of(plan).cost)
  fastest = min(plans, key=lambda plan: _estimate_of(plan).days)
  lines = [
    "| slice | mesh (data, fsdp, seq, tensor) | rows, remat | GiB of | step, s"
    " | MFU | days | $ | |",
    "|" + "---|" * 9,
  ]
  before = None
  for plan in ordered:
    found, memory = _estimate_of(plan), plan.memory
    assert memory is not None  # of a plan that fits
    note = "; ".join(
      word
      for word, best in (("cheapest", cheapest), ("fastest", fastest))
      if plan is best
    )
    if before is not None:
      days, cost = (
        getattr(found, name) / getattr(_estimate_of(before), name) - 1
        for name in ("days", "cost")
      )
      note += f"{'; ' if note else ''}{days:+.0%} days, {cost:+.0%} $"
    before = plan
    lines.append(
      _joined(
        [
          plan.topology.name,
          ", ".join(map(str, plan.mesh.values())),
          f"{plan.experiment.batch_rows}, {plan.experiment.model.remat}",
          f"{memory.total / GIB:.1f} of {memory.limit / GIB:.2f}",
          number(found.step),
          f"{found.mfu:.1%}",
          number(found.days),
          f"{found.cost:,.0f}",
          note,
        ]
      )
    )
  return "\n".join(lines)


def _estimate_of(plan: Plan) -> Estimate:
  """Returns the estimate of a plan that was compiled."""
  assert plan.estimate is not None
  return plan.estimate


def flags(plan: Plan) -> str:
  """Returns the options that give training a plan's mesh and rows."""
  experiment = plan.experiment
  values = {
    **{f"mesh.{axis}": size for axis, size in plan.mesh.items()},
    **row_options(experiment),
    "model.remat": experiment.model.remat,
  }
  return " ".join(f"--config.{key}={value}" for key, value in values.items())


_COLUMNS = (
  "configuration", "chips", "mesh (data, fsdp, seq, tensor)", "rows",
  "GiB of", "step, s", "MFU", "video h/day", "epoch, days", "cost",
)  # fmt: skip


def table(paths: Iterable[str]) -> str:
  """Returns a Markdown table of plans that were written with --json.

  Args:
    paths: files, each of which holds a plan; its name stands in the table.

  Raises:
    UserError: a file that is missing or is no plan.
  """
  lines = [
    "| " + " | ".join(_COLUMNS) + " |",
    "|" + "---|" * len(_COLUMNS),
  ]
  for path in paths:
    try:
      data = schema.read_json(path, remedy="give another")
      lines.append(_row(pathlib.Path(path).stem, data))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
      reason = error if isinstance(error, UserError) else repr(error)
      raise UserError(
        f"--table: {path} holds no plan ({reason}); write it with --json"
      ) from None
  return "\n".join(lines)


def _row(name: str, data: Mapping[str, Any]) -> str:
  limit = parse_topology(data["topology"]).chip.usable
  mesh = ", ".join(str(size) for size in data["mesh"].values())
  # Written before a step could be a number of samples, the plan lacks them.
  times = f"{data['accumulate']}"
  if data.get("batch_samples") and "computed" in data:
    times = number(data["estimated"]["micro_batches"])
  rows = f"{data['batch_rows']} x {times}"
  start = [name, f"{data['chips']} ({data['topology']})", mesh, rows]
  if "computed" not in data:
    return _joined([*start, f"more than {limit}", *["--"] * 5])
  found = data["estimated"]
  total = data["computed"]["memory_bytes"]["total"] / GIB
  whole = data["data"].startswith("stage")
  hours = found["video_hours_a_day"]
  return _joined(
    [
      *start,
      f"{total:.1f} of {limit}" + ("" if data["fits"] else " (too much)"),
      number(found["step"]),
      f"{found['mfu']:.0%}",
      f"{hours:,.0f}" if hours else "--",
      f"{number(found['days'])}" if whole else "--",
      f"${found['cost']:,.0f}" if whole else "--",
    ]
  )


def _joined(cells: Sequence[str]) -> str:
  return "| " + " | ".join(cells) + " |"
