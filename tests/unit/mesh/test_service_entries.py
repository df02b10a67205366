"""ServiceEntries, WorkloadEntries and every kind of Service: which hosts there are, and where they are served."""

from __future__ import annotations

from typing import Any

import pytest

from mlmesh_local.resources import Deployment
from tests.support.mesh_world import HOST, WORKLOADS, Told, load, resource

NETWORKING = "networking.istio.io/v1"
OUTSIDE = "a.example.com"


def entry(spec: str, *, name: str = "it", namespace: str = "") -> str:
    return resource("ServiceEntry", spec, name=name, namespace=namespace, group=NETWORKING)


def workload(spec: str, *, name: str = "vm", namespace: str = "") -> str:
    return resource("WorkloadEntry", spec, name=name, namespace=namespace, group=NETWORKING)


def service(spec: str, *, name: str = "more") -> str:
    return resource("Service", spec, name=name, group="v1")


PORT = "ports: [{number: 80, name: http, protocol: HTTP, targetPort: 8080}]"
GRPC = "ports: [{number: 80, name: grpc, protocol: GRPC}]"


def localities(it: Told, host: str = OUTSIDE, port: int = 80, subset: str = "") -> list[dict[str, Any]]:
    name = f"outbound|{port}|{subset}|{host}"
    found: list[dict[str, Any]] = (it.endpoints.get(name) or it.clusters[name]["load_assignment"])["endpoints"]
    return found


def addresses(it: Told, host: str = OUTSIDE, port: int = 80, subset: str = "") -> list[tuple[str, int]]:
    sockets = [
        endpoint["endpoint"]["address"]
        for each in localities(it, host, port, subset)
        for endpoint in each["lb_endpoints"]
    ]
    return [
        (one["socket_address"]["address"], one["socket_address"]["port_value"])
        if "socket_address" in one
        else (one["pipe"]["path"], 0)
        for one in sockets
    ]


@pytest.mark.parametrize(
    ("spec", "kind", "where"),
    [
        (f"resolution: STATIC, endpoints: [{{address: 10.0.0.1}}], {PORT}", "EDS", [("10.0.0.1", 8080)]),
        (
            f"resolution: STATIC, endpoints: [{{address: 10.0.0.1, ports: {{http: 9}}}}], {PORT}",
            "EDS",
            [("10.0.0.1", 9)],
        ),
        (f"resolution: STATIC, endpoints: [{{address: 'unix:///tmp/x'}}], {PORT}", "EDS", [("/tmp/x", 0)]),
        (f"resolution: DNS, {PORT}", "STRICT_DNS", [(OUTSIDE, 8080)]),
        (f"resolution: DNS, endpoints: [{{address: b.example.com}}], {PORT}", "STRICT_DNS", [("b.example.com", 8080)]),
        (f"resolution: DNS_ROUND_ROBIN, {PORT}", "LOGICAL_DNS", [(OUTSIDE, 8080)]),
        # Nothing is captured: the sidecar resolves what the application would.
        (f"{PORT}", "STRICT_DNS", [(OUTSIDE, 8080)]),
        (f"resolution: STATIC, {PORT}", "EDS", []),
    ],
)
def test_how_endpoints_are_found(spec: str, kind: str, where: list[tuple[str, int]]) -> None:
    it = Told("client", entry(f"{{hosts: [{OUTSIDE}], {spec}}}"))
    found = it.cluster(port=80, host=OUTSIDE)
    assert found["type"] == kind
    assert addresses(it) == where
    if kind.endswith("DNS"):
        assert found["dns_lookup_family"] == "V4_ONLY"
        assert found["respect_dns_ttl"] is True


@pytest.mark.parametrize("spec", [f"resolution: DYNAMIC_DNS, {GRPC}", GRPC])
def test_wildcards_are_resolved_when_they_are_called(spec: str) -> None:
    it = Told("client", entry(f"{{hosts: ['*.example.com'], {spec}}}"))
    found = it.cluster(port=80, host="*.example.com")
    cache = found["cluster_type"]["typed_config"]["dns_cache_config"]
    assert found["lb_policy"] == "CLUSTER_PROVIDED"
    listener = next(name for name in it.listeners if name.endswith("_80"))
    filters = {each["name"]: each for each in it.manager(listener)["http_filters"]}
    resolving = filters["envoy.filters.http.dynamic_forward_proxy"]["typed_config"]
    assert resolving["dns_cache_config"] == cache


