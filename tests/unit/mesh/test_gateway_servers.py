"""Servers of Gateways: which share a port, how they are told apart, what is left out. The rules are Istio's."""

from __future__ import annotations

from typing import Any

import pytest

from tests.support.mesh_documents import SUBSETS
from tests.support.mesh_world import HOST, Told, resource

NETWORKING = "networking.istio.io/v1"
TO = "route: [{destination: {host: server, port: {number: 9000}}}]"


def gateway(*servers: str, name: str = "way-in", selector: str = "istio: gateway") -> str:
    spec = f"{{selector: {{{selector}}}, servers: [{', '.join(f'{{{server}}}' for server in servers)}]}}"
    return resource("Gateway", spec, name=name, group=NETWORKING)


def service(spec: str, name: str = "it", namespace: str = "") -> str:
    return resource("VirtualService", spec, name=name, group=NETWORKING, namespace=namespace)


def http(hosts: str, *, number: int = 8080, name: str = "http", extra: str = "") -> str:
    return f"port: {{number: {number}, name: {name}, protocol: HTTP}}, hosts: {hosts}{extra}"


def https(hosts: str, tls: str = "mode: SIMPLE, credentialName: cert", *, name: str = "https", port: int = 8443) -> str:
    return f"port: {{number: {port}, name: {name}, protocol: HTTPS}}, hosts: {hosts}, tls: {{{tls}}}"


def chains(it: Told, name: str = "0.0.0.0_8443") -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = it.listeners[name]["filter_chains"]
    return found


def names(it: Told, name: str = "0.0.0.0_8443") -> list[list[str]]:
    return [chain.get("filter_chain_match", {}).get("server_names", []) for chain in chains(it, name)]


def hosts(it: Told, routes: str = "http.8080") -> dict[str, list[str]]:
    return {host["name"]: host["domains"] for host in it.routes[routes]["virtual_hosts"]}


def test_servers_with_plain_requests_share_routes() -> None:
    it = Told(
        "gateway",
        gateway(http("[a.example]")) + gateway(http("[b.example]"), name="other"),
        service(f"{{hosts: [a.example], gateways: [way-in], http: [{{{TO}}}]}}"),
        service(f"{{hosts: [b.example], gateways: [other], http: [{{{TO}}}]}}", name="b"),
    )
    assert list(it.listeners) == ["0.0.0.0_8080"]
    assert len(chains(it, "0.0.0.0_8080")) == 1
    assert hosts(it) == {"a.example:8080": ["a.example"], "b.example:8080": ["b.example"]}


def test_servers_with_tls_are_told_apart_by_name_and_have_routes_of_their_own() -> None:
    it = Told("gateway", gateway(https("[b.example, a.example]"), https("['*.c.example']", name="c")))
    assert names(it) == [["a.example", "b.example"], ["*.c.example"]]
    assert [chain["name"] for chain in chains(it)] == ["https.8443.https.way-in.mlmesh", "https.8443.c.way-in.mlmesh"]
    assert it.routes["https.8443.c.way-in.mlmesh"]["virtual_hosts"] == [
        {"name": "blackhole:8443", "domains": ["*"], "routes": []}
    ]


@pytest.mark.parametrize(
    ("second", "stays"),
    [
        (https("[a.example]", name="again"), False),
        (https("[b.example]", name="other"), True),
        ("port: {number: 8443, name: plain, protocol: HTTP}, hosts: ['*']", True),
        ("port: {number: 8443, name: tls, protocol: TLS}, tls: {mode: PASSTHROUGH}, hosts: ['*.pass']", True),
    ],
)
def test_beside_tls(second: str, stays: bool) -> None:
    passed = service(f"{{hosts: ['*.pass'], gateways: [way-in], tls: [{{match: [{{sniHosts: [x.pass]}}], {TO}}}]}}")
    it = Told("gateway", gateway(https("[a.example]"), second), passed)
    assert (len(chains(it)) == 2) is stays


@pytest.mark.parametrize(
    ("first", "second"),
    [("HTTP", "TCP"), ("TCP", "HTTP"), ("TCP", "TCP"), ("TCP", "TLS")],
)
def test_what_does_not_fit_to_an_older_server_is_left_out(first: str, second: str) -> None:
    def server(protocol: str, name: str) -> str:
        tls = ", tls: {mode: PASSTHROUGH}" if protocol == "TLS" else ""
        return f"port: {{number: 7000, name: {name}, protocol: {protocol}}}, hosts: ['*']{tls}"

    rule = service(
        f"{{hosts: ['*'], gateways: [way-in], tcp: [{{{TO}}}], tls: [{{match: [{{sniHosts: [a.b]}}], {TO}}}]}}"
    )
    both = Told("gateway", gateway(server(first, "a"), server(second, "b")), rule)
    assert chains(both, "0.0.0.0_7000") == chains(Told("gateway", gateway(server(first, "a")), rule), "0.0.0.0_7000")


