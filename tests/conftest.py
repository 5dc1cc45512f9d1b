import gc
import os
import pathlib
import signal

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Nothing of ours is left in, or read from, the user's own cache.
os.environ.setdefault("HOURJAX_COMPILATION_CACHE", "off")
# Instead one folder of the checkout serves all runs of the tests, and all their
# processes, which inherit these variables: a second run takes half the time.
# Programs are found by their content, so what is found is never stale.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
  os.environ["HOURJAX_TESTS_PROCESS"] = str(os.getpid())
  os.environ["JAX_COMPILATION_CACHE_DIR"] = str(
    pathlib.Path(__file__).parents[1] / ".pytest_cache" / "jax"
  )
  # A bound set here would cost a lock at every look; see `pytest_unconfigure`.
  os.environ["JAX_COMPILATION_CACHE_MAX_SIZE"] = "-1"
  os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.05"
  os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
# A script starts what it leaves in the background without Ctrl-C, and the
# processes that tests interrupt would inherit that.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
  signal.signal(signal.SIGINT, signal.default_int_handler)

from tests.xla_flags import xla_flags

os.environ["XLA_FLAGS"] = xla_flags()

import hypothesis
import jax
import pytest
from jaxtyping import install_import_hook

from tests import typechecks

# Must come before anything imports hourjax.
install_import_hook("hourjax", f"{typechecks.__name__}.typechecked")
jax.config.update("jax_numpy_rank_promotion", "raise")
# HYPOTHESIS_PROFILE=ci (the default) tries few examples of each property, and
# always the same ones; nightly tries many, and other ones every time. A test
# that asks for a number of its own gets that in both.
_ALWAYS = {"deadline": None, "database": None}
_PROFILES = {
  "ci": {"max_examples": 30, "derandomize": True},
  "nightly": {"max_examples": 300, "derandomize": False, "print_blob": True},
}
for _name, _settings in _PROFILES.items():
  hypothesis.settings.register_profile(_name, **_ALWAYS, **_settings)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


# The files that take longest, which are begun first: else one worker waits for
# the other to end the last of them.
_LONGEST = (
  "training/test_train_processes.py",
  "training/test_faults.py",
  "ablation/test_ablation_run.py",
  "parallel/test_sharded_step.py",
  "training/test_train_step.py",
  "inference/test_engine.py",
  "evaluation/test_evaluate_command.py",
  "inference/test_load.py",
  "inference/test_steps_on_tpu.py",
  "training/test_loop.py",
  "training/test_mixed_sources.py",
  "inference/test_engine_on_meshes.py",
  "benchmarks/test_attention_benchmark.py",
  "benchmarks/test_data.py",
  "kernels/test_dispatch.py",
  "launch/test_notebook.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
  """Begins with the files that take longest, in their order."""
  tests = pathlib.Path(__file__).parent
  ranks = {str(tests / name): rank for rank, name in enumerate(_LONGEST)}
  items.sort(key=lambda item: ranks.get(str(item.path), len(ranks)))


# A compiled program is several pieces of mapped memory, of which Linux gives a
# process 65,530: the whole of the tests compiles more than that in a worker.
_MAX_MAPS = 20_000


@pytest.fixture(autouse=True, scope="module")
def _room_for_programs():
  """Frees compiled programs after a file of tests, if there are many."""
  yield
  maps = pathlib.Path("/proc/self/maps")
  if maps.exists() and maps.read_bytes().count(b"\n") > _MAX_MAPS:
    jax.clear_caches()
    gc.collect()


_MAX_BYTES = 4 * 2**30  # of compiled programs that are kept


def pytest_unconfigure(config: pytest.Config) -> None:
  """Removes the compiled programs that were not used for longest.

  Only in the process that began the run, and only what exceeds `_MAX_BYTES`.
  """
  if os.environ.get("HOURJAX_TESTS_PROCESS") != str(os.getpid()):
    return
  folder = pathlib.Path(os.environ["JAX_COMPILATION_CACHE_DIR"])
  files = [(path, path.stat()) for path in folder.glob("*")]
  files.sort(key=lambda file: file[1].st_atime)
  excess = sum(stat.st_size for _, stat in files) - _MAX_BYTES
  for path, stat in files:
    if excess <= 0:
      break
    path.unlink(missing_ok=True)
    excess -= stat.st_size
