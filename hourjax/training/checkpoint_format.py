"""What is on disk of one checkpoint, and how damage to it is noticed.

    checkpoints/120/about   the manifest, JSON: step, position, plan,
                            configuration, versions and, of every array, shape,
                            dtype and checksum
    checkpoints/120/state   the arrays, as Orbax writes them

A folder appears under its number only when it is complete; one that was damaged
later is noticed by its manifest. Every process reads for itself: nothing here
waits for another one.

Checksums are sums over the arrays, computed on the devices, and the same for
any sharding. Orbax does not notice changed bytes of an array (measured: flipped
bytes in a data file were restored as other numbers). Sums over files would mean
that one host reads back what all hosts wrote; a sum over the arrays costs one
pass over their memory, on all devices together.
"""

import contextlib
import functools
import hashlib
import json
import logging
import math
import os
import sys
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping
from importlib import metadata
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pydantic
from absl import logging as absl_logging
from etils import epath

from hourjax import hub, jax_environment, schema
from hourjax.errors import UserError


@functools.cache  # once is enough
def silence_orbax_errors() -> None:
  """Stops Orbax and asyncio from logging errors that are also raised.

  A failed read or write raises an error, which is reported in one line. Orbax
  also logs the traceback of every thread, and asyncio what became of the other
  arrays: 190 KB on the screen for a full disk, half of that for a damaged file.
  """
  absl_logging.get_absl_logger().addFilter(_not_of_orbax)
  logging.getLogger("asyncio").addFilter(_not_abandoned)
  warnings.filterwarnings("ignore", "coroutine .* was never awaited")
  sys.unraisablehook = functools.partial(_unraisable, sys.unraisablehook)


def _not_of_orbax(record: logging.LogRecord) -> bool:
  """Returns whether a record is not an error that Orbax logs."""
  inside = f"{os.sep}orbax{os.sep}" in record.pathname
  return not inside or record.levelno < logging.ERROR


def _not_abandoned(record: logging.LogRecord) -> bool:
  """Returns whether a record is not about a coroutine that an error ended."""
  return "exception was never retrieved" not in record.getMessage()


def _unraisable(
  before: Callable[[Any], None], unraisable: "sys.UnraisableHookArgs"
) -> None:
  """Handles errors that Python cannot raise, such as those of a destructor.

  Leaves out those of Orbax's coroutines, and of what is run after the end of
  their event loop; the others go to the hook that was there before.
  """
  late = str(unraisable.exc_value) == "Event loop is closed"
  trace, inside = unraisable.exc_traceback, False
  while trace is not None and not inside:
    inside = f"{os.sep}orbax{os.sep}" in trace.tb_frame.f_code.co_filename
    trace = trace.tb_next
  if not late and not inside:
    before(unraisable)


_WIDTHS = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}


def named_arrays(tree: Any) -> dict[str, Any]:
  """Returns a tree's leaves by path, such as "trained/decoder/norm/scale"."""
  leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
  return {
    jax.tree_util.keystr(path, simple=True, separator="/"): leaf
    for path, leaf in leaves
  }


def checksums(tree: Any) -> dict[str, int]:
  """Returns a 32-bit checksum of every array of a tree, by path.

  A change of a single element always changes the sum. Other differences, such
  as elements that changed places, go unseen with a chance of 2^-32. A host
  needs only its own shards.
  """
  named = named_arrays(tree)
  if not named:
    return {}
  sums = np.asarray(_sums(list(named.values())))
  return {path: int(value) for path, value in zip(named, sums)}


@jax.jit
def _sums(arrays: list[jax.Array]) -> jax.Array:
  """Returns the checksums of arrays, uint32 [number of arrays]."""
  return jnp.stack([_sum(x) for x in arrays])


def weight_sum(x: Any) -> int:
  """Returns the checksum of a parameter's values in bfloat16.

  So it does not depend on whether the parameter is kept in float32, or comes
  from a folder that was exported in bfloat16.
  """
  return int(_sum(jnp.asarray(x, jnp.bfloat16)))


def fingerprint(sums: Mapping[str, int]) -> str:
  """Returns a name of weights, of the checksums of its parameters by path."""
  text = json.dumps(dict(sorted(sums.items())))
  return hashlib.sha256(text.encode()).hexdigest()[:12]


