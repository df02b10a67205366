"""Labels of who called whom, by the rules of Istio's stats filter."""

from __future__ import annotations

from mlmesh_local.metrics.calls import Peers
from mlmesh_local.metrics.directory import NOBODY, Directory, NamedService, Workload
from mlmesh_local.metrics.names import UNKNOWN

_NO_SERVICE = {"block_all": "BlackHoleCluster", "allow_any": "PassthroughCluster"}
_OPEN_CLUSTERS = ("BlackHoleCluster", "PassthroughCluster", "InboundPassthroughCluster")


def peer_labels(directory: Directory, peers: Peers) -> tuple[str, ...]:
    """Values of `names.PEER_LABELS`."""
    own = directory.nodes.get(peers.node, NOBODY)
    return _as_server(directory, peers, own) if peers.role == "inbound" else _as_client(directory, peers, own)


def security_policy(peers: Peers) -> str:
    """Only who is called knows whether the call came over mutual TLS."""
    if peers.role != "inbound":
        return UNKNOWN
    return "mutual_tls" if peers.downstream_peer and peers.downstream_local else "none"


def _as_server(directory: Directory, peers: Peers, own: Workload) -> tuple[str, ...]:
    peer = directory.addresses.get(peers.downstream_host) or directory.identities.get(peers.downstream_peer) or NOBODY
    service = _service_of(directory, peers)
    return (
        "destination",
        *_workload_labels(peer, peers.downstream_peer),
        own.name,
        own.namespace,
        peers.downstream_local or UNKNOWN,
        own.app,
        own.version,
        service.host if service else own.canonical_service,
        service.name if service else own.canonical_service,
        own.namespace,
        own.canonical_service,
        own.canonical_revision,
        own.cluster,
    )


def _as_client(directory: Directory, peers: Peers, own: Workload) -> tuple[str, ...]:
    peer = directory.addresses.get(peers.upstream_host, NOBODY)
    service = _service_of(directory, peers)
    host = service.host if service else peers.authority
    name = _NO_SERVICE.get(peers.route) or (service.name if service else host)
    if not service and peers.cluster.startswith(_OPEN_CLUSTERS):
        name = peers.cluster
    workload = _workload_labels(peer, peers.upstream_peer)
    # The same order as a source's: workload, namespace, principal, app, version, canonical service, revision, cluster.
    destination, service_labels = workload[:5], (host or UNKNOWN, name or UNKNOWN, workload[1])
    source_principal = own.principal if peers.upstream_peer.startswith("spiffe://") else UNKNOWN
    source = (own.name, own.namespace, source_principal, own.app, own.version)
    return (
        "source",
        *source,
        own.canonical_service,
        own.canonical_revision,
        own.cluster,
        *destination,
        *service_labels,
        *workload[5:],
    )


def _workload_labels(peer: Workload, principal: str) -> tuple[str, ...]:
    """Labels of the other side. Its namespace is what its certificate says, as far as it has one."""
    namespace = principal.partition("/ns/")[2].partition("/")[0] or peer.namespace
    return (
        peer.name,
        namespace,
        principal or UNKNOWN,
        peer.app,
        peer.version,
        peer.canonical_service,
        peer.canonical_revision,
        peer.cluster,
    )


def _service_of(directory: Directory, peers: Peers) -> NamedService | None:
    """The service of a cluster: "outbound|9000|v1|server.mlmesh.svc.cluster.local", "inbound|8000||"."""
    parts = peers.cluster.rstrip(";").split("|")
    if len(parts) != 4:
        return None
    direction, port, _, host = parts
    if direction == "inbound":
        return directory.own.get((peers.node, int(port) if port.isdigit() else 0))
    return directory.services.get(host) or NamedService(host=host, name=host, namespace=UNKNOWN)
