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
  # Images only: one of the largest tilings and several small ones. A step of
  # 128 samples fills 32 rows, by `plan --fit_rows=stage1`.
  1: Size(
    tiles=40,
    blends=81 * 81,
    memory=19_456,
    queries=5504,
    decoder=6400,
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
# lists of `prepare`): what `plan --fit_rows` found for v6e:2x4 and the stage's
# published counts. A step of 128 samples fills 24 or 8 rows of short videos, as
# pixels or features, and 16 of long ones, so that no row of a micro-batch of 8
# is empty.
_SHORT = {
  # Three videos of 128 frames, or more but shorter ones; of videos that are
  # stored, five minutes.
  "pixels": Size(
    features=64 * 320,
    frames=400,
    tiles=42,
    blends=81 * 81,
    memory=40_960,
    queries=4608,
    decoder=6144,
  ),
  "features": Size(
    features=64 * 1190,
    tiles=42,
    blends=81 * 81,
    memory=98_944,
    queries=13_184,
    decoder=16_128,
  ),
}
# One hour of VideoMarathon and another video; they come as features.
_LONG = Size(
  features=64 * 3970,
  tiles=42,
  blends=81 * 81,
  memory=280_832,
  queries=21_120,
  decoder=21_504,
)

# (data, fsdp, seq, batch_rows, remat) by size and slice, the latter as Cloud
# TPU counts it (v5e-16 is v5litepod-16, v5p-8 has four chips), for stage 3 with
# videos=features: what `plan --search` found, see hourjax/planning/README.md.
SLICES = {
  "3b": {
    "v5e-16": (1, 8, 2, 8, "full"),
    "v5e-32": (1, 8, 4, 8, "full"),
    "v5e-64": (1, 8, 8, 8, "dots"),
    "v5p-8": (1, 4, 1, 4, "dots"),
    "v5p-16": (1, 8, 1, 8, "dots"),
    "v5p-32": (4, 1, 4, 8, "dots"),
    "v5p-64": (2, 4, 4, 8, "none"),
    "v6e-8": (1, 8, 1, 8, "full"),
    "v6e-16": (1, 8, 2, 8, "full"),
    "v6e-32": (1, 8, 4, 8, "dots"),
    "h100-8": (1, 4, 2, 4, "dots"),
  },
  "7b": {
    "v5e-64": (1, 16, 4, 16, "full"),
    "v5p-16": (1, 4, 2, 4, "dots"),
    "v6e-16": (1, 8, 2, 8, "full"),
  },
}


# The same for stage 2, where the tower learns and keeps what it computes;
# slices that are not here have the mesh above, and remat "full".
_STAGE_2 = {
  "3b": {"v5e-16": (1, 2, 8, 2, "full"), "v6e-8": (1, 4, 2, 4, "full")},
  "7b": {"v6e-16": (1, 4, 4, 4, "full")},
}


def get_config(arg: str | None = None) -> ConfigDict:
  """Returns the configuration of a model size and stage.

  Args:
    arg: "size=3b" or "7b"; "stage=1", "2" or "3"; "videos=pixels", or
      "features" where short videos are extracted too; "mesh=v6e-8" for the
      mesh, the rows of a micro-batch and the rematerialisation that suit this
      slice.
  """
  given = common.parse_arg(arg, size="3b", stage=3, videos="pixels", mesh="")
  if given.size not in ("3b", "7b") or given.stage not in _STAGES:
    raise ValueError(
      f"config argument size={given.size}, stage={given.stage}: size is 3b or"
      " 7b, stage is 1, 2 or 3"
    )
  if given.videos not in _SHORT:
    raise ValueError(
      f"config argument videos={given.videos}: short videos come as pixels or"
      " features"
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
      "short": dataclasses.asdict(_SHORT[given.videos]),
      "long": dataclasses.asdict(_LONG),
    }
  if given.mesh:
    _set_slice(config, given.size, given.stage, given.mesh)
  return config


def _set_slice(config: ConfigDict, size: str, stage: int, name: str) -> None:
  """Sets the mesh, the rows of a micro-batch and remat for a slice.

  Raises:
    ValueError: there is no mesh for this slice.
  """
  known = SLICES[size]
  if name not in known:
    raise ValueError(
      f"config argument mesh={name}: known for {size} are {', '.join(known)};"
      " `python -m hourjax.plan --search` finds one for any other slice"
    )
  data, fsdp, seq, rows, remat = known[name]
  if stage == 2:
    remat = "full"
    own = data, fsdp, seq, rows, remat
    data, fsdp, seq, rows, remat = _STAGE_2[size].get(name, own)
  config.batch_rows, config.model.remat = rows, remat
  config.mesh.update(data=data, fsdp=fsdp, seq=seq, tensor=1)
