r"""Hour-LLaVA 3B and 7B, stages 1 to 3, as published (paper, appendix A).

  python -m hourjax.train --config=configs/hourllava.py:size=3b,stage=3 \
      --config.data.dataset=videomarathon --config.data.features=features \
      --config.data.tokenizer=qwen2.5 \
      --config.init=stage2 --workdir=stage3

The stages are described in hourjax/README.md, Training; they differ only in
what stands below by stage. A step is the paper's global batch: 128 samples of
one stream, and 256 for 7B in stage 3. They take as many rows as they need, in
micro-batches of `batch_rows` rows. What is left over of a stream at the end of
the epoch is left out, as in the official run. With --config.batch_samples=0
--config.drop_last=False --config.accumulate=3 a step is 3 micro-batches, with
as many samples as these hold: fewer steps an epoch, and fewer empty rows.
"""

import dataclasses

from ml_collections import ConfigDict

from configs import common
from hourjax.data.rows import Size
from hourjax.models.config import SIZES

_HOUR = 3623  # frames at 1 FPS; 65 memory tokens each make 235,495
_TILE = 729  # tokens of one image tile

# Peak learning rates by stage; a component whose rate is 0 is frozen.
_STAGES = {
  1: {"vision": 0.0, "projector": 0.0, "memaug": 1e-4, "decoder": 0.0},
  2: {"vision": 5e-6, "projector": 1e-4, "memaug": 1e-4, "decoder": 2e-5},
  3: {"vision": 0.0, "projector": 1e-4, "memaug": 1e-4, "decoder": 2e-5},
}


def _shared(tokens: int) -> int:
  """Returns the next capacity that up to 128 devices along `seq` can share."""
  return -(-tokens // 128) * 128


# Capacity of a row by stage, in tokens, tiles or frames.
_ROWS = {
  # Images only: two of the largest tilings, or several small ones.
  1: Size(
    tiles=80,
    blends=2 * 81 * 81,
    memory=_shared(2 * (_TILE + 82 * 81)),
    queries=4096,
    decoder=6144,
  ),
  # Images, and videos as pixels: two short ones of 128 frames each, or a longer
  # one of up to 3 minutes, from which the vision encoder does not learn. With
  # 320 frames an epoch takes the same time by `plan`'s formulas.
  2: Size(
    frames=256,
    tiles=40,
    blends=81 * 81,
    memory=_shared(2 * 65 * 128 + _TILE + 82 * 81),
    queries=4096,
    decoder=8192,
  ),
  # Of data in none of the streams below: one hour of stored features, or more
  # but shorter videos and images; beside them five short videos of 128 frames
  # as pixels.
  3: Size(
    features=64 * _HOUR,
    frames=640,
    tiles=40,
    blends=81 * 81,
    memory=235_520,
    # Short videos keep a quarter of their frames, long ones at most 512, so
    # short videos of an hour together have more queries than one of an hour.
    # With these capacities memory and decoder are both nine tenths full
    # (measured by `hourjax.bench data`).
    queries=15_872,
    decoder=16_640,
  ),
}


# Stage 3, by the streams of the data (`stream: short` and `stream: long` in the
# lists of `prepare`). The decoder's linear layers compute whole rows, so its
# capacity is the one to fill: 92 to 96 % are. By the formulas of `planning` for
# v6e:2x4 an epoch costs 7 % less than with one capacity for both.
_STREAMS = {
  # Many short videos, four of 128 frames as pixels. Where they are extracted,
  # frames=0 saves the tower.
  "short": dataclasses.replace(
    _ROWS[3],
    features=64 * 1890,
    frames=512,
    memory=122_880,
    queries=6912,
    decoder=8192,
  ),
  # One hour of VideoMarathon; its videos come as features.
  "long": dataclasses.replace(
    _ROWS[3], frames=0, queries=11_264, decoder=12_288
  ),
}


def get_config(arg: str | None = None) -> ConfigDict:
  """Returns the configuration of a model size and stage.

  Args:
    arg: "size=3b" or "7b", "stage=1", "2" or "3".
  """
  given = common.parse_arg(arg, size="3b", stage=3)
  if given.size not in ("3b", "7b") or given.stage not in _STAGES:
    raise ValueError(
      f"config argument size={given.size}, stage={given.stage}: size is 3b or"
      " 7b, stage is 1, 2 or 3"
    )
  config = common.experiment(SIZES[given.size], _ROWS[given.stage])
  config.optimizer.update(_STAGES[given.stage])
  config.batch_rows = 16
  config.batch_samples = 256 if (given.size, given.stage) == ("7b", 3) else 128
  config.drop_last = True
  if given.size == "7b" and given.stage == 2:
    config.optimizer.decoder = 1e-5
  # Of the held-out data, if `prepare --holdout` set some aside. A row costs no
  # more than one that is trained on (about a quarter, where the device and not
  # the disk is waited for), and a step has 13 rows or more: at most
  # 128 / (500 x 13) = 2 % of the time.
  config.eval_every, config.eval_rows = 500, 128
  if given.stage == 1:
    config.draw_missing = "memaug"
  if given.stage == 3:
    config.stream_rows = {
      name: dataclasses.asdict(size) for name, size in _STREAMS.items()
    }
  return config
