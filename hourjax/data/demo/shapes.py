"""Places and things of the demo's videos, as shapes by name.

A picture is a list of shapes (form, coordinates, fill) in a unit square, x to
the right and y down. The fill "body" stands for the colour of the actor or
needle. Kinds differ by the position of their dark and light areas rather than
by fine outlines, since the demo's encoder sees frames of 64 pixels a side only.
"""

from collections.abc import Sequence

Colour = tuple[int, int, int]
Shape = tuple[str, tuple[float, ...], Colour | str]

DARK = (28, 28, 36)
LIGHT = (246, 244, 236)
STEEL = (150, 156, 168)
BODY = "body"

ACTORS = {
  "robot": (
    ("rectangle", (0.44, 0.0, 0.56, 0.2), DARK),
    ("rectangle", (0.04, 0.16, 0.96, 0.98), DARK),
    ("rectangle", (0.12, 0.24, 0.88, 0.9), BODY),
    ("rectangle", (0.18, 0.34, 0.82, 0.58), DARK),
    ("ellipse", (0.23, 0.36, 0.43, 0.56), LIGHT),
    ("ellipse", (0.57, 0.36, 0.77, 0.56), LIGHT),
    ("rectangle", (0.3, 0.7, 0.7, 0.8), STEEL),
  ),
  "cat": (
    ("polygon", (0.06, 0.02, 0.46, 0.26, 0.08, 0.5), BODY),
    ("polygon", (0.94, 0.02, 0.54, 0.26, 0.92, 0.5), BODY),
    ("ellipse", (0.04, 0.14, 0.96, 0.98), BODY),
    ("ellipse", (0.2, 0.54, 0.8, 0.96), LIGHT),
    ("ellipse", (0.22, 0.34, 0.38, 0.52), DARK),
    ("ellipse", (0.62, 0.34, 0.78, 0.52), DARK),
    ("polygon", (0.42, 0.6, 0.58, 0.6, 0.5, 0.7), DARK),
  ),
  "ball": (
    ("ellipse", (0.0, 0.0, 1.0, 1.0), BODY),
    (
      "polygon",
      (0.03, 0.33, 0.97, 0.33, 1.0, 0.5, 0.97, 0.67, 0.03, 0.67, 0.0, 0.5),
      LIGHT,
    ),
    ("ellipse", (0.36, 0.36, 0.64, 0.64), BODY),
  ),
  "car": (
    ("polygon", (0.2, 0.4, 0.32, 0.14, 0.74, 0.14, 0.86, 0.4), BODY),
    ("rectangle", (0.0, 0.38, 1.0, 0.76), BODY),
    ("polygon", (0.28, 0.38, 0.36, 0.2, 0.7, 0.2, 0.78, 0.38), LIGHT),
    ("ellipse", (0.06, 0.56, 0.42, 0.92), DARK),
    ("ellipse", (0.58, 0.56, 0.94, 0.92), DARK),
    ("ellipse", (0.17, 0.67, 0.31, 0.81), STEEL),
    ("ellipse", (0.69, 0.67, 0.83, 0.81), STEEL),
  ),
  "kite": (
    ("polygon", (0.5, 0.0, 1.0, 0.5, 0.5, 1.0, 0.0, 0.5), LIGHT),
    ("polygon", (0.5, 0.08, 0.92, 0.5, 0.5, 0.92, 0.08, 0.5), BODY),
    ("rectangle", (0.44, 0.04, 0.56, 0.96), LIGHT),
    ("rectangle", (0.04, 0.44, 0.96, 0.56), LIGHT),
  ),
  "boat": (
    ("rectangle", (0.46, 0.02, 0.54, 0.66), DARK),
    ("polygon", (0.5, 0.02, 0.96, 0.54, 0.5, 0.54), LIGHT),
    ("polygon", (0.42, 0.14, 0.42, 0.54, 0.08, 0.54), LIGHT),
    ("polygon", (0.0, 0.6, 1.0, 0.6, 0.82, 0.98, 0.18, 0.98), BODY),
    ("rectangle", (0.03, 0.6, 0.97, 0.68), DARK),
  ),
}

