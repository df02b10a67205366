"""Clusters of a sidecar as gRPC clients understand them.

gRFC A27 (EDS), A29 (TLS by certificate providers), A32 (circuit breakers), A42 (ring hash), A50 (outlier detection).
A load balancer that a client does not know makes it refuse every cluster of the response; Python's knows ROUND_ROBIN
and RING_HASH. LEAST_REQUEST, Istio's default, and RANDOM spread calls evenly, too: they become ROUND_ROBIN.
"""

from __future__ import annotations

from typing import Final

from mlmesh_local.envoy_types import Json, typed
from mlmesh_local.proxyless.refusals import Refusal, provenance
from mlmesh_local.resources.catalog import CatalogService
from mlmesh_local.translate.names import ADS
from mlmesh_local.translate.view import View

PROVIDER: Final = "default"
"""Certificate provider of the bootstrap."""

_SPREAD = {"ROUND_ROBIN", "LEAST_REQUEST", "RANDOM"}
_UNBOUNDED = 2**32 - 1
_UPSTREAM_TLS = "envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext"
_WITHOUT_TYPE = "envoy.transport_sockets.raw_buffer"


def client_cluster(cluster: Json, view: View) -> tuple[Json, list[Refusal]]:
    """A cluster for a gRPC client, and why it cannot be called as it is asked for."""
    where = provenance(cluster, f"the cluster {cluster['name']}")
    found: list[Refusal] = []
    result: Json = {"name": cluster["name"], "lb_policy": "ROUND_ROBIN"}
    _endpoints(cluster, result, where, found)
    _load_balancer(cluster, result, where, found)
    if "outlier_detection" in cluster:
        why = "gRPC clients eject by success rate, not by errors in a row"
        found.append(Refusal(where=where, field="outlierDetection", why=why))
    limits = cluster.get("circuit_breakers", {}).get("thresholds", [{}])[0]
    if limits.get("max_requests", _UNBOUNDED) != _UNBOUNDED:
        result["circuit_breakers"] = {"thresholds": [{"max_requests": limits["max_requests"]}]}
    if any(limits.get(name, _UNBOUNDED) != _UNBOUNDED for name in ("max_pending_requests", "max_retries")):
        why = "of a connection pool gRPC clients know http2MaxRequests alone"
        found.append(Refusal(where=where, field="connectionPool", why=why))
    _security(cluster, result, view, where, found)
    return result, found


def _endpoints(cluster: Json, result: Json, where: str, found: list[Refusal]) -> None:
    kind = cluster.get("type", "STATIC")
    if kind == "EDS":
        name = cluster["eds_cluster_config"].get("service_name") or cluster["name"]
        result.update(type="EDS", eds_cluster_config={"eds_config": ADS, "service_name": name})
        return
    assignment = cluster.get("load_assignment", {})
    endpoints = [item for locality in assignment.get("endpoints", ()) for item in locality["lb_endpoints"]]
    if kind in ("STRICT_DNS", "LOGICAL_DNS") and len(endpoints) == 1:
        one = {"endpoint": {"address": endpoints[0]["endpoint"]["address"]}}
        assignment = {"cluster_name": cluster["name"], "endpoints": [{"lb_endpoints": [one]}]}
        result.update(type="LOGICAL_DNS", load_assignment=assignment)
        return
    found.append(Refusal(where=where, field="resolution", why="gRPC clients take one DNS name or endpoints over xDS"))


def _load_balancer(cluster: Json, result: Json, where: str, found: list[Refusal]) -> None:
    policy = cluster.get("lb_policy", "ROUND_ROBIN")
    if policy == "RING_HASH":
        result["lb_policy"] = policy
        result["ring_hash_lb_config"] = {
            key: value
            for key, value in cluster.get("ring_hash_lb_config", {}).items()
            if key in ("minimum_ring_size", "maximum_ring_size")
        }
    elif policy not in _SPREAD or "load_balancing_policy" in cluster:
        found.append(Refusal(where=where, field="loadBalancer", why="gRPC clients know ROUND_ROBIN and ring hash"))


def _security(cluster: Json, result: Json, view: View, where: str, found: list[Refusal]) -> None:
    """Mutual TLS where every endpoint demands it, plaintext where none does.

    A server that takes both tells them apart by Istio's ALPN, which gRPC does not send: plaintext is what it takes.
    """
    matched = cluster.get("transport_socket_matches")
    socket = cluster.get("transport_socket")
    if matched:
        socket = matched[0]["transport_socket"]
    elif socket is None or socket.get("name") == _WITHOUT_TYPE:
        return
    names = _identities(socket)
    if names is None:
        found.append(Refusal(where=where, field="tls", why="gRPC clients have the mesh's certificates only"))
        return
    modes = _modes(cluster["name"], view)
    if matched and "STRICT" not in modes:
        return
    if modes - {"STRICT"}:
        why = "servers that also take plaintext (PERMISSIVE) tell mutual TLS by Istio's ALPN, which gRPC does not send"
        found.append(Refusal(where=where, field="tls", why=why))
        return
    context = {
        "common_tls_context": {
            "tls_certificate_provider_instance": {"instance_name": PROVIDER, "certificate_name": "default"},
            "combined_validation_context": {
                "default_validation_context": {
                    "ca_certificate_provider_instance": {"instance_name": PROVIDER, "certificate_name": "ROOTCA"},
                    "match_subject_alt_names": names,
                },
            },
        }
    }
    result["transport_socket"] = {"name": "envoy.transport_sockets.tls", "typed_config": typed(_UPSTREAM_TLS, context)}


def _identities(socket: Json) -> list[Json] | None:
    """Names that the server's certificate may have; None where it is not the mesh's mutual TLS."""
    common = socket.get("typed_config", {}).get("common_tls_context", {})
    own = [item.get("name") for item in common.get("tls_certificate_sds_secret_configs", ())]
    context = common.get("combined_validation_context", {}).get("default_validation_context", {})
    if own != ["default"]:
        return None
    return [item["matcher"] for item in context.get("match_typed_subject_alt_names", ())]


def _modes(name: str, view: View) -> set[str]:
    _, port, _, host = name.split("|")
    service: CatalogService | None = view.services.get(host)
    if service is None:
        return set()
    return {
        view.mtls_mode(service.namespace, endpoint.labels, endpoint.target_port) if endpoint.mesh_tls else "DISABLE"
        for endpoint in view.endpoints(service, int(port), {})
    }
