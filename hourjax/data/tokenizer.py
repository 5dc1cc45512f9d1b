"""The Qwen2 / Qwen2.5 byte-level BPE, from the model's own files."""

import functools
import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from jaxtyping import Int
from tokenizers import decoders, models, normalizers, pre_tokenizers

from hourjax.errors import UserError

# Words with their leading blank, single digits, punctuation, runs of blanks:
# the split of Qwen2 (its tokenizer.json, `pre_tokenizer.pretokenizers[0]`).
_SPLIT = (
  r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
  r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_PAD = "<|endoftext|>"


class Tokenizer:
  """Text to token ids and back.

  Attributes:
    im_start: id of `<|im_start|>`.
    im_end: id of `<|im_end|>`, the end of every turn.
    newline: id of "\\n" (198 in Qwen).
    pad: id that fills rows.
    vocab_size: number of tokens, special ones included; the embedding table
      of the published models is larger.
  """

  def __init__(
    self, backend: tokenizers.Tokenizer, name: str, pad_token: str = _PAD
  ):
    """Wraps a tokenizer.

    Args:
      backend: does the work.
      name: folder or file, for messages.
      pad_token: fills rows.

    Raises:
      UserError: a token that the conversation markup needs is missing.
    """
    self._backend = backend
    # A file may have been saved while these were on.
    backend.no_padding()
    backend.no_truncation()
    self.im_start = _special(backend, "<|im_start|>", name)
    self.im_end = _special(backend, "<|im_end|>", name)
    self.pad = _special(backend, pad_token, name)
    newline = self.encode("\n")
    if len(newline) != 1:
      raise UserError(
        f"{name}: a newline is {len(newline)} tokens, 1 expected; use the "
        "tokenizer of a Qwen2 or Qwen2.5 model"
      )
    self.newline = newline[0]

  @classmethod
  def from_folder(cls, path: str | Path) -> "Tokenizer":
    """Reads `tokenizer.json`, or `vocab.json` and `merges.txt`.

    The added tokens of the second form and the padding token of both come
    from `tokenizer_config.json`.

    Raises:
      UserError: folder, files or tokens are missing or damaged.
    """
    folder = Path(path)
    if not folder.is_dir():
      raise UserError(
        f"tokenizer folder {folder} does not exist; point at the folder of a "
        "Qwen2 or Qwen2.5 model"
      )
    config = _read_config(folder / "tokenizer_config.json")
    if (folder / "tokenizer.json").is_file():
      backend = _load(folder / "tokenizer.json", tokenizers.Tokenizer.from_file)
    else:
      backend = _from_vocab(folder)
      _add_tokens(backend, config.get("added_tokens_decoder", {}), folder)
    pad = config.get("pad_token") or _PAD
    if isinstance(pad, dict):
      pad = pad["content"]
    return cls(backend, str(folder), pad)

  @property
  def vocab_size(self) -> int:
    """Ids that may occur are below this."""
    return self._backend.get_vocab_size(with_added_tokens=True)

  @functools.cached_property
  def fingerprint(self) -> str:
    """16 hexadecimal digits, the same for tokenizers that work the same."""
    whole = self._backend.to_str().encode()
    return hashlib.sha256(whole).hexdigest()[:16]

  def encode(self, text: str) -> list[int]:
    """Token ids of `text`; special tokens written in it are recognised."""
    return self._backend.encode(text, add_special_tokens=False).ids

  def lengths(self, texts: Sequence[str]) -> list[int]:
    """Number of tokens of each text; uses all cores."""
    encoded = self._backend.encode_batch_fast(
      list(texts), add_special_tokens=False
    )
    return [len(text.ids) for text in encoded]

  def decode(
    self, ids: Iterable[int] | Int[np.ndarray, "N"], skip_special: bool = False
  ) -> str:
    """Text of token ids (>= 0); ids beyond the vocabulary give nothing."""
    return self._backend.decode(
      [int(i) for i in ids], skip_special_tokens=skip_special
    )


def _special(backend: tokenizers.Tokenizer, token: str, name: str) -> int:
  found = backend.token_to_id(token)
  if found is None:
    raise UserError(
      f"{name}: no token {token} among its {backend.get_vocab_size()}; use the "
      "files of a Qwen2 or Qwen2.5 model, tokenizer_config.json included"
    )
  return found


def _read_config(file: Path) -> dict:
  if not file.is_file():
    return {}
  try:
    config = json.loads(file.read_text(encoding="utf-8"))
  except ValueError as error:
    raise UserError(f"{file} is not valid JSON: {error}") from error
  if not isinstance(config, dict):
    raise UserError(f"{file} holds {type(config).__name__}, not an object")
  return config


def _load(file: Path, reader):
  try:
    return reader(str(file))
  except Exception as error:  # the library raises bare Exceptions
    raise UserError(
      f"cannot read tokenizer {file}: {error}; fetch it again"
    ) from error


def _from_vocab(folder: Path) -> tokenizers.Tokenizer:
  vocab, merges = folder / "vocab.json", folder / "merges.txt"
  missing = [f.name for f in (vocab, merges) if not f.is_file()]
  if missing:
    raise UserError(
      f"{folder} has no tokenizer.json and no {' and no '.join(missing)}; "
      "copy the tokenizer files of the model there"
    )
  bpe = _load(vocab, lambda v: models.BPE.from_file(v, str(merges)))
  backend = tokenizers.Tokenizer(bpe)
  backend.normalizer = normalizers.NFC()
  backend.pre_tokenizer = pre_tokenizers.Sequence(
    [
      pre_tokenizers.Split(tokenizers.Regex(_SPLIT), behavior="isolated"),
      pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
  )
  backend.decoder = decoders.ByteLevel()
  return backend


def _add_tokens(
  backend: tokenizers.Tokenizer, added: Any, folder: Path
) -> None:
  flags = ("lstrip", "rstrip", "normalized", "single_word", "special")
  try:
    tokens = sorted((int(i), t["content"], t) for i, t in added.items())
  except (AttributeError, KeyError, TypeError, ValueError) as error:
    raise UserError(
      f"{folder}/tokenizer_config.json: 'added_tokens_decoder' must map ids to "
      f"{{'content': ...}}, found {added!r:.80}; fetch it again"
    ) from error
  for number, content, token in tokens:
    settings = {f: token[f] for f in flags if f in token}
    backend.add_tokens([tokenizers.AddedToken(content, **settings)])
    # The library numbers added tokens itself, from the end of the vocabulary.
    if backend.token_to_id(content) != number:
      raise UserError(
        f"{folder}: token {content} gets id {backend.token_to_id(content)}, "
        f"tokenizer_config.json says {number}; vocab.json belongs to another "
        "model"
      )
