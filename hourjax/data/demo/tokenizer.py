"""The demo's tokenizer: a small byte-level BPE that splits as Qwen's does."""

import json
import pathlib
import re
from collections.abc import Iterable

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

VOCABULARY = 1024
LEAST = 2  # times that a pair must occur to be merged
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
# Text around the questions, which is trained on so that it takes few tokens.
MARKUP = (
  "You are a helpful assistant.",
  "system",
  "user",
  "assistant",
  "The video lasts for 214.00 seconds, and 214 frames are uniformly sampled"
  " from it. Please answer the following questions related to this video.",
)
# What is the same in all questions of a kind is one token, so that the demo
# spends its time on what differs. The longest that fits is taken.
PHRASES = (
  "You are a helpful assistant.",
  "The video lasts for",
  " seconds, and",
  " frames are uniformly sampled from it. Please answer the following questions"
  " related to this video.",
  "Answer with the letter.",
  "Which place is shown",
  "Which is shown longer, the",
  "Which is shown first, the",
  "Which of these places is shown first?",
  "Which three places are shown first, in order?",
  "Which place follows the",
  "Which object is in the",
  "Which object is in the most scenes?",
  "What colour is the",
  "What does the",
  "What does the object right after the",
  "What happens in the",
  "What happens right after the",
  "Where is the",
  "Where else is the",
  "In which corner is the",
  "In which half is the",
  "How long after the start of the",
  "Are the objects in the",
  "Do the objects in the",
  "Is there a",
  "Is there an",
  " in the",
  " of the",
  " or the",
  " and the",
  " does the",
  " in the video?",
  " on the same side?",
  " move alike?",
  " start?",
  " do?",
  " that",
)
# Behind these phrases Qwen's pattern, except that a line break joins only
# another line break: the token "\n" is labelled everywhere, so it must not be
# part of another token.
PATTERN = (
  "|".join(sorted(map(re.escape, PHRASES), key=len, reverse=True)) + "|"
  r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
  r"|[^\r\n\p{L}\p{N}]?\p{L}+"
  r"|\p{N}"
  r"| ?[^\s\p{L}\p{N}]+"
  r"|\n\n?"
  r"|[^\S\n]+(?!\S)"
  r"|[^\S\n]+"
)


def train_tokenizer(texts: Iterable[str]) -> tokenizers.Tokenizer:
  r"""Trains the tokenizer.

  The special tokens follow the learned ones, as in Qwen's vocabulary, which
  gives every single byte the id it has there: "\n" is 198.

  Args:
    texts: text to train on.

  Returns:
    A tokenizer with at most VOCABULARY tokens that encodes any text.
  """
  tokenizer = tokenizers.Tokenizer(models.BPE())
  tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
    [
      pre_tokenizers.Split(tokenizers.Regex(PATTERN), "isolated"),
      pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
  )
  tokenizer.decoder = decoders.ByteLevel()
  trainer = trainers.BpeTrainer(
    vocab_size=VOCABULARY - len(SPECIAL),
    min_frequency=LEAST,
    initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    show_progress=False,
  )
  # A pair that occurs less often than LEAST is not merged.
  tokenizer.train_from_iterator([*texts, *MARKUP * LEAST], trainer)
  tokenizer.add_special_tokens(
    [tokenizers.AddedToken(name, special=True) for name in SPECIAL]
  )
  return tokenizer


def write_tokenizer(folder: pathlib.Path, texts: Iterable[str]) -> None:
  """Trains the tokenizer; writes tokenizer.json and tokenizer_config.json."""
  folder.mkdir(parents=True, exist_ok=True)
  train_tokenizer(texts).save(str(folder / "tokenizer.json"))
  config = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
  (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2))
