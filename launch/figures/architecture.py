"""The architecture figure of the README, drawn as SVG text.

  python launch/figures/architecture.py            writes architecture.svg
  python launch/figures/architecture.py --check    1 if it would change

The standard library is enough, so the file is the same on every machine, byte
for byte; `tests/test_documents.py` runs the check.
"""

import pathlib
import sys
from collections.abc import Iterator
from xml.sax.saxutils import escape

OUT = pathlib.Path(__file__).with_suffix(".svg")
TOP, WIDTH, HEIGHT = 18, 1040, 536

# Sizes of the 3B model for one hour of video; see hourjax/README.md, Model.
FRAMES = 3600
TOKENS = 65  # of a frame: 8 x 8 and a newline
KEPT_FRAMES = 512
KEPT_TOKENS = 17  # of a kept frame: 16 and the newline

INK, MUTED, LINE = "#1c2733", "#5a6a7a", "#8496a8"
MEMORY, KEPT, NEWLINE = "#cfdeec", "#1f6aa8", "#f0b95b"
KEPT_NEWLINE, WORD, OUTPUT = "#d9861a", "#6d9f71", "#7a4fa3"
BOX, FROZEN = "#f3f6fa", "#e4eaf1"


def text(
  x: float,
  y: float,
  words: str,
  *,
  size: int = 13,
  colour: str = INK,
  anchor: str = "middle",
  bold: bool = False,
) -> str:
  """Returns one line of text whose baseline is at y."""
  weight = ' font-weight="bold"' if bold else ""
  return (
    f'<text x="{x:g}" y="{y:g}" font-size="{size}" fill="{colour}"'
    f' text-anchor="{anchor}"{weight}>{escape(words)}</text>'
  )


def box(
  x: float,
  y: float,
  width: float,
  height: float,
  *,
  fill: str = BOX,
  stroke: str = LINE,
  radius: float = 8,
) -> str:
  """Returns a rectangle with round corners."""
  return (
    f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}"'
    f' rx="{radius:g}" fill="{fill}" stroke="{stroke}"/>'
  )


def cell(x: float, y: float, fill: str, size: float = 9) -> str:
  """Returns a small square that stands for one token."""
  return (
    f'<rect x="{x:g}" y="{y:g}" width="{size:g}" height="{size:g}" rx="1.5"'
    f' fill="{fill}"/>'
  )


def arrow(*points: tuple[float, float], colour: str = INK) -> str:
  """Returns a line through the points with a head at the last one."""
  path = " ".join(f"{x:g},{y:g}" for x, y in points)
  return (
    f'<polyline points="{path}" fill="none" stroke="{colour}"'
    ' stroke-width="1.6" marker-end="url(#head)"/>'
  )


def frames(x: float, y: float) -> Iterator[str]:
  """Yields a stack of frames, the nearest of which shows a ball on a field."""
  width, height, step = 62, 44, 12
  for i in reversed(range(5)):
    left, top = x + step * i, y + step * i
    yield box(left, top, width, height, fill="#dfeaf5", radius=3)
    yield (
      f'<rect x="{left + 1:g}" y="{top + 29:g}" width="{width - 2}"'
      f' height="{height - 30}" fill="#b9cfae"/>'
    )
  # The nearest frame is drawn last, with what it shows.
  yield f'<circle cx="{x + 22:g}" cy="{y + 24:g}" r="8" fill="#c8543f"/>'


