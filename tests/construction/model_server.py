"""A server on localhost that plays the models of a construction.

It speaks the chat completions of OpenAI's protocol. As captioner it looks at
the frames: it finds the demo video and the seconds that they are of. As writer
and judge it answers from that video's script, whose name its captions carry.
It misbehaves on demand.
"""

import asyncio
import base64
import collections
import contextlib
import dataclasses
import io
import json
import random
import re
import threading
from collections.abc import Callable, Iterator, Sequence

import av
import numpy as np
from PIL import Image

from hourjax.data.demo import build, drawing, world
from hourjax.data.demo.questions import QUESTION_MAKERS
from hourjax.data.demo.script import Script

_SIDE = 8  # of the thumbnails that frames are compared by
_STAGES = {
  "Divide the video into its events": "events",
  "An event of a video is called": "event",
  "Describe the whole video": "video",
  "Write questions about this video": "questions",
  "that you cannot see": "blind",
  "Check every option against the text": "judge",
}
Fault = Callable[["Request"], "Response | None"]


@dataclasses.dataclass
class Request:
  """What was asked."""

  body: dict
  headers: dict[str, str]
  number: int  # of all requests
  tries: int  # of the same call before this one

  @property
  def text(self) -> str:
    """The text of the first request of the chat."""
    content = self.body["messages"][1]["content"]
    if isinstance(content, str):
      return content
    return next(part["text"] for part in content if part["type"] == "text")

  @property
  def stage(self) -> str:
    content = self.body["messages"][1]["content"]
    if not isinstance(content, str):
      return "caption"
    return next(s for sign, s in _STAGES.items() if sign in content)

  @property
  def again(self) -> int:
    """How often it was asked anew for an answer that can be used."""
    return (len(self.body["messages"]) - 2) // 2


@dataclasses.dataclass
class Response:
  status: int = 200
  body: bytes = b""
  headers: dict[str, str] = dataclasses.field(default_factory=dict)
  wait: float = 0.0  # seconds
  cut: int | None = None  # bytes after which the connection ends


def completion(
  text: str | None, finish: str = "stop", tokens: tuple[int, int] = (100, 20)
) -> Response:
  """An answer of this text."""
  message = {"role": "assistant", "content": text}
  value = {
    "id": "x",
    "object": "chat.completion",
    "created": 0,
    "model": "m",
    "choices": [{"index": 0, "message": message, "finish_reason": finish}],
    "usage": {
      "prompt_tokens": tokens[0],
      "completion_tokens": tokens[1],
      "total_tokens": sum(tokens),
    },
  }
  return Response(body=json.dumps(value).encode())


def refusal(status: int, message: str = "no", **headers: str) -> Response:
  """An error of this status."""
  body = json.dumps({"error": {"message": message, "type": "error"}}).encode()
  named = {name.replace("_", "-"): value for name, value in headers.items()}
  return Response(status, body, named)


class ModelServer:
  """Plays the models.

  Attributes:
    url: of the endpoint.
    fault: looks at each request first, and may answer it.
    player: answers the others.
    wait: seconds until an answer.
    paid: answers that were computed, by the call's idempotency key: a repeated
      call gets the same answer for free, as at a server that knows the header.
    stages: requests by stage.
    authorizations: that were sent.
    bodies: the first request of each stage.
  """

  def __init__(self, player: Callable[[Request], Response]):
    self.player = player
    self.fault: Fault = lambda request: None
    self.wait = 0.0
    self.paid: collections.Counter[str] = collections.Counter()
    self.stages: collections.Counter[str] = collections.Counter()
    self.authorizations: set[str] = set()
    self.bodies: dict[str, dict] = {}
    self.asked: collections.Counter[str] = collections.Counter()
    self.busy = self.most_busy = 0
    self._kept: dict[str, Response] = {}
    self.url = ""
    self._number = 0

  async def serve(
    self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
  ) -> None:
    try:
      while await self._one(reader, writer):
        pass
    except (ConnectionError, asyncio.IncompleteReadError):
      pass
    finally:
      writer.close()

  async def _one(
    self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
  ) -> bool:
    head = await reader.readuntil(b"\r\n\r\n")
    first, *lines = head.decode().split("\r\n")
    headers = {
      name.lower(): value.strip()
      for name, _, value in (line.partition(":") for line in lines if line)
    }
    size = int(headers.get("content-length", 0))
    body = await reader.readexactly(size)
    self.busy += 1
    self.most_busy = max(self.busy, self.most_busy)
    try:
      response = await self._respond(first, headers, body)
    finally:
      self.busy -= 1
    text = response.body
    named = {
      "content-type": "application/json",
      "content-length": str(len(text)),
      **response.headers,
    }
    out = f"HTTP/1.1 {response.status} X\r\n".encode()
    out += "".join(f"{k}: {v}\r\n" for k, v in named.items()).encode()
    out += b"\r\n" + text
    if response.cut is not None:
      writer.write(out[: len(out) - len(text) + response.cut])
      await writer.drain()
      return False
    writer.write(out)
    await writer.drain()
    return True

  async def _respond(
    self, first: str, headers: dict[str, str], body: bytes
  ) -> Response:
    if first.startswith("GET /v1/models "):
      return Response(body=b'{"object": "list", "data": []}')
    if not first.startswith("POST /v1/chat/completions "):
      return refusal(404, f"no route {first}")
    key = headers.get("idempotency-key", str(self._number))
    request = Request(json.loads(body), headers, self._number, self.asked[key])
    self._number += 1
    self.asked[key] += 1
    self.authorizations.add(headers.get("authorization", ""))
    self.stages[request.stage] += 1
    self.bodies.setdefault(request.stage, request.body)
    response = self.fault(request)
    if response is None and key in self._kept:
      response = self._kept[key]
    elif response is None:
      response = self._kept[key] = self.player(request)
      self.paid[key] += 1
    wait = response.wait or self.wait * random.random()
    if wait:
      await asyncio.sleep(wait)
    return response


