"""Every setting of a DestinationRule becomes what Istio makes of it; rules are found and merged as Istio does."""

from __future__ import annotations

from typing import Any

import pytest

from tests.support.mesh_world import HOST, WORKLOADS, Told, destination_rule, resource

NETWORKING = "networking.istio.io/v1"
HTTP_OPTIONS = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions"
V1, V2 = "[{name: v1, labels: {version: v1}}]", "[{name: v2, labels: {version: v2}}]"


def rule(spec: str, *, name: str = "it", namespace: str = "") -> str:
    return resource("DestinationRule", spec, name=name, namespace=namespace, group=NETWORKING)


def cluster(policy: str, **where: Any) -> dict[str, Any]:
    return Told("client", destination_rule(policy)).cluster(**where)


def options(found: dict[str, Any]) -> dict[str, Any]:
    result: dict[str, Any] = found["typed_extension_protocol_options"][HTTP_OPTIONS]
    return result


@pytest.mark.parametrize(
    ("balancer", "expected"),
    [
        ("{simple: UNSPECIFIED}", {"lb_policy": "LEAST_REQUEST"}),
        ("{simple: LEAST_CONN}", {"lb_policy": "LEAST_REQUEST"}),
        ("{simple: RANDOM}", {"lb_policy": "RANDOM"}),
        ("{simple: PASSTHROUGH}", {"lb_policy": "RANDOM"}),
        (
            "{consistentHash: {httpHeaderName: x}}",
            {"lb_policy": "RING_HASH", "ring_hash_lb_config": {"minimum_ring_size": 1024}},
        ),
        ("{consistentHash: {httpHeaderName: x, ringHash: {}}}", {"lb_policy": "RING_HASH"}),
        (
            "{consistentHash: {httpHeaderName: x, ringHash: {minimumRingSize: 4096}}}",
            {"lb_policy": "RING_HASH", "ring_hash_lb_config": {"minimum_ring_size": 4096}},
        ),
        (
            "{consistentHash: {useSourceIp: true, minimumRingSize: 7}}",
            {"lb_policy": "RING_HASH", "ring_hash_lb_config": {"minimum_ring_size": 7}},
        ),
        (
            "{consistentHash: {useSourceIp: true, maglev: {tableSize: 65537}}}",
            {"lb_policy": "MAGLEV", "maglev_lb_config": {"table_size": 65537}},
        ),
        (
            "{warmupDurationSecs: 30s}",
            {
                "lb_policy": "LEAST_REQUEST",
                "least_request_lb_config": {"slow_start_config": {"slow_start_window": "30s"}},
            },
        ),
        (
            "{simple: ROUND_ROBIN, warmup: {duration: 1m, minimumPercent: 0, aggression: 2}}",
            {
                "lb_policy": "ROUND_ROBIN",
                "round_robin_lb_config": {
                    "slow_start_config": {
                        "slow_start_window": "60s",
                        "aggression": {"default_value": 2.0, "runtime_key": "("},
                        "min_weight_percent": {"value": 0.0},
                    }
                },
            },
        ),
        ("{simple: RANDOM, warmup: {duration: 1m}}", {"lb_policy": "RANDOM"}),
    ],
)
def test_load_balancers(balancer: str, expected: dict[str, Any]) -> None:
    found = cluster(f"{{loadBalancer: {balancer}}}")
    assert {name: value for name, value in found.items() if name.startswith("lb_") or "lb_config" in name} == {
        **expected,
        "common_lb_config": {"healthy_panic_threshold": {"value": 0}},
    }


def test_hash_without_a_key_and_cookies_with_attributes() -> None:
    it = Told("client", destination_rule("{loadBalancer: {consistentHash: {}}}"))
    assert it.cluster()["lb_policy"] == "RING_HASH"
    assert "hash_policy" not in it.action()


