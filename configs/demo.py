r"""The demo: a small Hour-LLaVA from scratch on rendered videos, in 4 stages.

  python -m hourjax.align --config=configs/demo.py:stage=0 \
      --captions=work/data/captions.json --workdir=work/stage0
  python -m hourjax.train --config=configs/demo.py:stage=1 \
      --config.init=work/stage0 --workdir=work/stage1
  python -m hourjax.train --config=configs/demo.py:stage=2 \
      --config.init=work/stage1 --workdir=work/stage2
  python -m hourjax.train --config=configs/demo.py:stage=3 \
      --config.init=work/stage2 --workdir=work/stage3

Like the paper's, the stages go from single frames to whole memories:

  0  tower, projector and word embeddings: single frames and their captions
  1  decoder: one-word look-ups, six in a conversation, in the kept frames
  2  decoder: all tasks, eight questions in a conversation, in the kept frames
  3  with MemAug, drawn fresh: single questions, many of which only the memory
     of all frames can answer

Look-ups come first because mixed with everything else they are not found in
the same time; see launch/README.md. With --config.model.memaug_layers=0
stage 3 trains the same without MemAug.
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
    vocab=640,
    width=64,
    layers=3,
    heads=2,
    kv_heads=2,
    head_dim=64,
    mlp=256,
    tied=True,
    query_init=0.3,
  ),
  pool_side=2,
  memaug_layers=2,
  dtype="float32",
  remat="none",
)
# By stage: optimizer steps, and the peak learning rate of what is trained; in
# stage 3 MemAug, which is fresh, has twice that of the rest.
_STEPS = {0: 900, 1: 900, 2: 1400, 3: 500}
_RATES = {0: 2e-3, 1: 4e-3, 2: 4e-3, 3: 2e-3}
_FRAMES = 240  # of the longest training video
_TOKENS = MODEL.pool_side**2  # of a frame
# Capacity of a row, in tokens: one video, and the conversations about it.
_ROWS = {
  stage: Size(
    features=_FRAMES * _TOKENS,
    memory=_FRAMES * (_TOKENS + 1),
    queries=queries,
    decoder=decoder,
  )
  for stage, queries, decoder in ((1, 128, 196), (2, 216, 316), (3, 400, 448))
}
_ROWS[0] = Size()  # single frames fill no rows
_BATCH_ROWS = {0: 128, 1: 24, 2: 24, 3: 8}  # in stage 0, frames
_SHARE_MEMORY = 4  # single questions about a video in a row of stage 3


def get_config(arg: str | None = None) -> ConfigDict:
  """Returns the configuration of a stage.

  Args:
    arg: "stage=0" to "3"; "data=FOLDER", the folder that launch/local.sh fills.
  """
  given = common.parse_arg(arg, data="work/data", stage=3)
  if given.stage not in _STEPS:
    raise ValueError(
      f"config argument stage={given.stage}: stage is 0, 1, 2 or 3"
    )
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
  config.forgetting.max_frames = 16
  if given.stage < 3:
    config.model.memaug_layers = 0
  if given.stage == 3:
    config.draw_missing = "memaug"
    config.data.share_memory = _SHARE_MEMORY
  config.optimizer.update(
    **dict.fromkeys(("projector", "decoder"), _RATES[given.stage]),
    memaug=2 * _RATES[given.stage],
    name="muon",
    vision=0.0 if given.stage else _RATES[0],
    b2=0.95,
    warmup=0.05,
    clip=1.0,
  )
  return config
