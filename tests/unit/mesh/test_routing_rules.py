"""Which VirtualService routes what: delegates, several of a host, wildcards, connections. The rules are Istio's."""

from __future__ import annotations

from typing import Any

import pytest

from mlmesh_local.resources.delegates import VirtualServices, merge_matches
from mlmesh_local.resources.model_routes import HttpMatch, StringMatch, VirtualService
from mlmesh_local.resources.problems import At
from tests.support.mesh_documents import SUBSETS
from tests.support.mesh_world import HOST, Told, load_alone, resource, virtual_service

NETWORKING = "networking.istio.io/v1"
TO = "route: [{destination: {host: server}}]"
NOWHERE = At(source="x", line=1)


def service(spec: str, *, name: str = "it", namespace: str = "") -> str:
    return resource("VirtualService", spec, name=name, group=NETWORKING, namespace=namespace)


def named(it: Told, host: str = f"{HOST}:9000", routes: str = "9000") -> list[str]:
    return [route.get("name", "") for route in it.rules(host, routes)]


# Delegates


ROOT = "{hosts: [server], http: [{name: root, match: [{uri: {prefix: /a}}, {headers: {x: {exact: '1'}}}], DELEGATE}]}"


def rooted(delegate: str, extra: str = "", *, namespace: str = "") -> Told:
    root = ROOT.replace("DELEGATE", f"delegate: {{name: leaf, namespace: '{namespace}'}}{extra}")
    return Told("client", SUBSETS, service(root, name="root"), service(delegate, name="leaf", namespace=namespace))


def test_a_delegate_stands_in_place_of_the_rule_and_takes_what_it_does_not_say_from_the_root() -> None:
    it = rooted(
        f"{{http: [{{name: one, match: [{{uri: {{prefix: /a/b}}}}], {TO}}}, {{name: two, {TO}, timeout: 1s}}]}}",
        ", timeout: 3s, retries: {attempts: 7}, headers: {request: {remove: ['y']}}",
    )
    # Of the first both matches of the root fit: the second says nothing of paths.
    assert named(it) == ["root-one", "root-one", "root-two", "root-two"]
    first, second, third, _ = it.rules()
    assert first["match"]["prefix"] == "/a/b"
    assert (second["match"]["prefix"], second["match"]["headers"][0]["name"]) == ("/a/b", "x")
    assert (first["route"]["timeout"], third["route"]["timeout"]) == ("3s", "1s")
    assert third["route"]["retry_policy"]["num_retries"] == 7
    assert third["request_headers_to_remove"] == ["y"]


def test_routes_say_where_they_come_from() -> None:
    it = rooted(f"{{http: [{{match: [{{uri: {{prefix: /a}}}}], {TO}}}]}}")
    (first, *_) = it.rules()
    assert first["metadata"]["filter_metadata"] == {
        "istio": {"config": "/apis/networking.istio.io/v1/namespaces/mlmesh/virtual-service/root"},
        "mlmesh": {"rule": 0, "match": 0, "delegate": "mlmesh/leaf", "delegate_rule": 0},
    }


def test_a_delegate_that_contradicts_or_is_not_there_leaves_its_rule_out() -> None:
    assert named(
        rooted(f"{{http: [{{name: x, match: [{{uri: {{exact: /b}}, headers: {{x: {{exact: '2'}}}}}}], {TO}}}]}}")
    ) == ["default"]
    gone = service(ROOT.replace("DELEGATE", "delegate: {name: nobody}"))
    assert named(Told("client", gone)) == ["default"]


@pytest.mark.parametrize(("export", "seen"), [("[mlmesh]", True), ("['*']", True), ("[.]", False)])
def test_a_delegate_is_used_where_it_is_exported_to(export: str, seen: bool) -> None:
    it = rooted(
        f"{{exportTo: {export}, http: [{{{TO.replace('server', 'server.mlmesh.svc.cluster.local')}}}]}}",
        namespace="team",
    )
    assert (named(it) == ["root", "root"]) is seen


def test_short_names_of_a_delegate_are_of_its_own_namespace() -> None:
    there = resource("Service", "{ports: [{name: grpc, port: 9000}]}", name="server", group="v1", namespace="team")
    delegate = service(f"{{http: [{{{TO}}}]}}", name="leaf", namespace="team")
    it = Told("client", there, service(ROOT.replace("DELEGATE", "delegate: {name: leaf, namespace: team}")), delegate)
    assert it.rules()[0]["route"]["cluster"] == "outbound|9000||server.team.svc.cluster.local"


def exact(value: str) -> StringMatch:
    return StringMatch(how="exact", value=value)


