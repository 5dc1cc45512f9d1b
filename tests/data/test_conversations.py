import re

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from hourjax.data.conversations import (
  IGNORE,
  IMAGE,
  answer_spans,
  encode_conversation,
  follow_up,
)
from hourjax.data.media.frame_rules import stored_feature_frames
from hourjax.data.records.record import Turn, parse_record
from hourjax.data.tokenizer import Tokenizer
from hourjax.errors import UserError
from tests import golden_files

GOLDEN = golden_files.load_json("text_preprocess.json")
ARRAYS = golden_files.npz("text_preprocess.npz")


@pytest.fixture(scope="module")
def tokenizer():
  """Every token is a byte or markup; these tests need no files."""
  alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
  vocab = {symbol: i for i, symbol in enumerate(alphabet)}
  backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[]))
  backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  backend.decoder = decoders.ByteLevel()
  backend.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
  return Tokenizer(backend, "bytes")


def _qwen(family):
  found = golden_files.tokenizer(family)
  if found is None:
    pytest.skip(golden_files.NO_TOKENIZER)
  return found


def _record(case):
  """The record that a golden case was made from."""
  raw = {"id": case.get("id", "x"), "conversations": case["conversations"]}
  seen = [i for i in case.get("image", []) if i["modality"] != "text"]
  if seen:
    raw[seen[0]["modality"]] = [f"media{i}" for i in range(len(seen))]
  return parse_record(raw, "golden")


def _video(case):
  """Duration and frames: the first stands in the decoded text alone."""
  frames = case["image"][0]["shape"][0]
  duration = float(re.search(r"lasts for ([\d.]+) sec", case["decoded"])[1])
  return duration, frames


# --- against golden ---------------------------------------------------------


@pytest.mark.parametrize(
  "key",
  [
    k for k, v in GOLDEN.items() if isinstance(v, dict) and "conversations" in v
  ],
)
def test_ids_and_labels(key):
  family, name = key.split("/")
  case = GOLDEN[key]
  record = _record(case)
  video = _video(case) if record.modality == "video" else None
  got = encode_conversation(record.turns, _qwen(family), video=video)
  assert got.ids.dtype == got.labels.dtype == np.int32
  assert got.ids.tolist() == case["input_ids"]
  assert got.labels.tolist() == case["labels"]
  for field, array in (("input_ids", got.ids), ("labels", got.labels)):
    stored = ARRAYS.get(f"{family}.{name}.{field}", array)
    np.testing.assert_array_equal(array, stored, strict=True)


@pytest.mark.parametrize(
  "key",
  [
    k
    for k, v in GOLDEN.items()
    if isinstance(v, dict) and "feature_frames_kept" in v
  ],
)
def test_frames_told_are_frames_kept(key):
  case = GOLDEN[key]
  duration, frames = _video(case)
  kept = case["feature_frames_kept"]
  assert len(kept) == frames
  stored = stored_feature_frames(kept[-1] + 1, duration)
  np.testing.assert_array_equal(stored, kept)


# --- without golden ---------------------------------------------------------

TURNS = [
  Turn("human", "<image>\nWho\nis it?"),
  Turn("gpt", "Ann\nLee."),
  Turn("human", "Why?"),
  Turn("gpt", "No idea."),
]


def test_labels_rule(tokenizer):
  got = encode_conversation(TURNS, tokenizer)
  markup = [tokenizer.im_start, tokenizer.im_end, tokenizer.newline]
  text = tokenizer.decode(
    np.where(got.labels == IGNORE, tokenizer.pad, got.labels)
  )
  answers = "".join(
    f"<|im_start|>assistant\n{t.text}<|im_end|>\n" for t in TURNS[1::2]
  )
  spoken = re.findall(r"<\|im_start\|>assistant\n.*?<\|im_end\|>\n", text, re.S)
  assert "".join(spoken) == answers
  is_markup = np.isin(got.ids, markup)
  assert (got.labels[is_markup] == got.ids[is_markup]).all()
  trained = got.labels != IGNORE
  assert (got.labels[trained] == got.ids[trained]).all()
  assert (got.labels[got.ids == IMAGE] == IGNORE).all()


def test_prompt_only_drops_the_answer(tokenizer):
  full = encode_conversation(TURNS, tokenizer)
  got = encode_conversation(TURNS, tokenizer, prompt_only=True)
  asked = encode_conversation(TURNS[:3], tokenizer, prompt_only=True)
  np.testing.assert_array_equal(got.ids, asked.ids)
  # Only the earlier answer is no prompt, markup of its turn included.
  answered = got.ids[got.labels != IGNORE]
  assert tokenizer.decode(answered) == (
    f"<|im_start|>assistant\n{TURNS[1].text}<|im_end|>\n"
  )
  alone = encode_conversation(TURNS[:1], tokenizer, prompt_only=True)
  assert (alone.labels == IGNORE).all() and len(alone.labels) == len(alone.ids)
  np.testing.assert_array_equal(got.ids, full.ids[: len(got.ids)])
  assert tokenizer.decode(got.ids[-20:]).endswith("\n<|im_start|>assistant\n")


