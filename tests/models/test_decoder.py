"""The decoder against the Qwen2 and Qwen3 of Hugging Face's transformers.

Both sides hold the same random float32 weights, which travel through the
checkpoint reader; it finds the decoder's configuration in the `config.json`
that transformers writes.
"""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from hourjax.models.attention import KeysValues
from hourjax.models.config import TINY, ModelConfig
from hourjax.models.params import param_shapes, with_params
from hourjax.weights.checkpoint import load_params
from hourjax.weights.config import read_config
from hourjax.weights.shards import save_params
from tests import official

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

SIZES = {
  "vocab_size": 96,
  "hidden_size": 32,
  "intermediate_size": 48,
  "num_hidden_layers": 2,
  "num_attention_heads": 4,
  "num_key_value_heads": 2,
  "max_position_embeddings": 64,
}
MODELS = {
  "qwen2": ("Qwen2", SIZES | {"tie_word_embeddings": False}),
  "qwen3": ("Qwen3", SIZES | {"head_dim": 16, "tie_word_embeddings": True}),
}
TOKENS = np.random.default_rng(0).integers(0, 96, (2, 11)).astype(np.int32)
ANSWER = 6  # tokens
LOGITS = 1e-5


@dataclasses.dataclass(frozen=True)
class Case:
  """Holds a model of transformers and ours with the same weights."""

  theirs: "transformers.PreTrainedModel"
  config: ModelConfig
  params: dict[str, np.ndarray]


@pytest.fixture(
  scope="module",
  params=[pytest.param("qwen2", marks=pytest.mark.slow), "qwen3"],
)
def case(request, tmp_path_factory) -> Case:
  """Draws weights, and reads what transformers saves as ours."""
  name, sizes = MODELS[request.param]
  torch.manual_seed(0)
  theirs = getattr(transformers, f"{name}ForCausalLM")(
    getattr(transformers, f"{name}Config")(**sizes)
  ).eval()
  with torch.no_grad():
    # Norms and biases start as ones and zeros, which would hide mistakes.
    for parameter in theirs.parameters():
      parameter.add_(0.1 * torch.randn_like(parameter))
  folder = tmp_path_factory.mktemp("model")
  theirs.save_pretrained(folder)
  config, params = _read(folder)
  return Case(theirs, config, params)


def _read(folder) -> tuple[ModelConfig, dict[str, np.ndarray]]:
  path = folder / "config.json"
  raw = json.loads(path.read_text()) | {"memaug_depth": 0}
  path.write_text(json.dumps(raw))
  config = dataclasses.replace(
    read_config(folder), vision=TINY.vision, dtype="float32", remat="none"
  )
  shapes = param_shapes(config)
  rest = {path for path in shapes if not path.startswith("decoder/")}
  params = load_params(folder, config, shapes, optional=rest)
  assert params.keys() == shapes.keys() - rest
  return config, params


def _decoder(config, params):
  return with_params(config, params, prefix="decoder/").decoder


def _hidden(decoder):
  position = jnp.broadcast_to(jnp.arange(TOKENS.shape[1]), TOKENS.shape)
  return decoder(
    decoder.embed(jnp.asarray(TOKENS)),
    position=position,
    segment=jnp.ones_like(position),
  )


def test_the_configuration_is_read(case):
  theirs, ours = case.theirs.config, case.config.decoder
  assert ours.qk_norm == (theirs.model_type == "qwen3")
  assert ours.attention_bias == (theirs.model_type == "qwen2")
  assert ours.head_size == getattr(theirs, "head_dim", 8)
  assert ours.tied == theirs.tie_word_embeddings
  assert ours.rope_base == theirs.rope_parameters["rope_theta"]
  assert ours.norm_eps == theirs.rms_norm_eps
  count = sum(p.numel() for p in case.theirs.parameters())
  assert count == sum(value.size for value in case.params.values())


def test_logits_and_gradients(case):
  """Of the mean cross entropy of each next token."""
  tokens = torch.tensor(TOKENS.astype(np.int64))
  theirs = case.theirs(input_ids=tokens, labels=tokens)
  theirs.loss.backward()

  @jax.jit
  def run(params):
    def loss(params):
      decoder = _decoder(case.config, params)
      logits = decoder.logits(_hidden(decoder))
      chosen = jnp.take_along_axis(
        jax.nn.log_softmax(logits[:, :-1]), TOKENS[:, 1:, None], axis=-1
      )
      return -chosen.mean(), logits

    return jax.value_and_grad(loss, has_aux=True)(params)

  (loss, logits), gradients = run(case.params)
  np.testing.assert_allclose(
    logits, theirs.logits.detach(), rtol=0, atol=LOGITS
  )
  np.testing.assert_allclose(loss, theirs.loss.detach(), rtol=0, atol=LOGITS)
  expected = {
    name: parameter.grad.numpy()
    for name, parameter in case.theirs.named_parameters()
  }
  ours = official.to_official(gradients, case.config)
  assert ours.keys() == expected.keys()
  official.assert_gradients(ours, expected)
  case.theirs.zero_grad()