NEEDLES = {
  "flag": (
    ("rectangle", (0.1, 0.08, 0.16, 0.96), STEEL),
    ("rectangle", (0.16, 0.12, 0.92, 0.76), BODY),
  ),
  "balloon": (
    ("polygon", (0.5, 0.8, 0.58, 0.9, 0.42, 0.9), BODY),
    ("rectangle", (0.49, 0.9, 0.51, 1.0), STEEL),
    ("ellipse", (0.12, 0.06, 0.88, 0.84), BODY),
    ("ellipse", (0.26, 0.16, 0.38, 0.3), LIGHT),
  ),
  "umbrella": (
    ("rectangle", (0.47, 0.6, 0.53, 0.96), DARK),
    ("rectangle", (0.36, 0.92, 0.53, 0.97), DARK),
    ("pieslice", (0.03, 0.05, 0.97, 1.35), BODY),
  ),
  "lantern": (
    ("rectangle", (0.34, 0.06, 0.66, 0.14), DARK),
    ("rectangle", (0.34, 0.86, 0.66, 0.94), DARK),
    (
      "polygon",
      (0.3, 0.14, 0.7, 0.14, 0.9, 0.5, 0.7, 0.86, 0.3, 0.86, 0.1, 0.5),
      BODY,
    ),
  ),
}

# A still frame cannot show a motion, so a sign does, in the corner that is
# diagonally opposite to the actor.
SIGNS = {
  "spinning": (
    ("ellipse", (0.08, 0.08, 0.92, 0.92), DARK),
    ("ellipse", (0.32, 0.32, 0.68, 0.68), LIGHT),
  ),
  "jumping": (
    ("rectangle", (0.14, 0.1, 0.34, 0.9), DARK),
    ("rectangle", (0.66, 0.1, 0.86, 0.9), DARK),
  ),
  "sliding": (
    ("rectangle", (0.1, 0.14, 0.9, 0.34), DARK),
    ("rectangle", (0.1, 0.66, 0.9, 0.86), DARK),
  ),
  "blinking": (
    ("rectangle", (0.0, 0.0, 0.5, 0.5), DARK),
    ("rectangle", (0.5, 0.5, 1.0, 1.0), DARK),
  ),
  "growing": (("rectangle", (0.12, 0.12, 0.88, 0.88), DARK),),
}

# Backgrounds of cards: (colour, second colour, pattern). Plain white, plain
# black, magenta and cyan occur in no place and on no actor.
CARDS = {
  "flag": ((255, 255, 255), (255, 255, 255), "plain"),
  "balloon": ((0, 0, 0), (0, 0, 0), "plain"),
  "umbrella": ((255, 0, 255), (255, 190, 255), "stripes"),
  "lantern": ((0, 235, 235), (0, 70, 90), "checks"),
}

