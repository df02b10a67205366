"""The supervisor of a laptop mesh, in the foreground: ``python -m mlmesh_local --help``."""

from __future__ import annotations

import asyncio
import logging
import os
import sys
from logging.handlers import RotatingFileHandler
from pathlib import Path

from mlmesh_local import app, options
from mlmesh_local.process import LOG_BYTES_MAX
from mlmesh_local.report import Report
from mlmesh_local.state import StateDir
from mlmesh_runtime.config import Settings
from mlmesh_runtime.errors import MeshError
from mlmesh_runtime.logs import JsonFormatter

logger = logging.getLogger("mlmesh_local")

EXIT_FAILED = 1
EXIT_REFUSED = 2


def main() -> int:
    """Run; the exit code is 0 after an orderly end, 2 when the start was refused, 1 for anything else."""
    chosen = options.parse(sys.argv[1:])
    report = Report(chosen.startup_fd)
    state = StateDir(chosen.state_dir)
    try:
        lock = state.acquire(log=report.step)
    except (MeshError, OSError) as error:
        return _refuse(report, error)
    try:
        _log_to(state.supervisor_log, chosen.log_level)
        asyncio.run(app.run(app.prepare(chosen, state, os.environ), report))
    except BaseException as error:
        first = _first(error)
        if isinstance(first, MeshError):
            logger.error("refused", extra={"reason": first.reason, "problem": first.message})  # noqa: TRY400
            return _refuse(report, first)
        logger.critical("the supervisor failed", exc_info=error)
        report.failed(f"the supervisor failed: {first}; see {state.supervisor_log}", "INTERNAL")
        return EXIT_FAILED
    finally:
        lock.release()
    logger.info("ended")
    return 0


def _refuse(report: Report, error: MeshError | OSError) -> int:
    if isinstance(error, MeshError):
        report.failed(error.message, error.reason)
    else:
        report.failed(f"{error.filename}: {error.strerror}", "SYSTEM")
    return EXIT_REFUSED


def _first(error: BaseException) -> BaseException:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def _log_to(path: Path, level: str) -> None:
    handler = RotatingFileHandler(path, maxBytes=LOG_BYTES_MAX, backupCount=1, encoding="utf-8")
    handler.setFormatter(JsonFormatter(Settings(service="supervisor")))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    # Each check of a request is pages of their debug logs.
    for name in ("grpc", "asyncio", "celpy", "protovalidate"):
        logging.getLogger(name).setLevel(logging.WARNING)


if __name__ == "__main__":
    sys.exit(main())
