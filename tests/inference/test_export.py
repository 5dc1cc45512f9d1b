"""Exports: what is written, what reads it, and what a mistake leaves."""

import dataclasses
import json
import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

import hourjax
from hourjax.errors import UserError
from hourjax.inference.export import export
from hourjax.models.params import param_shapes, with_params
from hourjax.training.checkpoint import Checkpoints
from hourjax.training.train_state import TrainState
from hourjax.weights import checkpoint, config
from tests import hub_server, official
from tests.drawn_params import draw_params
from tests.inference import models
from tests.inference.test_load import run_of

ROOT = pathlib.Path(__file__).parents[2]
FORGETTING = {"temporal": "keyframe", "ratio": 2}


def make_run(folder, model=models.CONFIG, steps=(3, 6), **changes):
  """A workdir as training leaves it; returns the parameters of each step."""
  models.tokenizer(folder / "words")
  raw = run_of(dataclasses.asdict(model)) | {"forgetting": FORGETTING}
  raw |= {"data": {"tokenizer": str(folder / "words")}, "seed": 5} | changes
  made, drawn = Checkpoints(folder), {}
  for step in steps:
    params = draw_params(model, step)
    # Larger than training draws them, so that answers depend on the question.
    params = {
      path: value * np.float32(3 if path.endswith("kernel") else 1)
      for path, value in params.items()
    }
    drawn[step] = params
    names = sorted(params)
    parts = [{n: jnp.asarray(params[n]) for n in names[i::2]} for i in (0, 1)]
    made.save(TrainState(jnp.int32(step), *parts, ()), step, "plan", raw)
  made.finish()
  made.close()
  (folder / "config.json").write_text(json.dumps(raw))
  return drawn


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  """A workdir with two checkpoints, and their parameters."""
  folder = tmp_path_factory.mktemp("run")
  return folder, make_run(folder)


def _tensors(folder):
  found = {}
  for path in sorted(folder.glob("*.safetensors")):
    found |= load_file(path)
  return found


def _hidden(folder):
  return [path.name for path in folder.iterdir() if path.name.startswith(".")]


def test_a_run_and_back(run, tmp_path):
  """float32 keeps every bit, and the answers are those of the workdir."""
  folder, drawn = run
  problems = export(folder, tmp_path / "out", dtype="float32", shard_bytes=9000)
  assert any("tower is not SigLIP" in text for text in problems)
  found = config.read_config(tmp_path / "out")
  # Answers need no gradients, so how these are computed is not written.
  assert found == dataclasses.replace(models.CONFIG, remat="full")
  params = checkpoint.load_params(
    tmp_path / "out", found, param_shapes(models.CONFIG)
  )
  assert params.keys() == drawn[6].keys()
  for path, value in drawn[6].items():
    np.testing.assert_array_equal(params[path], value, err_msg=path)
  assert not _hidden(tmp_path)
  assert len(list((tmp_path / "out").glob("model-*-of-*.safetensors"))) > 5
  ours, theirs = hourjax.load(folder), hourjax.load(tmp_path / "out")
  visual = models.features()
  for model in (ours, theirs):
    memory = model.encode_memory(visual)
    texts = [memory.ask(q, max_tokens=6).text for q in models.QUESTIONS]
    if model is ours:
      expected = texts
  assert texts == expected


def test_bfloat16_is_the_default(run, tmp_path):
  folder, drawn = run
  export(folder, tmp_path / "out")
  tensors = _tensors(tmp_path / "out")
  expected = official.to_official(drawn[6], models.CONFIG)
  assert tensors.keys() == expected.keys()
  for name, value in expected.items():
    assert tensors[name].dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(
      tensors[name], value.astype(ml_dtypes.bfloat16), err_msg=name
    )
  raw = json.loads((tmp_path / "out/config.json").read_text())
  assert raw["torch_dtype"] == "bfloat16"
  # An export of the export, as of any published folder, is the same.
  export(tmp_path / "out", tmp_path / "again")
  for name, value in _tensors(tmp_path / "again").items():
    np.testing.assert_array_equal(value, tensors[name], err_msg=name)
  again = json.loads((tmp_path / "again/config.json").read_text())
  assert again == raw