# Jitted by itself, so that arrays of one shape, such as a parameter and its
# moments, are traced once: a state has hundreds.
@jax.jit
def _sum(x: Any) -> jax.Array:
  """Returns the sum over i of mix(bits(x[i]) xor i c), modulo 2^32.

  The index i counts in C order. `mix` is one-to-one, so that one changed
  element always changes the sum; and it scatters bits, without which the signs
  of two elements could change unseen. A sum of integers does not depend on its
  order, and so not on the sharding.
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


def _mix(x: jax.Array) -> jax.Array:
  """Returns MurmurHash3's last steps of uint32 values.

  Shifts with xor, and products with odd factors, are both one-to-one.
  """
  x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
  x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
  return x ^ (x >> 16)


_PART = 2**30  # bytes of parameters that are restored at a time
_LIBRARIES = ("jax", "flax", "optax", "orbax-checkpoint", "hourjax")


class DamagedCheckpoint(Exception):
  """Says that a checkpoint is not what was written, and how it differs."""


def checkpoint_folder(workdir: str | os.PathLike) -> epath.Path:
  """Returns the folder of a run's checkpoints; `workdir` may be a URL."""
  text = os.fspath(workdir)
  if "://" not in text:
    text = os.path.abspath(text)  # Orbax refuses relative ones
  return epath.Path(text) / "checkpoints"


def checkpoint_steps(folder: epath.Path) -> list[int]:
  """Returns the steps of complete checkpoints, oldest first.

  It is not checked whether they have been damaged since.
  """
  if not folder.exists():
    return []
  found = [path for path in folder.iterdir() if path.name.isdecimal()]
  if "://" in os.fspath(folder):
    # In a bucket no folder can be renamed; Orbax writes this file last.
    found = [p for p in found if (p / "commit_success.txt").exists()]
  return sorted(int(path.name) for path in found if path.is_dir())


def _dtype(name: str) -> str:
  """Checks that jax knows a dtype, and returns its name."""
  try:
    jnp.dtype(name)
  except TypeError:
    raise ValueError("no name of a dtype") from None
  return name


_Size = Annotated[int, pydantic.Field(ge=0)]
_Dtype = Annotated[str, pydantic.AfterValidator(_dtype)]


class _Manifest(schema.Schema):
  """Describes those keys of a manifest that are relied on."""

  step: int = pydantic.Field(ge=0)
  position: int = pydantic.Field(ge=0, lt=2**63)
  plan: str
  config: dict[str, Any]
  base: str = ""
  # JSON's lists are no tuples, hence not strict.
  arrays: dict[
    str, Annotated[tuple[list[_Size], _Dtype, int], pydantic.Strict(False)]
  ]
  crc: int


def make_manifest(
  tree: Any,
  *,
  step: int,
  position: int,
  plan: str,
  config: dict[str, Any],
  base: str = "",
) -> dict[str, Any]:
  """Returns the manifest of a checkpoint, with a checksum of the manifest.

  Args:
    tree: of the arrays to be saved.
    step: number of steps taken.
    position: in the data, of the next step's first row.
    plan: fingerprint of the row plan that the position belongs to.
    config: the run's configuration as plain data.
    base: fingerprint of the base that adapters belong to; empty if the tree
      holds all parameters.
  """
  sums = checksums(tree)
  about = {
    "step": step,
    "position": position,
    "plan": plan,
    "config": config,
    "compiler_flags": jax_environment.flags_in_use(os.environ),
    "versions": {name: _version(name) for name in _LIBRARIES},
    "arrays": {
      path: [list(x.shape), str(x.dtype), sums[path]]
      for path, x in named_arrays(tree).items()
    },
  }
  if base:
    about["base"] = base
  # As it will be read: JSON turns tuples into lists.
  about = json.loads(json.dumps(about))
  return {**about, "crc": _crc(about)}


def read_manifest(folder: epath.Path, step: int) -> dict[str, Any]:
  """Reads the manifest of a checkpoint.

  Args:
    folder: of the checkpoints.
    step: of the one to read.

  Returns:
    What `make_manifest` returned, without its checksum.

  Raises:
    DamagedCheckpoint: the manifest is missing or was changed.
  """
  path = folder / str(step) / "about" / "metadata"
  remedy = "it was written otherwise"
  try:
    about = schema.parse_json(path.read_bytes(), "about", remedy=remedy)
    schema.validate(_Manifest, about, "about", remedy=remedy)
  except FileNotFoundError:
    raise DamagedCheckpoint("about/metadata is missing") from None
  except (OSError, UserError) as error:
    raise DamagedCheckpoint(
      f"about/metadata cannot be read ({error})"
    ) from None
  if about.pop("crc") != _crc(about):
    raise DamagedCheckpoint("about/metadata was changed after it was written")
  return about


def adapter_manifest(workdir: str | os.PathLike) -> dict[str, Any] | None:
  """Returns the manifest of the newest checkpoint of a run of adapters.

  Args:
    workdir: of any run.

  Returns:
    The newest manifest that can be read; None if it is of a run that saves all
    parameters, or if there is none.
  """
  folder = checkpoint_folder(workdir)
  for step in reversed(checkpoint_steps(folder)):
    with contextlib.suppress(DamagedCheckpoint):
      manifest = read_manifest(folder, step)
      return manifest if manifest.get("base") else None
  return None


