"""Ends what a killed supervisor leaves: ``python -I -S _guardian.py MARK`` with a pipe from it as standard input.

The supervisor's own children die with it (see `_become`); children of children do not. When the pipe closes, every
process whose environment has the mark is killed. An orderly supervisor ends this process first.
"""

import contextlib
import os
import signal
import sys
import time
from pathlib import Path

ROUNDS_MAX = 50
PAUSE_S = 0.1


def marked(mark: bytes) -> list[int]:
    """Process ids whose environment has the mark."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if int(folder.name) != os.getpid() and mark in (folder / "environ").read_bytes().split(b"\0"):
                found.append(int(folder.name))
    return found


def main() -> None:
    """Wait for the end of the pipe, then kill until nothing is left: the killed may have been starting others."""
    # The terminal's Ctrl-C is for the supervisor.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    while os.read(0, 1024):
        pass
    for _ in range(ROUNDS_MAX):
        pids = marked(os.fsencode(sys.argv[1]))
        if not pids:
            return
        for pid in pids:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(PAUSE_S)


if __name__ == "__main__":
    main()
