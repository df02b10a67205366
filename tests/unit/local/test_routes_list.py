from __future__ import annotations

from pathlib import Path

import pytest

from mlmesh_local.messages import subset_shares
from mlmesh_local.resources import Document, ResourceSet, load_resources
from mlmesh_local.routes import configured_shares, list_routes
from mlmesh_local.stats import Counts, Destination

ECHO = "echo.mlmesh.svc.cluster.local"
SERVICE = """
apiVersion: v1
kind: Service
metadata: {name: %s, namespace: mlmesh}
spec: {selector: {app: %s}, ports: [{name: grpc, port: 9000}]}
"""
ROUTES = """
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {name: echo, namespace: mlmesh}
spec:
  hosts: [echo]
  http:
    - name: tester
      match: [{headers: {x-user: {exact: tester}}}, {uri: {prefix: /a.B/}}]
      timeout: 2s
      retries: {attempts: 0}
      fault:
        abort: {grpcStatus: UNAVAILABLE, percentage: {value: 50}}
        delay: {fixedDelay: 1s, percentage: {value: 100}}
      route: [{destination: {host: echo, subset: v2}}]
    - route:
        - {destination: {host: echo, subset: v1}, weight: 30}
        - {destination: {host: echo, subset: v2}, weight: 10}
"""


@pytest.fixture
def resources() -> ResourceSet:
    text = "---".join([SERVICE % ("echo", "echo"), SERVICE % ("plain", "plain"), ROUTES])
    return load_resources([Document(source="a.yaml", text=text)])


def test_rules_come_in_the_order_in_which_they_are_tried(resources: ResourceSet) -> None:
    tester, split, plain = list_routes(resources)
    assert (tester.virtual_service, tester.host, tester.rule) == ("mlmesh/echo", ECHO, "tester")
    assert tester.match == "header x-user = tester or uri prefix /a.B/"
    assert tester.policy == "timeout 2 s, no retries, delay 1 s for 100 %, abort UNAVAILABLE for 50 %"
    assert [(target.subset, target.share) for target in tester.targets] == [("v2", 1.0)]
    assert (split.match, split.policy) == ("any", "")
    assert [(target.subset, target.share) for target in split.targets] == [("v1", 0.75), ("v2", 0.25)]
    assert (plain.virtual_service, plain.host) == ("", "plain.mlmesh.svc.cluster.local")
    assert [target.share for target in plain.targets] == [-1]


MORE = """
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {name: shop, namespace: mlmesh}
spec:
  hosts: [a.example, b.example]
  http:
    - {name: root, match: [{uri: {prefix: /a}}], delegate: {name: leaf}}
    - {redirect: {uri: /}, corsPolicy: {}}
  tls: [{match: [{sniHosts: [a.example, b.example], port: 443}], route: [{destination: {host: echo}}]}]
  tcp: [{match: [{destinationSubnets: [10.0.0.0/8]}], route: [{destination: {host: echo}, weight: 1},
    {destination: {host: plain}, weight: 3}]}]
---
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {name: leaf, namespace: mlmesh}
spec: {http: [{name: leaf, directResponse: {status: 404}}]}
"""


def test_delegates_and_connections_are_listed() -> None:
    found = list_routes(load_resources([Document(source="a.yaml", text=MORE)]), "a.example")
    assert [(route.rule, route.match, route.policy) for route in found] == [
        ("root-leaf", "uri prefix /a", "answer 404"),
        ("", "any", "redirect 301, CORS"),
        ("", "server name a.example or b.example and port 443", ""),
        ("", "to 10.0.0.0/8", ""),
    ]
    assert [target.share for target in found[-1].targets] == [0.25, 0.75]


@pytest.mark.parametrize("host", ["echo", ECHO])
def test_a_host_may_be_named_short(resources: ResourceSet, host: str) -> None:
    assert {route.host for route in list_routes(resources, host)} == {ECHO}


def test_configured_shares_are_those_of_the_rule_for_everybody(resources: ResourceSet) -> None:
    shares = configured_shares(resources)
    assert (shares[ECHO, "v1"], shares[ECHO, "v2"]) == (0.75, 0.25)


def test_shares_put_configured_and_observed_side_by_side(resources: ResourceSet) -> None:
    observed = {
        Destination(host=ECHO, subset="v1", port=9000): Counts(requests=60, failures=1),
        Destination(host=ECHO, subset="v1", port=9001): Counts(requests=10),
        Destination(host=ECHO, subset="v3", port=9000): Counts(requests=30),
    }
    shares = {share.subset: share for share in subset_shares(configured_shares(resources), observed)}
    assert set(shares) == {"v1", "v2", "v3"}
    assert (shares["v1"].requests, shares["v1"].failures) == (70, 1)
    assert shares["v1"].observed_share == pytest.approx(0.7)
    assert (shares["v2"].requests, shares["v2"].observed_share, shares["v2"].configured_share) == (0, 0.0, 0.25)
    assert shares["v3"].configured_share == -1


def test_the_projects_own_routes_are_listed() -> None:
    root = Path(__file__).parents[3]
    text = "---\n".join(path.read_text() for path in sorted((root / "mesh" / "istio").glob("virtual*.yaml")))
    routes = list_routes(load_resources([Document(source="virtualservice.yaml", text=text)]))
    assert {route.host for route in routes} == {"inference.mlmesh.svc.cluster.local"}
