"""Frames of demo videos, drawn from a script and written as .mp4 files."""

import functools
import pathlib
from collections.abc import Sequence
from fractions import Fraction

import av
import numpy as np
from PIL import Image, ImageDraw, ImageOps

from hourjax.atomic_file import replace_file
from hourjax.data.demo import world
from hourjax.data.demo.script import Clip, Scene, Script
from hourjax.data.demo.shapes import (
  ACTORS,
  BODY,
  CARDS,
  CLIP_THINGS,
  GLYPHS,
  LIGHT,
  NEEDLES,
  PLACES,
  SIGNS,
  Colour,
  Shape,
)

SIDE = 96
# Side of an actor, and the distance of its centre from the nearest two edges of
# the frame, in pixels.
ACTOR_SIDE = 44
MARGIN = 30
SIGN_SIDE = 24
# Of what crosses the screen of a clip.
THING_SIDE = 40
# Shapes are drawn enlarged and scaled down, which smooths their edges.
_ZOOM = 4

_CLIP_GROUND = (44, 16, 74)
# Action -> its cycle, one (dx, dy in pixels, degrees, scale, opacity) for
# each second. Cycle lengths have no common factor with 4: temporal forgetting
# keeps about every fourth frame, which would freeze a cycle of 2 or 4.
_CYCLES = {
  "spinning": [(0, 0, 360 * i / 7, 1.0, 1.0) for i in range(7)],
  "jumping": [(0, dy, 0, 1.0, 1.0) for dy in (8, 0, -8)],
  "sliding": [(dx, 0, 0, 1.0, 1.0) for dx in (-8, -3, 3, 8, 0)],
  "blinking": [(0, 0, 0, 1.0, alpha) for alpha in (1.0, 0.7, 0.4)],
  "growing": [(0, 0, 0, scale, 1.0) for scale in (0.75, 0.9, 1.05, 1.2, 0.9)],
}


def frame(script: Script, second: int) -> np.ndarray:
  """Draws the frame of a second.

  Args:
    script: of the video.
    second: 0 <= second < script.duration.

  Returns:
    uint8[96, 96, 3], RGB. The array is cached and must not be changed.
  """
  needle = script.needle
  if needle.shown_at(second):
    return _card(needle.kind, needle.colour)
  if script.clip and script.clip.shown_at(second):
    return _clip_frame(script.clip, second)
  scene = next(s for s in script.scenes if second < s.end)
  cycle = _CYCLES[scene.action]
  return _scene_frame(scene, second % len(cycle))


@functools.lru_cache(maxsize=256)
def _scene_frame(scene: Scene, phase: int) -> np.ndarray:
  """Draws an actor over its place, at one step of its action's cycle."""
  dx, dy, degrees, scale, opacity = _CYCLES[scene.action][phase]
  sprite = _sprite(scene.kind, scene.colour, degrees, scale)
  side = sprite.shape[0]
  far = SIDE - MARGIN
  x = (MARGIN if scene.side == "left" else far) + dx - side // 2
  y = (MARGIN if scene.level == "top" else far) + dy - side // 2
  # Where the sprite reaches beyond the frame, both are cut to the common part.
  x0, y0, x1, y1 = (
    max(x, 0),
    max(y, 0),
    min(x + side, SIDE),
    min(y + side, SIDE),
  )
  part = sprite[y0 - y : y1 - y, x0 - x : x1 - x]
  out = _background(scene.place).copy()
  under = out[y0:y1, x0:x1].astype(np.float32)
  alpha = part[..., 3:] * (opacity / 255)
  mixed = under + alpha * (part[..., :3] - under)
  out[y0:y1, x0:x1] = mixed.round().astype(np.uint8)
  rows = slice(-SIGN_SIDE, None) if scene.level == "top" else slice(SIGN_SIDE)
  columns = (
    slice(-SIGN_SIDE, None) if scene.side == "left" else slice(SIGN_SIDE)
  )
  out[rows, columns] = _sign(scene.action)
  return out


def _paint(
  image: Image.Image, drawing: Sequence[Shape], body: Colour | None
) -> None:
  """Draws shapes over the whole image, with `body` as the colour BODY."""
  pen = ImageDraw.Draw(image)
  size = image.width - 1
  for form, coordinates, fill in drawing:
    places = [value * size for value in coordinates]
    fill = body if fill == BODY else fill
    if form == "pieslice":
      pen.pieslice(places, 180, 360, fill=fill)
    else:
      getattr(pen, form)(places, fill=fill)


@functools.cache
def _background(place: str) -> np.ndarray:
  """Draws a place, uint8[96, 96, 3]."""
  image = Image.new("RGB", (SIDE * _ZOOM, SIDE * _ZOOM))
  _paint(image, PLACES[place], None)
  return np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BOX))


