"""Environment of jax: the platform, and the persistent compilation cache.

By default jax tries the TPU library, which `requirements.txt` installs on every
machine and which prints ten lines of errors where there is no TPU; and it
compiles all programs again at every start. `prepare` sets jax's own variables
against both, unless the user has set them, or `jax.config` in a notebook.
"""

import contextlib
import ctypes
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
# Programs that compile faster are not worth a file: with all of them in the
# cache the second start of `ask` took as long (6.5 s of a core; 20 without).
_SECONDS = 0.05

# Options of glibc's mallopt (malloc.h): M_MMAP_THRESHOLD, the size from which
# an array is returned when it is freed; M_TRIM_THRESHOLD, how much may lie free
# at the end of the heap; M_ARENA_MAX, the number of heaps.
_KEPT = {-3: 1 << 30, -1: (1 << 31) - 1, -8: 1}

# Set on machines with a TPU. (TPU_LIBRARY_PATH and TPU_SKIP_MDS_QUERY do not
# count: jax sets them itself, and worker processes inherit them.)
_TPU_VARIABLES = (
  "TPU_NAME", "TPU_WORKER_ID", "TPU_WORKER_HOSTNAMES", "TPU_PROCESS_ADDRESSES",
  "TPU_ACCELERATOR_TYPE", "TPU_VISIBLE_CHIPS", "TPU_VISIBLE_DEVICES",
  "TPU_CHIPS_PER_PROCESS_BOUNDS", "JAX_FORCE_TPU_INIT",
)  # fmt: skip
# v2 to v4 and v5e are character devices of their own; later generations appear
# through vfio, like other devices that a host passes through. Where vfio shows
# something else, jax decides.
_TPU_FILES = ("/dev/accel[0-9]*", "/dev/accel/[0-9]*", "/dev/vfio/[0-9]*")
_GOOGLE = "0x1ae0"
# Device ids of TPUs: Google's network cards and disks have the same vendor. The
# names are those of `parallel.chips`.
_TPU_IDS = {
  "0x0027": "v3", "0x0056": "", "0x005e": "v4", "0x0062": "v5p",
  "0x0063": "v5e", "0x006f": "v6e", "0x0076": "tpu7x",
}  # fmt: skip
_OVERLAP = (
  "--xla_enable_async_all_gather=true",
  "--xla_tpu_enable_async_collective_fusion=true",
  "--xla_tpu_enable_async_collective_fusion_fuse_all_gather=true",
  "--xla_tpu_enable_async_collective_fusion_multiple_steps=true",
)
# The TPU compiler's flags by generation. By default it waits for every
# collective on v6e and tpu7x; with these it gathers weights beside products, as
# it does on v5e and v5p of itself. How much: hourjax/planning/README.md.
COMPILER_FLAGS = {"v6e": _OVERLAP, "tpu7x": _OVERLAP}
# The compiler for GPUs runs collectives beside products with this one.
_GPU_FLAG = "--xla_gpu_enable_latency_hiding_scheduler"
_NVIDIA_FILES = ("/dev/nvidia[0-9]*", "/dev/nvidiactl", "/dev/dxg")


def prepare() -> None:
  """Sets jax's variables; call it before jax is imported, or at least used.

  Processes that this one starts inherit them.
  """
  flags = compiler_flags(os.environ)
  if flags and "jax" not in sys.modules:  # it reads them as it is loaded
    os.environ["LIBTPU_INIT_ARGS"] = flags
  found = platforms(os.environ)
  if found and not _configured("JAX_PLATFORMS"):
    _set("JAX_PLATFORMS", found)
  if "cuda" in (found or os.environ.get("JAX_PLATFORMS", "")):
    os.environ["XLA_FLAGS"] = gpu_flags(os.environ)
  folder = cache_folder(os.environ)
  if folder is None or _configured("JAX_COMPILATION_CACHE_DIR"):
    return
  if _usable(folder):
    # Without a bound on its size jax writes no access times.
    if os.environ.get("JAX_COMPILATION_CACHE_MAX_SIZE") != "-1":
      _tidy(folder)
    _set("JAX_COMPILATION_CACHE_DIR", str(folder))
    _set("JAX_COMPILATION_CACHE_MAX_SIZE", _CACHE_BYTES)
    _set("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", _SECONDS)
    # A full disk or a held lock costs one compilation and nothing else.
    warnings.filterwarnings(
      "ignore", message="Error (reading|writing) persistent compilation cache"
    )
  elif os.environ.get(CACHE):
    print(
      f"{CACHE}={folder} is not used: it must be a folder that you can write"
      " to, and nobody else, for the programs in it are run",
      file=sys.stderr,
    )