def test_endpoints_by_locality_weight_and_mutual_tls() -> None:
    endpoints = (
        "{address: 10.0.0.2, locality: r/z, weight: 3}, {address: 10.0.0.1, locality: r/z, serviceAccount: far},"
        " {address: 10.0.0.3, labels: {istio-locality: r.y}}, {network: other}"
    )
    text = entry(
        f"{{hosts: [{OUTSIDE}], location: MESH_INTERNAL, resolution: STATIC, {PORT}, endpoints: [{endpoints}]}}"
    )
    it = Told("client", text)
    assert [(one["locality"], one["load_balancing_weight"]) for one in localities(it)] == [
        ({"region": "r", "zone": "y"}, 1),
        ({"region": "r", "zone": "z"}, 4),
    ]
    tagged = {
        each["endpoint"]["address"]["socket_address"]["address"]
        for one in localities(it)
        for each in one["lb_endpoints"]
        if "metadata" in each
    }
    assert tagged == {"10.0.0.1"}
    istio = it.cluster(port=80, host=OUTSIDE)["transport_socket_matches"][0]["transport_socket"]["typed_config"]
    validation = istio["common_tls_context"]["combined_validation_context"]["default_validation_context"]
    names = [san["matcher"] for san in validation["match_typed_subject_alt_names"]]
    assert names == [{"exact": "spiffe://cluster.local/ns/mlmesh/sa/far"}]


def test_selected_workloads() -> None:
    selecting = entry(
        f"{{hosts: [{OUTSIDE}], resolution: STATIC, location: MESH_INTERNAL, {PORT},"
        " workloadSelector: {labels: {app: server}}}"
    )
    vm = workload("{address: 10.0.0.9, labels: {app: server, version: v2}, ports: {http: 81, grpc: 82}}")
    elsewhere = workload("{address: 10.0.0.8, labels: {app: server}}", namespace="other")
    named = workload("{address: b.example.com, labels: {app: server}}", name="dns")
    it = Told("client", selecting, vm, elsewhere, named)
    assert addresses(it) == [("10.0.0.9", 81), ("127.64.1.1", 8080), ("127.64.1.2", 8080)]
    # A Service selects them, too; where it means a port by name, only such as have it.
    assert ("10.0.0.9", 82) in addresses(it, HOST, 9000)
    assert ("10.0.0.9", 9090) in addresses(it, HOST, 9090)
    without = workload("{address: 10.0.0.9, labels: {app: server}, ports: {http: 81}}")
    assert addresses(Told("client", without), HOST, 9000) == [("127.64.1.1", 8000), ("127.64.1.2", 8000)]
    assert {port.port for port in it.view.inbound(it.proxy_of("server-v1"))} == {8000, 8080, 9090}


def test_entries_of_one_host() -> None:
    one = entry(f"{{hosts: [{OUTSIDE}], resolution: STATIC, endpoints: [{{address: 10.0.0.1}}], {PORT}}}", name="a")
    two = entry(
        f"{{hosts: [{OUTSIDE}], resolution: STATIC, endpoints: [{{address: 10.0.0.2}}],"
        " ports: [{number: 81, name: more, protocol: HTTP}, {number: 90, name: http, protocol: HTTP}]}",
        name="b",
    )
    it = Told("client", two, one)
    # Ports are joined; endpoints are by the names of ports.
    assert addresses(it) == [("10.0.0.1", 8080), ("10.0.0.2", 90)]
    assert addresses(it, port=81) == [("10.0.0.2", 81)]
    other = entry(
        f"{{hosts: [{OUTSIDE}], resolution: STATIC, endpoints: [{{address: 10.0.0.3}}], {PORT}}}", namespace="other"
    )
    assert addresses(Told("client", other, one)) == [("10.0.0.1", 8080)]
    assert addresses(Told("client", other)) == [("10.0.0.3", 8080)]
    taken = entry(f"{{hosts: [{HOST}], resolution: STATIC, endpoints: [{{address: 10.0.0.4}}], {GRPC}}}")
    assert f"outbound|80||{HOST}" not in Told("client", taken).clusters


@pytest.mark.parametrize(
    ("export", "namespace", "seen"),
    [
        ("['*']", "other", True),
        ("['.']", "other", False),
        ("['.']", "", True),
        ("[mlmesh]", "other", True),
        ("['~']", "", False),
    ],
)
def test_who_sees_an_entry(export: str, namespace: str, seen: bool) -> None:
    text = entry(f"{{hosts: [{OUTSIDE}], resolution: DNS, exportTo: {export}, {PORT}}}", namespace=namespace)
    assert (f"outbound|80||{OUTSIDE}" in Told("client", text).clusters) is seen


