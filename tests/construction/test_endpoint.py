"""Calls to an endpoint: retried where that helps, bounded, and named."""

import asyncio
import email.utils
import json
import time

import pytest

from hourjax.construction import endpoint as endpoints
from hourjax.construction.answers import Refused
from hourjax.construction.endpoint import (
  Endpoint,
  EndpointError,
  Gate,
  Lost,
  ModelName,
)
from hourjax.errors import UserError
from tests.construction import model_server
from tests.construction.model_server import completion, refusal

MESSAGES = [
  {"role": "system", "content": "s"},
  {"role": "user", "content": "Divide the video into its events"},
]


@pytest.fixture
def server():
  with model_server.running(lambda request: completion('{"a": 1}')) as server:
    yield server


def _ask(server, count=1, most=32, **options):
  """Asks several times at once; returns replies or errors, and the endpoint."""

  async def ask():
    endpoint = Endpoint(
      ModelName("eye", server.url),
      role="captioner",
      gate=Gate(most),
      first_wait=0.01,
      **options,
    )
    calls = [
      endpoint.ask(
        MESSAGES, max_tokens=9, schema={}, temperature=0, seed=0, key=f"{i}"
      )
      for i in range(count)
    ]
    try:
      return await asyncio.gather(*calls, return_exceptions=True), endpoint
    finally:
      await endpoint.close()

  return asyncio.run(ask())


def _first(*responses):
  """A fault that gives these responses to the first requests."""
  left = list(responses)
  return lambda request: left.pop(0) if left else None


def test_an_answer(server):
  (reply,), endpoint = _ask(server)
  assert reply.text == '{"a": 1}' and not reply.cut
  assert (reply.tokens_in, reply.tokens_out) == (100, 20)
  assert not endpoint.failures
  body = server.bodies["events"]
  assert body["model"] == "eye" and body["max_tokens"] == 9


@pytest.mark.parametrize(
  "response, kind",
  [
    (refusal(500), "500"),
    (refusal(502), "502"),
    (refusal(429), "429"),
    (refusal(408), "408"),
    (model_server.Response(body=b"{" * 50, cut=5), "connection"),
    (model_server.Response(body=b"{" * 50), "broken response"),
    (model_server.Response(body=b"[]"), "broken response"),
    (model_server.Response(body=b'{"choices": [{}]}'), "broken response"),
    (model_server.Response(wait=5), "timeout"),
  ],
)
def test_it_is_tried_again(server, response, kind):
  server.fault = _first(response, response)
  (reply,), endpoint = _ask(server, timeout=1)
  assert reply.text == '{"a": 1}'
  assert endpoint.failures == {kind: 2} and server.stages["events"] == 3


def test_it_is_given_up_after_some_tries(server):
  server.fault = lambda request: refusal(500, "out of memory")
  (error,), _ = _ask(server, tries=3)
  assert isinstance(error, Lost) and server.stages["events"] == 3
  assert "eye@" in str(error) and "500 (out of memory)" in str(error)


def test_refusals_of_the_rate_are_no_tries(server):
  server.fault = _first(*[refusal(429, Retry_After="0.01")] * 12)
  (reply,), endpoint = _ask(server, tries=3)
  assert reply.text and endpoint.failures == {"429": 12}


@pytest.mark.parametrize("stated", ["0.4", "date"])
def test_it_waits_as_long_as_it_is_told(server, stated):
  if stated == "date":
    stated = email.utils.formatdate(time.time() + 1.5, usegmt=True)
  server.fault = _first(refusal(429, Retry_After=stated))
  began = time.monotonic()
  replies, _ = _ask(server, count=3, most=1)
  assert all(reply.text for reply in replies)
  assert 0.35 < time.monotonic() - began < 5


@pytest.mark.parametrize(
  "status, words",
  [
    (401, "set CAPTIONER_API_KEY or OPENAI_API_KEY"),
    (403, "set CAPTIONER_API_KEY or OPENAI_API_KEY"),
    (404, "--captioner"),
  ],
)
def test_what_waiting_cannot_help_ends_the_run(server, status, words):
  server.fault = lambda request: refusal(status)
  (error,), _ = _ask(server)
  assert isinstance(error, EndpointError) and words in str(error)
  assert server.stages["events"] == 1


def test_a_spent_quota_ends_the_run(server):
  server.fault = lambda request: refusal(429, "you: insufficient_quota")
  (error,), _ = _ask(server)
  assert isinstance(error, EndpointError) and "quota" in str(error)


def test_no_money_ends_the_run(server):
  server.fault = lambda request: refusal(402, "Insufficient Balance")
  (error,), _ = _ask(server)
  assert isinstance(error, EndpointError) and "Insufficient" in str(error)


def test_refusals_without_an_answer_between_end_the_run(server):
  server.fault = lambda request: refusal(400, "not a multimodal model")
  errors, _ = _ask(server, count=25, most=1)
  assert sum(isinstance(error, Refused) for error in errors) == 19
  assert isinstance(errors[-1], EndpointError)
  assert "not a multimodal model" in str(errors[-1])


def test_a_flagged_request_costs_itself(server):
  """403 is that of a key only before the first answer."""
  flagged = refusal(403, "input was flagged")
  server.fault = lambda request: flagged if request.number == 1 else None
  replies, _ = _ask(server, count=3, most=1)
  assert [isinstance(reply, Refused) for reply in replies] == [
    False,
    True,
    False,
  ]


def test_rate_and_other_failures_are_counted_apart(server):
  rate = refusal(429, Retry_After="0.01")
  server.fault = _first(*[rate] * 6, refusal(500), rate, refusal(500))
  (reply,), _ = _ask(server, tries=3)
  assert reply.text


