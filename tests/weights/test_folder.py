"""What lies in folders beside a model's weights, and under which names."""

import json
import re

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from hourjax.errors import UserError
from hourjax.weights.folder import folded, read_index, shortened, weight_files
from hourjax.weights.names import TOWER
from tests.weights import folders

LFS = (
  "version https://git-lfs.github.com/spec/v1\noid sha256:"
  f"{'0' * 64}\nsize 4999802720\n"
)
INDEX = "model.safetensors.index.json"
LORA = {
  "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": np.zeros(
    (4, 16), np.float32
  )
}


def _swap(*pairs):
  def change(tensors):
    return {_swapped(name, pairs): value for name, value in tensors.items()}

  return change


def _swapped(name, pairs):
  for there, here in pairs:
    if name.startswith(there):
      return here + name.removeprefix(there)
  return name


# --- harmless --------------------------------------------------------------


@pytest.mark.parametrize(
  "name, value",
  [
    ("model.layers.1.self_attn.rotary_emb.inv_freq", np.ones(8, np.float32)),
    ("model.rotary_emb.inv_freq", np.ones(8, np.float32)),
    ("model.layers.0.self_attn.rotary_emb.cos_cached", np.ones((4, 8))),
    (f"{TOWER}embeddings.position_ids", np.arange(9)[None]),
    (f"{TOWER}head.probe", np.zeros((1, 1, 8), np.float32)),
    (f"{TOWER}encoder.layers.2.layer_norm1.bias", np.zeros(8, np.float32)),
  ],
)
def test_buffers_and_what_the_tower_does_not_run(tmp_path, name, value):
  folders.save(tmp_path)
  folders.edit(tmp_path, lambda tensors: tensors.update({name: value}))
  folders.assert_drawn(folders.load(tmp_path))


@pytest.mark.parametrize(
  "name",
  [
    "model.layers.1.self_attn.inv_frequency",
    f"{TOWER}encoder.layers.3.layer_norm1.bias",  # two more than are run
    "model.head.probe",
  ],
)
def test_what_only_looks_like_them_is_unexpected(tmp_path, name):
  folders.save(tmp_path)
  folders.edit(tmp_path, lambda t: t.update({name: np.zeros(8, np.float32)}))
  with pytest.raises(UserError, match=f"unexpected: {re.escape(name)}"):
    folders.load(tmp_path)


@pytest.mark.parametrize(
  "pairs, message",
  [
    ([("", "module.")], "module.* as *"),
    ([("", "base_model.model.")], "base_model.model.* as *"),
    ([("", "module._orig_mod.")], "module.* as *, _orig_mod.* as *"),
    ([("", "_fsdp_wrapped_module.")], "_fsdp_wrapped_module.* as *"),
    (
      [
        ("model.layers.", "model.language_model.layers."),
        ("model.embed", "model.language_model.embed"),
        ("model.norm", "model.language_model.norm"),
      ],
      "model.language_model.* as model.*",
    ),
    (
      [
        ("model.layers.", "language_model.model.layers."),
        ("lm_head.", "language_model.lm_head."),
      ],
      "language_model.model.* as model.*, language_model.lm_head.*",
    ),
  ],
)
def test_prefixes_are_removed_and_named(tmp_path, capsys, pairs, message):
  folders.save(tmp_path)
  folders.edit(tmp_path, _swap(*pairs))
  folders.assert_drawn(folders.load(tmp_path))
  assert f"tensors are read {message}" in capsys.readouterr().err


def test_a_prefix_of_some_names_only_is_none(tmp_path):
  folders.save(tmp_path)
  folders.edit(tmp_path, _swap(("lm_head", "module.lm_head")))
  with pytest.raises(UserError, match=r"unexpected: module\.lm_head\.weight"):
    folders.load(tmp_path)


def test_the_same_tensor_under_two_names_is_refused(tmp_path):
  folders.save(tmp_path)
  folders.edit(
    tmp_path,
    lambda t: t.update(
      {"model.language_model.norm.weight": t["model.norm.weight"] + 1}
    ),
  )
  with pytest.raises(UserError, match=r"holds both model\.norm\.weight"):
    folders.load(tmp_path)


# --- other files -----------------------------------------------------------


