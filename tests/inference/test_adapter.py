"""Adapters: merged where they answer, and in PEFT's own layout."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import hourjax
from hourjax.errors import UserError
from hourjax.inference.export import export
from hourjax.models import lora
from hourjax.models.lora import LoraConfig
from hourjax.models.params import param_shapes
from hourjax.training.checkpoint import Base, Checkpoints
from hourjax.training.checkpoint_format import fingerprint, weight_sum
from hourjax.training.train_state import TrainState
from hourjax.weights import peft
from tests.inference import models
from tests.inference.test_export import FORGETTING, _logits, make_run
from tests.inference.test_load import run_of

LORA = LoraConfig(rank=3, alpha=12.0)


def draw_adapters(config, options, seed=0):
  """Parameters of adapters that change what a model says."""
  rng, shapes = np.random.default_rng(seed), param_shapes(config)
  layers = lora.target_layers(options, shapes)
  trained = {}
  for path, x in lora.adapter_shapes(options, layers, shapes).items():
    name = path.rpartition("/")[2]
    if name in lora.TRAINED:
      value = rng.normal(size=x.shape) / 6
      if name == lora.MAGNITUDE:
        value = rng.uniform(1, 3, x.shape)
      trained[path] = jnp.asarray(value, jnp.float32)
  return trained


def save_adapters(folder, base, params, options=LORA, model=models.CONFIG):
  """A workdir of a run of adapters of these parameters, as training does."""
  folder.mkdir(exist_ok=True)
  sums = {
    path: weight_sum(value)
    for path, value in params.items()
    if not path.startswith("vision/")
  }
  raw = run_of(dataclasses.asdict(model))
  raw |= {
    "lora": dataclasses.asdict(options),
    "init": str(base),
    "forgetting": FORGETTING,
    "seed": 5,
    "data": {"tokenizer": str(base / "words")},
  }
  trained = draw_adapters(model, options)
  made = Checkpoints(folder, base=Base({}, fingerprint(sums), {}))
  made.save(TrainState(jnp.int32(2), trained, {}, ()), 2, "plan", raw)
  made.finish()
  made.close()
  (folder / "config.json").write_text(json.dumps(raw))
  return trained


def layers_of(options, model=models.CONFIG):
  """Adapters layer by layer, as arrays of numpy."""
  found = lora.complete(draw_adapters(model, options), options)
  return {
    layer: {name: np.asarray(value) for name, value in own.items()}
    for layer, own in found.items()
  }


@pytest.fixture(scope="module")
def base(tmp_path_factory):
  """Workdir of a whole model, and its parameters."""
  folder = tmp_path_factory.mktemp("base")
  return folder, make_run(folder, steps=(1,))[1]


@pytest.fixture(scope="module")
def run(base, tmp_path_factory):
  """Workdir of adapters of all linear layers, and their parameters."""
  folder = tmp_path_factory.mktemp("adapters")
  return folder, save_adapters(folder, *base)


def _answers(model):
  memory = model.encode_memory(models.features())
  return [memory.ask(q, max_tokens=6).text for q in models.QUESTIONS]


def test_adapters_answer_merged_from_wherever_they_come(base, run, tmp_path):
  folder, _ = run
  export(folder, tmp_path / "merged", dtype="float32")
  expected = _answers(hourjax.load(tmp_path / "merged"))
  plain = hourjax.load(base[0])
  assert _answers(plain) != expected
  own = hourjax.load(folder)
  assert _answers(own) == expected and "step 2" in own.name != plain.name
  assert _answers(hourjax.load(base[0], adapter=folder)) == expected
  export(folder, tmp_path / "peft", part="adapter")
  assert sorted(path.name for path in (tmp_path / "peft").iterdir()) == [
    "README.md",
    "adapter_config.json",
    "adapter_model.safetensors",
  ]
  theirs = hourjax.load(base[0], adapter=tmp_path / "peft")
  assert _answers(theirs) == expected
  export(
    base[0], tmp_path / "again", dtype="float32", adapter=tmp_path / "peft"
  )
  for name, value in load_file(
    tmp_path / "again/model-00001-of-00001.safetensors"
  ).items():
    merged = load_file(tmp_path / "merged/model-00001-of-00001.safetensors")
    np.testing.assert_allclose(value, merged[name], atol=1e-6, err_msg=name)


def test_adapters_of_other_weights_are_refused(run, tmp_path):
  folder, _ = run
  make_run(tmp_path / "other", steps=(2,))
  with pytest.raises(UserError, match=r"belongs to the base \w+, and .* has"):
    hourjax.load(tmp_path / "other", adapter=folder)
  export(folder, tmp_path / "peft", part="adapter")
  with pytest.raises(UserError, match=r"belongs to the base"):
    hourjax.load(tmp_path / "other", adapter=tmp_path / "peft")
  larger = dataclasses.replace(
    models.CONFIG, decoder=dataclasses.replace(models.CONFIG.decoder, mlp=256)
  )
  make_run(tmp_path / "larger", larger, steps=(2,))
  for adapter in (folder, tmp_path / "peft"):
    with pytest.raises(UserError, match=r"(?s)of (another|this) model.*down"):
      hourjax.load(tmp_path / "larger", adapter=adapter)


def test_mistakes_are_named(base, run, tmp_path):
  folder, _ = run
  with pytest.raises(UserError, match=r"give its base .* as the model"):
    hourjax.load(folder, adapter=folder)
  with pytest.raises(UserError, match="holds neither a run of adapters"):
    hourjax.load(base[0], adapter=base[0])
  with pytest.raises(UserError, match="holds a whole model; give the workdir"):
    export(base[0], tmp_path / "out", part="adapter")
  assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("targets", ["all-linear", "q_proj,projector/*"])
def test_peft_s_layout_and_back(tmp_path, targets, dora):
  options = LoraConfig(rank=3, alpha=12.0, targets=targets, dora=dora)
  layers = layers_of(options)
  peft.write_adapters(
    tmp_path, layers, models.CONFIG, options, base="base", fingerprint="abc"
  )
  back, found = peft.read_adapters(tmp_path, models.CONFIG)
  assert found == "abc" and back.keys() == layers.keys()
  shapes = param_shapes(models.CONFIG)
  for layer, own in layers.items():
    kernel = jnp.ones(shapes[f"{layer}/kernel"])
    merged, ours = (
      lora.merge(kernel, {k: jnp.asarray(v) for k, v in x.items()})
      for x in (back[layer], own)
    )
    np.testing.assert_allclose(merged, ours, atol=1e-5, err_msg=layer)


def test_dora_of_a_part_of_an_official_layer_has_no_words(tmp_path):
  options = LoraConfig(rank=2, targets="memaug/self_attn/q", dora=True)
  layers = layers_of(options)
  with pytest.raises(UserError, match=r"DoRA of a part of .*Wqkv.* leaves out"):
    peft.write_adapters(
      tmp_path, layers, models.CONFIG, options, base="", fingerprint=""
    )


def _spoil(folder, change):
  path = folder / peft.WEIGHTS
  tensors = load_file(path)
  save_file(change(tensors), path)


@pytest.mark.parametrize(
  "change, message",
  [
    (lambda t: {k: v for k, v in t.items() if "0.q_proj.lora_B" not in k
                and "layers.0.self_attn.q_proj.lora_B" not in k},
     r"missing: lora_b of model\.layers\.0\.self_attn\.q_proj"),
    (lambda t: t | {"base_model.model.model.layers.0.x.lora_A.weight":
                    np.ones((2, 2), np.float32)}, r"unexpected: .*0\.x"),
    (lambda t: {k: v[:, :3] if k.endswith("0.mlp.up_proj.lora_A.weight") else v
                for k, v in t.items()}, r"up_proj: factors \(3, 3\)"),
    (lambda t: {}, "it has no tensors"),
  ],
)  # fmt: skip
def test_adapters_that_are_not_the_model_s(tmp_path, change, message):
  options = LoraConfig(rank=3, targets="decoder/*")
  layers = layers_of(options)
  peft.write_adapters(
    tmp_path, layers, models.CONFIG, options, base="", fingerprint=""
  )
  _spoil(tmp_path, change)
  with pytest.raises(UserError, match=message):
    peft.read_adapters(tmp_path, models.CONFIG)


@pytest.mark.parametrize(
  "key, value, message",
  [
    ("peft_type", "IA3", "peft_type"),
    ("modules_to_save", ["lm_head"], "modules_to_save=.*merge_and_unload"),
    ("bias", "all", "bias"),
  ],
)
def test_what_is_no_lora_is_refused(tmp_path, key, value, message):
  options = LoraConfig(rank=3, targets="q_proj")
  layers = layers_of(options)
  peft.write_adapters(
    tmp_path, layers, models.CONFIG, options, base="", fingerprint=""
  )
  path = tmp_path / peft.CONFIG
  path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
  with pytest.raises(UserError, match=message):
    peft.read_adapters(tmp_path, models.CONFIG)


@pytest.mark.slow
@pytest.mark.parametrize("options", [
  LORA, LoraConfig(rank=3, alpha=12.0, targets="decoder/*", dora=True),
])  # fmt: skip
def test_peft_loads_it_on_the_official_decoder(base, tmp_path, options):
  torch = pytest.importorskip("torch")
  transformers = pytest.importorskip("transformers")
  library = pytest.importorskip("peft")
  folder, params = base
  trained = save_adapters(tmp_path / "run", folder, params, options)
  export(tmp_path / "run", tmp_path / "adapter", part="adapter")
  export(folder, tmp_path / "decoder", part="decoder", dtype="float32")
  decoder = transformers.AutoModelForCausalLM.from_pretrained(
    tmp_path / "decoder"
  )
  theirs = library.PeftModel.from_pretrained(decoder, tmp_path / "adapter")
  tokens = np.random.default_rng(0).integers(0, 640, (1, 300))
  with torch.no_grad():
    expected = theirs.double()(torch.tensor(tokens)).logits.numpy()
  own = {
    path: jnp.asarray(value)
    for path, value in params.items()
    if path.startswith("decoder/")
  }
  plain = _logits(models.CONFIG, own, tokens)
  for layer, adapter in lora.complete(trained, options).items():
    if layer.startswith("decoder/"):
      # Not merged, as they are trained.
      own |= {f"{layer}/{name}": value for name, value in adapter.items()}
  got = _logits(models.CONFIG, own, tokens)
  scale = np.abs(expected).max()
  np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5 * scale)
  assert np.abs(np.asarray(plain) - expected).max() > 0.05 * scale
