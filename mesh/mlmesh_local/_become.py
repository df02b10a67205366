"""Runs a command that dies with its parent: ``python -I -S _become.py PARENT_PID COMMAND...``.

The process becomes the command (exec), so it costs nothing afterwards. A ``preexec_fn`` would do the same in a fork of
the supervisor, which has threads (gRPC, SQLite) and may deadlock there.
"""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1


def main() -> None:
    parent, command = int(sys.argv[1]), sys.argv[2:]
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:
            # It died between fork and prctl: no signal will ever come.
            sys.exit(1)
    try:
        os.execvp(command[0], command)  # noqa: S606
    except OSError as error:
        sys.stderr.write(f"cannot start {command[0]}: {error.strerror}\n")
        sys.exit(127)


if __name__ == "__main__":
    main()
