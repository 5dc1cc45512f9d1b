"""Models behind OpenAI-compatible endpoints: calls, bounded and retried.

A call is retried where waiting may help (429, 5xx, timeouts, cut connections)
and not where it cannot (400, 401, 404). The number of calls at a time falls
when the endpoint refuses some and rises again while it answers.

  429, or slow_down      limit *= 1/2, and nothing starts before Retry-After
  an answer              limit += 1 / limit, up to the most that is allowed
"""

import asyncio
import collections
import dataclasses
import email.utils
import json
import os
import random
import re
import time
from collections.abc import Collection
from typing import Any

import httpx2
import openai
import tenacity

from hourjax.construction.answers import Refused
from hourjax.construction.call_store import Reply
from hourjax.construction.options import COMMON_KEY, KEYS, ModelName
from hourjax.errors import UserError

# Of one call, while others get through: tries, without those that were refused
# for the rate, and seconds of waiting for the rate.
TRIES = 6
PATIENCE = 1800.0
LONGEST_WAIT = 60.0  # seconds between two tries, unless Retry-After says more
# Calls that failed for good with no answer between them, after which the
# endpoint is taken to be gone.
_GONE = 20
_START = 8  # calls at a time in the beginning
_MOST_BYTES = 32 * 2**20  # of a response
# Keys of a request that not every server takes, and how its refusal names them.
_OPTIONAL = {
  "response_format": r"response_format|json_schema|structured|guided|grammar"
  r"|schema",
  "temperature": "temperature",
  "seed": r"\bseed\b",
}


class EndpointError(UserError):
  """Says that an endpoint refuses or answers no call; what it said is kept."""


class Lost(Exception):
  """Says that a call got no answer, which another start may get."""


def key_of(role: str) -> str | None:
  """Returns the key of a role from the environment, None without one.

  Raises:
    UserError: it cannot be sent.
  """
  for name in (KEYS.format(role.upper()), COMMON_KEY):
    key = os.environ.get(name, "").strip()
    if key and not (key.isascii() and key.isprintable()):
      raise UserError(
        f"{name} holds characters that no key has, such as quotation marks of a"
        " text processor; copy the key anew"
      )
    if key:
      return key
  return None


class Gate:
  """Bounds the calls at a time, and adapts the bound."""

  def __init__(self, most: int):
    self.most = most
    self.limit = float(min(most, _START))
    self.busy = 0
    self._resume = 0.0
    self._halved = 0.0
    self._waiting: collections.deque[asyncio.Future] = collections.deque()
    self._timer: asyncio.TimerHandle | None = None

  async def __aenter__(self) -> None:
    if not self._waiting and self._free():
      self.busy += 1
      return
    loop = asyncio.get_running_loop()
    turn = loop.create_future()
    self._waiting.append(turn)
    self._wake()
    try:
      await turn
    except asyncio.CancelledError:
      if turn.done() and not turn.cancelled():  # its turn had come
        self.busy -= 1
        self._wake()
      raise

  async def __aexit__(self, *_: object) -> None:
    self.busy -= 1
    self._wake()

  def _free(self) -> bool:
    """Returns whether one more call may start."""
    return self.busy < int(self.limit) and time.monotonic() >= self._resume

  def _wake(self) -> None:
    """Starts as many of those that wait as there is room for."""
    while self._waiting and self._free():
      turn = self._waiting.popleft()
      if not turn.done():
        self.busy += 1
        turn.set_result(None)
    left = self._resume - time.monotonic()
    if self._waiting and left > 0 and self._timer is None:
      loop = asyncio.get_running_loop()
      self._timer = loop.call_later(left, self._resumed)

  def _resumed(self) -> None:
    self._timer = None
    self._wake()

  def slow_down(self, seconds: float, began: float) -> None:
    """Halves the bound, and starts nothing for some seconds.

    Of calls that were under way together, one refusal halves it.

    Args:
      seconds: that nothing starts for.
      began: time at which the refused call did, by `time.monotonic`.
    """
    now = time.monotonic()
    self._resume = max(self._resume, now + seconds)
    if began > self._halved:
      self._halved = now
      self.limit = max(1.0, self.limit / 2)

  def speed_up(self) -> None:
    """Raises the bound by one for as many answers as it is."""
    self.limit = min(float(self.most), self.limit + 1 / self.limit)


