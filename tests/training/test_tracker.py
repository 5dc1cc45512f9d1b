"""W&B offline, which is the real package without a network, and a fake."""

import importlib.util
import sys
import types

import pytest

from hourjax.errors import UserError
from hourjax.training.trackers import WandbRun, require_wandb

CONFIG = {"model": {"layers": 36}, "seed": 0}


class Fake(types.ModuleType):
  """As much of wandb as is used; init refuses, or log fails."""

  class Error(Exception):
    pass

  def __init__(self, *, refuses=False):
    super().__init__("wandb")
    self.__spec__ = importlib.util.spec_from_loader("wandb", None)
    self.errors = types.SimpleNamespace(Error=self.Error)
    self.refuses, self.calls, self.given = refuses, [], {}

  def Settings(self, **values):
    return values

  def init(self, **given):
    if self.refuses:
      raise self.Error("no API key")
    self.given = given
    return self

  def log(self, values, step):
    self.calls.append((step, values))
    raise ConnectionError("gone")

  def finish(self):
    self.calls.append("finish")


def test_missing(monkeypatch):
  monkeypatch.setitem(sys.modules, "wandb", None)
  with pytest.raises(UserError) as error:
    require_wandb("hours")
  assert "config.watch.wandb is 'hours'" in str(error.value)
  assert "`pip install -e '.[wandb]'`" in str(error.value)


def test_refused(monkeypatch, tmp_path):
  monkeypatch.setitem(sys.modules, "wandb", Fake(refuses=True))
  with pytest.raises(UserError, match="W&B says: no API key; run `wandb login"):
    WandbRun("hours", tmp_path, CONFIG)


def test_a_failure_is_said_once_and_ends_it(monkeypatch, tmp_path, capsys):
  fake = Fake()
  monkeypatch.setitem(sys.modules, "wandb", fake)
  run = WandbRun("hours", tmp_path / ".", CONFIG)
  assert fake.given["project"] == "hours" and fake.given["config"] == CONFIG
  assert fake.given["name"] == tmp_path.name
  assert fake.given["resume"] == "allow"
  for step in range(5):
    run.write(step, {"train/loss": 1.0})
  run.close()
  run.close()
  assert fake.calls == [(0, {"train/loss": 1.0})]
  error = capsys.readouterr().err
  assert error.count("W&B gets nothing more") == 1 and "gone" in error


def test_offline_and_resumed(monkeypatch, tmp_path):
  for name, value in [("MODE", "offline"), ("SILENT", "true")]:
    monkeypatch.setenv(f"WANDB_{name}", value)
  monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "settings"))
  monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path / "cache"))
  workdir = tmp_path / "run"
  workdir.mkdir()
  for values in ({1: 2.5, 2: 2.25}, {2: 2.25, 3: 2.0}):
    run = WandbRun("hours", workdir, CONFIG)
    for step, loss in values.items():
      run.write(step, {"train/loss": loss})
    run.close()
  (name,) = (workdir / "wandb_id.txt").read_text().split()
  runs = sorted((workdir / "wandb").glob(f"offline-run-*-{name}/*.wandb"))
  # One id: `wandb sync` puts both starts into one run.
  assert [path.name for path in runs] == [f"run-{name}.wandb"] * len(runs)
  written = b"".join(path.read_bytes() for path in runs)
  assert b"train/loss" in written and b"2.25" in written
  assert b"layers" in written and b"hours" in written
