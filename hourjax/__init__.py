"""hourjax: hour-long video-language training for TPU pods.

The data path, one noun per file:

  data/prepare        downloaded files to one dataset
  data/records        a question set about a video, images or nothing
  data/conversations  turns to token ids and labels
  data/repository     where each memory token comes from
  data/forgetting     which of them the decoder gets to see
  data/layout         every MemAug query and decoder position
  data/rows           samples packed into rows of fixed capacity
  data/plan           which samples share a row
  batch               rows stacked: what the model reads
  models/siglip       pixels to features
  models/memory       features to memory
  models/memaug       queries read the memory
  models/qwen2        the decoder
  training/loss, training/step

A trained model answers:

  model = hourjax.load("work/memaug/stage2")
  memory = model.encode_memory("film.mp4")
  print(memory.ask("What happens at the end?").text)
"""

__version__ = "0.1.0"


def __getattr__(name: str):
  # Only when asked for: numpy is enough for the data, and jax is slow to load.
  if name == "load":
    from hourjax import jax_environment

    jax_environment.prepare()
    from hourjax.inference.load import load

    return load
  raise AttributeError(f"module 'hourjax' has no attribute {name!r}")
