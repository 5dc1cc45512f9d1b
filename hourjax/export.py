"""Writes a trained model as a folder that other programs load.

  python -m hourjax.export --model=work/stage3 --out=hour-llava-3b

--model is the workdir of a training run, of which the best checkpoint (of a run
with config.patience), the newest or that of --step is taken, a published
folder, or hf://ORGANISATION/NAME. The
folder has the layout of the official Hour-LLaVA checkpoints: safetensors in
shards, config.json with every key that the official code reads, tokenizer, and
a model card that says what the weights were trained on.

Of a run of adapters (config.lora) the weights are merged, and so are those of
--adapter; --part=adapter writes the adapters alone, as PEFT reads them.

--part=decoder and --part=tower write these alone, as transformers' own
Qwen2ForCausalLM or Qwen3ForCausalLM, and SiglipVisionModel.

A folder appears under its name when it is complete.
"""

import sys

from absl import flags

from hourjax import command, progress
from hourjax.errors import UserError
from hourjax.inference.export import DTYPES, PARTS, export
from hourjax.weights.shards import SHARD_BYTES

_MODEL = flags.DEFINE_string(
  "model", None, "Workdir of a training run, a published folder, or hf://..."
)
_OUT = flags.DEFINE_string("out", None, "Folder to write, not there yet.")
_PART = flags.DEFINE_enum("part", "all", PARTS, "What is written.")
_STEP = flags.DEFINE_integer(
  "step", None, "Of the checkpoint, if not the best or newest.", lower_bound=0
)
_DTYPE = flags.DEFINE_enum(
  "dtype", "bfloat16", list(DTYPES), "Of the tensors; float32 keeps all bits."
)
_TOKENIZER = flags.DEFINE_string("tokenizer", None, "If not the model's own.")
_ADAPTER = flags.DEFINE_string(
  "adapter", None, "Adapters to merge: workdir of a run, or PEFT's folder."
)
_SHARD = flags.DEFINE_float(
  "shard_gb", SHARD_BYTES / 1e9, "Largest file, in 10^9 bytes.", 1e-6, 1e6
)


def main(_: list[str]) -> None:
  """Runs the command."""
  out = command.given(_OUT)
  if "://" in out:
    raise UserError(
      f"--out={out} is a URL; give a folder, and upload it afterwards (to the"
      " Hugging Face Hub: hf upload ORGANISATION/NAME FOLDER)"
    )
  with progress.step("exporting"):
    problems = export(
      command.given(_MODEL),
      out,
      part=_PART.value,
      step=_STEP.value,
      dtype=_DTYPE.value,
      tokenizer=_TOKENIZER.value,
      shard_bytes=int(_SHARD.value * 10**9),
      adapter=_ADAPTER.value,
    )
  if problems:
    print(
      f"note: the official code cannot run this model: {'; '.join(problems)}",
      file=sys.stderr,
    )
  print(f"wrote {out}")


if __name__ == "__main__":
  command.run(
    main,
    required=["model", "out"],
    resume="nothing was left in --out, make room and start again",
    writes="out",
  )
