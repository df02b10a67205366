"""Who is who: proxies by name, address and identity, services by host and by port of a workload."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from mlmesh_local.metrics.names import CLUSTER_ID, UNKNOWN
from mlmesh_local.model import ProxyNode
from mlmesh_local.resources.catalog import selects
from mlmesh_local.resources.model import Deployment
from mlmesh_local.translate import View


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """What metrics say of a workload, with Istio's defaults."""

    name: str = UNKNOWN
    namespace: str = UNKNOWN
    principal: str = UNKNOWN
    app: str = UNKNOWN
    version: str = UNKNOWN
    canonical_service: str = UNKNOWN
    canonical_revision: str = "latest"
    cluster: str = UNKNOWN


NOBODY = Workload()


@dataclass(frozen=True, slots=True, kw_only=True)
class NamedService:
    """A service as metrics name it."""

    host: str
    name: str
    namespace: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Directory:
    """A world as metrics need it."""

    nodes: Mapping[str, Workload] = field(default_factory=dict)
    """By node id."""
    addresses: Mapping[str, Workload] = field(default_factory=dict)
    """By the address of the pod."""
    identities: Mapping[str, Workload] = field(default_factory=dict)
    """By SPIFFE id, where only one workload has it."""
    services: Mapping[str, NamedService] = field(default_factory=dict)
    """By host."""
    own: Mapping[tuple[str, int], NamedService] = field(default_factory=dict)
    """By node id and container port."""

    @classmethod
    def of(cls, view: View) -> Directory:
        """The directory of a world."""
        world = view.world
        owners = _owners(view)
        nodes = {
            proxy.id: _workload(proxy, owners.get(proxy.id, proxy.id), world.trust_domain) for proxy in world.proxies
        }
        by_identity: dict[str, set[Workload]] = {}
        for workload in nodes.values():
            by_identity.setdefault(workload.principal, set()).add(workload)
        services = {
            service.host: NamedService(host=service.host, name=service.name, namespace=service.namespace)
            for service in view.services.values()
        }
        return cls(
            nodes=nodes,
            # Where a fault is between them, calls go to another address than the pod's.
            addresses={
                **{each.address: nodes[each.instance] for each in world.endpoints if each.instance in nodes},
                **{proxy.pod_address: nodes[proxy.id] for proxy in world.proxies},
            },
            identities={identity: next(iter(found)) for identity, found in by_identity.items() if len(found) == 1},
            services=services,
            own=_own_services(view, services),
        )


def _owners(view: View) -> dict[str, str]:
    """Deployments by the ids of their proxies: "{deployment}-{ordinal}"."""
    deployments = view.resources.specs(Deployment)
    found: dict[str, str] = {}
    for proxy in view.world.proxies:
        for deployment in deployments:
            name = deployment.meta.name
            rest = proxy.id.removeprefix(name)
            if deployment.meta.namespace == proxy.namespace and (not rest or (rest[0] == "-" and rest[1:].isdigit())):
                found[proxy.id] = name
                break
    return found


def _workload(proxy: ProxyNode, name: str, trust_domain: str) -> Workload:
    labels = proxy.labels
    canonical = ("service.istio.io/canonical-name", "app.kubernetes.io/name", "app")
    revision = ("service.istio.io/canonical-revision", "app.kubernetes.io/version", "version")
    return Workload(
        name=name,
        namespace=proxy.namespace,
        principal=proxy.identity(trust_domain),
        app=labels.get("app", UNKNOWN),
        version=labels.get("version", UNKNOWN),
        canonical_service=next((labels[key] for key in canonical if labels.get(key)), name),
        canonical_revision=next((labels[key] for key in revision if labels.get(key)), "latest"),
        cluster=CLUSTER_ID,
    )


def _own_services(view: View, services: Mapping[str, NamedService]) -> dict[tuple[str, int], NamedService]:
    found: dict[tuple[str, int], NamedService] = {}
    for service in view.services.values():
        if service.is_entry or not service.selector:
            continue
        for proxy in view.world.proxies:
            if proxy.namespace != service.namespace or not selects(service.selector, proxy.labels):
                continue
            for port in service.ports:
                target = port.target if isinstance(port.target, int) else proxy.container_ports.get(port.target, 0)
                found.setdefault((proxy.id, target), services[service.host])
    return found