def keep_freed_memory(environ: Mapping[str, str]) -> bool:
  """Makes the C library keep freed memory, for a training on the CPU.

  jax allocates the temporary arrays of a program anew at every call. glibc
  returns large ones to the system when they are freed, so that the next call
  waits for every page: 56,000 page faults in a step of the demo, a quarter of
  its CPU time. What exceeds 1 GiB is returned as before.

  Call it before jax uses its devices: threads that exist keep their own pools
  of memory, and those cannot hold large arrays.

  Args:
    environ: environment variables. With any of glibc's own (MALLOC_...), and
      where jax uses another platform than the CPU, nothing is changed.

  Returns:
    Whether the settings were changed.
  """
  own = any(name.startswith("MALLOC_") for name in environ)
  if own or environ.get("JAX_PLATFORMS") != "cpu":
    return False
  if platform.libc_ver()[0] != "glibc":
    return False
  mallopt = ctypes.CDLL(None).mallopt
  return all(mallopt(option, value) for option, value in _KEPT.items())


def compiler_flags(environ: Mapping[str, str], root: str = "/") -> str:
  """Returns the value of LIBTPU_INIT_ARGS for this machine's TPU.

  Args:
    environ: environment variables; flags in LIBTPU_INIT_ARGS stay, and take
      the place of ours of the same name.
    root: root of the file system that lists the machine's devices.
  """
  return flags_of(tpu_generation(environ, root), environ)


def flags_of(generation: str, environ: Mapping[str, str]) -> str:
  """Returns the value of LIBTPU_INIT_ARGS for a generation of TPU.

  Args:
    generation: a name of `parallel.chips`, or "".
    environ: see `compiler_flags`; flags of the table that a process like this
      one has set for its own TPU do not count as the user's.
  """
  table = {flag for flags in COMPILER_FLAGS.values() for flag in flags}
  words = environ.get("LIBTPU_INIT_ARGS", "").split()
  given = [flag for flag in words if flag not in table]
  named = {flag.partition("=")[0] for flag in given}
  own = COMPILER_FLAGS.get(generation, ())
  kept = [flag for flag in own if flag.partition("=")[0] not in named]
  return " ".join([*kept, *given])


def gpu_flags(environ: Mapping[str, str]) -> str:
  """Returns the value of XLA_FLAGS for a machine with NVIDIA GPUs.

  Args:
    environ: environment variables; flags in XLA_FLAGS stay, and take the place
      of ours.
  """
  given = environ.get("XLA_FLAGS", "").split()
  if any(flag.partition("=")[0] == _GPU_FLAG for flag in given):
    return " ".join(given)
  return " ".join([f"{_GPU_FLAG}=true", *given])


def flags_in_use(environ: Mapping[str, str]) -> str:
  """Returns all flags of the compilers, for a log."""
  names = ("LIBTPU_INIT_ARGS", "XLA_FLAGS")
  return " ".join(environ[name] for name in names if environ.get(name))


def tpu_generation(environ: Mapping[str, str], root: str = "/") -> str:
  """Returns the generation of this machine's TPU, or "".

  Args:
    environ: environment variables; TPU_ACCELERATOR_TYPE, "v6e-8", names it
      where the PCI bus does not.
    root: root of the file system that lists the machine's devices.
  """
  found = next(filter(None, _pci_tpus(root)), "")
  kind = environ.get("TPU_ACCELERATOR_TYPE", "").partition("-")[0].lower()
  return found or {"v5litepod": "v5e", "v5lite": "v5e"}.get(kind, kind)


