"""The Qwen2 / Qwen2.5 byte-level BPE, from the model's own files."""

import contextlib
import functools
import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from jaxtyping import Int
from tokenizers import decoders, models, normalizers, pre_tokenizers

from hourjax import hub, schema
from hourjax.errors import UserError

# Words with their leading blank, single digits, punctuation, runs of blanks:
# the split of Qwen2 (its tokenizer.json, `pre_tokenizer.pretokenizers[0]`).
_SPLIT = (
  r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
  r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_PAD = "<|endoftext|>"
_MOST_BYTES = 256 * 2**20  # of a file; tokenizer.json of Qwen2 has 7 MB
_MOST_IDS = 2**22  # Qwen2 has 151,646
_FETCH = "fetch it again"


class Tokenizer:
  r"""Turns text into token ids and back.

  Attributes:
    im_start: id of `<|im_start|>`.
    im_end: id of `<|im_end|>`, the end of every turn.
    newline: id of "\n" (198 in Qwen).
    pad: id that fills rows.
    vocab_size: ids that may occur are below this, special ones included; the
      embedding table of the published models is larger.
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
      UserError: a token that the conversation markup needs is missing, two
        tokens have one id, or an id is larger than any vocabulary.
    """
    self._backend = backend
    # A file may have been saved while these were on.
    backend.no_padding()
    backend.no_truncation()
    self.im_start = _special(backend, "<|im_start|>", name)
    self.im_end = _special(backend, "<|im_end|>", name)
    self.pad = _special(backend, pad_token, name)
    ids = list(backend.get_vocab(with_added_tokens=True).values())
    if len(set(ids)) < len(ids):
      raise UserError(
        f"{name}: {len(ids)} tokens have {len(set(ids))} ids; {_FETCH}"
      )
    self.vocab_size = max(ids) + 1
    if self.vocab_size > _MOST_IDS:  # the library counts up to them
      raise UserError(
        f"{name}: a token has id {max(ids)}, at most {_MOST_IDS} ids are meant;"
        f" {_FETCH}"
      )
    with _library_errors(f"{name}: a newline cannot be encoded"):
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

    Args:
      path: of the folder, or a name with hf:// (see `hub`).

    Raises:
      UserError: folder, files or tokens are missing or damaged.
    """
    folder = hub.local_folder(path, hub.TOKENIZER)
    if not os.path.isdir(folder):  # also False for a name of no file
      raise UserError(
        f"tokenizer folder {folder} does not exist; point at the folder of a "
        "Qwen2 or Qwen2.5 model"
      )
    config = _read_config(folder / "tokenizer_config.json")
    if (folder / "tokenizer.json").is_file():
      backend = _load(tokenizers.Tokenizer.from_file, folder / "tokenizer.json")
    else:
      backend = _from_vocab(folder)
      _add_tokens(backend, config.get("added_tokens_decoder", {}), folder)
    pad = config.get("pad_token") or _PAD
    return cls(backend, str(folder), _content(pad, "pad_token", folder))

  @functools.cached_property
  def fingerprint(self) -> str:
    """Returns 16 hexadecimal digits, the same for tokenizers that agree."""
    whole = self._backend.to_str().encode()
    return hashlib.sha256(whole).hexdigest()[:16]

  def encode(self, text: str) -> list[int]:
    """Returns the token ids of a text; special tokens in it are recognised."""
    return self._backend.encode(text, add_special_tokens=False).ids

  def lengths(self, texts: Sequence[str]) -> list[int]:
    """Returns the number of tokens of each text; uses all cores."""
    encoded = self._backend.encode_batch_fast(
      list(texts), add_special_tokens=False
    )
    return [len(text.ids) for text in encoded]

  def decode(
    self, ids: Iterable[int] | Int[np.ndarray, "N"], skip_special: bool = False
  ) -> str:
    """Returns the text of token ids (>= 0).

    Ids beyond the vocabulary give nothing.

    Args:
      ids: of the text.
      skip_special: leaves out special tokens.
    """
    return self._backend.decode(
      [int(i) for i in ids], skip_special_tokens=skip_special
    )


def _special(backend: tokenizers.Tokenizer, token: str, name: str) -> int:
  """Returns the id of a token that must be there."""
  with _library_errors(f"{name}: token {token!r}"):
    found = backend.token_to_id(token)
  if found is None:
    raise UserError(
      f"{name}: no token {token} among its {backend.get_vocab_size()}; use the "
      "files of a Qwen2 or Qwen2.5 model, tokenizer_config.json included"
    )
  return found


def _read_config(file: Path) -> dict[str, Any]:
  """Reads tokenizer_config.json; {} if there is none."""
  if not file.exists():
    return {}
  config = schema.read_json(file, remedy=_FETCH)
  if not isinstance(config, dict):
    raise UserError(
      f"{file} holds {type(config).__name__}, not an object; {_FETCH}"
    )
  return config


def _content(token: Any, key: str, folder: Path) -> str:
  """Returns the text of a token, which is written alone or in an object."""
  content = token.get("content") if isinstance(token, dict) else token
  if not isinstance(content, str):
    raise UserError(
      f"{folder}/tokenizer_config.json: {key!r} is {schema.shorten(token)}, not"
      f" text or an object with the text 'content'; {_FETCH}"
    )
  return content


@contextlib.contextmanager
def _library_errors(what: str) -> Iterator[None]:
  """Turns whatever the library raises into a UserError."""
  try:
    yield
  except BaseException as error:
    # Some are bare Exceptions; a panic of its Rust code is not even one.
    panic = type(error).__name__ == "PanicException"
    if not panic and not isinstance(error, Exception):
      raise
    raise UserError(f"{what}: {error}; {_FETCH}") from error


def _load(reader: Callable[..., Any], *files: Path) -> Any:
  """Calls a reader of the library, after it has checked the files' sizes."""
  for file in files:
    schema.check_file(file, remedy=_FETCH, most=_MOST_BYTES)
  with _library_errors(f"cannot read tokenizer {files[0]}"):
    return reader(*map(str, files))


def _from_vocab(folder: Path) -> tokenizers.Tokenizer:
  """Builds Qwen2's tokenizer from vocab.json and merges.txt."""
  vocab, merges = folder / "vocab.json", folder / "merges.txt"
  missing = [f.name for f in (vocab, merges) if not f.is_file()]
  if missing:
    raise UserError(
      f"{folder} has no tokenizer.json and no {' and no '.join(missing)}; "
      "copy the tokenizer files of the model there"
    )
  bpe = _load(models.BPE.from_file, vocab, merges)
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


class _Added(schema.Schema):
  """Describes a token of 'added_tokens_decoder'."""

  content: str
  lstrip: bool = False
  rstrip: bool = False
  normalized: bool = True
  single_word: bool = False
  special: bool = False


def _add_tokens(
  backend: tokenizers.Tokenizer, added: Any, folder: Path
) -> None:
  """Adds the tokens of tokenizer_config.json, and checks their ids."""
  try:
    if not isinstance(added, dict):
      raise ValueError
    found = {
      int(number): _Added.model_validate(token)
      for number, token in added.items()
    }
  except (ValueError, RecursionError):  # pydantic's among them
    raise UserError(
      f"{folder}/tokenizer_config.json: 'added_tokens_decoder' must map ids to"
      f" {{'content': text, ...}}, found {schema.shorten(added, 200)}; {_FETCH}"
    ) from None
  for number in sorted(found):
    token = found[number]
    settings = token.model_dump(exclude={"content"}, exclude_unset=True)
    with _library_errors(f"{folder}: token {token.content!r}"):
      backend.add_tokens([tokenizers.AddedToken(token.content, **settings)])
    # The library numbers added tokens itself, from the end of the vocabulary.
    mine = backend.token_to_id(token.content)
    if mine != number:
      raise UserError(
        f"{folder}: token {token.content} gets id {mine},"
        f" tokenizer_config.json says {number}; vocab.json belongs to another"
        " model"
      )