class Endpoint:
  """Asks one model.

  Attributes:
    model: name and address.
    failures: how often which fault was met, retried ones included.
  """

  def __init__(
    self,
    model: ModelName,
    *,
    role: str,
    gate: Gate,
    timeout: float = 600.0,
    tries: int = TRIES,
    first_wait: float = 1.0,
  ):
    """Prepares a client; nothing is sent.

    Args:
      model: name and address.
      role: that it was given for, "captioner", "writer" or "judge".
      gate: of all calls to this address.
      timeout: seconds after which a call counts as lost.
      tries: of a call that is not refused for the rate.
      first_wait: longest wait before the second try, in seconds; it doubles.
    """
    self.model = model
    self.failures: collections.Counter[str] = collections.Counter()
    self._role, self._gate = role, gate
    self._timeout, self._tries = timeout, tries
    self._first_wait = first_wait
    self._key = key_of(role)
    self._lost = self._refused = 0  # in a row
    self._answered = False
    self._without: set[str] = set()  # keys that the server does not take
    self._client = openai.AsyncOpenAI(
      api_key=self._key or "none",
      base_url=model.url,
      max_retries=0,
      timeout=timeout,
      http_client=openai.DefaultAioHttpClient(timeout=timeout),
    )

  async def close(self) -> None:
    """Closes the connections."""
    await self._client.close()

  async def ask(
    self,
    messages: list[dict[str, Any]],
    *,
    max_tokens: int,
    schema: dict[str, Any],
    temperature: float,
    seed: int,
    key: str,
  ) -> Reply:
    """Asks, and again where that may help.

    Args:
      messages: of the chat.
      max_tokens: limit of the answer.
      schema: JSON schema of the answer, for structured output.
      temperature: of sampling.
      seed: of sampling, where the server takes one.
      key: the same for the same call, so that a server that knows the header
        Idempotency-Key answers it once.

    Raises:
      Refused: the endpoint refuses this very request.
      Lost: no try got an answer.
      EndpointError: the endpoint refuses every request (key, model, quota), or
        no longer answers.
    """
    call = _Call(messages, max_tokens, schema, temperature, seed, key)
    retrying = tenacity.AsyncRetrying(
      retry=tenacity.retry_if_exception_type(_Temporary),
      wait=self._wait,
      stop=self._stop,
      reraise=True,
    )
    try:
      reply = await retrying(self._try, call)
    except Refused as error:
      self._refused += 1
      if self._refused >= _GONE:
        raise EndpointError(
          f"{error}; so were {self._refused} calls in a row, correct what it"
          " names"
        ) from None
      raise
    except _Temporary as error:
      self._lost += 1
      if self._lost >= _GONE:
        raise EndpointError(
          f"{self.model} no longer answers ({self._lost} calls in a row failed,"
          f" the last one: {error}); start again when it does"
        ) from None
      raise Lost(f"{self.model}: {error}") from None
    self._lost = self._refused = 0
    self._answered = True
    self._gate.speed_up()
    return reply

  def _wait(self, state: tenacity.RetryCallState) -> float:
    """Returns the seconds to wait before the next try."""
    error = state.outcome.exception() if state.outcome else None
    after = getattr(error, "retry_after", None)
    if after is not None:
      return after + random.uniform(0, 0.1 * after + 0.01)
    longest = min(
      LONGEST_WAIT, self._first_wait * 2 ** (state.attempt_number - 1)
    )
    return random.uniform(0.25 * longest, longest)

  def _stop(self, state: tenacity.RetryCallState) -> bool:
    """Returns whether a call is given up."""
    error = state.outcome.exception() if state.outcome else None
    if getattr(error, "rate", False):
      return (state.seconds_since_start or 0) > PATIENCE
    (call,) = state.args
    return call.failures >= self._tries

  async def _try(self, call: "_Call") -> Reply:
    """Sends a request, and counts what fails, but for the rate."""
    try:
      return await self._try_adapted(call)
    except _Temporary as error:
      call.failures += not error.rate
      raise

  async def _try_adapted(self, call: "_Call") -> Reply:
    """Sends a request, and once more without what the server does not know."""
    while True:
      try:
        async with self._gate:
          call.began = time.monotonic()
          async with asyncio.timeout(self._timeout):
            content = await self._send(call)
          seconds = time.monotonic() - call.began
          return self._read_response(content, seconds)
      except openai.APIStatusError as error:
        if self._is_adapted(call, error):
          continue
        raise self._worded(call, error) from None
      except (openai.APIConnectionError, TimeoutError) as error:
        raise self._unanswered(error) from None
      except _Temporary:
        self.failures["broken response"] += 1
        raise

  def _unanswered(self, error: Exception) -> "_Temporary":
    """Words a timeout or a connection that failed."""
    cause = error.__cause__
    # aiohttp's refused connections come as timeouts of connecting.
    refused = type(cause).__name__.startswith("Connect")
    if isinstance(error, openai.APITimeoutError | TimeoutError) and not refused:
      self.failures["timeout"] += 1
      return _Temporary(f"no answer in {self._timeout:g} s")
    self.failures["connection"] += 1
    return _Temporary(
      f"connection failed ({self._scrubbed(str(cause or error))})"
    )

  async def _send(self, call: "_Call") -> bytes:
    """Sends a request; returns the body of the response."""
    body = call.body(self.model.name, self._without)
    call.sent = frozenset(body)
    # `chat.completions.create` would walk through the types of all keys, and
    # make objects of the response, which takes most of the time of a call.
    response = await self._client.post(
      "/chat/completions",
      cast_to=httpx2.Response,
      body=body,
      options={"headers": {"Idempotency-Key": call.key}},
    )
    return response.content

  def _is_adapted(self, call: "_Call", error: openai.APIStatusError) -> bool:
    """Returns whether to ask anew, without a key that the server refuses."""
    if error.status_code not in (400, 422, 501):
      return False
    said = str(error)
    if "max_tokens" in call.sent and "max_completion_tokens" in said:
      self._without.add("max_tokens")
      return True
    for name, pattern in _OPTIONAL.items():
      if name in call.sent and re.search(pattern, said, re.IGNORECASE):
        if name not in self._without:
          print(f"{self.model} takes no {name}; it is left out", flush=True)
        self._without.add(name)
        return True
    return False

  def _worded(self, call: "_Call", error: openai.APIStatusError) -> Exception:
    """Words a status that is an error."""
    status, said = error.status_code, self._scrubbed(_message(error))
    self.failures[str(status)] += 1
    if status == 402 or "insufficient_quota" in str(error):
      return EndpointError(
        f"{self.model}: {status}, the quota is spent ({said}); raise it"
      )
    after = _retry_after(error)
    if status in (408, 409, 425, 429) or status >= 500:
      if after is not None and after > PATIENCE:
        return EndpointError(
          f"{self.model} asks to wait {after:,.0f} s ({said}); start again then"
        )
      if status == 429:
        self._gate.slow_down(after or 0.0, call.began)
      rate = status == 429
      return _Temporary(f"{status} ({said})", rate=rate, retry_after=after)
    name = KEYS.format(self._role.upper())
    # After answers, 403 is what some endpoints say of a single flagged request.
    if status == 401 or (status == 403 and not self._answered):
      what = "it wants a key" if self._key is None else "it refuses the key"
      return EndpointError(
        f"{self.model} (--{self._role}): {status}, {what} ({said}); set {name}"
        f" or {COMMON_KEY}"
      )
    if status in (404, 405):
      return EndpointError(
        f"{self.model}: {status} ({said}); correct the model's name, or the"
        f" address, which usually ends in /v1, in --{self._role}"
      )
    return Refused(f"{self.model} refuses the request: {status} ({said})")

  def _read_response(self, content: bytes, seconds: float) -> Reply:
    """Reads the body of a response.

    Raises:
      _Temporary: it is no chat completion.
    """
    if len(content) > _MOST_BYTES:
      raise _Temporary(f"a response of {len(content) / 2**20:.0f} MiB")
    try:
      value = json.loads(content)
      if value.get("error") and not value.get("choices"):
        said = value["error"]
        said = said.get("message", said) if isinstance(said, dict) else said
        raise _Temporary(f"an error as answer ({self._scrubbed(str(said))})")
      choices = value["choices"]
      usage = value.get("usage") or {}
      read = int(usage.get("prompt_tokens") or 0)
      written = int(usage.get("completion_tokens") or 0)
      if not choices:  # an empty answer, which is asked for again
        return Reply("", False, read, written, seconds)
      text = choices[0]["message"].get("content") or ""
      if isinstance(text, list):
        text = "".join(part.get("text", "") for part in text)
      if not isinstance(text, str):
        raise TypeError("content is no text")
      cut = choices[0].get("finish_reason") == "length"
      return Reply(text, cut, read, written, seconds)
    except (ValueError, LookupError, TypeError, AttributeError) as error:
      raise _Temporary(f"no chat completion ({error!r:.80})") from None

  def _scrubbed(self, text: str) -> str:
    """Returns a message without the key, which some servers repeat."""
    if self._key and self._key != "none":
      text = text.replace(self._key, "***")
    text = " ".join(text.split())
    return text if len(text) <= 300 else f"{text[:297]}..."


