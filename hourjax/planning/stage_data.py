"""The data of the stages, drawn from published numbers.

How many samples there are of each kind is the paper's (hourjax/README.md,
Training), and so are the durations of VideoMarathon (hourjax/README.md,
VideoMarathon). Lengths of texts and sizes of images are assumptions, and so in
part are lengths of short videos, all of them below.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from hourjax.data import synthetic
from hourjax.data.columns import MODALITIES, Columns

_FPS = 30.0  # of short videos' files, which decides their frames as pixels
# Share of images, and their sizes: photographs, screens, charts, pages.
_IMAGES = (
  (0.5, 640, 480),
  (0.2, 1024, 768),
  (0.15, 800, 600),
  (0.15, 1240, 1754),
)
_SEVERAL = (2, 6)  # images of a sample with more than one, inclusive
# Seconds of short videos: share of the conversations, from, to. These are the
# ranges in which LLaVA-Video-178K is published. Videos of 2 to 3 minutes have
# 234,306 of its 1.3 million conversations, counted in its files; the other
# shares are assumed.
_SHORT_SECONDS = (
  (0.50, 4, 30),
  (0.16, 30, 60),
  (0.16, 60, 120),
  (0.18, 120, 180),
)
# Ranges from which tokens of the prompt and of the answers are drawn.
_WORDS = {
  "image": ((60, 140), (20, 260)),
  "text": ((60, 400), (100, 500)),
  "short": ((80, 160), (20, 300)),
}


class Part(NamedTuple):
  """Describes the samples of one kind in a stage."""

  kind: str  # "image", "images", "text", "short" or "marathon"
  samples: float
  stream: str


def _stage3() -> tuple[Part, ...]:
  """Returns short videos and VideoMarathon, each with half of the rest."""
  mixed = [
    Part(kind, samples / 2, stream)
    for stream in ("short", "long")
    for kind, samples in (("image", 1.14e6), ("images", 0.5e6),
                          ("text", 0.81e6))
  ]  # fmt: skip
  return (
    *mixed,
    Part("short", 1.3e6, "short"),
    Part("marathon", 0.7e6, "long"),
  )


STAGES = {
  "stage1": (Part("image", 3.2e6, "default"),),
  "stage2": (
    Part("image", 0.12e6, "default"),
    Part("images", 0.05e6, "default"),
    Part("text", 0.09e6, "default"),
    Part("short", 0.3e6, "default"),
  ),
  "stage3": _stage3(),
}


def draw(
  parts: Sequence[Part], scale: float, rng: np.random.Generator
) -> Columns:
  """Draws samples, each with a video of its own.

  Args:
    parts: the kinds of samples.
    scale: how many samples of the stage one drawn sample stands for.
    rng: the source of random numbers.
  """
  streams = tuple(dict.fromkeys(part.stream for part in parts))
  kinds = tuple(dict.fromkeys(part.kind for part in parts))
  columns: dict[str, list[np.ndarray]] = {}
  durations: list[np.ndarray] = []
  for part in parts:
    count = max(1, round(part.samples / scale))
    made, seconds = _draw_part(part.kind, count, rng)
    if seconds is not None:
      first = sum(map(len, durations))
      made["video"] = first + np.arange(count)
      durations.append(seconds)
    made["stream"] = np.full(count, streams.index(part.stream))
    made["source"] = np.full(count, kinds.index(part.kind))
    for name in _COLUMNS:
      value = made.get(name, -1 if name == "video" else 0)
      columns.setdefault(name, []).append(np.broadcast_to(value, count))
  duration = np.concatenate(durations) if durations else np.zeros(1)
  joined = {k: np.concatenate(v).astype(_COLUMNS[k])
            for k, v in columns.items()}  # fmt: skip
  return Columns(
    **joined,
    videos=tuple(map(synthetic.video_name, range(len(duration)))),
    sources=kinds,
    streams=streams,
    duration=duration,
    num_frames=np.rint(duration * _FPS).astype(np.int32),
    fps=np.full(len(duration), _FPS, np.float64),
  )


_COLUMNS = {
  "modality": np.uint8,
  **dict.fromkeys(
    ("tokens", "prompt", "answer", "images", "width", "height", "video",
     "source", "stream"),
    np.int32,
  ),
}  # fmt: skip


def _draw_part(
  kind: str, count: int, rng: np.random.Generator
) -> tuple[dict[str, Any], np.ndarray | None]:
  """Draws samples of one kind.

  Returns:
    Their columns by name, and the seconds of their videos, if they have any.
  """
  if kind == "marathon":
    seconds = synthetic.video_durations(count, 0)
    made = synthetic.conversation_columns(seconds, count, 0)
    names = ("tokens", "prompt", "answer", "modality")
    return {name: getattr(made, name) for name in names}, seconds
  prompts, answers = _WORDS["image" if kind == "images" else kind]
  prompt = rng.integers(*prompts, count)
  made = {
    "prompt": prompt,
    "tokens": prompt + rng.integers(*answers, count),
    "answer": prompt,
    "modality": MODALITIES.index(
      {"images": "image", "short": "video"}.get(kind, kind)
    ),
  }
  if kind == "image":
    shares = np.array([share for share, _, _ in _IMAGES])
    chosen = rng.choice(len(_IMAGES), count, p=shares)
    sizes = np.array([size for _, *size in _IMAGES])[chosen]
    made |= {"images": 1, "width": sizes[:, 0], "height": sizes[:, 1]}
  if kind == "images":
    low, high = _SEVERAL
    made["images"] = rng.integers(low, high + 1, count)
  if kind != "short":
    return made, None
  shares, low, high = np.array(_SHORT_SECONDS).T
  chosen = rng.choice(len(shares), count, p=shares)
  return made, np.round(rng.uniform(low[chosen], high[chosen]), 2)
