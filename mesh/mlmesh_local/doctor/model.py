"""What checks look at, and what they find."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

from mlmesh_local.explain.provenance import Provenance
from mlmesh_local.live.facts import Facts
from mlmesh_local.model import World
from mlmesh_local.resources.catalog import CatalogService, full_host
from mlmesh_local.resources.tree import Node
from mlmesh_local.translate import View

Severity = Literal["error", "warning", "info"]
Layer = Literal["files", "live"]

IGNORE = "doctor.mlmesh.dev/ignore"
"""Annotation of a resource (or of a pod template) with the ids of checks that shall not speak of it, by commas."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Other:
    """A resource that means nothing to the mesh, such as a PrometheusRule: read for its queries only."""

    kind: str
    name: str
    annotations: Mapping[str, str]
    source: str
    root: Node


@dataclass(frozen=True, slots=True, kw_only=True)
class Hit:
    """One thing that a check found: in a part of a resource, or at an object that runs."""

    kind: str = ""
    name: str = ""
    path: tuple[str | int, ...] = ()
    detail: str
    where: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One rule. ``why`` and ``fix`` are sentences; ``source`` is where one can read that it is so."""

    id: str
    severity: Severity
    layer: Layer
    title: str
    why: str
    fix: str
    source: str
    find: Callable[[Context], Iterator[Hit]] = field(repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """A hit of a check. ``where`` is "file:line", or an object that runs."""

    id: str
    severity: Severity
    title: str
    where: str
    resource: str
    part: str
    detail: str
    why: str
    fix: str
    source: str


class Context:
    """What checks look at.

    Args:
        world: resources, proxies and endpoints.
        others: resources that the mesh does not read.
        streaming: paths "/package.Service/Method" that are known to stream, whoever serves them.
        facts: what runs, where a mesh runs.
        now_s: seconds since 1970.
    """

    def __init__(
        self,
        world: World,
        *,
        others: Iterable[Other] = (),
        streaming: Iterable[str] = (),
        facts: Facts | None = None,
        now_s: float = 0.0,
    ) -> None:
        self.world = world
        self.view = View(world)
        self.resources = self.view.resources
        self.provenance = Provenance(self.resources)
        self.others = tuple(others)
        self.facts = facts or Facts()
        self.now_s = now_s
        self._streaming = frozenset(streaming)

    def service(self, host: str, namespace: str) -> CatalogService | None:
        """The service that a resource of a namespace means by a host."""
        return self.view.services.get(full_host(host, namespace, self.world.domain))

    def streams(self, service: CatalogService) -> frozenset[str]:
        """Streaming paths of a service: those that it told by reflection, else all that are known."""
        if not any(port.protocol in ("grpc", "http2") for port in service.ports):
            return frozenset()
        methods = self.facts.methods.get(service.host)
        if methods is None:
            return self._streaming
        return frozenset(path for path, streams in methods.items() if streams)