def test_exports_of_the_mesh_and_of_services() -> None:
    mesh = resource("ConfigMap", "", name="istio", namespace="istio-system", group="v1").replace(
        "spec: ", "data: {mesh: \"defaultServiceExportTo: ['.']\"}"
    )
    text = entry(f"{{hosts: [{OUTSIDE}], resolution: DNS, {PORT}}}", namespace="other")
    assert f"outbound|80||{OUTSIDE}" not in Told("client", mesh, text).clusters
    hidden = WORKLOADS.replace(
        "metadata: {name: server}\nspec:\n  selector: {app: server}",
        "metadata: {name: server, annotations: {networking.istio.io/exportTo: 'other, ~'}}\n"
        "spec:\n  selector: {app: server}",
    )
    assert f"outbound|9000||{HOST}" not in Told("client", workloads=hidden).clusters


def test_kinds_of_services() -> None:
    headless = service("{clusterIP: None, selector: {app: server}, ports: [{name: grpc, port: 7000}]}")
    it = Told("client", headless)
    assert addresses(it, "more.mlmesh.svc.cluster.local", 7000) == [("127.64.1.1", 7000), ("127.64.1.2", 7000)]

    alias = service("{type: ExternalName, externalName: server.mlmesh.svc.cluster.local}")
    second = service("{type: ExternalName, externalName: more.mlmesh.svc.cluster.local}", name="third")
    found = Told("client", alias, second).view.services[HOST].aliases
    assert found == (("mlmesh", "more.mlmesh.svc.cluster.local"), ("mlmesh", "third.mlmesh.svc.cluster.local"))
    loop = service("{type: ExternalName, externalName: more.mlmesh.svc.cluster.local}")
    assert Told("client", loop).view.services[HOST].aliases == ()

    eager = service("{publishNotReadyAddresses: true, selector: {app: server}, ports: [{name: grpc, port: 7000}]}")
    it = Told("client", eager, not_ready={"server-v1"})
    states = [
        one.get("health_status")
        for each in localities(it, "more.mlmesh.svc.cluster.local", 7000)
        for one in each["lb_endpoints"]
    ]
    assert states == [None, None]
    assert addresses(it, HOST, 9000) == [("127.64.1.1", 8000), ("127.64.1.2", 8000)]
    assert it.addresses() == {("127.64.1.2", 8000)}


@pytest.mark.parametrize(
    ("port", "protocol"),
    [
        ("{name: grpc-web-x, port: 1}", "grpc-web"),
        ("{name: https, port: 1}", "https"),
        ("{name: fast, port: 1}", "unknown"),
        ("{port: 1}", "unknown"),
        ("{name: db, port: 3306}", "tcp"),
        ("{name: http, port: 1, appProtocol: kubernetes.io/h2c}", "http2"),
        ("{name: grpc, port: 1, appProtocol: tcp}", "tcp"),
        ("{name: GRPC-x, port: 1, appProtocol: GRPC-x}", "grpc"),
    ],
)
def test_protocols_of_ports(port: str, protocol: str) -> None:
    lowered = port.replace("GRPC-x,", "grpc-x,", 1)
    found = Told("client", service(f"{{selector: {{app: server}}, ports: [{lowered}]}}")).view
    assert found.services["more.mlmesh.svc.cluster.local"].ports[0].protocol == protocol


def test_udp_is_not_of_the_mesh() -> None:
    text = service("{selector: {app: server}, ports: [{name: dns, port: 53, protocol: UDP}, {name: grpc, port: 53}]}")
    (port,) = Told("client", text).view.services["more.mlmesh.svc.cluster.local"].ports
    assert port.protocol == "grpc"


def test_stateful_sets_and_pods_are_workloads() -> None:
    pod = """
apiVersion: v1
kind: Pod
metadata: {name: lone, labels: {app: server, version: v9}}
spec: {containers: [{name: app, command: [serve], ports: [{name: grpc, containerPort: 8000}]}]}
---
apiVersion: apps/v1
kind: StatefulSet
metadata: {name: db}
spec:
  serviceName: db
  replicas: 2
  selector: {matchLabels: {app: db}}
  template:
    metadata: {labels: {app: db}}
    spec:
      nodeSelector: {topology.kubernetes.io/zone: z, disk: fast}
      containers: [{name: app, command: [serve], ports: [{containerPort: 5432}]}]
"""
    found = {deployment.meta.name: deployment for deployment in load(pod).specs(Deployment)}
    assert found["lone"].replicas == 1
    assert found["db"].replicas == 2
    assert found["db"].labels == {"app": "db", "topology.kubernetes.io/zone": "z"}