@pytest.mark.slow
def test_greedy_decoding_through_the_cache(case):
  """Prompts of two lengths in two rows, and then one token after another."""
  lengths = np.array([11, 8], np.int32)
  expected = []
  for prompt, length in zip(TOKENS, lengths):
    prompt = torch.tensor(prompt[None, :length].astype(np.int64))
    answer = case.theirs.generate(
      prompt,
      attention_mask=torch.ones_like(prompt),
      max_new_tokens=ANSWER,
      min_new_tokens=ANSWER,
      do_sample=False,
      pad_token_id=0,
    )
    expected.append(answer[0, length:].numpy())
  np.testing.assert_array_equal(
    _greedy(case.config, case.params, lengths), expected
  )


def _greedy(config, params, lengths) -> np.ndarray:
  @jax.jit
  def prefill(params):
    decoder = _decoder(config, params)
    position = jnp.broadcast_to(jnp.arange(TOKENS.shape[1]), TOKENS.shape)
    segment = (position < lengths[:, None]).astype(jnp.int32)
    cache = decoder.prefill(
      decoder.embed(jnp.asarray(TOKENS)), position=position, segment=segment
    )
    room = ((0, 0), (0, 0), (0, ANSWER), (0, 0), (0, 0))
    return KeysValues(*(jnp.pad(x, room) for x in cache))

  @jax.jit
  def extend(params, cache, token, length):
    """The next token after `token`, which joins the cache."""
    decoder = _decoder(config, params)
    hidden, new = decoder.extend(
      decoder.embed_few(token[:, None]), cache, length
    )
    rows = jnp.arange(len(length))
    cache = KeysValues(
      *(x.at[:, rows, length].set(n[:, :, 0]) for x, n in zip(cache, new))
    )
    return cache, jnp.argmax(decoder.logits(hidden)[:, 0], axis=-1)

  # The last token of a prompt enters the cache a second time, as a new one.
  cache, length = prefill(params), jnp.asarray(lengths) - 1
  token = jnp.asarray(TOKENS[np.arange(len(lengths)), lengths - 1])
  answer = []
  for _ in range(ANSWER):
    cache, token = extend(params, cache, token, length)
    length = length + 1
    answer.append(np.asarray(token))
  return np.stack(answer, axis=1)


def test_written_and_read_again(tmp_path):
  """A whole Hour-LLaVA over Qwen3, and its decoder in transformers' class."""
  decoder = dataclasses.replace(
    TINY.decoder, head_dim=24, qk_norm=True, attention_bias=False
  )
  config = dataclasses.replace(TINY, decoder=decoder)
  rng = np.random.default_rng(0)
  params = {
    path: rng.normal(size=shape).astype(np.float32)
    for path, shape in param_shapes(config).items()
  }
  save_params(params, config, tmp_path)
  found = read_config(tmp_path)
  assert (found.decoder, found.vision) == (decoder, config.vision)
  again = load_params(tmp_path, found, param_shapes(config))
  assert again.keys() == params.keys()
  for path, value in again.items():
    np.testing.assert_array_equal(value, params[path], err_msg=path)

  (file,) = tmp_path.glob("*.safetensors")
  tensors = {
    name: value
    for name, value in load_file(file).items()
    if name.startswith(("model.layers.", "lm_head.", "model.embed_tokens."))
    or name == "model.norm.weight"
  }
  for path in tmp_path.iterdir():
    path.unlink()
  save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
  transformers.Qwen3Config(
    **SIZES
    | {
      "vocab_size": decoder.vocab,
      "hidden_size": decoder.width,
      "intermediate_size": decoder.mlp,
      "head_dim": decoder.head_dim,
      "rope_parameters": {"rope_theta": 1e6, "rope_type": "default"},
    }
  ).save_pretrained(tmp_path)
  theirs, problems = transformers.Qwen3ForCausalLM.from_pretrained(
    tmp_path, output_loading_info=True
  )
  assert not any(problems.values()), problems
  for name, value in theirs.state_dict().items():
    np.testing.assert_array_equal(value, tensors[name], err_msg=name)
