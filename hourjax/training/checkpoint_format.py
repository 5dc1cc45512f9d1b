"""Keeps a library's pages about an error from hiding our line about it."""
# MERGED hourjax.training.checksums:
# Checksums of arrays: computed on the devices, the same for any sharding.
#
# Orbax restores a file whose array bytes have changed without a word (measured
# flipped bytes in a data file came back as other numbers). Sums over files wou
# mean that one host reads back what all hosts wrote; a sum over the arrays cos
# one pass over their memory on all devices together.
# MERGED hourjax.training.saved:
# One checkpoint on disk: what it says of itself, and its arrays, verified.
#
#     checkpoints/120/about   JSON: step, position, plan, configuration, versio
#                             and, of every array, shape, dtype and checksum
#     checkpoints/120/state   the arrays, as Orbax writes them
#
# A folder appears under its number only when it is complete, and by what it
# says of itself it can be told from one that was damaged later. Every process
# reads for itself: nothing here waits for another one.

import contextlib
import functools
import json
import logging
import math
import os
import sys
import warnings
import zlib
from collections.abc import Iterator, Mapping
from importlib import metadata
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pydantic
from absl import logging as absl_logging
from etils import epath

from hourjax import schema
from hourjax.errors import UserError


@functools.cache  # once is enough
def quiet_orbax() -> None:
  """Orbax tells no one but us of reads and writes that fail.

  Each of its errors is raised as well, and then we say it. Beside that it logs
  every thread's traceback, and asyncio what became of the other arrays: a full
  disk was 190 KB on the screen, a damaged file half of that.
  """
  absl_logging.get_absl_logger().addFilter(_not_of_orbax)
  logging.getLogger("asyncio").addFilter(_not_abandoned)
  warnings.filterwarnings("ignore", "coroutine .* was never awaited")
  sys.unraisablehook = functools.partial(_unraisable, sys.unraisablehook)


def _not_of_orbax(record: logging.LogRecord) -> bool:
  inside = f"{os.sep}orbax{os.sep}" in record.pathname
  return not inside or record.levelno < logging.ERROR


def _not_abandoned(record: logging.LogRecord) -> bool:
  return "exception was never retrieved" not in record.getMessage()


def _unraisable(before, unraisable) -> None:
  """Leaves out coroutines of Orbax and what comes after their loop's end."""
  late = str(unraisable.exc_value) == "Event loop is closed"
  trace, inside = unraisable.exc_traceback, False
  while trace is not None and not inside:
    inside = f"{os.sep}orbax{os.sep}" in trace.tb_frame.f_code.co_filename
    trace = trace.tb_next
  if not late and not inside:
    before(unraisable)


_WIDTHS = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}


def named_arrays(tree: Any) -> dict[str, Any]:
  """The leaves of a tree by path, as "trained/decoder/norm/scale"."""
  leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
  return {
    jax.tree_util.keystr(path, simple=True, separator="/"): leaf
    for path, leaf in leaves
  }


def checksums(tree: Any) -> dict[str, int]:
  """A 32-bit sum of every array of a tree, by path.

  Any single changed element changes the sum; other differences, elements that
  changed places among them, go unseen with chance 2^-32. A host needs only its
  own shards.
  """
  named = named_arrays(tree)
  if not named:
    return {}
  sums = np.asarray(_sums(list(named.values())))
  return {path: int(value) for path, value in zip(named, sums)}


@jax.jit
def _sums(arrays):
  return jnp.stack([_sum(x) for x in arrays])


def _sum(x):
  """Sum over i of mix(bits(x[i]) xor i c) modulo 2^32, i counting in C order.

  `mix` is one-to-one, hence the first promise of `checksums`, and scatters
  (without it the signs of two elements could change unseen). Integer sums do
  not depend on their order, hence no dependence on the sharding.
  """
  x = jnp.asarray(x)
  if x.dtype == jnp.bool_:
    x = x.astype(jnp.uint8)
  bits = jax.lax.bitcast_convert_type(x, _WIDTHS[x.dtype.itemsize])
  index = jnp.zeros(x.shape, jnp.uint32)
  for axis in range(x.ndim):
    stride = math.prod(x.shape[axis + 1 :]) % 2**32
    along = jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
    index += along * jnp.uint32(stride)
  mixed = _mix(bits.astype(jnp.uint32) ^ (index * jnp.uint32(0x9E3779B9)))
  return jnp.sum(mixed, dtype=jnp.uint32)


