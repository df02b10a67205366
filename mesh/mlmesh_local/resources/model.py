"""What validated resources say, as values. Names and meanings are Istio's and Kubernetes'; unset is None.

Durations are seconds, percentages 0 to 100. Hosts are as written; `mlmesh_local.translate.view` resolves short names.
"""

from __future__ import annotations

from mlmesh_local.resources.mesh_config import MeshConfig
from mlmesh_local.resources.meta import Meta
from mlmesh_local.resources.model_gateways import Gateway, GatewayServer, ServerTls
from mlmesh_local.resources.model_policy import (
    EnvoyFilter,
    FilterPatch,
    PatchContext,
    PatchOperation,
    Telemetry,
    Tracing,
)
from mlmesh_local.resources.model_routes import (
    Destination,
    Fault,
    FaultAbort,
    FaultDelay,
    HeaderEdits,
    HttpMatch,
    HttpRule,
    Mirror,
    Retries,
    Rewrite,
    StringMatch,
    VirtualService,
    WeightedDestination,
)
from mlmesh_local.resources.model_security import (
    AuthorizationPolicy,
    ExternalAuthorizer,
    JwtRule,
    MtlsMode,
    PeerAuthentication,
    PolicyAction,
    PolicyRule,
    RequestAuthentication,
    RequestBody,
    Values,
)
from mlmesh_local.resources.model_traffic import (
    ClientTls,
    ConnectionPool,
    DestinationRule,
    EntryEndpoint,
    EntryPort,
    HashKey,
    LoadBalancer,
    OutlierDetection,
    ServiceEntry,
    Subset,
    TcpKeepalive,
    TrafficPolicy,
)
from mlmesh_local.resources.model_workload import (
    Container,
    ContainerPort,
    Deployment,
    EnvironmentVariable,
    Probe,
    Service,
    ServiceAccount,
    ServicePort,
)

Spec = (
    VirtualService
    | DestinationRule
    | Gateway
    | ServiceEntry
    | PeerAuthentication
    | AuthorizationPolicy
    | RequestAuthentication
    | Telemetry
    | EnvoyFilter
    | MeshConfig
    | Deployment
    | Service
    | ServiceAccount
)

__all__ = [
    "AuthorizationPolicy",
    "ClientTls",
    "ConnectionPool",
    "Container",
    "ContainerPort",
    "Deployment",
    "Destination",
    "DestinationRule",
    "EntryEndpoint",
    "EntryPort",
    "EnvironmentVariable",
    "EnvoyFilter",
    "ExternalAuthorizer",
    "Fault",
    "FaultAbort",
    "FaultDelay",
    "FilterPatch",
    "Gateway",
    "GatewayServer",
    "HashKey",
    "HeaderEdits",
    "HttpMatch",
    "HttpRule",
    "JwtRule",
    "LoadBalancer",
    "MeshConfig",
    "Meta",
    "Mirror",
    "MtlsMode",
    "OutlierDetection",
    "PatchContext",
    "PatchOperation",
    "PeerAuthentication",
    "PolicyAction",
    "PolicyRule",
    "Probe",
    "RequestAuthentication",
    "RequestBody",
    "Retries",
    "Rewrite",
    "ServerTls",
    "Service",
    "ServiceAccount",
    "ServiceEntry",
    "ServicePort",
    "Spec",
    "StringMatch",
    "Subset",
    "TcpKeepalive",
    "Telemetry",
    "Tracing",
    "TrafficPolicy",
    "Values",
    "VirtualService",
    "WeightedDestination",
]
