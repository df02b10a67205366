"""What resources of the Kubernetes Gateway API say, as values, with the API's defaults filled in.

Names and defaults are those of version 1.6, https://gateway-api.sigs.k8s.io/reference/spec/. Unset texts are empty,
unset numbers 0 or None.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from mlmesh_local.resources.meta import Meta
from mlmesh_local.resources.problems import At

if TYPE_CHECKING:
    from mlmesh_local.resources.gateway_api.model_tls import GatewayTls

GROUP = "gateway.networking.k8s.io"


@dataclass(frozen=True, slots=True, kw_only=True)
class ParentRef:
    """What a route attaches to: a Gateway (or one listener, by name or port), a Service or a ServiceEntry."""

    group: str = GROUP
    kind: str = "Gateway"
    namespace: str = ""
    name: str
    section: str = ""
    port: int = 0
    at: At = field(compare=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class HeaderFilter:
    """Edits of headers, as (name, value). Of equal names the first counts."""

    overwrite: tuple[tuple[str, str], ...] = ()
    add: tuple[tuple[str, str], ...] = ()
    remove: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class MirrorFilter:
    """A copy of a percentage of requests; None is all."""

    backend: BackendRef
    percent: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PathChange:
    """A path, or the matched prefix, replaced. ``how`` is ReplaceFullPath or ReplacePrefixMatch."""

    how: str
    value: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RedirectFilter:
    """An answer that sends the client elsewhere."""

    scheme: str = ""
    host: str = ""
    path: PathChange | None = None
    port: int = 0
    status: int = 302


@dataclass(frozen=True, slots=True, kw_only=True)
class RewriteFilter:
    """The request changed before it is sent on."""

    host: str = ""
    path: PathChange | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class CorsFilter:
    """Cross-origin requests that are answered."""

    origins: tuple[str, ...] = ()
    credentials: bool = False
    methods: tuple[str, ...] = ()
    headers: tuple[str, ...] = ()
    expose: tuple[str, ...] = ()
    max_age_s: int = 5


FilterValue = HeaderFilter | MirrorFilter | RedirectFilter | RewriteFilter | CorsFilter


@dataclass(frozen=True, slots=True, kw_only=True)
class Filter:
    """A step of a rule. ``value`` is None for a type that Istio does not know (ExtensionRef)."""

    type: str
    value: FilterValue | None
    at: At = field(compare=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class BackendRef:
    """Where a rule sends, with its share."""

    group: str = ""
    kind: str = "Service"
    namespace: str = ""
    name: str
    port: int = 0
    weight: int = 1
    filters: tuple[Filter, ...] = ()
    at: At = field(compare=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class ValueMatch:
    """A header or query parameter compared; ``how`` is Exact or RegularExpression."""

    name: str
    how: str
    value: str


@dataclass(frozen=True, slots=True, kw_only=True)
class HttpRouteMatch:
    """Conditions on an HTTP request that must all hold."""

    path_how: str = "PathPrefix"
    path: str = "/"
    headers: tuple[ValueMatch, ...] = ()
    query: tuple[ValueMatch, ...] = ()
    method: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class GrpcRouteMatch:
    """Conditions on a gRPC call that must all hold. ``how`` is empty where the method does not matter."""

    how: str = ""
    service: str | None = None
    method: str | None = None
    headers: tuple[ValueMatch, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class RouteRetry:
    """Retries of a rule; times in seconds."""

    codes: tuple[int, ...] = ()
    attempts: int | None = None
    backoff_s: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RouteRule:
    """A rule of an HTTPRoute or a GRPCRoute (or, with backends only, of a TLSRoute or a TCPRoute)."""

    name: str = ""
    matches: tuple[HttpRouteMatch | GrpcRouteMatch, ...] = ()
    filters: tuple[Filter, ...] = ()
    backends: tuple[BackendRef, ...] | None = None
    request_timeout_s: float | None = None
    backend_timeout_s: float | None = None
    retry: RouteRetry | None = None
    at: At = field(compare=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """What all routes have."""

    meta: Meta
    parents: tuple[ParentRef, ...]
    hostnames: tuple[str, ...]
    rules: tuple[RouteRule, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class HttpRoute(Route):
    """HTTPRoute."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GrpcRoute(Route):
    """GRPCRoute."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TlsRoute(Route):
    """TLSRoute."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TcpRoute(Route):
    """TCPRoute."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelRequirement:
    """An expression of a label selector."""

    key: str
    operator: str
    values: tuple[str, ...] = ()

    def holds(self, labels: Mapping[str, str]) -> bool:
        """Whether labels fulfil it."""
        if self.operator == "Exists":
            return self.key in labels
        if self.operator == "DoesNotExist":
            return self.key not in labels
        inside = labels.get(self.key) in self.values
        return inside if self.operator == "In" else not inside


@dataclass(frozen=True, slots=True, kw_only=True)
class ObjectRef:
    """A reference to a resource."""

    group: str = ""
    kind: str
    namespace: str = ""
    name: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ListenerTls:
    """TLS of a listener: ``mode`` is Terminate or Passthrough."""

    mode: str = "Terminate"
    certificates: tuple[ObjectRef, ...] = ()
    options: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Listener:
    """A listener of a Gateway. ``namespaces`` is Same, All or Selector; no ``kinds`` allow what the protocol can."""

    name: str
    hostname: str
    port: int
    protocol: str
    tls: ListenerTls | None
    namespaces: str = "Same"
    selector: tuple[LabelRequirement, ...] | None = None
    kinds: tuple[tuple[str, str], ...] = ()
    at: At = field(compare=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewayAddress:
    """An address that a Gateway asks for; Hostname names a Service that is there already."""

    type: str = "IPAddress"
    value: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class NamespaceScope:
    """Which namespaces: ``how`` is None, Same, All or Selector."""

    how: str
    selector: tuple[LabelRequirement, ...] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class KubernetesGateway:
    """Gateway of the Gateway API. ``labels`` and ``annotations`` of what is made for it: None takes its own.

    ``sets``: of which namespaces it takes ListenerSets.
    """

    meta: Meta
    class_name: str
    listeners: tuple[Listener, ...]
    addresses: tuple[GatewayAddress, ...] = ()
    labels: Mapping[str, str] | None = None
    annotations: Mapping[str, str] | None = None
    parameters: ObjectRef | None = None
    sets: NamespaceScope = NamespaceScope(how="None")
    tls: GatewayTls | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ListenerSet:
    """More listeners for a Gateway."""

    meta: Meta
    parent: ObjectRef
    listeners: tuple[Listener, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewayClass:
    """Whose gateways these are."""

    meta: Meta
    controller: str


@dataclass(frozen=True, slots=True, kw_only=True)
class GrantFrom:
    """Who may refer."""

    group: str
    kind: str
    namespace: str


@dataclass(frozen=True, slots=True, kw_only=True)
class GrantTo:
    """To what, in the grant's own namespace; without a name to all of the kind."""

    group: str
    kind: str
    name: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReferenceGrant:
    """Permission to refer into the grant's namespace."""

    meta: Meta
    origins: tuple[GrantFrom, ...]
    targets: tuple[GrantTo, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Namespace:
    """A namespace; its labels are those of ``meta``."""

    meta: Meta
