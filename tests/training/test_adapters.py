"""Runs of adapters: their base, checkpoints, and what they continue."""

import dataclasses
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hourjax.errors import UserError
from hourjax.models import lora
from hourjax.models.params import init_params
from hourjax.parallel.mesh import MeshConfig, make_mesh
from hourjax.training import loop
from hourjax.training.adapters import first_adapters, load_base
from hourjax.training.checkpoint import Checkpoints, restore_params
from hourjax.training.checkpoint_format import adapter_manifest
from hourjax.training.config import build_experiment
from hourjax.training.metric_writer import read_metrics
from hourjax.training.train_state import (
  TrainState,
  abstract_state,
  initial_params,
)
from tests.training import runs

STEPS = 4
LORA = {
  "lora__rank": 2,
  "lora__alpha": 8.0,
  "lora__base": "float32",
  "lora__dropout": 0.05,
}


def _experiment(data, init, **changes):
  config = runs.small_config(
    data, steps=STEPS, checkpoint_every=2, init=str(init), **LORA | changes
  )
  return build_experiment(config.to_dict())


def _save(experiment, folder, seed):
  """Writes the workdir of a run whose weights are random."""
  params = init_params(experiment.model, seed)
  state = TrainState(jnp.zeros((), jnp.int32), params, {}, ())
  checkpoints = Checkpoints(folder)
  checkpoints.save(state, 0, "", dataclasses.asdict(experiment))
  checkpoints.finish()
  checkpoints.close()
  return folder


@pytest.fixture(scope="module")
def base(data, tmp_path_factory):
  made = _experiment(data, "", lora__rank=0)
  return _save(made, tmp_path_factory.mktemp("base"), seed=3)


@pytest.fixture(scope="module")
def run(data, base, tmp_path_factory):
  """Workdir of a run of adapters, and its experiment."""
  workdir, made = tmp_path_factory.mktemp("run"), _experiment(data, base)
  loop.train(made, workdir)
  return workdir, made


def _abstract(experiment):
  mesh = make_mesh(MeshConfig(), jax.devices()[:1])
  return abstract_state(experiment, mesh, STEPS)[0]


def test_checkpoints_hold_adapters_alone(run, base):
  workdir, made = run
  params = restore_params(workdir).params
  names = {path.rpartition("/")[2] for path in params}
  assert names == {"lora_a", "lora_b"}
  assert all(
    np.any(np.asarray(params[p])) for p in params if p.endswith("lora_b")
  )
  size = sum(f.stat().st_size for f in workdir.glob("checkpoints/4/**/*"))
  whole = sum(f.stat().st_size for f in base.glob("checkpoints/0/**/*"))
  assert size < whole
  assert adapter_manifest(workdir)["config"]["init"] == made.init
  assert adapter_manifest(base) is None


def test_only_adapters_learn_and_the_loss_falls(run):
  workdir, _ = run
  losses = [row["loss"] for row in read_metrics(workdir)]
  assert len(losses) == STEPS
  assert losses[-1] < losses[0]


def test_a_run_that_was_interrupted_ends_the_same(run, tmp_path):
  workdir, made = run
  with runs.interrupted_at(3):
    loop.train(made, tmp_path)
  loop.train(made, tmp_path)
  ours, theirs = (restore_params(x).arrays for x in (tmp_path, workdir))
  assert ours == theirs


def test_another_base_is_refused(data, run, base, tmp_path):
  workdir, made = run
  other = _save(made, tmp_path / "other", seed=4)
  copy = tmp_path / "copy"
  shutil.copytree(workdir, copy)
  config = copy / "config.json"
  config.write_text(config.read_text().replace(str(base), str(other)))
  found = adapter_manifest(workdir)["base"]
  with pytest.raises(
    UserError, match=rf"adapters of the base '{found}', and config.init has"
  ):
    loop.train(dataclasses.replace(made, init=str(other)), copy)