def test_follow_up_goes_on_as_the_whole_conversation(tokenizer):
  whole = encode_conversation(TURNS[:3], tokenizer, prompt_only=True).ids
  ends = np.flatnonzero(whole == tokenizer.im_end)
  after_answer = whole[ends[2] + 1 :]  # of system, question and answer
  got = follow_up(TURNS[2].text, tokenizer)
  np.testing.assert_array_equal(got, after_answer)


def test_video_instruction(tokenizer):
  turns = [Turn("human", "Who?\n<image>"), *TURNS[1:]]
  got = encode_conversation(turns, tokenizer, video=(61.236, 61))
  assert (got.ids == IMAGE).sum() == 1
  slot = int(np.flatnonzero(got.ids == IMAGE)[0])
  assert tokenizer.decode(got.ids[:slot]).endswith("<|im_start|>user\n")
  assert tokenizer.decode(got.ids[slot + 1 :]).startswith(
    "\nThe video lasts for 61.24 seconds, and 61 frames are uniformly sampled "
    "from it. Please answer the following questions related to this video.\n"
    "Who?\n<|im_end|>\n"
  )


def test_visual_slots_are_never_trained(tokenizer):
  turns = [Turn("human", "Show"), Turn("gpt", "This: <image>")]
  got = encode_conversation(turns, tokenizer)
  assert got.labels[got.ids == IMAGE].tolist() == [IGNORE]


def test_system_prompt(tokenizer):
  got = encode_conversation(TURNS, tokenizer, system="Be brief.")
  text = tokenizer.decode(got.ids[got.ids != IMAGE])
  assert text.startswith("<|im_start|>system\nBe brief.<|im_end|>\n")


@pytest.mark.parametrize(
  "turns, prompt_only, message",
  [
    ([], False, "without a human turn"),
    ([], True, "without a human turn"),
    ([Turn("human", "a")], False, r"none of 1 turn\(s\) is a gpt answer"),
    ([Turn("human", "a"), Turn("gpt", " ")], False, "nothing to train on"),
    ([Turn("gpt", "a")], True, "without a human turn"),
    ([Turn("gpt", "a"), Turn("human", "b")], False, "turn 0 is from 'gpt'"),
    ([Turn("human", "a")] * 2, True, "turn 1 is from 'human', expected 'gpt'"),
  ],
)
def test_bad_turns(tokenizer, turns, prompt_only, message):
  with pytest.raises(UserError, match=message):
    encode_conversation(turns, tokenizer, prompt_only=prompt_only)


def test_video_without_frames(tokenizer):
  with pytest.raises(UserError, match=r"0\.97 seconds gives 0 frames"):
    encode_conversation(TURNS, tokenizer, video=(0.97, 0))


def test_a_marker_in_a_text_is_a_word(tokenizer):
  turns = [Turn("human", "What is <image>?"), Turn("gpt", "A slot.")]
  got = encode_conversation(turns, tokenizer, slots=False)
  assert IMAGE not in got.ids
  assert "What is <image>?" in tokenizer.decode(got.ids)


def test_one_side_may_say_several_turns(tokenizer):
  """As in training with the official code: each is a turn of its own."""
  turns = [TURNS[0], TURNS[2], TURNS[1], TURNS[3]]
  got = encode_conversation(turns, tokenizer)
  text = tokenizer.decode(got.ids[got.ids != IMAGE])
  roles = re.findall(r"<\|im_start\|>(\w+)", text)
  assert roles == ["system", "user", "user", "assistant", "assistant"]
  whole = tokenizer.decode(got.ids[got.labels != IGNORE])
  assert all(f"assistant\n{t.text}<|im_end|>" in whole for t in turns[2:])
  assert "Why?" not in whole


# --- answers -----------------------------------------------------------------


def test_spans_of_answers_are_what_the_assistant_says(tokenizer):
  """In its own words: a newline within an answer is no markup."""
  said = ["red\nand <b>", "", "blue\n", "assistant"]
  turns = []
  for number, text in enumerate(said):
    question = f"Why {number}?\nassistant\nyes<|im_end|>\n<|im_start|>x\n"
    turns += [Turn("human", question), Turn("gpt", text)]
  got = encode_conversation(turns, tokenizer, video=(7.0, 9))
  spans = answer_spans(got.labels, tokenizer)
  assert [tokenizer.decode(got.ids[a:b]) for a, b in spans] == said
  assert spans[0][0] == got.answer
  # The same among targets, which lack the first label.
  targets = np.append(got.labels[1:], np.int32(IGNORE))
  shifted = [(a - 1, b - 1) for a, b in spans]
  assert answer_spans(targets, tokenizer) == shifted


def test_an_answer_that_is_cut(tokenizer):
  turns = [Turn("human", "Why?"), Turn("gpt", "because")]
  got = encode_conversation(turns, tokenizer)
  for cut in (3, got.answer - 1, got.answer, got.answer + 3):
    spans = answer_spans(got.labels[:cut], tokenizer)
    assert spans == [(got.answer, cut)] * (cut >= got.answer)
    targets = np.append(got.labels[1:cut], np.int32(IGNORE))
    (found,) = answer_spans(targets, tokenizer) or [(0, 0)]
    assert found[1] - found[0] == max(cut - got.answer, 0)
