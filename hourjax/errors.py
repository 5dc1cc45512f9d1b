"""The one exception for mistakes that a user can mend."""


class UserError(ValueError):
  """A mistake in the input: names the thing, both values and the remedy.

  Entry points print the message without a traceback and exit with status 2.
  """
