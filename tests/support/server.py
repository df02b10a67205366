"""Servers for tests: in this process, or as a real process that is always stopped."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from typing import Any

from mlmesh_runtime.config import Settings
from mlmesh_runtime.limits import Limits
from mlmesh_runtime.server import Server, Service

LOG_LINES_MAX = 5000


class _Transport:
    """What the servers of a test are served by, where the test itself does not say."""

    name = "grpcio"


@contextlib.contextmanager
def served_by(transport: str) -> Iterator[None]:
    """Serve every server of this block, here or in a process, by this transport (TLS by grpcio all the same)."""
    before, _Transport.name = _Transport.name, transport
    try:
        yield
    finally:
        _Transport.name = before


def settings(**changes: Any) -> Settings:
    """Settings of a test server: a free loopback port, short grace, nothing exported."""
    transport = "grpcio" if changes.get("tls") is not None else _Transport.name
    base = Settings(service="test", listen="127.0.0.1:0", grace_s=2.0, transport=transport)
    return dataclasses.replace(base, **changes)


@contextlib.asynccontextmanager
async def serving(*services: Service, limits: Limits | None = None, **changes: Any) -> AsyncIterator[Server]:
    """A server in this process for the length of a block; `changes` are fields of its `Settings`."""
    async with Server(settings(**changes), services, limits=limits) as server:
        yield server


class Process:
    """A `python -m module` (or `python file`) whose log lines can be waited for. Use `spawn`."""

    def __init__(self, popen: subprocess.Popen[str]) -> None:
        self.popen = popen
        self.lines: deque[str] = deque(maxlen=LOG_LINES_MAX)
        self._changed = threading.Condition()
        self._ended = False
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    @property
    def pid(self) -> int:
        """Of the process."""
        return self.popen.pid

    def _read(self) -> None:
        assert self.popen.stderr is not None
        for line in self.popen.stderr:
            with self._changed:
                self.lines.append(line.rstrip("\n"))
                self._changed.notify_all()
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def wait_for(self, wanted: Callable[[dict[str, Any]], bool], *, timeout_s: float = 30.0) -> dict[str, Any]:
        """The first JSON log entry, past or coming, that is `wanted`. AssertionError with the log when none comes."""
        found: dict[str, Any] = {}

        def look() -> bool:
            for line in self.lines:
                with contextlib.suppress(ValueError):
                    entry = json.loads(line)
                    if isinstance(entry, dict) and wanted(entry):
                        found.update(entry)
                        return True
            return self._ended

        with self._changed:
            self._changed.wait_for(look, timeout_s)
        if not found:
            raise AssertionError("the log line did not come; the log:\n" + self.log())
        return found

    def listening(self, *, timeout_s: float = 30.0) -> str:
        """Wait until it serves; its address."""
        return str(self.wait_for(lambda entry: entry.get("event") == "listening", timeout_s=timeout_s)["address"])

    def log(self) -> str:
        """Everything on its stderr."""
        return "\n".join(self.lines)

    def signal(self, number: signal.Signals) -> None:
        """Send a signal."""
        self.popen.send_signal(number)

    def wait(self, *, timeout_s: float = 20.0) -> int:
        """Wait for its end; the exit code."""
        code = self.popen.wait(timeout_s)
        self._reader.join(5)
        return code


@contextlib.contextmanager
def spawn(
    *command: str, env: Mapping[str, str] | None = None, python: Sequence[str] = (sys.executable, "-u")
) -> Iterator[Process]:
    """Start `python -u *command` with `env` on top of a bare environment; it is killed when the block ends.

    >>> with spawn("-m", "mlmesh_registry", env={"MLMESH_LISTEN": "127.0.0.1:0"}) as process:   # doctest: +SKIP
    ...     address = process.listening()
    """
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("MLMESH_", "OTEL_", "POD_"))}
    # Trying engines and new files takes seconds of CPU a model; the tests of it ask for it.
    given = {"MLMESH_ENGINE_TUNING": "off", "MLMESH_MODEL_TRIAL": "0", **(env or {})}
    if _Transport.name != "grpcio" and "MLMESH_TLS_CERT" not in given:
        given.setdefault("MLMESH_TRANSPORT", _Transport.name)
    popen = subprocess.Popen(
        [*python, *command],
        env={**kept, **given},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    process = Process(popen)
    try:
        yield process
    finally:
        if popen.poll() is None:
            popen.kill()  # also ends a stopped process
        popen.wait(10)
        process._reader.join(5)
        assert popen.stderr is not None
        popen.stderr.close()
