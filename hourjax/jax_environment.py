"""What jax finds when it is imported: the platform, and what is compiled.

Left to itself jax tries the TPU library that `requirements.txt` installs on
every machine, which then complains for ten lines; and it compiles all programs
again at every start. `prepare` says otherwise, by jax's own variables, unless
the user has set them, or `jax.config` in a notebook.
"""

import contextlib
import glob
import hashlib
import importlib.metadata
import importlib.util
import os
import pathlib
import pkgutil
import platform
import stat
import sys
import warnings
from collections.abc import Mapping

CACHE = "HOURJAX_COMPILATION_CACHE"  # a folder, or "off"
_OFF = ("off", "0", "no", "none", "false")
# A question to the demo's model leaves 0.6 MB in 31 programs.
_CACHE_BYTES = 1 << 30
# Of those that compile faster nothing is won: with all of them the second start
# of `ask` took as long (6.5 s of a core instead of 20 without a cache).
_SECONDS = 0.05

# Set where a TPU is attached, or is to be reached. (TPU_LIBRARY_PATH and
# TPU_SKIP_MDS_QUERY are jax's own, and passed on to child processes.)
_TPU_VARIABLES = (
  "TPU_NAME", "TPU_WORKER_ID", "TPU_WORKER_HOSTNAMES", "TPU_PROCESS_ADDRESSES",
  "TPU_ACCELERATOR_TYPE", "TPU_VISIBLE_CHIPS", "TPU_VISIBLE_DEVICES",
  "TPU_CHIPS_PER_PROCESS_BOUNDS", "JAX_FORCE_TPU_INIT",
)  # fmt: skip
# v2 to v4 and v5e are character devices of their own, later ones are handed on
# by vfio; so is whatever else a host hands on, which is then left to jax.
_TPU_FILES = ("/dev/accel[0-9]*", "/dev/accel/[0-9]*", "/dev/vfio/[0-9]*")
_GOOGLE = "0x1ae0"
# Also of Google are network cards and disks of its machines.
_TPU_IDS = (
  "0x0027", "0x0056", "0x005e", "0x0062", "0x0063", "0x006f", "0x0076",
)  # fmt: skip
_NVIDIA_FILES = ("/dev/nvidia[0-9]*", "/dev/nvidiactl", "/dev/dxg")


def prepare() -> None:
  """Sets jax's variables; before jax is imported, or at least used.

  Processes that this one starts inherit them.
  """
  found = platforms(os.environ)
  if found and not _configured("JAX_PLATFORMS"):
    _set("JAX_PLATFORMS", found)
  folder = cache_folder(os.environ)
  if folder is None or _configured("JAX_COMPILATION_CACHE_DIR"):
    return
  if _usable(folder):
    # Without a bound of its size jax writes no times.
    if os.environ.get("JAX_COMPILATION_CACHE_MAX_SIZE") != "-1":
      _tidy(folder)
    _set("JAX_COMPILATION_CACHE_DIR", str(folder))
    _set("JAX_COMPILATION_CACHE_MAX_SIZE", _CACHE_BYTES)
    _set("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", _SECONDS)
    # A disk that is full or a lock that is held costs a compilation, no more.
    warnings.filterwarnings(
      "ignore", message="Error (reading|writing) persistent compilation cache"
    )
  elif os.environ.get(CACHE):
    print(
      f"{CACHE}={folder} is not used: it must be a folder that you can write"
      " to, and nobody else, for the programs in it are run",
      file=sys.stderr,
    )


def platforms(environ: Mapping[str, str], root: str = "/") -> str | None:
  """JAX_PLATFORMS for this machine; None leaves it to the user or to jax.

  Args:
    environ: variables.
    root: of the file system with the machine's devices.
  """
  if "JAX_PLATFORMS" in environ or _has_tpu(environ, root):
    return None
  plugins = _plugins()
  if not plugins:
    return "cpu"
  if any("cuda" not in name for name in plugins):
    return None  # jax asks them all
  hidden = environ.get("CUDA_VISIBLE_DEVICES", "all") in ("", "-1")
  return "cuda,cpu" if _exist(_NVIDIA_FILES, root) and not hidden else "cpu"


