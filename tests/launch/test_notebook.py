"""launch/evaluate.ipynb: runs on a small demo, and holds real outputs."""

import base64
import io
import json
import re

import nbformat
import pytest
from nbclient.exceptions import CellExecutionError
from PIL import Image

from hourjax.evaluation import report
from tests.launch import notebooks
from tests.launch.notebooks import NOTEBOOK
from tests.training import runs


@pytest.fixture(scope="module")
def work(tmp_path_factory):
  """A demo of four videos; both models were trained for two steps."""
  folder = tmp_path_factory.mktemp("demo")
  data = runs.make_data(folder / "data")
  for name, layers in {"memaug": 1, "no_memaug": 0}.items():
    workdir = folder / name
    run = runs.Training(data, workdir, steps=2, model__memaug_layers=layers)
    code, said = run.ended()
    assert code == 0, said
  return folder


@pytest.fixture
def saved():
  return nbformat.read(NOTEBOOK, as_version=4)


def _pictures(notebook):
  found = [
    output.data["image/png"]
    for output in notebooks.outputs(notebook)
    if "image/png" in output.get("data", {})
  ]
  return [Image.open(io.BytesIO(base64.b64decode(text))) for text in found]


def _text(notebook):
  """All that it says, without pictures."""
  parts = []
  for output in notebooks.outputs(notebook):
    assert output.output_type in ("stream", "execute_result")
    said = output.get("text") or output.data["text/plain"]
    if output.get("name") != "stderr":
      parts.append(said)
  return "\n".join(parts)


def _check_outputs(notebook):
  """What a reader looks for, whichever models were asked."""
  look, *bars = _pictures(notebook)
  assert len(bars) == 3  # by length, by task, needles
  assert all(bar.width == bars[0].width != look.width for bar in bars)
  assert bars[1].height > 2 * bars[0].height  # 21 tasks
  # The frames of the video are colourful.
  assert len(look.convert("RGB").getcolors(1 << 24)) > 1000
  text = _text(notebook)
  assert re.search(r"\d+ frames; '.*', expected '\w+'", text)
  assert "of them never reach the decoder directly; without MemAug" in text
  assert "against without MemAug: " in text
  assert re.search(r"; mean of its \d+ tasks \d+\.\d%", text)
  assert re.search(r"n +chance +with MemAug +without MemAug\n", text)
  assert re.search(r"\ntask\n.*\nneedles, by length\n  0-5 min", text, re.S)


@pytest.mark.slow
def test_it_runs_on_a_small_demo(work):
  made = notebooks.execute(NOTEBOOK, NOTEBOOK.parent, work, timeout=180)
  _check_outputs(made)
  found = report.load(work)
  assert found.names == ["with MemAug", "without MemAug"]
  asked = json.loads((work / "data" / "test.json").read_text())
  assert found.complete and found.data["count"] == len(asked) > 10


def test_without_a_demo_it_says_what_to_run():
  with pytest.raises(CellExecutionError) as caught:
    notebooks.execute(NOTEBOOK, NOTEBOOK.parents[1], "no_work")
  assert caught.value.evalue == (
    "no no_work/memaug: run `bash launch/local.sh --compare` first, or set"
    " HOURJAX_WORK to its folder"
  )


def test_what_is_saved_is_of_one_run_of_these_cells(saved):
  cells = notebooks.code_cells(saved)
  counts = [cell.execution_count for cell in cells]
  assert counts == list(range(1, len(cells) + 1))
  assert saved.metadata["recorded"] == notebooks.fingerprint(saved)
  _check_outputs(saved)


def test_what_is_saved_can_be_shown(saved):
  assert NOTEBOOK.stat().st_size < 600_000
  names = {output.get("name") for output in notebooks.outputs(saved)}
  assert names == {None, "stdout"}
  # "work/data" is a path that everyone has; "/home/me/work" is not.
  assert not re.search(r"(?<![\w.])[/~]\w", _text(saved))


def test_what_is_saved_found_its_needle(saved):
  """The demo's model has learned what the notebook shows it for."""
  said, expected = re.search(
    r"3600 frames; '(.*)', expected '(\w+)'", _text(saved)
  ).groups()
  assert said == expected
