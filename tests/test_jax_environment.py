"""Which platform jax is told to use, and where compiled programs are kept."""

import os
import pathlib
import platform
import subprocess
import sys

import pytest

from hourjax import jax_environment

ROOT = pathlib.Path(__file__).parents[1]
# Takes a step of something with products, sums and a loop, and says what came.
STEP = """
import hashlib, sys
from hourjax import jax_environment
jax_environment.prepare()
import jax, jax.numpy as jnp
hits = []
jax.monitoring.register_event_listener(
  lambda name, **_: hits.append(name.endswith("/cache_hits")))

def loss(weights, x):
  for _ in range(3):
    x = jnp.tanh(x @ weights) + jax.nn.softmax(x)
  return jax.lax.fori_loop(0, 4, lambda i, y: y + jnp.sin(y), x).mean()

step = jax.jit(jax.value_and_grad(loss))
key = jax.random.key(0)
weights = jax.random.normal(key, (65, 65))
for _ in range(3):
  value, gradient = step(weights, weights * 2)
  weights -= gradient
found = jax.device_get((value, weights))
digest = hashlib.sha256(b"".join(x.tobytes() for x in found)).hexdigest()
print(digest, sum(hits), jax.default_backend())
"""


def _environment(**given):
  kept = {
    name: value
    for name, value in os.environ.items()
    if not name.startswith(("JAX_", "HOURJAX_"))
  }
  return {**kept, "PYTHONPATH": str(ROOT), **given}


