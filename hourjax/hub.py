"""Names of models on the Hugging Face Hub, wherever a folder is expected.

  hf://organisation/name[@revision]

stands for a folder that `huggingface_hub` (extra `hub`) fetches into its cache
(HF_HOME; HF_ENDPOINT names another hub, HF_TOKEN gives access). Nothing is
fetched, and the package is not even imported, unless such a name is given.

Of a repository only what is needed comes: safetensors, JSON and the
tokenizer's files, or the latter alone. Files that arrived stay, so a command
that was stopped goes on with the others; a connection that breaks is taken up
where it broke.

What was fetched once is used from then on without any network, also where the
revision is a branch (`main`, if none is given) that has moved on since: a
training that goes on tomorrow must not find other weights. The line that is
printed names the commit. With HOURJAX_HUB_UPDATE=1 a branch is looked up anew.
"""

import errno
import functools
import os
import pathlib
import re
import sys
import types
from collections.abc import Iterator, Mapping
from typing import Any

from hourjax import progress
from hourjax.errors import UserError

PREFIX = "hf://"
TOKENIZER = (
  "tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt",
  "added_tokens.json", "special_tokens_map.json", "chat_template.jinja",
)  # fmt: skip
MODEL = ("*.safetensors", "*.json", *TOKENIZER)
# The same weights once more, in other layouts, and states of optimizers.
_NEVER = ("*/*", "consolidated*", "optimizer*")
_UPDATE = "HOURJAX_HUB_UPDATE"
_FORM = "write hf://ORGANISATION/NAME or hf://ORGANISATION/NAME@REVISION"
_NAME = re.compile(r"hf://([\w.-]+/[\w.-]+)(?:@([\w./-]+))?", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}")


def is_hub_name(name: str | os.PathLike) -> bool:
  """Returns whether a name stands for a repository and not for a folder."""
  return os.fspath(name).startswith(PREFIX)


def local_folder(
  name: str | os.PathLike, wanted: tuple[str, ...] = MODEL
) -> pathlib.Path:
  """Returns the folder that a name stands for, fetched if need be.

  Args:
    name: of a folder, which is returned as it is, or of a repository.
    wanted: patterns of the files that are needed: MODEL or TOKENIZER.

  Raises:
    UserError: the name is no name of a repository, the extra `hub` is missing,
      the hub refuses or cannot be reached, or the transfer broke.
  """
  text = os.fspath(name)
  return _fetched(text, wanted) if is_hub_name(text) else pathlib.Path(text)


def own_folder(name: str | os.PathLike) -> pathlib.Path:
  """Returns where results about a model are written by default.

  Of a repository, whose files lie in a cache, it is ORGANISATION--NAME or
  ORGANISATION--NAME@REVISION in the working directory; of anything else the
  model's own folder.
  """
  text = os.fspath(name)
  if is_hub_name(text):
    _parse(text)
    text = text.removeprefix(PREFIX).replace("/", "--")
  return pathlib.Path(text)


def short_name(folder: pathlib.Path) -> str | None:
  """Returns "organisation/name@commit" of a folder in the cache, else None.

  The commit has seven digits.
  """
  parts = folder.absolute().parts[-3:]
  if len(parts) < 3 or parts[1] != "snapshots" or "--" not in parts[0]:
    return None
  return f"{'/'.join(parts[0].split('--')[1:])}@{parts[2][:7]}"


def _parse(text: str) -> tuple[str, str]:
  """Returns "organisation/name" and the revision."""
  match = _NAME.fullmatch(text)
  if not match:
    raise UserError(f"{text} is no name of a repository; {_FORM}")
  return match[1], match[2] or "main"


@functools.cache
def _fetched(text: str, wanted: tuple[str, ...]) -> pathlib.Path:
  """Returns the snapshot of a repository in the cache."""
  repository, revision = _parse(text)
  client = _client(text)
  pinned = bool(_COMMIT.fullmatch(revision))
  options = {
    "revision": revision,
    "allow_patterns": list(wanted),
    "ignore_patterns": list(_NEVER),
  }
  folder = None
  if pinned or os.environ.get(_UPDATE, "0") in ("", "0"):
    folder = _cached(client, text, repository, options)
  if folder is None:
    folder = _download(client, text, repository, options)
  elif not pinned:
    print(
      f"{text}: commit {folder.name[:7]} of the cache ({_UPDATE}=1 looks for a"
      " newer one)",
      file=sys.stderr,
    )
  if wanted is MODEL and not any(folder.glob("*.safetensors")):
    raise UserError(
      f"{text} holds no safetensors file; weights in other files can run code"
      " when they are read, and are not fetched: name a repository that has"
      " safetensors"
    )
  return folder


