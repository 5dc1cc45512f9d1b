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
  3  with MemAug, drawn fresh: again eight questions, half of which only the
     memory of all frames can answer

Look-ups come first because mixed with everything else they are not found in
the same time; see hourjax/evaluation/README.md.
With --config.model.memaug_layers=0 stage 3 trains the same without MemAug.

objective=dpo or grpo goes on from such a stage with pairs or rewards, on
records of one question each; see hourjax/objectives/README.md.
"""

import dataclasses

from ml_collections import ConfigDict

from configs import common
from hourjax.data.rows import Size
from hourjax.models.config import DecoderConfig, ModelConfig, VisionConfig

MODEL = ModelConfig(
  vision=VisionConfig(
    image_size=64, patch_size=16, width=64, layers=1, heads=4, mlp=128
  ),
  decoder=DecoderConfig(
    vocab=672,
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
  memaug_init=0.1,
  dtype="float32",
  remat="none",
)
# The same world for a GPU or a TPU chip: finer features, a larger model, more
# steps. `SIZE=full bash launch/local.sh` gives it more videos as well.
FULL = ModelConfig(
  vision=VisionConfig(
    image_size=96, patch_size=12, width=192, layers=4, heads=4, mlp=768
  ),
  decoder=dataclasses.replace(
    MODEL.decoder, width=256, layers=6, heads=4, kv_heads=4, mlp=1024
  ),
  pool_side=4,
  memaug_layers=4,
  memaug_init=0.1,
)
_MODELS = {"small": MODEL, "full": FULL}
# By stage: optimizer steps, and the peak learning rate of what is trained. In
# stage 3 that is MemAug's, which is fresh; the decoder has less.
_STEPS = {0: 900, 1: 1300, 2: 1300, 3: 1200}
_RATES = {0: 2e-3, 1: 4e-3, 2: 4e-3, 3: 2.5e-3}
# The larger model takes so many times the steps at this part of the rates, and
# so many times the rows.
_FULL_STEPS, _FULL_RATE, _FULL_ROWS = 4, 0.25, 4
# Of the longest training video, 170, and such that meshes divide the rows.
_FRAMES = 176
_KEPT = 16  # frames, of any video
# Capacity of a row, which holds one conversation, for the words of its
# questions and of all of it, by stage.
_WORDS = {1: (96, 164), 2: (184, 296), 3: (176, 280)}
_BATCH_ROWS = {0: 128, 1: 24, 2: 24, 3: 8}  # in stage 0, frames
_SLOW = 0.35  # part of the rate that the decoder has in stage 3
# By objective: optimizer steps, the peak learning rate, questions in a step,
# and how many answers of a question lie in a row. A row has room for a question
# of so many words with its answer.
_OBJECTIVES = {"dpo": (100, 1e-4, 8, 2), "grpo": (200, 1e-4, 8, 8)}
_ASKED = 124


def get_config(arg: str | None = None) -> ConfigDict:
  """Returns the configuration of a stage.

  Args:
    arg: "stage=0" to "3"; "size=small" or "full"; "data=FOLDER", the folder
      that launch/local.sh fills; "objective=sft", "dpo" or "grpo".
  """
  given = common.parse_arg(
    arg, data="work/data", size="small", stage=3, objective="sft"
  )
  stage, full = given.stage, given.size == "full"
  if stage not in _STEPS:
    raise ValueError(f"config argument stage={stage}: stage is 0, 1, 2 or 3")
  if given.size not in _MODELS:
    raise ValueError(
      f"config argument size={given.size}: size is small or full"
    )
  model, rate = _MODELS[given.size], _RATES[stage] * (_FULL_RATE if full else 1)
  config = common.experiment(
    model,
    _rows(model, stage),
    steps=_STEPS[stage] * (_FULL_STEPS if full else 1),
    batch_rows=_BATCH_ROWS[stage] * (_FULL_ROWS if full else 1),
    log_every=10,
    checkpoint_every=100,
  )
  if stage:
    config.data.dataset = f"{given.data}/stage{stage}"
  config.data.media = f"{given.data}/videos"
  config.data.features = f"{given.data}/features"
  config.data.tokenizer = f"{given.data}/tokenizer"
  # Fewer frames than the published 512, so that the decoder never reads more
  # tokens of an hour-long video than of the training videos.
  config.forgetting.max_frames = _KEPT
  if stage < 3:
    config.model.memaug_layers = 0
  if stage == 3:
    config.draw_missing = "memaug"
  config.optimizer.update(
    projector=rate if stage < 3 else 0.0,
    memaug=rate,
    decoder=rate if stage < 3 else _SLOW * rate,
    name="muon",
    vision=0.0 if stage else rate,
    b2=0.95,
    warmup=0.05,
    clip=1.0,
  )
  if given.objective != "sft":
    _set_objective(config, given.objective, stage)
  return config


def _set_objective(config: ConfigDict, name: str, stage: int) -> None:
  """Makes a stage one that goes on from it with pairs or rewards."""
  if name not in _OBJECTIVES or not stage:
    raise ValueError(
      f"config argument objective={name}, stage={stage}: objective is sft, dpo"
      " or grpo, the last two with a stage from 1 on"
    )
  steps, rate, questions, answers = _OBJECTIVES[name]
  config.update(
    steps=steps, batch_rows=questions, checkpoint_every=steps, draw_missing=""
  )
  words = config.rows.queries - _WORDS[stage][0] + _ASKED
  config.rows.update(queries=words, decoder=answers * words)
  config.objective.update(name=name, group=answers, max_tokens=8)
  config.optimizer.update(
    name="adamw", projector=0.0, memaug=rate, decoder=rate
  )


def _rows(model: ModelConfig, stage: int) -> Size:
  """Returns the capacity of a row, in tokens."""
  if stage == 0:
    return Size()  # single frames fill no rows
  tokens = model.pool_side**2
  kept = _KEPT * (tokens // 4 + 1)  # one token in four, and a newline
  words, positions = _WORDS[stage]
  return Size(
    features=_FRAMES * tokens,
    memory=_FRAMES * (tokens + 1),
    queries=kept + words,
    decoder=kept + positions,
  )
