import os
import shutil
import signal
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Nothing of ours is left in, or read from, the user's own cache.
os.environ.setdefault("HOURJAX_COMPILATION_CACHE", "off")
# Instead one folder serves a whole run: this process makes it, and the workers
# of pytest-xdist and the processes that tests start inherit these variables. A
# folder named in JAX_COMPILATION_CACHE_DIR is used and kept, which halves the
# time of a second run.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
  os.environ["HOURJAX_TESTS_PROCESS"] = str(os.getpid())
  os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(
    prefix="hourjax-tests-"
  )
  # Without a bound of its size no lock is taken at every look into it.
  os.environ["JAX_COMPILATION_CACHE_MAX_SIZE"] = "-1"
  os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.05"
  os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
# A script starts what it leaves in the background without Ctrl-C, and the
# processes that tests interrupt would inherit that.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
  signal.signal(signal.SIGINT, signal.default_int_handler)

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


def pytest_unconfigure(config: pytest.Config) -> None:
  """Removes the programs that a run compiled, in the process that began it."""
  if os.environ.get("HOURJAX_TESTS_PROCESS") == str(os.getpid()):
    shutil.rmtree(os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