def test_tokenizer_ends_and_card(run, tmp_path):
  folder, _ = run
  out = tmp_path / "out"
  export(folder, out, dtype="float32")
  words = folder / "words"
  for path in words.iterdir():
    assert (out / path.name).read_bytes() == path.read_bytes()
  vocabulary = models.tokenizer(tmp_path / "words")
  ends = json.loads((out / "generation_config.json").read_text())
  assert ends["eos_token_id"] == [vocabulary.im_end, vocabulary.pad]
  card = (out / "README.md").read_text()
  for words in (
    r"\| run \| run\d*",
    r"\| started from \| random weights",
    r"\| steps \| 6 ",
    r"\| rows of samples \| 48 \(8 a step\)",
    r"\| forgetting \| .*temporal keyframe, ratio 2",
    "cannot run this model: its tower is not SigLIP",
    "Whoever publishes these weights",
  ):
    assert re.search(words, card), (words, card)


def test_a_step_of_the_run(run, tmp_path):
  folder, drawn = run
  export(folder, tmp_path / "out", step=3, dtype="float32")
  tensors = _tensors(tmp_path / "out")
  expected = official.to_official(drawn[3], models.CONFIG)
  for name, value in expected.items():
    np.testing.assert_array_equal(tensors[name], value, err_msg=name)
  with pytest.raises(UserError, match="no checkpoint of step 4, only 3, 6"):
    export(folder, tmp_path / "other", step=4)
  with pytest.raises(UserError, match="leave --step out"):
    export(tmp_path / "out", tmp_path / "other", step=3)
  assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_damaged_checkpoint(tmp_path):
  """The one before is exported; where a step was named, none is."""
  drawn = make_run(tmp_path / "run")
  state = tmp_path / "run/checkpoints/6/state"
  largest = max(state.rglob("*"), key=lambda p: p.stat().st_size)
  data = bytearray(largest.read_bytes())
  data[len(data) // 2] ^= 255
  largest.write_bytes(data)
  export(tmp_path / "run", tmp_path / "out", dtype="float32", shard_bytes=1000)
  tensors = _tensors(tmp_path / "out")
  for name, value in official.to_official(drawn[3], models.CONFIG).items():
    np.testing.assert_array_equal(tensors[name], value, err_msg=name)
  assert "| steps | 3 |" in (tmp_path / "out/README.md").read_text()
  with pytest.raises(UserError, match=r"6 is damaged: .*choose another step"):
    export(tmp_path / "run", tmp_path / "other", step=6)
  assert not (tmp_path / "other").exists() and not _hidden(tmp_path)


def test_tied_embeddings_are_written_once(tmp_path):
  decoder = dataclasses.replace(models.CONFIG.decoder, tied=True)
  tied = dataclasses.replace(models.CONFIG, decoder=decoder)
  drawn = make_run(tmp_path / "run", tied, steps=(1,))
  export(tmp_path / "run", tmp_path / "out", dtype="float32")
  tensors = _tensors(tmp_path / "out")
  assert "lm_head.weight" not in tensors
  np.testing.assert_array_equal(
    tensors["model.embed_tokens.weight"], drawn[1]["decoder/embedding"]
  )
  assert config.read_config(tmp_path / "out").decoder == decoder


def test_a_folder_that_exists(run, tmp_path):
  folder, _ = run
  (tmp_path / "out").mkdir()
  (tmp_path / "out/mine.txt").write_text("kept")
  with pytest.raises(UserError, match="out exists and is not empty; choose"):
    export(folder, tmp_path / "out")
  assert (tmp_path / "out/mine.txt").read_text() == "kept"
  (tmp_path / "file").write_text("")
  with pytest.raises(UserError, match="file exists and is not empty"):
    export(folder, tmp_path / "file")
  (tmp_path / "empty").mkdir()
  export(folder, tmp_path / "empty", part="tower")
  assert (tmp_path / "empty/config.json").exists()
  assert not _hidden(tmp_path)


def test_what_cannot_be_exported(run, tmp_path):
  folder, _ = run
  with pytest.raises(UserError, match=r"model folder .* does not exist"):
    export(tmp_path / "nothing", tmp_path / "out")
  with pytest.raises(UserError, match="the tokenizer of"):
    export(folder, tmp_path / "out", tokenizer=tmp_path / "nothing")
  make_run(tmp_path / "run", steps=(1,))
  raw = json.loads((tmp_path / "run/config.json").read_text())
  raw["model"]["decoder"]["vocab"] = 641
  (tmp_path / "run/config.json").write_text(json.dumps(raw))
  with pytest.raises(UserError, match=r"640.* in the weights and .*641"):
    export(tmp_path / "run", tmp_path / "out")
  raw["model"]["decoder"]["vocab"] = 8
  (tmp_path / "run/config.json").write_text(json.dumps(raw))
  with pytest.raises(UserError, match="tokens and the model knows 8"):
    export(tmp_path / "run", tmp_path / "out")
  assert not (tmp_path / "out").exists() and not _hidden(tmp_path)


_KILLED = """
import os, signal, sys
from hourjax.inference import export
writer = export.ShardWriter
class Dying(writer):
  def write(self, path, value):
    if path.startswith("vision/"):
      os.kill(os.getpid(), signal.SIGKILL)
    return super().write(path, value)
export.ShardWriter = Dying
export.export(*sys.argv[1:])
"""


@pytest.mark.slow
def test_a_killed_export_leaves_no_folder(run, tmp_path):
  folder, _ = run
  done = subprocess.run(
    [sys.executable, "-c", _KILLED, str(folder), str(tmp_path / "out")],
    cwd=ROOT,
    timeout=120,
  )
  assert done.returncode == -9
  assert _hidden(tmp_path) == [".out.partial"]
  assert not (tmp_path / "out").exists()
  export(folder, tmp_path / "out")
  assert not _hidden(tmp_path)
  hourjax.load(tmp_path / "out")


# --- read by transformers ---------------------------------------------------


def _decoders():
  base = models.CONFIG.decoder
  qwen3 = {"qk_norm": True, "attention_bias": False, "head_dim": 24}
  return {
    "untied": base,
    "tied": dataclasses.replace(base, tied=True),
    "qwen3": dataclasses.replace(base, **qwen3),
  }


def _logits(model, params, tokens):
  @jax.jit
  def run(params):
    decoder = with_params(model, params, prefix="decoder/").decoder
    position = jnp.arange(tokens.shape[1])[None]
    hidden = decoder(
      decoder.embed(jnp.asarray(tokens, jnp.int32)),
      position=position,
      segment=jnp.ones_like(position),
    )
    return decoder.logits(hidden)

  return run(params)


def _features(model, params, pixels):
  tower = jax.jit(with_params(model, params, prefix="vision/").vision)
  return tower(jnp.asarray(pixels))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["untied", "tied", "qwen3"])