@pytest.mark.parametrize(
  "name", ["consolidated", "optimizer", "ema", "unrelated"]
)
def test_files_beside_the_models_own(tmp_path, name):
  for kind in ("index", "single"):
    folder = folders.save(tmp_path / kind)
    if kind == "single":
      folders.in_one_file(folder)
    save_file(
      {"model.norm.weight": np.zeros(16, np.float32)},
      folder / f"{name}.safetensors",
    )
    folders.assert_drawn(folders.load(folder))
    assert len(weight_files(folder)) == 1


def test_without_an_index_a_name_may_be_there_once(tmp_path):
  folders.save(tmp_path)
  (tmp_path / INDEX).unlink()
  save_file(
    {"model.norm.weight": np.zeros(16, np.float32)},
    tmp_path / "model-copy.safetensors",
  )
  with pytest.raises(UserError, match=r"model\.norm\.weight is in .* keep one"):
    folders.load(tmp_path)
  (tmp_path / "model-copy.safetensors").rename(
    tmp_path / "optimizer.safetensors"
  )
  folders.assert_drawn(folders.load(tmp_path))


def test_shards_that_count_themselves(tmp_path):
  folders.save(tmp_path)
  (tmp_path / INDEX).unlink()
  (path,) = tmp_path.glob("model-*.safetensors")
  path.rename(tmp_path / "model-00002-of-00003.safetensors")
  with pytest.raises(
    UserError, match=r"lacks model-00001-of-00003.* of 3 shards"
  ):
    folders.load(tmp_path)


@pytest.mark.parametrize("config", [False, True])
@pytest.mark.parametrize("weights", ["none", "one", "sharded"])
def test_adapters_are_named(tmp_path, weights, config):
  folders.save(tmp_path)
  if weights != "sharded":
    path = folders.in_one_file(tmp_path)
    if weights == "none":
      path.unlink()
  save_file(LORA, tmp_path / "adapter_model.safetensors")
  if config:
    (tmp_path / "adapter_config.json").write_text(
      '{"base_model_name_or_path": "some/base"}'
    )
  with pytest.raises(UserError, match="merge_and_unload") as error:
    folders.load(tmp_path)
  assert ("move it elsewhere" in str(error.value)) == (weights != "none")
  assert ("'some/base'" in str(error.value)) == (config and weights == "none")


def test_an_adapter_in_the_models_file_is_named(tmp_path):
  folders.save(tmp_path)
  folders.edit(
    tmp_path,
    lambda t: {f"base_model.model.{n}": v for n, v in t.items()} | LORA,
  )
  with pytest.raises(UserError, match=r"1 tensors of an adapter .*lora_A"):
    folders.load(tmp_path)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pth"])
def test_pickles_are_not_read(tmp_path, name):
  (tmp_path / name).write_bytes(b"PK\3\4" + bytes(100))
  message = f"no safetensors file, only {name}: .* can run code"
  with pytest.raises(UserError, match=message):
    folders.load(tmp_path)


# --- indices ---------------------------------------------------------------


def test_the_index_says_which_copy_counts(tmp_path):
  folders.save(tmp_path)
  (path,) = tmp_path.glob("model-*.safetensors")
  save_file(
    {"model.norm.weight": np.full(16, 5, np.float32)},
    tmp_path / "second.safetensors",
  )
  where = json.loads((tmp_path / INDEX).read_text())["weight_map"]
  where["model.norm.weight"] = "second.safetensors"
  (tmp_path / INDEX).write_text(json.dumps({"weight_map": where}))
  got = folders.load(tmp_path)
  assert (got.pop("decoder/norm/scale") == 5).all() and path.exists()


@pytest.mark.parametrize(
  "text, message",
  [
    (LFS, "Git-LFS pointer"),
    ('{"metadata": {}, "weight_map": {"lm_head.wei', "is not JSON"),
    ('{"metadata": {}}', "weight_map is missing"),
    ("[]", r"the whole is \[\]: input should be a JSON object"),
    ("null", "the whole is None"),
    ('{"weight_map": null}', "weight_map is None"),
    ('{"weight_map": ["a"]}', "weight_map is"),
    ('{"weight_map": {"a": 3}}', r"weight_map\.a is 3"),
    ('{"weight_map": {"a": null}}', r"weight_map\.a is None"),
    ('{"weight_map": {}}', "lists no tensor"),
    ("[" * 100_000, "nested too deep"),
    ('{"weight_map": {"a": "../b.safetensors"}}', "not below its folder"),
    ('{"weight_map": {"a": "x/../../b"}}', "not below its folder"),
    ('{"weight_map": {"a": "/etc/passwd"}}', "not below its folder"),
    ('{"weight_map": {"a": "a\\\\..\\\\b"}}', "not below its folder"),
    ('{"weight_map": {"a": "a\\u0000"}}', "not below its folder"),
    ('{"weight_map": {"a": ""}}', "not below its folder"),
    ('{"weight_map": {"a": "gone.safetensors"}}', "copy the missing shards"),
  ],
)
def test_broken_indices(tmp_path, text, message):
  folders.save(tmp_path)
  (tmp_path / INDEX).write_text(text)
  with pytest.raises(UserError, match=message) as error:
    folders.load(tmp_path)
  assert len(str(error.value)) < 1000