def _start(**given):
  return subprocess.Popen(
    [sys.executable, "-c", STEP],
    env=_environment(**given),
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


def _stepped(process) -> tuple[str, int]:
  """What came of it, and how many programs were found in the cache."""
  out, said = process.communicate(timeout=120)
  assert process.returncode == 0, said
  digest, hits, backend = out.split()
  # On a machine without TPU not a word of its library.
  assert backend == "cpu" and not said
  return digest, int(hits)


def test_compiled_once_for_all_processes(tmp_path):
  """The same bits without a cache, with an empty, a full and a shared one."""
  bare = _stepped(_start(HOURJAX_COMPILATION_CACHE="off", HOME=str(tmp_path)))
  assert bare[1] == 0 and not list(tmp_path.iterdir())
  every = {"XDG_CACHE_HOME": str(tmp_path / "cache"),
           "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}  # fmt: skip
  together = [_stepped(each) for each in [_start(**every) for _ in range(2)]]
  assert {digest for digest, _ in together} == {bare[0]}
  (folder,) = (tmp_path / "cache" / "hourjax").iterdir()
  assert folder.stat().st_mode & 0o777 == 0o700
  entries = sorted(folder.glob("*-cache"))
  assert entries
  # One of them was killed while it wrote.
  entries[0].write_bytes(entries[0].read_bytes()[:100])
  entries[0].with_name(entries[0].name[: -len("-cache")] + "-atime").unlink()
  digest, hits = _stepped(_start(**every))
  assert digest == bare[0] and hits == len(entries) - 1
  assert _stepped(_start(**every)) == (bare[0], len(entries))


def _machine(tmp_path, *files, **contents):
  """A root folder with these files, and text in some of them."""
  for name in files:
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("")
  for number, (vendor, device) in enumerate(contents.get("pci", ())):
    card = tmp_path / f"sys/bus/pci/devices/0000:00:0{number}.0"
    card.mkdir(parents=True)
    (card / "vendor").write_text(f"{vendor}\n")
    (card / "device").write_text(f"{device}\n")
  return f"{tmp_path}/"


PLAIN = (("0x8086", "0x1237"), ("0x1ae0", "0x0042"))  # a Google network card


@pytest.mark.parametrize(
  "files, pci, plugins, environ, said",
  [
    ((), PLAIN, [], {}, "cpu"),
    ((), (), [], {}, "cpu"),  # a container that hides its machine
    # TPU VMs: v4 and v5e, v5p and later, by their cards alone, by variables.
    (["dev/accel0"], PLAIN, [], {}, None),
    (["dev/accel/0"], PLAIN, [], {}, None),
    (["dev/vfio/0", "dev/vfio/vfio"], PLAIN, [], {}, None),
    ((), (*PLAIN, ("0x1ae0", "0x0063")), [], {}, None),
    ((), (*PLAIN, ("0x1ae0", "0x006f")), [], {}, None),
    ((), (), [], {"TPU_WORKER_HOSTNAMES": "a,b"}, None),
    ((), (), [], {"JAX_FORCE_TPU_INIT": "1"}, None),
    (["dev/vfio/vfio"], PLAIN, [], {}, "cpu"),  # no card is handed on
    # jax itself says so, in our parent, where there is no TPU.
    ((), PLAIN, [], {"TPU_SKIP_MDS_QUERY": "1", "TPU_LIBRARY_PATH": "x"},
     "cpu"),
    # GPUs need a plugin of jax.
    (["dev/nvidia0"], PLAIN, [], {}, "cpu"),
    (["dev/nvidia0"], PLAIN, ["xla_cuda13"], {}, "cuda,cpu"),
    (["dev/nvidiactl"], PLAIN, ["xla_cuda12"], {}, "cuda,cpu"),
    (["dev/dxg"], (), ["xla_cuda12"], {}, "cuda,cpu"),
    (["dev/nvidia0"], PLAIN, ["xla_cuda12"], {"CUDA_VISIBLE_DEVICES": ""},
     "cpu"),
    ((), PLAIN, ["xla_cuda12"], {}, "cpu"),
    ((), PLAIN, ["rocm7"], {}, None),
    # The user knows best.
    ((), PLAIN, [], {"JAX_PLATFORMS": "tpu"}, None),
    ((), PLAIN, [], {"JAX_PLATFORMS": ""}, None),
  ],
)  # fmt: skip
def test_platforms(tmp_path, monkeypatch, files, pci, plugins, environ, said):
  monkeypatch.setattr(jax_environment, "_plugins", lambda: plugins)
  root = _machine(tmp_path, *files, pci=pci)
  assert jax_environment.platforms(environ, root) == said


@pytest.mark.parametrize(
  "pci, environ, generation",
  [
    ((), {}, ""),
    (PLAIN, {}, ""),
    ((*PLAIN, ("0x1ae0", "0x006f")), {}, "v6e"),
    ((*PLAIN, ("0x1ae0", "0x0063")), {"TPU_ACCELERATOR_TYPE": "v6e-8"}, "v5e"),
    ((), {"TPU_ACCELERATOR_TYPE": "v6e-8"}, "v6e"),
    ((), {"TPU_ACCELERATOR_TYPE": "v5litepod-16"}, "v5e"),
  ],
)
def test_flags_of_the_compiler(tmp_path, pci, environ, generation):
  """They are those of the machine's TPU; a user's flags win."""
  root = _machine(tmp_path, pci=pci)
  assert jax_environment.tpu_generation(environ, root) == generation
  own = jax_environment.COMPILER_FLAGS.get(generation, ())
  assert (generation == "v6e") == bool(own)
  assert jax_environment.compiler_flags(environ, root) == " ".join(own)
  given = "--xla_enable_async_all_gather=false --xla_x=1"
  mixed = jax_environment.compiler_flags(
    environ | {"LIBTPU_INIT_ARGS": given}, root
  )
  # A plan for another generation takes the user's flags, and none of ours.
  inherited = {"LIBTPU_INIT_ARGS": mixed}
  assert jax_environment.flags_of("v5e", inherited) == given
  assert mixed.split() == [
    *(flag for flag in own if "enable_async_all_gather=" not in flag),
    *given.split(),
  ]


def test_flags_of_the_compiler_for_gpus():
  own = "--xla_gpu_enable_latency_hiding_scheduler"
  assert jax_environment.gpu_flags({}) == f"{own}=true"
  given = {"XLA_FLAGS": f"--xla_x=1 {own}=false", "LIBTPU_INIT_ARGS": "--y"}
  assert jax_environment.gpu_flags(given) == given["XLA_FLAGS"]
  assert jax_environment.gpu_flags({"XLA_FLAGS": "--xla_x=1"}) == (
    f"{own}=true --xla_x=1"
  )
  assert jax_environment.flags_in_use(given) == f"--y --xla_x=1 {own}=false"
  assert not jax_environment.flags_in_use({})
  # A flag that this version of jax does not know would end every process.
  subprocess.run(
    [sys.executable, "-c", "import jax; jax.devices()"],
    env=os.environ | {"XLA_FLAGS": f"{own}=true", "JAX_PLATFORMS": "cpu"},
    check=True,
  )


def test_where_programs_are_kept(tmp_path):
  def folder(**environ):
    return jax_environment.cache_folder(environ)

  home = pathlib.Path.home() / ".cache" / "hourjax"
  assert folder().parent == home
  assert folder(XDG_CACHE_HOME="relative").parent == home
  assert folder(XDG_CACHE_HOME=f"{tmp_path}").parent == tmp_path / "hourjax"
  assert folder(HOURJAX_COMPILATION_CACHE=f"{tmp_path}") == tmp_path
  for off in ("off", "OFF", "0", "none"):
    assert folder(HOURJAX_COMPILATION_CACHE=off) is None
  assert folder(JAX_COMPILATION_CACHE_DIR=f"{tmp_path}") is None


def test_what_a_notebook_has_configured_stays(tmp_path):
  code = f"""
import jax
jax.config.update("jax_platforms", "cpu,cuda")
jax.config.update("jax_compilation_cache_dir", {str(tmp_path / "own")!r})
from hourjax import jax_environment
jax_environment.prepare()
assert jax.config.jax_compilation_cache_dir == {str(tmp_path / "own")!r}
assert jax.config.jax_compilation_cache_max_size == -1
assert jax.config.jax_platforms == "cpu,cuda"
import os
print(sorted(name for name in os.environ if name.startswith("JAX_")))
"""
  done = subprocess.run(
    [sys.executable, "-c", code],
    env=_environment(XDG_CACHE_HOME=str(tmp_path / "cache")),
    capture_output=True,
    text=True,
  )
  assert (done.returncode, done.stdout) == (0, "[]\n"), done.stderr
  assert not (tmp_path / "cache").exists()


def test_a_cache_without_a_bound_keeps_its_programs(tmp_path):
  every = {"XDG_CACHE_HOME": str(tmp_path),
           "JAX_COMPILATION_CACHE_MAX_SIZE": "-1",
           "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}  # fmt: skip
  digest, hits = _stepped(_start(**every))
  assert hits == 0
  again, hits = _stepped(_start(**every))
  assert again == digest and hits > 0


def test_folders_that_are_not_ours_alone(tmp_path):
  usable = jax_environment._usable
  assert usable(tmp_path / "new" / "folder")
  shared = tmp_path / "shared"
  shared.mkdir()
  shared.chmod(0o777)
  assert not usable(shared)
  (tmp_path / "file").write_text("")
  assert not usable(tmp_path / "file" / "folder")
  assert not usable(pathlib.Path("/proc/hourjax"))  # a home that is read-only


def test_a_chosen_folder_that_cannot_be_used(tmp_path):
  (tmp_path / "file").write_text("")
  chosen = str(tmp_path / "file" / "folder")
  done = subprocess.run(
    [sys.executable, "-m", "hourjax.demo", "--help"],
    env=_environment(HOURJAX_COMPILATION_CACHE=chosen),
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0
  assert f"HOURJAX_COMPILATION_CACHE={chosen} is not used" in done.stderr


# --- freed memory -----------------------------------------------------------

FREED = """
import resource, sys
from hourjax import jax_environment
def faults():
  before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
  bytearray(64 << 20)
  return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
environ = dict(x.split("=") for x in sys.argv[1:])
kept = jax_environment.keep_freed_memory(environ)
faults()
print(kept, faults())
"""


@pytest.mark.parametrize(
  "environ, kept",
  [
    (["JAX_PLATFORMS=cpu"], True),
    (["JAX_PLATFORMS=cpu", "MALLOC_ARENA_MAX=4"], False),
    (["JAX_PLATFORMS=tpu"], False),
  ],
)
@pytest.mark.skipif(
  platform.libc_ver()[0] != "glibc", reason="another C library"
)
def test_freed_memory_is_kept(environ, kept):
  """A second array of 64 MiB, 32 huge pages, takes the pages of the first."""
  out = subprocess.run(
    [sys.executable, "-c", FREED, *environ],
    env=_environment(),
    capture_output=True,
    text=True,
    check=True,
  ).stdout.split()
  assert out[0] == str(kept)
  assert (int(out[1]) < 16) == kept
