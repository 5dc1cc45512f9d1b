"""The demo: a small Hour-LLaVA from scratch on rendered videos.

  python -m hourjax.train --config=configs/demo.py --workdir=work/memaug
  python -m hourjax.train --config=configs/demo.py \
      --config.model.memaug_layers=0 --workdir=work/no_memaug
"""

from configs import common
from hourjax.data.rows import Size
from hourjax.models.config import DecoderConfig, ModelConfig, VisionConfig

MODEL = ModelConfig(
  vision=VisionConfig(
    image_size=64, patch_size=8, width=64, layers=1, heads=4, mlp=128
  ),
  decoder=DecoderConfig(
    vocab=768, width=64, layers=2, heads=2, kv_heads=1, mlp=256, tied=True
  ),
  pool_side=2,
  memaug_layers=2,
  dtype="float32",
  remat="none",
)


def get_config(arg: str | None = None):
  """`data` is the folder that `python -m hourjax.demo` filled."""
  arg = common.parse_arg(arg, data="work/data")
  config = common.experiment(
    MODEL,
    Size(features=4 * 240, memory=5 * 240, queries=352, decoder=432),
    steps=1500,
    batch_rows=8,
    log_every=20,
    checkpoint_every=250,
  )
  config.data.records = f"{arg.data}/train.json"
  config.data.media = f"{arg.data}/videos"
  config.data.features = f"{arg.data}/features"
  config.data.tokenizer = f"{arg.data}/tokenizer"
  config.forgetting.max_frames = 64
  config.optimizer.update(
    vision=0.0,
    projector=3e-3,
    memaug=3e-3,
    decoder=3e-3,
    b2=0.95,
    warmup=0.05,
    clip=1.0,
  )
  return config
