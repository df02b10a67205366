"""Calls counted by the rule that routed them."""

from __future__ import annotations

from itertools import count

import pytest

from mlmesh_local.messages import route
from mlmesh_local.metrics.calls import HttpCall, Peers, Routed
from mlmesh_local.metrics.rules import KEYS_MAX, RuleCounts
from mlmesh_local.resources import Document, load_resources
from mlmesh_local.routes import list_routes

NAMES = count()
V1 = "outbound|9000|v1|echo.mlmesh.svc.cluster.local"
RESOURCE = "/apis/networking.istio.io/v1/namespaces/mlmesh/virtual-service/echo"
RULES = """
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {name: echo, namespace: mlmesh}
spec:
  hosts: [echo, other]
  http:
    - {name: a, match: [{name: b, uri: {prefix: /a}}], route: [{destination: {host: echo, subset: v1}}]}
    - {match: [{uri: {prefix: /b}}], route: [{destination: {host: echo, subset: v1}}]}
    - route:
        - {destination: {host: echo, subset: v1}, weight: 1}
        - {destination: {host: echo, subset: v2}, weight: 1}
---
apiVersion: v1
kind: Service
metadata: {name: plain, namespace: mlmesh}
spec: {selector: {app: plain}, ports: [{name: grpc, port: 9000}]}
"""


def call(
    rule: str = "", *, name: str = "", cluster: str = V1, authority: str = "echo:9000", resource: str = RESOURCE,
    status: int = 0, code: int = 200, grpc: bool = True, ended: bool = True, start_ns: int = 10,
) -> HttpCall:  # fmt: skip
    peers = Peers("client-0", "outbound", cluster, "", "", "", "", "", "", "")
    return HttpCall(
        peers=peers, stream=(start_ns, str(next(NAMES))), ended=ended, grpc=grpc, code=code, grpc_status=status,
        flags="-", duration_ms=1, received_bytes=0, sent_bytes=0, received_messages=0, sent_messages=0,
        authority=authority, route=Routed(resource, rule, name),
    )  # fmt: skip


def counted(*calls: HttpCall) -> dict[tuple[str, int], list[tuple[str, int, int]]]:
    """Subset, requests and failures of each rule that was used, by host and number."""
    counts = RuleCounts(clock=lambda: 1.0)
    for one in calls:
        counts.take(one)
    found = [
        route(one, counts.observed(60.0)) for one in list_routes(load_resources([Document(source="a", text=RULES)]))
    ]
    return {
        (one.host.split(".")[0], index): [(d.subset, d.requests, d.failures) for d in one.destinations if d.requests]
        for index, one in enumerate(found)
        if any(d.requests for d in one.destinations)
    }


def test_rules_that_send_to_one_subset_are_told_apart() -> None:
    first = call('{"rule":0,"match":0}', name="a.b")
    second, third = call('{"match":0,"rule":1}', status=14), call('{"rule":2,"match":0}')
    other = call('{"rule":2,"match":0}', cluster=V1.replace("v1", "v2"), authority="other.mlmesh:9000")
    assert counted(first, second, second, third, other) == {
        ("echo", 0): [("v1", 1, 0)],
        ("echo", 1): [("v1", 2, 2)],
        ("echo", 2): [("v1", 1, 0)],
        ("other", 5): [("v2", 1, 0)],
    }


def test_a_service_without_rules_has_calls_of_its_own() -> None:
    plain = call(resource="", name="default", cluster="outbound|9000||plain.mlmesh.svc.cluster.local")
    assert counted(plain, plain) == {("plain", 6): [("", 2, 0)]}


def test_what_a_rule_answers_itself_and_what_it_sent_elsewhere_is_counted_beside_its_destinations() -> None:
    answered = call('{"rule":1,"match":0}', cluster="", status=7, authority="echo.mlmesh.svc.cluster.local")
    before = call('{"rule":1,"match":0}', cluster=V1.replace("v1", "v0"))
    assert counted(answered, before) == {("echo", 1): [("", 1, 1), ("v0", 1, 0)]}


def test_without_our_metadata_rules_are_known_by_name() -> None:
    """Istio's own control plane tells the VirtualService and the name of the route."""
    assert counted(call(name="a.b")) == {("echo", 0): [("v1", 1, 0)]}
    assert set(counted(call())) == {("echo", 1), ("echo", 2)}


@pytest.mark.parametrize(
    ("ended", "failures"),
    [
        (call('{"rule":1}', grpc=False, code=503, status=-1), 1),
        (call('{"rule":1}', grpc=False, code=0, status=-1), 1),
        (call('{"rule":1}', grpc=False, code=404, status=-1), 0),
        (call('{"rule":1}', status=-1, code=0), 1),
    ],
)
def test_what_failed(ended: HttpCall, failures: int) -> None:
    assert counted(ended) == {("echo", 1): [("v1", 1, failures)]}


def test_calls_from_before_the_mesh_was_ready_and_open_ones_are_not_counted() -> None:
    counts = RuleCounts(clock=lambda: 1.0)
    counts.take(call('{"rule":1}'))
    counts.begin(100)
    counts.take(call('{"rule":1}', start_ns=99))
    counts.take(call('{"rule":1}', start_ns=100, ended=False))
    assert counts.observed(60.0) == {}
    counts.take(call('{"rule":1}', start_ns=100))
    assert [one.requests for one in counts.observed(60.0).values()] == [1]


def test_ever_other_hosts_fill_no_memory() -> None:
    counts = RuleCounts(clock=lambda: 1.0)
    for number in range(KEYS_MAX + 10):
        counts.take(call('{"rule":1}', authority=f"host-{number}"))
    found = counts.observed(60.0)
    assert len(found) == KEYS_MAX + 1
    assert sum(one.requests for one in found.values()) == KEYS_MAX + 10