def _mix(x):
  """The last steps of MurmurHash3: shifts and odd factors, both one-to-one."""
  x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
  x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
  return x ^ (x >> 16)


_PART = 2**30  # bytes of parameters that are restored at a time
_LIBRARIES = ("jax", "flax", "optax", "orbax-checkpoint", "hourjax")


class Damaged(Exception):
  """A checkpoint that is not what was written; says how."""


def folder_of(workdir: str | os.PathLike) -> epath.Path:
  """Where the checkpoints of a run are; `workdir` may be a URL."""
  text = os.fspath(workdir)
  if "://" not in text:
    text = os.path.abspath(text)  # Orbax refuses relative ones
  return epath.Path(text) / "checkpoints"


def saved_steps(folder: epath.Path) -> list[int]:
  """Steps of the finished checkpoints, oldest first; sound or not."""
  if not folder.exists():
    return []
  found = [path for path in folder.iterdir() if path.name.isdecimal()]
  if "://" in os.fspath(folder):
    # No folder is renamed in a bucket; this file is written last.
    found = [p for p in found if (p / "commit_success.txt").exists()]
  return sorted(int(path.name) for path in found if path.is_dir())


def _dtype(name: str) -> str:
  try:
    jnp.dtype(name)
  except TypeError:
    raise ValueError("no name of a dtype") from None
  return name


_Size = Annotated[int, pydantic.Field(ge=0)]
_Dtype = Annotated[str, pydantic.AfterValidator(_dtype)]


class _About(schema.Schema):
  """What `describe` writes, as far as it is relied on."""

  step: int = pydantic.Field(ge=0)
  position: int = pydantic.Field(ge=0, lt=2**63)
  plan: str
  config: dict[str, Any]
  # JSON's lists are no tuples, hence not strict.
  arrays: dict[
    str, Annotated[tuple[list[_Size], _Dtype, int], pydantic.Strict(False)]
  ]
  crc: int


def describe(
  tree: Any, *, step: int, position: int, plan: str, config: dict[str, Any]
) -> dict[str, Any]:
  """What a checkpoint says of itself.

  Args:
    tree: of the arrays to be saved.
    step: number of steps taken.
    position: in the data, of the next step's first row.
    plan: fingerprint of the plan that the position is in.
    config: the run's configuration as plain data.
  """
  sums = checksums(tree)
  about = {
    "step": step,
    "position": position,
    "plan": plan,
    "config": config,
    "versions": {name: _version(name) for name in _LIBRARIES},
    "arrays": {
      path: [list(x.shape), str(x.dtype), sums[path]]
      for path, x in named_arrays(tree).items()
    },
  }
  # As it will be read: JSON turns tuples into lists.
  about = json.loads(json.dumps(about))
  return {**about, "crc": _crc(about)}


def read_about(folder: epath.Path, step: int) -> dict[str, Any]:
  """What `describe` gave.

  Raises:
    Damaged: missing or changed.
  """
  path = folder / str(step) / "about" / "metadata"
  remedy = "it was written otherwise"
  try:
    about = schema.parse_json(path.read_bytes(), "about", remedy=remedy)
    schema.validate(_About, about, "about", remedy=remedy)
  except FileNotFoundError:
    raise Damaged("about/metadata is missing") from None
  except (OSError, UserError) as error:
    raise Damaged(f"about/metadata cannot be read ({error})") from None
  if about.pop("crc") != _crc(about):
    raise Damaged("about/metadata was changed after it was written")
  return about


