"""TPU slices: looked up, created, waited for and deleted."""

from __future__ import annotations

import json
import time
from typing import NamedTuple

from tpu.accelerators import Accelerator
from tpu.errors import LaunchError
from tpu.gcloud import Gcloud

# States of requests and nodes that hold no TPU (any more).
_GONE = ("SUSPENDED", "PREEMPTED", "TERMINATED", "STOPPED", "MISSING")
_READY = ("ACTIVE", "READY")


class Order(NamedTuple):
  """Describes the TPU to create.

  Attributes:
    name: of the TPU.
    accelerator: its type.
    slices: number of slices, more than 1 for multi-slice.
    queued: wait in the queue instead of failing if no TPU is free.
    spot: take a spot TPU, which may be preempted.
    reserved: take it from a reservation.
    flags: further flags of gcloud's create command.
  """

  name: str
  accelerator: Accelerator
  slices: int = 1
  queued: bool = False
  spot: bool = False
  reserved: bool = False
  flags: tuple[str, ...] = ()


class Slice(NamedTuple):
  """Names one node of Cloud TPU, its state and its number of hosts."""

  node: str
  state: str
  workers: int


class Tpu(NamedTuple):
  """Describes the TPU that exists under a name.

  Attributes:
    queued: it was requested as a queued resource.
    state: of the request, or of the node if it was not queued.
    why: Google's reason for a failure, else "".
    type: accelerator type.
    slices: its slices; empty until the request is granted.
  """

  queued: bool
  state: str
  why: str
  type: str
  slices: tuple[Slice, ...]

  @property
  def phase(self) -> str:
    """Returns "waiting", "ready", "gone" (preempted) or "failed"."""
    states = [self.state, *(piece.state for piece in self.slices)]
    if self.state == "FAILED":
      return "failed"
    if any(state in _GONE for state in states):
      return "gone"
    return "ready" if all(state in _READY for state in states) else "waiting"


def look(gcloud: Gcloud, name: str) -> Tpu | None:
  """Returns the TPU of a name, None if there is none."""
  request = _describe(gcloud, "queued-resources", name)
  if request is None:
    node = _describe(gcloud, "tpu-vm", name)
    if node is None:
      return None
    piece = _slice(name, node)
    return Tpu(False, piece.state, "", node.get("acceleratorType", ""),
               (piece,))  # fmt: skip
  state = request.get("state", {})
  why = state.get("failedData", {}).get("error", {}).get("message", "")
  spec = (request.get("tpu", {}).get("nodeSpec") or [{}])[0]
  slices = ()
  if state.get("state") == "ACTIVE":
    slices = tuple(
      _slice(node, _describe(gcloud, "tpu-vm", node))
      for node in _nodes(name, spec)
    )
  kind = spec.get("node", {}).get("acceleratorType", "")
  return Tpu(True, state.get("state", "UNKNOWN"), why, kind, slices)


def _assumed(gcloud: Gcloud, order: Order) -> Tpu:
  """Returns the TPU that `create` would make; prints the commands of `look`."""
  names = [order.name]
  if order.slices > 1:
    names = [f"{order.name}-{i}" for i in range(order.slices)]
  _describe(gcloud, "queued-resources", order.name)
  for node in names:
    _describe(gcloud, "tpu-vm", node)
  slices = (Slice(node, "READY", order.accelerator.workers) for node in names)
  kind = order.accelerator.type
  return Tpu(order.queued, "ACTIVE", "", kind, tuple(slices))


def find(gcloud: Gcloud, order: Order | None, name: str) -> Tpu:
  """Returns the TPU of a name; in a dry run, the one that was ordered.

  Raises:
    LaunchError: there is none, or a dry run does not know its type.
  """
  if gcloud.dry_run:
    if order is None:
      raise LaunchError("--dry_run asks nobody; give --accelerator as well")
    return _assumed(gcloud, order)
  tpu = look(gcloud, name)
  if tpu is None:
    raise LaunchError(
      f"there is no TPU {name} in {gcloud.zone}; `create` makes one, or correct"
      " --name, --zone and --project",
      kind="missing",
    )
  return tpu