def prefix(value: str) -> StringMatch:
    return StringMatch(how="prefix", value=value)


REGEX = StringMatch(how="regex", value="a.*")
PRESENT = StringMatch(how="present")


@pytest.mark.parametrize(
    ("root", "leaf", "fits"),
    [
        ({}, {"uri": exact("/a")}, True),
        ({"uri": prefix("/a")}, {}, True),
        ({"uri": prefix("/a")}, {"uri": prefix("/a/b")}, True),
        ({"uri": prefix("/a")}, {"uri": exact("/a")}, True),
        ({"uri": prefix("/a/b")}, {"uri": prefix("/a")}, False),
        ({"uri": exact("/a")}, {"uri": exact("/a")}, True),
        ({"uri": exact("/a")}, {"uri": prefix("/a")}, False),
        ({"uri": REGEX}, {"uri": REGEX}, False),
        ({"uri": exact("/a")}, {"uri": REGEX}, False),
        ({"method": PRESENT}, {"method": exact("GET")}, False),
        ({"headers": (("x", exact("1")),)}, {"headers": (("y", exact("2")),)}, True),
        ({"headers": (("x", exact("1")),)}, {"headers": (("x", exact("2")),)}, False),
        ({"port": 80}, {"port": 81}, False),
        ({"port": 80}, {}, True),
        ({"ignore_uri_case": True}, {}, False),
        ({"source_namespace": "a"}, {}, False),
        ({"source_namespace": "a"}, {"source_namespace": "a"}, True),
        ({"source_labels": {"a": "b"}}, {"source_labels": {"a": "c"}}, False),
        ({"source_labels": {"a": "b"}}, {"source_labels": {"d": "c"}}, True),
        ({"gateways": ("a/b",)}, {"gateways": ("a/b", "a/c")}, False),
        ({"gateways": ("a/b", "a/c")}, {"gateways": ("a/c",)}, True),
    ],
)
def test_matches_are_joined_unless_they_contradict(root: dict[str, Any], leaf: dict[str, Any], fits: bool) -> None:
    joined = merge_matches((HttpMatch(at=NOWHERE, **root),), (HttpMatch(at=NOWHERE, **leaf),))
    assert (joined is not None) is fits


# Several of a host, and hosts that are no services


def test_the_narrowest_host_counts() -> None:
    wild = service(f"{{hosts: ['*.mlmesh.svc.cluster.local'], http: [{{name: wild, {TO}}}]}}", name="a")
    wider = service(f"{{hosts: ['*.cluster.local'], http: [{{name: wider, {TO}}}]}}", name="b")
    full = service(f"{{hosts: [server], http: [{{name: full, match: [{{port: 9000}}], {TO}}}]}}", name="c")
    it = Told("client", wild, wider, full)
    assert named(it) == ["full"]
    # The narrowest has nothing for that port: as in Istio, no wider one takes its place.
    assert named(it, f"{HOST}:9090", "9090") == ["default"]
    assert named(Told("client", wild, wider)) == ["wild"]


def test_what_only_this_namespace_sees_comes_first() -> None:
    texts = [
        service(f"{{hosts: [a], {export}, http: [{{{TO}}}]}}", name=name)
        for name, export in {
            "all": "exportTo: ['*']",
            "own": "exportTo: [.]",
            "unsaid": "gateways: [mesh]",
            "others": "exportTo: [team]",
            "gate": "gateways: [gate, ns/gate, gate.other.svc.cluster.local]",
        }.items()
    ]
    bound = VirtualServices(load_alone(*texts).specs(VirtualService), domain="cluster.local")
    assert [one.meta.name for one in bound.bound("mesh", "mlmesh")] == ["own", "all", "unsaid"]
    assert [one.meta.name for one in bound.bound("mesh", "team")] == ["others", "all", "unsaid"]
    assert [one.meta.name for one in bound.bound("mlmesh/gate", "mlmesh")] == ["gate"]
    assert [one.meta.name for one in bound.bound("other/gate", "mlmesh")] == ["gate"]


def test_hosts_that_are_no_services_are_known_on_port_80_and_beside_services() -> None:
    web = resource("Service", "{selector: {app: server}, ports: [{name: http, port: 80}]}", name="web", group="v1")
    alone = service("{hosts: [shop.example], http: [{directResponse: {status: 200}}]}", name="a")
    beside = service(f"{{hosts: [server, old.example], http: [{{name: r, {TO}}}]}}", name="b")
    it = Told("client", web, alone, beside)
    assert it.virtual_host("shop.example:80", "80")["domains"] == ["shop.example"]
    assert named(it, "old.example:9000") == ["r"]
    names = [host["name"] for host in it.routes["9000"]["virtual_hosts"]]
    assert names == ["old.example:9000", f"{HOST}:9000", "block_all"]


