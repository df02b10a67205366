"""Where the workers of a job meet its attempt: reports come in and are stored, commands go out."""

from __future__ import annotations

import asyncio
import contextlib
import enum
import hmac
import json
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

from mlmesh_runtime.errors import Denied, InvalidInput, NotReady
from mlmesh_training.backends.base import Died, Report
from mlmesh_training.backends.reports import read_report

REPORT_CHARS_MAX = 1 << 20
PAUSED_REPORT = json.dumps({"kind": "paused", "value": {}})
"""What a worker reports when its checkpoint is stored and it waits to be suspended."""


class Command(enum.Enum):
    """What workers should do."""

    NONE = "none"
    PAUSE = "pause"
    STOP = "stop"


class Session:
    """One attempt, as its workers see it.

    Attributes:
        folder: the job's.
        died: what the last worker said of its own end; None while none did.
        paused: set when a worker has stored its checkpoint and waits to be suspended.
        heard: counts what came; whoever watches for silence compares it.
    """

    def __init__(self, uid: str, folder: Path, report: Callable[[Report], Awaitable[None]]) -> None:
        self.uid = uid
        self.folder = folder
        self.died: Died | None = None
        self.paused = asyncio.Event()
        self.heard = 0
        self.workers = 0
        self.over = False
        self._report = report
        self._stored: dict[str, int] = {}
        self._command = Command.NONE
        self._changed = asyncio.Event()
        # Reports reach the ledger one at a time and in order, also while an old connection of a worker dies.
        self._turn = asyncio.Lock()

    @property
    def command(self) -> Command:
        """What the workers should do now."""
        return self._command

    def order(self, command: Command) -> None:
        """Tell the workers, those that are connected at once."""
        self._command = command
        self._wake()

    def end(self) -> None:
        """The attempt is over."""
        self.over = True
        self._wake()

    async def changes(self) -> None:
        """Wait for a new command, or the end."""
        await self._changed.wait()

    async def store(self, worker: str, sequence: int, line: str) -> int:
        """Store a report unless it is stored already; the highest sequence stored of this worker.

        Errors: InvalidInput when it is no report, or one was left out; whatever storing raises.
        """
        if len(line) > REPORT_CHARS_MAX:
            raise InvalidInput(f"report: {len(line)} characters, at most {REPORT_CHARS_MAX}", field="report")
        async with self._turn:
            stored = self._stored.get(worker, 0)
            if sequence <= stored:
                return stored
            # A worker that was adopted after a restart of the service goes on with its own count.
            if stored and sequence != stored + 1:
                raise InvalidInput(f"sequence: {sequence}, expected {stored + 1}", field="sequence")
            self.heard += 1
            await self._take(line)
            self._stored[worker] = sequence
            return sequence

    async def _take(self, line: str) -> None:
        if line == PAUSED_REPORT:
            self.paused.set()
            return
        try:
            report = read_report(line.encode())
        except ValueError as error:
            raise InvalidInput(f"report: {error}", field="report") from error
        if isinstance(report, Died):
            self.died = report
        else:
            await self._report(report)

    def _wake(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()


class WorkerHub:
    """Attempts that run, by job.

    Args:
        key: secret of this service, at least 32 bytes; it must outlive restarts, because workers do.
    """

    def __init__(self, key: bytes) -> None:
        self._key = key
        self._sessions: dict[str, Session] = {}

    def token(self, uid: str) -> str:
        """What the workers of a job prove themselves by."""
        return hmac.new(self._key, b"worker:" + uid.encode(), "sha256").hexdigest()

    @contextlib.contextmanager
    def attempt(self, uid: str, folder: Path, report: Callable[[Report], Awaitable[None]]) -> Iterator[Session]:
        """Let workers in while an attempt runs."""
        session = self._sessions[uid] = Session(uid, folder, report)
        try:
            yield session
        finally:
            del self._sessions[uid]
            session.end()

    def session(self, uid: str, token: str) -> Session:
        """The attempt of a job.

        Errors: Denied (TOKEN_INVALID), NotReady (ATTEMPT_NOT_READY) when none runs: this service was just started, or
        is about to delete the TrainJob.
        """
        if not hmac.compare_digest(token.encode(), self.token(uid).encode()):
            raise Denied("the token is not this job's", reason="TOKEN_INVALID")
        found = self._sessions.get(uid)
        if found is None:
            raise not_ready(uid)
        return found


def not_ready(uid: str) -> NotReady:
    """No attempt of a job runs here now."""
    return NotReady(f"no attempt of jobs/{uid} runs here now", reason="ATTEMPT_NOT_READY")