def test_the_decoder_in_transformers(tmp_path, name):
  torch = pytest.importorskip("torch")
  transformers = pytest.importorskip("transformers")
  model = dataclasses.replace(models.CONFIG, decoder=_decoders()[name])
  drawn = make_run(tmp_path / "run", model, steps=(1,))
  export(tmp_path / "run", tmp_path / "out", part="decoder", dtype="float32")
  theirs, problems = transformers.AutoModelForCausalLM.from_pretrained(
    tmp_path / "out", output_loading_info=True
  )
  assert not any(problems.values()), problems
  kind = "Qwen3" if name == "qwen3" else "Qwen2"
  assert type(theirs).__name__ == f"{kind}ForCausalLM"
  assert theirs.dtype == torch.float32
  tokens = np.random.default_rng(0).integers(0, 640, (1, 300))
  # In float64: two float32 results may differ by the rounding of both.
  with torch.no_grad():
    expected = theirs.double()(torch.tensor(tokens)).logits.numpy()
  got = _logits(model, drawn[1], tokens)
  scale = np.abs(expected).max()
  np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5 * scale)


@pytest.mark.slow
def test_the_tower_in_transformers(run, tmp_path):
  torch = pytest.importorskip("torch")
  transformers = pytest.importorskip("transformers")
  folder, drawn = run
  export(folder, tmp_path / "out", part="tower", dtype="float32")
  theirs, problems = transformers.SiglipVisionModel.from_pretrained(
    tmp_path / "out", output_loading_info=True
  )
  assert not any(problems.values()), problems
  pixels = np.random.default_rng(0).normal(size=(2, 8, 8, 3))
  pixels = pixels.astype(np.float32)
  with torch.no_grad():
    images = torch.tensor(pixels.transpose(0, 3, 1, 2))
    found = theirs(images, output_hidden_states=True).hidden_states[-1]
  got = _features(models.CONFIG, drawn[6], pixels)
  np.testing.assert_allclose(got, found.numpy(), rtol=1e-5, atol=2e-5)
  scale = json.loads((tmp_path / "out/preprocessor_config.json").read_text())
  assert scale["size"] == {"height": 8, "width": 8}
  # It is a tower for us, too.
  again = checkpoint.load_tower(
    tmp_path / "out", models.CONFIG, param_shapes(models.CONFIG)
  )
  for path, value in again.items():
    np.testing.assert_array_equal(value, drawn[6][path], err_msg=path)
  assert {p for p in drawn[6] if p.startswith("vision/")} == again.keys()


