"""A step timed and traced on CPU devices; speed itself is not tested."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from configs import demo
from hourjax.benchmarks import step
from hourjax.errors import UserError
from hourjax.parallel.chips import CHIPS
from hourjax.planning import calibration
from hourjax.planning.calibration import Calibration, calibrated
from hourjax.planning.step_profile import SCOPES
from hourjax.planning.topology import parse_topology
from hourjax.training.config import build_experiment
from tests.xla_flags import xla_flags

ROOT = Path(__file__).parents[2]
# Every component, small, and all of them trained.
TINY = {
  "batch_rows": 2,
  "model.decoder.layers": 1,
  "model.memaug_layers": 1,
  "rows.frames": 128,
  "rows.features": 0,
  "optimizer.name": "adamw",
  "optimizer.vision": 1e-3,
  "optimizer.projector": 1e-3,
}
V5E = CHIPS["v5e"]


def _zeros(_, like, __, ___):
  """A state without the seconds that drawing one takes to compile."""
  return jax.tree.map(
    lambda x: jax.device_put(jnp.zeros(x.shape, x.dtype), x.sharding), like
  )


def _experiment():
  config = demo.get_config("stage=3")
  config.update_from_flattened_dict(TINY)
  return build_experiment(config.to_dict())


@pytest.fixture(scope="module")
def on_a_chip(tmp_path_factory):
  """Figures of a step on one device that is said to be a v5e, and its file."""
  folder = tmp_path_factory.mktemp("step")
  options = step.Options(steps=1, out=str(folder / "calibration.json"))
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(step, "chip_of", lambda kind: V5E)
    patch.setattr(step, "topology_of", lambda *_: parse_topology("v5e:1x1"))
    patch.setattr(step, "fresh_state", _zeros)
    # Of so small a step any part may be a small one.
    patch.setattr(calibration, "_LEAST", 0.0)
    found = step.measure_step(_experiment(), options, folder)
  return found, folder / "calibration.json"


def test_every_component_is_timed_beside_its_plan(on_a_chip):
  figures, _ = on_a_chip
  components, whole = figures["components"], figures["step"]
  assert set(components) == {*SCOPES, "update", "other"}
  for name, part in components.items():
    assert part["seconds"] > 0
    if "forward" in part:
      both = part["forward"] + part["backward"]
      assert both == pytest.approx(part["seconds"], rel=1e-3)
      assert min(part["forward"], part["backward"]) > 0, name
  timed = sum(part["seconds"] for part in components.values())
  assert timed < whole["traced_seconds"] * 1.001
  assert components["other"]["seconds"] < timed / 2
  planned = {
    name: part[key]
    for name, part in components.items()
    for key in part
    if key.startswith("planned")
  }
  assert planned.keys() == set(SCOPES) - {"tower_attention"}
  assert min(planned.values()) > 0
  # A step waits for the longer of products and HBM, and then for the update.
  assert whole["planned_seconds"] > sum(planned.values())
  assert whole["mfu"] == pytest.approx(
    whole["useful_tflop"] * 1e12 / whole["seconds"] / V5E.device_flops, rel=1e-3
  )
  assert whole["waiting"] == whole["planned_waiting"] == 0
  assert figures["hbm"]["planned"] > figures["hbm"]["compiler_update"] / 2 > 0


def test_a_share_of_the_peak_is_operations_over_seconds(on_a_chip):
  """Dense: of all components with weights, the tower's attention left out."""
  figures, path = on_a_chip
  constants = json.loads(path.read_text())["constants"]
  parts = figures["components"]
  dense = set(SCOPES) - {n for n in SCOPES if n.endswith("attention")}
  done = sum(parts[n]["tflop_s"] * parts[n]["seconds"] for n in dense) * 1e12
  seconds = sum(parts[n]["seconds"] for n in dense)
  share = done / seconds / V5E.device_flops
  assert constants["dense"] == pytest.approx(share, rel=1e-3)
  tower = parts["tower_attention"]["tflop_s"] * 1e12 / V5E.device_flops
  assert constants["tower"] == pytest.approx(tower, rel=1e-3)
  causal = parts["decoder_attention"]
  # 5 products backward to 2 forward.
  ratio = causal["forward"] * 2.5 / causal["backward"]
  assert constants["causal_backward"] == pytest.approx(
    constants["causal_forward"] * ratio, rel=2e-3
  )
  assert constants["hbm_bandwidth"] > 0 and constants["link"] is None
  assert figures["left_out"].keys() == {"link"}


def test_its_file_is_of_no_known_generation(on_a_chip):
  """The devices were a CPU's all the same, and the file says so."""
  _, path = on_a_chip
  found = Calibration.model_validate_json(path.read_text())
  assert (found.device_kind, found.devices) == ("cpu", 1)
  with pytest.raises(
    UserError, match="was measured on cpu, and --topology=v5e"
  ):
    calibrated(parse_topology("v5e:1x1"), path)


def test_a_peak_that_is_known_is_not_given(monkeypatch, tmp_path):
  monkeypatch.setattr(step, "chip_of", lambda kind: V5E)
  with pytest.raises(UserError, match="peak of cpu is known, 197; leave it"):
    step.measure_step(_experiment(), step.Options(peak_tflops=1.0), tmp_path)


@pytest.mark.slow
def test_the_command_on_four_devices(tmp_path):
  """Devices that share rows and parameters wait for one another."""
  done = subprocess.run(
    [
      *(sys.executable, "-m", "hourjax.bench", "step", "--json", "--steps=1"),
      "--config=configs/demo.py:stage=3",
      *(f"--config.{key}={value}" for key, value in TINY.items()),
      *("--config.mesh.fsdp=2", "--config.mesh.seq=2", "--peak_tflops=50"),
      f"--out={tmp_path}/out.json",
    ],
    cwd=ROOT,
    env=os.environ | {"XLA_FLAGS": xla_flags(4)},
    capture_output=True,
    text=True,
    timeout=300,
  )
  assert done.returncode == 0, done.stderr
  figures = json.loads(done.stdout)
  assert figures["machine"]["mesh"] == {
    "data": 1,
    "fsdp": 2,
    "seq": 2,
    "tensor": 1,
  }
  assert figures["step"]["waiting"] > 0
  assert figures["components"].keys() == {*SCOPES, "update", "other"}
  constants = json.loads((tmp_path / "out.json").read_text())["constants"]
  assert 0 < constants["dense"] < 1
