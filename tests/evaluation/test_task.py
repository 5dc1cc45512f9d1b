"""What can be asked, and the batches in which it is asked."""

import dataclasses

import pytest

from hourjax.errors import UserError
from hourjax.evaluation.task import BATCH, open_task
from tests.evaluation.fakes import make_task


def test_batches_are_those_of_all_questions():
  whole = make_task().batches()
  assert (
    sum(len(batch) for batches in whole.values() for batch in batches) == 45
  )
  assert all(len(b) <= BATCH for batches in whole.values() for b in batches)
  first = make_task(limit=5)
  asked = {item.id for item in first.chosen}
  for video, batches in first.batches().items():
    assert all(batch in whole[video] for batch in batches)
    assert all(asked & {item.id for item in batch} for batch in batches)


def test_the_fingerprint_is_that_of_ids_and_prompts():
  task = make_task()
  first, *others = task.questions
  for change, same in (
    ({"prompt": "?"}, False),
    ({"id": "another"}, False),
    ({"expected": "D", "video": "folder/a.webm"}, True),
  ):
    changed = make_task([dataclasses.replace(first, **change), *others])
    assert (changed.fingerprint() == task.fingerprint()) is same, change


def test_nothing_to_ask():
  with pytest.raises(UserError, match="0 questions and --limit is None"):
    make_task([])
  with pytest.raises(UserError, match="45 questions and --limit is 0"):
    make_task(limit=0)


def test_no_task(tmp_path):
  with pytest.raises(UserError, match="no benchmark 'videommee'; choose"):
    open_task("videommee", tmp_path)
  with pytest.raises(UserError, match="nowhere"):
    open_task("records", tmp_path / "nowhere")
  with pytest.raises(UserError, match=r"holds no index\*\.jsonl"):
    open_task("records", tmp_path, features=tmp_path)
  (tmp_path / "test.json").write_text("[]")
  with pytest.raises(UserError):
    open_task("records", tmp_path)