def test_virtual_services_of_a_host_are_merged_with_what_takes_all_at_the_end() -> None:
    def rule(name: str, match: str = "") -> str:
        return service(f"{{hosts: [a.example], gateways: [way-in], http: [{{name: {name}, {match}{TO}}}]}}", name)

    it = Told("gateway", gateway(http("['*']")), rule("all"), rule("some", "match: [{uri: {prefix: /x}}], "))
    assert [route["name"] for route in it.rules("a.example:8080", "http.8080")] == ["some", "all"]


def test_hosts_with_the_same_routes_are_one_virtual_host() -> None:
    it = Told(
        "gateway",
        gateway(http("['*']")),
        service(f"{{hosts: [longer.example, a.example, '*.wild'], gateways: [way-in], http: [{{{TO}}}]}}"),
    )
    assert hosts(it) == {"longer.example:8080": ["longer.example", "a.example", "*.wild"]}


@pytest.mark.parametrize(
    ("server", "own", "common"),
    [
        ("['*.example']", "[a.example, b.other]", ["a.example"]),
        ("[a.example]", "['*.example']", ["a.example"]),
        ("['*.a.example']", "['*.example']", ["*.a.example"]),
        ("['*']", "['*.example']", ["*.example"]),
        ("[mlmesh/a.example, other/b.example]", "['*.example']", ["a.example"]),
        ("[./a.example]", "[a.example]", ["a.example"]),
        ("['*/a.example']", "[a.example]", ["a.example"]),
        ("[other/a.example]", "[a.example]", []),
    ],
)
def test_hosts_of_a_server_and_of_a_virtual_service_meet(server: str, own: str, common: list[str]) -> None:
    it = Told("gateway", gateway(http(server)), service(f"{{hosts: {own}, gateways: [way-in], http: [{{{TO}}}]}}"))
    assert [domain for domains in hosts(it).values() for domain in domains] == (common or ["*"])


def test_requests_without_tls_are_redirected() -> None:
    it = Told(
        "gateway",
        gateway(http("[a.example, b.example]", extra=", tls: {httpsRedirect: true}")),
        service(f"{{hosts: [a.example], gateways: [way-in], http: [{{{TO}}}]}}"),
    )
    found = {
        host["name"]: (host["require_tls"], len(host["routes"])) for host in it.routes["http.8080"]["virtual_hosts"]
    }
    assert found == {"a.example:8080": ("ALL", 1), "b.example:8080": ("ALL", 0)}


TLS: dict[str, dict[str, Any]] = {
    "mode: SIMPLE, credentialName: cert": {
        "tls_certificate_sds_secret_configs": ["kubernetes://cert"],
    },
    "mode: MUTUAL, credentialNames: [a, b], subjectAltNames: [c], verifyCertificateHash: [d]": {
        "tls_certificate_sds_secret_configs": ["kubernetes://a", "kubernetes://b"],
        "roots": "kubernetes://a-cacert",
        "require": True,
    },
    "mode: OPTIONAL_MUTUAL, credentialName: a, caCertCredentialName: b": {
        "tls_certificate_sds_secret_configs": ["kubernetes://a"],
        "roots": "kubernetes://b",
    },
    "mode: ISTIO_MUTUAL": {"tls_certificate_sds_secret_configs": ["default"], "roots": "ROOTCA", "require": True},
    "mode: MUTUAL, serverCertificate: /c, privateKey: /k, caCertificates: /r, caCrl: /l": {
        "tls_certificates": [{"certificate_chain": {"filename": "/c"}, "private_key": {"filename": "/k"}}],
        "validation_context": {"trusted_ca": {"filename": "/r"}, "crl": {"filename": "/l"}},
        "require": True,
    },
    "mode: SIMPLE, credentialName: a, minProtocolVersion: TLSV1_1, maxProtocolVersion: TLSV1_3,"
    " cipherSuites: [AES128-SHA, nope, AES128-SHA]": {
        "tls_params": {
            "tls_minimum_protocol_version": "TLSv1_1",
            "tls_maximum_protocol_version": "TLSv1_3",
            "cipher_suites": ["AES128-SHA"],
        },
    },
}


