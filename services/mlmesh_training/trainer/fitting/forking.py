"""The server that workers are forked from. Nothing here imports torch: that is what the server is for."""

from __future__ import annotations

import multiprocessing
from multiprocessing import forkserver

PRELOADED = ["mlmesh_training.trainer.fitting.preload"]


class GroupLost(Exception):  # noqa: N818 - says what happened
    """Workers died more often than they are started again."""


def reserve() -> None:
    """Start the server, where there is none yet; it loads torch while this process does something else."""
    multiprocessing.set_forkserver_preload(PRELOADED)
    forkserver.ensure_running()
