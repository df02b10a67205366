"""What gRPC clients without a sidecar are told, and what they are refused, rule by rule."""

from __future__ import annotations

from typing import Any

import pytest

from mlmesh_local.envoy_types import CLUSTER, ENDPOINTS, LISTENER, ROUTES, plain_bytes
from mlmesh_local.proxyless.bootstrap import bootstrap
from mlmesh_local.proxyless.build import Client, client_of
from mlmesh_local.proxyless.node import ProxylessNode, tolerated_fields
from mlmesh_local.snapshot import Snapshot, SnapshotBuilder
from mlmesh_runtime.errors import InvalidInput
from tests.support.mesh_documents import SUBSETS
from tests.support.mesh_world import HOST, destination_rule, resource, virtual_service, world

STRICT = resource("PeerAuthentication", "{mtls: {mode: STRICT}}")
ROUTE = "route: [{destination: {host: server, subset: v1}}]"
NAME = f"{HOST}:9000"


def node(**fields: Any) -> ProxylessNode:
    return ProxylessNode(
        **{
            "id": "proxyless~mlmesh~client~x",
            "namespace": "mlmesh",
            "service_account": "client",
            "labels": {},
            **fields,
        }
    )


def client(*texts: str, **fields: Any) -> Client:
    builder = SnapshotBuilder()
    builder.build(world(*texts))
    return client_of(builder, node(**fields))


def content(snapshot: Snapshot, type_url: str, name: str) -> dict[str, Any]:
    return plain_bytes(type_url, snapshot.resources[type_url][name].content)


def route(http: str, *texts: str, **fields: Any) -> dict[str, Any]:
    """The first route that a client is told."""
    snapshot = client(SUBSETS, virtual_service(f"[{http}]"), *texts, **fields).snapshot("1")
    found: dict[str, Any] = content(snapshot, ROUTES, NAME)["virtual_hosts"][0]["routes"][0]
    return found


def test_the_chain_from_a_target_to_its_endpoints() -> None:
    snapshot = client(SUBSETS, STRICT, virtual_service(f"[{{{ROUTE}}}]")).snapshot("1")
    for target in ("server:9000", "server.mlmesh:9000", NAME):
        manager = content(snapshot, LISTENER, target)["api_listener"]["api_listener"]
        assert manager["rds"]["route_config_name"] == NAME
    assert content(snapshot, ROUTES, NAME)["virtual_hosts"][0]["domains"] == ["*"]
    cluster = content(snapshot, CLUSTER, f"outbound|9000|v1|{HOST}")
    assert cluster.get("lb_policy", "ROUND_ROBIN") == "ROUND_ROBIN"
    context = cluster["transport_socket"]["typed_config"]["common_tls_context"]
    names = context["combined_validation_context"]["default_validation_context"]["match_subject_alt_names"]
    assert names == [{"exact": "spiffe://cluster.local/ns/mlmesh/sa/server"}]
    (locality,) = content(snapshot, ENDPOINTS, f"outbound|9000|v1|{HOST}")["endpoints"]
    assert len(locality["lb_endpoints"]) == 1
    assert "metadata" not in locality["lb_endpoints"][0]


@pytest.mark.parametrize(
    ("rule", "field"),
    [
        (f"{{{ROUTE}, mirror: {{host: server, subset: v2}}}}", "mirror"),
        (f"{{{ROUTE}, timeout: 1s}}", "timeout"),
        (f"{{{ROUTE}, rewrite: {{uri: /x}}}}", "rewrite"),
        (f"{{{ROUTE}, headers: {{request: {{set: {{a: b}}}}}}}}", "headers"),
        (f"{{{ROUTE}, retries: {{attempts: 2, perTryTimeout: 1s}}}}", "retries.perTryTimeout"),
        (f"{{{ROUTE}, retries: {{attempts: 2, retryOn: '5xx'}}}}", "retries.retryOn"),
        (f"{{{ROUTE}, match: [{{queryParams: {{a: {{exact: b}}}}}}]}}", "match.queryParams"),
        (f"{{{ROUTE}, match: [{{authority: {{exact: b}}}}]}}", "match"),
        ("{redirect: {uri: /x}}", "redirect"),
        ("{directResponse: {status: 503}}", "directResponse"),
    ],
)
def test_rules_are_refused_by_field(rule: str, field: str) -> None:
    cluster = route(rule)["route"]["cluster"]
    assert cluster.startswith("refused|")
    assert f"VirtualService mlmesh/server http[0]: {field}: " in cluster


