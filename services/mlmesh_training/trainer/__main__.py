"""Entry of the training process: ties its life to the service's, takes the job's lock, then trains."""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import fcntl
import json
import os
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from mlmesh_training.backends.base import RESULT_FILE, TASK_FILE, Died
from mlmesh_training.backends.process import PAUSED_CODE
from mlmesh_training.trainer.fitting import forking, pausing
from mlmesh_training.trainer.reporter import PermanentError, Reporter

_PR_SET_PDEATHSIG = 1


def main(argv: Sequence[str]) -> int:
    """Train the task that comes as one JSON line on standard input.

    The exit code is 0 when a result is there, 75 when it paused, 1 when it died and said why.
    """
    parser = argparse.ArgumentParser(prog="python -m mlmesh_training.trainer", description=main.__doc__)
    parser.add_argument("--report-fd", type=int, required=True, help="open file descriptor for JSON lines")
    parser.add_argument("--parent", type=int, default=0, help="end when this process ends; 0: do not")
    parser.add_argument("--preload", action="store_true", help="load torch before the task comes")
    arguments = parser.parse_args(argv)
    if arguments.parent and not die_with(arguments.parent):
        return 1
    pausing.listen()
    os.set_inheritable(arguments.report_fd, False)
    if arguments.preload:
        from mlmesh_training.trainer import run  # noqa: PLC0415 - as below

        run.preload()
    line = sys.stdin.buffer.readline()
    if not line:
        # The service went away while it kept this process in reserve.
        return 0
    order = json.loads(line)
    folder = Path(order["folder"])
    forking.collective_s = float(order.get("collective_s", forking.collective_s))
    if "gpus" in order:
        # torch reads it when it first looks for a GPU, which nothing has done yet.
        os.environ["CUDA_VISIBLE_DEVICES"] = visible_gpus(order["gpus"], os.environ)
    with os.fdopen(arguments.report_fd, "wb", buffering=0) as pipe, locked(folder):
        return work(folder, Reporter(pipe), threads=int(order["threads"]))


def work(folder: Path, reporter: Reporter, *, threads: int) -> int:
    """Train the task in the folder, unless its result is there; the process's exit code."""
    if (folder / RESULT_FILE).exists():
        # It was written whole: the service ended before it could take it.
        return 0
    try:
        if _processes(folder) > 1:
            # Loads torch for the workers while this process loads it for itself.
            forking.reserve(folder)
        from mlmesh_training.trainer.run import train  # noqa: PLC0415 - torch takes seconds to import

        train(folder, reporter, threads=threads)
    except pausing.PauseRequested:
        return PAUSED_CODE
    except forking.FirstGoesOn:
        return 0
    except (PermanentError, forking.GroupLost, OSError) as error:
        reporter.send(Died(reason=_reason(error), permanent=isinstance(error, PermanentError)))
        return 1
    return 0


def _reason(error: Exception) -> str:
    """An error for a person."""
    if isinstance(error, OSError):
        return f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}"
    return str(error)


def visible_gpus(gpus: Sequence[int], environ: Mapping[str, str]) -> str:
    """CUDA_VISIBLE_DEVICES for these GPUs, indexes among those that the environment lets through. None: no GPU."""
    let_through = environ.get("CUDA_VISIBLE_DEVICES")
    names = let_through.split(",") if let_through else []
    return ",".join(names[index].strip() if index < len(names) else str(index) for index in gpus)


def _processes(folder: Path) -> int:
    """Processes that the task in the folder asks for."""
    task = json.loads((folder / TASK_FILE).read_bytes())
    return int(task.get("distribution", {}).get("processes", 1))


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
