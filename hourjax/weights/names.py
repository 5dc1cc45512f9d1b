"""The one table between official tensor names and our parameters.

An official name may hold `{i}`, the index of a layer, where our parameters of
all layers are stacked on a leading axis. torch's Linear weights are (out, in),
ours (in, out). MemAug's fused Wqkv and Wkv hold the rows of q, k and v one
below the other.
"""

import dataclasses

import numpy as np

from hourjax.models.config import ModelConfig

# Starts of the official names of vision tower and MemAug, and two names.
TOWER = "model.vision_tower.vision_tower.vision_model."
MEMAUG = "model.vision_resampler."
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


@dataclasses.dataclass(frozen=True)
class Entry:
  """Describes an official tensor and the parameters that it holds.

  Attributes:
    official: name in the checkpoint; `{i}` stands for the layer.
    paths: our parameters, "/"-joined; several when rows are fused.
    rows: official rows of each path (the first axis is cut by them).
    layout: "same", "transposed" (Linear) or "conv" (OIHW to HWIO).
    layers: number of layers that `{i}` counts; 0 for a name without it.
  """

  official: str
  paths: tuple[str, ...]
  rows: tuple[int, ...] = ()
  layout: str = "same"
  layers: int = 0

  def names(self) -> list[str]:
    """Returns the official names in layer order."""
    if not self.layers:
      return [self.official]
    return [self.official.format(i=i) for i in range(self.layers)]

  @property
  def row_axis(self) -> int:
    """Returns the axis of our (one layer's) parameter along official rows."""
    return {"same": 0, "transposed": 1, "conv": 3}[self.layout]

  def transposed(self, rows: np.ndarray) -> np.ndarray:
    """Returns some rows of an official tensor in our order of axes."""
    return _to_ours(rows, self.layout)

  def official_rows(self, array: np.ndarray) -> np.ndarray:
    """Returns one of our (one layer's) parameters as official rows."""
    return _to_official(array, self.layout)

  def to_ours(self, tensor: np.ndarray) -> list[np.ndarray]:
    """Splits an official tensor into one array for each of our paths."""
    parts = [tensor]
    if self.rows:
      parts = np.split(tensor, np.cumsum(self.rows)[:-1], axis=0)
    return [_to_ours(part, self.layout) for part in parts]

  def to_official(self, arrays: list[np.ndarray]) -> np.ndarray:
    """Joins our arrays into the official tensor; the inverse of `to_ours`."""
    parts = [self.official_rows(array) for array in arrays]
    return np.concatenate(parts, axis=0) if self.rows else parts[0]

  def official_shape(self, shapes: list[tuple[int, ...]]) -> tuple[int, ...]:
    """Returns the official tensor's shape.

    Args:
      shapes: of our parameters in one layer.
    """
    parts = [_official_shape(shape, self.layout) for shape in shapes]
    if len(parts) == 1:
      return parts[0]
    return (sum(shape[0] for shape in parts), *parts[0][1:])


def is_unused(config: ModelConfig, name: str) -> bool:
  """Returns whether a tensor is of the tower's last layer or of its head.

  Neither is run; see hourjax/README.md, Vision encoder.
  """
  last = f"{TOWER}encoder.layers.{config.vision.layers}."
  return name.startswith((last, f"{TOWER}head."))


def key_table(config: ModelConfig) -> list[Entry]:
  """Returns an entry for every tensor of Hour-LLaVA's official state dict."""
  entries = [Entry("model.image_newline", ("newline",))]
  entries += tower_table(config, TOWER)
  entries += _linear("model.mm_projector.0", "projector/fc1")
  entries += _linear("model.mm_projector.2", "projector/fc2")
  if config.memaug_layers:
    entries += _memaug(config, MEMAUG + "layers.{i}.")
  return entries + decoder_table(config)


def decoder_table(config: ModelConfig) -> list[Entry]:
  """Returns an entry for every tensor of the decoder.

  The names are those of Hugging Face's Qwen2ForCausalLM and Qwen3ForCausalLM,
  too.
  """
  decoder, n = config.decoder, config.decoder.layers
  official_layer, our_layer = "model.layers.{i}.", "decoder/layers/layers/"
  entries = [
    Entry(EMBEDDING, ("decoder/embedding",)),
    Entry("model.norm.weight", ("decoder/norm/scale",)),
  ]
  qkv_bias = decoder.attention_bias
  for official, ours, bias in [
    ("self_attn.q_proj", "attn/q", qkv_bias),
    ("self_attn.k_proj", "attn/k", qkv_bias),
    ("self_attn.v_proj", "attn/v", qkv_bias),
    ("self_attn.o_proj", "attn/o", False),
    ("mlp.gate_proj", "gate", False),
    ("mlp.up_proj", "up", False),
    ("mlp.down_proj", "down", False),
  ]:
    entries += _linear(
      official_layer + official, our_layer + ours, bias=bias, layers=n
    )
  norms = [("input_layernorm", "norm1"), ("post_attention_layernorm", "norm2")]
  if decoder.qk_norm:
    norms += [(f"self_attn.{x}_norm", f"attn/{x}_norm") for x in "qk"]
  for official, ours in norms:
    name, path = (
      f"{official_layer}{official}.weight",
      f"{our_layer}{ours}/scale",
    )
    entries.append(Entry(name, (path,), layers=n))
  if not decoder.tied:
    entries += _linear("lm_head", "decoder/head", bias=False)
  return entries


