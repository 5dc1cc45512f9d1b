r"""The demo: a small Hour-LLaVA from scratch on rendered videos, in two stages.

  python -m hourjax.train --config=configs/demo.py:stage=1 \
      --workdir=work/memaug/stage1
  python -m hourjax.train --config=configs/demo.py:stage=2 \
      --config.init=work/memaug/stage1 --workdir=work/memaug/stage2

Stage 1 asks one short question about each video: with these the model learns to
find things in its memory. Stage 2 goes on with whole conversations. The vision
encoder stays as it was drawn, since a random projection preserves colours and
places, and the demo is about the memory. With --config.model.memaug_layers=0
the same is trained without MemAug.

Before these the tower and the word embeddings can be brought together with
single frames (hourjax/alignment/README.md), which launch/local.sh leaves out:

  python -m hourjax.align --config=configs/demo.py:stage=0 \
      --captions=work/data/captions.json --workdir=work/stage0
"""

from ml_collections import ConfigDict

from configs import common
from hourjax.data.rows import Size
from hourjax.models.config import DecoderConfig, ModelConfig, VisionConfig

MODEL = ModelConfig(
  vision=VisionConfig(
    image_size=64, patch_size=16, width=64, layers=1, heads=4, mlp=128
  ),
  decoder=DecoderConfig(
    vocab=768, width=64, layers=2, heads=2, kv_heads=1, mlp=256, tied=True
  ),
  pool_side=2,
  memaug_layers=2,
  dtype="float32",
  remat="none",
)
# By stage: optimizer steps, and the peak learning rate of all that is trained.
_STEPS = {0: 700, 1: 840, 2: 240}
_RATES = {0: 2e-3, 1: 1.5e-3, 2: 1.5e-3}
_FRAMES = 240  # of the longest training video
_TOKENS = MODEL.pool_side**2  # of a frame
# Capacity of a row, in tokens. In stage 1 it holds one short question. In stage
# 2 conversations differ much in length; two of the usual length share a row.
_ROWS = {
  1: Size(
    features=_FRAMES * _TOKENS,
    memory=_FRAMES * (_TOKENS + 1),
    queries=176,
    decoder=192,
  ),
  2: Size(
    features=2 * _FRAMES * _TOKENS,
    memory=2 * _FRAMES * (_TOKENS + 1),
    queries=400,
    decoder=448,
  ),
}
_ROWS[0] = Size()  # single frames fill no rows
_BATCH_ROWS = {0: 128, 1: 16, 2: 8}  # in stage 0, frames


def get_config(arg: str | None = None) -> ConfigDict:
  """Returns the configuration of a stage.

  Args:
    arg: "stage=0", "1" or "2"; "data=FOLDER", the folder that launch/local.sh
      fills.
  """
  given = common.parse_arg(arg, data="work/data", stage=1)
  if given.stage not in _STEPS:
    raise ValueError(f"config argument stage={given.stage}: stage is 0, 1 or 2")
  config = common.experiment(
    MODEL,
    _ROWS[given.stage],
    steps=_STEPS[given.stage],
    batch_rows=_BATCH_ROWS[given.stage],
    log_every=10,
    checkpoint_every=100,
  )
  if given.stage:
    config.data.dataset = f"{given.data}/stage{given.stage}"
  config.data.media = f"{given.data}/videos"
  config.data.features = f"{given.data}/features"
  config.data.tokenizer = f"{given.data}/tokenizer"
  # Fewer frames than the published 512, so that the decoder never reads more
  # tokens of an hour-long video than of the training videos.
  config.forgetting.max_frames = 64
  config.optimizer.update(
    **dict.fromkeys(("projector", "memaug", "decoder"), _RATES[given.stage]),
    vision=0.0 if given.stage else _RATES[0],
    b2=0.95,
    warmup=0.05,
    clip=1.0,
  )
  return config