def test_parts_of_text_and_errors_as_answers(server):
  parts = [{"type": "text", "text": '{"a"'}, {"type": "text", "text": ": 1}"}]
  error = json.dumps({"error": {"message": "provider down", "code": 502}})
  server.fault = _first(
    model_server.Response(body=error.encode()), completion(parts)
  )
  (reply,), endpoint = _ask(server)
  assert reply.text == '{"a": 1}' and endpoint.failures == {
    "broken response": 1
  }


def test_a_bad_request_costs_itself(server):
  server.fault = lambda request: refusal(400, "the prompt is too long")
  (error,), _ = _ask(server)
  assert isinstance(error, Refused) and error.kind == "refused request"
  assert server.stages["events"] == 1


def test_an_endpoint_that_is_gone_ends_the_run(server):
  server.fault = lambda request: refusal(503)
  errors, _ = _ask(server, count=25, tries=1)
  assert sum(isinstance(error, Lost) for error in errors) == 19
  ended = [error for error in errors if isinstance(error, EndpointError)]
  assert len(ended) == 6 and "start again when it does" in str(ended[0])
  server.url = "http://127.0.0.1:9/v1"
  (error,), _ = _ask(server, tries=2)
  assert isinstance(error, Lost) and "connection failed" in str(error)


def test_servers_without_structured_output(server, capsys):
  def fault(request):
    if "response_format" in request.body:
      return refusal(400, "response_format json_schema is not supported")
    return None

  server.fault = fault
  replies, _ = _ask(server, count=20, most=2)
  assert all(reply.text for reply in replies)
  # The first ones tell it; the others are sent without.
  assert server.stages["events"] <= 22
  assert capsys.readouterr().out.count("takes no response_format") == 1


def test_servers_without_sampling_options(server):
  def fault(request):
    for name in ("temperature", "seed"):
      if name in request.body:
        return refusal(400, f"Unsupported parameter: '{name}'")
    return None

  server.fault = fault
  (reply,), _ = _ask(server)
  assert reply.text and server.stages["events"] == 3


def test_a_wait_of_hours_ends_the_run(server):
  server.fault = lambda request: refusal(429, Retry_After="86400")
  (error,), _ = _ask(server)
  assert isinstance(error, EndpointError)
  assert "asks to wait 86,400 s" in str(error)


def test_servers_with_another_name_for_the_limit(server):
  def fault(request):
    if "max_tokens" in request.body:
      return refusal(400, "use max_completion_tokens instead of max_tokens")
    assert request.body["max_completion_tokens"] == 9
    return None

  server.fault = fault
  (reply,), _ = _ask(server)
  assert reply.text


def test_the_number_of_calls_adapts(server):
  """It grows while all is well, and is halved when the rate is too high."""
  server.wait = 0.4
  replies, _ = _ask(server, count=250, most=16)
  assert 14 <= server.most_busy <= 16
  server.wait = 0.02

  def fault(request):
    return refusal(429) if server.busy > 4 else None

  server.fault = fault
  replies, endpoint = _ask(server, count=200, most=16)
  assert all(reply.text for reply in replies)
  # Without adapting, most of 16 at a time would be refused.
  assert endpoint.failures["429"] < 100


def test_a_cancelled_call_leaves_its_place(server):
  async def run():
    gate = Gate(1)

    async def hold(seconds):
      async with gate:
        await asyncio.sleep(seconds)

    first = asyncio.create_task(hold(10))
    await asyncio.sleep(0.01)
    second, third = (asyncio.create_task(hold(0)) for _ in range(2))
    await asyncio.sleep(0.01)
    second.cancel()
    first.cancel()
    await asyncio.wait_for(third, 5)
    assert gate.busy == 0

  asyncio.run(run())


def test_keys_are_scrubbed(server, monkeypatch):
  monkeypatch.setenv("CAPTIONER_API_KEY", "sk-secret")
  server.fault = lambda request: refusal(401, "wrong key: sk-secret")
  (error,), _ = _ask(server)
  assert "***" in str(error) and "secret" not in str(error)
  assert server.authorizations == {"Bearer sk-secret"}


def test_which_key_is_whose(monkeypatch):
  monkeypatch.setenv("OPENAI_API_KEY", "common")
  monkeypatch.setenv("JUDGE_API_KEY", "own\r\n")
  assert endpoints.key_of("judge") == "own"
  assert endpoints.key_of("writer") == "common"
  monkeypatch.setenv("WRITER_API_KEY", "“sk”")
  with pytest.raises(UserError, match="WRITER_API_KEY holds characters"):
    endpoints.key_of("writer")


@pytest.mark.parametrize(
  "text",
  [
    "model",
    "@http://host/v1",
    "m@host:8000",
    "m@ftp://host",
    "m@http://",
    "m@http://a b/v1",
    "m@http://h:80a0/v1",
    "m@http://[::1/v1",
    "m@http://h:99999/v1",
  ],
)
def test_names_of_models(text):
  with pytest.raises(UserError, match=r"write NAME@URL, for example --writer="):
    ModelName.parse(text, "writer")


def test_no_passwords_in_options():
  for text in ("m@http://me:secret@host/v1", "m@http://host/v1?key=secret"):
    with pytest.raises(UserError, match="WRITER_API_KEY") as error:
      ModelName.parse(text, "writer")
    assert "secret" not in str(error.value)
  read = ModelName.parse("org/m@1.0@http://host:80/v1/", "writer")
  assert read == ModelName("org/m@1.0", "http://host:80/v1")
  assert json.dumps(str(read)) == '"org/m@1.0@http://host:80/v1"'