class _Temporary(Exception):
  """Says what went wrong with one try.

  Attributes:
    rate: whether the endpoint asked for fewer calls.
    retry_after: seconds that it asked to wait, if any.
  """

  def __init__(
    self, text: str, *, rate: bool = False, retry_after: float | None = None
  ):
    super().__init__(text)
    self.rate, self.retry_after = rate, retry_after


@dataclasses.dataclass
class _Call:
  """Holds a call; `sent`, its keys, and `began` are of its last request."""

  messages: list[dict[str, Any]]
  max_tokens: int
  schema: dict[str, Any]
  temperature: float
  seed: int
  key: str
  sent: frozenset[str] = frozenset()
  failures: int = 0
  began: float = 0.0

  def body(self, model: str, without: Collection[str]) -> dict[str, Any]:
    """Returns the body of the request, without some keys."""
    body: dict[str, Any] = {
      "model": model,
      "messages": self.messages,
      "temperature": self.temperature,
      "seed": self.seed,
      "max_tokens": self.max_tokens,
      "response_format": {
        "type": "json_schema",
        "json_schema": {
          "name": "answer",
          "schema": self.schema,
          "strict": True,
        },
      },
    }
    if "max_tokens" in without:  # its newer name
      body["max_completion_tokens"] = self.max_tokens
    return {key: value for key, value in body.items() if key not in without}


def _message(error: openai.APIStatusError) -> str:
  """Returns what a server said about an error."""
  body = error.body
  if isinstance(body, dict):
    body = body.get("message") or body.get("error") or body
  return str(body) if body else error.message


def _retry_after(error: openai.APIStatusError) -> float | None:
  """Returns the seconds of Retry-After, a number or a date."""
  headers = error.response.headers
  for name, unit in (("retry-after-ms", 1e-3), ("retry-after", 1.0)):
    try:
      return max(0.0, unit * float(headers[name]))
    except (KeyError, ValueError):
      pass
  date = email.utils.parsedate_tz(headers.get("retry-after", ""))
  if date is None:
    return None
  return max(0.0, email.utils.mktime_tz(date) - time.time())
