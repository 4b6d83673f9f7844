"""The loader's process: `python -m bevt_ds.data.process NUMBER`, its socket's. RemoteReader starts it."""

from __future__ import annotations

import sys

from bevt_ds.data.decoding.subprocess_env import begin_watch, ignore_signals

if __name__ == "__main__":
    begin_watch()
    ignore_signals()  # before the imports, which take seconds
    from bevt_ds.data.process.server import main

    main(int(sys.argv[1]))
