"""The one exception for mistakes that a user can correct."""


class UserError(ValueError):
  """Describes a mistake in the input: the thing, both values and the remedy.

  Entry points print the message without a traceback and exit with status 2.

  Attributes:
    kind: of failure, e.g. "missing" or "damaged"; failures are counted by it.
  """

  def __init__(self, message: str, *, kind: str = "other"):
    """Stores the message.

    Args:
      message: for the user.
      kind: see above.
    """
    super().__init__(message)
    self.kind = kind