def _has_tpu(environ: Mapping[str, str], root: str) -> bool:
  if any(environ.get(name) for name in _TPU_VARIABLES):
    return True
  if _exist(_TPU_FILES, root):
    return True
  for vendor in glob.glob(f"{root}sys/bus/pci/devices/*/vendor"):
    device = pathlib.Path(vendor).with_name("device")
    with contextlib.suppress(OSError):
      if (
        pathlib.Path(vendor).read_text().strip() == _GOOGLE
        and device.read_text().strip() in _TPU_IDS
      ):
        return True
  return False


def _exist(patterns: tuple[str, ...], root: str) -> bool:
  return any(glob.glob(root + pattern.lstrip("/")) for pattern in patterns)


def _plugins() -> list[str]:
  """Names of the packages that bring jax another platform than TPU and CPU."""
  found = importlib.util.find_spec("jax_plugins")  # a namespace package
  folders = list(found.submodule_search_locations or ()) if found else []
  named = {module.name for module in pkgutil.iter_modules(folders)}
  points = importlib.metadata.entry_points(group="jax_plugins")
  return sorted({*named, *(point.name for point in points)})


def cache_folder(environ: Mapping[str, str]) -> pathlib.Path | None:
  """Where compiled programs are kept; None if they are not, or not by us."""
  chosen = environ.get(CACHE, "")
  if chosen.lower() in _OFF or environ.get("JAX_COMPILATION_CACHE_DIR"):
    return None
  if chosen:
    return pathlib.Path(chosen).expanduser().absolute()
  base = pathlib.Path(environ.get("XDG_CACHE_HOME", ""))
  if not base.is_absolute():
    try:
      base = pathlib.Path.home() / ".cache"
    except RuntimeError:
      return None
  # By kind of processor, which machines that share a home may differ in: a
  # program compiled on one of them need not run on another.
  return base / "hourjax" / f"compiled-{_processor()}"


def _processor() -> str:
  told = [platform.machine(), platform.processor()]
  with contextlib.suppress(OSError):
    lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    kept = ("model name", "flags", "Features", "CPU part")
    told += sorted({line for line in lines if line.startswith(kept)})
  return hashlib.sha256("\n".join(told).encode()).hexdigest()[:12]


def _usable(folder: pathlib.Path) -> bool:
  """Whether it can be written, and by nobody else: programs in it are run."""
  try:
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = folder.stat()
  except OSError:
    return False
  others = found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
  mine = not hasattr(os, "getuid") or found.st_uid == os.getuid()
  return mine and not others and os.access(folder, os.W_OK | os.X_OK)


def _tidy(folder: pathlib.Path) -> None:
  """Removes what processes that were killed left half-written.

  jax writes a program and then, beside it, the time when it was last used. With
  the second missing the first may be cut off, and jax's search for what to
  remove fails on it for ever.
  """
  import filelock  # jax's lock around both

  programs, times = "-cache", "-atime"
  with (
    contextlib.suppress(OSError, filelock.Timeout),
    filelock.FileLock(folder / ".lockfile", timeout=1),
  ):
    names = set(os.listdir(folder))
    for name in names:
      for own, other in ((programs, times), (times, programs)):
        if name.endswith(own) and name.removesuffix(own) + other not in names:
          (folder / name).unlink(missing_ok=True)


def _configured(name: str) -> bool:
  """Whether a notebook has set it in `jax.config`, which has no variable."""
  jax = sys.modules.get("jax")
  return bool(getattr(getattr(jax, "config", None), name.lower(), None))


def _set(name: str, value: str | int | float) -> None:
  if os.environ.get(name):
    return
  os.environ[name] = str(value)
  jax = sys.modules.get("jax")
  if jax is not None:  # it has read its variables
    # Raises where its devices are in use, which then decides.
    with contextlib.suppress(RuntimeError, AttributeError):
      jax.config.update(name.lower(), value)
