"""Asks a model about a video.

  python -m hourjax.ask --model=work/memaug/stage2 --video=film.mp4 "question"

prints the answer as it is written, and where in the video the model looked.
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
  image_paths,
  leaving,
  shown,
)

_MODEL = flags.DEFINE_string(
  "model", None, "Workdir of a training run, or a folder with official names."
)
_TOKENIZER = flags.DEFINE_string("tokenizer", None, "If not the model's own.")
_VIDEO = flags.DEFINE_string("video", None, "Video file to ask about.")
_FEATURES = flags.DEFINE_string(
  "features", None, "Features of a video (.npy) instead of the video."
)
_DURATION = flags.DEFINE_float(
  "duration", None, "Of --features in seconds, where no feature store knows."
)
_IMAGES = flags.DEFINE_multi_string(
  "images", [], "Images instead of a video; may be given several times."
)
_TOKENS = flags.DEFINE_integer(
  "max_tokens", 256, "Longest answer.", lower_bound=1
)
_TEMPERATURE = flags.DEFINE_float(
  "temperature", 0.0, "0 takes the likeliest word, above draws."
)
_TOP_P = flags.DEFINE_float("top_p", 1.0, "Draw from this probability mass.")
_SEED = flags.DEFINE_integer("seed", 0, "Of the draws.", 0, command.LAST_SEED)
_REREAD = flags.DEFINE_bool(
  "reread", False, "Read the memory again for each turn of a conversation."
)
_PICTURE = flags.DEFINE_string(
  "picture", "", "PNG file: where the model looked."
)


def encode_memory() -> Memory:
  """What is asked about."""
  with progress.step("reading the model"):
    model = load(_MODEL.value, tokenizer=_TOKENIZER.value)
  if _IMAGES.value:
    return model.see(image_paths(_IMAGES.value))
  source = _VIDEO.value or _FEATURES.value
  with progress.step("encoding the video"), shown("read", "frame") as show:
    options = {"duration": _DURATION.value, "progress": show}
    memory = model.encode_memory(source, **options)
  if memory.note:
    print(f"note: {memory.note}", file=sys.stderr)
  return memory


def main(argv: list[str]) -> None:
  with leaving():
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
    talk = TerminalChat(
      encode_memory().chat(reread=_REREAD.value),
      max_tokens=_TOKENS.value,
      sampling=sampling,
      picture=_PICTURE.value,
      film=_VIDEO.value or "",
    )
    if len(argv) == 2:
      talk.ask(argv[1])
    elif talk.listen(sys.stdin):
      sys.exit(2)


if __name__ == "__main__":
  command.run(main, required=["model"], positional=True)
