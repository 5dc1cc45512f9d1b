"""hf:// names, against a hub on localhost."""

import pathlib

import pytest

from hourjax import hub
from hourjax.errors import UserError
from tests import hub_server

pytest.importorskip("huggingface_hub")

NAME = "hf://films/tiny"
FILES = {
  "config.json": b"{}",
  "model-00001-of-00002.safetensors": b"a" * 300_000,
  "model-00002-of-00002.safetensors": b"b" * 200_000,
  "model.safetensors.index.json": b'{"weight_map": {}}',
  "tokenizer.json": b"[1]",
  "merges.txt": b"a b\n",
}
OTHERS = {
  "pytorch_model.bin": b"c" * 1000,
  "README.md": b"# tiny",
  "original/model.safetensors": b"d" * 1000,
  "consolidated.safetensors": b"e" * 1000,
}


@pytest.fixture
def served():
  with hub_server.running() as found:
    found.add("films/tiny", FILES | OTHERS)
    yield found


@pytest.fixture
def env(served, tmp_path):
  return hub_server.environment(served.url, tmp_path / "home")


def _contents(folder):
  return {path.name: path.read_bytes() for path in folder.iterdir()}


def _fetched(env, *names, **options):
  done = hub_server.fetch(env, *names, **options)
  assert done.returncode == 0, done.stderr
  return [pathlib.Path(line) for line in done.stdout.splitlines()]


def _refused(env, *names):
  done = hub_server.fetch(env, *names)
  assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
  (error,) = [x for x in done.stderr.splitlines() if x.startswith("error: ")]
  return error.removeprefix("error: ")


def test_folders_stay_what_they_are(tmp_path):
  assert hub.local_folder("work/run") == pathlib.Path("work/run")
  assert hub.local_folder(tmp_path) == tmp_path
  assert hub.own_folder(tmp_path) == tmp_path
  assert not hub.is_hub_name(tmp_path) and hub.is_hub_name(NAME)


@pytest.mark.parametrize(
  "name",
  ["hf://", "hf://tiny", "hf://a/b/c", "hf://a/b@", "hf://a b/c", "hf:///b"],
)
def test_names_that_cannot_be_meant(name):
  with pytest.raises(UserError, match=r"write hf://ORGANISATION/NAME or"):
    hub.local_folder(name)


def test_where_results_about_a_repository_go():
  assert hub.own_folder(NAME) == pathlib.Path("films--tiny")
  assert hub.own_folder(f"{NAME}@v1") == pathlib.Path("films--tiny@v1")
  cached = pathlib.Path("/c/hub/models--films--tiny/snapshots") / ("ab" * 20)
  assert hub.short_name(cached) == "films/tiny@abababa"
  assert hub.short_name(pathlib.Path("runs/memaug/stage2")) is None


@pytest.mark.slow
def test_what_is_needed_is_fetched_once(served, env):
  """Then neither a network nor the hub is needed, wherever the branch is."""
  (folder,) = _fetched(env, NAME)
  assert _contents(folder) == FILES
  assert hub.short_name(folder).startswith("films/tiny@")
  served.asked.clear()
  # The branch moves on; what was fetched stays what is meant.
  newer = FILES | {"config.json": b'{"a": 1}'}
  commit = served.add("films/tiny", newer)
  done = hub_server.fetch(env, NAME, f"{NAME}@{folder.name}")
  assert done.stdout.splitlines() == [str(folder)] * 2
  assert f"commit {folder.name[:7]} of the cache" in done.stderr
  assert not served.asked
  away = hub_server.environment("http://127.0.0.1:9", env["HF_HOME"])
  assert _fetched(away, NAME) == [folder]
  (again,) = _fetched(env | {"HOURJAX_HUB_UPDATE": "1"}, NAME)
  assert again.name == commit and _contents(again) == newer
  # One file changed, and one was sent.
  assert served.files_asked() == ["config.json"]
  assert _fetched(away, NAME) == [again]