def _client(text: str) -> types.ModuleType:
  """Imports huggingface_hub, which is an optional requirement."""
  try:
    import huggingface_hub
    import huggingface_hub.constants
    import huggingface_hub.errors

    huggingface_hub.get_cached_repo_tree  # noqa: B018  old versions lack it
  except (ImportError, AttributeError):
    raise UserError(
      f"{text} is fetched by huggingface_hub, which is not installed or too"
      " old; pip install -e '.[hub]', or give a folder"
    ) from None
  return huggingface_hub


def _cached(
  client: types.ModuleType,
  text: str,
  repository: str,
  options: Mapping[str, Any],
) -> pathlib.Path | None:
  """Returns the snapshot if all of its files are there; asks no network."""
  errors = client.errors
  try:
    folder = client.snapshot_download(
      repository, local_files_only=True, **options
    )
    # Where the list of files is not known, some of them may be missing.
    client.get_cached_repo_tree(repository, revision=options["revision"])
  except (
    errors.LocalEntryNotFoundError,
    errors.CachedRepoTreeNotFoundError,
  ):
    return None
  except errors.HFValidationError:
    raise UserError(f"{text} is no name of a repository; {_FORM}") from None
  return pathlib.Path(folder)


def _download(
  client: types.ModuleType,
  text: str,
  repository: str,
  options: Mapping[str, Any],
) -> pathlib.Path:
  """Fetches the files of a repository that are not there yet."""
  endpoint = client.constants.ENDPOINT
  print(f"{text}: fetching from {endpoint}", file=sys.stderr, flush=True)
  bar = progress.library_bar(
    f"fetching {repository}", lambda made: "Reconstruct" in made.get("desc", "")
  )
  try:
    with progress.step(f"fetching {text}"):
      folder = client.snapshot_download(repository, tqdm_class=bar, **options)
  except Exception as error:
    if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
      raise  # the command says that the disk is full
    said = _explained(client, error, text, endpoint)
    if said is None:
      raise
    raise UserError(said) from None
  print(f"{text}: commit {pathlib.Path(folder).name[:7]}", file=sys.stderr)
  return pathlib.Path(folder)


def _explained(
  client: types.ModuleType, error: Exception, text: str, endpoint: str
) -> str | None:
  """Words what went wrong, in one line; None for a fault of ours."""
  errors, (repository, revision) = client.errors, _parse(text)
  page = f"{endpoint}/{repository}"
  causes = list(_causes(error))
  for cause in causes:
    if isinstance(cause, errors.GatedRepoError):
      return (
        f"{text} is given only to those who accept its terms: do so at {page},"
        " then set HF_TOKEN to a token of that account, or run `hf auth login`"
      )
    if isinstance(cause, errors.RepositoryNotFoundError):
      return (
        f"{text}: {endpoint} knows no model {repository}, or it is private;"
        " correct the name, or set HF_TOKEN to a token that may read it"
      )
    if isinstance(cause, errors.RevisionNotFoundError):
      return (
        f"{text}: {repository} has no revision {revision}; give a branch, a tag"
        f" or a commit of {page}/commits/main"
      )
    if isinstance(cause, errors.OfflineModeIsEnabled):
      return (
        f"{text} is not in the cache, and HF_HUB_OFFLINE forbids to fetch it;"
        " unset that, or give a folder"
      )
    status = getattr(getattr(cause, "response", None), "status_code", None)
    if isinstance(cause, errors.HfHubHTTPError) and status in (401, 403):
      return (
        f"{text}: {endpoint} refuses the token that is set (status {status});"
        " set HF_TOKEN to one that may read it, or run `hf auth login`"
      )
    if isinstance(cause, errors.HfHubHTTPError):
      return (
        f"{text}: {endpoint} answers with status {status}; try again later, or"
        " give a folder"
      )
  if isinstance(error, PermissionError):
    return (
      f"{text}: the cache {client.constants.HF_HUB_CACHE} cannot be written to"
      f" ({error.strerror}); set HF_HOME to a folder that can"
    )
  names = {kind.__name__ for cause in causes for kind in type(cause).__mro__}
  if names & {"ConnectError", "ConnectTimeout", "ProxyError"}:
    return (
      f"{text} is not in the cache, and {endpoint} cannot be reached"
      f" ({_reason(causes)}); connect to a network, or give a folder"
    )
  broken = "Consistency check failed" in str(error)
  if broken or "TransportError" in names:
    return (
      f"{text}: the transfer from {endpoint} broke ({_reason(causes)}); start"
      " again to go on, files that arrived are kept"
    )
  return None


def _causes(error: BaseException) -> Iterator[BaseException]:
  """Yields an error and what caused it."""
  seen: set[int] = set()
  cause: BaseException | None = error
  while cause is not None and id(cause) not in seen:
    seen.add(id(cause))
    yield cause
    cause = cause.__cause__ or cause.__context__


def _reason(causes: list[BaseException]) -> str:
  """Returns the first cause's words, in one line and without the others'."""
  words = next((str(c) for c in reversed(causes) if str(c)), "no reason given")
  return " ".join(words.split())[:120]