def test_adapters_go_on_from_another_run(data, run, base):
  workdir, _ = run
  made = _experiment(data, workdir)
  like = _abstract(made)
  found = load_base(made, like)
  params = first_adapters(made, like, found)
  saved = restore_params(workdir).params
  assert saved.keys() == like.trained.keys()
  for path, value in saved.items():
    np.testing.assert_array_equal(params[path], value)
  for path, value in initial_params(_experiment(data, base)).items():
    if not path.startswith("vision/"):
      np.testing.assert_array_equal(params[path], value)
  with pytest.raises(UserError, match=r"rank 2 on all-linear, and this run's"):
    wrong = _experiment(data, workdir, lora__rank=3)
    load_base(wrong, _abstract(wrong))


def test_full_training_goes_on_from_adapters_merged_into_their_base(
  data, run, base
):
  workdir, _ = run
  merged = initial_params(_experiment(data, workdir, lora__rank=0))
  plain = initial_params(_experiment(data, base, lora__rank=0))
  adapters = restore_params(workdir).params
  layer = "memaug/layers/fc1"
  expected = plain[f"{layer}/kernel"] + 4 * np.matmul(
    adapters[f"{layer}/lora_a"], adapters[f"{layer}/lora_b"]
  )
  np.testing.assert_allclose(merged[f"{layer}/kernel"], expected, atol=1e-6)
  assert np.abs(expected - plain[f"{layer}/kernel"]).max() > 1e-4
  path = "decoder/embedding"
  np.testing.assert_array_equal(merged[path], plain[path])


@pytest.mark.parametrize("kind", ["bfloat16", "int8", "nf4"])
def test_the_base_in_few_bits(data, base, kind):
  made = _experiment(data, base, lora__base=kind, lora__dora=True)
  like = _abstract(made)
  found = load_base(made, like)
  assert {p: (x.shape, x.dtype) for p, x in found.params.items()} == {
    p: (x.shape, x.dtype) for p, x in like.frozen.items()
  }
  assert not any(path.startswith("vision/") for path in found.params)
  # The name of the weights is that of the weights, not of how they are kept.
  assert found.fingerprint == adapter_fingerprint(data, base)
  params = first_adapters(made, like, found)
  magnitude = params["projector/fc2/lora_magnitude"]
  whole = initial_params(_experiment(data, base))["projector/fc2/kernel"]
  np.testing.assert_allclose(magnitude, lora.column_norms(whole), rtol=0.05)


def adapter_fingerprint(data, base):
  made = _experiment(data, base)
  return load_base(made, _abstract(made)).fingerprint


@pytest.mark.parametrize(
  "changes, message",
  [
    ({"optimizer__vision": 1e-5}, "adapters leave the tower as it is"),
    ({"lora__targets": "decoderr/*"}, r"has 'decoderr/\*', which is none of"),
    (
      {"lora__targets": "projector/*", "optimizer__projector": 0.0},
      "names no layer that is trained",
    ),
    ({"lora__rank": 10_000}, "lower the rank"),
  ],
)
def test_what_does_not_suit_the_model_is_refused(data, base, changes, message):
  with pytest.raises(UserError, match=message):
    _abstract(_experiment(data, base, **changes))


def test_adapters_need_a_trained_model(data):
  made = _experiment(data, "")
  with pytest.raises(UserError, match=r"rank is 2 and config\.init empty"):
    load_base(made, _abstract(made))


def test_frozen_components_have_no_adapters(data, base):
  made = _experiment(data, base, optimizer__decoder=0.0)
  trained = _abstract(made).trained
  assert {path.split("/")[0] for path in trained} == {"projector", "memaug"}


@pytest.mark.parametrize(
  "changes, message",
  [
    (
      {"model__memory_chunk": 128, "mesh__seq": 2},
      r"memory_chunk is 128 and config\.mesh\.seq 2: .* set config",
    ),
    (
      {"model__offload": "host", "model__remat": "dots"},
      r"offload is 'host' and config\.model\.remat 'dots', .*remat=full",
    ),
    ({"lora__rank": -1}, r"config\.lora\.rank is -1; it must be at least 0"),
    ({"lora__base": "int2"}, r"config\.lora\.base is 'int2'; choose float32"),
  ],
)
def test_keys_that_contradict_each_other(data, base, changes, message):
  with pytest.raises(UserError, match=message):
    _experiment(data, base, **changes)