@pytest.mark.parametrize("tls", TLS)
def test_tls_by_mode(tls: str) -> None:
    (chain,) = chains(Told("gateway", gateway(https("['*']", tls))))
    context = chain["transport_socket"]["typed_config"]
    common = context["common_tls_context"]
    expected = dict(TLS[tls])
    assert context["require_client_certificate"] is expected.pop("require", False)
    roots = expected.pop("roots", None)
    if roots:
        assert common["combined_validation_context"]["validation_context_sds_secret_config"]["name"] == roots
    certificates = expected.pop("tls_certificate_sds_secret_configs", None)
    if certificates:
        assert [each["name"] for each in common["tls_certificate_sds_secret_configs"]] == certificates
    assert {name: common[name] for name in expected} == expected
    assert common["alpn_protocols"] == ["h2", "http/1.1"]


def test_tcp_with_and_without_tls_goes_to_the_first_rule_that_fits() -> None:
    rule = service(
        "{hosts: ['*'], gateways: [way-in], tcp: ["
        "{match: [{port: 1}], route: [{destination: {host: server, port: {number: 9090}}}]},"
        f"{{match: [{{port: 7000, sourceLabels: {{nobody: is}}}}], {TO}}}]}}"
    )
    plain = Told("gateway", gateway("port: {number: 7000, name: a, protocol: TCP}, hosts: ['*']"), rule)
    (chain,) = chains(plain, "0.0.0.0_7000")
    assert chain["filters"][-1]["typed_config"]["cluster"] == f"outbound|9000||{HOST}"
    ended = "port: {number: 7000, name: a, protocol: TLS}, tls: {mode: SIMPLE, credentialName: c}, hosts: [a.b]"
    (chain,) = chains(Told("gateway", gateway(ended), rule), "0.0.0.0_7000")
    assert chain["filter_chain_match"] == {"server_names": ["a.b"]}
    assert "transport_socket" in chain


def test_mutual_tls_of_the_mesh_is_passed_on_by_server_name() -> None:
    server = "port: {number: 15443, name: tls, protocol: TLS}, tls: {mode: AUTO_PASSTHROUGH}, hosts: ['*.local']"
    it = Told("gateway", gateway(server), SUBSETS)
    found = {
        match["server_names"][0]: match
        for match in (chain["filter_chain_match"] for chain in chains(it, "0.0.0.0_15443"))
    }
    name = f"outbound_.9000_.v1_.{HOST}"
    assert found[name]["application_protocols"][0] == "istio"
    assert len(found) == 6
    assert "transport_socket_matches" not in it.clusters[name]
    assert len(it.endpoints[name]["endpoints"][0]["lb_endpoints"]) == 1


def test_ports_and_addresses() -> None:
    pod = resource(
        "Service",
        "{selector: {istio: gateway}, ports: [{name: http, port: 80, targetPort: 8080}]}",
        name="gw",
        group="v1",
    )
    it = Told(
        "gateway",
        pod,
        gateway(
            http("['*']", number=80),
            http("['*']", number=81, name="b", extra=", bind: 127.0.0.9"),
            http("['*']", number=82, name="c", extra=", bind: 10.0.0.1"),
        ),
    )
    found = {name: one["address"]["socket_address"] for name, one in it.listeners.items()}
    pod_address = next(proxy.pod_address for proxy in it.world.proxies if proxy.id == "gateway")
    assert found == {
        "0.0.0.0_8080": {"address": pod_address, "port_value": 8080},
        "127.0.0.9_81": {"address": "127.0.0.9", "port_value": 81},
        "0.0.0.0_82": {"address": pod_address, "port_value": 82},
    }
    assert set(it.routes) == {"http.8080", "http.81.127.0.0.9", "http.82"}


def test_a_gateway_of_any_namespace_selects_and_others_do_not() -> None:
    far = gateway(http("['*']", number=81)).replace("{name: way-in}", "{name: far, namespace: far}")
    other = gateway(http("['*']", number=82), name="other", selector="istio: another")
    assert list(Told("gateway", far, other).listeners) == ["0.0.0.0_81"]


def test_browsers_grpc_is_translated() -> None:
    server = "port: {number: 8080, name: web, protocol: GRPC-WEB}, hosts: ['*']"
    manager = Told("gateway", gateway(server)).manager("0.0.0.0_8080")
    assert "envoy.filters.http.grpc_web" in [each["name"] for each in manager["http_filters"]]
