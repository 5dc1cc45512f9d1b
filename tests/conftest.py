import os
import signal

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Nothing of ours is left in, or read from, the user's own cache.
os.environ.setdefault("HOURJAX_COMPILATION_CACHE", "off")
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