def platforms(environ: Mapping[str, str], root: str = "/") -> str | None:
  """Returns the value of JAX_PLATFORMS that suits this machine.

  Args:
    environ: environment variables.
    root: root of the file system that lists the machine's devices.

  Returns:
    "cpu" or "cuda,cpu"; None if the user or jax should decide.
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
  """Returns whether variables, device files or the PCI bus show a TPU."""
  if any(environ.get(name) for name in _TPU_VARIABLES):
    return True
  return _exist(_TPU_FILES, root) or bool(_pci_tpus(root))


def _pci_tpus(root: str) -> list[str]:
  """Returns the generation of each TPU on the PCI bus."""
  found = []
  for vendor in glob.glob(f"{root}sys/bus/pci/devices/*/vendor"):
    device = pathlib.Path(vendor).with_name("device")
    with contextlib.suppress(OSError):
      if (
        pathlib.Path(vendor).read_text().strip() == _GOOGLE
        and (name := device.read_text().strip()) in _TPU_IDS
      ):
        found.append(_TPU_IDS[name])
  return found


def _exist(patterns: tuple[str, ...], root: str) -> bool:
  """Returns whether a file matches one of the patterns below `root`."""
  return any(glob.glob(root + pattern.lstrip("/")) for pattern in patterns)


def _plugins() -> list[str]:
  """Returns names of packages that add a platform to jax, beyond TPU, CPU."""
  found = importlib.util.find_spec("jax_plugins")  # a namespace package
  folders = list(found.submodule_search_locations or ()) if found else []
  named = {module.name for module in pkgutil.iter_modules(folders)}
  points = importlib.metadata.entry_points(group="jax_plugins")
  return sorted({*named, *(point.name for point in points)})


def cache_folder(environ: Mapping[str, str]) -> pathlib.Path | None:
  """Returns the folder of the compilation cache.

  Args:
    environ: environment variables.

  Returns:
    The folder; None if the cache is switched off, or configured through jax's
    own variable.
  """
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
  # One folder per kind of processor: machines that share a home directory may
  # differ, and a program compiled on one need not run on another.
  return base / "hourjax" / f"compiled-{_processor()}"


def _processor() -> str:
  """Returns a digest of the processor's model and instruction sets."""
  facts = [platform.machine(), platform.processor()]
  with contextlib.suppress(OSError):
    lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    kept = ("model name", "flags", "Features", "CPU part")
    facts += sorted({line for line in lines if line.startswith(kept)})
  return hashlib.sha256("\n".join(facts).encode()).hexdigest()[:12]


def _usable(folder: pathlib.Path) -> bool:
  """Returns whether this user alone can write to a folder.

  Programs are loaded from it, so no one else may place any there.
  """
  try:
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = folder.stat()
  except OSError:
    return False
  others = found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
  mine = not hasattr(os, "getuid") or found.st_uid == os.getuid()
  return mine and not others and os.access(folder, os.W_OK | os.X_OK)


def _tidy(folder: pathlib.Path) -> None:
  """Removes entries that killed processes left half-written.

  jax writes a program and then, beside it, the time of its last use. Where the
  time is missing the program may be cut off, and jax's eviction fails on it at
  every start.
  """
  import filelock  # jax takes the same lock around both files

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
  """Returns whether a notebook has set an option through `jax.config`."""
  jax = sys.modules.get("jax")
  return bool(getattr(getattr(jax, "config", None), name.lower(), None))


def _set(name: str, value: str | int | float) -> None:
  """Sets a variable of jax, and the option if jax is already imported."""
  if os.environ.get(name):
    return
  os.environ[name] = str(value)
  jax = sys.modules.get("jax")
  if jax is not None:  # it has read its variables already
    # Raises once its devices are in use; then the present setting stays.
    with contextlib.suppress(RuntimeError, AttributeError):
      jax.config.update(name.lower(), value)
