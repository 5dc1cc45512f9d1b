"""An endpoint that answers every call of a construction at once.

  python -m hourjax.benchmarks.instant_endpoint

prints its port, and serves until its parent ends. Answers fit what is asked for
and say nothing, so that the calls cost their sender all that real ones would.
"""

import asyncio
import functools
import json
import re
import sys
from typing import Any

_SENTENCE = "This is what the people in it do with the things on the table. "
_TASK = re.compile(rb"\\n(\w+) \((\d+) questions")
_MARKS = (
  (b"Write questions about this video", "questions"),
  (b"Check every option against the text", "judge"),
  (b"that you cannot see", "blind"),
  (b"under six headings", "caption"),
  (b"Divide the video into its events", "events"),
)


@functools.cache
def _answer(stage: str, tasks: tuple[tuple[str, int], ...], open_: bool) -> Any:
  """Returns the value that answers a stage."""
  if stage == "caption":
    names = ("temporality", "spatiality", "object", "action", "scene")
    return dict.fromkeys((*names, "summary"), 3 * _SENTENCE)
  if stage == "events":
    return {
      "events": [
        {"title": f"The part {i} of it", "start": 150 * i, "end": 150 * (i + 1)}
        for i in range(8)
      ]
    }
  if stage == "blind":
    return {"answer": "A"}
  if stage == "judge":
    return {"reason": _SENTENCE, "right": ["A"]}
  if stage != "questions":
    return {"description": 8 * _SENTENCE}
  return {
    "questions": [
      {
        "task": task,
        "question": f"What is the {word} of the {task} that one sees?",
        "answer": f"The {task} {word} is on the right.",
      }
      | (
        {}
        if open_
        else {
          "options": [
            f"The {task} {word} is on the {side}."
            for side in ("right", "left", "top", "floor")
          ]
        }
      )
      for task, count in tasks
      for word in ("red", "old", "new", "big", "odd", "dry")[:count]
    ]
  }


@functools.cache
def _response(
  stage: str, tasks: tuple[tuple[str, int], ...], open_: bool
) -> bytes:
  """Returns a whole HTTP response."""
  text = json.dumps(_answer(stage, tasks, open_))
  message = {"role": "assistant", "content": text}
  body = json.dumps(
    {
      "id": "x",
      "object": "chat.completion",
      "created": 0,
      "model": "instant",
      "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
      "usage": {"prompt_tokens": 1000, "completion_tokens": 100},
    }
  ).encode()
  head = (
    "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n"
    f"content-length: {len(body)}\r\n\r\n"
  )
  return head.encode() + body


class _Protocol(asyncio.Protocol):
  """Reads requests of one connection, and answers them in turn."""

  def connection_made(self, transport: asyncio.BaseTransport) -> None:
    assert isinstance(transport, asyncio.Transport)
    self._transport = transport
    self._data = bytearray()
    self._wanted = 0

  def data_received(self, data: bytes) -> None:
    self._data += data
    while len(self._data) >= self._wanted:
      end = self._data.find(b"\r\n\r\n")
      if end < 0:
        return
      head = bytes(self._data[:end]).lower()
      size = int(head.partition(b"content-length:")[2].split(b"\r\n")[0])
      self._wanted = end + 4 + size
      if len(self._data) < self._wanted:
        return
      # The text of the request stands behind any frames.
      text = bytes(self._data[max(end, self._wanted - 2**18) : self._wanted])
      del self._data[: self._wanted]
      self._wanted = 0
      self._transport.write(_respond(text))


def _respond(text: bytes) -> bytes:
  """Returns the response to a request's text."""
  stage = next((name for mark, name in _MARKS if mark in text), "description")
  if stage != "questions":
    return _response(stage, (), True)
  tasks = tuple((n.decode(), int(count)) for n, count in _TASK.findall(text))
  several = b"multiple-choice questions with" in text
  return _response(stage, tasks, not several)


async def _serve() -> None:
  loop = asyncio.get_running_loop()
  server = await loop.create_server(_Protocol, "127.0.0.1", 0)
  print(server.sockets[0].getsockname()[1], flush=True)
  await server.serve_forever()


if __name__ == "__main__":
  try:
    asyncio.run(_serve())
  except KeyboardInterrupt:
    sys.exit(130)