# What crosses the screen of a clip, on a dark ground.
CLIP_THINGS = {
  "rocket": (
    ("polygon", (0.0, 0.1, 0.3, 0.3, 0.3, 0.7, 0.0, 0.9), (236, 70, 40)),
    ("polygon", (0.2, 0.25, 0.7, 0.25, 1.0, 0.5, 0.7, 0.75, 0.2, 0.75), LIGHT),
    ("ellipse", (0.55, 0.38, 0.75, 0.62), (40, 90, 200)),
  ),
  "bird": (
    ("polygon", (0.0, 0.1, 0.5, 0.7, 0.4, 0.9), (90, 190, 250)),
    ("polygon", (1.0, 0.1, 0.5, 0.7, 0.6, 0.9), (90, 190, 250)),
    ("ellipse", (0.36, 0.5, 0.64, 0.95), (90, 190, 250)),
  ),
  "train": (
    ("rectangle", (0.0, 0.15, 0.45, 0.75), (60, 200, 90)),
    ("rectangle", (0.4, 0.35, 1.0, 0.75), (60, 200, 90)),
    ("rectangle", (0.75, 0.1, 0.9, 0.35), (60, 200, 90)),
    ("ellipse", (0.08, 0.65, 0.38, 0.95), LIGHT),
    ("ellipse", (0.6, 0.65, 0.9, 0.95), LIGHT),
  ),
  "snail": (
    ("ellipse", (0.05, 0.05, 0.75, 0.8), (240, 190, 50)),
    ("ellipse", (0.25, 0.25, 0.55, 0.58), DARK),
    ("rectangle", (0.05, 0.75, 1.0, 0.95), (240, 190, 50)),
    ("rectangle", (0.85, 0.4, 0.95, 0.8), (240, 190, 50)),
  ),
}
# Letters of the words that clips show, 3 x 5.
GLYPHS = {
  "a": ("###", "# #", "###", "# #", "# #"),
  "e": ("###", "#  ", "## ", "#  ", "###"),
  "i": ("###", " # ", " # ", " # ", "###"),
  "l": ("#  ", "#  ", "#  ", "#  ", "###"),
  "n": ("# #", "###", "###", "###", "# #"),
  "o": ("###", "# #", "# #", "# #", "###"),
  "p": ("###", "# #", "###", "#  ", "#  "),
  "s": ("###", "#  ", "###", "  #", "###"),
  "t": ("###", " # ", " # ", " # ", " # "),
  "x": ("# #", "# #", " # ", "# #", "# #"),
}


def _grid(
  xs: Sequence[float],
  ys: Sequence[float],
  width: float,
  height: float,
  fills: Sequence[Colour],
) -> list[Shape]:
  """Returns rectangles at every (x, y), with the fills in turn."""
  spots = [(x, y) for y in ys for x in xs]
  return [
    ("rectangle", (x, y, x + width, y + height), fills[i % len(fills)])
    for i, (x, y) in enumerate(spots)
  ]


def _steps(start: float, stop: float, count: int) -> list[float]:
  """Returns `count` evenly spaced values from `start`, without `stop`."""
  return [start + (stop - start) * i / count for i in range(count)]


def _kitchen() -> list[Shape]:
  tiles = _grid(
    _steps(0, 1.05, 7),
    _steps(0, 0.6, 4),
    0.15,
    0.15,
    ((248, 232, 200), (226, 158, 116)),
  )
  doors = _grid(_steps(0.03, 1, 3), (0.72,), 0.27, 0.24, ((214, 132, 84),))
  knobs = _grid(_steps(0.14, 1.11, 3), (0.76,), 0.06, 0.03, (LIGHT,))
  return [
    *tiles,
    ("rectangle", (0, 0.6, 1, 0.68), (112, 62, 38)),
    ("rectangle", (0, 0.68, 1, 1), (176, 98, 60)),
    *doors,
    *knobs,
  ]


def _forest() -> list[Shape]:
  trunks = _grid(_steps(0.06, 1.06, 4), (0.1,), 0.1, 0.8, ((104, 68, 40),))
  crowns = [
    ("ellipse", (x - 0.1, y, x + 0.26, y + 0.3), fill)
    for x, y, fill in zip(
      _steps(-0.05, 1.0, 6),
      (0, 0.1, -0.04, 0.08, 0, 0.1),
      ((26, 96, 50), (40, 122, 58), (22, 84, 46)) * 2,
    )
  ]
  return [
    ("rectangle", (0, 0, 1, 1), (14, 58, 40)),
    *trunks,
    *crowns,
    ("rectangle", (0, 0.86, 1, 1), (58, 50, 22)),
  ]


def _beach() -> list[Shape]:
  waves = _grid(_steps(0, 1, 4), (0.46, 0.54), 0.13, 0.02, ((150, 214, 240),))
  return [
    ("rectangle", (0, 0, 1, 0.42), (138, 204, 246)),
    ("ellipse", (0.72, 0.05, 0.94, 0.27), (255, 238, 150)),
    ("rectangle", (0, 0.42, 1, 0.62), (28, 122, 196)),
    *waves,
    ("rectangle", (0, 0.62, 1, 1), (240, 216, 150)),
    ("ellipse", (-0.2, 0.6, 0.6, 0.74), (240, 216, 150)),
  ]