# --- memory -----------------------------------------------------------------

# --- from a hub ---------------------------------------------------------------

_USES = """
import json, sys
import hourjax
import numpy as np
from hourjax.data.tokenizer import Tokenizer
from hourjax.extraction.encoder import tower_params
from hourjax.inference.export import export
from hourjax.training.config import build_experiment
from hourjax.training.train_state import initial_params

name, raw, out = sys.argv[1:]
experiment = build_experiment(json.loads(raw) | {"init": name})
started = initial_params(experiment)
tower = tower_params(experiment, name)
words = Tokenizer.from_folder(name)
model = hourjax.load(name)
export(name, out, dtype="float32")
total = lambda arrays: float(sum(np.abs(np.asarray(x)).sum() for x in arrays))
print(json.dumps({
  "started": total(started.values()), "tower": total(tower.values()),
  "words": words.fingerprint, "name": model.name,
}))
"""


@pytest.mark.slow
def test_everything_that_takes_a_name(run, tmp_path):
  """Training, extraction, tokenizer, questions and export, from one fetch."""
  pytest.importorskip("huggingface_hub")
  folder, drawn = run
  export(folder, tmp_path / "out", dtype="float32", shard_bytes=10**5)
  raw = run_of(dataclasses.asdict(models.CONFIG))
  with hub_server.running() as hub:
    files = {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}
    commit = hub.add("films/tiny", files)
    done = subprocess.run(
      [sys.executable, "-c", _USES, "hf://films/tiny", json.dumps(raw),
       str(tmp_path / "again")],
      env=hub_server.environment(hub.url, tmp_path / "home"),
      cwd=ROOT, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert len(hub.files_asked()) == len(set(hub.files_asked()))
    assert "README.md" not in hub.files_asked()
  found = json.loads(done.stdout.splitlines()[-1])
  values = {p: float(np.abs(v).sum()) for p, v in drawn[6].items()}
  tower = sum(v for p, v in values.items() if p.startswith("vision/"))
  np.testing.assert_allclose(found["started"], sum(values.values()), rtol=1e-4)
  np.testing.assert_allclose(found["tower"], tower, rtol=1e-4)
  assert found["words"] == models.tokenizer(tmp_path / "words").fingerprint
  assert found["name"].startswith(f"films/tiny@{commit[:7]} ")
  tensors = _tensors(tmp_path / "again")
  for name, value in official.to_official(drawn[6], models.CONFIG).items():
    np.testing.assert_array_equal(tensors[name], value, err_msg=name)
  card = (tmp_path / "again/README.md").read_text()
  assert f"| converted from | films/tiny@{commit[:7]} |" in card