def _memaug(config: ModelConfig, official_layer: str) -> list[Entry]:
  decoder, n = config.decoder, config.memaug_layers
  our_layer = "memaug/layers/"
  entries = _fused(
    f"{official_layer}self_attn.Wqkv",
    [f"{our_layer}self_attn/{x}" for x in "qkv"],
    (decoder.q_width, decoder.kv_width, decoder.kv_width),
    n,
  )
  entries += _fused(
    f"{official_layer}cross_attn.Wkv",
    [f"{our_layer}cross_attn/{x}" for x in "kv"],
    (decoder.kv_width, decoder.kv_width),
    n,
  )
  for official, ours in [
    ("self_attn.Wo", "self_attn/o"),
    ("cross_attn.Wq", "cross_attn/q"),
    ("cross_attn.Wo", "cross_attn/o"),
    ("mlp.0", "fc1"),
    ("mlp.2", "fc2"),
  ]:
    entries += _linear(official_layer + official, our_layer + ours, layers=n)
  for name in ("norm1", "norm2", "norm3"):
    entries += _norm(official_layer + name, our_layer + name, layers=n)
  return entries


def tower_table(config: ModelConfig, prefix: str) -> list[Entry]:
  """Returns an entry for every tensor of the vision tower that is used.

  Args:
    config: of the model.
    prefix: start of the official names.
  """
  n = config.vision.layers
  official_layer = prefix + "encoder.layers.{i}."
  our_layer = "vision/encoder/layers/"
  embed = prefix + "embeddings."
  entries = [
    Entry(
      f"{embed}patch_embedding.weight", ("vision/patch/kernel",), layout="conv"
    ),
    Entry(f"{embed}patch_embedding.bias", ("vision/patch/bias",)),
    Entry(f"{embed}position_embedding.weight", ("vision/position",)),
    *_norm(f"{prefix}post_layernorm", "vision/post_norm"),
  ]
  for official, ours in [
    ("self_attn.q_proj", "q"),
    ("self_attn.k_proj", "k"),
    ("self_attn.v_proj", "v"),
    ("self_attn.out_proj", "o"),
    ("mlp.fc1", "fc1"),
    ("mlp.fc2", "fc2"),
  ]:
    entries += _linear(official_layer + official, our_layer + ours, layers=n)
  for official, ours in [("layer_norm1", "norm1"), ("layer_norm2", "norm2")]:
    entries += _norm(official_layer + official, our_layer + ours, layers=n)
  return entries


def _linear(
  official: str, ours: str, *, bias: bool = True, layers: int = 0
) -> list[Entry]:
  kernel = Entry(
    f"{official}.weight", (f"{ours}/kernel",), (), "transposed", layers
  )
  if not bias:
    return [kernel]
  return [
    kernel,
    Entry(f"{official}.bias", (f"{ours}/bias",), layers=layers),
  ]


def _fused(
  official: str, ours: list[str], rows: tuple[int, ...], layers: int
) -> list[Entry]:
  """Returns the entries of one linear layer that holds several of ours."""
  kernels = tuple(f"{path}/kernel" for path in ours)
  biases = tuple(f"{path}/bias" for path in ours)
  return [
    Entry(f"{official}.weight", kernels, rows, "transposed", layers),
    Entry(f"{official}.bias", biases, rows, "same", layers),
  ]


def _norm(official: str, ours: str, *, layers: int = 0) -> list[Entry]:
  return [
    Entry(f"{official}.weight", (f"{ours}/scale",), layers=layers),
    Entry(f"{official}.bias", (f"{ours}/bias",), layers=layers),
  ]


_CONV = (2, 3, 1, 0)  # OIHW to HWIO
_CONV_BACK = (3, 2, 0, 1)


def _to_ours(array: np.ndarray, layout: str) -> np.ndarray:
  if layout == "conv":
    return array.transpose(_CONV)
  return array.T if layout == "transposed" else array


def _to_official(array: np.ndarray, layout: str) -> np.ndarray:
  if layout == "conv":
    return array.transpose(_CONV_BACK)
  return array.T if layout == "transposed" else array


def _official_shape(shape: tuple[int, ...], layout: str) -> tuple[int, ...]:
  if layout == "conv":
    return tuple(shape[axis] for axis in _CONV_BACK)
  return tuple(reversed(shape)) if layout == "transposed" else tuple(shape)
