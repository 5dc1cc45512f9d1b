import json
import os

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from hourjax.data.demo.tokenizer import train_tokenizer
from hourjax.data.tokenizer import Tokenizer
from hourjax.errors import UserError
from tests import golden_files, tampering

GOLDEN = golden_files.load_json("text_preprocess.json")
MARKUP = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def _qwen(family="qwen2"):
  found = golden_files.tokenizer(family)
  if found is None:
    pytest.skip(golden_files.NO_TOKENIZER)
  return found


def _keys(suffix):
  return [key for key in GOLDEN if key.split("/")[-1] == suffix]


# --- against golden ---------------------------------------------------------


@pytest.mark.parametrize("key", _keys("tokenizer_samples"))
def test_samples(key):
  tokenizer = _qwen(key.split("/")[0])
  for sample in GOLDEN[key]:
    assert tokenizer.encode(sample["text"]) == sample["ids"], sample["text"]


@pytest.mark.parametrize("key", _keys("specials"))
def test_specials(key):
  tokenizer, specials = _qwen(key.split("/")[0]), GOLDEN[key]
  assert tokenizer.vocab_size == specials["len"]
  assert tokenizer.pad == specials["pad"]
  assert tokenizer.im_end == specials["eos"]
  assert [tokenizer.im_start, tokenizer.im_end] == specials["im_start_im_end"]
  assert tokenizer.newline == 198


@pytest.mark.parametrize(
  "key",
  [k for k, v in GOLDEN.items() if isinstance(v, dict) and "decoded" in v],
)
def test_decode(key):
  """The golden text shows every visual slot as a star."""
  tokenizer, case = _qwen(key.split("/")[0]), GOLDEN[key]
  (star,) = tokenizer.encode("*")
  ids = [star if i == -200 else i for i in case["input_ids"]]
  assert tokenizer.decode(ids) == case["decoded"]
  plain = tokenizer.decode(ids, skip_special=True)
  assert "<|im_" not in plain and plain.startswith("system\nYou are")


# --- without golden ---------------------------------------------------------


def _byte_vocab():
  alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
  return {symbol: i for i, symbol in enumerate(alphabet)}


def _folder(path, *, tokens=MARKUP, first_id=256, **config):
  """A tokenizer folder in Qwen's form whose tokens are single bytes."""
  path.mkdir(exist_ok=True)
  (path / "vocab.json").write_text(json.dumps(_byte_vocab()))
  (path / "merges.txt").write_text("")
  added = {
    str(first_id + i): {"content": t, "special": True}
    for i, t in enumerate(tokens)
  }
  (path / "tokenizer_config.json").write_text(
    json.dumps({"added_tokens_decoder": added} | config)
  )
  return path


def test_vocab_and_merges(tmp_path):
  tokenizer = Tokenizer.from_folder(_folder(tmp_path / "a"))
  assert (tokenizer.vocab_size, tokenizer.pad) == (259, 256)
  assert (tokenizer.im_start, tokenizer.im_end) == (257, 258)
  text = "  naïve\r\n\n厨房 🙂 it's 12"
  assert tokenizer.decode(tokenizer.encode(text)) == text
  assert tokenizer.encode("e\u0301") == tokenizer.encode("\u00e9")
  assert tokenizer.encode("<|im_end|>\n") == [258, tokenizer.newline]


def test_words_are_split_before_merging(tmp_path):
  """Merges that would cross the split of Qwen2 never happen."""
  folder = _folder(tmp_path / "a", first_id=260)
  pairs = ["1 2", "a 1", "Ġ 1", "Ġ a"]
  vocab = _byte_vocab() | {
    pair.replace(" ", ""): 256 + i for i, pair in enumerate(pairs)
  }
  (folder / "vocab.json").write_text(json.dumps(vocab))
  (folder / "merges.txt").write_text("\n".join(pairs))
  encode = Tokenizer.from_folder(folder).encode
  assert len(encode("12")) == len(encode("a1")) == len(encode(" 1")) == 2
  assert encode(" a") == [259]


def test_pad_token_comes_from_the_config(tmp_path):
  for pad in ("<|im_end|>", {"content": "<|im_end|>"}):
    folder = _folder(tmp_path / "a", pad_token=pad)
    assert Tokenizer.from_folder(folder).pad == 258
  folder = _folder(tmp_path / "a", pad_token="<pad>")
  with pytest.raises(UserError, match="no token <pad>"):
    Tokenizer.from_folder(folder)


def test_tokenizer_json(tmp_path):
  backend = tokenizers.Tokenizer(models.BPE(vocab=_byte_vocab(), merges=[]))
  backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  backend.decoder = decoders.ByteLevel()
  backend.add_special_tokens(MARKUP)
  backend.save(str(tmp_path / "tokenizer.json"))
  tokenizer = Tokenizer.from_folder(tmp_path)
  assert (tokenizer.vocab_size, tokenizer.im_end) == (259, 258)
  assert tokenizer.decode(tokenizer.encode("Hi <|im_end|>")) == "Hi <|im_end|>"


