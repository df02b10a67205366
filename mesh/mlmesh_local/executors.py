"""Threads of the supervisor: its event loop never waits for a disk or for somebody else."""

from __future__ import annotations

from mlmesh_runtime.executors import BoundedExecutor


class Executors:
    """A pool for each kind of what blocks."""

    def __init__(self) -> None:
        self.traces = BoundedExecutor("traces", workers_max=1)
        self.key_sets = BoundedExecutor("key-sets", workers_max=4)
        self.logs = BoundedExecutor("logs", workers_max=1)

    def shutdown(self) -> None:
        """Finish what was begun."""
        for one in (self.traces, self.key_sets, self.logs):
            one.shutdown()
