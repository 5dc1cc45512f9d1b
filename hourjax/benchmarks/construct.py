"""How fast a construction calls, and what it takes to keep a large one's books.

An endpoint in another process answers at once, so what is measured is the
sender. A second figure has frames in its calls, which are much larger.

Then the store of a construction of 28,000 videos of 21 minutes is written, with
1.2 million captions, and the real command is started on it: until its first
call it has read the list of videos and found out which are left.
"""

import asyncio
import concurrent.futures
import contextlib
import dataclasses
import os
import pathlib
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import Any

import numpy as np

from hourjax import processes, progress
from hourjax.benchmarks.figures import peak_mib
from hourjax.construction import checks, clips
from hourjax.construction.asking import Asker, VideoAnswers
from hourjax.construction.call_store import CallStore, Reply
from hourjax.construction.clips import ClipOptions
from hourjax.construction.costs import Prices, Tally
from hourjax.construction.endpoint import Endpoint, Gate
from hourjax.construction.options import ModelName, Options
from hourjax.construction.pipeline import Constructor
from hourjax.construction.prompts import Prompts
from hourjax.construction.tasks import read_tasks
from hourjax.data.demo import drawing
from hourjax.data.demo.script import make_script
from hourjax.data.media.video_probe import VideoInfo

_SECONDS = 1260  # of a video, 42 clips
_AT_A_TIME = 32  # calls, and videos
_BATCH = 20_000  # answers that are written together
_PATIENCE = 300  # seconds for a start


@dataclasses.dataclass(frozen=True)
class Sizes:
  """Holds how much is measured.

  Attributes:
    videos: that calls are made for, without frames.
    videos_with_frames: the same with frames.
    stored: videos of the store that the command is started on.
    left: of these, videos that are not done.
  """

  videos: int = 40
  videos_with_frames: int = 10
  stored: int = 28_000
  left: int = 100


def measure_construct(
  folder: pathlib.Path, sizes: Sizes | None = None
) -> dict[str, Any]:
  """Measures calls and bookkeeping.

  Args:
    folder: for temporary files.
    sizes: how much is measured.

  Returns:
    Figures by name.
  """
  sizes = sizes or Sizes()
  found: dict[str, Any] = {}
  with _instant_endpoint() as url:
    for name, videos, frames in (
      ("calls without frames", sizes.videos, False),
      ("calls with frames", sizes.videos_with_frames, True),
    ):
      out = folder / name.replace(" ", "_")
      out.mkdir()
      with progress.step(f"measuring {name}"):
        found[name] = asyncio.run(_measure_calls(out, url, videos, frames))
    found["this process, MiB"] = round(peak_mib())
  found["bookkeeping"] = _measure_start(folder, sizes)
  return found


@contextlib.contextmanager
def _instant_endpoint() -> Iterator[str]:
  """Starts an endpoint in another process; gives its address."""
  command = processes.module_command("hourjax.benchmarks.instant_endpoint")
  with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
    assert server.stdout is not None
    try:
      yield f"http://127.0.0.1:{int(server.stdout.readline())}/v1"
    finally:
      server.kill()


def _options(url: str) -> Options:
  """Returns the default options, with instant models."""
  model = ModelName("instant", url)
  models = dict.fromkeys(("captioner", "writer", "judge"), model)
  return Options(ClipOptions(), models)


async def _measure_calls(
  out: pathlib.Path, url: str, videos: int, with_frames: bool
) -> dict[str, Any]:
  """Takes videos through all stages; returns the rate of calls."""
  options, prompts, tasks = _options(url), Prompts(), read_tasks()
  tally = Tally({}, Prices({}))
  endpoint = Endpoint(
    options.models["writer"], role="writer", gate=Gate(_AT_A_TIME)
  )
  endpoints = dict.fromkeys(options.models, endpoint)
  asker = Asker(endpoints, prompts, tally)
  part = clips.image_part(
    np.random.default_rng(0).integers(0, 255, (252, 448, 3), np.uint8)
  )

  def decode(
    path: pathlib.Path,
    info: VideoInfo,
    spans: Sequence[tuple[float, float]],
    clip: ClipOptions,
  ) -> Iterator[list[dict[str, Any]]]:
    del path, info
    count = round(clip.rate * clip.seconds) if with_frames else 0
    return iter([[part] * count] * len(spans))

  info = VideoInfo(_SECONDS, Fraction(1), float(_SECONDS), 448, 252)
  with (
    CallStore(out) as store,
    concurrent.futures.ThreadPoolExecutor(1) as pool,
  ):
    constructor = Constructor(
      asker,
      tasks,
      options,
      checks.Benchmarks(),
      pool,
      ahead=_AT_A_TIME + 8,
      decode=decode,
    )
    queue = iter(range(videos))

    async def work() -> None:
      for number in queue:
        name = f"{number}.mp4"
        row = await store.add_video(name, 0, 0, name, {"duration": _SECONDS})
        video = VideoAnswers(store, name, row, name)
        state, result = await constructor.construct(out / name, info, video)
        assert state == "done", result
        await store.put_result(row, "plan", state, result)

    began = time.monotonic()
    await asyncio.gather(*(work() for _ in range(_AT_A_TIME)))
    seconds = time.monotonic() - began
    calls = sum(spent.calls for spent in tally.spent.values())
    await endpoint.close()
  return {
    "calls": round(calls),
    "calls a video": round(calls / videos),
    "calls a second": round(calls / seconds),
    "database, KiB a video": round(_size(out) / videos / 1024, 1),
  }


