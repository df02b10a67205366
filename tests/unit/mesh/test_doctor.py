"""Every check of `mlmesh doctor`, on a world that is wrong in that way and on one that is not."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from mlmesh_local.doctor import CHECKS, IGNORE, Context, Finding, examine, others_of
from mlmesh_local.live.facts import Certified, Configured, Facts, Socket, counters
from mlmesh_local.offline import offline_world
from mlmesh_local.resources import Document
from tests.support.mesh_documents import SUBSETS
from tests.support.mesh_world import WORKLOADS, destination_rule, load, resource, virtual_service

STREAM = "/test.Echo/Chat"
NOW_S = 1_800_000_000.0
DAY_S = 86_400.0
KEEPALIVE = "connectionPool: {tcp: {tcpKeepalive: {time: 30s}}}"
QUIET = destination_rule(f"{{{KEEPALIVE}}}", "[{name: v1, labels: {version: v1}}, {name: v2, labels: {version: v2}}]")
DRAIN = "env: [{name: MLMESH_DRAIN_S, value: '5'}], "
DRAINED = WORKLOADS.replace("command: [serve], ", f"command: [serve], {DRAIN}")
V1, V2 = "{destination: {host: server, subset: v1}", "{destination: {host: server, subset: v2}"


@dataclass(frozen=True)
class Case:
    """YAML that a check finds something in, YAML in which it does not; `replaced` changes the workloads of the bad."""

    bad: str = ""
    good: str = ""
    replaced: tuple[str, str] = ("", "")
    others: tuple[str, str] = ("", "")
    facts: tuple[Facts, Facts] = field(default=(Facts(), Facts()))


def _rules(rule: str) -> str:
    return virtual_service(f"[{rule}]") + QUIET


def _env(name: str, value: str) -> tuple[str, str]:
    old = "      containers: [{name: app, command: [serve], env: ["
    head = "metadata: {labels: {app: server, version: v1}}\n    spec:\n      serviceAccountName: server\n"
    return head + old, f"{head}{old}{{name: {name}, value: '{value}'}}, "


def _limiter(more: str) -> str:
    config = (
        "{name: envoy.filters.http.local_ratelimit, typed_config: {'@type': "
        "type.googleapis.com/envoy.extensions.filters.http.local_ratelimit.v3.LocalRateLimit, stat_prefix: x"
        f"{more}}}}}"
    )
    patch = f"{{applyTo: HTTP_FILTER, patch: {{operation: INSERT_FIRST, value: {config}}}}}"
    return resource("EnvoyFilter", f"{{configPatches: [{patch}]}}", group="networking.istio.io/v1alpha3")


def _entry(location: str) -> str:
    endpoints = "endpoints: [{address: 127.0.0.9}]"
    ports = "ports: [{number: 443, name: grpc, protocol: GRPC}]"
    entry = resource(
        "ServiceEntry",
        f"{{hosts: [out.example], location: {location}, resolution: STATIC, {ports}, {endpoints}}}",
        group="networking.istio.io/v1",
    )
    ping = "{connectionPool: {http: {http2KeepAlive: {interval: %s, timeout: 5s}}}}"
    rule = "{host: out.example, trafficPolicy: %s}" % (ping % ("30s" if location == "MESH_EXTERNAL" else "600s"))
    return QUIET + entry + resource("DestinationRule", rule, group="networking.istio.io/v1", name="out")


def _query(selector: str) -> str:
    return f"""
apiVersion: monitoring.coreos.com/v1
kind: PrometheusRule
metadata: {{name: errors}}
spec:
  groups:
    - rules:
        - expr: |
            sum(rate(istio_requests_total{{{selector}}}[1m]))
