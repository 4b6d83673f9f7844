"""`ending.py CODE`: ends as the programs of this project do, with a code, or by the signal of a negative one."""

from __future__ import annotations

import os
from collections.abc import Sequence

from bevt_ds.config.command_line import run
from bevt_ds.errors import UserError
from bevt_ds.exit_codes import BAD_DATA, DISK, NON_FINITE, STORAGE_STALLED, USER_ERROR

ERRORS = (USER_ERROR, BAD_DATA, NON_FINITE, STORAGE_STALLED, DISK)


def main(argv: Sequence[str]) -> int:
    code = int(argv[-1])
    if code in ERRORS:
        raise type("Told", (UserError,), {"exit_code": code})("it was told to")
    if code < 0:
        os.kill(os.getpid(), -code)
    return code


if __name__ == "__main__":
    run(main)
