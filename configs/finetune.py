r"""Hour-LLaVA on data of yours: adapters on one chip, or on those of one host.

  python -m hourjax.train --config=configs/finetune.py:size=3b,chip=auto \
      --config.init=hf://ORGANISATION/NAME --config.data.dataset=mine/data \
      --config.data.features=mine/features --config.data.tokenizer=qwen2.5-3b \
      --workdir=mine/model

The chip is found, or named as `chip=v5e-1`, `v6e-8`, `h100`; rows hold
`hours=1` of video on each device. The base's number format, what waits on the
host, rows and mesh are chosen so that it fits, and said (see
`hourjax.planning.one_host`). `rank=0` trains all but the tower. Videos come as
stored features.
"""

import dataclasses
import sys

from ml_collections import ConfigDict

from configs import common
from hourjax.data.rows import Size
from hourjax.models.config import SIZES
from hourjax.models.lora import LoraConfig
from hourjax.parallel.gpus import named_devices
from hourjax.planning.one_host import fit_one_host

# Peak rates: of adapters those of LoRA in PEFT's and LLaVA's recipes, of all
# parameters those of stage 3.
_ADAPTERS = {"projector": 1e-4, "memaug": 1e-4, "decoder": 1e-4}
_ALL = {"projector": 1e-4, "memaug": 1e-4, "decoder": 2e-5}
_STEP_ROWS = 8  # at least; a row holds an hour of video


def get_config(arg: str | None = None) -> ConfigDict:
  """Returns the configuration for a model size and a chip.

  Args:
    arg: "size=3b" or "7b"; "chip=auto", or a chip and how many of it, such as
      "v5e-8"; "hours=1", of video in a row; "rank=16" of adapters, 0 for none.

  Raises:
    UserError: the model does not fit the chip, or there is none.
  """
  given = common.parse_arg(arg, size="3b", chip="auto", hours=1.0, rank=16)
  if given.size not in ("3b", "7b"):
    raise ValueError(f"config argument size={given.size}: size is 3b or 7b")
  chip, devices = named_devices(given.chip)
  options = LoraConfig(rank=given.rank, alpha=float(2 * max(1, given.rank)))
  fit = fit_one_host(
    SIZES[given.size], chip, devices, hours=given.hours, options=options
  )
  config = common.experiment(
    SIZES[given.size],
    Size(),  # what fits is set below
    lora=ConfigDict(dataclasses.asdict(options)),
  )
  config.update_from_flattened_dict(fit.settings)
  config.optimizer.update(_ADAPTERS if given.rank else _ALL)
  config.accumulate = max(1, _STEP_ROWS // devices)
  config.epochs = 3.0
  config.eval_every, config.eval_rows = 50, 32
  config.checkpoint_every = 100
  print("\n".join(f"note: {text}" for text in fit.notes), file=sys.stderr)
  return config
