"""One checkpoint on disk: what it says of itself, and its arrays, verified.

    checkpoints/120/about   JSON: step, position, plan, configuration, versions
                            and, of every array, shape, dtype and checksum
    checkpoints/120/state   the arrays, as Orbax writes them

A folder appears under its number only when it is complete, and by what it
says of itself it can be told from one that was damaged later. Every process
reads for itself: nothing here waits for another one.
"""

import contextlib
import json
import os
import zlib
from collections.abc import Iterator, Mapping
from importlib import metadata
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
import pydantic
from etils import epath

from hourjax import schema
from hourjax.errors import UserError
from hourjax.training.checksums import checksums, named_arrays
from hourjax.training.quiet import quiet_orbax

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
