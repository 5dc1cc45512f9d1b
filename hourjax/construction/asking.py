"""Asking the models: from the store if they were asked before, within a budget.

An answer that cannot be used is given back to the model with what is wrong with
it. It was paid for as well, so it is kept like any other, and the next start
reads it and goes on behind it.
"""

import asyncio
import functools
import hashlib
import json
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, TypeVar

from hourjax.construction import answers
from hourjax.construction.answers import Answer, Unusable
from hourjax.construction.call_store import CallStore, Reply
from hourjax.construction.costs import BudgetSpent, Tally
from hourjax.construction.endpoint import Endpoint, EndpointError, Lost
from hourjax.construction.options import MAX_TOKENS, ROLE_OF
from hourjax.construction.prompts import Prompts

# A model that writes must vary; one that checks must not.
TEMPERATURE = {"questions": 0.7, "blind": 0.7}
_USUAL_TEMPERATURE = 0.2
_QUOTED = 4000  # characters of an unusable answer that are given back
Kind = TypeVar("Kind", bound=Answer)


class VideoAnswers:
  """Holds the stored answers about one video while it is worked on."""

  def __init__(self, store: CallStore, name: str, number: int, stamp: str):
    self.name, self.number, self.stamp = name, number, stamp
    self._store = store
    self._known = store.answers(name)

  def find(self, key: bytes) -> Reply | None:
    """Returns a stored answer."""
    return self._known.get(key)

  async def keep(
    self, key: bytes, stage: str, model: str, reply: Reply
  ) -> None:
    """Stores an answer."""
    await self._store.put_answer(self.number, key, stage, model, reply)
    self._known[key] = reply


@functools.cache
def _schema_of(kind: type[Answer]) -> dict[str, Any]:
  return answers.json_schema(kind)


class Asker:
  """Asks the models of all roles."""

  def __init__(
    self,
    endpoints: Mapping[str, Endpoint],
    prompts: Prompts,
    tally: Tally,
    *,
    again: int = 2,
    seed: int = 0,
    on_call: Callable[[str], None] = lambda stage: None,
  ):
    """Keeps what asking needs.

    Args:
      endpoints: by role.
      prompts: the templates.
      tally: counts calls.
      again: how often a model is asked anew for an answer that can be used.
      seed: of sampling.
      on_call: told the stage of each answer that is stored or asked for.
    """
    self.prompts, self.tally = prompts, tally
    self._endpoints, self._again, self._seed = endpoints, again, seed
    self._on_call = on_call
    self._stopped: EndpointError | None = None
    self._system = prompts.render("system", language="English")

  async def ask(
    self,
    video: VideoAnswers,
    stage: str,
    prompt: str,
    kind: type[Kind],
    *,
    check: Callable[[Kind], Kind] = lambda answer: answer,
    media: str = "",
    parts: Callable[[], Awaitable[list[dict[str, Any]]]] | None = None,
    sample: int = 0,
  ) -> Kind:
    """Returns an answer that can be used.

    Args:
      video: that is asked about.
      stage: one of STAGES.
      prompt: text of the request.
      kind: of answer.
      check: returns the answer, or raises Unusable.
      media: names what `parts` returns, for the key.
      parts: returns further parts of the message; awaited if the answer is not
        stored.
      sample: number of the answer, where several to one prompt are wanted.

    Raises:
      Unusable: no try could be used, or the endpoint refuses the request.
      Lost: the endpoint did not answer.
      BudgetSpent: there is no money for the call.
    """
    endpoint = self._endpoints[ROLE_OF[stage]]
    model = endpoint.model.name
    about = [model, stage, video.stamp, media, sample, self._seed]
    turns = [{"role": "user", "content": prompt}]
    shown: list[dict[str, Any]] | None = None
    for left in range(self._again, -1, -1):
      text = json.dumps([about, self._system, turns], ensure_ascii=False)
      digest = text.encode("utf-8", "surrogatepass")
      key = hashlib.blake2b(digest, digest_size=16).digest()
      reply = video.find(key)
      self._on_call(stage)
      if reply is None:
        if parts is not None and shown is None:
          shown = await parts()
        reply = await self._call(
          endpoint, stage, kind, turns, shown, key, sample
        )
        await video.keep(key, stage, model, reply)
      try:
        answer = answers.read(kind, reply.text, cut=reply.cut)
        return check(answer)
      except Unusable as problem:
        self.tally.failures[problem.kind] += 1
        if not left:
          raise
        again = self.prompts.render("again", problem=str(problem))
        said = reply.text[:_QUOTED] or "(nothing)"
        turns = [
          turns[0],
          {"role": "assistant", "content": said},
          {"role": "user", "content": again},
        ]
    raise AssertionError("the last try returns or raises")

  async def _call(
    self,
    endpoint: Endpoint,
    stage: str,
    kind: type[Answer],
    turns: list[dict[str, Any]],
    shown: list[dict[str, Any]] | None,
    key: bytes,
    sample: int,
  ) -> Reply:
    """Asks an endpoint, within the budget."""
    messages = [{"role": "system", "content": self._system}, *turns]
    if shown is not None:
      first = {"type": "text", "text": turns[0]["content"]}
      messages[1] = {"role": "user", "content": [*shown, first]}
    if self._stopped is not None:
      raise self._stopped
    self.tally.start(stage)
    reply = None
    try:
      reply = await endpoint.ask(
        messages,
        max_tokens=MAX_TOKENS[stage],
        schema=_schema_of(kind),
        temperature=TEMPERATURE.get(stage, _USUAL_TEMPERATURE),
        seed=self._seed + sample,
        key=key.hex(),
      )
      return reply
    except EndpointError as error:
      self._stopped = error  # calls that are under way may end
      raise
    finally:
      self.tally.end(stage, reply)


_AWAITED = (BudgetSpent, EndpointError, Lost)


async def gather(*jobs: Awaitable[Any]) -> list[Any]:
  """Awaits all jobs, and raises the first error among them.

  Where a call got no answer, or there is no money for it, the others are
  awaited first, so that what they are paid for is kept. After any other error
  they are cancelled; `asyncio.gather` would leave them running.
  """
  tasks = [asyncio.ensure_future(job) for job in jobs]
  pending = set(tasks)
  try:
    while pending:
      done, pending = await asyncio.wait(
        pending, return_when=asyncio.FIRST_EXCEPTION
      )
      for task in done:
        error = task.exception()
        if error is not None and not isinstance(error, _AWAITED):
          raise error
    return [task.result() for task in tasks]
  finally:
    for task in tasks:
      task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