def test_shards_may_be_links_and_lie_below(tmp_path):
  """As the cache of huggingface_hub has them."""
  folders.save(tmp_path / "blobs")
  (path,) = (tmp_path / "blobs").glob("model-*.safetensors")
  snapshot = tmp_path / "snapshot"
  (snapshot / "parts").mkdir(parents=True)
  (snapshot / "parts" / "a.safetensors").symlink_to(path)
  where = json.loads((tmp_path / "blobs" / INDEX).read_text())["weight_map"]
  where = dict.fromkeys(where, "parts/a.safetensors")
  (snapshot / INDEX).write_text(json.dumps({"weight_map": where}))
  folders.assert_drawn(folders.load(snapshot))
  assert set(read_index(snapshot / INDEX).values()) == {"parts/a.safetensors"}


# --- messages -------------------------------------------------------------


def test_layers_are_folded():
  names = [f"model.layers.{i}.a" for i in (0, 1, 2, 5)]
  names += ["model.layers.7.b", "norm"]
  assert folded(names) == [
    "model.layers.{0..2,5}.a",
    "model.layers.7.b",
    "norm",
  ]


def test_long_lists_are_cut():
  assert shortened("abc") == "a, b, c"
  assert shortened("abcdefghij", 3) == "a, b, c and 7 more"


def test_a_folder_of_other_names_fails_in_few_lines(tmp_path):
  folders.save(tmp_path)
  folders.edit(tmp_path, _swap(("", "encoder.")))
  with pytest.raises(UserError, match=r"\(242 problems\)") as error:
    folders.load(tmp_path)
  lines = str(error.value).splitlines()
  assert len(lines) <= 20
  assert any("layers.{0..2}." in line for line in lines)
  assert sum("more lines" in line for line in lines) == 2


@pytest.mark.parametrize(
  "name, hint",
  [
    ("multi_modal_projector.linear_1.weight", "transformers' own LLaVA"),
    ("model.layers.0.mlp.up_proj.qweight", "quantised"),
  ],
)
def test_names_that_explain_the_problem(tmp_path, name, hint):
  folders.save(tmp_path)
  folders.edit(tmp_path, lambda t: t.update({name: np.zeros(2, np.float32)}))
  with pytest.raises(UserError, match=hint):
    folders.load(tmp_path)


# --- heads -----------------------------------------------------------------


def test_a_head_beside_tied_embeddings(tmp_path):
  folders.save(tmp_path, folders.TIED)

  def copied(tensors):
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()

  folders.edit(tmp_path, copied)
  folders.assert_drawn(folders.load(tmp_path, folders.TIED), folders.TIED)

  def changed(tensors):
    tensors["lm_head.weight"][-1, -1] += 1

  folders.edit(tmp_path, changed)
  with pytest.raises(
    UserError, match=r"tie_word_embeddings, and lm_head\.weight"
  ):
    folders.load(tmp_path, folders.TIED)


@pytest.mark.parametrize("kind", [ml_dtypes.bfloat16, np.float64])
def test_a_tied_head_of_another_dtype_is_compared_by_value(tmp_path, kind):
  folders.save(tmp_path, folders.TIED)

  def copied(tensors):
    narrow = tensors["model.embed_tokens.weight"].astype(ml_dtypes.bfloat16)
    tensors["model.embed_tokens.weight"] = narrow.astype(np.float32)
    tensors["lm_head.weight"] = narrow.astype(kind)

  folders.edit(tmp_path, copied)
  assert "decoder/embedding" in folders.load(tmp_path, folders.TIED)


def test_a_missing_head_is_explained(tmp_path):
  folders.save(tmp_path)
  folders.edit(
    tmp_path, lambda t: {n: v for n, v in t.items() if n != "lm_head.weight"}
  )
  with pytest.raises(UserError, match='"tie_word_embeddings": true'):
    folders.load(tmp_path)
