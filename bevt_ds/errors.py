"""The exception that entries catch and print without a traceback."""

from __future__ import annotations

from bevt_ds import exit_codes


class UserError(Exception):
    """A mistake the user can fix. The message names the thing that is wrong and what to do about it."""

    exit_code = exit_codes.USER_ERROR  # of the program that prints it


class NonFiniteError(UserError):
    """Numbers that are infinite or NaN, where that is not to go on or to be written."""

    exit_code = exit_codes.NON_FINITE