@contextlib.contextmanager
def running(
  player: Callable[[Request], Response], port: int = 0
) -> Iterator[ModelServer]:
  """A server that answers until the block ends, on any free port by default."""
  server = ModelServer(player)
  loop = asyncio.new_event_loop()
  started = threading.Event()

  async def main() -> None:
    connections: set[asyncio.Task] = set()

    async def serve(reader, writer) -> None:
      connections.add(asyncio.current_task())
      await server.serve(reader, writer)

    listening = await asyncio.start_server(
      serve, "127.0.0.1", port, limit=2**26
    )
    own = listening.sockets[0].getsockname()[1]
    server.url = f"http://127.0.0.1:{own}/v1"
    started.set()
    try:
      await asyncio.Event().wait()
    finally:
      listening.close()
      for each in connections:
        each.cancel()
      await asyncio.gather(*connections, return_exceptions=True)

  def run() -> None:
    with contextlib.suppress(asyncio.CancelledError):
      loop.run_until_complete(task)
    loop.close()

  task = loop.create_task(main())
  thread = threading.Thread(target=run, daemon=True)
  thread.start()
  assert started.wait(10)
  try:
    yield server
  finally:
    loop.call_soon_threadsafe(task.cancel)
    thread.join(10)


class Player:
  """Plays captioner, writer and judge from the scripts of demo videos."""

  def __init__(self, scripts: Sequence[Script], *, filling: bool = True):
    """Draws every frame of the videos, as a thumbnail.

    Args:
      scripts: of the videos.
      filling: whether tasks of which the demo has too few questions get others;
        if not, their answer has another number than was asked for.
    """
    self._filling = filling
    self._scripts = {script.name: script for script in scripts}
    # Of what it has written: the options that are right, by question.
    self.right: dict[tuple[str, str], set[str]] = {}
    self._names = list(self._scripts)
    longest = max(script.duration for script in scripts)
    self._seen = np.zeros((len(scripts), longest, _SIDE, _SIDE, 3), np.uint8)
    for number, script in enumerate(scripts):
      frames = [
        drawing.frame(script, second) for second in range(script.duration)
      ]
      self._seen[number, : len(frames)] = _thumbnails(np.stack(frames))
    self._lock = threading.Lock()

  def __call__(self, request: Request) -> Response:
    answer = getattr(self, f"_{request.stage}")(request)
    text = json.dumps(answer)
    return completion(text, tokens=(len(request.text) // 4, len(text) // 4))

  def _script(self, request: Request) -> Script:
    """The script whose name the captions carry."""
    names = re.findall(r"slate (\w+)", request.text)
    # Two videos may look the same for half a minute.
    return self._scripts[collections.Counter(names).most_common(1)[0][0]]

  def _caption(self, request: Request) -> dict:
    frames = _thumbnails(np.stack(_frames(request)))
    start, end = map(
      _seconds,
      re.search(r"from ([\d:]+) to ([\d:]+) of", request.text).groups(),
    )
    count = len(frames)
    times = start + (np.arange(count) + 0.5) * (end - start) / count
    seconds = np.minimum(times.astype(int), self._seen.shape[1] - 1)
    seen = self._seen[:, seconds].astype(np.int16)
    wrong = np.abs(seen - frames.astype(np.int16)).mean((1, 2, 3, 4))
    assert wrong.min() < 12, f"no video looks like this one ({wrong.min()})"
    script = self._scripts[self._names[int(wrong.argmin())]]
    scenes = [s for s in script.scenes if s.start < end and s.end > start]
    told = " Then ".join(f"the {scene.title} is seen." for scene in scenes)
    return {
      "temporality": f"In these seconds {told}",
      "spatiality": " and ".join(
        f"the {scene.kind} is at the {scene.spot}" for scene in scenes
      ),
      "object": " and ".join(f"there is a {s.actor}" for s in scenes),
      "action": " and ".join(f"it is {scene.action}" for scene in scenes),
      "scene": "This is in "
      + " and in ".join(f"the {s.place}" for s in scenes),
      "summary": f"On the slate {script.name} that is seen {told}",
    }

  def _events(self, request: Request) -> dict:
    script = self._script(request)
    return {
      "events": [
        {"title": f"The {s.title}", "start": s.start, "end": s.end}
        for s in script.scenes
      ]
    }

  def _event(self, request: Request) -> dict:
    title = re.search(r'is called "(.*?)"', request.text)[1]
    return {"description": f"On the slate {self._script(request).name} it is"
            f" seen that {title} for a while."}  # fmt: skip

  def _video(self, request: Request) -> dict:
    script = self._script(request)
    told = ", then ".join(f"the {scene.title}" for scene in script.scenes)
    return {"description": f"On the slate {script.name} one sees {told}."}

  def _questions(self, request: Request) -> dict:
    script = self._script(request)
    several = "multiple-choice questions with" in request.text
    found = []
    asked = re.findall(r"^(\w+) \((\d+) questions", request.text, re.M)
    for task, count in asked:
      found += self._questions_of(script, task, int(count), several)
    for item in found:
      self.right[script.name, item["question"]] = {item["answer"]}
    return {"questions": self.change(script, found) if several else found}

  def change(self, script: Script, questions: list[dict]) -> list[dict]:
    """Changes multiple-choice questions; a subclass plants faults."""
    return questions

  def _questions_of(
    self, script: Script, task: str, count: int, several: bool
  ) -> list[dict]:
    """Questions of a task, such as the demo's own."""
    rng = np.random.default_rng([*f"{script.name} {task} {several}".encode()])
    found: dict[str, dict] = {}
    makers = QUESTION_MAKERS.get(task, ())
    for number in range(12 * count):
      if len(found) == count or not makers:
        break
      made = makers[0](script, rng, number % 2 == 0)
      if made is None or made.text in found:
        continue
      item = {"task": task, "question": made.text, "answer": made.answer}
      if several:
        if len(made.wrong) < 3:
          continue
        wrong = [made.wrong[i] for i in rng.permutation(len(made.wrong))[:3]]
        item["options"] = [made.answer, *wrong]
      found[made.text] = item
    while len(found) < count and self._filling:
      filler = self._filler(script, task, len(found), several)
      found[filler["question"]] = filler
    return list(found.values())

  def _filler(
    self, script: Script, task: str, number: int, several: bool
  ) -> dict:
    """A question where the demo has none of this task."""
    scene = script.scenes[number % len(script.scenes)]
    item = {
      "task": task,
      "question": f"For {task} number {number}: where does the {scene.actor} of"
      f" part {number + 1} stand?",
      "answer": scene.place,
    }
    if several:
      others = [place for place in world.PLACES if place != scene.place]
      item["options"] = [scene.place, *others[:3]]
    return item

  def _blind(self, request: Request) -> dict:
    """Knows nothing, and guesses."""
    with self._lock:
      return {"answer": random.Random(request.text).choice("ABCD")}

  def _judge(self, request: Request) -> dict:
    """Knows which options are right."""
    text, options = read_question(request.text)
    right = self.right[self._script(request).name, text]
    letters = [letter for letter, text in options.items() if text in right]
    return {"reason": "It is so in the text.", "right": letters}


def read_question(prompt: str) -> tuple[str, dict[str, str]]:
  """The question and the options of a prompt of a check."""
  body = prompt.partition("A question about this video:\n\n")[2] or prompt
  text = re.split(r"\n(?=[A-D]\. )", body)[0].strip()
  options = dict(re.findall(r"^([A-D])\. (.*)$", body, re.M))
  return text.rpartition("\n")[2], options


def _thumbnails(frames: np.ndarray) -> np.ndarray:
  """Means over squares of the frames, [F, _SIDE, _SIDE, 3]."""
  count, height, width, _ = frames.shape
  rows, columns = height // _SIDE, width // _SIDE
  kept = frames[:, : rows * _SIDE, : columns * _SIDE].astype(np.float32)
  shape = (count, _SIDE, rows, _SIDE, columns, 3)
  return kept.reshape(shape).mean((2, 4))


def _frames(request: Request) -> list[np.ndarray]:
  """The frames of a message, of images or of a video."""
  found = []
  for part in request.body["messages"][1]["content"]:
    if part["type"] == "text":
      continue
    url = part[part["type"]]["url"]
    data = io.BytesIO(base64.b64decode(url.partition("base64,")[2]))
    if part["type"] == "image_url":
      found.append(np.asarray(Image.open(data).convert("RGB")))
      continue
    with av.open(data) as container:
      found += [f.to_ndarray(format="rgb24") for f in container.decode(video=0)]
  return found


def _seconds(text: str) -> int:
  """Seconds of "1:05"."""
  total = 0
  for part in text.split(":"):
    total = 60 * total + int(part)
  return total


def scripts_of(videos: int, seed: int = 0) -> list[Script]:
  """The scripts of the demo's first training videos."""
  options = build.Options(seed=seed, train_videos=videos)
  return options.scripts()["train"]
