"""Data, a run, an exported model and answers of an earlier version.

`tests/held` holds them, and what that version computed from them. People keep
such files for years: whatever changes in the code, they stay readable, mean
the same, and a run goes on as if nothing had changed.
"""

import hashlib
import json
import pathlib
import shutil
import tarfile

import jaxlib
import numpy as np
import pytest

import hourjax
from hourjax.evaluation import report
from hourjax.evaluation.run import evaluate
from hourjax.evaluation.task import open_task
from hourjax.inference.sampling import Sampling
from hourjax.training import loop
from hourjax.training.checkpoint import restore_params
from hourjax.training.config import build_experiment
from hourjax.training.data_loader import open_dataset, row_plan
from hourjax.training.metric_writer import read_metrics
from hourjax.training.workdir import read_config

HELD = pathlib.Path(__file__).parent / "held"
VERSION = "eff9641"
EXPECTED = json.loads((HELD / f"{VERSION}.json").read_text())
QUESTIONS = ("Who stands in the garden?\nA. a cat\nB. a dog", "Why the rain?")
INSTRUCTIONS = ("avx", "avx2", "fma", "avx512f", "avx512_bf16", "amx_bf16")


def arithmetic() -> str:
  """Names what decides the last bits of a number: compiler and processor."""
  path = pathlib.Path("/proc/cpuinfo")
  words = set(path.read_text().split()) if path.exists() else set()
  found = [name for name in INSTRUCTIONS if name in words]
  return " ".join(["jaxlib", jaxlib.__version__, *found])


SAME_BITS = arithmetic() == EXPECTED["arithmetic"]


def digests(params) -> dict[str, str]:
  """Returns shape, dtype and a checksum of each parameter by its path."""
  arrays = {path: np.asarray(value) for path, value in params.items()}
  return {
    path: f"{x.shape} {x.dtype} {hashlib.sha256(x.tobytes()).hexdigest()[:16]}"
    for path, x in sorted(arrays.items())
  }


def answers(model) -> dict[str, list]:
  """Returns what a model says of a stored video, and MemAug's attention."""
  memory = model.encode_memory("data/features/b.mp4.npy")
  ways = (Sampling(), Sampling(temperature=1.0, seed=3))
  given = [
    memory.ask(text, max_tokens=8, sampling=how)
    for text in QUESTIONS
    for how in ways
  ]
  return {
    "texts": [answer.text for answer in given],
    "tokens": [answer.tokens for answer in given],
    "attention": [answer.attention.attention.tolist() for answer in given[::2]],
  }


def losses(workdir) -> list[list[float]]:
  """Returns step, loss, gradient norm and label tokens of each logged step."""
  names = ("step", "loss", "grad_norm", "tokens")
  return [[row[name] for name in names] for row in read_metrics(workdir)]


def rounded(value):
  """Returns a value of a report, its numbers with seven digits."""
  if isinstance(value, dict):
    return {key: rounded(part) for key, part in value.items()}
  if isinstance(value, list):
    return [rounded(part) for part in value]
  return float(f"{value:.7g}") if isinstance(value, float) else value


@pytest.fixture(scope="module")
def held(tmp_path_factory):
  """The folder in which everything was made; it is never written to."""
  folder = tmp_path_factory.mktemp("earlier")
  with tarfile.open(HELD / f"{VERSION}.tar.xz") as archive:
    archive.extractall(folder, filter="data")
  return folder / "held"


@pytest.fixture(scope="module")
def models(held):
  """The run's model and the exported one."""
  with pytest.MonkeyPatch.context() as patch:
    patch.chdir(held)  # where the paths in a run's configuration start
    return {name: hourjax.load(name) for name in ("run", "export")}


@pytest.fixture(autouse=True)
def _there(held, monkeypatch):
  monkeypatch.chdir(held)


def test_parameters_of_a_run():
  found = restore_params("run")
  assert found.step == EXPECTED["step"]
  assert digests(found.params) == EXPECTED["params"]


@pytest.mark.parametrize("name", ["run", "export"])
def test_parameters_of_a_model(name, models):
  """Both hold those of the run's checkpoint, in the dtypes that answers use."""
  found = models[name].engine.params
  whole = restore_params("run").params
  assert digests(found) == digests(
    {path: whole[path].astype(value.dtype) for path, value in found.items()}
  )


def test_the_plan_of_a_run():
  """A position in the data names the row that it named."""
  experiment = build_experiment(read_config("run"))
  plan = row_plan(experiment, open_dataset(experiment))
  known = json.loads(pathlib.Path("run/plan.json").read_text())
  assert plan.fingerprint() == known["plan"]
  assert plan.rows_in_epoch(0) == known["rows"]


def test_an_evaluation_is_taken_up(models, tmp_path):
  """The model and its questions are known, so nothing is asked again."""
  out = shutil.copytree("run/evaluation/records", tmp_path / "out")
  before, asked = (
    report.load(out).data,
    (out / "answers-00000.jsonl").read_text(),
  )
  task = open_task("records", "data/test.json", features="data/features")
  found = evaluate(models["run"], task, out).data
  # The quantile of its intervals was 1.959964; it has all its digits now.
  assert rounded(found) == rounded(before)
  assert (out / "answers-00000.jsonl").read_text() == asked


@pytest.mark.slow
@pytest.mark.parametrize("name", ["run", "export"])
def test_answers(name, models):
  found, expected = answers(models[name]), EXPECTED["answers"]
  if SAME_BITS:
    assert found == expected
  # bfloat16 has eight bits.
  np.testing.assert_allclose(
    found["attention"], expected["attention"], rtol=0.02
  )


# What step 5 computes since a tiled image has newlines only in rows of which a
# token is kept, as in the official code: one of its rows has a small image.
MENDED = [5, 7.45957088470459, 7.327353000640869, 190.0]


@pytest.mark.slow
def test_a_run_goes_on(held, tmp_path):
  """Its next steps are those that the earlier version took.

  Not to the last bit: gradients of repeated frames are summed in float32 since.
  """
  workdir = shutil.copytree("run", tmp_path / "run")
  loop.train(build_experiment(read_config(workdir)), workdir)
  rtol = 1e-4 if SAME_BITS else 0.02
  *steps, last = losses(workdir)
  np.testing.assert_allclose(steps, EXPECTED["losses"][:4], rtol=rtol)
  np.testing.assert_allclose(last, MENDED, rtol=rtol)
  assert (workdir / "plan.json").read_text() == (
    held / "run" / "plan.json"
  ).read_text()
  skipped = [
    [line["id"] for line in json.loads((folder / "skipped.json").read_text())]
    for folder in (workdir, held / "run")
  ]
  assert skipped[0] == skipped[1]
