"""Command-line entry: parsing of options, error messages and exit statuses.

A mistake of the user ends a command with status 2 and one message that begins
with "error: ", whether it is found among the options, in a configuration, in a
path or much later (`UserError`). A full or failing disk gives status 1, an
interrupt 130. Every other exception is a fault of hourjax and keeps its
traceback.
"""

import contextlib
import difflib
import errno
import importlib.machinery
import importlib.util
import inspect
import math
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn, TypeVar

from absl import app, flags, logging
from ml_collections import ConfigDict

from hourjax import jax_environment
from hourjax.errors import UserError

# At import: every command imports this module before any module that imports
# jax, which reads its variables only once.
jax_environment.prepare()

LAST_SEED = (1 << 32) - 1  # the largest seed that every generator accepts
T = TypeVar("T")
_FLAGS = flags.FLAGS
_HELP = ("--help", "-help", "-h")
_SHOWN = 80  # characters of a value in a message
# Errors that are the fault of a path, not of the disk or of the system.
_PATH = (errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR, errno.EACCES,
         errno.EPERM, errno.EROFS, errno.ELOOP, errno.EINVAL, errno.EILSEQ,
         errno.ENXIO)  # fmt: skip
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def run(
  main: Callable[[list[str]], None],
  *,
  required: Sequence[str] = (),
  positional: bool = False,
  config: str = "",
  resume: str = "",
  writes: str = "",
) -> None:
  """Parses the options and calls `main` with the positional arguments.

  Args:
    main: takes the program's name followed by its positional arguments.
    required: names of options that must be given.
    positional: whether positional arguments are accepted.
    config: value of --config if it is not given and this file exists.
    resume: advice that is printed when the disk is full; a command that gives
      it can also be interrupted and started again.
    writes: name of the option with the output folder, for the message about
      a full disk.
  """
  logging.set_verbosity(logging.WARNING)  # of libraries
  if any(argument in _HELP for argument in sys.argv[1:]):
    app.usage(shorthelp=True, writeto_stdout=True, exitcode=0)
  there = os.path.isfile(config.partition(":")[0])
  if there and not _is_given("config", sys.argv):
    # config_flags reads overrides in sys.argv, whatever it is told to parse.
    sys.argv.insert(1, f"--config={config}")

  def parse(argv: list[str]) -> list[str]:
    return _parse(argv, required, positional)

  with ending(resume, writes):
    app.run(main, flags_parser=parse)


@contextlib.contextmanager
def ending(resume: str = "", writes: str = "") -> Iterator[None]:
  """Translates exceptions into messages and exit statuses.

  Args:
    resume: as in `run`.
    writes: as in `run`.

  Yields:
    Once, for the block whose exceptions are translated.
  """
  try:
    yield
  except UserError as error:
    fail(error)
  except KeyboardInterrupt:
    said = "; start again to go on" if resume else ""
    print(f"interrupted{said}", file=sys.stderr)
    sys.exit(128 + 2)
  except BrokenPipeError:
    # Whoever read our output has seen enough. Python would complain at exit.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(128 + 13)
  except OSError as error:
    option = _option_of(error)
    if option:
      fail(f"{option}: {error.strerror}")
    if resume or error.errno in _FULL:
      where = f"{shorten(str(_FLAGS[writes].value))}: " if writes else ""
      said = f"; {resume}" if resume else ""
      text = f"error: {where}{shorten(str(error), 400)}{said}"
      print(text, file=sys.stderr)
      sys.exit(1)
    raise


@contextlib.contextmanager
def needing(extra: str) -> Iterator[None]:
  """Says which extra to install if an import in the block fails.

  Args:
    extra: name in pyproject.toml.

  Yields:
    Once, for the block that imports.

  Raises:
    UserError: a package is missing.
  """
  try:
    yield
  except ModuleNotFoundError as error:
    if not error.name or error.name.split(".")[0] == "hourjax":
      raise
    raise UserError(
      f"{error.name} is not installed; pip install -e '.[{extra}]'"
    ) from None


def fail(message: object) -> NoReturn:
  """Prints "error: " and the message, and exits with status 2."""
  words = re.sub(r"\S{400,}", lambda word: shorten(word[0]), str(message))
  print(f"error: {words}", file=sys.stderr)
  sys.exit(2)


def shorten(text: str, length: int = _SHOWN) -> str:
  """Returns the text, or its two ends joined by "..." if it is longer."""
  if len(text) <= length:
    return text
  return f"{text[: length // 2]}...{text[-(length // 2) + 3 :]}"


def given(flag: flags.FlagHolder[T | None]) -> T:
  """Returns the value of an option that `run` was told to require.

  Raises:
    UserError: the option is missing.
  """
  if flag.value is None:
    raise UserError(f"--{flag.name} is missing; see --help")
  return flag.value


def filled(options: type[T]) -> T:
  """Returns options whose fields have the values of the flags of their names.

  Args:
    options: a dataclass; fields without a flag keep their defaults.
  """
  given = _FLAGS.flag_values_dict()
  names = inspect.signature(options).parameters
  return options(**{name: given[name] for name in names if name in given})


