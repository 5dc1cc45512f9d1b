import av
import numpy as np
import pytest
from PIL import Image

from hourjax.data.demo.tokenizer import write_tokenizer

WORDS = ("what is", "shown in the", "video?", "a cat,", "12 dogs\nand Ünder")


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp("tokenizer")
  write_tokenizer(folder, WORDS)
  return folder


@pytest.fixture(scope="session")
def media(tmp_path_factory):
  """Videos of 2 and 4 s at 5 FPS, a broken one, images; read only."""
  folder = tmp_path_factory.mktemp("media")
  (folder / "in").mkdir()
  for name, seconds in (("a.mp4", 2), ("in/b ü.mp4", 4)):
    with av.open(str(folder / name), "w") as container:
      stream = container.add_stream("mpeg4", rate=5)
      stream.width, stream.height, stream.pix_fmt = 32, 24, "yuv420p"
      for _ in range(5 * seconds):
        picture = np.random.randint(0, 255, (24, 32, 3), np.uint8)
        frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
        container.mux(stream.encode(frame))
      container.mux(stream.encode())
  (folder / "broken.mp4").write_bytes(b"no video")
  for name, size in (("i.png", (40, 30)), ("in/j.jpg", (7, 90))):
    Image.new("RGB", size).save(folder / name)
  (folder / "broken.png").write_bytes(b"no image")
  return folder