def adapter_base(manifest: Mapping[str, Any]) -> str:
  """Returns the model below adapters, `config.init` of the first run of them.

  A run of adapters that began with those of another run has its base.

  Args:
    manifest: of a checkpoint of adapters.
  """
  init = manifest["config"]["init"]
  while before := adapter_manifest(hub.local_folder(init)):
    init = before["config"]["init"]
  return init


def read_arrays(folder: epath.Path, step: int, like: Any) -> Any:
  """Reads the arrays that `like` asks for; `verify` is still to be called.

  Args:
    folder: of the checkpoints.
    step: of the one to read.
    like: a tree of ShapeDtypeStructs with shardings. Where the top of the
      saved tree is a mapping, entries of it may be left out.

  Raises:
    DamagedCheckpoint: the arrays cannot be read.
  """
  silence_orbax_errors()
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
  # A broken file makes the libraries below raise errors of many types.
  except Exception as error:
    raise DamagedCheckpoint(f"state cannot be read: {_short(error)}") from None


def verify(tree: Any, manifest: Mapping[str, Any]) -> None:
  """Compares restored arrays with the checksums of their checkpoint.

  All processes compute the sums together and come to the same result.

  Args:
    tree: of the arrays.
    manifest: of the checkpoint.

  Raises:
    DamagedCheckpoint: arrays differ; names the first five.
  """
  wrong = [
    path
    for path, value in checksums(tree).items()
    if manifest["arrays"][path][2] != value
  ]
  if wrong:
    names = ", ".join(wrong[:5]) + (", ..." if len(wrong) > 5 else "")
    raise DamagedCheckpoint(
      f"{len(wrong)} arrays are not those that were written: {names}"
    )


def shape_differences(tree: Any, manifest: Mapping[str, Any]) -> list[str]:
  """Lists how the arrays of a state differ from those of a checkpoint.

  Returns:
    One text for each array whose shape or dtype differs, or that only one of
    them has.
  """
  wanted = {
    path: [list(x.shape), str(x.dtype)]
    for path, x in named_arrays(tree).items()
  }
  saved = {path: value[:2] for path, value in manifest["arrays"].items()}
  return [
    f"{path}: saved {_kind(saved.get(path))}, here {_kind(wanted.get(path))}"
    for path in sorted({**saved, **wanted})
    if saved.get(path) != wanted.get(path)
  ]


def abstract_params(
  manifest: Mapping[str, Any],
  sharding: jax.sharding.Sharding,
  prefix: str = "",
) -> dict[str, dict[str, jax.ShapeDtypeStruct]]:
  """Returns shapes and dtypes of a checkpoint's parameters.

  Args:
    manifest: of the checkpoint.
    sharding: of each parameter.
    prefix: start of the paths that are returned.

  Returns:
    {"trained": parameters by path, "frozen": parameters by path}.
  """
  result: dict[str, dict[str, jax.ShapeDtypeStruct]] = {}
  for name, (shape, dtype, _) in manifest["arrays"].items():
    part, _, path = name.partition("/")
    if part in ("trained", "frozen") and path.startswith(prefix):
      result.setdefault(part, {})[path] = jax.ShapeDtypeStruct(
        shape, jnp.dtype(dtype), sharding=sharding
      )
  return result


def split_by_size(
  like: Mapping[str, Mapping[str, jax.ShapeDtypeStruct]],
  most: int | None = None,
) -> Iterator[dict[str, dict[str, jax.ShapeDtypeStruct]]]:
  """Yields what `abstract_params` returned in trees of at most a gigabyte.

  An array that is larger has a tree of its own.

  Args:
    like: what it returned.
    most: another number of bytes.
  """
  most = most or _PART
  part: dict[str, dict[str, jax.ShapeDtypeStruct]] = {}
  held = 0
  for group, arrays in like.items():
    for path, x in arrays.items():
      size = x.size * x.dtype.itemsize
      if part and held + size > most:
        yield part
        part, held = {}, 0
      part.setdefault(group, {})[path] = x
      held += size
  if part:
    yield part


def _kind(value: list[Any] | None) -> str:
  """Returns dtype and shape as text."""
  return f"{value[1]} {value[0]}" if value else "nothing"


def _crc(about: Mapping[str, Any]) -> int:
  """Returns the checksum of a manifest."""
  return zlib.crc32(json.dumps(about, sort_keys=True).encode())


def _version(name: str) -> str:
  """Returns the version of an installed package."""
  try:
    return metadata.version(name)
  except metadata.PackageNotFoundError:
    return "not installed"


def _short(error: BaseException) -> str:
  """Returns the first part of a message; the rest lists the reader's setup."""
  text = " ".join(f"{type(error).__name__}: {error}".split())
  return text if len(text) < 300 else f"{text[:300]} ..."
