import subprocess
import sys
import textwrap

import jax
import numpy as np
import pytest

from hourjax.extraction.encoder import Encoder
from tests.extraction import towers
from tests.xla_flags import xla_flags


@pytest.fixture(scope="module")
def params():
  return towers.params()


def _pixels(count, seed=0):
  shape = (count, 32, 32, 3)
  rng = np.random.default_rng(seed)
  return rng.integers(0, 256, shape, dtype=np.uint8)


def test_features_are_those_of_the_model(params):
  encoder = Encoder(params, towers.MODEL, batch_frames=6)
  assert (encoder.batch, encoder.shape) == (6, towers.SHAPE)
  got = np.asarray(encoder(_pixels(6)))
  expected = towers.features(params, _pixels(6))
  np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5)


def test_a_frame_does_not_depend_on_its_neighbours(params):
  encoder = Encoder(params, towers.MODEL, batch_frames=8)
  one = np.asarray(encoder(_pixels(8)))
  mixed = _pixels(8, seed=1)
  mixed[5] = _pixels(8)[2]
  np.testing.assert_array_equal(np.asarray(encoder(mixed))[5], one[2])


def test_only_the_tower_is_placed(params):
  tower = {p: v for p, v in params.items() if p.startswith("vision/")}
  encoder = Encoder(params, towers.MODEL, batch_frames=2)
  assert encoder._params.keys() == tower.keys() != params.keys()
  alone = Encoder(tower, towers.MODEL, batch_frames=2)
  np.testing.assert_array_equal(alone(_pixels(2)), encoder(_pixels(2)))


def test_fingerprints(params):
  one = Encoder(params, towers.MODEL, batch_frames=1).fingerprint
  numpy = jax.tree.map(np.asarray, params)
  assert Encoder(numpy, towers.MODEL, batch_frames=1).fingerprint == one
  other = Encoder(towers.other_params(), towers.MODEL, batch_frames=1)
  assert other.fingerprint != one
  changed = dict(params) | {"decoder/embedding": 0 * params["newline"]}
  assert Encoder(changed, towers.MODEL, batch_frames=1).fingerprint == one


@pytest.mark.slow
def test_eight_devices_give_the_features_of_one(params, tmp_path):
  """Batches of 8 frames, one a device; 5 asked for are rounded up."""
  np.save(tmp_path / "pixels.npy", _pixels(8))
  code = f"""
    import jax, numpy as np
    from hourjax.extraction.encoder import Encoder
    from tests.extraction import towers
    assert len(jax.devices()) == 8
    encoder = Encoder(towers.params(), towers.MODEL, batch_frames=5)
    assert encoder.batch == 8
    features = encoder(np.load({str(tmp_path / "pixels.npy")!r}))
    assert len(features.sharding.device_set) == 8
    assert features.addressable_shards[0].data.shape[0] == 1
    np.save({str(tmp_path / "features.npy")!r}, np.asarray(features))
  """
  subprocess.run(
    [sys.executable, "-c", textwrap.dedent(code)],
    check=True,
    env={
      "JAX_PLATFORMS": "cpu",
      "XLA_FLAGS": xla_flags(8),
      "PYTHONPATH": ".",
      "PATH": "/usr/bin:/bin",
    },
  )
  one = Encoder(params, towers.MODEL, batch_frames=8)(_pixels(8))
  eight = np.load(tmp_path / "features.npy")
  np.testing.assert_allclose(eight, one, rtol=0, atol=1e-5)
