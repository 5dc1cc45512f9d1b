"""Draws a script: one 96 x 96 RGB frame for each second."""

import functools

import numpy as np
from PIL import Image, ImageDraw, ImageOps

from hourjax.data.demo import shapes, world
from hourjax.data.demo.script import Scene, Script

SIDE = 96
# An actor's side and its centre's distance from the nearest frame edges.
ACTOR_SIDE = 44
MARGIN = 30
# Shapes are drawn enlarged and scaled down, which smooths their edges.
_ZOOM = 4

# Action -> its cycle, one (dx, dy in pixels, degrees, scale, opacity) for
# each second. Cycle lengths have no common factor with 4: temporal forgetting
# keeps about every fourth frame, which would freeze a cycle of 2 or 4.
_CYCLES = {
  "spins": [(0, 0, 360 * i / 7, 1.0, 1.0) for i in range(7)],
  "jumps": [(0, dy, 0, 1.0, 1.0) for dy in (8, 0, -8)],
  "slides": [(dx, 0, 0, 1.0, 1.0) for dx in (-8, -3, 3, 8, 0)],
  "blinks": [(0, 0, 0, 1.0, alpha) for alpha in (1.0, 0.6, 0.2)],
  "grows": [(0, 0, 0, scale, 1.0) for scale in (0.75, 0.9, 1.05, 1.2, 0.9)],
}


def frame(script: Script, second: int) -> np.ndarray:
  """The picture shown at a second.

  Args:
    script: what the video shows.
    second: 0 <= second < script.duration.

  Returns:
    uint8[96, 96, 3], RGB; shared between calls, so not to be written to.
  """
  needle = script.needle
  if needle.shown_at(second):
    return _card(needle.kind, needle.colour)
  scene = next(s for s in script.scenes if second < s.end)
  cycle = _CYCLES[scene.action]
  return _scene_frame(scene, second % len(cycle))


@functools.lru_cache(maxsize=256)
def _scene_frame(scene: Scene, phase: int) -> np.ndarray:
  dx, dy, degrees, scale, opacity = _CYCLES[scene.action][phase]
  sprite = _sprite(scene.kind, scene.colour, degrees, scale)
  side = sprite.shape[0]
  far = SIDE - MARGIN
  x = (MARGIN if scene.side == "left" else far) + dx - side // 2
  y = (MARGIN if scene.level == "top" else far) + dy - side // 2
  # The sprite may stick out of the frame: both are cut to the common part.
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
  return out


def _paint(image: Image.Image, drawing, body) -> None:
  """Draws a drawing list over the whole image."""
  pen = ImageDraw.Draw(image)
  size = image.width - 1
  for form, coordinates, fill in drawing:
    places = [value * size for value in coordinates]
    fill = body if fill == shapes.BODY else fill
    if form == "pieslice":
      pen.pieslice(places, 180, 360, fill=fill)
    else:
      getattr(pen, form)(places, fill=fill)


@functools.cache
def _background(place: str) -> np.ndarray:
  image = Image.new("RGB", (SIDE * _ZOOM, SIDE * _ZOOM))
  _paint(image, shapes.PLACES[place], None)
  return np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BOX))


@functools.lru_cache(maxsize=1024)
def _sprite(kind: str, colour: str, degrees: float, scale: float):
  """An actor with its opacity: float32[side, side, 4], 0 to 255."""
  big = ACTOR_SIDE * _ZOOM
  image = Image.new("RGBA", (big, big))
  _paint(image, shapes.ACTORS[kind], world.COLOURS[colour])
  if degrees:
    # A turned square needs sqrt(2) times its side to keep its corners.
    scale, rim = scale * 1.5, big // 4
    image = ImageOps.expand(image, rim).rotate(
      -degrees, Image.Resampling.BICUBIC
    )
  side = round(ACTOR_SIDE * scale / 2) * 2
  image = image.resize((side, side), Image.Resampling.BOX)
  return np.asarray(image).astype(np.float32)


@functools.cache
def _card(kind: str, colour: str) -> np.ndarray:
  first, second, pattern = shapes.CARDS[kind]
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
  _paint(image, shapes.NEEDLES[kind], world.COLOURS[colour])
  return np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BOX))
