"""What every command shares: how it ends on a user's mistake."""

import contextlib
import sys

from absl import logging

from hourjax.errors import UserError


@contextlib.contextmanager
def user_errors():
  """Prints a UserError's message alone and exits with status 2."""
  try:
    yield
  except UserError as error:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(2)


def begin(argv: list[str]) -> None:
  """Quietens libraries' logs and refuses positional arguments.

  Those are typos of flags, which absl would ignore.
  """
  logging.set_verbosity(logging.WARNING)
  if len(argv) > 1:
    print(
      f"error: unknown argument {argv[1]!r}; options start with --",
      file=sys.stderr,
    )
    sys.exit(2)
