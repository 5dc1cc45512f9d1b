"""What launch/tpu_vm.py tells instead of a traceback."""


class LaunchError(Exception):
  """A sentence with the thing and the remedy.

  Attributes:
    kind: what it is about, for those who handle it: "lost", "missing",
      "exists", "capacity", "quota", "busy", "passing" or "other".
    line: gcloud's own words, "" if it said none.
  """

  def __init__(self, message: str, *, kind: str = "other", line: str = ""):
    super().__init__(message)
    self.kind, self.line = kind, line
