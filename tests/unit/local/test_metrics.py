"""Istio's standard metrics: what is counted under which labels, exposed, queried and bounded."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from mlmesh_local.metrics import registry
from mlmesh_local.metrics.calls import HttpCall, Peers, TcpReport, grpc_status
from mlmesh_local.metrics.directory import Directory, NamedService, Workload
from mlmesh_local.metrics.exposition import exposition
from mlmesh_local.metrics.expressions import ATTRIBUTES, ExpressionError, compile_expression
from mlmesh_local.metrics.names import BUCKETS, HTTP_LABELS, OWN, STANDARD
from mlmesh_local.metrics.overrides import MetricPlan, Plan, Plans
from mlmesh_local.metrics.queries import History, Row
from mlmesh_local.metrics.registry import MeshMetrics

CLIENT = Workload(name="client", namespace="ns", principal="spiffe://td/ns/ns/sa/client", app="client")
SERVER = Workload(name="server-v1", namespace="ns", principal="spiffe://td/ns/ns/sa/server", app="server", version="v1")
DIRECTORY = Directory(
    nodes={"client-0": CLIENT, "server-v1-0": SERVER},
    addresses={"10.0.0.1": CLIENT, "10.0.0.2": SERVER},
    identities={CLIENT.principal: CLIENT},
    services={
        "server.ns.svc.cluster.local": NamedService(host="server.ns.svc.cluster.local", name="server", namespace="ns")
    },
    own={("server-v1-0", 9000): NamedService(host="server.ns.svc.cluster.local", name="server", namespace="ns")},
)
OUT = Peers(
    node="client-0",
    role="outbound",
    cluster="outbound|9000|v1|server.ns.svc.cluster.local",
    route="",
    authority="",
    downstream_host="",
    upstream_host="10.0.0.2",
    downstream_peer="",
    downstream_local="",
    upstream_peer=SERVER.principal,
)
IN = Peers(
    node="server-v1-0",
    role="inbound",
    cluster="inbound|9000||",
    route="",
    authority="",
    downstream_host="10.0.0.1",
    upstream_host="",
    downstream_peer=CLIENT.principal,
    downstream_local=SERVER.principal,
    upstream_peer="",
)


class Clock:
    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


def counting(plans: Plans | None = None, **arguments: Any) -> tuple[MeshMetrics, Clock]:
    clock = Clock()
    metrics = MeshMetrics(clock=clock, **arguments)
    metrics.describe(DIRECTORY, plans)
    return metrics, clock


def test_calls_of_ever_other_hosts_fill_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "PEERS_MAX", 10)
    metrics, _ = counting(series_max=4)
    for number in range(200):
        metrics.http(call(peers=OUT._replace(cluster="", authority=f"host-{number}")))
    assert len(metrics._peers) <= 24
    assert metrics.dropped["label_sets"] > 0


def call(**fields: Any) -> HttpCall:
    values: dict[str, Any] = {
        "peers": OUT,
        "stream": (1, "a"),
        "ended": True,
        "grpc": True,
        "code": 200,
        "grpc_status": 0,
        "flags": "-",
        "duration_ms": 7,
        "received_bytes": 100,
        "sent_bytes": 900,
        "received_messages": 1,
        "sent_messages": 1,
    }
    return HttpCall(**{**values, **fields})


def scraped(metrics: MeshMetrics) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    """What Prometheus' own parser reads."""
    families = text_string_to_metric_families("".join(exposition(metrics)))
    return {(s.name, frozenset(s.labels.items())): s.value for family in families for s in family.samples}


def value(metrics: MeshMetrics, name: str, **labels: str) -> float:
    return sum(v for (n, found), v in scraped(metrics).items() if n == name and labels.items() <= dict(found).items())


def test_prometheus_reads_the_whole_exposition() -> None:
    metrics, _ = counting()
    metrics.http(call())
    metrics.http(call(grpc=False, grpc_status=-1, code=503, flags='"\\\n'))
    metrics.tcp(TcpReport(OUT, (2, "b"), True, "-", 10, 20))
    families = {family.name: family for family in text_string_to_metric_families("".join(exposition(metrics)))}
    kinds = {metric.name.removesuffix("_total"): metric.kind for metric in STANDARD}
    assert {name: families[name].type for name in kinds} == kinds
    assert set(families) == {*kinds, *(name.removesuffix("_total") for name in OWN)}
    for metric in STANDARD:
        labels = {name for sample in families[metric.name.removesuffix("_total")].samples for name in sample.labels}
        assert labels == {*metric.labels, *(["le"] if metric.kind == "histogram" else [])}
    assert value(metrics, "istio_requests_total", response_flags='"\\\n') == 1


