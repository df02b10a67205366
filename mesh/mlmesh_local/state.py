"""The state folder of a mesh: one supervisor at a time, and nothing left over from one that was killed."""

from __future__ import annotations

import fcntl
import hashlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from mlmesh_local.process import kill_leftovers
from mlmesh_runtime.errors import AlreadyExists

# sockaddr_un.sun_path is 108 bytes on Linux, 104 elsewhere.
SOCKET_PATH_BYTES_MAX = 100


class StateDir:
    """Paths in a state folder, all absolute."""

    def __init__(self, path: Path) -> None:
        self.path = path.absolute()
        self.pid_file = self.path / "supervisor.pid"
        self.logs = self.path / "logs"
        self.run = self.path / "run"
        self.authority = self.path / "ca"
        self.config = self.path / "config"
        self.traces = self.path / "traces.sqlite"
        self.supervisor_log = self.logs / "supervisor.log"

    @property
    def socket(self) -> Path:
        """The control socket: ``control.sock`` here, or in a private temporary folder where that path is too long."""
        here = self.path / "control.sock"
        if len(os.fsencode(here)) <= SOCKET_PATH_BYTES_MAX:
            return here
        digest = hashlib.sha256(os.fsencode(self.path)).hexdigest()[:16]
        return Path(tempfile.gettempdir()) / f"mlmesh-{os.getuid()}" / f"{digest}.sock"

    @property
    def target(self) -> str:
        """gRPC target of the control service."""
        return f"unix:{self.socket}"

    def running_pid(self) -> int:
        """Process id of the supervisor that runs here, 0 when there is none. Trusts the lock, not the number."""
        try:
            with self.pid_file.open("r+") as file:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    return int(file.read().strip() or -1)
        except (FileNotFoundError, ValueError):
            pass
        return 0

    def acquire(self, *, log: Callable[[str], None]) -> StateLock:
        """Own this folder until the lock is closed or this process dies, and clear what a killed supervisor left.

        Raises AlreadyExists that names the process id of the supervisor that runs here.
        """
        for folder in (self.path, self.logs, self.run, self.config, self.path / "data"):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.path.chmod(0o700)
        self._prepare_socket_folder()
        file = self.pid_file.open("a+")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            pid = file.read().strip() or "unknown"
            file.close()
            raise AlreadyExists(
                f"a mesh already runs in {self.path} (supervisor pid {pid}); "
                "stop it with `mlmesh down`, or choose another --state-dir",
                reason="MESH_RUNNING",
                metadata={"pid": pid},
            ) from None
        file.seek(0)
        if file.read().strip():
            count = kill_leftovers(self.path)
            log(f"the last supervisor here was killed; ended {count} processes that it left")
        file.seek(0)
        file.truncate()
        file.write(f"{os.getpid()}\n")
        file.flush()
        self.socket.unlink(missing_ok=True)
        return StateLock(file.fileno(), file.close, self)

    def _prepare_socket_folder(self) -> None:
        folder = self.socket.parent
        if folder == self.path:
            return
        folder.mkdir(mode=0o700, exist_ok=True)
        status = folder.stat(follow_symlinks=False)
        if status.st_uid != os.getuid() or status.st_mode & 0o077:
            raise AlreadyExists(f"{folder} belongs to somebody else or is open to others; choose a shorter --state-dir")


class StateLock:
    """The lock on a state folder. The kernel releases it when the process dies."""

    def __init__(self, descriptor: int, close: Callable[[], None], state: StateDir) -> None:
        self._descriptor = descriptor
        self._close = close
        self._state = state

    def release(self) -> None:
        """Give the folder back: the end was orderly, so nothing needs to be cleared at the next start."""
        self._state.socket.unlink(missing_ok=True)
        os.ftruncate(self._descriptor, 0)
        self._close()
