"""What every sample takes of a row, from columns of numbers alone.

Rows of millions of samples are planned from these sizes before any file is
opened. They are the numbers that `rows.layout_size` gives for a sample that is
laid out, but for queries and decoder positions of a tiled image: where random
forgetting leaves rows of it without a token, their newlines are planned and not
kept (`Forgetting.newline_count`). A test holds the two together.
"""

import math
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float64, Int64

from hourjax.data.columns import MEASURED_AS, MODALITIES, Columns
from hourjax.data.forgetting import Forgetting
from hourjax.data.media import frame_rules, images
from hourjax.data.rows import ROWS, RowSpec, Size, check_fits
from hourjax.data.store.features import FeatureStore
from hourjax.data.tokenizer import Tokenizer
from hourjax.errors import UserError

FIELDS = Size.names()
_AT = {name: i for i, name in enumerate(FIELDS)}


class VideoInput(NamedTuple):
  """Holds the visual input of M videos, in numbers.

  Attributes:
    num_frames: how many frames of each video are used, before any repetition;
      0 where the video cannot be used.
    duration: in seconds; 0 where the video cannot be used.
    stored: whether the frames of each video come as features of the store or,
      False, as pixels of its file.
    problems: why a video cannot be used, by its index.
  """

  num_frames: Int64[np.ndarray, "M"]
  duration: Float64[np.ndarray, "M"]
  stored: Bool[np.ndarray, "M"]
  problems: dict[int, str]


def video_input(columns: Columns, features: FeatureStore | None) -> VideoInput:
  """Counts the frames that are used of each video; see `frame_rules`.

  A video comes as features if the store has it, and else as pixels. Of clip.mp4
  in the store and walk.mp4 beside it, the first has `stored` True, the second
  False.

  Args:
    columns: name the videos.
    features: store of features; None where all videos come as pixels.
  """
  frames = np.zeros(len(columns.videos), np.int64)
  duration = np.zeros(len(columns.videos))
  stored = np.zeros(len(columns.videos), bool)
  problems = {}
  numbers = zip(
    columns.num_frames.tolist(), columns.duration.tolist(), columns.fps.tolist()
  )
  for i, (name, known) in enumerate(zip(columns.videos, numbers)):
    stored[i] = features is not None and name in features
    try:
      if features is not None and stored[i]:
        duration[i], frames[i] = _stored_count(features, name)
      else:
        rate = _pixel_rate(name, *known, features)
        frames[i] = frame_rules.video_file_count(known[0], rate)
        duration[i] = known[1]
    except UserError as error:
      problems[i] = str(error)
  return VideoInput(frames, duration, stored, problems)


def stored_frames(
  features: FeatureStore, name: str
) -> tuple[float, np.ndarray]:
  """Returns a stored video's duration and the indices of the frames used.

  Args:
    features: the store.
    name: of the video.

  Raises:
    UserError: not in the store, or its index holds no such video.
  """
  duration, _ = _stored_count(features, name)
  stored = features.stored(name).frames
  return duration, frame_rules.stored_feature_frames(stored, duration)


def _stored_count(features: FeatureStore, name: str) -> tuple[float, int]:
  """Returns a stored video's duration and the number of frames used.

  Only numbers: arrays of frames would take seconds for 28,000 videos.
  """
  if name not in features:
    raise UserError(f"{name} is not in {features.root}; extract it first")
  stored, duration = features.stored(name)
  if stored < 1 or not 0 < duration < math.inf:
    raise UserError(
      f"{name} has {stored} frames and lasts {duration} s by the index of"
      f" {features.root}; delete its line and extract it again"
    )
  return duration, frame_rules.stored_feature_count(stored, duration)


def sparse_videos(features: FeatureStore, names: Iterable[str]) -> list[str]:
  """Returns the videos that have too few features for the short-video rule."""
  return [
    name
    for name in names
    if name in features and frame_rules.is_sparse(*features.stored(name))
  ]


def pixel_frames(
  name: str, num_frames: int, duration: float, fps: float = math.nan
) -> tuple[float, np.ndarray]:
  """Returns duration and frame indices of a video encoded in the step.

  Args:
    name: of the video.
    num_frames: in its file; 0 where it is not known.
    duration: in seconds.
    fps: average frames a second of the file; NaN where they are not known, and
      then taken from the other two.

  Raises:
    UserError: the number of frames or the duration is not known.
  """
  rate = _pixel_rate(name, num_frames, duration, fps)
  return duration, frame_rules.video_file_frames(num_frames, rate)