def test_histograms_are_cumulative_and_agree_with_their_count() -> None:
    metrics, _ = counting()
    for duration in (0, 1, 5, 6, 4_000_000):
        metrics.http(call(duration_ms=duration))
    found = {
        float(dict(labels)["le"]): number
        for (name, labels), number in scraped(metrics).items()
        if name == "istio_request_duration_milliseconds_bucket"
    }
    assert [found[float(bound)] for bound in (0.5, 1, 5, 10, 3600000)] == [1, 2, 3, 4, 4]
    assert found[float("inf")] == value(metrics, "istio_request_duration_milliseconds_count") == 5
    assert value(metrics, "istio_request_duration_milliseconds_sum") == 4_000_012
    assert len(found) == len(BUCKETS) + 1


def test_both_sides_report_with_istios_labels() -> None:
    metrics, _ = counting()
    metrics.http(call())
    metrics.http(call(peers=IN))
    common = {
        "source_workload": "client",
        "source_principal": CLIENT.principal,
        "destination_workload": "server-v1",
        "destination_version": "v1",
        "destination_principal": SERVER.principal,
        "destination_service": "server.ns.svc.cluster.local",
        "destination_service_name": "server",
        "destination_service_namespace": "ns",
        "request_protocol": "grpc",
    }
    for reporter, policy in (("source", "unknown"), ("destination", "mutual_tls")):
        labels = {**common, "reporter": reporter, "connection_security_policy": policy}
        assert value(metrics, "istio_requests_total", **labels) == 1


def test_a_gateway_reports_as_source() -> None:
    metrics, _ = counting()
    metrics.http(call(peers=OUT._replace(role="gateway")))
    assert value(metrics, "istio_requests_total", reporter="source", source_workload="client") == 1


def test_who_is_not_known_is_unknown() -> None:
    metrics, _ = counting()
    metrics.http(call(peers=IN._replace(downstream_host="10.9.9.9", downstream_peer="", downstream_local="")))
    nobody = {"source_workload": "unknown", "source_principal": "unknown", "source_canonical_revision": "latest"}
    assert value(metrics, "istio_requests_total", **nobody, connection_security_policy="none") == 1
    metrics.http(
        call(peers=OUT._replace(cluster="", upstream_host="", upstream_peer="", route="block_all", authority="x"))
    )
    lost = {
        "destination_service": "x",
        "destination_service_name": "BlackHoleCluster",
        "destination_workload": "unknown",
    }
    assert value(metrics, "istio_requests_total", **lost) == 1
    # A workload whose address is not known, but that alone has its ServiceAccount.
    metrics.http(call(peers=IN._replace(downstream_host="10.9.9.9")))
    assert value(metrics, "istio_requests_total", reporter="destination", source_workload="client") == 1


def test_open_streams_count_messages_once() -> None:
    metrics, _ = counting()
    for ended, messages in ((False, 3), (False, 3), (False, 8), (True, 10)):
        metrics.http(call(ended=ended, received_messages=messages, sent_messages=2 * messages))
    assert value(metrics, "istio_request_messages_total") == 10
    assert value(metrics, "istio_response_messages_total") == 20
    assert value(metrics, "istio_requests_total") == 1


def test_open_connections_count_bytes_once() -> None:
    metrics, _ = counting()
    for ended, sent in ((False, 0), (False, 100), (True, 150)):
        metrics.tcp(TcpReport(OUT, (5, "c"), ended, "UF" if ended else "-", 10, sent))
    assert value(metrics, "istio_tcp_connections_opened_total") == 1
    assert value(metrics, "istio_tcp_connections_closed_total", response_flags="UF") == 1
    assert value(metrics, "istio_tcp_sent_bytes_total", request_protocol="tcp") == 150


def test_memory_is_bounded_and_what_is_dropped_is_counted() -> None:
    metrics, clock = counting(series_max=3)
    for number in range(10):
        metrics.http(call(code=200 + number, grpc=False))
    assert value(metrics, "mlmesh_metrics_dropped_total", reason="label_sets") == 7
    assert value(metrics, "mlmesh_metrics_series") == 3
    for number in range(5):
        metrics.http(call(ended=False, stream=(number, "open")))
    clock.now_s += 61
    metrics.sweep()
    assert not metrics._open