def _is_given(name: str, argv: Sequence[str]) -> bool:
  """Returns whether an option stands on the command line."""
  return any(re.match(rf"--?{name}(=|$)", word) for word in argv[1:])


def _parse(
  argv: list[str], required: Sequence[str], positional: bool
) -> list[str]:
  """Parses the command line; returns the positional arguments.

  Raises:
    UserError: an option is unknown, missing, or has an invalid value.
  """
  _check_words(argv)
  if "config" in _FLAGS and _is_given("config", argv):
    _check_config(argv)
  try:
    rest = _FLAGS(argv)
  except flags.UnrecognizedFlagError as error:
    raise UserError(_unknown(error.flagname, argv)) from None
  except flags.Error as error:
    raise UserError(_worded(str(error))) from None
  if len(rest) > 1 and not positional:
    raise UserError(f"unknown argument {rest[1]!r}; options start with --")
  missing = [name for name in required if _FLAGS[name].value is None]
  if missing:
    raise UserError(
      f"{', '.join(f'--{name}' for name in missing)}"
      f" {'is' if len(missing) == 1 else 'are'} missing; see --help"
    )
  _check_values()
  return rest


def _check_words(argv: Sequence[str]) -> None:
  """Refuses words that absl would silently read in another way."""
  for word, following in zip(argv[1:], [*argv[2:], None]):
    if word == "--":
      return
    try:
      word.encode()
    except UnicodeEncodeError:
      if not word.startswith("-"):
        continue  # a question, or refused as an argument
      name, _, value = word.partition("=")
      raise UserError(
        f"{name}={shorten(repr(os.fsencode(value))[2:-1])} is not UTF-8; rename"
        " the file, or link to it by another name"
      ) from None
    name = re.fullmatch(r"--?([A-Za-z_][\w.]*)", word)
    if not name:
      continue
    # Whether --config.KEY is boolean is known to the configuration only.
    takes = name[1] in _FLAGS and not _FLAGS[name[1]].boolean
    if takes and (following is None or following.startswith("--")):
      raise UserError(f"{word} has no value; write {word}=VALUE")


def _check_values() -> None:
  """Refuses values that pass the type but are never meant: NaN, empty text."""
  for name, value in _FLAGS.flag_values_dict().items():
    own = not name.startswith("config.")
    if own and isinstance(value, float) and not math.isfinite(value):
      raise UserError(f"--{name}={value}: give a number")
    # Usually an empty shell variable.
    empty = value == "" or (isinstance(value, list) and "" in value)
    if empty and _FLAGS[name].present and _FLAGS[name].default is None:
      raise UserError(f"--{name} is empty; give a value or leave it out")


def _worded(text: str) -> str:
  """Rewords a message of absl, which addresses programmers, for users."""
  text = re.sub(r"^[Ff]lag (?=--)", "", text)
  text = re.sub(r"invalid literal for int\(\).*", "give a whole number", text)
  text = re.sub(r"could not convert string to float.*", "give a number", text)
  text = re.sub(r"\('Non-boolean argument.*", "give true or false", text)
  text = re.sub(r"\s+", " ", text).strip()
  missing = re.fullmatch(r"Missing value for flag (--?\S+)", text)
  if missing:
    return f"{missing[1]} has no value; write {missing[1]}=VALUE"
  order = re.match(r"Found (\S+) in argv before a value for (\S+) was", text)
  if order:
    return f"{order[1]} stands before {order[2]}; give {order[2]} first"
  head, separator, tail = text.partition(": ")
  return f"{shorten(head)}{separator}{shorten(tail, 400)}"


def _unknown(name: str, argv: Sequence[str]) -> str:
  """Words the message about an unknown option."""
  overrides = name.startswith("config.") and "config" in _FLAGS
  if overrides and not _is_given("config", argv):
    return f"--{shorten(name)} is given, but --config is missing"
  main = sys.modules["__main__"]
  known = [
    flag.name
    for flag in (
      *_FLAGS.flags_by_module_dict().get(sys.argv[0], ()),
      *_FLAGS.flags_by_module_dict().get(main.__name__, ()),
    )
  ]
  return f"unknown option --{shorten(name)}; {_nearest(name, known)}"


def _nearest(name: str, known: Sequence[str]) -> str:
  """Returns "did you mean ...?" for the closest name, or "see --help"."""
  plain = name.replace("-", "_").lower()
  if plain.startswith("no") and plain[2:] in known:
    return f"--{plain[2:]} takes a value"
  last = plain.rpartition(".")[2]
  same = [key for key in known if key.rpartition(".")[2] == last]
  near = same or difflib.get_close_matches(plain, known, n=1)
  if not near:
    near = [
      key
      for part in difflib.get_close_matches(
        last, [key.rpartition(".")[2] for key in known], n=1
      )
      for key in known
      if key.rpartition(".")[2] == part
    ]
  if near:
    near = difflib.get_close_matches(plain, near, n=1, cutoff=0) or near
    return f"did you mean --{near[0]}?"
  return "see --help"


