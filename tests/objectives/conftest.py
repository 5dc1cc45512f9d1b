"""The data of the trainings in tests/training, as questions and as pairs."""

import json

import pytest

from hourjax.data.prepare import build as prepare
from hourjax.data.prepare import lists
from tests.training.conftest import data

__all__ = ["data"]


def prepared(folder, records, tokenizer):
  """Writes records and prepares them; returns the dataset's folder."""
  folder.mkdir()
  (folder / "records.json").write_text(json.dumps(records))
  options = prepare.Options(
    items=(lists.Item.of_files([str(folder / "records.json")]),),
    tokenizer=str(tokenizer),
  )
  prepare.build(folder / "dataset", options, workers=1)
  return folder / "dataset"


@pytest.fixture(scope="session")
def records(data):
  """The records of the training videos."""
  found = json.loads((data / "train.json").read_text())
  return [record for record in found if record["id"] != "bad"]


@pytest.fixture(scope="session")
def pairs(data, records, tmp_path_factory):
  """A dataset whose answers are preferred to others of another length."""
  made = json.loads(json.dumps(records))
  for number, record in enumerate(made):
    last = record["conversations"][-1]
    last["rejected"] = "yes no " * (1 + number % 3) + last["value"]
  folder = tmp_path_factory.mktemp("pairs") / "made"
  return prepared(folder, made, data / "tokenizer")
