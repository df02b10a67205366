"""Values that the laptop mesh's rooms pass to each other: the supervisor builds a `World`, translation reads it.

    documents = read_documents([Path("manifests/base"), Path("mesh/istio")])
    resources = ResourceSet().apply(load_resources(documents)).resources              # mlmesh_local.resources
    endpoints = service_endpoints(resources, proxies, ready={"registry-0"})           # mlmesh_local.translate
    world = World(resources=resources, proxies=proxies, endpoints=endpoints)
    for node_id, snapshot in build_snapshots(world).items():                          # mlmesh_local.snapshot
        ads.update(node_id, snapshot)                                                 # mlmesh_local.xds
    await ads.wait_acked(world.version, timeout_s=5.0)

Nothing here knows Envoy, gRPC or processes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from mlmesh_local.resources import ResourceSet
    from mlmesh_local.resources.model_sidecars import ProxySettings

ADS_CLUSTER = "xds-grpc"
"""Name of the cluster in a sidecar's bootstrap that leads to the control plane (Istio's own name)."""

WORKLOAD_SECRET = "default"  # noqa: S105  Istio's SDS name, not a secret
"""SDS name of a workload's certificate and key."""

TRUST_SECRET = "ROOTCA"  # noqa: S105  Istio's SDS name, not a secret
"""SDS name of the mesh's trust roots."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProxyNode:
    """One Envoy: the sidecar of an instance, or a gateway.

    Attributes:
        id: node id of the bootstrap, unique; the instance's name, such as "inference-v1-0".
        kind: "sidecar" (inbound and outbound listeners) or "gateway" (listeners of Gateway resources only).
        namespace, service_account: make the identity; ``service_account`` is "default" when the pod names none.
        labels: labels of the pod template; Services, subsets, policies and Gateways select by them.
        pod_address: IP on which the sidecar listens for the mesh, on each container port.
        application_address: IP on which the application listens, on the same container ports. Empty for a gateway.
        outbound_address: IP on which the sidecar listens for its application, on each service port. Gateways have none.
        container_ports: name to number, for a Service's named targetPort; an unnamed port has its number as name.
        extra_addresses: for a gateway, (server port, "host:port") at which that server listens in addition.
        access_log_path: file of access logs when Telemetry turns them on; empty for standard output.
        settings: what the pod's annotation says about its proxy; where it says nothing MeshConfig does.
    """

    id: str
    kind: Literal["sidecar", "gateway"] = "sidecar"
    namespace: str
    service_account: str
    labels: Mapping[str, str]
    pod_address: str
    application_address: str = ""
    outbound_address: str = ""
    container_ports: Mapping[str, int] = field(default_factory=dict)
    extra_addresses: tuple[tuple[int, str], ...] = ()
    access_log_path: str = ""
    settings: ProxySettings | None = None

    def identity(self, trust_domain: str) -> str:
        """The SPIFFE id of the workload's ServiceAccount."""
        return spiffe_id(trust_domain, self.namespace, self.service_account)


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """Where one port of a service is served by one instance.

    ``host`` is the service's full name, ``port`` the service port (not the target port), ``address`` an IP,
    ``target_port`` where to dial it, ``labels`` those of the pod, ``mesh_tls`` whether a sidecar takes mutual TLS.
    Endpoints that are not ``ready`` get no new requests; open streams to them go on. ``namespace`` is the service's,
    which is the workload's; ``locality`` is "region/zone/subzone", empty where the labels say it.
    """

    host: str
    port: int
    address: str
    target_port: int
    labels: Mapping[str, str]
    ready: bool
    instance: str
    mesh_tls: bool = True
    weight: int = 1
    namespace: str = ""
    locality: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """All that configuration is made from. Equal worlds give equal bytes.

    Attributes:
        resources: validated, cross-checked resources.
        proxies: every Envoy that should be configured.
        endpoints: see `mlmesh_local.translate.service_endpoints`.
        trust_domain: of the identities; "cluster.local" in policies stands for it, as in Istio.
        otlp_address: "host:port" of an OTLP gRPC collector for Envoy's spans; empty turns tracing off.
        als_address: "host:port" of the access log service that makes Istio's metrics; empty for none.
        key_sets: JSON Web Key Sets that were fetched, by their address; see `mlmesh_local.translate.jwt.key_source`.
        root_namespace: where mesh-wide policies live.
        domain: DNS suffix of services.
    """

    resources: ResourceSet
    proxies: tuple[ProxyNode, ...] = ()
    endpoints: tuple[Endpoint, ...] = ()
    trust_domain: str = "cluster.local"
    otlp_address: str = ""
    als_address: str = ""
    key_sets: Mapping[str, str] = field(default_factory=dict)
    root_namespace: str = "istio-system"
    domain: str = "cluster.local"

    @property
    def version(self) -> str:
        """12 hex digits that change when any input changes; what `mlmesh status` shows and proxies acknowledge."""
        content = [
            self.resources.digest,
            [_plain(p) for p in self.proxies],
            [_plain(e) for e in self.endpoints],
            [self.trust_domain, self.otlp_address, self.als_address, self.root_namespace, self.domain],
            dict(self.key_sets),
        ]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]


@dataclass(frozen=True, slots=True, kw_only=True)
class CertificateSecret:
    """A certificate chain with its key, PEM, under an SDS name: "default", or a Gateway's credentialName."""

    certificate_chain: bytes
    private_key: bytes = field(repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrustSecret:
    """Trust roots, PEM, under an SDS name: "ROOTCA", or a Gateway's credentialName + "-cacert"."""

    roots: bytes


Secret = CertificateSecret | TrustSecret


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeStatus:
    """What the control plane knows of one Envoy.

    ``version`` was last given to `AdsServer.update`; ``acked_version`` is the newest one that Envoy runs completely;
    ``rejection`` is Envoy's own text when it refused part of ``version`` (its last good configuration stays active).
    """

    connected: bool
    version: str
    acked_version: str
    rejection: str


def spiffe_id(trust_domain: str, namespace: str, service_account: str) -> str:
    """SPIFFE id in Istio's form, https://istio.io/latest/docs/concepts/security/#istio-identity."""
    return f"spiffe://{trust_domain}/ns/{namespace}/sa/{service_account}"


def _plain(value: ProxyNode | Endpoint) -> dict[str, object]:
    plain: dict[str, object] = {}
    for name in value.__dataclass_fields__:
        item = getattr(value, name)
        if dataclasses.is_dataclass(item) and not isinstance(item, type):
            item = dataclasses.asdict(item)
        plain[name] = dict(item) if isinstance(item, Mapping) else item
    return plain
