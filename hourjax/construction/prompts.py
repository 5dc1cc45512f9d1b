"""Prompts, as Jinja templates that a user may replace."""

import functools
import hashlib
import json
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import jinja2

from hourjax.errors import UserError

TEMPLATES = pathlib.Path(__file__).with_name("templates")


def clock(seconds: float) -> str:
  """Returns a time as "2:05" or "1:02:05", cut to whole seconds."""
  minutes, rest = divmod(int(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  if hours:
    return f"{hours}:{minutes:02}:{rest:02}"
  return f"{minutes}:{rest:02}"


class TemplateError(UserError):
  """Says what is wrong with a template, which concerns every video."""


class Prompts:
  """Renders prompts.

  Attributes:
    digest: of the content of all templates, hexadecimal.
  """

  def __init__(self, folder: str | os.PathLike | None = None):
    """Reads and compiles the templates.

    Args:
      folder: with templates that replace those of the same names; the others
        are the defaults.

    Raises:
      UserError: the folder is none, or holds a file that is no template of
        these names or does not compile.
    """
    own = pathlib.Path(folder) if folder is not None else None
    names = sorted(path.name for path in TEMPLATES.glob("*.jinja"))
    folders = [TEMPLATES]
    if own is not None:
      if not own.is_dir():
        raise UserError(
          f"--templates={own} is no folder; copy {TEMPLATES} and change what"
          " you like"
        )
      given = sorted(path.name for path in own.glob("*.jinja"))
      if not set(given).intersection(names):
        raise UserError(
          f"--templates={own} holds none of {', '.join(names)}; name yours so"
        )
      names = sorted({*names, *given})
      folders.insert(0, own)
    texts = {name: _read(folders, name) for name in names}
    self.digest = hashlib.sha256(
      "\0".join(f"{name}\0{text}" for name, text in texts.items()).encode()
    ).hexdigest()
    # Read once: a file that is changed meanwhile is for the next start.
    self._environment = jinja2.Environment(
      loader=jinja2.DictLoader(texts),
      undefined=jinja2.StrictUndefined,
      autoescape=False,
    )
    self._environment.filters["clock"] = clock
    self._environment.filters["json"] = functools.partial(
      json.dumps, ensure_ascii=False
    )
    for name in names:
      try:
        self._environment.get_template(name)
      except jinja2.TemplateError as error:
        raise TemplateError(f"template {name}: {error}; correct it") from None

  def render(self, name: str, **values: Any) -> str:
    """Renders a template.

    Args:
      name: of the template, without its ending.
      **values: that the template uses.

    Raises:
      TemplateError: the template uses a value that does not exist, or fails.
    """
    try:
      return self._environment.get_template(f"{name}.jinja").render(values)
    except Exception as error:  # whatever its expressions raise
      known = ", ".join(sorted(values))
      raise TemplateError(
        f"template {name}.jinja: {error}; it may use {known}"
      ) from None


def _read(folders: Sequence[pathlib.Path], name: str) -> str:
  """Returns the text of a template, of the first folder that has it."""
  path = next(f / name for f in folders if (f / name).is_file())
  try:
    return path.read_text(encoding="utf-8")
  except (OSError, UnicodeDecodeError) as error:
    raise TemplateError(
      f"template {path} cannot be read ({error}); save it as UTF-8"
    ) from None
