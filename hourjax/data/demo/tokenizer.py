"""The demo's tokenizer: a small byte-level BPE that splits as Qwen's does."""

import json
import pathlib
from collections.abc import Iterable

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

VOCABULARY = 1024
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
# Qwen's pattern, except that a line break joins only another line break: the
# token "\n" is labelled everywhere, so it must not be part of another token.
PATTERN = (
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
    min_frequency=2,
    initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    show_progress=False,
  )
  # Twice, since a pair that occurs once is not merged.
  tokenizer.train_from_iterator([*texts, *MARKUP, *MARKUP], trainer)
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