def _street() -> list[Shape]:
  houses = _grid(
    _steps(0, 1, 3),
    (0,),
    0.33,
    0.55,
    ((146, 104, 104), (112, 116, 140), (164, 136, 112)),
  )
  windows = _grid(
    _steps(0.04, 1.04, 6),
    (0.06, 0.22, 0.38),
    0.08,
    0.1,
    ((250, 220, 130), (66, 70, 92)),
  )
  return [
    *houses,
    *windows,
    ("rectangle", (0, 0.54, 1, 0.62), (178, 178, 174)),
    ("rectangle", (0, 0.62, 1, 1), (74, 74, 80)),
    *_grid(_steps(0.03, 1.03, 4), (0.79,), 0.15, 0.04, (LIGHT,)),
  ]


def _office() -> list[Shape]:
  return [
    ("rectangle", (0, 0, 1, 1), (198, 214, 226)),
    ("rectangle", (0.08, 0.06, 0.92, 0.54), (120, 146, 176)),
    *_grid((0.1,), _steps(0.08, 0.53, 5), 0.8, 0.045, ((222, 232, 240),)),
    ("rectangle", (0, 0.62, 1, 0.7), (86, 96, 118)),
    ("rectangle", (0, 0.7, 1, 1), (150, 164, 186)),
    *_grid(_steps(0.04, 1.0, 2), (0.76,), 0.4, 0.08, ((110, 124, 150),) * 2),
    *_grid(_steps(0.04, 1.0, 2), (0.88,), 0.4, 0.08, ((110, 124, 150),) * 2),
  ]


def _garden() -> list[Shape]:
  petals = ((240, 120, 170), (250, 236, 140), (176, 130, 220))
  flowers = [
    ("ellipse", (x, y, x + 0.09, y + 0.09), petals[(i + j) % 3])
    for j, y in enumerate(_steps(0.36, 1.0, 4))
    for i, x in enumerate(_steps(0.02 + 0.08 * (j % 2), 1.0, 5))
  ]
  return [
    ("rectangle", (0, 0, 1, 0.3), (196, 232, 244)),
    ("rectangle", (0, 0.28, 1, 1), (150, 206, 92)),
    *[
      ("ellipse", (x, 0.12, x + 0.3, 0.42), (92, 166, 66))
      for x in _steps(-0.08, 1.0, 5)
    ],
    ("rectangle", (0, 0.31, 1, 1), (150, 206, 92)),
    *flowers,
  ]


def _garage() -> list[Shape]:
  hazard = [
    (
      "polygon",
      (x, 1.0, x + 0.1, 0.8, x + 0.2, 0.8, x + 0.1, 1.0),
      (238, 178, 30),
    )
    for x in _steps(-0.2, 1.0, 6)
  ]
  return [
    ("rectangle", (0, 0, 1, 1), (92, 84, 104)),
    *_grid((0.06,), _steps(0.06, 0.7, 5), 0.88, 0.1, ((128, 118, 142),)),
    ("rectangle", (0, 0.8, 1, 1), (46, 42, 50)),
    *hazard,
  ]


def _library() -> list[Shape]:
  books = ((150, 58, 52), (62, 92, 126), (176, 146, 76), (72, 110, 86))
  rows = [
    book
    for i, y in enumerate((0.05, 0.38, 0.71))
    for book in _grid(
      _steps(0.02, 1.0, 12), (y,), 0.065, 0.25, books[i:] + books[:i]
    )
  ]
  return [("rectangle", (0, 0, 1, 1), (82, 46, 28)), *rows]


PLACES = {
  "kitchen": _kitchen(),
  "forest": _forest(),
  "beach": _beach(),
  "street": _street(),
  "office": _office(),
  "garden": _garden(),
  "garage": _garage(),
  "library": _library(),
}