def test_domains_of_headless_services_and_of_other_names() -> None:
    more = resource(
        "Service",
        "{clusterIP: None, selector: {app: server}, ports: [{name: http, port: 8000}]}",
        name="pods",
        group="v1",
    ) + resource(
        "ServiceEntry",
        "{hosts: [a.example], addresses: [240.0.0.1, 10.0.0.0/8], resolution: STATIC,"
        " ports: [{number: 8000, name: http, protocol: HTTP}], endpoints: [{address: 10.0.0.1}]}",
        group=NETWORKING,
    )
    it = Told("client", more)
    assert "*.pods.mlmesh" in it.virtual_host("pods.mlmesh.svc.cluster.local:8000", "8000")["domains"]
    assert it.virtual_host("a.example:8000", "8000")["domains"] == ["a.example", "a.example.", "240.0.0.1"]


def test_the_mesh_may_have_a_policy_of_retries_and_of_paths() -> None:
    settings = """
apiVersion: v1
kind: ConfigMap
metadata: {name: istio, namespace: istio-system}
data:
  mesh: |
    defaultHttpRetryPolicy: {attempts: 4, retryOn: 5xx}
    pathNormalization: {normalization: MERGE_SLASHES}
---
"""
    it = Told("client", settings)
    policy = it.action()["retry_policy"]
    assert (policy["num_retries"], policy["retry_on"]) == (4, "5xx")
    manager = next(iter(it.listeners.values()))["filter_chains"][0]["filters"][0]["typed_config"]
    assert (manager["normalize_path"], manager["merge_slashes"]) == (True, True)


# Connections


def chains(it: Told, port: int) -> list[tuple[Any, Any]]:
    """What takes connections on a port of the client, and where it sends them."""
    listener = next(one for name, one in it.listeners.items() if name.endswith(f"_{port}"))
    found = listener["filter_chains"] + [one for one in (listener.get("default_filter_chain"),) if one]
    result: list[tuple[Any, Any]] = []
    for chain in found:
        config = chain["filters"][-1]["typed_config"]
        match = chain.get("filter_chain_match", {})
        target = config.get("cluster") or config.get("weighted_clusters") or "requests"
        result.append(
            (match.get("server_names") or match.get("prefix_ranges") or match.get("application_protocols"), target)
        )
    return result


def ports(name: str, *declared: str) -> str:
    return resource(
        "Service",
        f"{{selector: {{app: server}}, ports: [{', '.join(declared)}]}}",
        name=name,
        group="v1",
    )


DB = "outbound|5432||db.mlmesh.svc.cluster.local"


@pytest.mark.parametrize(
    ("declared", "kind"),
    [
        ("{name: tcp-db, port: 5432}", "tcp"),
        ("{name: mysql, port: 5432}", "tcp"),
        ("{name: redis-x, port: 5432}", "tcp"),
        ("{name: http, appProtocol: tcp, port: 5432}", "tcp"),
        ("{name: https, port: 5432}", "tcp"),
        ("{name: web, port: 3306}", "tcp"),
        ("{name: web, port: 5432}", "both"),
        ("{name: grpc-web-x, port: 5432}", "requests"),
    ],
)
def test_ports_by_protocol(declared: str, kind: str) -> None:
    it = Told("client", ports("db", declared))
    port = 3306 if "3306" in declared else 5432
    assert (str(port) in it.routes) is (kind != "tcp")
    expected = {
        "tcp": [(None, DB.replace("5432", str(port)))],
        "both": [(["http/1.1", "h2c"], "requests"), (None, DB)],
        "requests": [(None, "requests")],
    }
    assert chains(it, port) == expected[kind]