def _size(out: pathlib.Path) -> int:
  """Returns the bytes of the databases in a folder."""
  return sum(path.stat().st_size for path in out.glob("*.sqlite*"))


def _measure_start(folder: pathlib.Path, sizes: Sizes) -> dict[str, Any]:
  """Starts the command on the store of a large construction."""
  videos, out = folder / "many", folder / "books"
  out.mkdir()
  (videos / "0").mkdir(parents=True)
  first = videos / "0" / "0.mp4"
  # Of those that are left the file is read, so it must be a video.
  drawing.write_video(first, make_script(0, "train", 1, (130, 130)))
  names = ["0/0.mp4"]
  with progress.step("writing the store of a large construction"):
    for number in range(1, sizes.stored):
      name = f"{number // 1000}/{number}.mp4"
      (videos / name).parent.mkdir(exist_ok=True)
      os.link(first, videos / name)
      names.append(name)
    began = time.monotonic()
    answers = asyncio.run(_fill(out, first, names, sizes.left))
    filled = time.monotonic() - began
  found = {
    "videos": len(names),
    "answers": answers,
    "answers written a second": round(answers / filled),
    "database, GiB": round(_size(out) / 2**30, 3),
  }
  return found | _start(videos, out)


async def _fill(
  out: pathlib.Path, first: pathlib.Path, names: Sequence[str], left: int
) -> int:
  """Writes captions of all videos, and results of all but some."""
  plan = _options("").plan(
    Prompts().digest, read_tasks(), checks.Benchmarks().digest
  )
  about = first.stat()
  texts = [_caption(i) for i in range(997)]
  rng = np.random.default_rng(0)
  written = 0
  with CallStore(out) as store:
    waiting: list[Any] = []
    for number, name in enumerate(names):
      row = await store.add_video(
        name,
        about.st_size,
        about.st_mtime_ns,
        "stamp",
        {"duration": float(_SECONDS), "frames": _SECONDS, "fps": "1"},
      )
      spans = clips.cut(_SECONDS, ClipOptions().seconds)
      for place, key in enumerate(rng.bytes(16) for _ in spans):
        reply = Reply(texts[(number + place) % len(texts)], False, 3000, 300, 2)
        waiting.append(store.put_answer(row, key, "caption", "instant", reply))
        written += 1
      if number >= left:
        waiting.append(store.put_result(row, plan, "done", {"questions": []}))
      if len(waiting) >= _BATCH:
        await asyncio.gather(*waiting)
        waiting = []
    await asyncio.gather(*waiting)
  return written


def _caption(number: int) -> str:
  """Returns a caption of usual length, different for each number."""
  rng = np.random.default_rng(number)
  words = [f"word{i}" for i in rng.integers(0, 3000, 220)]
  return " ".join(words)


def _start(videos: pathlib.Path, out: pathlib.Path) -> dict[str, Any]:
  """Starts the command; returns what it took until its first call."""
  with socket.create_server(("127.0.0.1", 0)) as listening:
    listening.settimeout(_PATIENCE)
    model = f"instant@http://127.0.0.1:{listening.getsockname()[1]}/v1"
    command = processes.module_command(
      "hourjax.construct",
      f"--videos={videos}",
      f"--out={out}",
      f"--captioner={model}",
      f"--writer={model}",
      "--sample=0",
    )
    began = time.monotonic()
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
      try:
        listening.accept()[0].close()
        seconds = time.monotonic() - began
        peak = peak_mib(process.pid)
      finally:
        process.kill()
  return {"to the first call, s": round(seconds, 1), "MiB": round(peak)}
