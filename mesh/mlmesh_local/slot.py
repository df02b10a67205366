"""Keeps one process running: starts it again when it ends, after a pause that grows."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import time
from collections.abc import Awaitable, Callable

from mlmesh_local.backoff import Backoff
from mlmesh_local.process import Child, Command, start

logger = logging.getLogger(__name__)


class Slot:
    """One process, kept running until `stop`.

    Args:
        name: for logs, such as "registry-0" or "registry-0 sidecar".
        command: what to run, asked at each start.
        session: runs beside each process (probes); cancelled when the process ends. It may kill the process.
        changed: called after every change.
    """

    def __init__(
        self,
        name: str,
        *,
        command: Callable[[], Command],
        session: Callable[[Child], Awaitable[None]],
        changed: Callable[[], None],
        backoff: Backoff | None = None,
        restarts: int = 0,
    ) -> None:
        self.name = name
        self.restarts = restarts
        self.last_exit = ""
        self.failures = 0
        self.child: Child | None = None
        self._command = command
        self._session = session
        self._changed = changed
        self._backoff = backoff or Backoff()
        self._stopping = asyncio.Event()
        self._ended = asyncio.Event()
        self._grace_s = 0.0

    @property
    def pid(self) -> int:
        """Process id, 0 while nothing runs."""
        return self.child.pid if self.child else 0

    async def run(self) -> None:
        """Keep it running until `stop`. When cancelled the process is killed."""
        try:
            first = True
            while not self._stopping.is_set():
                if not first:
                    self.restarts += 1
                first = False
                ran_s = await self._once()
                if self._stopping.is_set():
                    return
                self.failures += 1
                delay_s = self._backoff.next_delay_s(ran_s)
                logger.warning(
                    "process ended, will start again",
                    extra={"child": self.name, "exit": self.last_exit, "delay_s": delay_s, "restarts": self.restarts},
                )
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(delay_s):
                        await self._stopping.wait()
        finally:
            self._stopping.set()
            self._ended.set()

    async def stop(self, grace_s: float) -> None:
        """End it: SIGTERM, after ``grace_s`` SIGKILL; it is not started again."""
        self._grace_s = grace_s
        self._stopping.set()
        if self.child:
            await self.child.stop(grace_s)
        await self._ended.wait()

    async def _once(self) -> float:
        started = time.monotonic()
        try:
            child = self.child = await start(self._command())
        except OSError as error:
            self.last_exit = f"could not be started: {error}"
            self._changed()
            return 0.0
        logger.info("process started", extra={"child": self.name, "child_pid": child.pid})
        self._changed()
        try:
            async with asyncio.TaskGroup() as group:
                beside = group.create_task(self._beside(child))
                # `stop` may have come while it was being started, and found nothing to stop.
                code = await (child.stop(self._grace_s) if self._stopping.is_set() else child.wait())
                beside.cancel()
        except BaseException:
            child.kill()
            await child.wait()
            raise
        finally:
            self.child = None
        self.last_exit = describe_exit(code)
        self._changed()
        return time.monotonic() - started

    async def _beside(self, child: Child) -> None:
        try:
            await self._session(child)
        except Exception:
            # A probe that breaks must not end what it watches.
            logger.exception("probing failed", extra={"child": self.name})


def describe_exit(code: int) -> str:
    """``"exit code 3"`` or ``"killed by SIGKILL"``."""
    if code >= 0:
        return f"exit code {code}"
    with contextlib.suppress(ValueError):
        return f"killed by {signal.Signals(-code).name}"
    return f"killed by signal {-code}"
