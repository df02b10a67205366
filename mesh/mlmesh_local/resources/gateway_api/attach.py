"""Which routes bind to which parents, and what may be referred to: the rules of Istio's controller for the Gateway API.

pilot/pkg/config/kube/gateway/conversion.go and gatewaycommon/references.go of Istio say how.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from mlmesh_local.resources.gateway_api.model import (
    GROUP,
    GrpcRoute,
    HttpRoute,
    ParentRef,
    ReferenceGrant,
    Route,
    TcpRoute,
    TlsRoute,
)
from mlmesh_local.resources.gateway_api.model_tls import CaBundle

ISTIO_GROUP = "networking.istio.io"
MESH = "mesh"
ROUTE_KINDS: Mapping[type[Route], str] = {
    HttpRoute: "HTTPRoute",
    GrpcRoute: "GRPCRoute",
    TlsRoute: "TLSRoute",
    TcpRoute: "TCPRoute",
}
_FROM = ("Gateway", "ListenerSet", "HTTPRoute", "GRPCRoute", "TLSRoute", "TCPRoute")
_TO = ("ConfigMap", "Secret", "Service")
# How bad a refusal is: of several the first is told.
_RANKS = ("", "NotAllowedByListeners", "NoMatchingListenerHostname", "ParentRefConflict", "NoMatchingParent")


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """Why something is not accepted or not resolved: a reason of the Gateway API, and words for a person."""

    reason: str
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Parent:
    """A listener, or the mesh, as something that routes bind to.

    ``internal`` is the name of the Istio Gateway that stands for it ("mesh" for the mesh), ``hosts`` are
    "namespace/host".
    """

    internal: str
    kinds: tuple[str, ...]
    hosts: tuple[str, ...] = ()
    hostname: str = ""
    section: str = ""
    port: int = 0
    protocol: str = ""


MESH_PARENT = Parent(internal=MESH, kinds=tuple(ROUTE_KINDS.values()))


@dataclass(frozen=True, slots=True, kw_only=True)
class Binding:
    """A route's reference to a parent, and whether the parent takes it."""

    ref: ParentRef
    parent: Parent
    denied: Fault | None
    banned: tuple[str, ...] = ()

    @property
    def is_mesh(self) -> bool:
        """Whether the parent is a Service or a ServiceEntry: the route acts on sidecars."""
        return self.parent.internal == MESH

    def admits(self, host: str) -> bool:
        """Whether a host of the route is this listener's: a more specific listener of the same port takes it away."""
        own = self.parent.hostname
        if own and not own.startswith("*"):
            return True
        if own and not hosts_overlap(host, own):
            return False
        return not any(len(own) <= len(other) and is_subset(host, other) for other in self.banned)


@dataclass(frozen=True, slots=True, kw_only=True)
class Surroundings:
    """What references are resolved with. Services and entries are (namespace, name)."""

    services: frozenset[tuple[str, str]]
    entries: Mapping[tuple[str, str], tuple[str, ...]]
    hosts: frozenset[tuple[str, str]]
    """(namespace, full host) of every service."""
    grants: tuple[ReferenceGrant, ...]
    domain: str
    bundles: Mapping[tuple[str, str], CaBundle] = field(default_factory=dict)
    """ConfigMaps with roots, by (namespace, name)."""
    parents: Mapping[tuple[str, str, str], tuple[Parent, ...]] = field(default_factory=dict)
    """Listeners of each Gateway and ListenerSet, by (kind, namespace, name)."""

    def granted(self, origin: tuple[str, str], kind: str, namespace: str, name: str) -> bool:
        """Whether a resource (its kind and namespace) may refer to one in another namespace."""
        if origin[0] not in _FROM or kind not in _TO:
            return False
        return any(
            grant.meta.namespace == namespace
            and any((f.group, f.kind, f.namespace) == (GROUP, *origin) for f in grant.origins)
            and any((t.group, t.kind) == ("", kind) and t.name in ("", name) for t in grant.targets)
            for grant in self.grants
        )


def hosts_overlap(one: str, other: str) -> bool:
    """Whether two hosts, each possibly with a leading wildcard, have a host in common, compared as Istio does."""
    if one.startswith("*"):
        if other.startswith("*"):
            short, long = sorted((one, other), key=len)
            return long[1:].endswith(short[1:])
        return other.endswith(one[1:])
    return one.endswith(other[1:]) if other.startswith("*") else one == other