@pytest.mark.parametrize(
    ("http", "port", "expected"),
    [
        ("{h2UpgradePolicy: UPGRADE}", 9090, {"explicit_http_config": {"http2_protocol_options": {}}}),
        (
            "{useClientProtocol: true}",
            9000,
            {"use_downstream_protocol_config": {"http_protocol_options": {}, "http2_protocol_options": {}}},
        ),
        (
            "{idleTimeout: 1s}",
            9090,
            {
                "explicit_http_config": {"http_protocol_options": {}},
                "common_http_protocol_options": {"idle_timeout": "1s"},
            },
        ),
        # What only HTTP/2 has does not act on HTTP/1.
        (
            "{maxConcurrentStreams: 5}",
            9090,
            {"explicit_http_config": {"http_protocol_options": {}}, "common_http_protocol_options": {}},
        ),
    ],
)
def test_protocols(http: str, port: int, expected: dict[str, Any]) -> None:
    found = dict(options(cluster(f"{{connectionPool: {{http: {http}}}}}", port=port)))
    found.pop("@type")
    assert found == expected


def test_idle_timeout_of_tcp_counts_where_http_sets_none() -> None:
    both = cluster("{connectionPool: {tcp: {idleTimeout: 0s}, http: {idleTimeout: 7s}}}")
    assert options(both)["common_http_protocol_options"] == {"idle_timeout": "7s"}
    tcp = cluster("{connectionPool: {tcp: {idleTimeout: 9s}}}")
    assert options(tcp)["common_http_protocol_options"] == {"idle_timeout": "9s"}


def test_retry_budget() -> None:
    budget = cluster("{retryBudget: {percent: 25, budgetInterval: 5s}}")["circuit_breakers"]["thresholds"][0]
    assert budget["retry_budget"] == {"budget_percent": {"value": 25.0}, "min_retry_concurrency": 3}


def test_proxy_protocol_is_around_tls() -> None:
    matches = cluster("{proxyProtocol: {version: V2}}")["transport_socket_matches"]
    sockets = [match["transport_socket"]["typed_config"] for match in matches]
    assert [socket["config"] for socket in sockets] == [{"version": "V2"}] * 2
    assert [socket["transport_socket"]["name"].rpartition(".")[2] for socket in sockets] == ["tls", "raw_buffer"]
    plain = cluster("{tls: {mode: DISABLE}, proxyProtocol: {}}")["transport_socket"]
    assert plain["typed_config"]["config"] == {"version": "V1"}


def test_tls_to_the_outside() -> None:
    files = "{mode: MUTUAL, clientCertificate: /c, privateKey: /k, caCertificates: /ca, caCrl: /crl, sni: a.example}"
    found = cluster(f"{{tls: {files}}}")
    context = found["transport_socket"]["typed_config"]
    assert context["sni"] == "a.example"
    common = context["common_tls_context"]
    assert common["validation_context"]["crl"] == {"filename": "/crl"}
    assert common["validation_context"]["trusted_ca"] == {"filename": "/ca"}
    assert common["alpn_protocols"] == ["h2"]
    assert "upstream_http_protocol_options" not in options(found)
    assert found["metadata"]["filter_metadata"]["istio"]["alpn_override"] == "false"

    checked = cluster("{tls: {mode: SIMPLE}}")
    assert options(checked)["upstream_http_protocol_options"] == {"auto_sni": True, "auto_san_validation": True}
    trusting = cluster("{tls: {mode: SIMPLE, insecureSkipVerify: true}}", port=9090)
    assert options(trusting)["upstream_http_protocol_options"] == {"auto_sni": True}
    assert trusting["transport_socket"]["typed_config"]["common_tls_context"]["validation_context"] == {}


def test_credentials_are_for_gateways_and_for_workloads_that_are_selected() -> None:
    spec = "{host: server, trafficPolicy: {tls: {mode: MUTUAL, credentialName: outside}}%s}"
    general, selected = rule(spec % ""), rule(spec % ", workloadSelector: {matchLabels: {app: client}}")
    assert not {"transport_socket", "transport_socket_matches"} & Told("client", general).cluster().keys()
    assert "transport_socket" in Told("gateway", general).cluster()
    common = Told("client", selected).cluster()["transport_socket"]["typed_config"]["common_tls_context"]
    assert [one["name"] for one in common["tls_certificate_sds_secret_configs"]] == ["kubernetes://outside"]
    roots = common["combined_validation_context"]["validation_context_sds_secret_config"]
    assert roots["name"] == "kubernetes://outside-cacert"