"""


def _pool(http: str) -> str:
    return destination_rule(f"{{connectionPool: {{tcp: {{tcpKeepalive: {{time: 30s}}}}, http: {http}}}}}")


def _tcp(first: str, second: str) -> str:
    """Two services of one port; the names of their ports tell the protocols."""
    return QUIET + "".join(
        "---\napiVersion: v1\nkind: Service\n"
        f"metadata: {{name: {name}, creationTimestamp: 2026-01-0{age}T00:00:00Z, namespace: mlmesh}}\n"
        f"spec: {{selector: {{app: server}}, ports: [{{name: {port}, port: 5432, targetPort: 9090}}]}}\n"
        for name, age, port in (("a", 2, first), ("b", 1, second))
    )


def _deny(more: str) -> str:
    rule = "{from: [{source: {principals: ['cluster.local/ns/mlmesh/sa/x']}}]}"
    return QUIET + resource("AuthorizationPolicy", f"{{action: DENY, rules: [{rule}]}}") + more


def _peer(mode: str) -> str:
    return resource("PeerAuthentication", f"{{mtls: {{mode: {mode}}}}}", name="default")


def _facts(**fields: Any) -> Facts:
    made = {"configured": (Configured(instance="a", connected=True, acked=True, rejection=""),), **fields}
    return Facts(**made)


def _stat(name: str, value: int = 3) -> Facts:
    return _facts(counters={"a": {name: value}})


_ALL = f"route: [{V1}}}]"
CASES: dict[str, Case] = {
    "MLM001": Case(
        bad=_rules(f"{{timeout: 3s, {_ALL}}}"),
        good=_rules(f"{{match: [{{uri: {{exact: /test.Echo/Unary}}}}], timeout: 3s, {_ALL}}}, {{{_ALL}}}"),
    ),
    "MLM002": Case(bad=QUIET, good=QUIET, replaced=_env("GRPC_SERVICE_CONFIG", '{"retryPolicy": {}}')),
    "MLM003": Case(
        bad=_rules(f"{{retries: {{attempts: 2, retryOn: 'unavailable,resource-exhausted'}}, {_ALL}}}"),
        good=_rules(f"{{retries: {{attempts: 2, retryOn: 'unavailable,refused-stream'}}, {_ALL}}}"),
    ),
    "MLM004": Case(
        bad=_rules(
            f"{{match: [{{uri: {{exact: /a/B}}}}], timeout: 1s, retries: {{attempts: 2, perTryTimeout: 1s}}, {_ALL}}}"
        ),
        good=_rules(
            f"{{match: [{{uri: {{exact: /a/B}}}}], timeout: 3s, retries: {{attempts: 2, perTryTimeout: 1s}}, {_ALL}}}"
        ),
    ),
    "MLM005": Case(bad=QUIET, good=QUIET, replaced=_env("MLMESH_MESSAGE_BYTES_MAX", "33554432")),
    "MLM006": Case(bad=SUBSETS, good=QUIET),
    "MLM007": Case(bad=_entry("MESH_EXTERNAL"), good=_entry("MESH_INTERNAL")),
    "MLM008": Case(bad=QUIET, good=QUIET, replaced=_env("MLMESH_MESSAGE_BYTES_MAX", "1048576")),
    "MLM009": Case(bad=QUIET, good=QUIET, replaced=(DRAIN, "")),
    "MLM010": Case(bad=QUIET, good=QUIET, replaced=("{name: grpc, port: 9000,", "{name: http-api, port: 9000,")),
    "MLM011": Case(
        bad=_rules(f"{{route: [{V1}, weight: 90}}, {V2}, weight: 10}}]}}"),
        good=_rules(f"{{route: [{V1}, weight: 100}}, {V2}, weight: 0}}]}}"),
    ),
    "MLM012": Case(
        bad=_rules(f"{{{_ALL}, mirrors: [{V2}}}]}}"),
        good=virtual_service(f"[{{{_ALL}, mirrors: [{V2}}}]}}]")
        + destination_rule(
            f"{{{KEEPALIVE}}}",
            "[{name: v1, labels: {version: v1}}, {name: v2, labels: {version: v2}, trafficPolicy: {connectionPool: "
            "{http: {http2MaxRequests: 64}}}}]",
        ),
    ),
    "MLM013": Case(
        bad=destination_rule(f"{{{KEEPALIVE}, tls: {{mode: DISABLE}}}}") + _peer("STRICT"),
        good=destination_rule(f"{{{KEEPALIVE}, tls: {{mode: DISABLE}}}}") + _peer("PERMISSIVE"),
    ),
    "MLM014": Case(bad=_deny(""), good=_deny(_peer("STRICT"))),
    "MLM015": Case(bad=QUIET, good=QUIET, replaced=("port: 9090, targetPort: 9090", "port: 9090, targetPort: 9999")),
    "MLM016": Case(bad=_pool("{maxRequestsPerConnection: 1}"), good=_pool("{maxRequestsPerConnection: 1000}")),
    "MLM017": Case(bad=_pool("{http2MaxRequests: 8}"), good=_pool("{http2MaxRequests: 2048}")),
    "MLM018": Case(
        bad=destination_rule(f"{{{KEEPALIVE}, outlierDetection: {{consecutive5xxErrors: 3}}}}"),
        good=destination_rule(
            f"{{{KEEPALIVE}, outlierDetection: {{consecutive5xxErrors: 0, consecutiveGatewayErrors: 3}}}}"
        ),
    ),
    "MLM019": Case(bad=QUIET + _limiter(""), good=QUIET + _limiter(", rate_limited_as_resource_exhausted: true")),
    "MLM020": Case(
        bad=_rules(f"{{fault: {{delay: {{fixedDelay: 1s, percentage: {{value: 1}}}}}}, {_ALL}}}"),
        good=_rules(f"{{{_ALL}}}"),
    ),
    "MLM021": Case(
        bad=QUIET,
        good=QUIET,
        others=(_query('response_code!~"5.*"'), _query('response_code!~"5.*",grpc_response_status=~"^(0|)$"')),
    ),
    "MLM022": Case(
        bad=QUIET,
        good=QUIET,
        facts=(
            _facts(certificates=(Certified(instance="a", expires_s=NOW_S + 60),), authority_expires_s=NOW_S + DAY_S),
            _facts(
                certificates=(Certified(instance="a", expires_s=NOW_S + DAY_S),), authority_expires_s=NOW_S + 90 * DAY_S
            ),
        ),
    ),
    "MLM023": Case(
        bad=QUIET,
        good=QUIET,
        facts=(_facts(configured=(Configured(instance="a", connected=True, acked=False, rejection="no"),)), _facts()),
    ),
    "MLM024": Case(
        bad=QUIET,
        good=QUIET,
        facts=(_stat("cluster.x.upstream_rq_active_overflow"), _stat("cluster.x.upstream_rq_timeout")),
    ),
    "MLM025": Case(bad=QUIET, good=QUIET, facts=(_stat("cluster.x.retry_or_shadow_abandoned"), _facts())),
    "MLM026": Case(bad=QUIET, good=QUIET, facts=(_stat("listener.x.ssl.fail_verify_san"), _facts())),
    "MLM027": Case(
        bad=QUIET,
        good=QUIET,
        facts=(
            _facts(
                sockets=(Socket(instance="a", remote="b", streams_started=100, streams_failed=50, keepalives_sent=0),)
            ),
            _facts(
                sockets=(Socket(instance="a", remote="b", streams_started=100, streams_failed=1, keepalives_sent=0),)
            ),
        ),
    ),
    "MLM028": Case(bad=_tcp("tcp-a", "tcp-b"), good=_tcp("tcp-a", "tls-b")),
}


def _context(text: str, *, workloads: str = DRAINED, other: str = "", facts: Facts | None = None) -> Context:
    world = offline_world(load(workloads, text))
    others = others_of([Document(source="other.yaml", text=other)]) if other else ()
    return Context(world, others=others, streaming=[STREAM], facts=facts, now_s=NOW_S)


def _found(check: str, context: Context) -> list[Finding]:
    return [one for one in examine(context) if one.id == check]


def test_every_check_has_its_case() -> None:
    assert [check.id for check in CHECKS] == [f"MLM{number:03}" for number in range(1, len(CHECKS) + 1)]
    assert CASES.keys() == {check.id for check in CHECKS}


@pytest.mark.parametrize("check", CASES)
def test_a_check_finds_what_is_wrong_and_nothing_where_nothing_is(check: str) -> None:
    case = CASES[check]
    old, new = case.replaced
    assert not old or old in DRAINED
    workloads = DRAINED.replace(old, new) if old else DRAINED
    bad = _found(check, _context(case.bad, workloads=workloads, other=case.others[0], facts=case.facts[0]))
    assert bad
    assert all(one.where and one.detail for one in bad)
    assert not _found(check, _context(case.good, other=case.others[1], facts=case.facts[1]))


@pytest.mark.parametrize(("left_s", "hours", "told"), [(3500, 1, 0), (899, 1, 1), (3700, 24, 0), (3500, 24, 1)])
def test_what_is_near_its_end_depends_on_how_long_it_lives(left_s: float, hours: int, told: int) -> None:
    """SPIRE's certificates live for an hour."""
    end_s = NOW_S + left_s
    one = Certified(instance="a", expires_s=end_s, begins_s=end_s - hours * 3600)
    assert len(_found("MLM022", _context(QUIET, facts=_facts(certificates=(one,))))) == told