def is_subset(host: str, pattern: str) -> bool:
    """Whether a pattern covers a host (or a narrower pattern)."""
    if host.startswith("*"):
        return pattern.startswith("*") and len(host) >= len(pattern) and host[1:].endswith(pattern[1:])
    return host.endswith(pattern[1:]) if pattern.startswith("*") else host == pattern


def intersection(hosts: Iterable[str], others: Iterable[str]) -> list[str]:
    """Hosts that both lists cover, each the narrower of the two."""
    found: list[str] = []
    limits = list(others)
    for host in hosts:
        for other in limits:
            narrow = host if is_subset(host, other) else other if is_subset(other, host) else ""
            if narrow and narrow not in found:
                found.append(narrow)
    return found


def reference_text(ref: ParentRef, namespace: str) -> str:
    """How Istio orders references."""
    return f"{ref.group}/{ref.kind}/{ref.name}/{ref.section}/{ref.port}.{ref.namespace or namespace}"


def bindings_of(route: Route, around: Surroundings) -> tuple[Binding, ...]:
    """Every reference of a route to a parent that there is: one for each listener of a Gateway."""
    found: list[Binding] = []
    kind = ROUTE_KINDS[type(route)]
    for ref in route.parents:
        key = (ref.namespace or route.meta.namespace, ref.name)
        if (ref.group, ref.kind) in (("", "Service"), (ISTIO_GROUP, "ServiceEntry")):
            found.append(Binding(ref=ref, parent=MESH_PARENT, denied=_mesh_denied(ref, key, around)))
            continue
        if ref.group != GROUP or ref.kind not in ("Gateway", "ListenerSet"):
            # For another controller.
            continue
        listeners = around.parents.get((ref.kind, *key), ())
        for parent in listeners:
            rivals = {
                other.hostname
                for other in listeners
                if other is not parent and (other.port, other.protocol) == (parent.port, parent.protocol)
            }
            found.append(
                Binding(
                    ref=ref,
                    parent=parent,
                    denied=_denied(ref, parent, kind, route),
                    banned=tuple(sorted(rivals - {parent.hostname})),
                )
            )
    return tuple(sorted(found, key=lambda one: reference_text(one.ref, route.meta.namespace)))


def _mesh_denied(ref: ParentRef, key: tuple[str, str], around: Surroundings) -> Fault | None:
    known = around.services if ref.kind == "Service" else around.entries
    if key in known:
        return None
    what = "service" if ref.kind == "Service" else "service entry"
    return Fault(reason="NoMatchingParent", message=f'parent {what}: "{ref.name}" not found')


def _denied(ref: ParentRef, parent: Parent, kind: str, route: Route) -> Fault | None:
    if ref.port and ref.port != parent.port:
        return Fault(reason="NoMatchingParent", message=f"port {ref.port} not found")
    if ref.section and ref.section != parent.section:
        return Fault(reason="NoMatchingParent", message=f'sectionName "{ref.section}" not found')
    fault = _host_denied(parent, route)
    if fault is None and kind not in parent.kinds:
        fault = Fault(reason="NotAllowedByListeners", message=f"kind {GROUP}/v1/{kind} is not allowed")
    return fault


def _host_denied(parent: Parent, route: Route) -> Fault | None:
    near = False
    for host in route.hostnames or ("*",):
        for bound in parent.hosts:
            namespace, _, own = bound.partition("/")
            if hosts_overlap(own, host):
                near = True
                if namespace in ("*", route.meta.namespace):
                    return None
    if not parent.hosts:
        return None
    if near:
        return Fault(
            reason="NotAllowedByListeners",
            message=f'hostnames matched parent hostname "{parent.hostname}", but namespace '
            f'"{route.meta.namespace}" is not allowed by the parent',
        )
    return Fault(
        reason="NoMatchingListenerHostname", message=f'no hostnames matched parent hostname "{parent.hostname}"'
    )


def rank(fault: Fault | None) -> int:
    """Place in the order in which Istio tells one of several refusals; acceptance first."""
    reason = fault.reason if fault else ""
    return _RANKS.index(reason) if reason in _RANKS else 0
