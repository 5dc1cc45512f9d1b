r"""The demo: a small Hour-LLaVA from scratch on rendered videos, in stages.

  python -m hourjax.align --config=configs/demo.py:stage=0 \
      --captions=work/data/captions.json --workdir=work/stage0
  python -m hourjax.train --config=configs/demo.py:stage=1 \
      --config.init=work/stage0 --workdir=work/memaug/stage1
  python -m hourjax.train --config=configs/demo.py:stage=2 \
      --config.init=work/memaug/stage1 --workdir=work/memaug/stage2

Stage 0 teaches the tower, the projector and the word embeddings what single
frames show; its tower extracts the features. Stage 1 trains the rest on short
answers, stage 2 on whole conversations with multiple choice. With
--config.model.memaug_layers=0 the same is trained without MemAug.
"""

from ml_collections import ConfigDict

from configs import common
from hourjax.data.rows import Size
from hourjax.models.config import DecoderConfig, ModelConfig, VisionConfig

MODEL = ModelConfig(
  vision=VisionConfig(
    image_size=64, patch_size=16, width=64, layers=2, heads=4, mlp=128
  ),
  decoder=DecoderConfig(
    vocab=1024, width=64, layers=3, heads=2, kv_heads=2, mlp=192, tied=True
  ),
  pool_side=2,
  memaug_layers=1,
  dtype="float32",
  remat="none",
)
# By stage: optimizer steps, rows or frames in a batch, and the peak learning
# rate of all that is trained.
_STEPS = {0: 700, 1: 700, 2: 300}
_BATCH_ROWS = {0: 128, 1: 16, 2: 16}
_RATES = {0: 2e-3, 1: 2e-3, 2: 1.5e-3}
_FRAMES = 128  # of the longest training video
_TOKENS = MODEL.pool_side**2  # of a frame
# Capacity of a row, in tokens.
_ROWS = Size(
  features=_FRAMES * _TOKENS,
  memory=_FRAMES * (_TOKENS + 1),
  queries=176,
  decoder=288,
)


def get_config(arg: str | None = None) -> ConfigDict:
  """Returns the configuration of a stage.

  Args:
    arg: "stage=0", "1" or "2"; "data=FOLDER", the folder that launch/local.sh
      fills.
  """
  given = common.parse_arg(arg, data="work/data", stage=1)
  stage = given.stage
  if stage not in _STEPS:
    raise ValueError(f"config argument stage={stage}: stage is 0, 1 or 2")
  config = common.experiment(
    MODEL,
    _ROWS,
    steps=_STEPS[stage],
    batch_rows=_BATCH_ROWS[stage],
    log_every=10,
    checkpoint_every=100,
  )
  config.data.dataset = f"{given.data}/stage{stage}" if stage else ""
  config.data.media = f"{given.data}/videos"
  config.data.features = f"{given.data}/features"
  config.data.tokenizer = f"{given.data}/tokenizer"
  # Fewer frames than the published 512, so that the decoder never reads more
  # tokens of an hour-long video than of the training videos.
  config.forgetting.max_frames = 32
  config.optimizer.update(
    **dict.fromkeys(("projector", "memaug", "decoder"), _RATES[stage]),
    vision=0.0 if stage else _RATES[0],
    b2=0.95,
    warmup=0.05,
    clip=1.0,
  )
  return config