def test_a_finding_names_the_line() -> None:
    (finding,) = _found("MLM001", _context("# a comment\n" + CASES["MLM001"].bad))
    assert finding.resource == "VirtualService mlmesh/server"
    assert finding.part == "spec.http[0].timeout"
    assert finding.where == "1.yaml:6"
    assert finding.detail == f"3 s on a rule that takes {STREAM}"


@pytest.mark.parametrize(
    ("first", "second", "hidden"),
    [
        ("tcp", "tcp", "Service mlmesh/a"),
        ("redis", "mysql", "Service mlmesh/a"),
        ("tcp", "unnamed", "Service mlmesh/a"),
        ("unnamed", "tcp", ""),
        ("unnamed", "unnamed", ""),
        ("tcp", "http", ""),
    ],
)
def test_the_younger_of_two_tcp_services_is_hidden(first: str, second: str, hidden: str) -> None:
    found = [one.resource for one in _found("MLM028", _context(_tcp(first, second)))]
    assert found == [hidden] * bool(hidden)


@pytest.mark.parametrize(
    "listens",
    [
        "containers: [{name: app, command: [serve, --port=9999], ",
        "containers: [{name: app, args: [':9999'], command: [serve], ",
    ],
)
def test_a_port_that_the_container_is_told_of_needs_no_declaration(listens: str) -> None:
    told = DRAINED.replace("targetPort: 9090", "targetPort: 9999")
    assert _found("MLM015", _context(QUIET, workloads=told))
    told = told.replace("containers: [{name: app, command: [serve], ", listens)
    assert not _found("MLM015", _context(QUIET, workloads=told))