def create(gcloud: Gcloud, order: Order) -> None:
  """Requests slices unless they exist.

  Failed requests and preempted slices are deleted first: they hold a name and
  quota, but no TPU.

  Raises:
    LaunchError: the request is refused, or the name has another type.
  """
  tpu = look(gcloud, order.name)
  if tpu and tpu.phase in ("gone", "failed"):
    gcloud.say(f"{order.name} is {tpu.state} and holds no TPU: deleting it")
    delete(gcloud, order.name, tpu)
    tpu = None
  if tpu and tpu.type not in ("", order.accelerator.type):
    raise LaunchError(
      f"{order.name} exists as {tpu.type}, --accelerator is"
      f" {order.accelerator.type}; take another --name, or delete it first"
    )
  if tpu:
    gcloud.say(f"{order.name} exists already: {tpu.state}")
    return
  try:
    _ask(gcloud, order)
  except LaunchError as error:
    if error.kind != "exists":
      raise
    gcloud.say(f"{order.name} exists already")


def wait(gcloud: Gcloud, order: Order, seconds: float) -> Tpu:
  """Waits until slices are ready; looks every `seconds` seconds.

  Raises:
    LaunchError: the request fails, or the slices are preempted.
  """
  name, said = order.name, None
  while True:
    tpu = find(gcloud, order, name)
    if tpu.phase == "ready":
      gcloud.say(f"{name}: {tpu.state}")
      return tpu
    if tpu.phase != "waiting":
      raise LaunchError(refusal(name, tpu))
    if tpu.state != said:
      said = tpu.state
      gcloud.say(f"{name}: {said}, waiting")
    time.sleep(seconds)


def refusal(name: str, tpu: Tpu) -> str:
  """Words the remedy for a failed request or a preempted TPU."""
  if tpu.phase == "failed":
    return (
      f"the request for {name} failed: {tpu.why or 'Google says no more'};"
      " mend that, or take another --zone or --accelerator, and `create` again"
    )
  states = ", ".join(f"{x.node} {x.state}" for x in tpu.slices) or tpu.state
  return (
    f"{name} was taken away ({states}); `create` again, or let `run"
    " --until_done` do so as often as it takes"
  )


def delete(gcloud: Gcloud, name: str, tpu: Tpu) -> None:
  """Deletes slices and the request for them."""
  try:
    if tpu.queued:
      gcloud("queued-resources", "delete", name, "--force")
    else:
      gcloud("tpu-vm", "delete", name)
  except LaunchError as error:
    if error.kind != "missing":
      raise


def _ask(gcloud: Gcloud, order: Order) -> None:
  """Runs gcloud's create command."""
  flags = [f"--accelerator-type={order.accelerator.type}"]
  if order.queued:
    flags.append(f"--runtime-version={order.accelerator.runtime}")
    if order.slices > 1:
      flags += [f"--node-count={order.slices}", f"--node-prefix={order.name}"]
    else:
      flags.append(f"--node-id={order.name}")
  else:
    flags.append(f"--version={order.accelerator.runtime}")
  flags += ["--spot"] if order.spot else []
  flags += ["--reserved"] if order.reserved else []
  group = "queued-resources" if order.queued else "tpu-vm"
  number = f"{order.slices} x " if order.slices > 1 else ""
  gcloud.say(f"asking for {number}{order.accelerator.type} in {gcloud.zone}")
  gcloud(group, "create", order.name, *flags, *order.flags)


def _nodes(name: str, spec: dict) -> list[str]:
  """Returns the names of a request's nodes."""
  many = spec.get("multisliceParams") or spec.get("multiNodeParams")
  if not many:
    return [spec.get("nodeId", name)]
  prefix = many.get("nodeIdPrefix", name)
  return [f"{prefix}-{i}" for i in range(int(many["nodeCount"]))]


def _slice(name: str, node: dict | None) -> Slice:
  """Reads gcloud's description of a node."""
  if node is None:
    return Slice(name, "MISSING", 0)
  workers = len(node.get("networkEndpoints", ()))
  return Slice(name, node.get("state", "UNKNOWN"), workers)


def _describe(gcloud: Gcloud, group: str, name: str) -> dict | None:
  """Returns gcloud's description of a resource, None if it is missing."""
  try:
    text = gcloud(group, "describe", name, "--format=json")
    return json.loads(text) if text else None  # nothing in a dry run
  except LaunchError as error:
    if error.kind == "missing":
      return None
    raise
