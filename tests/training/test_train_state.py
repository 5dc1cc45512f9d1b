"""Where first parameters come from: published weights, read onto the mesh."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hourjax.data.pipeline import ReadOptions
from hourjax.data.rows import Size
from hourjax.errors import UserError
from hourjax.training import train_state
from hourjax.training.config import build_experiment
from hourjax.training.train_state import initial_params
from tests.weights import folders

MODEL = dataclasses.replace(folders.UNTIED, dtype="float32", remat="none")


@pytest.fixture
def folder(tmp_path):
  return folders.save(tmp_path)


def _experiment(init, **changes):
  parts = {"forgetting": {}, "data": {}, "optimizer": {}}
  return build_experiment(
    {
      "model": dataclasses.asdict(MODEL),
      "rows": dataclasses.asdict(Size()),
      "read": dataclasses.asdict(ReadOptions()),
      "init": str(init),
      **parts,
      **changes,
    }
  )


@pytest.mark.parametrize("split", [False, True])
def test_published_weights_in_float32(folder, split):
  here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  where = dict.fromkeys(folders.shapes(folders.UNTIED), here)
  got = initial_params(_experiment(folder), where if split else None)
  folders.assert_drawn(got)
  for value in got.values():
    assert isinstance(value, jax.Array) and value.dtype == np.float32


def test_a_step_may_use_them_up(folder):
  """Memory that was read into is not overwritten while it is another's."""
  before = initial_params(_experiment(folder))
  name = "decoder/embedding"
  kept = np.array(before[name])
  add = jax.jit(lambda x: x + 1, donate_argnums=0)
  after = add(before[name])
  np.testing.assert_array_equal(after, kept + 1)
  assert before[name].is_deleted()
  folders.assert_drawn(initial_params(_experiment(folder)))


@pytest.mark.parametrize(
  "keys, message",
  [
    ({"rope_theta": 1e4}, r"decoder\.rope_base is 10000\.0, config\.model"),
    ({"num_attention_heads": 2}, r"decoder\.heads is 2, config\.model"),
    ({"rope_scaling": {"type": "yarn", "factor": 4}}, "'yarn'"),
    ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
  ],
)
def test_weights_of_another_function_are_refused(folder, keys, message):
  folders.describe(folder, **keys)
  with pytest.raises(UserError, match=message):
    initial_params(_experiment(folder))


def test_what_is_missing_is_drawn_where_that_is_asked_for(folder, monkeypatch):
  folders.edit(
    folder,
    lambda t: {n: v for n, v in t.items() if "vision_resampler" not in n},
  )
  with pytest.raises(UserError, match=r"missing: model\.vision_resampler"):
    initial_params(_experiment(folder))
  fresh = {p: jnp.ones(x) for p, x in folders.shapes(MODEL).items()}
  monkeypatch.setattr(train_state, "init_params", lambda *_, **__: fresh)
  got = initial_params(_experiment(folder, draw_missing="memaug"))
  expected = folders.drawn(folders.UNTIED)
  assert got.keys() == expected.keys()
  same = {p for p in got if np.array_equal(got[p], expected[p])}
  assert same == {p for p in got if not p.startswith("memaug/")}