def test_a_port_of_a_pod_that_declares_none_is_no_slip() -> None:
    """Istio's and Kubernetes' own samples are so."""
    bare = "ports: [{name: grpc, containerPort: 8000}, {containerPort: 9090}]"
    none = DRAINED.replace(bare, "ports: []").replace("targetPort: grpc", "targetPort: 8000")
    assert not _found("MLM015", _context(QUIET, workloads=none))


def test_methods_that_a_service_tells_count_more_than_those_that_are_known() -> None:
    host = "server.mlmesh.svc.cluster.local"
    bad = CASES["MLM001"].bad
    assert not _found("MLM001", _context(bad, facts=_facts(methods={host: {"/test.Echo/Unary": False}})))
    (finding,) = _found("MLM001", _context(bad, facts=_facts(methods={host: {"/other.Service/Watch": True}})))
    assert "/other.Service/Watch" in finding.detail


@pytest.mark.parametrize(
    ("check", "name", "ids"), [("MLM001", "{name: server", "MLM001"), ("MLM021", "{name: errors", "'MLM001, MLM021'")]
)
def test_what_is_meant_so_is_not_told(check: str, name: str, ids: str) -> None:
    case = CASES[check]
    annotated = f"{name}, annotations: {{{IGNORE}: {ids}}}"
    bad, other = (text.replace(f"metadata: {name}", f"metadata: {annotated}") for text in (case.bad, case.others[0]))
    assert not _found(check, _context(bad, other=other))


def test_a_deployment_may_say_so_on_its_pods() -> None:
    old, new = CASES["MLM009"].replaced
    annotated = f"{{labels: {{app: server, version: v1}}, annotations: {{{IGNORE}: MLM009}}}}"
    workloads = DRAINED.replace(old, new).replace("{labels: {app: server, version: v1}}", annotated)
    assert [one.resource for one in _found("MLM009", _context(QUIET, workloads=workloads))] == [
        "Deployment mlmesh/server-v2"
    ]


def test_counters_are_read_and_nonsense_is_refused() -> None:
    body = json.dumps({"stats": [{"name": "a", "value": 2}, {"name": "b", "value": 0}, {"histograms": {}}]})
    assert counters(body.encode()) == {"a": 2}
    with pytest.raises(ValueError, match="no statistics"):
        counters(b"[]")


def test_each_check_is_in_the_documentation() -> None:
    page = (Path(__file__).parents[3] / "docs" / "mesh" / "doctor.md").read_text()
    for check in CHECKS:
        told = (check.id, check.severity, check.layer, check.title, check.why, check.fix, f"[source]({check.source})")
        assert f"| {' | '.join(told)} |" in page, check.id