def test_overrides_change_remove_and_merge_label_sets() -> None:
    expression = compile_expression("request.headers['x-model'] + '!'")
    plan = Plan(
        metrics=(
            ("REQUEST_COUNT", MetricPlan(tags=(("model", 0), ("response_code", None)))),
            ("REQUEST_SIZE", MetricPlan(disabled=True)),
        ),
        expressions=(expression,),
    )
    metrics, _ = counting(Plans(clients={"client-0": plan}))
    for code in (200, 404):
        metrics.http(call(grpc=False, code=code, headers=(("x-model", "mnist"),)))
    metrics.http(call(grpc=False, peers=IN))
    assert value(metrics, "istio_requests_total", model="mnist!", reporter="source") == 2
    assert not [
        n
        for n, labels in scraped(metrics)
        if n == "istio_requests_total" and "response_code" in dict(labels) and dict(labels)["reporter"] == "source"
    ]
    assert value(metrics, "istio_request_bytes_count") == 1
    off, _ = counting(Plans(clients={"client-0": Plan(disabled=True)}))
    off.http(call())
    assert value(off, "istio_requests_total") == 0


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("'a' + \"b\"", "ab"),
        ("request.host", "server:9000"),
        ("request.url_path.startsWith('/v2')", "true"),
        ("response.code == 200 ? 'fine' : 'not'", "fine"),
        ("has(request.headers['none']) || request.method == 'POST'", "true"),
        ("string(response.code)", "200"),
        ("string(destination.port)", "9000"),
        ("request.useragent", ""),
        ("request.headers['none']", ""),
        ("!(request.path.contains('x') && true)", "true"),
    ],
)
def test_expressions(source: str, text: str) -> None:
    request = call(authority="server:9000", path="/v2/models?x", method="POST", destination_port=9000)
    found = compile_expression(source).text(request)
    assert found == text or (source.startswith("!") and found == "false")


@pytest.mark.parametrize(
    "source",
    [
        *("", "filter_state.x", "request.host +", "a.b(", "'open", "request.headers[", "1 ? 2"),
        *("(" * 500 + "true" + ")" * 500, "true" + " && true" * 5000, "true ? " * 100 + "'a'" + " : 'b'" * 100),
    ],
)
def test_wrong_expressions_are_refused(source: str) -> None:
    with pytest.raises(ExpressionError):
        compile_expression(source)
    assert "request.host" in ATTRIBUTES


@pytest.mark.parametrize(("text", "code", "status"), [("5", 200, 5), ("", 503, 14), ("", 200, 2), ("", 0, -1)])
def test_grpc_status(text: str, code: int, status: int) -> None:
    assert grpc_status(text, code) == status


def test_queries_give_rates_shares_errors_and_quantiles_of_a_window() -> None:
    metrics, clock = counting()
    history = History(metrics, clock=clock)
    for _ in range(50):
        metrics.http(call(peers=IN))
    clock.now_s += 100
    history.tick()
    clock.now_s += 100
    for number in range(10):
        metrics.http(call(peers=IN, grpc_status=8 if number < 3 else 0, duration_ms=100))
    covered_s, rows = history.query(60, by=("destination_workload",), where={"reporter": "destination"})
    (row,) = rows
    assert (covered_s, row.requests, row.errors, row.share) == (60, 10, 3, 1.0)
    assert row.statuses == {"0": 7, "8": 3}
    assert 50 < row.quantile_ms(0.5) <= 100
    _, everything = history.query(600, by=("grpc_response_status",), where={"reporter": "destination"})
    assert [(each.labels["grpc_response_status"], each.requests) for each in everything if each.requests] == [
        ("0", 57),
        ("8", 3),
    ]
    assert history.query(60, by=(), where={"reporter": "source"})[1] == []
    assert Row(labels={}).quantile_ms(0.5) == 0


def test_istios_dashboards_find_their_metrics_and_labels() -> None:
    """Names and labels of the queries of Istio's own Grafana dashboards, kept as facts beside this test."""
    facts = json.loads((Path(__file__).parent / "istio_dashboards.json").read_text())
    known = {metric.name: {*metric.labels, "le"} for metric in STANDARD}
    suffix = re.compile(r"_(bucket|sum|count)$")
    for name, labels in facts.items():
        base = suffix.sub("", name)
        assert base in known, name
        assert set(labels) <= known[base], name
    assert "grpc_response_status" in HTTP_LABELS


def test_every_metric_and_label_is_documented() -> None:
    page = (Path(__file__).parents[3] / "docs" / "mesh" / "telemetry.md").read_text()
    rows = set(re.findall(r"^\| `((?:istio|mlmesh)_[a-z_]+)` \|", page, re.MULTILINE))
    assert rows == {*(metric.name for metric in STANDARD), *OWN}
    assert [label for label in HTTP_LABELS if f"`{label}`" not in page] == []
    assert [
        name for name in ATTRIBUTES if name.startswith("request.") and name not in page and "size" not in name
    ] == []
