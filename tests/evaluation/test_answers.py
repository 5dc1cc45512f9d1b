"""Every record is asked once, whatever rows they share."""

import numpy as np
import pytest

from configs import demo
from hourjax.data import plan
from hourjax.data.demo.tokens import write_tokenizer
from hourjax.data.records import Record, Turn
from hourjax.data.store.features import FeatureStore
from hourjax.evaluation import answers
from hourjax.training.experiment import build_experiment


@pytest.fixture
def experiment(tmp_path):
  write_tokenizer(tmp_path / "tokenizer", [])
  store = FeatureStore(tmp_path / "features", create=True)
  rng = np.random.default_rng(0)
  for n in range(3):
    store.write(f"{n}.mp4", rng.normal(size=(9 + n, 4, 64)), 9 + n)
  config = demo.get_config()
  config.data.tokenizer = f"{tmp_path}/tokenizer"
  config.data.features = f"{tmp_path}/features"
  return build_experiment(config.to_dict())


def _records(count):
  turns = (Turn("human", "<image>\nWhat?"),)
  return [
    Record(f"r{n}", "video", (f"{n % 3}.mp4",), turns, "", {})
    for n in range(count)
  ]


def _answers(experiment, count, monkeypatch):
  asked = []

  def generate(params, batch, last, *, config, new_tokens):
    # The last token of each prompt opens the answer's turn.
    tokens = np.asarray(batch.decoder_token)[0, last[0][last[0] >= 0]]
    asked.append((len(tokens), set(tokens.tolist())))
    return np.zeros((1, last.shape[1], new_tokens), int)

  monkeypatch.setattr(answers, "generate", generate)
  made, skipped = answers.answer_records(
    {}, experiment, _records(count), new_tokens=4, row_memory=4000
  )
  return made, skipped, asked


def test_more_records_than_a_window(experiment, monkeypatch):
  monkeypatch.setattr(plan, "WINDOW", 7)
  made, skipped, asked = _answers(experiment, 23, monkeypatch)
  assert set(made) == {f"r{n}" for n in range(23)} and not skipped
  assert sum(count for count, _ in asked) == 23 > len(asked)
  assert len({token for _, tokens in asked for token in tokens}) == 1


def test_a_broken_file_is_skipped(experiment, tmp_path, monkeypatch):
  path = tmp_path / "features" / "1.mp4.npy"
  path.write_bytes(path.read_bytes()[:-10])
  made, skipped, _ = _answers(experiment, 6, monkeypatch)
  assert set(made) == {"r0", "r2", "r3", "r5"}
  assert {item.id for item in skipped} == {"r1", "r4"}
  assert all(str(path) in item.reason for item in skipped)