def read_arrays(folder: epath.Path, step: int, like: Any) -> Any:
  """The arrays that `like` asks for, not verified yet.

  Args:
    folder: of the checkpoints.
    step: of the one to read.
    like: a tree of ShapeDtypeStructs with shardings; of a mapping at the top,
      entries may be left out.

  Raises:
    Damaged: they cannot be read.
  """
  quiet_orbax()
  handler = ocp.PyTreeCheckpointHandler()
  restore_args = jax.tree.map(
    lambda x: ocp.ArrayRestoreArgs(
      sharding=x.sharding, global_shape=x.shape, dtype=x.dtype
    ),
    like,
  )
  arguments = ocp.args.PyTreeRestore(
    like, restore_args=restore_args, partial_restore=True
  )
  try:
    with contextlib.closing(handler):
      tree = handler.restore(folder / str(step) / "state", args=arguments)
      return jax.block_until_ready(tree)
  # Whatever a broken file makes of the readers: their errors have many types.
  except Exception as error:
    raise Damaged(f"state cannot be read: {_short(error)}") from None


def verify(tree: Any, about: Mapping[str, Any]) -> None:
  """Compares arrays with what their checkpoint says of them.

  All processes compute the sums together and come to the same result.

  Raises:
    Damaged: naming the arrays that differ.
  """
  wrong = [
    path
    for path, value in checksums(tree).items()
    if about["arrays"][path][2] != value
  ]
  if wrong:
    shown = ", ".join(wrong[:5]) + (", ..." if len(wrong) > 5 else "")
    raise Damaged(
      f"{len(wrong)} arrays are not those that were written: {shown}"
    )


def misfits(tree: Any, about: Mapping[str, Any]) -> list[str]:
  """What differs between a state's arrays and those of a checkpoint."""
  wanted = {
    path: [list(x.shape), str(x.dtype)]
    for path, x in named_arrays(tree).items()
  }
  saved = {path: value[:2] for path, value in about["arrays"].items()}
  return [
    f"{path}: saved {_kind(saved.get(path))}, here {_kind(wanted.get(path))}"
    for path in sorted({**saved, **wanted})
    if saved.get(path) != wanted.get(path)
  ]


def abstract_params(
  about: Mapping[str, Any], sharding: jax.sharding.Sharding
) -> dict[str, dict[str, jax.ShapeDtypeStruct]]:
  """{"trained": parameters by path, "frozen": ...} of a checkpoint."""
  result: dict[str, dict[str, jax.ShapeDtypeStruct]] = {}
  for name, (shape, dtype, _) in about["arrays"].items():
    part, _, path = name.partition("/")
    if part in ("trained", "frozen"):
      result.setdefault(part, {})[path] = jax.ShapeDtypeStruct(
        shape, jnp.dtype(dtype), sharding=sharding
      )
  return result


def in_parts(
  like: Mapping[str, Mapping[str, jax.ShapeDtypeStruct]],
) -> Iterator[dict[str, dict[str, jax.ShapeDtypeStruct]]]:
  """Cuts what `abstract_params` gave into trees of a gigabyte or one array."""
  part: dict[str, dict[str, jax.ShapeDtypeStruct]] = {}
  held = 0
  for group, arrays in like.items():
    for path, x in arrays.items():
      size = x.size * x.dtype.itemsize
      if part and held + size > _PART:
        yield part
        part, held = {}, 0
      part.setdefault(group, {})[path] = x
      held += size
  if part:
    yield part


def _kind(value):
  return f"{value[1]} {value[0]}" if value else "nothing"


def _crc(about: Mapping[str, Any]) -> int:
  return zlib.crc32(json.dumps(about, sort_keys=True).encode())


def _version(name: str) -> str:
  try:
    return metadata.version(name)
  except metadata.PackageNotFoundError:
    return "not installed"


def _short(error: BaseException) -> str:
  """The first part of a reader's message; the rest is its whole setup."""
  text = " ".join(f"{type(error).__name__}: {error}".split())
  return text if len(text) < 300 else f"{text[:300]} ..."
