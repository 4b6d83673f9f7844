"""The one exception that entries catch and print without a traceback."""


class UserError(Exception):
    """A mistake the user can fix. The message names the thing that is wrong and what to do about it."""

    exit_code = 2  # of the program that prints it
