"""A model with its tokenizer, which encodes the memories of videos.

model = hourjax.load("work/memaug")
memory = model.encode_memory("video.mp4")
print(memory.ask("What happens at the end?").text)
"""

import functools
import os
import pathlib
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jax.sharding import Mesh

from hourjax.data.forgetting import EMBEDDER_PARAMS, Embedder, KeptTokens
from hourjax.data.media.frame_rules import (
  is_sparse,
  sparse_note,
  stored_feature_frames,
)
from hourjax.data.repository import (
  Repository,
  empty_repository,
  video_repository,
)
from hourjax.data.rows import Size, Visual
from hourjax.data.sample_sizes import stored_frames
from hourjax.data.store.array_file import is_finite
from hourjax.data.store.features import FeatureStore
from hourjax.data.tokenizer import Tokenizer
from hourjax.data.visual_input import image_input, read_images
from hourjax.errors import UserError
from hourjax.extraction.encoder import Encoder
from hourjax.inference.answering import Answering
from hourjax.inference.engine import EncodedMemory, Engine, row_spec
from hourjax.inference.memory import Memory
from hourjax.inference.prompts import Prompts, Rules
from hourjax.inference.video_features import (
  Progress,
  VideoFeatures,
  as_floats,
  load_features,
  part_note,
  read_video_features,
  stored_duration,
)
from hourjax.models.config import ModelConfig

# Seconds. An hour that is given in milliseconds is more than this.
_MAX_DURATION = 30 * 24 * 3600
_CHECKED_FRAMES = 16  # frames that are checked at a time