@functools.cache
def _sign(action: str) -> np.ndarray:
  """Draws the sign of an action, uint8[SIGN_SIDE, SIGN_SIDE, 3]."""
  image = Image.new("RGB", (SIGN_SIDE * _ZOOM, SIGN_SIDE * _ZOOM), LIGHT)
  _paint(image, SIGNS[action], None)
  return np.asarray(image.resize((SIGN_SIDE, SIGN_SIDE), Image.Resampling.BOX))


@functools.lru_cache(maxsize=1024)
def _sprite(kind: str, colour: str, degrees: float, scale: float) -> np.ndarray:
  """Draws an actor with its opacity: float32[side, side, 4], 0 to 255."""
  big = ACTOR_SIDE * _ZOOM
  image = Image.new("RGBA", (big, big))
  _paint(image, ACTORS[kind], world.COLOURS[colour])
  if degrees:
    # A rotated square needs sqrt(2) times its side to keep its corners.
    scale, rim = scale * 1.5, big // 4
    image = ImageOps.expand(image, rim).rotate(
      -degrees, Image.Resampling.BICUBIC
    )
  side = round(ACTOR_SIDE * scale / 2) * 2
  image = image.resize((side, side), Image.Resampling.BOX)
  return np.asarray(image).astype(np.float32)


@functools.cache
def _card(kind: str, colour: str) -> np.ndarray:
  """Draws the card of a needle, uint8[96, 96, 3]."""
  first, second, pattern = CARDS[kind]
  big = SIDE * _ZOOM
  y, x = np.mgrid[:big, :big] // (8 * _ZOOM)
  if pattern == "stripes":
    choice = x % 2
  elif pattern == "checks":
    choice = (x + y) % 2
  else:
    choice = np.zeros_like(x)
  field = np.array([first, second], dtype=np.uint8)[choice]
  image = Image.fromarray(field)
  _paint(image, NEEDLES[kind], world.COLOURS[colour])
  return np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BOX))


def _clip_frame(clip: Clip, second: int) -> np.ndarray:
  """Draws what crosses the screen at a second of a clip, over its word."""
  thing, way = clip.thing_at(second)
  out = _clip_ground(clip.word).copy()
  x = 4 + round(way * (SIDE - 8 - THING_SIDE))
  sprite = _thing(thing)
  under = out[10 : 10 + THING_SIDE, x : x + THING_SIDE]
  under[sprite[..., 3] > 127] = sprite[sprite[..., 3] > 127][:, :3]
  return out


@functools.cache
def _thing(name: str) -> np.ndarray:
  """Draws what crosses the screen, uint8[THING_SIDE, THING_SIDE, 4]."""
  big = THING_SIDE * _ZOOM
  image = Image.new("RGBA", (big, big))
  _paint(image, CLIP_THINGS[name], None)
  small = image.resize((THING_SIDE, THING_SIDE), Image.Resampling.BOX)
  return np.asarray(small)


@functools.cache
def _clip_ground(word: str) -> np.ndarray:
  """Draws the ground of a clip and its word below, uint8[96, 96, 3]."""
  out = np.full((SIDE, SIDE, 3), _CLIP_GROUND, np.uint8)
  out[SIDE // 2 :] = LIGHT
  # Holes of a film strip, at the upper and the lower edge.
  for x in range(2, SIDE, 12):
    out[1:7, x : x + 7] = LIGHT
    out[SIDE - 7 : SIDE - 1, x : x + 7] = _CLIP_GROUND
  # A letter fills its quarter of the width, as far as possible.
  width = SIDE // len(word)
  for number, letter in enumerate(word):
    dots = np.array([[c == "#" for c in row] for row in GLYPHS[letter]])
    dots = dots.repeat(7, axis=0).repeat(6, axis=1)
    x = number * width + (width - dots.shape[1]) // 2
    out[51 : 51 + len(dots), x : x + dots.shape[1]][dots] = _CLIP_GROUND
  return out


# A key frame a minute keeps seeking cheap and files small.
_CODEC = {"preset": "ultrafast", "crf": "20", "g": "60"}


def write_video(path: pathlib.Path, script: Script) -> None:
  """Writes one frame a second as H.264, 96 x 96 pixels, yuv420p.

  The file gets its name only when it is complete.

  Args:
    path: of the video, in an existing folder.
    script: of the video.
  """
  with replace_file(path, several_writers=True) as partial:
    _encode(partial, script)


def _encode(path: pathlib.Path, script: Script) -> None:
  """Encodes all frames into a file."""
  with av.open(str(path), "w", format="mp4") as container:
    stream = container.add_stream("libx264", rate=1, options=_CODEC)
    stream.width = stream.height = SIDE
    stream.pix_fmt = "yuv420p"
    stream.codec_context.thread_count = 1
    stream.codec_context.time_base = Fraction(1, 1)
    for second in range(script.duration):
      pixels = frame(script, second)
      image = av.VideoFrame.from_ndarray(pixels, format="rgb24")
      image.pts = second
      container.mux(stream.encode(image))
    container.mux(stream.encode())
