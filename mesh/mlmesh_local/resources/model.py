"""What validated resources say, as values. Names and meanings are Istio's and Kubernetes'; unset is None.

Durations are seconds, percentages 0 to 100. Hosts are as written; `mlmesh_local.translate.view` resolves short names.
"""

from __future__ import annotations

from mlmesh_local.resources.credentials import Credential
from mlmesh_local.resources.gateway_api.model import (
    GatewayClass,
    GrpcRoute,
    HttpRoute,
    KubernetesGateway,
    ListenerSet,
    Namespace,
    ReferenceGrant,
    TcpRoute,
    TlsRoute,
)
from mlmesh_local.resources.gateway_api.model_tls import BackendTlsPolicy, CaBundle
from mlmesh_local.resources.mesh_config import MeshConfig
from mlmesh_local.resources.meta import Meta
from mlmesh_local.resources.model_gateways import Gateway, GatewayServer, ServerTls
from mlmesh_local.resources.model_hosts import (
    BalancerPolicy,
    ClientTls,
    ConnectionPool,
    DestinationRule,
    EntryEndpoint,
    EntryPort,
    HashKey,
    LoadBalancer,
    LocalityBalancing,
    OutlierDetection,
    Resolution,
    RetryBudget,
    ServiceEntry,
    Subset,
    TcpKeepalive,
    TlsMode,
    TrafficPolicy,
    Tunnel,
    Warmup,
    WorkloadEntry,
    WorkloadGroup,
    ZoneAwareBalancing,
)
from mlmesh_local.resources.model_policy import (
    EnvoyFilter,
    FilterPatch,
    PatchContext,
    PatchOperation,
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
from mlmesh_local.resources.model_sidecars import EgressHost, EgressListener, IngressListener, ProxyConfig, Sidecar
from mlmesh_local.resources.model_telemetry import Telemetry
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
    | WorkloadEntry
    | WorkloadGroup
    | Sidecar
    | ProxyConfig
    | PeerAuthentication
    | AuthorizationPolicy
    | RequestAuthentication
    | Telemetry
    | EnvoyFilter
    | MeshConfig
    | KubernetesGateway
    | ListenerSet
    | BackendTlsPolicy
    | CaBundle
    | Credential
    | GatewayClass
    | HttpRoute
    | GrpcRoute
    | TlsRoute
    | TcpRoute
    | ReferenceGrant
    | Namespace
    | Deployment
    | Service
    | ServiceAccount
)

__all__ = [
    "AuthorizationPolicy",
    "BalancerPolicy",
    "ClientTls",
    "ConnectionPool",
    "Container",
    "ContainerPort",
    "Deployment",
    "Destination",
    "DestinationRule",
    "EgressHost",
    "EgressListener",
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
    "GatewayClass",
    "GatewayServer",
    "GrpcRoute",
    "HashKey",
    "HeaderEdits",
    "HttpMatch",
    "HttpRoute",
    "HttpRule",
    "IngressListener",
    "JwtRule",
    "KubernetesGateway",
    "LoadBalancer",
    "LocalityBalancing",
    "MeshConfig",
    "Meta",
    "Mirror",
    "MtlsMode",
    "Namespace",
    "OutlierDetection",
    "PatchContext",
    "PatchOperation",
    "PeerAuthentication",
    "PolicyAction",
    "PolicyRule",
    "Probe",
    "ProxyConfig",
    "ReferenceGrant",
    "RequestAuthentication",
    "RequestBody",
    "Resolution",
    "Retries",
    "RetryBudget",
    "Rewrite",
    "ServerTls",
    "Service",
    "ServiceAccount",
    "ServiceEntry",
    "ServicePort",
    "Sidecar",
    "Spec",
    "StringMatch",
    "Subset",
    "TcpKeepalive",
    "TcpRoute",
    "Telemetry",
    "TlsMode",
    "TlsRoute",
    "TrafficPolicy",
    "Tunnel",
    "Values",
    "VirtualService",
    "Warmup",
    "WeightedDestination",
    "WorkloadEntry",
    "WorkloadGroup",
    "ZoneAwareBalancing",
]