class Model:
  """Holds Hour-LLaVA with its tokenizer, on the devices of this process.

  Attributes:
    name: name of the folder and a fingerprint of the weights. Records of an
      evaluation carry it.
    config: configuration of the model.
    tokenizer: tokenizer of the model.
    rules: settings of the training that also decide answers.
    engine: the model on the devices.
  """

  def __init__(
    self,
    params: Mapping[str, jax.Array | np.ndarray],
    config: ModelConfig,
    tokenizer: Tokenizer,
    *,
    name: str = "model",
    rules: Rules | None = None,
    mesh: Mesh,
  ):
    """Puts the parameters on the mesh; `hourjax.load` reads them.

    Raises:
      UserError: the tokenizer has more tokens than the model.
    """
    if tokenizer.vocab_size > config.decoder.vocab:
      raise UserError(
        f"the tokenizer has {tokenizer.vocab_size} tokens and {name} knows"
        f" {config.decoder.vocab}; give the tokenizer it was trained with"
      )
    self.name, self.config, self.tokenizer = name, config, tokenizer
    self.rules = rules or Rules()
    self._prompts = Prompts(tokenizer, self.rules)
    self.engine = Engine(params, config, mesh)

  def encode_memory(
    self,
    source: str | os.PathLike | np.ndarray,
    *,
    duration: float | None = None,
    progress: Progress = lambda done, total: None,
  ) -> Memory:
    """Encodes the memory of a video, for any number of questions.

    Args:
      source: a video file, a `.npy` file of features, or features [F, Q, V].
      duration: length of the video in seconds, for features. By default as the
        feature store has it in which the file lies; without a store, a frame
        is a second.
      progress: gets the number of encoded frames, and of all frames.

    Raises:
      UserError: the video cannot be read, or its features have another shape.
    """
    if isinstance(source, np.ndarray):
      features = as_floats(source, "the array of features")
      return self._features(features, duration, "the array of features")
    path = pathlib.Path(source)
    if path.suffix == ".npy":
      features = load_features(path)
      if duration is None:
        duration = stored_duration(path, len(features))
      return self._features(features, duration, str(path))
    video = self.read_video_features(path, progress)
    _check_finite(video.features, str(path))
    return self._video(video.features, video.duration, video.note)

  def read_video_features(
    self,
    path: str | os.PathLike,
    progress: Progress = lambda done, total: None,
  ) -> VideoFeatures:
    """Runs the vision tower over the frames of a video file.

    From 128 seconds on they are not the frames that extraction stores: see
    `data.media.frame_rules`.

    Args:
      path: the video file.
      progress: gets the number of encoded frames, and of all frames.

    Raises:
      UserError: the video cannot be read, or too little of it.
    """
    return read_video_features(path, self._encoder, progress)

  def encode_stored_memory(self, store: FeatureStore, name: str) -> Memory:
    """Encodes the memory of a video whose features are stored.

    Args:
      store: the feature store.
      name: name of the video in it.

    Raises:
      UserError: the video is not in the store, or its features do not fit the
        model.
    """
    duration, frames = stored_frames(store, name)
    shape = (self.config.pool_side**2, self.config.vision.width)
    sparse = is_sparse(store.stored(name).frames, duration)
    features = store.read(name, frames, shape)
    notes = part_note(store.share(name)), sparse_note(int(sparse))
    return self._video(features, duration, " ".join(filter(None, notes)))

  def encode_images(self, images: Sequence[str | os.PathLike]) -> Memory:
    """Encodes the memory of one or more images.

    A question may place them by one `<image>` each; otherwise they come before
    its text.

    Args:
      images: image files.

    Raises:
      UserError: there is no image, or one cannot be read.
    """
    if not images:
      raise UserError(
        "no images to encode; name at least one, or use empty_memory()"
      )
    paths = [pathlib.Path(image) for image in images]
    spec = row_spec(self.config, Size())
    single = self.rules.single_image
    repository, _ = image_input(paths, spec, single)
    pixels = read_images(paths, spec, single)
    return self._memory(repository, "tiles", pixels)

  def empty_memory(self) -> Memory:
    """Returns a memory without visual input, for questions on text alone."""
    empty = empty_repository()
    return Memory(
      Answering(
        self.engine, self._prompts, EncodedMemory(), empty, self._kept(empty)
      )
    )

  @functools.cached_property
  def _encoder(self) -> Encoder:
    return Encoder(self.engine.params, self.config)

  @functools.cached_property
  def _embedder(self) -> Embedder:
    """Copies word embeddings and projector to the host, for forgetting."""
    params = self.engine.params
    return Embedder(
      {path: np.asarray(params[path]) for path in EMBEDDER_PARAMS}
    )

  def _kept(
    self, repository: Repository, features: np.ndarray | None = None
  ) -> KeptTokens:
    """Returns what forgetting keeps of a memory, for any question."""
    rules = self.rules
    embedder = self._embedder if rules.forgetting.needs_question else None
    return KeptTokens(
      rules.forgetting, repository, rules.seed, features, embedder
    )

  def _features(
    self, features: np.ndarray, duration: float | None, name: str
  ) -> Memory:
    """Encodes the memory of given features, after checking them."""
    shape = (self.config.pool_side**2, self.config.vision.width)
    if features.ndim != 3 or features.shape[1:] != shape:
      raise UserError(
        f"{name} has features of shape {features.shape}, the model reads"
        f" (frames, {shape[0]}, {shape[1]}); extract them with its own tower"
      )
    if not len(features):
      raise UserError(f"{name} has 0 frames of features; give 1 or more")
    duration = float(len(features)) if duration is None else float(duration)
    if not 0 < duration <= _MAX_DURATION:
      raise UserError(
        f"{name}: the duration is {duration:g}, expected seconds, at most"
        f" {_MAX_DURATION} (30 days)"
      )
    sparse = is_sparse(len(features), duration)
    features = features[stored_feature_frames(len(features), duration)]
    _check_finite(features, name)
    return self._video(features, duration, sparse_note(int(sparse)))

  def _video(
    self, features: np.ndarray, duration: float, note: str = ""
  ) -> Memory:
    repository = video_repository(len(features), self.config.pool_side)
    return self._memory(repository, "features", features, duration, note)

  def _memory(
    self,
    repository: Repository,
    kind: Visual,
    visual: np.ndarray,
    duration: float | None = None,
    note: str = "",
  ) -> Memory:
    """Encodes a memory, with the tokens that any question may keep."""
    kept = self._kept(repository, visual if kind == "features" else None)
    limited = self.rules.memory.limit_memory(repository, kept.fixed)
    encoded = self.engine.encode_memory(limited, kind, visual, kept.candidates)
    video = None if duration is None else (float(duration), len(visual))
    answering = Answering(
      self.engine, self._prompts, encoded, repository, kept, video
    )
    return Memory(answering, note)


def _check_finite(features: np.ndarray, name: str) -> None:
  """Raises UserError if features are not finite in bfloat16."""
  with np.errstate(over="ignore"):
    blocks = (
      features[at : at + _CHECKED_FRAMES].astype(jax.numpy.bfloat16)
      for at in range(0, len(features), _CHECKED_FRAMES)
    )
    if not all(is_finite(block.view(np.uint16)) for block in blocks):
      raise UserError(
        f"{name} holds values that are not finite in bfloat16; extract it again"
      )
