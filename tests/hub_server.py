"""A hub on localhost that speaks what `huggingface_hub` asks for.

GET  /api/models/ORG/NAME/revision/REV          which commit it is
GET  /api/models/ORG/NAME/tree/COMMIT           its files
HEAD /ORG/NAME/resolve/COMMIT/FILE              size, checksum, commit
GET  /ORG/NAME/resolve/COMMIT/FILE              bytes, from `Range` on
"""

import contextlib
import hashlib
import http.server
import json
import os
import pathlib
import re
import subprocess
import sys
import threading
from collections.abc import Iterator

_PAGE = re.compile(
  r"/api/models/(?P<repo>[^/]+/[^/]+)/(?P<what>revision|tree)/(?P<rev>[^?]+)"
)
_FILE = re.compile(
  r"/(?P<repo>[^/]+/[^/]+)/resolve/(?P<rev>[^/]+)/(?P<file>.+)"
)


class Hub:
  """Holds repositories, how they misbehave, and what was asked.

  Attributes:
    commits: repository -> branch -> commit.
    files: commit -> file -> content.
    refused: repository -> (status, error code) of its pages.
    gated: repositories whose files are refused.
    breaks: file -> bytes after which its next transfer ends.
    asked: "GET path", with the range if there was one.
    token: that pages want, if any.
  """

  def __init__(self):
    self.commits: dict[str, dict[str, str]] = {}
    self.files: dict[str, dict[str, bytes]] = {}
    self.refused: dict[str, tuple[int, str]] = {}
    self.gated: set[str] = set()
    self.breaks: dict[str, list[int]] = {}
    self.asked: list[str] = []
    self.url = ""

  def add(self, repository, files, branch="main") -> str:
    """A commit of these files, on a branch; returns its name."""
    text = repr((repository, sorted(files.items()))).encode()
    commit = hashlib.sha1(text).hexdigest()
    self.files[commit] = dict(files)
    self.commits.setdefault(repository, {})[branch] = commit
    return commit

  def files_asked(self) -> list[str]:
    """The names of the files that were sent, or begun to be."""
    found = []
    for line in self.asked:
      if line.startswith("GET") and (match := _FILE.search(line)):
        found.append(match["file"])
    return found


def _handler(hub: Hub) -> type[http.server.BaseHTTPRequestHandler]:
  class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
      pass

    def do_HEAD(self):
      self._answer(body=False)

    def do_GET(self):
      self._answer(body=True)

    def _answer(self, *, body):
      at = self.headers.get("Range", "")
      hub.asked.append(f"{self.command} {self.path} {at}".strip())
      if match := _PAGE.match(self.path):
        return self._page(**match.groupdict())
      match = _FILE.match(self.path)
      return self._file(body, at, **match.groupdict())

    def _page(self, repo, what, rev):
      if repo in hub.refused:
        return self._refuse(*hub.refused[repo])
      if repo not in hub.commits:
        return self._refuse(401, "RepoNotFound")
      commit = hub.commits[repo].get(rev, rev)
      if commit not in hub.files:
        return self._refuse(404, "RevisionNotFound")
      files = hub.files[commit]
      if what == "revision":
        siblings = [{"rfilename": name} for name in files]
        return self._json({"id": repo, "sha": commit, "siblings": siblings})
      return self._json(
        [
          {"type": "file", "path": name, "size": len(data), "oid": _sum(data)}
          for name, data in files.items()
        ]
      )

    def _file(self, body, at, repo, rev, file):
      if repo in hub.gated:
        return self._refuse(403, "GatedRepo")
      data = hub.files[rev][file]
      start = int(at.removeprefix("bytes=").rstrip("-")) if at else 0
      left = data[start:]
      self.send_response(206 if start else 200)
      self.send_header("ETag", f'"{_sum(data)}"')
      self.send_header("X-Repo-Commit", rev)
      self.send_header("Content-Length", str(len(left)))
      if start:
        end = f"bytes {start}-{len(data) - 1}/{len(data)}"
        self.send_header("Content-Range", end)
      self.end_headers()
      if not body:
        return None
      if hub.breaks.get(file):
        left = left[: hub.breaks[file].pop(0)]
        self.close_connection = True
      self.wfile.write(left)
      return None

    def _json(self, value):
      text = json.dumps(value).encode()
      self.send_response(200)
      self.send_header("Content-Type", "application/json")
      self.send_header("Content-Length", str(len(text)))
      self.end_headers()
      self.wfile.write(text)

    def _refuse(self, status, code):
      self.send_response(status)
      self.send_header("X-Error-Code", code)
      self.send_header("X-Error-Message", "no")
      self.send_header("Content-Length", "0")
      self.end_headers()

  return Handler


def _sum(data: bytes) -> str:
  return hashlib.sha1(data).hexdigest()


@contextlib.contextmanager
def running() -> Iterator[Hub]:
  """A hub that answers until the block ends."""
  hub = Hub()
  server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub))
  server.daemon_threads = True
  thread = threading.Thread(target=server.serve_forever, daemon=True)
  thread.start()
  hub.url = f"http://127.0.0.1:{server.server_port}"
  try:
    yield hub
  finally:
    server.shutdown()
    server.server_close()


def environment(hub_url: str, home: pathlib.Path, **more) -> dict[str, str]:
  """The variables of a process that uses this hub and a cache of its own."""
  kept = {
    name: value
    for name, value in os.environ.items()
    if not name.startswith(("HF_", "HUGGING")) and "proxy" not in name.lower()
  }
  return kept | {
    "HF_ENDPOINT": hub_url,
    "HF_HOME": str(home),
    "HF_HUB_DISABLE_TELEMETRY": "1",
    **more,
  }


_FETCH = """
import sys
from hourjax import hub
from hourjax.errors import UserError
try:
  for name in sys.argv[2:]:
    print(hub.local_folder(name, getattr(hub, sys.argv[1])))
except UserError as error:
  sys.exit(f"error: {error}")
"""


def fetch(
  env: dict[str, str], *names: str, wanted: str = "MODEL"
) -> subprocess.CompletedProcess:
  """Resolves names in a process of its own."""
  return subprocess.run(
    [sys.executable, "-c", _FETCH, wanted, *names],
    env=env,
    cwd=pathlib.Path(__file__).parents[1],
    capture_output=True,
    text=True,
    timeout=60,
  )