def test_a_mode_that_is_named_counts_for_endpoints_too() -> None:
    def tagged(it: Told, subset: str = "", port: int = 9000) -> bool:
        (locality,) = it.endpoints[f"outbound|{port}|{subset}|{HOST}"]["endpoints"]
        return all("metadata" in endpoint for endpoint in locality["lb_endpoints"])

    own = "{name: v1, labels: {version: v1}, trafficPolicy: {tls: {mode: DISABLE}}}"
    it = Told("client", destination_rule("{tls: {mode: ISTIO_MUTUAL}}", f"[{own}]"))
    assert tagged(it)
    assert not tagged(it, "v1")
    it = Told("client", destination_rule("{portLevelSettings: [{port: {number: 9000}, tls: {mode: DISABLE}}]}"))
    assert not tagged(it)
    assert tagged(it, port=9090)


def test_port_level_settings_inherit_nothing() -> None:
    port = "{port: {number: 9090}, connectionPool: {tcp: {maxConnections: 7}}}"
    policy = f"{{loadBalancer: {{simple: RANDOM}}, retryBudget: {{percent: 5}}, portLevelSettings: [{port}]}}"
    of_port = (
        "trafficPolicy: {portLevelSettings: [{port: {number: 9000}, outlierDetection: {consecutive5xxErrors: 1}}]}"
    )
    it = Told("client", destination_rule(policy, f"[{{name: v1, labels: {{version: v1}}, {of_port}}}]"))
    assert it.cluster()["lb_policy"] == "RANDOM"
    assert it.cluster(port=9090)["lb_policy"] == "LEAST_REQUEST"
    assert "retry_budget" not in it.cluster(port=9090)["circuit_breakers"]["thresholds"][0]
    assert it.cluster("v1", port=9090)["circuit_breakers"]["thresholds"][0]["max_connections"] == 7
    v1 = it.cluster("v1")
    # Settings for a port of a subset leave nothing of the rule's but what they cannot say themselves.
    assert v1["lb_policy"] == "LEAST_REQUEST"
    assert v1["outlier_detection"]["consecutive_5xx"] == 1
    assert v1["circuit_breakers"]["thresholds"][0]["retry_budget"]["budget_percent"] == {"value": 5.0}


# Which rule applies


def named(name: str, spec: str, namespace: str = "", created: str = "") -> str:
    text = rule(spec, name=name, namespace=namespace)
    return text.replace(f"name: {name}", f"name: {name}, creationTimestamp: '{created}'") if created else text


RANDOM, ROUND_ROBIN = (
    "trafficPolicy: {loadBalancer: {simple: RANDOM}}",
    "trafficPolicy: {loadBalancer: {simple: ROUND_ROBIN}}",
)


def test_the_oldest_rule_of_a_host_gives_the_policy_and_all_give_subsets() -> None:
    older = named("b", f"{{host: server, {RANDOM}, subsets: {V1}}}")
    younger = named("a", f"{{host: server, {ROUND_ROBIN}, subsets: {V2}}}")
    by_name = Told("client", older, younger)
    assert by_name.cluster("v1")["lb_policy"] == "ROUND_ROBIN"
    assert by_name.cluster("v2")["lb_policy"] == "ROUND_ROBIN"
    assert by_name.cluster()["metadata"]["filter_metadata"]["istio"]["config"].endswith("destination-rule/a")
    older = named("b", f"{{host: server, {RANDOM}, subsets: {V1}}}", created="2026-01-01T00:00:00Z")
    assert Told("client", older, younger).cluster("v2")["lb_policy"] == "RANDOM"


