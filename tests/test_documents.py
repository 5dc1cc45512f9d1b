"""Documents say what is there: links, paths, sections, files of a folder."""

import importlib.util
import pathlib
import re
import types

import pytest

ROOT = pathlib.Path(__file__).parents[1]
# Folders that a run or a build leaves in a checkout.
LEFT_OUT = (".venv", "work", "build", "dist", "node_modules")
SECTIONS = (
  "Model",
  "Vision encoder",
  "Video tokens",
  "Projector",
  "Memory repository",
  "Forgetting",
  "MemAug",
  "Decoder",
  "Images",
  "Conversations",
  "Training",
  "VideoMarathon",
  "Differences from the official code",
)
# "see hourjax/README.md, Forgetting" in code, perhaps over two lines.
_SECTION = re.compile(r"hourjax/README\.md,[\s#]+([A-Z][^).;:,\n\"]*)")


def _found(pattern: str) -> list[pathlib.Path]:
  """Returns the files of the repository that match, sorted."""
  return sorted(
    path
    for path in ROOT.rglob(pattern)
    if not {*path.relative_to(ROOT).parts} & {*LEFT_OUT}
    and not any(part.startswith(".venv") for part in path.parts)
  )


DOCUMENTS = _found("*.md")


def _name(path: pathlib.Path) -> str:
  return str(path.relative_to(ROOT))


def _prose(path: pathlib.Path) -> str:
  """Returns a document without its blocks of code."""
  text = path.read_text(encoding="utf-8")
  return re.sub(r"^\s*```.*?^\s*```", "", text, flags=re.M | re.S)


def _anchors(path: pathlib.Path) -> set[str]:
  """Returns the anchors of a document's headings, as GitHub makes them."""
  headings = re.findall(r"^#+ (.+)$", _prose(path), re.M)
  return {
    re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
    for heading in headings
  }


def test_documents_are_found():
  assert {_name(path) for path in DOCUMENTS} >= {
    "README.md",
    "WORKSPACE.md",
    "hourjax/README.md",
    "configs/README.md",
    "launch/README.md",
    "tests/README.md",
  }


@pytest.mark.parametrize("path", DOCUMENTS, ids=_name)
def test_links_lead_somewhere(path):
  wrong = []
  for link in re.findall(r"\]\(([^)\s]+)\)", _prose(path)):
    target, _, anchor = link.partition("#")
    if "://" in target or target.startswith("mailto:"):
      continue
    to = (path.parent / target).resolve() if target else path
    if not to.exists() or (anchor and anchor not in _anchors(to)):
      wrong.append(link)
  assert not wrong


@pytest.mark.parametrize("path", DOCUMENTS, ids=_name)
def test_paths_that_are_named_exist(path):
  """Paths of the repository in backticks, from its root."""
  wrong = []
  for span in re.findall(r"`([^`\n]+)`", _prose(path)):
    match = re.fullmatch(r"(?:hourjax|configs|launch|tests)/[\w./-]*", span)
    if match and not (ROOT / span).exists():
      wrong.append(span)
  assert not wrong


@pytest.mark.parametrize("path", _found("README.md"), ids=_name)
def test_files_of_a_table_exist(path):
  """`name.py` at the start of a row is a file of the document's folder."""
  wrong = []
  for line in _prose(path).splitlines():
    if not line.startswith("|") or line.count("|") < 3:
      continue
    for name in re.findall(r"`([\w/]+\.(?:py|sh|ipynb))`", line.split("|")[1]):
      if not (path.parent / name).exists():
        wrong.append(name)
  assert not wrong


def _folders() -> list[pathlib.Path]:
  """Returns the folders of hourjax with more than two files of Python."""
  folders = {path.parent for path in (ROOT / "hourjax").rglob("*.py")}
  return sorted(f for f in folders if len(list(f.glob("[!_]*.py"))) > 2)


@pytest.mark.parametrize("folder", _folders(), ids=_name)
def test_every_folder_says_what_lives_there(folder):
  readme = folder / "README.md"
  assert readme.is_file()
  text = readme.read_text(encoding="utf-8")
  if folder.parent != ROOT:  # commands are listed in WORKSPACE.md
    silent = [
      path.name for path in folder.glob("[!_]*.py") if path.name not in text
    ]
    assert not silent


def test_lengths():
  """The first pages that a newcomer reads stay short."""
  limits = {"README.md": 150, "WORKSPACE.md": 120}
  for name, most in limits.items():
    assert len((ROOT / name).read_text().splitlines()) <= most, name


def test_sections_of_the_specification():
  text = (ROOT / "hourjax" / "README.md").read_text(encoding="utf-8")
  specification = text.split("\n# Specification\n")[1]
  assert tuple(re.findall(r"^## (.+)$", specification, re.M)) == SECTIONS


def test_code_refers_to_sections_that_exist():
  wrong, found = [], 0
  for path in _found("*.py"):
    text = path.read_text(encoding="utf-8")
    for section in _SECTION.findall(text):
      found += 1
      if not section.strip().startswith(SECTIONS):
        wrong.append(f"{_name(path)}: {section}")
    if re.search(r"\bSPEC(\.md| section| \d)", text) and path.name != (
      "test_documents.py"
    ):
      wrong.append(f"{_name(path)}: SPEC")
  assert found and not wrong


def _figure() -> types.ModuleType:
  """Returns the script of the architecture figure, imported."""
  path = ROOT / "launch" / "figures" / "architecture.py"
  spec = importlib.util.spec_from_file_location("architecture", path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def test_architecture_figure_is_what_its_script_draws():
  assert _figure().main(["--check"]) == 0