@pytest.mark.slow
def test_a_tokenizer_alone(served, env):
  (folder,) = _fetched(env, NAME, wanted="TOKENIZER")
  assert set(_contents(folder)) == {"tokenizer.json", "merges.txt"}
  served.asked.clear()
  # The rest comes when it is needed.
  assert _fetched(env, NAME) == [folder]
  assert "tokenizer.json" not in served.files_asked()
  assert _contents(folder) == FILES


@pytest.mark.slow
def test_a_revision(served, env):
  older = FILES | {"config.json": b'{"old": 1}'}
  commit = served.add("films/tiny", older, branch="v1")
  found = _fetched(env, f"{NAME}@v1", f"{NAME}@{commit}")
  assert found[0] == found[1] and _contents(found[0]) == older
  said = _refused(env, f"{NAME}@v2")
  assert "films/tiny has no revision v2" in said and "/commits/main" in said


@pytest.mark.slow
def test_a_transfer_that_breaks_is_taken_up(served, env):
  """At the last of the pieces of 10 MiB that the client passes on."""
  name, piece = "model.safetensors", 10 * 2**20
  served.add("films/large", {name: bytes(piece + 5_000)})
  served.breaks[name] = [piece + 2_000]
  (folder,) = _fetched(env, "hf://films/large")
  assert (folder / name).read_bytes() == bytes(piece + 5_000)
  ranges = [x.partition("bytes=")[2] for x in served.asked if "GET" in x]
  assert [x for x in ranges if x] == [f"{piece}-"]


@pytest.mark.slow
def test_a_transfer_that_breaks_for_good(served, env):
  """Started again, the command fetches what is missing."""
  name = "model-00002-of-00002.safetensors"
  served.breaks[name] = [0] * 20
  said = _refused(env, NAME)
  assert f"{NAME}: the transfer from {served.url} broke" in said
  assert "files that arrived are kept" in said
  served.breaks.clear()
  served.asked.clear()
  (folder,) = _fetched(env, NAME)
  assert _contents(folder) == FILES
  assert served.files_asked() == [name]


@pytest.mark.slow
def test_no_network(served, env, tmp_path):
  away = hub_server.environment("http://127.0.0.1:9", tmp_path / "empty")
  said = _refused(away, NAME)
  assert f"{NAME} is not in the cache" in said
  assert "http://127.0.0.1:9 cannot be reached" in said
  assert "or give a folder" in said
  said = _refused(env | {"HF_HUB_OFFLINE": "1"}, NAME)
  assert "HF_HUB_OFFLINE forbids" in said


REFUSALS = {
  "nobody/nothing": (None, "knows no model nobody/nothing, or it is private"),
  "films/private": ((404, "RepoNotFound"), "set HF_TOKEN to a token"),
  "films/token": ((403, ""), "refuses the token that is set (status 403)"),
  "films/busy": ((418, ""), "answers with status 418; try again later"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", REFUSALS)
def test_the_hub_refuses(served, env, name):
  answer, words = REFUSALS[name]
  if answer:
    served.refused[name] = answer
  said = _refused(env, f"hf://{name}")
  assert words in said and name in said


@pytest.mark.slow
def test_terms_that_were_not_accepted(served, env):
  served.gated.add("films/tiny")
  said = _refused(env, NAME)
  assert "to those who accept its terms" in said
  assert f"{served.url}/films/tiny" in said and "HF_TOKEN" in said


@pytest.mark.slow
def test_weights_that_are_no_safetensors(served, env):
  served.add("films/pickled", OTHERS | {"config.json": b"{}"})
  served.files[served.commits["films/pickled"]["main"]].pop(
    "consolidated.safetensors"
  )
  said = _refused(env, "hf://films/pickled")
  assert "holds no safetensors file" in said and "can run code" in said
  assert "pytorch_model.bin" not in served.files_asked()


@pytest.mark.slow
def test_the_extra_is_missing(env, tmp_path):
  """Or too old, which a package without its functions stands for."""
  (tmp_path / "huggingface_hub").mkdir()
  (tmp_path / "huggingface_hub/__init__.py").write_text("")
  said = _refused(env | {"PYTHONPATH": str(tmp_path)}, NAME)
  assert "pip install -e '.[hub]', or give a folder" in said