def test_the_most_specific_host_of_the_nearest_namespace() -> None:
    wide = named("wide", f"{{host: '*.mlmesh.svc.cluster.local', {ROUND_ROBIN}}}")
    exact = named("exact", f"{{host: {HOST}, {RANDOM}}}")
    root = named("root", f"{{host: {HOST}, {RANDOM}}}", "istio-system")
    assert Told("client", wide, exact).cluster()["lb_policy"] == "RANDOM"
    # A wildcard of the client's namespace comes before the very host in the root namespace.
    assert Told("client", wide, root).cluster()["lb_policy"] == "ROUND_ROBIN"
    assert Told("client", root).cluster()["lb_policy"] == "RANDOM"
    other = named("other", f"{{host: {HOST}, {RANDOM}}}", "other")
    assert Told("client", other).cluster()["lb_policy"] == "LEAST_REQUEST"


def test_rules_that_are_not_exported() -> None:
    private = named("root", f"{{host: {HOST}, {RANDOM}, exportTo: ['.']}}", "istio-system")
    assert Told("client", private).cluster()["lb_policy"] == "LEAST_REQUEST"
    to_us = named("root", f"{{host: {HOST}, {RANDOM}, exportTo: [mlmesh]}}", "istio-system")
    assert Told("client", to_us).cluster()["lb_policy"] == "RANDOM"
    to_others = named("mine", f"{{host: {HOST}, {RANDOM}, exportTo: [other]}}")
    assert Told("client", to_others).cluster()["lb_policy"] == "LEAST_REQUEST"
    # Rules that are exported differently stay apart.
    apart = named("mine", f"{{host: server, {ROUND_ROBIN}, exportTo: ['.'], subsets: {V2}}}")
    it = Told("client", named("a", f"{{host: server, {RANDOM}, subsets: {V1}}}"), apart)
    assert f"outbound|9000|v2|{HOST}" in it.clusters
    assert f"outbound|9000|v1|{HOST}" not in it.clusters


def test_rules_for_certain_workloads() -> None:
    general = named("a", f"{{host: server, {RANDOM}}}")
    red = named("b", f"{{host: server, {ROUND_ROBIN}, workloadSelector: {{matchLabels: {{team: red}}}}}}")
    blue = red.replace("team: red", "team: blue")
    assert Told("client", general, red).cluster()["lb_policy"] == "ROUND_ROBIN"
    assert Told("server-v1", general, red).cluster()["lb_policy"] == "RANDOM"
    assert Told("client", general, blue).cluster()["lb_policy"] == "RANDOM"
    assert Told("client", blue).cluster()["lb_policy"] == "LEAST_REQUEST"


def test_bounds_of_calls_are_those_of_the_application_too() -> None:
    it = Told("server-v1", destination_rule("{connectionPool: {http: {http2MaxRequests: 5}}}"))
    assert it.clusters["inbound|8000||"]["circuit_breakers"]["thresholds"][0]["max_requests"] == 5


MESH = """
apiVersion: v1
kind: ConfigMap
metadata: {name: istio, namespace: istio-system}
data:
  mesh: |
    connectTimeout: 3s
    h2UpgradePolicy: UPGRADE
    tcpKeepalive: {time: 60s, probes: 4}
    enableAutoMtls: false
    defaultTrafficPolicy:
      connectionPool: {http: {maxRetries: 9}}
      outlierDetection: {consecutive5xxErrors: 2}
---
"""


def test_settings_of_the_mesh() -> None:
    own = destination_rule("{connectionPool: {tcp: {maxConnections: 1, tcpKeepalive: {probes: 2}}}}")
    it = Told("client", MESH).cluster(port=9090)
    assert it["connect_timeout"] == "3s"
    assert it["circuit_breakers"]["thresholds"][0]["max_retries"] == 9
    assert it["outlier_detection"]["consecutive_5xx"] == 2
    assert options(it)["explicit_http_config"] == {"http2_protocol_options": {}}
    assert "transport_socket_matches" not in it
    it = Told("client", MESH, own).cluster()
    assert it["circuit_breakers"]["thresholds"][0]["max_retries"] == 2**32 - 1
    assert it["upstream_connection_options"] == {"tcp_keepalive": {"keepalive_probes": 2, "keepalive_time": 60}}


