"""hourjax: hour-long video-language training for TPU pods.

The data path, one noun for each module:

  data/prepare            downloaded files become one dataset
  data/records            a question set about a video, images or nothing
  data/conversations      turns become token ids and labels
  data/repository         where each memory token comes from
  data/forgetting         which memory tokens the decoder gets to see
  data/layout             where every MemAug query and decoder position lies
  data/rows               samples packed into rows of fixed capacity
  data/packing/row_plan           which samples share a row
  batch                   rows stacked: what the model reads
  models/siglip           pixels become features
  models/memory           features become memory tokens
  models/memaug           queries read the memory
  models/decoder          the language model
  training/train_step     loss, gradient and update

A trained model answers:

  model = hourjax.load("work/memaug")
  memory = model.encode_memory("video.mp4")
  print(memory.ask("What happens at the end?").text)
"""

from typing import Any

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
  """Imports `load` when it is first used.

  The data pipeline needs numpy alone, and jax is slow to import.
  """
  if name == "load":
    from hourjax import jax_environment

    jax_environment.prepare()
    from hourjax.inference.load import load

    return load
  raise AttributeError(f"module 'hourjax' has no attribute {name!r}")
