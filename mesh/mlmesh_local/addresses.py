"""Loopback addresses: one 127.S.0.0/16 a mesh, five addresses an instance, no iptables and no root.

Linux answers on all of 127.0.0.0/8 without configuration, so several meshes run on one machine beside each other.
"""

from __future__ import annotations

import contextlib
import socket
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

import psutil

from mlmesh_runtime.errors import InvalidInput, NotReady

ADS_PORT = 15010
# Bound, never listened on: who holds it owns the block. The kernel frees it when the process dies, however it dies.
CLAIM_PORT = 15011
OTLP_PORT = 4317
OTLP_HTTP_PORT = 4318
ALS_PORT = 15013
# Where Istio's control plane has its own metrics.
METRICS_PORT = 15014
ADMIN_PORT = 15000
_CONTROL_PORTS = (ADS_PORT, OTLP_PORT, OTLP_HTTP_PORT, ALS_PORT, METRICS_PORT)
BLOCKS = range(64, 192)
INSTANCES_MAX = 250


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """The addresses of one mesh."""

    second: int

    @property
    def control(self) -> str:
        """Where the control plane and the trace collector listen."""
        return f"127.{self.second}.0.1"

    @property
    def ads(self) -> str:
        """``host:port`` of the control plane."""
        return f"{self.control}:{ADS_PORT}"

    @property
    def otlp(self) -> str:
        """``host:port`` of the trace collector."""
        return f"{self.control}:{OTLP_PORT}"

    @property
    def otlp_http(self) -> str:
        """``host:port`` of the trace collector for OTLP over HTTP."""
        return f"{self.control}:{OTLP_HTTP_PORT}"

    @property
    def als(self) -> str:
        """``host:port`` of the access log service, which makes Istio's metrics."""
        return f"{self.control}:{ALS_PORT}"

    @property
    def metrics(self) -> str:
        """``host:port`` at which Prometheus can scrape the mesh."""
        return f"{self.control}:{METRICS_PORT}"

    def instance(self, number: int) -> InstanceAddresses:
        """Addresses of instance 1..250."""
        if not 1 <= number <= INSTANCES_MAX:
            raise InvalidInput(f"a laptop mesh runs at most {INSTANCES_MAX} instances", field="spec.replicas")
        second = self.second
        return InstanceAddresses(
            number=number,
            pod=f"127.{second}.1.{number}",
            application=f"127.{second}.2.{number}",
            outbound=f"127.{second}.3.{number}",
            admin=f"127.{second}.4.{number}",
            faults=f"127.{second}.5.{number}",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class InstanceAddresses:
    """Where an instance's parts listen: its sidecar inbound (pod), its application, its sidecar outbound, its admin.

    ``faults`` is where a proxy listens that stands in front of the pod while connections are disturbed on purpose.
    """

    number: int
    pod: str
    application: str
    outbound: str
    admin: str
    faults: str


class Claim:
    """A block held by this process until closed or dead."""

    def __init__(self, block: Block, holder: socket.socket) -> None:
        self.block = block
        self._holder = holder

    def close(self) -> None:
        """Give the block back."""
        self._holder.close()


def claim(preference: str) -> Claim:
    """Claim a free block; the same preference (the state folder's path) gets the same block when that is free.

    Raises NotReady when all blocks are taken.
    """
    start = zlib.crc32(preference.encode()) % len(BLOCKS)
    for offset in range(len(BLOCKS)):
        block = Block(second=BLOCKS[(start + offset) % len(BLOCKS)])
        holder = _bind(block.control, CLAIM_PORT, reuse=False)
        if holder is None:
            continue
        if all(is_free(block.control, port) for port in _CONTROL_PORTS):
            return Claim(block, holder)
        holder.close()
    raise NotReady(f"all {len(BLOCKS)} loopback blocks 127.{BLOCKS.start}-{BLOCKS.stop - 1}.0.0/16 are in use")


def is_free(host: str, port: int) -> bool:
    """Whether a server could bind here now; a port in TIME_WAIT counts as free."""
    probe = _bind(host, port, reuse=True)
    if probe is None:
        return False
    with probe:
        # Binding with SO_REUSEADDR succeeds beside another that is bound but not listening; listening does not.
        try:
            probe.listen(1)
        except OSError:
            return False
    return True


def user_of(port: int) -> str:
    """Who listens on a TCP port, for a person: ``"nginx (pid 4711)"``, or empty when the system does not tell."""
    with contextlib.suppress(psutil.Error, OSError):
        for connection in psutil.net_connections(kind="tcp"):
            if connection.status == psutil.CONN_LISTEN and connection.laddr and connection.laddr.port == port:
                if connection.pid is None:
                    continue
                return f"{_process_name(connection.pid)} (pid {connection.pid})"
    return ""


def split_address(text: str, *, field: str) -> tuple[str, int]:
    """``host:port`` in parts. Raises InvalidInput that names the field."""
    host, colon, port = text.rpartition(":")
    if not colon or not host or not port.isdigit() or not 0 <= int(port) < 65536:
        raise InvalidInput(f"{field} must be HOST:PORT, not {text!r}", field=field)
    return host.strip("[]"), int(port)


def _bind(host: str, port: int, *, reuse: bool) -> socket.socket | None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        if reuse:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((host, port))
    except OSError:
        sock.close()
        return None
    return sock


def _process_name(pid: int) -> str:
    with contextlib.suppress(psutil.Error):
        return psutil.Process(pid).name()
    return "a process"


def numbers_free(taken: set[int]) -> Iterator[int]:
    """Instance numbers that are not taken, smallest first."""
    return (number for number in range(1, INSTANCES_MAX + 1) if number not in taken)
