"""Entry of the training process: ties its life to the service's, takes the job's lock, then trains."""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import fcntl
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from mlmesh_training.backends.base import RESULT_FILE, Died
from mlmesh_training.jobs import JobPhase
from mlmesh_training.trainer.reporter import PermanentError, Reporter

_PR_SET_PDEATHSIG = 1


def main(argv: Sequence[str]) -> int:
    """Train the task in --folder. 0: a result is there. 1: it died, and said why."""
    parser = argparse.ArgumentParser(prog="python -m mlmesh_training.trainer", description=main.__doc__)
    parser.add_argument("--folder", type=Path, required=True, help="the job's folder, with task.json")
    parser.add_argument("--report-fd", type=int, required=True, help="open file descriptor for JSON lines")
    parser.add_argument("--parent", type=int, default=0, help="end when this process ends; 0: do not")
    parser.add_argument("--threads", type=int, default=0, help="threads of torch; 0: all processors")
    arguments = parser.parse_args(argv)
    if arguments.parent and not die_with(arguments.parent):
        return 1
    os.set_inheritable(arguments.report_fd, False)
    with os.fdopen(arguments.report_fd, "wb", buffering=0) as pipe, locked(arguments.folder):
        reporter = Reporter(pipe)
        # A result that is there was written whole: the service ended before it could take it.
        if (arguments.folder / RESULT_FILE).exists():
            return 0
        reporter.send(JobPhase.LOADING_DATA)
        try:
            from mlmesh_training.trainer.run import train  # noqa: PLC0415 - torch takes seconds to import

            train(arguments.folder, reporter, threads=arguments.threads)
        except PermanentError as error:
            reporter.send(Died(reason=str(error), permanent=True))
            return 1
        except OSError as error:
            reporter.send(Died(reason=f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}"))
            return 1
    return 0


def die_with(parent: int) -> bool:
    """Have the kernel kill this process when its parent ends. False: the parent has ended already (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    return os.getppid() == parent


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the job's lock; wait for an earlier process that is just ending. The kernel frees it with the process."""
    fd = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


if __name__ == "__main__":
    code = main(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    # All that counts is on disk by now; taking torch apart again would take another second.
    os._exit(code)
