"""A judge behind an endpoint, played by a server of this process."""

import contextlib
import http.server
import json
import threading

import pytest

from hourjax.errors import UserError
from hourjax.evaluation.questions import Question
from hourjax.objectives.rewards import Judge

QUESTION = Question("q", "v", "What colour?", "red", "open")


@contextlib.contextmanager
def _server(said):
  """Serves chat completions; `said` makes text of a prompt."""
  prompts = []

  class Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
      size = int(self.headers["Content-Length"])
      prompt = json.loads(self.rfile.read(size))["messages"][0]["content"]
      prompts.append(prompt)
      choice = {"message": {"content": said(prompt)}, "finish_reason": "stop"}
      body = json.dumps({"choices": [choice]}).encode()
      self.send_response(200)
      self.send_header("Content-Length", str(len(body)))
      self.end_headers()
      self.wfile.write(body)

    def log_message(self, *_):
      pass

  server = http.server.ThreadingHTTPServer(("localhost", 0), Handler)
  thread = threading.Thread(target=server.serve_forever, daemon=True)
  thread.start()
  try:
    yield f"judge@http://localhost:{server.server_port}/v1", prompts
  finally:
    server.shutdown()
    server.server_close()
    thread.join()


def test_every_answer_is_judged_once(tmp_path):
  def said(prompt):
    return json.dumps({"score": 0.75 if "crimson" in prompt else 0})

  path = tmp_path / "judged.jsonl"
  with _server(said) as (model, prompts):
    asked = Judge(model, path)
    assert asked(QUESTION, ["crimson", "blue", "crimson"]) == [0.75, 0, 0.75]
    assert len(prompts) == 2 and "Right answer: red" in prompts[0]
    again = Judge(model, path)
    assert again(QUESTION, ["blue", "crimson"]) == [0, 0.75]
    assert len(prompts) == 2


@pytest.mark.parametrize("said", ["It is right.", '{"score": 7}'])
def test_what_is_no_score(tmp_path, said):
  with _server(lambda _: said) as (model, _):
    asked = Judge(model, tmp_path / "judged.jsonl")
    with pytest.raises(UserError, match=r"the judge judge@http.*did not score"):
      asked(QUESTION, ["blue"])


def test_a_judge_that_is_named_in_another_way(tmp_path):
  with pytest.raises(UserError, match=r"write NAME@URL"):
    Judge("localhost:8000", tmp_path / "judged.jsonl")