def test_missing_files(tmp_path):
  with pytest.raises(UserError, match=r"folder .*none does not exist"):
    Tokenizer.from_folder(tmp_path / "none")
  with pytest.raises(UserError, match=r"no vocab\.json and no merges\.txt"):
    Tokenizer.from_folder(tmp_path)
  folder = _folder(tmp_path / "a")
  (folder / "merges.txt").unlink()
  with pytest.raises(UserError, match=r"no tokenizer\.json and no merges\.txt"):
    Tokenizer.from_folder(folder)


def test_missing_tokens(tmp_path):
  folder = _folder(tmp_path / "a", tokens=MARKUP[:2])
  with pytest.raises(UserError, match=r"no token <\|im_end\|>"):
    Tokenizer.from_folder(folder)
  (folder / "tokenizer_config.json").unlink()
  with pytest.raises(UserError, match=r"<\|im_start\|>.*tokenizer_config"):
    Tokenizer.from_folder(folder)


def test_tokens_of_another_model(tmp_path):
  folder = _folder(tmp_path / "a", first_id=300)
  with pytest.raises(UserError, match=r"gets id 256, .* says 300"):
    Tokenizer.from_folder(folder)


def test_damaged_added_tokens(tmp_path):
  for added in ([1], {"256": "a"}, {"x": {"content": "a"}}):
    folder = _folder(tmp_path / "a", added_tokens_decoder=added)
    with pytest.raises(UserError, match="'added_tokens_decoder' must map"):
      Tokenizer.from_folder(folder)


@pytest.mark.parametrize(
  "name", ["vocab.json", "tokenizer_config.json", "tokenizer.json"]
)
def test_damaged_files_are_named(tmp_path, name):
  folder = _folder(tmp_path / "a")
  (folder / name).write_text('{"a": ')
  with pytest.raises(UserError, match=name):
    Tokenizer.from_folder(folder)


@pytest.mark.parametrize(
  "name",
  ["vocab.json", "merges.txt", "tokenizer_config.json", "tokenizer.json"],
)
@pytest.mark.parametrize("way", ["pointer", "nested", "pipe", "number"])
def test_files_that_are_something_else(tmp_path, name, way):
  folder = _folder(tmp_path / "a")
  (folder / name).unlink(missing_ok=True)
  if way == "pipe":
    if name == "tokenizer.json":
      return  # no file, so the others are read
    os.mkfifo(folder / name)
  else:
    nested = b"[" * 20_000
    content = {"pointer": tampering.POINTER, "nested": nested, "number": b"3"}
    (folder / name).write_bytes(content[way])
  said = {"pointer": "Git-LFS pointer", "pipe": ""}.get(way, "")
  # The library names only the first of its two files.
  named = name if way in ("pointer", "pipe") else ""
  with pytest.raises(UserError, match=f"{named}.*{said}"):
    Tokenizer.from_folder(folder)


@pytest.mark.parametrize(
  ("config", "said"),
  [
    ({"pad_token": ["a"]}, "'pad_token' is .'a'., not"),
    ({"pad_token": {"content": 5}}, "'pad_token' is .*, not"),
    ({"pad_token": True}, "'pad_token' is True, not"),
    ({"pad_token": "\ud800"}, "surrogates not allowed"),
    ({"added_tokens_decoder": {"256": {"content": 5}}}, "must map"),
    (
      {"added_tokens_decoder": {"256": {"content": "a", "special": "yes"}}},
      "must map",
    ),
    ({"added_tokens_decoder": {"9" * 5000: {"content": "a"}}}, "must map"),
    ({"added_tokens_decoder": 5}, "must map"),
  ],
)
def test_a_configuration_with_values_of_other_kinds(tmp_path, config, said):
  folder = _folder(tmp_path / "a", **config)
  with pytest.raises(UserError, match=f"/a.*: .*{said}"):
    Tokenizer.from_folder(folder)


@pytest.mark.parametrize(
  ("number", "said"),
  [
    (None, r"\d+ tokens have \d+ ids"),
    (2**31, "at most 4194304 ids are meant"),
  ],
)
def test_ids_that_cannot_be_meant(tmp_path, number, said):
  backend = train_tokenizer([])
  content = json.loads(backend.to_str())
  vocabulary = content["model"]["vocab"]
  vocabulary["x"] = number or vocabulary["y"]
  (tmp_path / "tokenizer.json").write_text(json.dumps(content))
  with pytest.raises(UserError, match=said):
    Tokenizer.from_folder(tmp_path)


def test_a_name_that_no_file_system_takes():
  for name in ("x" * 5000, "a\0b"):
    with pytest.raises(UserError, match="does not exist"):
      Tokenizer.from_folder(name)


def test_padding_and_truncation_of_a_saved_file_are_off():
  backend = train_tokenizer([])
  plain = Tokenizer(train_tokenizer([]), "test").encode("one and two")
  backend.enable_padding(length=50)
  backend.enable_truncation(3)
  tokenizer = Tokenizer(backend, "test")
  assert tokenizer.encode("one and two") == plain
  assert tokenizer.lengths(["one and two", "a"]) == [len(plain), 1]