def _pixel_rate(
  name: str,
  num_frames: int,
  duration: float,
  fps: float,
  features: FeatureStore | None = None,
) -> frame_rules.Rate:
  """Returns the rate by which frames of a file are chosen.

  Args:
    name: of the video.
    num_frames: see `pixel_frames`.
    duration: likewise.
    fps: likewise.
    features: store that does not have the video, for the message.

  Raises:
    UserError: the number of frames or the duration is not known.
  """
  if num_frames and 0 < duration < math.inf:
    known = 0 < fps < math.inf
    return (
      fps if known else frame_rules.rate_from_duration(num_frames, duration)
    )
  unknown = f"number of frames ({num_frames}) or duration ({duration} s)"
  if features is None:
    raise UserError(
      f"{name}: {unknown} not known; prepare with --media, or extract its"
      " features and set config.data.features"
    )
  raise UserError(
    f"{name} is not in {features.root}; extract it first, or prepare with"
    f" --media so that it comes as pixels ({unknown} not known)"
  )


def sample_sizes(
  columns: Columns,
  visual: VideoInput,
  *,
  tokenizer: Tokenizer,
  spec: RowSpec,
  forgetting: Forgetting,
  max_length: int,
  single_image: str,
  stream_rows: Mapping[str, Size] = types.MappingProxyType({}),
) -> tuple[Int64[np.ndarray, "N 7"], dict[int, str]]:
  """Returns sizes in the order of `FIELDS`, and the unusable samples.

  Args:
    columns: of the conversations.
    visual: visual input of their videos.
    tokenizer: the one they were measured with.
    spec: of the rows; a sample that is larger than one cannot be used.
    forgetting: rule; which tokens it keeps does not matter, only how many.
    max_length: the decoder's sequence is cut here.
    single_image: see `SampleOptions`.
    stream_rows: capacities of the rows of streams that have others.

  Returns:
    (sizes, problems): problems say why a sample cannot be used, by index.
  """
  sizes = np.zeros((len(columns), len(FIELDS)), np.int64)
  problems = {}
  kept = np.zeros(len(columns), np.int64)
  tokens = columns.tokens.astype(np.int64)
  prompt = columns.prompt.astype(np.int64)
  answer = columns.answer.astype(np.int64)

  at = np.flatnonzero(columns.modality == MODALITIES.index("video"))
  if len(at):
    which = columns.video[at]
    # The columns count the instruction of a video whose numbers were not known.
    longer = _instruction_growth(visual, tokenizer)[which]
    for count in (tokens, prompt, answer):
      count[at] += longer
    kept[at] = _video_sizes(sizes, at, visual.num_frames[which],
                           visual.stored[which], spec, forgetting)  # fmt: skip
    unusable = visual.problems | _without_features(columns, visual, forgetting)
    bad = np.isin(which, np.fromiter(unusable, int))
    for i in at[bad].tolist():
      problems[i] = unusable[int(columns.video[i])]
  for i, size, tokens_kept in _image_sizes(
    columns, spec, forgetting, single_image, problems
  ):
    sizes[i] = size
    kept[i] = tokens_kept

  # Text alone has no queries: the decoder reads it without MemAug.
  has_queries = columns.modality != MODALITIES.index("text")
  sizes[:, _AT["queries"]] = np.where(has_queries, prompt + kept, 0)
  sizes[:, _AT["decoder"]] = np.minimum(tokens + kept, max_length)
  for i in np.flatnonzero(answer + kept >= max_length).tolist():
    problems.setdefault(
      i,
      f"its answer starts at position {answer[i] + kept[i]} and max_length"
      f" is {max_length}; raise config.max_length or drop the record",
    )
  capacities = [stream_rows.get(name, spec.capacity)
                for name in columns.streams]  # fmt: skip
  most = np.array([capacity.astuple() for capacity in capacities])
  for i in np.flatnonzero((sizes > most[columns.stream]).any(axis=1)).tolist():
    stream = columns.streams[columns.stream[i]]
    capacity = stream_rows.get(stream, spec.capacity)
    key = f"config.stream_rows.{stream}" if stream in stream_rows else ROWS
    try:
      check_fits(Size(*sizes[i].tolist()), capacity, "it", key)
    except UserError as error:
      pixels = _pixel_note(columns, i, sizes[i], capacity)
      problems.setdefault(i, f"{pixels}{error}")
  return sizes, problems


def _without_features(
  columns: Columns, visual: VideoInput, rule: Forgetting
) -> dict[int, str]:
  """Returns why videos cannot be used whose rule needs stored features."""
  if not rule.needs_features:
    return {}
  return {
    i: f"{columns.videos[i]} comes as pixels, and config.forgetting.temporal="
    f"{rule.temporal} needs stored features; extract it, or choose uniform or"
    " random"
    for i in np.flatnonzero(~visual.stored).tolist()
    if i not in visual.problems
  }


