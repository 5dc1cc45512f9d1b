import atexit
import os
import shutil
import signal
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# One cache of compiled programs for a whole run: pytest-xdist's workers and
# the processes that tests start inherit it. The first process makes it and
# removes it; nothing is left in, or read from, the user's own cache.
if "HOURJAX_COMPILATION_CACHE" not in os.environ:
  _CACHE = tempfile.mkdtemp(prefix="hourjax-compiled-")
  atexit.register(shutil.rmtree, _CACHE, ignore_errors=True)
  os.environ["HOURJAX_COMPILATION_CACHE"] = _CACHE
# A script starts what it leaves in the background without Ctrl-C, and the
# processes that tests interrupt would inherit that.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
  signal.signal(signal.SIGINT, signal.default_int_handler)

import hypothesis
import jax
from jaxtyping import install_import_hook

from tests import typechecks

# Must come before anything imports hourjax.
install_import_hook("hourjax", f"{typechecks.__name__}.typechecked")
jax.config.update("jax_numpy_rank_promotion", "raise")
if os.environ["HOURJAX_COMPILATION_CACHE"] != "off":
  # The tests' own process, which no command of ours starts.
  jax.config.update(
    "jax_compilation_cache_dir", os.environ["HOURJAX_COMPILATION_CACHE"]
  )
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
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
