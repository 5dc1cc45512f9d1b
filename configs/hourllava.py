"""Hour-LLaVA 3B and 7B, stages 1 to 3 (SPEC section 3; paper, appendix A).

  python -m hourjax.train --config=configs/hourllava.py:size=3b,stage=3 \
      --config.data.dataset=videomarathon --config.data.features=features \
      --config.data.tokenizer=qwen2.5 \
      --config.init=stage2 --workdir=stage3

Stages share everything but what is stated by stage below. The paper gives the
global batch in samples: 128, and 256 for 7B in stage 3. A row holds several, so
`batch_rows` x `accumulate` is that number over the samples an average row
holds: about 2.8 conversations about VideoMarathon's videos in stage 3, some 4
images in stage 1, some 2.8 samples of stage 2.
"""

from configs import common
from hourjax.data.rows import Size
from hourjax.models.config import SIZES

_HOUR = 3623  # frames at 1 FPS; 65 memory tokens each make 235,495
_TILE = 729  # tokens of one image tile

# Peak learning rates; a component at 0 is frozen.
_STAGES = {
  1: {"vision": 0.0, "projector": 0.0, "memaug": 1e-4, "decoder": 0.0},
  2: {"vision": 5e-6, "projector": 1e-4, "memaug": 1e-4, "decoder": 2e-5},
  3: {"vision": 0.0, "projector": 1e-4, "memaug": 1e-4, "decoder": 2e-5},
}


def _shared(tokens: int) -> int:
  """The next capacity that up to 128 devices along `seq` can share."""
  return -(-tokens // 128) * 128


_ROWS = {
  # Images only: two of the largest tilings, or several small ones.
  1: Size(
    tiles=80,
    blends=2 * 81 * 81,
    memory=_shared(2 * (_TILE + 82 * 81)),
    queries=4096,
    decoder=6144,
  ),
  # Images, and videos through the encoder: two short ones, of 128 frames each,
  # or a longer one, of which the tower does not learn.
  2: Size(
    frames=256,
    tiles=40,
    blends=81 * 81,
    memory=_shared(2 * 65 * 128 + _TILE + 82 * 81),
    queries=4096,
    decoder=8192,
  ),
  # One hour of stored features, or several shorter videos and images.
  3: Size(
    features=64 * _HOUR,
    tiles=40,
    blends=81 * 81,
    memory=235_520,
    # Short videos keep a quarter of their frames, long ones 512 at most: an
    # hour of short ones has more queries than a single hour. With these,
    # both memory and decoder are filled to nine tenths (`bench data`).
    queries=15_872,
    decoder=16_640,
  ),
}


def get_config(arg: str | None = None):
  """Argument: "size=3b" or "7b", "stage=1", "2" or "3"."""
  arg = common.parse_arg(arg, size="3b", stage=3)
  if arg.size not in ("3b", "7b") or arg.stage not in _STAGES:
    raise ValueError(
      f"config argument size={arg.size}, stage={arg.stage}: size is 3b or 7b,"
      " stage is 1, 2 or 3"
    )
  config = common.experiment(SIZES[arg.size], _ROWS[arg.stage])
  config.optimizer.update(_STAGES[arg.stage])
  config.batch_rows = 16
  config.accumulate = {1: 2, 2: 3, 3: 3}[arg.stage]
  if arg.size == "7b":
    config.optimizer.decoder /= 2
    if arg.stage == 3:
      config.accumulate *= 2
  if arg.stage == 1:
    config.draw_missing = "memaug"
  return config
