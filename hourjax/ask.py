"""Asks a model about a video.

  python -m hourjax.ask --model=work/memaug --video=v.mp4 "question"

prints the answer while it is decoded, and MemAug's attention over the video.
Without a question it is a conversation, ended by Ctrl-D; a file or pipe as
input is read line by line. --features=x.npy takes features instead of a video,
--images=a.jpg --images=b.jpg, or --images=a.jpg,b.jpg, images.
Ends with 0; 2 on a mistake in options or questions, 130 on interrupt.
"""

import sys

from absl import flags

from hourjax import command, progress
from hourjax.inference.load import load
from hourjax.inference.memory import Memory
from hourjax.inference.sampling import Sampling
from hourjax.inference.terminal import (
  TerminalChat,
  check_options,
  clean_exit,
  image_paths,
  progress_bar,
)

_MODEL = flags.DEFINE_string(
  "model", None, "Workdir of a training run, published folder, or hf://..."
)
_TOKENIZER = flags.DEFINE_string("tokenizer", None, "If not the model's own.")
_ADAPTER = flags.DEFINE_string("adapter", None, "LoRA to merge into the model.")
_VIDEO = flags.DEFINE_string("video", None, "Video file to ask about.")
_FEATURES = flags.DEFINE_string(
  "features", None, "Features of a video (.npy) instead of the video."
)
_DURATION = flags.DEFINE_float(
  "duration", None, "Seconds of the video of --features, if no store knows."
)
_IMAGES = flags.DEFINE_multi_string(
  "images", [], "Images instead of a video; may be given several times."
)
_TOKENS = flags.DEFINE_integer("max_tokens", 256, "Longest answer.", 1)
_TEMPERATURE = flags.DEFINE_float(
  "temperature", 0.0, "0 takes the likeliest token; above 0 one is drawn."
)
_TOP_P = flags.DEFINE_float("top_p", 1.0, "Draws from this probability mass.")
_SEED = flags.DEFINE_integer("seed", 0, "Seed of draws.", 0, command.LAST_SEED)
_REREAD = flags.DEFINE_bool("reread", False, "MemAug reads at each turn.")
_PICTURE = flags.DEFINE_string("picture", "", "PNG file for the attention.")


def _encoded_memory() -> Memory:
  """Loads the model and encodes what the options name."""
  with progress.step("reading the model"):
    model = load(
      command.given(_MODEL), tokenizer=_TOKENIZER.value, adapter=_ADAPTER.value
    )
  if _IMAGES.value:
    return model.encode_images(image_paths(_IMAGES.value))
  source = _VIDEO.value or _FEATURES.value or ""  # one of them is given
  with (
    progress.step("encoding the video"),
    progress_bar("read", "frame") as bar,
  ):
    memory = model.encode_memory(source, duration=_DURATION.value, progress=bar)
  if memory.note:
    print(f"note: {memory.note}", file=sys.stderr)
  return memory


def main(argv: list[str]) -> None:
  """Runs the command."""
  with clean_exit():
    sampling = Sampling(_TEMPERATURE.value, _TOP_P.value, _SEED.value)
    check_options(
      argv[1:],
      video=_VIDEO.value,
      features=_FEATURES.value,
      images=image_paths(_IMAGES.value),
      duration=_DURATION.value,
      sampling=sampling,
      picture=_PICTURE.value,
    )
    chat = TerminalChat(
      _encoded_memory().chat(reread_memory=_REREAD.value),
      max_tokens=_TOKENS.value,
      sampling=sampling,
      picture=_PICTURE.value,
      video=_VIDEO.value or "",
    )
    if len(argv) == 2:
      chat.ask(argv[1])
    elif chat.ask_lines(sys.stdin):
      sys.exit(2)


if __name__ == "__main__":
  command.run(main, required=["model"], positional=True)