# Localities


def placed(zone: str) -> str:
    return f"nodeSelector: {{topology.kubernetes.io/region: r1, topology.kubernetes.io/zone: {zone}}}, "


def zones(client: str, v1: str, v2: str) -> str:
    text = WORKLOADS
    for name, zone in (("server-v1", v1), ("server-v2", v2), ("client", client)):
        head, found, tail = text.partition(f"metadata: {{name: {name}}}")
        spec = "      serviceAccountName: server\n" if name != "client" else "    spec: {containers"
        new = f"      {placed(zone)[:-2]}\n{spec}" if name != "client" else f"    spec: {{{placed(zone)}containers"
        text = head + found + tail.replace(spec, new, 1)
    return text


def priorities(it: Told) -> dict[str, tuple[int, int]]:
    """Priority and weight by zone."""
    localities = it.endpoints[f"outbound|9000||{HOST}"]["endpoints"]
    return {
        item["locality"].get("zone", ""): (item.get("priority", 0), item["load_balancing_weight"])
        for item in localities
        if item["lb_endpoints"]
    }


OUTLIER = "outlierDetection: {consecutive5xxErrors: 3}"


def test_the_nearest_come_first_where_outlier_detection_lets_others_take_over() -> None:
    world = zones("a", "a", "b")
    assert priorities(Told("client", workloads=world)) == {"a": (0, 1), "b": (0, 1)}
    assert priorities(Told("client", destination_rule(f"{{{OUTLIER}}}"), workloads=world)) == {"a": (0, 1), "b": (1, 1)}
    off = destination_rule(f"{{{OUTLIER}, loadBalancer: {{localityLbSetting: {{enabled: false}}}}}}")
    assert priorities(Told("client", off, workloads=world)) == {"a": (0, 1), "b": (0, 1)}


def test_shares_of_localities() -> None:
    share = "{from: 'r1/a/*', to: {'r1/a/*': 80, 'r1/b/*': 20}}"
    it = Told(
        "client",
        destination_rule(f"{{loadBalancer: {{localityLbSetting: {{distribute: [{share}]}}}}}}"),
        workloads=zones("a", "a", "b"),
    )
    assert priorities(it) == {"a": (0, 80), "b": (0, 20)}
    assert it.cluster()["common_lb_config"]["locality_weighted_lb_config"] == {}
    only = "{from: 'r1/*', to: {'r1/b/*': 100}}"
    it = Told(
        "client",
        destination_rule(f"{{loadBalancer: {{localityLbSetting: {{distribute: [{only}]}}}}}}"),
        workloads=zones("a", "a", "b"),
    )
    assert priorities(it) == {"b": (0, 100)}


def test_priorities_by_labels() -> None:
    setting = "{failoverPriority: [version=v2]}"
    it = Told(
        "client",
        destination_rule(f"{{{OUTLIER}, loadBalancer: {{localityLbSetting: {setting}}}}}"),
        workloads=zones("a", "a", "b"),
    )
    assert priorities(it) == {"b": (0, 1), "a": (1, 1)}


def test_a_service_may_prefer_its_zone_by_itself() -> None:
    world = zones("b", "a", "b").replace(
        "spec:\n  selector: {app: server}", "spec:\n  trafficDistribution: PreferClose\n  selector: {app: server}"
    )
    it = Told("client", workloads=world, not_ready={"server-v2"})
    assert priorities(it) == {"b": (0, 1), "a": (1, 1)}
    # Envoy must know of those that are not ready, to move on to the next zone.
    (first,) = [i for i in it.endpoints[f"outbound|9000||{HOST}"]["endpoints"] if i["locality"]["zone"] == "b"]
    assert first["lb_endpoints"][0]["health_status"] == "UNHEALTHY"
    # Zones come in the order that Istio sorts them.
    assert [item["locality"]["zone"] for item in it.endpoints[f"outbound|9000||{HOST}"]["endpoints"]] == ["a", "b"]
