"""The server that workers are forked from, and what ends a fitting with workers. Nothing here imports torch."""

from __future__ import annotations

import multiprocessing
from multiprocessing import forkserver, process
from pathlib import Path
from typing import Any

from mlmesh_training.backends.process import semaphore_prefix

PRELOADED = ["mlmesh_training.trainer.fitting.preload"]
collective_s = 120.0
"""How long processes wait for each other before one of them counts as hanging; torch's own 30 minutes hide that."""
_SOCKET_BYTES_MAX = 107
"""Of a Unix socket's path (man 7 unix), its end not counted."""


class GroupLost(Exception):  # noqa: N818 - says what happened
    """Workers died more often than they are started again."""


class FirstGoesOn(Exception):  # noqa: N818 - says what happened
    """The fitting is done, and what follows is done on the first of its machines, which this is not."""


def reserve(folder: Path) -> None:
    """Start the server, where there is none yet; it loads torch while this process does something else.

    What multiprocessing keeps in the file system is named so that it is found again when all of this was killed.
    """
    config: dict[str, Any] = process.current_process()._config  # type: ignore[attr-defined]
    if config.get("semprefix") != (prefix := semaphore_prefix(folder.name)):
        config["semprefix"] = prefix
        for left in folder.glob("listener-*"):
            left.unlink(missing_ok=True)
        if len(bytes(folder / "listener-12345678")) < _SOCKET_BYTES_MAX:
            config["tempdir"] = str(folder)
        multiprocessing.set_forkserver_preload(PRELOADED)
    forkserver.ensure_running()
