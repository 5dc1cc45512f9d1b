import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

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
