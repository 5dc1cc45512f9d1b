"""Sizes of the model, as frozen dataclasses."""

import dataclasses
from typing import Literal

Remat = Literal["none", "dots", "full"]
Offload = Literal["device", "host"]
Implementation = Literal["platform", "tpu", "cudnn", "triton", "reference"]


@dataclasses.dataclass(frozen=True)
class AttentionConfig:
  """Says which implementation computes attention, and in which tiles.

  Results differ between the choices by rounding only.

  Attributes:
    implementation: "platform" takes the kernels of the platform that is
      compiled for; the others are those of `kernels.attention.attention`.
    forward_tiles: tiles of the TPU's forward kernel as "rows,keys,chunk,unit",
      such as "1024,1024,512,512"; empty takes those of `parallel.chips`.
    backward_tiles: tiles of the backward kernel in the same form.
  """

  implementation: Implementation = "platform"
  forward_tiles: str = ""
  backward_tiles: str = ""


PLATFORM_ATTENTION = AttentionConfig()


@dataclasses.dataclass(frozen=True)
class VisionConfig:
  """Describes a SigLIP vision tower without its last layer.

  The defaults are those of so400m patch14-384.
  See hourjax/README.md, Vision encoder.

  Attributes:
    image_size: side of an image, in pixels.
    patch_size: side of a patch, in pixels.
    width: channels of a patch.
    layers: number of layers that run.
    heads: attention heads.
    mlp: hidden channels of the feed-forward network.
    norm_eps: epsilon of the layer norms.
  """

  image_size: int = 384
  patch_size: int = 14
  width: int = 1152
  layers: int = 26
  heads: int = 16
  mlp: int = 4304
  norm_eps: float = 1e-6

  @property
  def side(self) -> int:
    """Returns the number of patches along one side of an image."""
    return self.image_size // self.patch_size


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
  """Describes a language model of the Qwen family.

  The defaults of the last three fields are those of Qwen2 and Qwen2.5 (arXiv
  2407.10671). Qwen3 (arXiv 2505.09388) is `head_dim=128, qk_norm=True,
  attention_bias=False`.

  Attributes:
    vocab: number of tokens in the vocabulary.
    width: channels of a position.
    layers: number of layers.
    heads: query heads of an attention.
    kv_heads: key and value heads of an attention; they divide `heads`.
    mlp: hidden channels of the feed-forward network.
    tied: whether the output embeddings are the input embeddings.
    rope_base: base of the rotary embedding's frequencies.
    norm_eps: epsilon of the RMS norms.
    head_dim: channels of an attention head; 0 stands for width / heads.
    qk_norm: whether queries and keys pass an RMSNorm over the channels of
      each head before they are rotated.
    attention_bias: whether the products that make queries, keys and values
      add a bias. The output product of the attention never does.
    query_init: if above 0, the kernel that makes queries is not drawn but
      begins as that of the keys, times this, also in MemAug: a fresh model then
      attends to what resembles the token that asks. For training from scratch;
      weights that are loaded are not changed.
  """

  vocab: int
  width: int
  layers: int
  heads: int
  kv_heads: int
  mlp: int
  tied: bool
  rope_base: float = 1e6
  norm_eps: float = 1e-6
  head_dim: int = 0
  qk_norm: bool = False
  attention_bias: bool = True
  query_init: float = 0.0

  @property
  def head_size(self) -> int:
    """Returns the channels of an attention head, `head_dim` resolved."""
    return self.head_dim or self.width // self.heads

  @property
  def q_width(self) -> int:
    """Returns the channels of all query heads together."""
    return self.heads * self.head_size

  @property
  def kv_width(self) -> int:
    """Returns the channels of all key heads together."""
    return self.kv_heads * self.head_size


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """Describes Hour-LLaVA: vision tower, memory, MemAug and decoder.

  Attributes:
    vision: the vision tower.
    decoder: the language model. MemAug takes its width, heads, KV heads, head
      size and rotary base from it.
    pool_side: a video frame is pooled to pool_side x pool_side tokens.
    memaug_layers: number of MemAug blocks; 0 leaves MemAug out, and the
      decoder then sees the tokens that forgetting kept as they are.
    dtype: the dtype of the computation; parameters are float32.
    remat: what the backward pass computes again. "none" keeps everything,
      "dots" keeps the outputs of matrix products with parameters, "full"
      keeps only the input of each layer.
    attention: which implementation computes attention.
    gradient_dtype: the dtype in which gradients of weights travel between
      devices and are summed over them; each device computes and keeps its part
      in float32.
    memory_chunk: the memory is projected so many tokens at a time, in the
      backward pass again; 0 projects all at once. It saves ten times the bytes
      of the features, where a device holds whole memories (`mesh.seq=1`).
    offload: where what the backward pass needs of each layer waits for it:
      "device", or "host" to move it to the host's memory and back.
    memaug_init: what the kernels that end a fresh MemAug's sublayers are drawn
      with is multiplied by this. With 0 a fresh MemAug leaves the kept tokens
      as they are but for its norms, so that a decoder that can read them still
      can.
  """

  vision: VisionConfig
  decoder: DecoderConfig
  pool_side: int = 8
  memaug_layers: int = 4
  dtype: str = "bfloat16"
  remat: Remat = "full"
  attention: AttentionConfig = PLATFORM_ATTENTION
  gradient_dtype: Literal["float32", "bfloat16"] = "float32"
  memory_chunk: int = 0
  offload: Offload = "device"
  memaug_init: float = 1.0


QWEN2_5_3B = DecoderConfig(
  vocab=151_936,
  width=2048,
  layers=36,
  heads=16,
  kv_heads=2,
  mlp=11_008,
  tied=True,
)
QWEN2_7B = DecoderConfig(
  vocab=152_064,
  width=3584,
  layers=28,
  heads=28,
  kv_heads=4,
  mlp=18_944,
  tied=False,
)
HOUR_LLAVA_3B = ModelConfig(VisionConfig(), QWEN2_5_3B)
HOUR_LLAVA_7B = ModelConfig(VisionConfig(), QWEN2_7B)
TINY = ModelConfig(
  VisionConfig(
    image_size=54, patch_size=2, width=48, layers=2, heads=4, mlp=96
  ),
  DecoderConfig(
    vocab=512, width=64, layers=2, heads=4, kv_heads=2, mlp=128, tied=False
  ),
  memaug_layers=2,
  dtype="float32",
  remat="none",
)
SIZES = {"3b": HOUR_LLAVA_3B, "7b": HOUR_LLAVA_7B, "tiny": TINY}