def memory(x: float, y: float) -> Iterator[str]:
  """Yields the memory: a column of tokens and a newline for each frame.

  Kept tokens are dark. In the figure every fourth frame is kept, with 2 of its
  8 tokens, at places that differ from frame to frame.
  """
  kept = ((1, 4), (0, 6), (3, 5), (2, 7), (0, 3), (4, 6), (1, 7), (2, 5))
  for column in range(32):
    chosen = kept[column // 4] if column % 4 == 3 else ()
    left = x + 14 * column
    for row in range(8):
      yield cell(left, y + 12 * row, KEPT if row in chosen else MEMORY, 10)
    newline = KEPT_NEWLINE if chosen else NEWLINE
    yield cell(left, y + 12 * 8 + 3, newline, 10)


def strip(x: float, y: float, colours: str, step: float = 13) -> Iterator[str]:
  """Yields tokens side by side; a letter of `colours` is one token."""
  names = {"w": WORD, "k": KEPT, "n": KEPT_NEWLINE, "o": OUTPUT}
  for i, letter in enumerate(colours):
    yield cell(x + step * i, y, names[letter], 10)


def legend(x: float, y: float) -> Iterator[str]:
  """Yields what the colours of the tokens mean."""
  entries = (
    (MEMORY, "memory token", 108),
    (KEPT, "kept token", 92),
    (NEWLINE, "newline token", 112),
    (WORD, "word", 58),
    (OUTPUT, "output of MemAug", 0),
  )
  for colour, words, width in entries:
    yield cell(x, y - 9, colour, 10)
    yield text(x + 15, y, words, size=12, colour=MUTED, anchor="start")
    x += width + 16


def upper_half() -> Iterator[str]:
  """Yields the way from frames to the memory."""
  tokens = FRAMES * TOKENS
  yield from frames(28, 66)
  yield text(83, 187, "video, one frame", size=12, colour=MUTED)
  yield text(83, 203, "a second", size=12, colour=MUTED)
  yield arrow((146, 112), (180, 112))
  yield box(184, 72, 148, 84, fill=FROZEN)
  yield text(258, 100, "Vision tower", bold=True)
  yield text(258, 119, "SigLIP so400m", size=12)
  yield text(258, 137, "27×27 → 8×8 tokens", size=12)
  yield text(258, 187, "features are stored:", size=12, colour=MUTED)
  yield text(258, 203, "531 MB an hour", size=12, colour=MUTED)
  yield arrow((334, 112), (366, 112))
  yield box(370, 72, 110, 84)
  yield text(425, 108, "Projector", bold=True)
  yield text(425, 127, "1152 → D", size=12)
  yield arrow((482, 112), (518, 112))
  yield box(524, 36, 492, 178, fill="#ffffff")
  yield text(540, 62, "Memory repository", anchor="start", bold=True)
  yield text(
    1000,
    62,
    f"one hour: {FRAMES:,} frames × {TOKENS} = {tokens:,} tokens",
    size=12,
    colour=MUTED,
    anchor="end",
  )
  yield from memory(547, 80)


def lower_half() -> Iterator[str]:
  """Yields the way from kept tokens and the question to the answer."""
  kept = KEPT_FRAMES * KEPT_TOKENS
  # Forgetting: from the kept tokens to the queries.
  yield arrow((560, 216), (560, 248), (133, 248), (133, 309))
  yield box(216, 231, 284, 34, fill="#ffffff", radius=17)
  yield text(232, 253, "Forgetting", bold=True, anchor="start")
  yield text(
    484,
    253,
    f"{KEPT_FRAMES} frames, {KEPT_TOKENS} tokens each",
    size=12,
    anchor="end",
  )
  yield box(24, 313, 218, 78, fill="#ffffff")
  yield text(133, 337, "Queries", bold=True)
  yield from strip(42, 348, "wwkknkknkknkknww", 11.6)
  yield text(133, 379, f"{kept:,} kept tokens and the words", size=12,
             colour=MUTED)  # fmt: skip
  yield arrow((244, 352), (276, 352))

  # MemAug.
  yield box(280, 286, 476, 132)
  yield text(298, 311, "MemAug, 4 blocks", bold=True, anchor="start")
  for left, name, note in (
    (298, "Self-attention", "of the queries"),
    (454, "Cross-attention", "to all the memory"),
    (610, "MLP", ""),
  ):
    yield box(left, 324, 128, 56, fill="#ffffff")
    yield text(left + 64, 348 if note else 357, name)
    if note:
      yield text(left + 64, 367, note, size=11, colour=MUTED)
  yield arrow((428, 352), (450, 352))
  yield arrow((584, 352), (606, 352))
  yield text(518, 404, "neither attention is causal; LayerNorm after each part",
             size=11, colour=MUTED)  # fmt: skip
  yield arrow((660, 216), (660, 268), (518, 268), (518, 320))
  yield text(674, 248, "keys and values of every token", size=12,
             colour=MUTED, anchor="start")  # fmt: skip

  # Decoder.
  yield arrow((758, 352), (794, 352))
  yield box(798, 286, 218, 132)
  yield text(907, 313, "Decoder", bold=True)
  yield text(907, 332, "Qwen2.5-3B or Qwen2-7B", size=12)
  yield from strip(814, 352, "wwooooooooooww", 13.5)
  yield text(907, 385, "words, with MemAug's outputs", size=11, colour=MUTED)
  yield text(907, 402, "in the place of the video", size=11, colour=MUTED)
  yield arrow((907, 420), (907, 452))
  yield box(822, 456, 170, 36, fill="#ffffff", radius=18)
  yield text(907, 479, "“Blue.”", size=14)

  # The question goes to the queries and to the decoder.
  yield box(24, 448, 288, 52, fill="#ffffff", radius=18)
  yield text(168, 470, "“What colour is the lantern", size=13)
  yield text(168, 488, "that appears briefly?”", size=13)
  yield arrow((133, 446), (133, 395))
  yield arrow((314, 474), (778, 474), (778, 392), (794, 392))


def figure() -> str:
  """Returns the whole figure as the text of an SVG file."""
  head = (
    '<svg xmlns="http://www.w3.org/2000/svg"'
    f' viewBox="0 {TOP} {WIDTH} {HEIGHT}"'
    f' width="{WIDTH}" height="{HEIGHT}"'
    ' font-family="Helvetica, Arial, DejaVu Sans, sans-serif" role="img">'
  )
  title = (
    "<title>Hour-LLaVA: every frame of a video is kept in a memory;"
    " forgetting chooses the tokens that the decoder will read; MemAug lets"
    " them and the question attend to the whole memory.</title>"
  )
  marker = (
    '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4"'
    ' markerWidth="6.5" markerHeight="6.5" orient="auto">'
    f'<path d="M0,0 L8,4 L0,8 z" fill="{INK}"/></marker></defs>'
  )
  parts = [
    head,
    title,
    marker,
    # A ground of its own: readers may have a dark page.
    f'<rect y="{TOP}" width="{WIDTH}" height="{HEIGHT}" rx="10" fill="white"/>',
    *upper_half(),
    *lower_half(),
    *legend(208, 538),
    "</svg>",
  ]
  return "\n".join(parts) + "\n"


def main(arguments: list[str]) -> int:
  """Writes the figure, or with --check compares it with the file."""
  if arguments == ["--check"]:
    return int(OUT.read_text(encoding="utf-8") != figure())
  OUT.write_text(figure(), encoding="utf-8")
  return 0


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