def _pixel_note(
  columns: Columns, index: int, size: np.ndarray, capacity: Size
) -> str:
  """Says that a video comes as pixels if its frames are what is too large."""
  if size[_AT["frames"]] <= capacity.frames:
    return ""
  name = columns.videos[columns.video[index]]
  return f"{name} comes as pixels (extract it, and it comes as features): "


def _instruction_growth(visual: VideoInput, tokenizer: Tokenizer) -> np.ndarray:
  """Returns what each video's time instruction has more than MEASURED_AS.

  The seconds, their hundredths and the frames are counted apart: a token never
  spans two of them, and there are few different ones. For 61.25 s and 60
  frames the result is the sum of what "61.00" and what "0.25" have more tokens
  than "0.00", and what "60" has more than "1".

  Returns:
    int64 [M].
  """
  cents = np.rint(visual.duration * 100).astype(np.int64)
  seconds, frames = MEASURED_AS
  parts: list[tuple[np.ndarray, Callable[[int], str]]] = [
    (cents // 100, lambda n: _numbers(float(n), frames)),
    (cents % 100, lambda n: _numbers(n / 100, frames)),
    (np.maximum(visual.num_frames, 1), lambda n: _numbers(seconds, n)),
  ]
  growth = np.zeros(len(cents), np.int64)
  for values, text in parts:
    once, where = np.unique(values, return_inverse=True)
    base, *lengths = tokenizer.lengths(
      [_numbers(*MEASURED_AS), *map(text, once.tolist())]
    )
    growth += (np.array(lengths, np.int64) - base)[where]
  return growth


def _numbers(duration: float, frames: int) -> str:
  """Returns the part of the instruction that has these numbers.

  The rest of it has the same tokens for all videos.
  """
  text = frame_rules.time_instruction(duration, frames)
  return text[text.index(" lasts ") : text.index(" frames ") + len(" frames ")]


def _video_sizes(
  sizes: np.ndarray,
  at: np.ndarray,
  frames: np.ndarray,
  stored: np.ndarray,
  spec: RowSpec,
  rule: Forgetting,
) -> np.ndarray:
  """Fills in what videos take, and returns how many tokens are kept of each.

  Args:
    sizes: [N, 7], of which the columns of memory and visual input are set.
    at: int [n], the samples about videos.
    frames: int [n], how many are used of each sample's video.
    stored: bool [n], whether they come as features and not as pixels.
    spec: of the rows.
    rule: of forgetting.
  """
  tokens = spec.frame_tokens
  repeated = np.maximum(frames, frame_rules.MIN_FRAMES)
  sizes[at, _AT["memory"]] = repeated * (tokens + 1)
  sizes[at, _AT["features"]] = np.where(stored, frames * tokens, 0)
  sizes[at, _AT["frames"]] = np.where(stored, 0, frames)
  side = round(tokens**0.5)
  return rule.frame_count(repeated) * (rule.cell_count(side, side) + 1)


def _image_sizes(
  columns: Columns,
  spec: RowSpec,
  rule: Forgetting,
  single: str,
  problems: dict[int, str],
) -> Iterator[tuple[int, tuple[int, ...], int]]:
  """Yields (index, size, tokens kept) of every sample with images.

  Where that cannot be said, `problems` gets the reason.
  """
  tokens = spec.tile_tokens
  side = round(tokens**0.5)
  # Images of one shape have one size; many have the same shape.
  known: dict[tuple[int, int], tuple[tuple[int, ...], int] | str] = {}
  at = np.flatnonzero(columns.modality == MODALITIES.index("image"))
  for i in at.tolist():
    count = int(columns.images[i])
    if count > 1 or single == "plain":
      size = Size(tiles=count, memory=count * (tokens + 1))
      kept = count * (rule.cell_count(side, side) + 1)
      yield i, size.astuple(), kept
      continue
    shape = int(columns.width[i]), int(columns.height[i])
    if shape not in known:
      try:
        known[shape] = _tiled_size(*shape, spec, side, rule)
      except UserError as error:
        known[shape] = str(error)
    found = known[shape]
    if isinstance(found, str):
      problems[i] = found
    else:
      yield i, *found


def _tiled_size(
  width: int, height: int, spec: RowSpec, side: int, rule: Forgetting
) -> tuple[tuple[int, ...], int]:
  """Returns size and tokens kept of an image that is cut into tiles."""
  geometry = images.anyres_geometry(
    width, height, tile=spec.image_size, side=side
  )
  high, wide = geometry.resized_h, geometry.resized_w
  scaled = (high, wide) != (geometry.unpadded_h, geometry.unpadded_w)
  size = Size(
    tiles=geometry.tiles,
    blends=high * wide if scaled else 0,
    memory=side * side + high * (wide + 1),
  )
  cells = rule.cell_count(side, side) + rule.cell_count(high, wide)
  return size.astuple(), cells + rule.newline_count(high, wide)
