"""The one table between official tensor names and our parameters.

An official name may hold `{i}`, the index of a layer; our parameters of all
layers are stacked on a leading axis. torch's Linear weights are (out, in),
ours (in, out); MemAug's fused Wqkv and Wkv are rows of q, k, v on top of one
another.
"""

import dataclasses

import numpy as np

from hourjax.models.config import ModelConfig

# Where Hour-LLaVA's checkpoints have the vision tower.
TOWER = "model.vision_tower.vision_tower.vision_model."


@dataclasses.dataclass(frozen=True)
class Entry:
  """One official tensor and the parameters it holds.

  Attributes:
    official: name in the checkpoint; `{i}` stands for the layer.
    paths: our parameters, "/"-joined; several when rows are fused.
    rows: official rows of each path (the first axis is cut by them).
    layout: "same", "transposed" (Linear) or "conv" (OIHW to HWIO).
    layers: how many layers `{i}` runs over; 0 where there is none.
  """

  official: str
  paths: tuple[str, ...]
  rows: tuple[int, ...] = ()
  layout: str = "same"
  layers: int = 0

  def names(self) -> list[str]:
    """Official names in layer order."""
    if not self.layers:
      return [self.official]
    return [self.official.format(i=i) for i in range(self.layers)]

  @property
  def row_axis(self) -> int:
    """The axis of our parameter (of one layer) that official rows lie along."""
    return {"same": 0, "transposed": 1, "conv": 3}[self.layout]

  def turned(self, rows: np.ndarray) -> np.ndarray:
    """Some rows of an official tensor with our order of axes."""
    return _turn(rows, self.layout)

  def to_ours(self, tensor: np.ndarray) -> list[np.ndarray]:
    """One official tensor cut and turned into one array for each path."""
    parts = [tensor]
    if self.rows:
      parts = np.split(tensor, np.cumsum(self.rows)[:-1], axis=0)
    return [_turn(part, self.layout) for part in parts]

  def to_official(self, arrays: list[np.ndarray]) -> np.ndarray:
    """Inverse of `to_ours`."""
    parts = [_turn_back(array, self.layout) for array in arrays]
    return np.concatenate(parts, axis=0) if self.rows else parts[0]

  def official_shape(self, shapes: list[tuple[int, ...]]) -> tuple[int, ...]:
    """Shape of the official tensor, from the shapes of one layer of ours."""
    turned = [_shape_back(shape, self.layout) for shape in shapes]
    if len(turned) == 1:
      return turned[0]
    return (sum(shape[0] for shape in turned), *turned[0][1:])


def is_unused(config: ModelConfig, name: str) -> bool:
  """Is it of the tower's last layer or head, which are not run (SPEC 1)?"""
  last = f"{TOWER}encoder.layers.{config.vision.layers}."
  return name.startswith((last, f"{TOWER}head."))


def key_table(config: ModelConfig) -> list[Entry]:
  """Every tensor of Hour-LLaVA's official state dict, once."""
  entries = [Entry("model.image_newline", ("newline",))]
  entries += tower_table(config, TOWER)
  entries += _linear("model.mm_projector.0", "projector/fc1")
  entries += _linear("model.mm_projector.2", "projector/fc2")
  if config.memaug_layers:
    entries += _memaug(config, "model.vision_resampler.layers.{i}.")
  return entries + _decoder(config)


def _decoder(config: ModelConfig) -> list[Entry]:
  decoder, n = config.decoder, config.decoder.layers
  there, here = "model.layers.{i}.", "decoder/layers/layers/"
  entries = [
    Entry("model.embed_tokens.weight", ("decoder/embedding",)),
    Entry("model.norm.weight", ("decoder/norm/scale",)),
  ]
  for name in "qkv":
    entries += _linear(
      f"{there}self_attn.{name}_proj", f"{here}attn/{name}", layers=n
    )
  for official, ours in [
    ("self_attn.o_proj", "attn/o"),
    ("mlp.gate_proj", "gate"),
    ("mlp.up_proj", "up"),
    ("mlp.down_proj", "down"),
  ]:
    entries += _linear(there + official, here + ours, bias=False, layers=n)
  for official, ours in [
    ("input_layernorm", "norm1"),
    ("post_attention_layernorm", "norm2"),
  ]:
    entries.append(
      Entry(f"{there}{official}.weight", (f"{here}{ours}/scale",), layers=n)
    )
  if not decoder.tied:
    entries += _linear("lm_head", "decoder/head", bias=False)
  return entries


