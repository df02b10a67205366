"""pilot-discovery as a child process, beside the Kubernetes API that it reads."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import secrets
import shutil
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from mlmesh_local.backoff import Backoff
from mlmesh_local.istiod.api import KubernetesApi
from mlmesh_local.istiod.objects import DEFINITIONS, KINDS, definitions
from mlmesh_local.istiod.store import Store
from mlmesh_runtime.errors import NotReady

logger = logging.getLogger(__name__)

PROGRAM = "pilot-discovery"
VARIABLE = "MLMESH_ISTIOD"
START_S = 60.0
IN_USE = b"address already in use"
CRASHES = ("panic:", "fatal error:")
READY_CHECK_S = 0.05
READY_ANSWER_S = 2.0

ENVIRONMENT: Mapping[str, str] = {
    # No certificates: identities are the laptop mesh's own.
    "PILOT_CERT_PROVIDER": "none",
    "ENABLE_CA_SERVER": "false",
    "INJECTION_WEBHOOK_CONFIG_NAME": "",
    "VALIDATION_WEBHOOK_CONFIG_NAME": "",
    "ENABLE_LEADER_ELECTION": "false",
    "ISTIO_KUBE_CLIENT_CONTENT_TYPE": "json",
    # Envoy without Istio's extensions.
    "PILOT_ENABLE_METADATA_EXCHANGE": "false",
    "PILOT_ENABLE_ALPN_FILTER": "false",
    "PILOT_DISABLE_MX_ALPN": "true",
    "PILOT_ENABLE_TELEMETRY_LABEL": "false",
    # Addresses made up for hosts serve capture only.
    "PILOT_ENABLE_IP_AUTOALLOCATE": "false",
    "PILOT_ENABLE_AMBIENT": "false",
    "PILOT_ENABLE_GATEWAY_API_DEPLOYMENT_CONTROLLER": "false",
    "PILOT_ENABLE_GATEWAY_API_GATEWAYCLASS_CONTROLLER": "false",
    # A laptop waits for its own changes only.
    "PILOT_DEBOUNCE_AFTER": "30ms",
    "PILOT_DEBOUNCE_MAX": "500ms",
    "PILOT_ENABLE_EDS_DEBOUNCE": "true",
}


def find_program(path: str, environment: Mapping[str, str]) -> Path:
    """The program: as told, else of the environment, else on PATH. Raises NotReady that says how to get it."""
    told = path or environment.get(VARIABLE, "")
    found = shutil.which(told or PROGRAM, path=environment.get("PATH"))
    if found is None:
        what = f"{told} is not a program that can be run" if told else f"{PROGRAM} is not on PATH"
        raise NotReady(
            f"{what}; build it with `make tools` (.tools/bin/{PROGRAM}) and name it by --istiod or {VARIABLE}",
            reason="ISTIOD_MISSING",
        )
    # It is started in a folder of its own.
    return Path(found).absolute()


@dataclass(frozen=True, slots=True, kw_only=True)
class Ports:
    """Where pilot-discovery listens: xDS, and its HTTP endpoints (debugging, monitoring)."""

    xds: int
    http: int
    monitoring: int


class _EndedError(Exception):
    """It ended before it was ready."""


def free_ports(host: str) -> Ports:
    """Ports that are free now."""
    with contextlib.ExitStack() as stack:
        numbers = [stack.enter_context(socket.create_server((host, 0))).getsockname()[1] for _ in range(3)]
    return Ports(xds=numbers[0], http=numbers[1], monitoring=numbers[2])


class Istiod:
    """A running control plane of Istio, and the store that it reads.

    istiod = Istiod(program, folder, host="127.0.0.1")
    await istiod.start()
    istiod.store.replace(cluster(documents, pods), OWNED)
    """

    def __init__(
        self,
        program: Path,
        folder: Path,
        *,
        host: str = "127.0.0.1",
        log: Path | None = None,
        environ: Mapping[str, str] | None = None,
    ) -> None:
        self.store = Store()
        self.host = host
        self.ports = free_ports(host)
        self.log = log or folder / "istiod.log"
        self._environ = dict(environ or {})
        self._program = program
        self._folder = folder
        self._token = secrets.token_urlsafe(24)
        self._api = KubernetesApi(self.store, token=self._token, kinds=KINDS)
        self._process: asyncio.subprocess.Process | None = None
        self._said = 0

    @property
    def address(self) -> str:
        """``host:port`` of xDS."""
        return f"{self.host}:{self.ports.xds}"

    async def start(self, *, timeout_s: float = START_S) -> None:
        """Start, and wait until it is ready. Raises NotReady with the end of its log."""
        for definition in definitions():
            self.store.put(DEFINITIONS, definition)
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        api = await self._api.start(self.host, 0)
        kubeconfig = self._kubeconfig
        kubeconfig.touch(mode=0o600)
        kubeconfig.write_text(json.dumps(_kubeconfig(f"http://{self.host}:{api}/{self._token}")))
        try:
            async with asyncio.timeout(timeout_s):
                while not await self._came_up():
                    # Somebody took a port between the look for one and the start.
                    self.ports = free_ports(self.host)
        except (TimeoutError, _EndedError):
            await self.stop()
            raise NotReady(f"pilot-discovery did not start: {self._end_of_log()}", reason="ISTIOD_FAILED") from None

    async def _came_up(self) -> bool:
        """Start it and wait until it is ready; False when a port is in use. Raises _EndedError for other ends."""
        process = await self._run()
        while process.returncode is None:
            if await self._is_ready():
                return True
            await asyncio.sleep(READY_CHECK_S)
        with self.log.open("rb") as log:
            log.seek(self._said)
            if IN_USE in log.read():
                return False
        raise _EndedError

    async def keep_running(self) -> None:
        """Start it again whenever it ends, until cancelled. Envoys go on with what they have meanwhile."""
        backoff = Backoff()
        while self._process is not None:
            started = time.monotonic()
            code = await self._process.wait()
            logger.warning(
                "Istio's control plane ended and is started again",
                extra={"exit_code": code, "said": self.last_words()},
            )
            await asyncio.sleep(backoff.next_delay_s(time.monotonic() - started))
            try:
                await self._run()
            except OSError as error:
                # The program may be built anew just now.
                logger.warning("Istio's control plane cannot be started", extra={"problem": str(error)})

    async def stop(self) -> None:
        """End the process and the API."""
        process = self._process
        if process is not None and process.returncode is None:
            process.terminate()
            try:
                async with asyncio.timeout(5.0):
                    await process.wait()
            except TimeoutError:
                process.kill()
                await process.wait()
        await self._api.stop()

    async def ended(self) -> None:
        """Wait until the process is no more."""
        if self._process is not None:
            await self._process.wait()

    def last_words(self) -> str:
        """Why it ended: what its log says of the crash, or its last line; empty while it runs."""
        if self._process is None or self._process.returncode is None:
            return ""
        with self.log.open("rb") as log:
            log.seek(self._said)
            lines = log.read().decode(errors="replace").splitlines()
        crashes = (line for line in lines if line.startswith(CRASHES))
        return next(crashes, lines[-1] if lines else "it said nothing")

    @property
    def _kubeconfig(self) -> Path:
        return self._folder / "kubeconfig.json"

    async def _run(self) -> asyncio.subprocess.Process:
        host = self.host
        arguments = [
            "discovery",
            "--registries=Kubernetes",
            f"--kubeconfig={self._kubeconfig}",
            # Not there: settings come from the ConfigMap, as in a cluster.
            f"--meshConfig={self._folder / 'none.yaml'}",
            f"--grpcAddr={host}:{self.ports.xds}",
            f"--httpAddr={host}:{self.ports.http}",
            f"--monitoringAddr={host}:{self.ports.monitoring}",
            "--httpsAddr=",
            "--secureGRPCAddr=",
            "--ctrlz_port=0",
            "--log_output_level=all:warn",
            "--shutdownDuration=0s",
        ]
        self._said = self.log.stat().st_size if self.log.exists() else 0
        with self.log.open("ab") as output:
            self._process = await asyncio.create_subprocess_exec(
                str(self._program),
                *arguments,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                cwd=self._folder,
                env={"HOME": str(self._folder), **ENVIRONMENT, **self._environ},
                start_new_session=True,
            )
        return self._process

    async def _is_ready(self) -> bool:
        try:
            reader, writer = await asyncio.open_connection(self.host, self.ports.http)
        except OSError:
            return False
        try:
            writer.write(f"GET /ready HTTP/1.1\r\nHost: {self.host}\r\nConnection: close\r\n\r\n".encode())
            async with asyncio.timeout(READY_ANSWER_S):
                return b" 200 " in await reader.readline()
        except (OSError, TimeoutError):
            return False
        finally:
            writer.close()

    def _end_of_log(self) -> str:
        lines = self.log.read_text(errors="replace").splitlines()[-8:]
        return " | ".join(lines) or "it said nothing"


def _kubeconfig(url: str) -> dict[str, object]:
    return {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "laptop",
        "clusters": [{"name": "laptop", "cluster": {"server": url}}],
        "contexts": [{"name": "laptop", "context": {"cluster": "laptop", "user": "laptop"}}],
        "users": [{"name": "laptop", "user": {}}],
    }
