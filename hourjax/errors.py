"""The one exception for mistakes that a user can mend."""


class UserError(ValueError):
  """A mistake in the input: names the thing, both values and the remedy.

  Entry points print the message without a traceback and exit with status 2.

  Attributes:
    kind: by which failures of one sort are counted: "missing", "damaged", ...
  """

  def __init__(self, message: str, *, kind: str = "other"):
    super().__init__(message)
    self.kind = kind
