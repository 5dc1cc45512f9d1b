"""Errors that launch/tpu_vm.py prints in one line instead of a traceback."""


class LaunchError(Exception):
  """Reports a mistake or a refusal, with the thing and the remedy.

  Attributes:
    kind: category for the code that handles it: "lost" (no connection),
      "missing", "exists", "capacity", "quota", "busy", "passing" (try again
      soon) or "other".
    line: gcloud's own message, "" if there was none.
  """

  def __init__(self, message: str, *, kind: str = "other", line: str = ""):
    super().__init__(message)
    self.kind, self.line = kind, line
