"""Threads of one engine: they take work in order and hand results back. Cheaper than an executor, which makes a future
and takes three locks for every job."""

from __future__ import annotations

import atexit
import threading
import weakref
from collections.abc import Callable
from queue import SimpleQueue
from typing import Generic, TypeVar

Job = TypeVar("Job")

_LIVE: weakref.WeakSet[Workers[object]] = weakref.WeakSet()


class Workers(Generic[Job]):
    """Named threads that run one function.

    Args:
        count: threads; they start with the first jobs. name: of the threads, without their number.
        work: is called with each job; must not raise.
    """

    def __init__(self, count: int, *, name: str, work: Callable[[Job], None]) -> None:
        self._count = count
        self._name = name
        self._work = work
        self._jobs: SimpleQueue[Job | None] = SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._closed = False
        _LIVE.add(self)  # type: ignore[arg-type]

    def submit(self, job: Job) -> None:
        """Run a job on a thread. The caller keeps no more jobs under way than there are threads."""
        if len(self._threads) < self._count:
            self._start()
        self._jobs.put(job)

    def _start(self) -> None:
        # Daemons: an engine that never comes back must not keep the process alive.
        thread = threading.Thread(
            target=_loop, args=(self._jobs, self._work), name=f"{self._name}-{len(self._threads)}", daemon=True
        )
        self._threads.append(thread)
        thread.start()

    def close(self) -> None:
        """End the threads, each after the job it has. Does not wait."""
        if not self._closed:
            self._closed = True
            for _ in self._threads:
                self._jobs.put(None)

    def join(self, timeout_s: float) -> None:
        """Wait for the threads to end."""
        for thread in self._threads:
            thread.join(timeout_s)


def _loop(jobs: SimpleQueue[Job | None], work: Callable[[Job], None]) -> None:
    while (job := jobs.get()) is not None:
        work(job)
        del job


def _close_all() -> None:
    """A thread must not be inside an engine while the interpreter takes itself apart."""
    live = list(_LIVE)
    for workers in live:
        workers.close()
    for workers in live:
        workers.join(2.0)


atexit.register(_close_all)
