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
hypothesis.settings.register_profile(
  "hourjax", deadline=None, derandomize=True, database=None
)
hypothesis.settings.load_profile("hourjax")