@pytest.mark.parametrize(
    ("policy", "field"),
    [
        ("{outlierDetection: {consecutive5xxErrors: 3}}", "outlierDetection"),
        ("{loadBalancer: {consistentHash: {httpCookie: {name: c, ttl: 1s}}}}", "loadBalancer.consistentHash"),
        ("{connectionPool: {http: {http1MaxPendingRequests: 1}}}", "connectionPool"),
        ("{tls: {mode: ISTIO_MUTUAL}}", "tls"),
        ("{tls: {mode: SIMPLE}}", "tls"),
    ],
)
def test_a_destination_that_it_cannot_call_takes_its_rules_with_it(policy: str, field: str) -> None:
    """ISTIO_MUTUAL, because the server here is PERMISSIVE."""
    snapshot = client(destination_rule(policy)).snapshot("1")
    cluster = content(snapshot, ROUTES, NAME)["virtual_hosts"][0]["routes"][0]["route"]["cluster"]
    assert cluster.startswith("refused|")
    assert f": {field}: " in cluster


def test_what_it_can_is_left() -> None:
    rule = (
        f"{{match: [{{headers: {{x-a: {{prefix: b}}}}, method: {{exact: POST}}}}], retries: {{attempts: 9}}, {ROUTE}}}"
    )
    told = route(rule)
    assert told["route"]["cluster"] == f"outbound|9000|v1|{HOST}"
    assert told["route"]["retry_policy"] == {"retry_on": "unavailable,cancelled", "num_retries": 4}
    assert [header["name"] for header in told["match"]["headers"]] == ["x-a"]
    fault = "fault: {abort: {grpcStatus: UNAVAILABLE, percentage: {value: 100}}}"
    assert "envoy.filters.http.fault" in route(f"{{{fault}, {ROUTE}}}")["typed_per_filter_config"]


def test_a_refused_call_is_told_why() -> None:
    """The name of endpoints that are not there is what gRPC puts into the status."""
    snapshot = client(SUBSETS, virtual_service(f"[{{{ROUTE}, timeout: 1s}}]")).snapshot("1")
    name = content(snapshot, ROUTES, NAME)["virtual_hosts"][0]["routes"][0]["route"]["cluster"]
    endpoints = content(snapshot, CLUSTER, name)["eds_cluster_config"]["service_name"]
    assert endpoints.startswith("refused without a sidecar: VirtualService mlmesh/server http[0]: timeout: ")
    assert content(snapshot, ENDPOINTS, endpoints) == {"cluster_name": endpoints}


def test_permissive_servers_are_called_in_plaintext() -> None:
    snapshot = client(SUBSETS).snapshot("1")
    assert "transport_socket" not in content(snapshot, CLUSTER, f"outbound|9000||{HOST}")


def test_what_is_tolerated_is_left_out_and_told() -> None:
    texts = (SUBSETS, virtual_service(f"[{{{ROUTE}, mirror: {{host: server, subset: v2}}}}]"))
    tolerant = client(*texts, tolerated=frozenset({"mirror"}))
    snapshot = tolerant.snapshot("1")
    assert content(snapshot, LISTENER, "server:9000")
    action = content(snapshot, ROUTES, NAME)["virtual_hosts"][0]["routes"][0]["route"]
    assert action["cluster"] == f"outbound|9000|v1|{HOST}"
    assert "request_mirror_policies" not in action
    assert [one.field for one in tolerant.refusals()] == ["mirror"]


def test_unknown_targets_and_names() -> None:
    a_client = client(SUBSETS)
    snapshot = a_client.snapshot("1")
    listener = content(snapshot, LISTENER, "nobody:9000")["api_listener"]["api_listener"]
    cluster = listener["route_config"]["virtual_hosts"][0]["routes"][0]["route"]["cluster"]
    assert "no service of the mesh has this host name and port" in cluster
    assert [one.where for one in a_client.refusals()] == ["xds:///nobody:9000"]
    for type_url in (ROUTES, CLUSTER):
        assert snapshot.resources[type_url].get("nothing") is None


def test_nodes_are_read_from_their_bootstrap() -> None:
    wanted = node(labels={"team": "red"}, tolerated=frozenset({"mirror"}), token="secret-token")
    made = bootstrap(wanted, ads="127.0.0.1:1", folder="/x")
    again = ProxylessNode.of_bootstrap(made["node"]["id"], made["node"]["metadata"])
    assert again == wanted
    assert again is not None
    assert again.token == "secret-token"
    assert "secret-token" not in repr(again)
    for other in ("sidecar~1.2.3.4~x~y", "client-0", "proxyless~a~b", ""):
        assert ProxylessNode.of_bootstrap(other, {}) is None


def test_only_known_fields_may_be_done_without() -> None:
    assert tolerated_fields(["mirror"]) == {"mirror"}
    with pytest.raises(InvalidInput, match='did you mean "outlierDetection"'):
        tolerated_fields(["outlier"])
