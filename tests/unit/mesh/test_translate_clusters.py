"""DestinationRules, endpoints and PeerAuthentications become clusters and listeners as Istio would make them."""

from __future__ import annotations

from typing import Any

import pytest

from tests.support.mesh_documents import SUBSETS
from tests.support.mesh_world import HOST, WORKLOADS, Told, destination_rule, resource

HTTP_OPTIONS = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions"
V1, V2, CLIENT = ("127.64.1.1", "127.64.1.2", "127.64.1.3")


def options(cluster: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = cluster["typed_extension_protocol_options"][HTTP_OPTIONS]
    return found


def test_a_cluster_without_rules_has_istios_defaults() -> None:
    cluster = Told("client").cluster()
    assert cluster["connect_timeout"] == "10s"
    assert cluster["lb_policy"] == "LEAST_REQUEST"
    assert cluster["type"] == "EDS"
    assert "outlier_detection" not in cluster
    most = 2**32 - 1
    (threshold,) = cluster["circuit_breakers"]["thresholds"]
    assert threshold == {
        "max_connections": most,
        "max_pending_requests": most,
        "max_requests": most,
        "max_retries": most,
        "track_remaining": True,
    }
    assert options(cluster)["explicit_http_config"] == {"http2_protocol_options": {}}
    assert "typed_extension_protocol_options" not in Told("client").cluster(port=9090)  # Envoy's own: HTTP/1.1


def test_automatic_mutual_tls_checks_who_answers() -> None:
    istio, plain = Told("client").cluster()["transport_socket_matches"]
    assert istio["match"] == {"tlsMode": "istio"}
    context = istio["transport_socket"]["typed_config"]
    assert context["sni"] == f"outbound_.9000_._.{HOST}"
    common = context["common_tls_context"]
    assert common["alpn_protocols"] == ["istio", "h2"]
    validation = common["combined_validation_context"]["default_validation_context"]
    assert validation["match_typed_subject_alt_names"] == [
        {"san_type": "URI", "matcher": {"exact": "spiffe://cluster.local/ns/mlmesh/sa/server"}}
    ]
    assert plain["match"] == {}
    assert plain["transport_socket"]["name"] == "envoy.transport_sockets.raw_buffer"


@pytest.mark.parametrize(("mode", "tagged"), [("STRICT", True), ("PERMISSIVE", True), ("DISABLE", False)])
def test_endpoints_say_whether_they_take_mutual_tls(mode: str, tagged: bool) -> None:
    it = Told("client", resource("PeerAuthentication", f"{{mtls: {{mode: {mode}}}}}"))
    (locality,) = it.endpoints[f"outbound|9000||{HOST}"]["endpoints"]
    assert all(("metadata" in endpoint) is tagged for endpoint in locality["lb_endpoints"])


def test_modes_of_tls_in_destination_rules() -> None:
    mutual = Told("client", destination_rule("{tls: {mode: ISTIO_MUTUAL, subjectAltNames: [spiffe://a/b]}}")).cluster()
    context = mutual["transport_socket"]["typed_config"]["common_tls_context"]
    validation = context["combined_validation_context"]["default_validation_context"]
    assert validation["match_typed_subject_alt_names"] == [{"san_type": "URI", "matcher": {"exact": "spiffe://a/b"}}]
    plain = Told("client", destination_rule("{tls: {mode: DISABLE}}")).cluster()
    assert not {"transport_socket", "transport_socket_matches"} & plain.keys()


def test_subsets_have_their_endpoints_and_override_parts() -> None:
    rule = destination_rule(
        "{loadBalancer: {simple: ROUND_ROBIN}, connectionPool: {tcp: {maxConnections: 7, connectTimeout: 1s}}}",
        "[{name: v1, labels: {version: v1}}, {name: v2, labels: {version: v2},"
        " trafficPolicy: {connectionPool: {http: {http2MaxRequests: 3}}}}]",
    )
    it = Told("client", rule)
    assert it.addresses() == {(V1, 8000), (V2, 8000)}
    assert it.addresses("v1") == {(V1, 8000)}
    assert it.addresses("v2") == {(V2, 8000)}
    one, two = it.cluster("v1"), it.cluster("v2")
    assert (one["lb_policy"], two["lb_policy"]) == ("ROUND_ROBIN", "ROUND_ROBIN")
    assert one["circuit_breakers"]["thresholds"][0]["max_connections"] == 7
    assert one["connect_timeout"] == "1s"
    # A part is replaced as a whole, as in Istio.
    assert two["circuit_breakers"]["thresholds"][0]["max_connections"] == 2**32 - 1
    assert two["circuit_breakers"]["thresholds"][0]["max_requests"] == 3
    assert two["metadata"]["filter_metadata"]["istio"]["subset"] == "v2"


def test_port_level_settings_replace_parts_for_a_port() -> None:
    port = "{port: {number: 9090}, loadBalancer: {simple: ROUND_ROBIN}}"
    rule = destination_rule(f"{{loadBalancer: {{simple: RANDOM}}, portLevelSettings: [{port}]}}")
    it = Told("client", rule)
    assert it.cluster()["lb_policy"] == "RANDOM"
    assert it.cluster(port=9090)["lb_policy"] == "ROUND_ROBIN"


def test_connection_pool() -> None:
    rule = destination_rule(
        "{connectionPool: {tcp: {tcpKeepalive: {time: 60s, probes: 3}, maxConnectionDuration: 1h},"
        " http: {http1MaxPendingRequests: 1, http2MaxRequests: 0, maxRetries: 2, maxRequestsPerConnection: 5,"
        " idleTimeout: 90s, maxConcurrentStreams: 100, http2KeepAlive: {interval: 30s, timeout: 5s}}}}"
    )
    cluster = Told("client", rule).cluster()
    (threshold,) = cluster["circuit_breakers"]["thresholds"]
    assert (threshold["max_pending_requests"], threshold["max_retries"]) == (1, 2)
    assert threshold["max_requests"] == 2**32 - 1  # in Istio 0 means unset
    assert cluster["upstream_connection_options"] == {"tcp_keepalive": {"keepalive_probes": 3, "keepalive_time": 60}}
    assert options(cluster)["common_http_protocol_options"] == {
        "idle_timeout": "90s",
        "max_requests_per_connection": 5,
        "max_connection_duration": "3600s",
    }
    assert options(cluster)["explicit_http_config"]["http2_protocol_options"] == {
        "max_concurrent_streams": 100,
        "connection_keepalive": {"interval": "30s", "timeout": "5s"},
    }


def test_outlier_detection_turns_panic_and_success_rate_off() -> None:
    rule = destination_rule("{outlierDetection: {consecutive5xxErrors: 0, consecutiveGatewayErrors: 5, interval: 5s}}")
    cluster = Told("client", rule).cluster()
    assert cluster["outlier_detection"] == {
        "enforcing_success_rate": 0,
        "consecutive_5xx": 0,
        "enforcing_consecutive_5xx": 0,
        "consecutive_gateway_failure": 5,
        "enforcing_consecutive_gateway_failure": 100,
        "interval": "5s",
    }
    assert cluster["common_lb_config"] == {"healthy_panic_threshold": {"value": 0}}
    rule = destination_rule("{outlierDetection: {minHealthPercent: 30}}")
    assert Told("client", rule).cluster()["common_lb_config"] == {"healthy_panic_threshold": {"value": 30}}


def test_rules_of_one_host_are_merged_and_the_clients_namespace_comes_first() -> None:
    first = destination_rule("{loadBalancer: {simple: RANDOM}}", "[{name: v1, labels: {version: v1}}]")
    second = destination_rule("{loadBalancer: {simple: ROUND_ROBIN}}", "[{name: v2, labels: {version: v2}}]")
    it = Told("client", second.replace("name: server}", "name: this}"), first)
    assert it.cluster("v2")["lb_policy"] == "RANDOM"
    wide = resource(
        "DestinationRule",
        "{host: '*.svc.cluster.local', trafficPolicy: {loadBalancer: {simple: ROUND_ROBIN}}}",
        namespace="istio-system",
        group="networking.istio.io/v1",
    )
    assert Told("client", wide).cluster()["lb_policy"] == "ROUND_ROBIN"
    assert Told("client", wide, first).cluster()["lb_policy"] == "RANDOM"


def test_endpoints_that_are_not_ready_are_left_out_and_clusters_stay() -> None:
    before, after = Told("client", SUBSETS), Told("client", SUBSETS, not_ready={"server-v1"})
    assert after.addresses() == {(V2, 8000)}
    assert after.addresses("v1") == set()
    assert before.clusters == after.clusters
    assert before.listeners == after.listeners


EXTERNAL = """
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {name: outside}
spec:
  hosts: [models.example]
  location: MESH_EXTERNAL
  resolution: %s
  ports: [{number: 443, name: grpc, protocol: GRPC, targetPort: 8443}]
  endpoints: [{address: %s, labels: {zone: a}}, {address: 10.0.0.2, ports: {grpc: 9443}}]
---
"""


def test_service_entries() -> None:
    it = Told("client", EXTERNAL % ("STATIC", "10.0.0.1"))
    host = "models.example"
    assert it.addresses(port=443, host=host) == {("10.0.0.1", 8443), ("10.0.0.2", 9443)}
    cluster = it.cluster(port=443, host=host)
    assert "transport_socket_matches" not in cluster
    assert it.virtual_host(f"{host}:443", "443")["domains"] == [host, f"{host}."]

    tls = """
apiVersion: networking.istio.io/v1
kind: DestinationRule
metadata: {name: outside}
spec: {host: models.example, trafficPolicy: {tls: {mode: SIMPLE, sni: models.example}}}
"""
    it = Told("client", EXTERNAL % ("DNS", "models.example"), tls)
    cluster = it.cluster(port=443, host=host)
    assert cluster["type"] == "STRICT_DNS"
    assert f"outbound|443||{host}" not in it.endpoints
    context = cluster["transport_socket"]["typed_config"]
    assert context["sni"] == host
    assert context["common_tls_context"]["validation_context"]["trusted_ca"] == {
        "filename": "/etc/ssl/certs/ca-certificates.crt"
    }


# Inbound


def chains(*texts: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = Told("server-v1", *texts).listeners[f"{V1}_8000"]["filter_chains"]
    return found


def authentication(mode: str, *, name: str = "it", selector: str = "", ports: str = "", namespace: str = "") -> str:
    fields = [f"mtls: {{mode: {mode}}}"] if mode else []
    fields += [f"selector: {{matchLabels: {{{selector}}}}}"] if selector else []
    fields += [f"portLevelMtls: {{{ports}}}"] if ports else []
    return resource("PeerAuthentication", f"{{{', '.join(fields)}}}", name=name, namespace=namespace)


def test_strict_has_one_chain_and_demands_a_certificate_of_the_trust_domain() -> None:
    (chain,) = chains(authentication("STRICT"))
    context = chain["transport_socket"]["typed_config"]
    assert context["require_client_certificate"] is True
    common = context["common_tls_context"]
    assert common["alpn_protocols"] == ["h2", "http/1.1"]
    assert common["combined_validation_context"]["default_validation_context"] == {
        "match_typed_subject_alt_names": [{"san_type": "URI", "matcher": {"prefix": "spiffe://cluster.local/"}}]
    }
    manager = chain["filters"][0]["typed_config"]
    assert manager["forward_client_cert_details"] == "APPEND_FORWARD"
    assert manager["stream_idle_timeout"] == "0s"


def mode_of(found: list[dict[str, Any]]) -> str:
    kinds = [chain["name"] for chain in found]
    return {"mtls": "STRICT", "plaintext": "DISABLE"}[kinds[0]] if len(kinds) == 1 else "PERMISSIVE"


MESH_WIDE = {"namespace": "istio-system"}


@pytest.mark.parametrize(
    ("texts", "mode"),
    [
        ((), "PERMISSIVE"),
        ((authentication("STRICT", **MESH_WIDE),), "STRICT"),
        ((authentication("STRICT", **MESH_WIDE), authentication("DISABLE")), "DISABLE"),
        ((authentication("STRICT"), authentication("DISABLE", name="w", selector="version: v1")), "DISABLE"),
        ((authentication("STRICT"), authentication("DISABLE", name="w", selector="version: v2")), "STRICT"),
        ((authentication("STRICT"), authentication("UNSET", name="w", selector="version: v1")), "STRICT"),
        (
            (authentication("STRICT", selector="app: server", ports="8000: {mode: PERMISSIVE}"),),
            "PERMISSIVE",
        ),
        # The oldest of one scope wins.
        ((authentication("DISABLE"), authentication("STRICT", name="later")), "DISABLE"),
        ((authentication("STRICT", namespace="other"),), "PERMISSIVE"),
    ],
)
def test_which_mode_applies(texts: tuple[str, ...], mode: str) -> None:
    assert mode_of(chains(*texts)) == mode


def test_ports_that_bypass_the_sidecar() -> None:
    assert {f"{V1}_8000", f"{V1}_9090"} <= set(Told("server-v1").listeners)
    labels = "labels: {app: server, version: v1}"
    annotation = "annotations: {traffic.sidecar.istio.io/excludeInboundPorts: '9090'}"
    bypassing = WORKLOADS.replace(f"metadata: {{{labels}}}", f"metadata: {{{labels}, {annotation}}}")
    it = Told("server-v1", workloads=bypassing)
    assert f"{V1}_8000" in it.listeners
    assert f"{V1}_9090" not in it.listeners
    assert {e.target_port: e.mesh_tls for e in it.world.endpoints if e.instance == "server-v1"} == {
        8000: True,
        9090: False,
    }


def test_telemetry_turns_access_logs_on() -> None:
    logs = resource("Telemetry", "{accessLogging: [{providers: [{name: envoy}]}]}", group="telemetry.istio.io/v1")
    off = resource(
        "Telemetry",
        "{selector: {matchLabels: {app: client}}, accessLogging: [{disabled: true}]}",
        name="quiet",
        group="telemetry.istio.io/v1",
    )
    listener = f"127.64.3.{CLIENT[-1]}_9000"
    assert "access_log" not in Told("client").manager(listener)
    assert Told("client", logs).manager(listener)["access_log"]
    assert "access_log" not in Told("client", logs, off).manager(listener)
