"""Sizes of the model, as frozen dataclasses."""

import dataclasses
from typing import Literal

Remat = Literal["none", "dots", "full"]
Implementation = Literal["platform", "tpu", "triton", "reference"]


@dataclasses.dataclass(frozen=True)
class AttentionConfig:
  """Describes who computes attention, and in which tiles.

  Neither changes what is computed, rounding aside.

  Attributes:
    implementation: "platform" takes the kernels of the platform that is
      compiled for; the others are those of `kernels.attention.attention`.
    forward_tiles: tiles of the TPU's forward kernel as "rows,keys,chunk,unit",
      such as "1024,1024,512,512"; empty takes those of `parallel.chips`.
    backward_tiles: tiles of the backward kernel, likewise.
  """

  implementation: Implementation = "platform"
  forward_tiles: str = ""
  backward_tiles: str = ""


PLATFORM_ATTENTION = AttentionConfig()


@dataclasses.dataclass(frozen=True)
class VisionConfig:
  """SigLIP so400m patch14-384, without its last layer (SPEC section 1)."""

  image_size: int = 384
  patch_size: int = 14
  width: int = 1152
  layers: int = 26
  heads: int = 16
  mlp: int = 4304
  norm_eps: float = 1e-6

  @property
  def side(self) -> int:
    """Patches along one side of an image."""
    return self.image_size // self.patch_size


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
  """A Qwen2 language model."""

  vocab: int
  width: int
  layers: int
  heads: int
  kv_heads: int
  mlp: int
  tied: bool
  rope_base: float = 1e6
  norm_eps: float = 1e-6

  @property
  def head_dim(self) -> int:
    return self.width // self.heads


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """Hour-LLaVA: the tower, the memory and the decoder that reads it.

  Attributes:
    pool_side: a video frame is pooled to pool_side x pool_side tokens.
    memaug_layers: blocks of MemAug; 0 leaves it out, and the decoder sees
      the tokens that forgetting kept as they are.
    dtype: of the computation; parameters are float32.
    remat: what the backward pass computes again. "none" keeps everything,
      "dots" keeps the outputs of matrix products with parameters, "full"
      keeps the input of each layer.
    attention: who computes attention.
  """

  vision: VisionConfig
  decoder: DecoderConfig
  pool_side: int = 8
  memaug_layers: int = 4
  dtype: str = "bfloat16"
  remat: Remat = "full"
  attention: AttentionConfig = PLATFORM_ATTENTION


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
