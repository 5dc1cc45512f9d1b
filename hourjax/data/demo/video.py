"""Writes a script's frames as a real .mp4 file."""

import os
import pathlib
from fractions import Fraction

import av

from hourjax.data.demo import draw
from hourjax.data.demo.script import Script

# A key frame a minute keeps seeking cheap and files small.
_CODEC = {"preset": "ultrafast", "crf": "20", "g": "60"}


def write_video(path: pathlib.Path, script: Script) -> None:
  """Writes one frame a second as H.264, 96 x 96 pixels, yuv420p.

  The file gets its name only when it is complete: a stopped run leaves at
  most a file that starts with a dot and ends in ".part".

  Args:
    path: of the video, in an existing folder.
    script: what it shows.
  """
  part = path.with_name(f".{path.name}.{os.getpid()}.part")
  try:
    _encode(part, script)
    os.replace(part, path)
  finally:
    part.unlink(missing_ok=True)


def _encode(path: pathlib.Path, script: Script) -> None:
  with av.open(str(path), "w", format="mp4") as container:
    stream = container.add_stream("libx264", rate=1, options=_CODEC)
    stream.width = stream.height = draw.SIDE
    stream.pix_fmt = "yuv420p"
    stream.codec_context.thread_count = 1
    stream.codec_context.time_base = Fraction(1, 1)
    for second in range(script.duration):
      picture = draw.frame(script, second)
      image = av.VideoFrame.from_ndarray(picture, format="rgb24")
      image.pts = second
      container.mux(stream.encode(image))
    container.mux(stream.encode())