def _memaug(config: ModelConfig, there: str) -> list[Entry]:
  decoder, n, here = config.decoder, config.memaug_layers, "memaug/layers/"
  kv = decoder.head_dim * decoder.kv_heads
  entries = _fused(
    f"{there}self_attn.Wqkv",
    [f"{here}self_attn/{x}" for x in "qkv"],
    (decoder.width, kv, kv),
    n,
  )
  entries += _fused(
    f"{there}cross_attn.Wkv",
    [f"{here}cross_attn/{x}" for x in "kv"],
    (kv, kv),
    n,
  )
  for official, ours in [
    ("self_attn.Wo", "self_attn/o"),
    ("cross_attn.Wq", "cross_attn/q"),
    ("cross_attn.Wo", "cross_attn/o"),
    ("mlp.0", "fc1"),
    ("mlp.2", "fc2"),
  ]:
    entries += _linear(there + official, here + ours, layers=n)
  for name in ("norm1", "norm2", "norm3"):
    entries += _norm(there + name, here + name, layers=n)
  return entries


def tower_table(config: ModelConfig, there: str) -> list[Entry]:
  """The vision tower's tensors; `there` is what their names start with."""
  n = config.vision.layers
  layer, here = there + "encoder.layers.{i}.", "vision/encoder/layers/"
  embed = there + "embeddings."
  entries = [
    Entry(
      f"{embed}patch_embedding.weight", ("vision/patch/kernel",), layout="conv"
    ),
    Entry(f"{embed}patch_embedding.bias", ("vision/patch/bias",)),
    Entry(f"{embed}position_embedding.weight", ("vision/position",)),
    *_norm(f"{there}post_layernorm", "vision/post_norm"),
  ]
  for official, ours in [
    ("self_attn.q_proj", "q"),
    ("self_attn.k_proj", "k"),
    ("self_attn.v_proj", "v"),
    ("self_attn.out_proj", "o"),
    ("mlp.fc1", "fc1"),
    ("mlp.fc2", "fc2"),
  ]:
    entries += _linear(layer + official, here + ours, layers=n)
  for official, ours in [("layer_norm1", "norm1"), ("layer_norm2", "norm2")]:
    entries += _norm(layer + official, here + ours, layers=n)
  return entries


def _linear(official, ours, *, bias=True, layers=0) -> list[Entry]:
  kernel = Entry(
    f"{official}.weight", (f"{ours}/kernel",), (), "transposed", layers
  )
  if not bias:
    return [kernel]
  return [
    kernel,
    Entry(f"{official}.bias", (f"{ours}/bias",), layers=layers),
  ]


def _fused(official, ours, rows, layers) -> list[Entry]:
  kernels = tuple(f"{path}/kernel" for path in ours)
  biases = tuple(f"{path}/bias" for path in ours)
  return [
    Entry(f"{official}.weight", kernels, rows, "transposed", layers),
    Entry(f"{official}.bias", biases, rows, "same", layers),
  ]


def _norm(official, ours, *, layers=0) -> list[Entry]:
  return [
    Entry(f"{official}.weight", (f"{ours}/scale",), layers=layers),
    Entry(f"{official}.bias", (f"{ours}/bias",), layers=layers),
  ]


_CONV = (2, 3, 1, 0)
_CONV_BACK = (3, 2, 0, 1)


def _turn(array, layout):
  if layout == "conv":
    return array.transpose(_CONV)
  return array.T if layout == "transposed" else array


def _turn_back(array, layout):
  if layout == "conv":
    return array.transpose(_CONV_BACK)
  return array.T if layout == "transposed" else array


def _shape_back(shape, layout):
  if layout == "conv":
    return tuple(shape[axis] for axis in _CONV_BACK)
  return tuple(reversed(shape)) if layout == "transposed" else tuple(shape)
