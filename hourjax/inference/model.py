"""A model to ask: load it, let it encode_memory a video, ask.

model = hourjax.load("work/memaug/stage2")
memory = model.encode_memory("film.mp4")
print(memory.ask("What happens at the end?").text)
"""

import functools
import os
import pathlib
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jax.sharding import Mesh

from hourjax.data.forgetting import kept_tokens
from hourjax.data.media.frame_rules import (
  is_sparse,
  sparse_note,
  stored_feature_frames,
)
from hourjax.data.repository import (
  empty_repository,
  repeated_frames,
  video_repository,
)
from hourjax.data.rows import Size
from hourjax.data.sample_sizes import stored_frames
from hourjax.data.store.array_file import is_finite
from hourjax.data.store.features import FeatureStore
from hourjax.data.tokenizer import Tokenizer
from hourjax.data.visual_input import images_shown, read_images
from hourjax.errors import UserError
from hourjax.extraction.encoder import Encoder
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

_LONGEST = 30 * 24 * 3600  # seconds; an hour in milliseconds is more
_BLOCK = 16  # frames that are looked through at a time


class Model:
  """Hour-LLaVA with its tokenizer, on the devices of this process.

  Attributes:
    name: of folder and weights, for records of what was asked.
    config: of the model.
    tokenizer: of its text.
    rules: see there.
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
    """Puts the parameters on the mesh; `hourjax.load` reads them first."""
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
    """A video, to be asked about as often as one likes.

    Args:
      source: a video file, a `.npy` file of features, or features [F, Q, V].
      duration: of features, in seconds; by default as the store has it that a
        file lies in, else one frame is a second.
      progress: told of frames that are read and encoded.

    Raises:
      UserError: it cannot be read, or has features of another shape.
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
    film = self.read_video_features(path, progress)
    _check_finite(film.features, str(path))
    return self._video(film.features, film.duration, film.note)

  def read_video_features(
    self,
    path: str | os.PathLike,
    progress: Progress = lambda done, total: None,
  ) -> VideoFeatures:
    """Encodes the frames of a video file that are shown.

    From 128 seconds on they are not those that extraction stores: see
    `frame_rules`.
    """
    return read_video_features(path, self._encoder, progress)

  def encode_stored_memory(self, store: FeatureStore, name: str) -> Memory:
    """A video whose features are stored.

    Raises:
      UserError: it is not there, or cannot be used.
    """
    duration, frames = stored_frames(store, name)
    shape = (self.config.pool_side**2, self.config.vision.width)
    sparse = is_sparse(store.stored(name).frames, duration)
    features = store.read(name, frames, shape)
    notes = part_note(store.share(name)), sparse_note(int(sparse))
    return self._video(features, duration, " ".join(filter(None, notes)))

  def see(self, images: Sequence[str | os.PathLike]) -> Memory:
    """One or more images.

    Questions have one <image> for each, or they come first.
    """
    if not images:
      raise UserError("no images to see; name at least one, or use read()")
    paths = [pathlib.Path(image) for image in images]
    spec = row_spec(self.config, Size())
    single = self.rules.single_image
    repository, _ = images_shown(paths, spec, single)
    pixels = read_images(paths, spec, single)
    return self._memory(repository, "tiles", pixels)

  def read(self) -> Memory:
    """Nothing to see: questions are about text alone."""
    return Memory(
      self.engine, self._prompts, EncodedMemory(), empty_repository(), []
    )

  @functools.cached_property
  def _encoder(self) -> Encoder:
    return Encoder(self.engine.params, self.config)

  def _features(self, features, duration, name):
    shape = (self.config.pool_side**2, self.config.vision.width)
    if features.ndim != 3 or features.shape[1:] != shape:
      raise UserError(
        f"{name} has features of shape {features.shape}, the model reads"
        f" (frames, {shape[0]}, {shape[1]}); extract them with its own tower"
      )
    if not len(features):
      raise UserError(f"{name} has 0 frames of features; give 1 or more")
    duration = float(len(features)) if duration is None else float(duration)
    if not 0 < duration <= _LONGEST:
      raise UserError(
        f"{name}: the duration is {duration:g}, expected seconds, at most"
        f" {_LONGEST} (30 days)"
      )
    sparse = is_sparse(len(features), duration)
    features = features[stored_feature_frames(len(features), duration)]
    _check_finite(features, name)
    return self._video(features, duration, sparse_note(int(sparse)))

  def _video(self, features, duration, note=""):
    side = self.config.pool_side
    repository = video_repository(len(features), side)
    return self._memory(repository, "features", features, duration, note)

  def _memory(self, repository, kind, visual, duration=None, note="") -> Memory:
    rule, means = self.rules.forgetting, None
    if rule.temporal == "keyframe" and kind == "features":
      shown = repeated_frames(len(visual))
      means = visual.astype(np.float32).mean(axis=1)[shown]
    rng = np.random.default_rng(self.rules.seed)
    kept = kept_tokens(repository, rule, rng, frame_features=means)
    known = self.engine.encode_memory(
      repository, kind, visual, np.concatenate(kept)
    )
    video = None if duration is None else (float(duration), len(visual))
    return Memory(
      self.engine, self._prompts, known, repository, kept, video, note
    )


def _check_finite(features: np.ndarray, name: str) -> None:
  """Raises where the model would read one that is not; few at a time."""
  with np.errstate(over="ignore"):
    blocks = (
      features[at : at + _BLOCK].astype(jax.numpy.bfloat16)
      for at in range(0, len(features), _BLOCK)
    )
    if not all(is_finite(block.view(np.uint16)) for block in blocks):
      raise UserError(
        f"{name} holds values that are not finite in bfloat16; extract it again"
      )
