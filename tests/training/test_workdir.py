"""What a run reads back of its own folder, when others wrote there."""

import dataclasses
import json

import pytest

from configs import demo
from hourjax.errors import UserError
from hourjax.training.config import build_experiment
from hourjax.training.data_loader import UnreadSampleLog
from hourjax.training.faults import NonFiniteSteps
from hourjax.training.metric_writer import MetricsFile, read_curve, read_metrics
from hourjax.training.throughput import Goodput
from hourjax.training.workdir import (
  check_workdir,
  find_config,
  read_config,
)
from tests import tampering


def _goodput(folder):
  Goodput(folder, start=9).close()


def _unread(folder):
  UnreadSampleLog(folder, start=9, max_share=0.5)


def _nonfinite(folder):
  NonFiniteSteps(folder, start=9, max_in_a_row=2, primary=False)


def _metrics(folder):
  MetricsFile(folder, start=9).close()


@pytest.mark.parametrize(
  ("name", "read", "line", "said"),
  [
    ("metrics", read_metrics, {"step": "1"}, "step is '1'"),
    ("metrics", _metrics, {"step": None}, "step is None"),
    ("metrics", read_metrics, {"step": 1, "loss": "low"}, "loss"),
    ("metrics", read_metrics, {"step": 1, "loss": [1]}, "loss"),
    ("metrics", read_metrics, {"step": 1, "loss": True}, "loss"),
    ("goodput", _goodput, {"began": "x", "at": 1}, "began is 'x'"),
    ("goodput", _goodput, {"began": 1, "at": 1, "lost": 5}, "lost is 5"),
    ("goodput", _goodput, {"kept": 1.0, "at": 1}, "step is missing"),
    ("goodput", _goodput, {"seconds": 1.0, "at": 1, "lost": []}, "lost is"),
    ("nonfinite", _nonfinite, {"step": []}, "step is "),
    ("unread", _unread, {"step": 1}, "kind is missing"),
    ("unread", _unread, {"step": 1.5, "kind": "a"}, "step is 1.5"),
  ],
)
def test_a_line_of_another_kind_is_named(tmp_path, name, read, line, said):
  path = tmp_path / f"{name}.jsonl"
  path.write_text('{"torn": \n' + json.dumps(line) + "\n")
  with pytest.raises(UserError, match=rf"{name}\.jsonl, line 2: .*{said}"):
    read(tmp_path)


@pytest.mark.parametrize(
  "torn", [b'{"step": 2, "lo', b"\xff\xfe", b"[" * 20_000, b"9" * 5000, b"3"]
)
def test_what_a_kill_left_is_dropped(tmp_path, torn):
  path = tmp_path / "metrics.jsonl"
  path.write_bytes(b'{"step": 1, "loss": 0.5}\n' + torn)
  assert read_metrics(tmp_path) == [{"step": 1, "loss": 0.5}]
  path.write_bytes(torn + b'\n{"step": 1, "loss": 0.5}\n')
  assert read_metrics(tmp_path) == [{"step": 1, "loss": 0.5}]


def test_a_run_that_began_with_itself(tmp_path):
  for name, before in (("one", "two"), ("two", "one")):
    (tmp_path / name).mkdir()
    (tmp_path / name / "metrics.jsonl").write_text('{"step": 1}\n')
    config = {"init": str(tmp_path / before)}
    (tmp_path / name / "config.json").write_text(json.dumps(config))
  with pytest.raises(UserError, match="began with its own; correct 'init'"):
    read_curve(tmp_path / "one")


@pytest.mark.parametrize(
  ("content", "said"),
  [
    (tampering.POINTER, "Git-LFS pointer"),
    (b"[" * 20_000, "nested too deep"),
    (b"[]", r"is \[\], not the configuration"),
    (b"", "not JSON"),
    (None, "does not exist; train first"),
  ],
)
def test_a_configuration_that_is_something_else(tmp_path, content, said):
  if content is not None:
    (tmp_path / "config.json").write_bytes(content)
  with pytest.raises(UserError, match=f"config.json.* {said}"):
    read_config(tmp_path)
  assert find_config(tmp_path) is None


def test_an_older_configuration_still_goes_on(tmp_path):
  """Whole numbers that older versions wrote for others are the same ones."""
  made = build_experiment(demo.get_config("stage=3").to_dict())
  config = dataclasses.asdict(made) | {"epochs": 1}
  (tmp_path / "config.json").write_text(json.dumps(config))
  check_workdir(made, tmp_path)
