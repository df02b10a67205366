"""What every generator of parts is given: seeded choices, and the services, hosts and labels of the world so far."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

Doc = dict[str, Any]
T = TypeVar("T")

NAMESPACES = ("mlmesh", "other", "third")
ROOT = "istio-system"
NETWORKING = "networking.istio.io/v1"


@dataclass(slots=True, kw_only=True)
class Host:
    """A host that calls may go to. ``ports`` are numbers to protocols ("http", "grpc", "tcp", "tls")."""

    name: str
    short: str
    namespace: str
    ports: dict[int, str]
    labels: dict[str, str]
    subsets: list[str] = field(default_factory=list)

    def http_ports(self) -> list[int]:
        """Ports that speak HTTP."""
        return [number for number, protocol in self.ports.items() if protocol in ("http", "http2", "grpc")]

    def byte_ports(self) -> list[int]:
        """Ports of bytes."""
        return [number for number, protocol in self.ports.items() if protocol in ("tcp", "tls", "https")]


class Chance:
    """Choices of one seed, and what was made so far."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)  # noqa: S311 - the same seed, the same world
        self.hosts: list[Host] = []
        self.gateways: list[tuple[str, str]] = []
        self.documents: list[Doc] = []
        self.server_names: list[list[str]] = []
        self._names = 0

    def yes(self, share: float) -> bool:
        """True for a share of all calls."""
        return self.random.random() < share

    def one(self, items: Sequence[T]) -> T:
        """One of them."""
        return self.random.choice(items)

    def some(self, items: Sequence[T], least: int = 1, most: int = 3) -> list[T]:
        """Several different ones, in any order."""
        return self.random.sample(list(items), min(len(items), self.random.randint(least, most)))

    def number(self, least: int, most: int) -> int:
        """A whole number, both ends included."""
        return self.random.randint(least, most)

    def maybe(self, share: float, **fields: Any) -> Doc:
        """These fields for a share of all calls, otherwise none."""
        return fields if self.yes(share) else {}

    def name(self, prefix: str) -> str:
        """A name that no other document has; not in alphabetical order of age."""
        self._names += 1
        return f"{self.one('abcxyz')}{prefix}{self._names}"

    def add(self, version: str, kind: str, spec: Any, *, name: str = "", namespace: str = "", **metadata: Any) -> Doc:
        """A document of the world."""
        document: Doc = {
            "apiVersion": version,
            "kind": kind,
            "metadata": {
                "name": name or self.name(kind[0].lower()),
                "namespace": namespace or self.one(NAMESPACES[:2]),
                **metadata,
            },
            "spec": spec,
        }
        self.documents.append(document)
        return document

    def host_as_written(self, host: Host, namespace: str) -> str:
        """Its whole name, or the short one where that means it."""
        if host.short and host.namespace == namespace and self.yes(0.5):
            return host.short
        return host.name

    def http_host(self) -> Host:
        """A host with a port of HTTP."""
        return self.one([host for host in self.hosts if host.http_ports()])

    def label(self) -> dict[str, str]:
        """Labels that some workload has."""
        labelled = [host.labels for host in self.hosts if host.labels]
        chosen = dict(self.one(labelled))
        if self.yes(0.2):
            chosen["version"] = self.one(["v1", "v2"])
        return chosen