def _check_config(argv: Sequence[str]) -> None:
  """Refuses an unreadable configuration and overrides of unknown keys.

  config_flags would report them later, or with a traceback.
  """
  given = ""
  for word, following in zip(argv[1:], [*argv[2:], ""]):
    if re.match(r"--?config=", word):
      given = word.partition("=")[2]
    elif re.fullmatch(r"--?config", word):
      given = following
  leaves, groups = _keys(_load(given))
  for word in argv[1:]:
    found = re.match(r"--?(?:no)?(config\.[^=]*)", word)
    key = found[1] if found else ""
    if key in groups:
      one = next(x for x in (*leaves, *groups) if x.startswith(f"{key}."))
      raise UserError(
        f"--{key} is a group of keys; set one of them, such as --{one}"
      )
    if key and key not in leaves:
      near = _nearest(key, leaves)
      raise UserError(f"the configuration has no key --{shorten(key)}; {near}")


def _load(given: str) -> ConfigDict:
  """Runs `get_config` of "FILE.py:argument"; returns the configuration.

  Raises:
    UserError: the file is missing, or its code raises.
  """
  path, colon, argument = given.partition(":")
  if not path:
    raise UserError("--config is empty; give a file, as in --config=FILE.py")
  start = f"--config={shorten(given)}: "
  if os.path.isdir(path):
    raise UserError(f"{start}it is a folder; give a file in it")
  if not os.path.exists(path):
    some = [
      os.path.join(os.path.dirname(path), name)
      for name in _listed(os.path.dirname(path) or ".")
    ]
    near = difflib.get_close_matches(path, some, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise UserError(f"{start}there is no such file{hint}")
  loader = importlib.machinery.SourceFileLoader("hourjax_checked_config", path)
  spec = importlib.util.spec_from_loader(loader.name, loader)
  assert spec is not None  # it is None for finders only, not for a loader
  module = importlib.util.module_from_spec(spec)
  try:
    loader.exec_module(module)
    config = module.get_config(*([argument] if colon else []))
  except Exception as error:
    raise UserError(start + _reason(error, path)) from None
  if not isinstance(config, ConfigDict):
    raise UserError(
      f"{start}get_config() returns {type(config).__name__}; it must be a"
      " ConfigDict"
    )
  return config


def _listed(folder: str) -> list[str]:
  """Returns the names in a folder, none if it cannot be read."""
  try:
    return os.listdir(folder)
  except OSError:
    return []


def _keys(config: ConfigDict) -> tuple[list[str], list[str]]:
  """Returns the full names of keys with values and of groups of keys."""
  leaves, groups = [], []

  def walk(values: ConfigDict, prefix: str) -> None:
    for key, value in values.items():
      if isinstance(value, ConfigDict):
        groups.append(f"{prefix}{key}")
        walk(value, f"{prefix}{key}.")
      else:
        leaves.append(f"{prefix}{key}")

  walk(config, "config.")
  return leaves, groups


def _reason(error: Exception, path: str) -> str:
  """Words an error of a configuration file in one line, with its line."""
  text = " ".join(str(error).split())
  if type(error) in (ValueError, UserError):
    return text
  frames = traceback.extract_tb(error.__traceback__)
  lines = [
    frame.lineno
    for frame in frames
    if os.path.abspath(frame.filename) == os.path.abspath(path)
  ]
  place = f" (line {lines[-1]})" if lines else ""
  return f"{type(error).__name__}: {shorten(text, 400)}{place}"


def _option_of(error: OSError) -> str:
  """Returns "--option=value" of the path that failed, "" if none has it."""
  found = []
  for path in (error.filename, error.filename2):
    if not isinstance(path, str | bytes | os.PathLike):
      continue
    path = os.path.abspath(os.fsdecode(path))
    for name, value in _paths():
      own = os.path.abspath(value)
      option = f"--{name}={shorten(value)}"
      # A folder is created after those above it, so the path that failed may
      # be a parent of the option's.
      if own == path or own.startswith(f"{path.rstrip(os.sep)}{os.sep}"):
        if error.errno in (*_PATH, errno.ENOENT, errno.EEXIST):
          found.append((len(path), option))
      elif path.startswith(f"{own}{os.sep}") and error.errno in _PATH:
        found.append((len(own), f"{option}: {shorten(path)}"))
  return max(found)[1] if found else ""


def _paths() -> Iterator[tuple[str, str]]:
  """Yields name and value of every option that holds text, overrides too."""
  if not _FLAGS.is_parsed():
    return
  for name, value in _FLAGS.flag_values_dict().items():
    if isinstance(value, ConfigDict):
      leaves, _ = _keys(value)
      for key in leaves:
        found: Any = value
        for part in key.split(".")[1:]:
          found = found[part]
        if isinstance(found, str) and found:
          yield key, found
      continue
    for each in value if isinstance(value, list) else [value]:
      if isinstance(each, str) and each:
        yield name, each