def test_tcp_routes_by_weight_port_and_subnet() -> None:
    both = "route: [{destination: {host: db, subset: v1}, weight: 1}, {destination: {host: db}, weight: 3}]"
    db = ports("db", "{name: tcp, port: 5432}")
    it = Told("client", db, service(f"{{hosts: [db], tcp: [{{match: [{{port: 5432}}], {both}}}]}}"))
    assert chains(it, 5432) == [
        (None, {"clusters": [{"name": DB.replace("||", "|v1|"), "weight": 1}, {"name": DB, "weight": 3}]})
    ]
    to_v1 = "route: [{destination: {host: db, subset: v1}}]"
    subnets = f"{{hosts: [db], tcp: [{{match: [{{destinationSubnets: [10.0.0.0/8, 1.2.3.4]}}], {to_v1}}}]}}"
    ranges = [{"address_prefix": "10.0.0.0", "prefix_len": 8}, {"address_prefix": "1.2.3.4", "prefix_len": 32}]
    assert chains(Told("client", db, service(subnets)), 5432) == [(ranges, DB.replace("||", "|v1|")), (None, DB)]
    other = service(f"{{hosts: [db], tcp: [{{match: [{{sourceLabels: {{team: blue}}}}], {to_v1}}}]}}")
    assert chains(Told("client", db, other), 5432) == [(None, DB)]


def test_tls_services_of_a_port_are_told_apart_by_name_and_other_connections_are_the_oldest_services() -> None:
    it = Told(
        "client",
        ports("a", "{name: tls, port: 6443}") + ports("b", "{name: https, port: 6443}"),
        ports("c", "{name: tcp, port: 6443}") + ports("d", "{name: tcp, port: 6443}"),
    )
    found = {tuple(names or ()): target for names, target in chains(it, 6443)}
    assert found[()] == "outbound|6443||c.mlmesh.svc.cluster.local"
    (of_a,) = (names for names, target in found.items() if target == "outbound|6443||a.mlmesh.svc.cluster.local")
    assert of_a == tuple(
        f"a{rest}" for rest in (".mlmesh.svc.cluster.local", ".mlmesh.svc.cluster.local.", "", ".mlmesh.svc", ".mlmesh")
    )
    assert len(found) == 3


def test_routes_of_tls_are_chains_and_leave_routes_of_requests_as_they_are() -> None:
    web = ports("web", "{name: tls, port: 6443}")
    rule = service(
        "{hosts: [web.mlmesh.svc.cluster.local, '*.shop.example'], tls: ["
        "{match: [{sniHosts: [a.shop.example, web.mlmesh.svc.cluster.local]}],"
        " route: [{destination: {host: server, port: {number: 9000}}}]},"
        "{match: [{sniHosts: ['*.shop.example'], gateways: [other]}], route: [{destination: {host: web}}]}]}"
    )
    it = Told("client", web, rule)
    assert chains(it, 6443) == [(["a.shop.example", "web.mlmesh.svc.cluster.local"], f"outbound|9000||{HOST}")]
    assert it.routes.keys() == Told("client", web).routes.keys()


def test_what_rules_of_a_host_say_of_connections() -> None:
    rule = resource(
        "DestinationRule",
        "{host: db, trafficPolicy: {connectionPool: {tcp: {idleTimeout: 5s, maxConnectionDuration: 9s}},"
        " loadBalancer: {consistentHash: {useSourceIp: true}},"
        " tunnel: {protocol: POST, targetHost: t.example, targetPort: 443}}}",
        group=NETWORKING,
    )
    it = Told("client", ports("db", "{name: tcp, port: 5432}"), rule)
    listener = next(one for name, one in it.listeners.items() if name.endswith("_5432"))
    config = listener["filter_chains"][0]["filters"][0]["typed_config"]
    assert config["idle_timeout"] == "5s"
    assert config["max_downstream_connection_duration"] == "9s"
    assert config["hash_policy"] == [{"source_ip": {}}]
    assert config["tunneling_config"] == {"hostname": "t.example:443", "use_post": True}


MODES = {
    "STRICT": [("mtls", True)],
    "DISABLE": [("plaintext", False)],
    "PERMISSIVE": [("mtls", True), ("tls-of-the-application", False), ("plaintext", False)],
}


@pytest.mark.parametrize("mode", MODES)
def test_inbound_connections_by_mode(mode: str) -> None:
    security = resource("PeerAuthentication", f"{{mtls: {{mode: {mode}}}}}")
    it = Told("server-v1", ports("db", "{name: tcp, port: 5432}"), security)
    listener = next(one for name, one in it.listeners.items() if name.endswith("_5432") and name.startswith("127.64.1"))
    assert [(chain["name"], "transport_socket" in chain) for chain in listener["filter_chains"]] == MODES[mode]
    assert {chain["filters"][-1]["typed_config"]["cluster"] for chain in listener["filter_chains"]} == {
        "inbound|5432||"
    }


def test_listeners_change_with_routes_of_connections_only() -> None:
    db = ports("db", "{name: tcp, port: 5432}")
    plain = Told("client", db)
    requests = Told("client", db, virtual_service(f"[{{timeout: 1s, {TO}}}]"))
    assert requests.listeners == plain.listeners
