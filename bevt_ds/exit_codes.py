"""The exit codes of this project's programs, all of them; docs/reliability.md shows the table.

They are what a process ends with. What a launcher makes of its ranks' codes is in docs/reliability.md too.
"""

from __future__ import annotations

FINISHED = 0
NOT_LEARNED = FOUND_FAULTS = 1
USER_ERROR = 2
BAD_DATA = 3
NON_FINITE = 4
STORAGE_STALLED = 5
DISK = 6
RANK_LOST = 7
STOPPED = 75  # EX_TEMPFAIL of sysexits.h: what schedulers take for "try again"
INTERRUPTED = 130  # as of any program that Ctrl-C has ended
CLOSED_PIPE = 141  # as of any program that SIGPIPE has ended

MEANINGS = {
    FINISHED: "finished",
    NOT_LEARNED: "not learned (`train.min_gain`), a check with faults, a replay without; or a bug, with its traceback",
    USER_ERROR: "a mistake in the command line, a setting, a file or a folder",
    BAD_DATA: "too many samples could not be used (`data.max_bad_fraction`)",
    NON_FINITE: "too many steps whose loss or gradient was not finite; weights that are not, or differ between ranks",
    STORAGE_STALLED: "a disk or file server did not answer within `data.read_seconds`",
    DISK: "what the run writes could not be written: full disk, quota, read-only or vanished folder",
    RANK_LOST: "a rank or its loader was killed, or a rank was silent for `train.rank_deadline`",
    STOPPED: "stopped by a signal or by its launcher's end; `resume=auto` continues",
    INTERRUPTED: "Ctrl-C before a run has begun, or of another command",
    CLOSED_PIPE: "no one reads what it prints, as behind `| head`",
}
