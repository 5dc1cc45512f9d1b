"""The cost of a first and of a second question about an hour of video.

The video is a real file of an hour, made here. Each question is asked once
before the clock starts, so that nothing is compiled while it runs.
"""

import dataclasses
import pathlib
import time
from collections.abc import Callable
from typing import Any

import jax

from hourjax.benchmarks.figures import peak_mib
from hourjax.data.demo.drawing import write_video
from hourjax.data.demo.script import make_script
from hourjax.data.demo.tokenizer import MARKUP, write_tokenizer
from hourjax.data.tokenizer import Tokenizer
from hourjax.inference.memory import Memory
from hourjax.inference.model import Model
from hourjax.inference.prompts import Rules
from hourjax.models.config import HOUR_LLAVA_3B, TINY, ModelConfig
from hourjax.models.flops import Work, count_flops
from hourjax.models.params import init_params
from hourjax.parallel.mesh import MeshConfig, make_mesh

_FIRST = "What does the person in the kitchen pick up?"
_SECOND = "Which colour has the card that is shown once?"


TINY_ASKED = dataclasses.replace(
  TINY, decoder=dataclasses.replace(TINY.decoder, vocab=1024)
)
_SECONDS = 3600
_REPEATS = 2


def measure_ask(
  folder: pathlib.Path, seconds: int = _SECONDS
) -> dict[str, Any]:
  """Measures the seconds from a question to the first token of its answer.

  Args:
    folder: where the video is written.
    seconds: length of the video.

  Returns:
    `tiny`: for a tiny model the seconds `video` of a first question about a
    video file, which is read and encoded, `features` of a first question about
    the video's features, and `second` of another question about the same
    video; their ratios; and `peak_mib`. `3b`: what `operations` returns for
    the 3B model.
  """
  video = folder / "hour.mp4"
  write_video(video, make_script(0, "test", 1, (seconds,) * 2))
  model = random_model(folder, TINY_ASKED)
  features = model.read_video_features(video).features

  def from_file() -> None:
    _first_token(model.encode_memory(video), _FIRST)

  def from_features() -> None:
    _first_token(model.encode_memory(features), _FIRST)

  memory = model.encode_memory(features)
  _first_token(memory, _FIRST)
  second = _seconds(lambda: _first_token(memory, _SECOND), _REPEATS)
  first = _seconds(from_features, _REPEATS)
  found = {
    "frames": memory.num_frames,
    "video": _seconds(from_file, _REPEATS),
    "features": first,
    "second": second,
    "peak_mib": peak_mib(),
  }
  found["video_over_second"] = found["video"] / second
  found["features_over_second"] = first / second
  return {"tiny": found, "3b": operations(HOUR_LLAVA_3B, seconds)}


def operations(config: ModelConfig, frames: int) -> dict[str, float]:
  """Counts the TFLOP from a question to the first token of its answer.

  Args:
    config: the model.
    frames: frames of the video, at least 2048.

  Returns:
    TFLOP to encode the video, to project its memory and to answer a question,
    and by what factor a first question costs more than a second one: about a
    video file (`video_over_second`), and about features.
  """
  tokens = config.pool_side**2
  kept = 512 * (tokens // 4 + 1)
  text = 60
  length = kept + text

  def total(**changes: float) -> float:
    nothing = Work(*[0.0] * len(Work._fields))
    parts = count_flops(config, nothing._replace(**changes), frozenset())
    return sum(float(part.forward) for part in parts.values()) / 1e12

  memory = frames * (tokens + 1)
  encode = total(images=float(frames), encoded=float(frames * tokens))
  project = total(stored=float(frames * tokens), memory=float(memory))
  ask = total(
    queries=float(length),
    decoder=float(length),
    labels=1.0,
    self_pairs=float(length) ** 2,
    cross_pairs=float(length) * memory,
    causal_pairs=float(length) ** 2 / 2,
  )
  # The projector's share of the encoded tokens is counted in `project`.
  encode -= total(encoded=float(frames * tokens))
  return {
    "encode_tflop": encode,
    "project_tflop": project,
    "question_tflop": ask,
    "video_over_second": (encode + project + ask) / ask,
    "features_over_second": (project + ask) / ask,
  }


def random_model(
  folder: pathlib.Path, config: ModelConfig, rules: Rules | None = None
) -> Model:
  """Returns a model with random weights, and a tokenizer of few words.

  Args:
    folder: where the tokenizer is written.
    config: of the model, on the first device of this process.
    rules: of its answers; None for the usual ones.
  """
  write_tokenizer(folder / "tokenizer", [*MARKUP, _FIRST, _SECOND])
  tokenizer = Tokenizer.from_folder(folder / "tokenizer")
  mesh = make_mesh(MeshConfig(fsdp=1), jax.local_devices()[:1])
  return Model(
    init_params(config, 0),
    config,
    tokenizer,
    name="random",
    rules=rules,
    mesh=mesh,
  )


def _first_token(memory: Memory, question: str) -> None:
  memory.answer([question], max_tokens=1)


def _seconds(function: Callable[[], None], repeats: int) -> float:
  """Returns the least seconds of several calls after a first one."""
  function()
  seconds = []
  for _ in range(repeats):
    began = time.perf_counter()
    function()
    seconds.append(time.perf_counter() - began)
  return min(seconds)
