"""VirtualServices become the routes that Istio would make of them."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlmesh_local.envoy_types import LISTENER, ROUTES
from mlmesh_local.snapshot import build_snapshots
from mlmesh_local.translate.names import fraction, seconds
from tests.support.mesh_documents import SUBSETS
from tests.support.mesh_world import HOST, Told, destination_rule, resource, virtual_service, world

TO_SERVER = "route: [{destination: {host: server}}]"
FAULT = "envoy.filters.http.fault"


def told(http: str, *texts: str, instance: str = "client", fields: str = "hosts: [server]") -> Told:
    return Told(instance, SUBSETS, virtual_service(http, fields=fields), *texts)


def test_a_service_without_rules_has_istios_defaults() -> None:
    action = Told("client").action()
    assert action == {
        "cluster": f"outbound|9000||{HOST}",
        "timeout": "0s",
        "max_grpc_timeout": "0s",
        "retry_policy": {
            "retry_on": "connect-failure,refused-stream,unavailable,cancelled,retriable-status-codes",
            "num_retries": 2,
            "host_selection_retry_max_attempts": 5,
            "retry_host_predicate": [
                {
                    "name": "envoy.retry_host_predicates.previous_hosts",
                    "typed_config": {
                        "@type": "type.googleapis.com/"
                        "envoy.extensions.retry.host.previous_hosts.v3.PreviousHostsPredicate"
                    },
                }
            ],
        },
    }


def test_names_and_domains_are_istios() -> None:
    it = Told("client")
    assert set(it.routes) == {"9000", "9090"}
    assert it.virtual_host()["domains"] == [HOST, f"{HOST}.", "server", "server.mlmesh.svc", "server.mlmesh"]
    assert it.routes["9000"]["ignore_port_in_host_matching"] is True
    assert it.routes["9000"]["virtual_hosts"][-1]["domains"] == ["*"]


def test_short_names_are_only_for_the_own_namespace() -> None:
    elsewhere = resource("Service", "{ports: [{name: grpc, port: 9000}]}", name="far", group="v1", namespace="other")
    domains = Told("client", elsewhere).virtual_host("far.other.svc.cluster.local:9000")["domains"]
    assert "far" not in domains
    assert "far.other" in domains


def weights(*shares: int) -> str:
    items = ", ".join(
        f"{{destination: {{host: server, subset: v{1 + index % 2}}}, weight: {share}}}"
        for index, share in enumerate(shares)
    )
    return f"[{{route: [{items}]}}]"


def test_weight_zero_is_dropped_and_the_others_stay_proportional() -> None:
    clusters = told(weights(3, 0, 7)).action()["weighted_clusters"]["clusters"]
    assert [(c["name"], c["weight"]) for c in clusters] == [
        (f"outbound|9000|v1|{HOST}", 3),
        (f"outbound|9000|v1|{HOST}", 7),
    ]


def test_a_single_destination_gets_everything_whatever_its_weight() -> None:
    assert told("[{route: [{destination: {host: server}, weight: 0}]}]").action()["cluster"] == f"outbound|9000||{HOST}"


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(0, 1000), min_size=2, max_size=5).filter(any))
def test_any_weights_keep_their_proportion(shares: list[int]) -> None:
    clusters = told(weights(*shares)).action()["weighted_clusters"]["clusters"]
    assert [c["weight"] for c in clusters] == [share for share in shares if share]


@settings(max_examples=10, deadline=None)
@given(first=st.integers(0, 100), second=st.integers(0, 100), cut=st.booleans())
def test_weights_change_routes_and_nothing_else(first: int, second: int, cut: bool) -> None:
    extra = ", fault: {abort: {httpStatus: 503, percentage: {value: 1}}}" if cut else ""

    def snapshot(share: int) -> Any:
        rule = weights(share, 100 - share)[:-2] + extra + "}]"
        return build_snapshots(world(SUBSETS, virtual_service(rule)))["client"]

    one, two = snapshot(first), snapshot(second)
    for type_url, named in one.resources.items():
        if type_url != ROUTES:
            assert named == two.resources[type_url]
    changed = {name for name in one.resources[ROUTES] if one.resources[ROUTES][name] != two.resources[ROUTES][name]}
    assert changed == (set() if first == second else {"9000", "9090"})


def test_matches_are_one_route_each_and_a_catch_all_ends_them() -> None:
    it = told(
        f"[{{name: a, match: [{{name: x, headers: {{u: {{exact: v}}}}}}, {{method: {{exact: POST}}}}], {TO_SERVER}}},"
        f" {{name: b, {TO_SERVER}}}, {{name: never, {TO_SERVER}}}]"
    )
    assert [route.get("name") for route in it.rules()] == ["a.x", "a", "b"]


CONDITIONS = {
    "{uri: {exact: /p.S/M}}": {"path": "/p.S/M"},
    "{uri: {prefix: /p.S/}, ignoreUriCase: true}": {"prefix": "/p.S/", "case_sensitive": False},
    "{uri: {regex: '/p.*'}}": {"safe_regex": {"regex": "/p.*"}},
    "{headers: {X-User: {prefix: a}}}": {"headers": [{"name": "X-User", "string_match": {"prefix": "a"}}]},
    "{headers: {x: {}}}": {"headers": [{"name": "x", "present_match": True}]},
    "{headers: {x: null}}": {"headers": [{"name": "x", "present_match": True}]},
    "{withoutHeaders: {x: {regex: '*'}}}": {"headers": [{"name": "x", "present_match": True, "invert_match": True}]},
    "{uri: {prefix: ''}, method: {}}": {"prefix": "", "headers": [{"name": ":method", "present_match": True}]},
    "{withoutHeaders: {x: {exact: a}}}": {
        "headers": [
            {
                "name": "x",
                "string_match": {"exact": "a"},
                "treat_missing_header_as_empty": True,
                "invert_match": True,
            }
        ]
    },
    "{withoutHeaders: {x: {}}}": {"headers": [{"name": "x", "present_match": True, "invert_match": True}]},
    "{method: {exact: POST}, authority: {prefix: s}, scheme: {exact: http}}": {
        "headers": [
            {"name": ":method", "string_match": {"exact": "POST"}},
            {"name": ":authority", "string_match": {"prefix": "s"}},
            {"name": ":scheme", "string_match": {"exact": "http"}},
        ]
    },
    "{queryParams: {Q: {exact: a}}}": {"query_parameters": [{"name": "Q", "string_match": {"exact": "a"}}]},
}


@pytest.mark.parametrize("condition", CONDITIONS)
def test_conditions(condition: str) -> None:
    match = told(f"[{{match: [{condition}], {TO_SERVER}}}]").rules()[0]["match"]
    path = {} if {"path", "safe_regex"} & match.keys() else {"prefix": "/"}
    assert match == {**path, "case_sensitive": True, **CONDITIONS[condition]}


@pytest.mark.parametrize(
    ("condition", "applies"),
    [
        ("{port: 9000}", True),
        ("{port: 9090}", False),
        ("{sourceLabels: {team: red}}", True),
        ("{sourceLabels: {team: blue}}", False),
        ("{sourceNamespace: mlmesh}", True),
        ("{sourceNamespace: other}", False),
        ("{gateways: [mesh]}", True),
        # Named gateways decide alone, as in Istio.
        ("{gateways: [mesh], sourceLabels: {team: blue}}", True),
        ("{gateways: [way-in]}", False),
    ],
)
def test_conditions_on_the_client_are_decided_here(condition: str, applies: bool) -> None:
    it = told(f"[{{name: special, match: [{condition}], {TO_PORT}}}]", GATEWAY)
    assert [route["name"] for route in it.rules()] == (["special"] if applies else ["default"])


RETRIES = {
    "{attempts: 5}": {"num_retries": 5},
    "{attempts: 1, perTryTimeout: 2s, backoff: 50ms}": {
        "num_retries": 1,
        "per_try_timeout": "2s",
        "retry_back_off": {"base_interval": "0.05s"},
    },
    "{attempts: 1, retryOn: 'gateway-error,503,409'}": {
        "num_retries": 1,
        "retry_on": "gateway-error,retriable-status-codes",
        "retriable_status_codes": [503, 409],
    },
    "{attempts: 1, retryIgnorePreviousHosts: false}": {"num_retries": 1, "retry_host_predicate": []},
    "{attempts: 1, retryRemoteLocalities: true}": {
        "num_retries": 1,
        "retry_priority": {
            "name": "envoy.retry_priorities.previous_priorities",
            "typed_config": {
                "@type": "type.googleapis.com/"
                "envoy.extensions.retry.priority.previous_priorities.v3.PreviousPrioritiesConfig",
                "update_frequency": 2,
            },
        },
    },
}


@pytest.mark.parametrize("text", RETRIES)
def test_retries_override_the_default(text: str) -> None:
    policy = told(f"[{{retries: {text}, {TO_SERVER}}}]").action()["retry_policy"]
    assert policy == {**Told("client").action()["retry_policy"], **RETRIES[text]}


def test_no_attempts_removes_the_policy() -> None:
    assert "retry_policy" not in told(f"[{{retries: {{attempts: 0}}, {TO_SERVER}}}]").action()


def test_a_timeout_bounds_what_clients_ask_for() -> None:
    action = told(f"[{{timeout: 1500ms, {TO_SERVER}}}]").action()
    assert (action["timeout"], action["max_grpc_timeout"]) == ("1.5s", "1.5s")
    assert "max_stream_duration" not in action  # with it Envoy would ignore the timeout for gRPC


def test_faults_are_on_the_route_by_name_of_the_status() -> None:
    delay = "{fixedDelay: 2s, percentage: {value: 0.1}}"
    abort = "{grpcStatus: UNAVAILABLE, percentage: {value: 50}}"
    rule = told(f"[{{fault: {{delay: {delay}, abort: {abort}}}, {TO_SERVER}}}]").rule()
    config = rule["typed_per_filter_config"][FAULT]
    assert config["delay"] == {"fixed_delay": "2s", "percentage": {"numerator": 1000, "denominator": "MILLION"}}
    assert config["abort"] == {"grpc_status": 14, "percentage": {"numerator": 500000, "denominator": "MILLION"}}


def test_a_fault_without_percentage_is_injected_never() -> None:
    config = told(f"[{{fault: {{abort: {{httpStatus: 503}}}}, {TO_SERVER}}}]").rule()["typed_per_filter_config"][FAULT]
    assert config["abort"] == {"http_status": 503}


def test_header_edits_of_routes_and_destinations() -> None:
    route = "{request: {set: {a: '1', ':authority': x.example}, add: {b: '2'}, remove: [c]}, response: {add: {d: '3'}}}"
    own = "{request: {add: {e: '4'}}, response: {remove: [f]}}"
    it = told(f"[{{headers: {route}, route: [{{destination: {{host: server}}, headers: {own}}}]}}]")
    rule = it.rule()
    assert [(h["header"]["key"], h["append_action"]) for h in rule["request_headers_to_add"]] == [
        ("a", "OVERWRITE_IF_EXISTS_OR_ADD"),
        ("b", "APPEND_IF_EXISTS_OR_ADD"),
        ("e", "APPEND_IF_EXISTS_OR_ADD"),
    ]
    assert rule["request_headers_to_remove"] == ["c"]
    assert rule["response_headers_to_remove"] == ["f"]
    assert rule["route"]["host_rewrite_literal"] == "x.example"


def test_headers_of_weighted_destinations_stay_with_them() -> None:
    item = "{destination: {host: server, subset: v1}, weight: 1"
    it = told(f"[{{route: [{item}, headers: {{request: {{set: {{a: '1'}}}}}}}}, {item}}}]}}]")
    first, second = it.action()["weighted_clusters"]["clusters"]
    assert first["request_headers_to_add"][0]["header"] == {"key": "a", "value": "1"}
    assert "request_headers_to_add" not in second


def test_mirrors() -> None:
    it = told(f"[{{mirror: {{host: server, subset: v2}}, mirrorPercentage: {{value: 12.5}}, {TO_SERVER}}}]")
    assert it.action()["request_mirror_policies"] == [
        {
            "cluster": f"outbound|9000|v2|{HOST}",
            "runtime_fraction": {"default_value": {"numerator": 125000, "denominator": "MILLION"}},
            "trace_sampled": False,
            "disable_shadow_host_suffix_append": True,
        }
    ]
    whole = told(f"[{{mirrors: [{{destination: {{host: server}}}}], {TO_SERVER}}}]").action()
    assert whole["request_mirror_policies"][0]["runtime_fraction"]["default_value"]["numerator"] == 1_000_000
    none = told(f"[{{mirror: {{host: server}}, mirrorPercentage: {{value: 0}}, {TO_SERVER}}}]").action()
    assert "request_mirror_policies" not in none


def test_rewrites() -> None:
    action = told(f"[{{rewrite: {{authority: other.example, uri: /v2}}, {TO_SERVER}}}]").action()
    assert (action["host_rewrite_literal"], action["prefix_rewrite"]) == ("other.example", "/v2")


def test_a_destination_without_port_takes_the_listeners() -> None:
    it = told(f"[{{{TO_SERVER}}}]")
    assert it.action()["cluster"] == f"outbound|9000||{HOST}"
    assert it.rules(f"{HOST}:9090", "9090")[0]["route"]["cluster"] == f"outbound|9090||{HOST}"


def test_hash_load_balancing_is_on_the_route_and_keeps_its_host_on_retries() -> None:
    rule = destination_rule("{loadBalancer: {consistentHash: {httpHeaderName: X-User}}}")
    it = Told("client", rule, virtual_service(f"[{{{TO_SERVER}}}]"))
    assert it.action()["hash_policy"] == [{"header": {"header_name": "X-User"}}]
    assert it.action()["retry_policy"]["retry_host_predicate"] == []
    assert it.cluster()["lb_policy"] == "RING_HASH"


GATEWAY = resource(
    "Gateway",
    "{selector: {istio: gateway}, servers: [{port: {number: 8443, name: tls, protocol: HTTPS},"
    " tls: {mode: MUTUAL, credentialName: cert}, hosts: ['*.cluster.local']}]}",
    name="way-in",
    group="networking.istio.io/v1",
)
TO_PORT = "route: [{destination: {host: server, port: {number: 9000}}}]"


def test_a_gateway_serves_what_is_bound_to_it() -> None:
    both = virtual_service(
        f"[{{name: inside, match: [{{gateways: [mesh]}}], {TO_PORT}}}, {{name: all, {TO_PORT}}}]",
        fields="hosts: [server], gateways: [way-in, mesh]",
    )
    it = Told("gateway", GATEWAY, both)
    name = "https.8443.tls.way-in.mlmesh"
    host = it.virtual_host(f"{HOST}:8443", name)
    assert host["domains"] == [HOST]
    assert [route["name"] for route in host["routes"]] == ["all"]
    listener = it.listeners["0.0.0.0_8443"]
    (chain,) = listener["filter_chains"]
    context = chain["transport_socket"]["typed_config"]
    assert context["require_client_certificate"] is True
    common = context["common_tls_context"]
    assert common["tls_certificate_sds_secret_configs"][0]["name"] == "kubernetes://cert"
    validation = common["combined_validation_context"]["validation_context_sds_secret_config"]
    assert validation["name"] == "kubernetes://cert-cacert"
    manager = it.manager("0.0.0.0_8443")
    assert manager["forward_client_cert_details"] == "SANITIZE_SET"
    assert [route["name"] for route in Told("client", GATEWAY, both).rules()] == ["inside"]


def test_a_gateway_has_no_routes_of_hosts_that_it_does_not_serve() -> None:
    elsewhere = virtual_service(f"[{{{TO_PORT}}}]", fields="hosts: [shop.example], gateways: [way-in]")
    hosts = Told("gateway", GATEWAY, elsewhere).routes["https.8443.tls.way-in.mlmesh"]["virtual_hosts"]
    assert hosts == [{"name": "blackhole:8443", "domains": ["*"], "routes": []}]


@pytest.mark.parametrize(("bound", "served"), [("./", True), ("*/", True), ("mlmesh/", True), ("other/", False)])
def test_a_server_may_bind_hosts_to_a_namespace(bound: str, served: bool) -> None:
    gateway = GATEWAY.replace("'*.cluster.local'", f"'{bound}*.cluster.local'")
    rule = virtual_service(f"[{{{TO_PORT}}}]", fields="hosts: [server], gateways: [way-in]")
    hosts = Told("gateway", gateway, rule).routes["https.8443.tls.way-in.mlmesh"]["virtual_hosts"]
    assert (f"{HOST}:8443" in [host["name"] for host in hosts]) is served


def test_sampling_is_on_routes_so_that_listeners_stay() -> None:
    def snapshot(percent: float) -> Any:
        telemetry = resource(
            "Telemetry", f"{{tracing: [{{randomSamplingPercentage: {percent}}}]}}", group="telemetry.istio.io/v1"
        )
        return build_snapshots(world(telemetry, otlp_address="127.64.0.1:4317"))["client"]

    assert snapshot(1).resources[LISTENER] == snapshot(100).resources[LISTENER]
    it = Told("client", otlp_address="127.64.0.1:4317")
    assert it.rule()["tracing"]["random_sampling"] == {"numerator": 100, "denominator": "TEN_THOUSAND"}  # 1 %
    off = resource("Telemetry", "{tracing: [{disableSpanReporting: true}]}", group="telemetry.istio.io/v1")
    assert "tracing" not in Told("client", off, otlp_address="127.64.0.1:4317").rule()
    assert "tracing" not in Told("client").rule()


@given(st.integers(0, 10**9))
def test_durations_are_written_exactly_to_the_microsecond(micros: int) -> None:
    text = seconds(micros / 1e6)
    assert text.endswith("s")
    assert round(float(text[:-1]) * 1e6) == micros


@given(st.floats(0, 100))
def test_percentages_are_within_a_million(percent: float) -> None:
    assert 0 <= fraction(percent)["numerator"] <= 1_000_000


def test_a_short_name_that_is_a_host_of_its_own_is_not_taken_twice() -> None:
    entry = resource(
        "ServiceEntry",
        "{hosts: [server.mlmesh], resolution: STATIC, ports: [{number: 9000, name: grpc, protocol: GRPC}],"
        " endpoints: [{address: 10.0.0.1}]}",
        group="networking.istio.io/v1",
    )
    it = Told("client", entry)
    assert "server.mlmesh" in it.virtual_host("server.mlmesh:9000")["domains"]
    assert "server.mlmesh" not in it.virtual_host()["domains"]


def test_ports_of_pass_through_tls_are_no_routes() -> None:
    own_tls = resource("Service", "{selector: {istio: gateway}, ports: [{name: tls-grpc, port: 8443}]}", group="v1")
    assert set(Told("client", own_tls).routes) == {"9000", "9090"}


def test_inbound_routes_leave_time_to_the_caller_and_retry_only_what_does_not_stream() -> None:
    it = Told("server-v1")
    ports = {9000: 8000, 9090: 9090}
    grpc, plain = (it.rules(f"inbound|http|{p}", f"inbound|{target}||")[0]["route"] for p, target in ports.items())
    assert grpc["timeout"] == "0s"
    assert grpc["max_stream_duration"] == {"max_stream_duration": "0s", "grpc_timeout_header_max": "0s"}
    assert "retry_policy" not in grpc
    assert plain["retry_policy"] == {"retry_on": "reset-before-request", "num_retries": 2}
