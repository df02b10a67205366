"""Sidecars say what proxies know and where they listen; ProxyConfig and MeshConfig what applies to proxies."""

from __future__ import annotations

from typing import Any

import pytest

from mlmesh_local.resources import InvalidResource
from mlmesh_local.resources.mesh_config import MeshConfig
from mlmesh_local.resources.model_sidecars import ProxySettings
from mlmesh_local.workloads import workloads_of
from tests.support.mesh_world import HOST, WORKLOADS, Told, load, load_alone, resource

NETWORKING = "networking.istio.io/v1"
OUTSIDE = "a.example.com"
ENTRY = resource(
    "ServiceEntry",
    f"{{hosts: [{OUTSIDE}], resolution: DNS, ports: [{{number: 80, name: http, protocol: HTTP}},"
    " {number: 81, name: more, protocol: HTTP}]}",
    name="entry",
    namespace="other",
    group=NETWORKING,
)
RULE = f"""
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {{name: rule}}
spec:
  hosts: [server]
  http: [{{route: [{{destination: {{host: {OUTSIDE}, port: {{number: 80}}}}}}]}}]
---
"""


def sidecar(spec: str, *, name: str = "default", namespace: str = "") -> str:
    return resource("Sidecar", spec, name=name, namespace=namespace, group=NETWORKING)


def outbound(it: Told) -> set[str]:
    return {name.removeprefix("outbound|") for name in it.clusters if name.startswith("outbound|")}


SERVER = {f"9000||{HOST}", f"9090||{HOST}"}
ALL = {*SERVER, f"80||{OUTSIDE}", f"81||{OUTSIDE}"}


@pytest.mark.parametrize(
    ("egress", "seen"),
    [
        ("[{hosts: ['*/*']}]", ALL),
        ("[{hosts: ['./*']}]", SERVER),
        ("[{hosts: ['mlmesh/*']}]", SERVER),
        ("[{hosts: ['other/*']}]", {f"80||{OUTSIDE}", f"81||{OUTSIDE}"}),
        ("[{hosts: ['*/*.example.com']}]", {f"80||{OUTSIDE}", f"81||{OUTSIDE}"}),
        (f"[{{hosts: ['mlmesh/{OUTSIDE}']}}]", set()),
        ("[{hosts: ['*/*', '~other/*']}]", SERVER),
        (f"[{{hosts: ['*/*', '~*/{HOST}']}}]", {f"80||{OUTSIDE}", f"81||{OUTSIDE}"}),
        ("[{port: {number: 80, protocol: HTTP, name: x}, hosts: ['*/*']}]", {f"80||{OUTSIDE}"}),
        (
            "[{port: {number: 80, protocol: HTTP, name: x}, hosts: ['*/*']}, {hosts: ['./*']}]",
            {*SERVER, f"80||{OUTSIDE}"},
        ),
    ],
)
def test_which_hosts_are_imported(egress: str, seen: set[str]) -> None:
    it = Told("client", ENTRY, sidecar(f"{{egress: {egress}}}"))
    assert outbound(it) == seen


def test_gateways_know_everything() -> None:
    assert outbound(Told("gateway", ENTRY, sidecar("{egress: [{hosts: ['./*']}]}"))) == ALL


def test_destinations_of_imported_rules_are_imported() -> None:
    it = Told("client", ENTRY, RULE, sidecar("{egress: [{hosts: ['./*']}]}"))
    # Of the port that is named; the port of the listener counts where it has one.
    assert outbound(it) == {*SERVER, f"80||{OUTSIDE}"}
    assert it.action()["cluster"] == f"outbound|80||{OUTSIDE}"
    hidden = Told("client", ENTRY, RULE, sidecar("{egress: [{hosts: ['other/*']}]}"))
    assert outbound(hidden) == {f"80||{OUTSIDE}", f"81||{OUTSIDE}"}


def test_which_sidecar_applies() -> None:
    nothing, own = "{egress: [{hosts: ['none/*']}]}", "{egress: [{hosts: ['./*']}]}"
    mesh = sidecar(nothing, namespace="istio-system")
    assert outbound(Told("client", ENTRY, mesh)) == set()
    assert outbound(Told("client", ENTRY, mesh, sidecar(own))) == SERVER
    selected = sidecar("{workloadSelector: {labels: {app: client}}, egress: [{hosts: ['*/*']}]}", name="z")
    assert outbound(Told("client", ENTRY, sidecar(own), selected)) == ALL
    assert outbound(Told("server-v1", ENTRY, sidecar(own), selected)) == SERVER
    # "." is the namespace of the workload, in the mesh's Sidecar, too.
    assert outbound(Told("client", ENTRY, sidecar(own, namespace="istio-system"))) == SERVER


def test_ports_of_its_own() -> None:
    ingress = (
        "{port: {number: 7000, protocol: GRPC, name: grpc}, defaultEndpoint: '127.0.0.1:8000',"
        " connectionPool: {tcp: {maxConnections: 3}}},"
        " {port: {number: 7001, protocol: HTTP, name: http}, defaultEndpoint: 'unix:///run/app'},"
        " {port: {number: 9090, protocol: HTTP, name: metrics}}"
    )
    text = sidecar(f"{{ingress: [{ingress}], inboundConnectionPool: {{http: {{http2MaxRequests: 4}}}}}}")
    it = Told("server-v1", text)
    found: dict[str, Any] = {name: it.clusters[name] for name in it.clusters if name.startswith("inbound|")}
    where = {
        name: cluster["load_assignment"]["endpoints"][0]["lb_endpoints"][0]["endpoint"]["address"]
        for name, cluster in found.items()
    }
    assert where == {
        "inbound|7000||": {"socket_address": {"address": "127.64.2.1", "port_value": 8000}},
        "inbound|7001||": {"pipe": {"path": "/run/app"}},
        "inbound|9090||": {"socket_address": {"address": "127.64.2.1", "port_value": 9090}},
    }
    bounds = {name: cluster["circuit_breakers"]["thresholds"][0] for name, cluster in found.items()}
    assert bounds["inbound|7000||"]["max_connections"] == 3
    assert bounds["inbound|7000||"]["max_requests"] == 2**32 - 1
    assert bounds["inbound|9090||"]["max_requests"] == 4
    assert {name for name in it.listeners if "64.1.1_" in name} == {f"127.64.1.1_{port}" for port in (7000, 7001, 9090)}


REFUSED = {
    "must have at least one of": "{workloadSelector: {labels: {a: b}}}",
    "must be NAMESPACE/HOST": "{egress: [{hosts: [server]}]}",
    "is a short name": "{egress: [{hosts: ['./server']}]}",
    '"hosts" is required': "{egress: [{}]}",
    "needs at least one host": "{egress: [{hosts: []}]}",
    "the listener without a port must be the last": "{egress: [{hosts: ['*/*']}, {hosts: ['*/*']}]}",
    "the port 80 occurs twice": "{egress: [{port: {number: 80, protocol: HTTP}, hosts: ['*/*']},"
    " {port: {number: 80, protocol: HTTP}, hosts: ['*/*']}]}",
    "a port 0 needs a unix socket": "{egress: [{port: {number: 0, protocol: HTTP}, hosts: ['*/*']}]}",
    '"port" is required': "{ingress: [{defaultEndpoint: '127.0.0.1:1'}]}",
    "must be 127.0.0.1:PORT": "{ingress: [{port: {number: 1, protocol: TCP}, defaultEndpoint: '10.0.0.1:1'}]}",
    "goes with mode ALLOW_ANY only": "{outboundTrafficPolicy: {egressProxy: {host: a.b, port: {number: 1}}}}",
    '"HTPP" is not one of HTTP': "{ingress: [{port: {number: 1, protocol: HTPP}}]}",
    "a selector knows no wildcards": "{workloadSelector: {labels: {a: '*'}}, egress: [{hosts: ['*/*']}]}",
}


@pytest.mark.parametrize("message", REFUSED)
def test_refused_in_words(message: str) -> None:
    with pytest.raises(InvalidResource) as caught:
        load_alone(sidecar(REFUSED[message]))
    assert message in str(caught.value)
    assert "0.yaml:5: Sidecar mlmesh/default: spec" in str(caught.value)


def test_how_proxies_run() -> None:
    def config(spec: str, name: str, namespace: str = "") -> str:
        return resource("ProxyConfig", spec, name=name, namespace=namespace, group="networking.istio.io/v1beta1")

    def threads(*texts: str) -> dict[str, int]:
        return {workload.name: workload.proxy_threads for workload in workloads_of(load(WORKLOADS, *texts))}

    assert set(threads().values()) == {1}
    found = threads(
        config("{concurrency: 4}", "mesh", "istio-system"),
        config("{selector: {matchLabels: {app: client}}, concurrency: 0}", "selected"),
        config("{selector: {matchLabels: {app: none}}, image: {imageType: debug}}", "other"),
    )
    assert found == {"server-v1": 4, "server-v2": 4, "client": 0, "gateway": 4}
    assert set(
        threads(config("{concurrency: 4}", "mesh", "istio-system"), config("{concurrency: 2}", "own")).values()
    ) == {2}
    # The annotation of a pod is above its namespace.
    said = WORKLOADS.replace(
        "metadata: {labels: {app: client",
        "metadata: {annotations: {proxy.istio.io/config: '{concurrency: 3, drainDuration: 9s}'}, labels: {app: client",
    )
    client = next(w for w in workloads_of(load(said, config("{concurrency: 2}", "own"))) if w.name == "client")
    assert (client.proxy_threads, client.proxy_drain_s) == (3, 9)
    with pytest.raises(InvalidResource) as caught:
        load_alone(said.replace("concurrency: 3", "concurency: 3"))
    assert 'annotations["proxy.istio.io/config"].concurency: unknown field (did you mean "concurrency"?)' in str(
        caught.value
    )


def mesh(settings: str) -> str:
    lines = "\n".join(f"    {line}" for line in settings.splitlines())
    head = "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: istio, namespace: istio-system}\n"
    return f"{head}data:\n  mesh: |\n{lines}\n---\n"


def test_settings_of_the_mesh() -> None:
    (found,) = load(
        mesh(
            "rootNamespace: roots\noutboundTrafficPolicy: {mode: REGISTRY_ONLY}\n"
            "defaultConfig: {concurrency: 3, drainDuration: 5s}"
        )
    ).specs(MeshConfig)
    assert (found.root_namespace, found.hosts.outbound) == ("roots", "REGISTRY_ONLY")
    assert found.proxies == ProxySettings(concurrency=3, drain_s=5.0)
    assert (
        outbound(
            Told("client", mesh("rootNamespace: roots"), sidecar("{egress: [{hosts: ['none/*']}]}", namespace="roots"))
        )
        == set()
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("connectTimout: 1s", 'data.mesh.connectTimout: unknown field (did you mean "connectTimeout"?)'),
        ("connectTimeout: 31s", "data.mesh.connectTimeout: must be at most 30 s"),
        ("meshMTLS: {ecdhCurves: [P-256]}", "data.mesh.meshMTLS.ecdhCurves: does not go with meshMTLS"),
        ("tlsDefaults: {ecdhCurves: [secp]}", '"secp" is not one of P-224'),
        ("caCertificates: []", "data.mesh.caCertificates: not supported"),
        ("outboundTrafficPolicy: {mode: ALLOW_ANY_DYNAMIC_DNS}", "is not supported by the laptop mesh"),
        ("defaultConfig: {proxyHeaders: {server: {valu: a}}}", "defaultConfig.proxyHeaders.server.valu: unknown field"),
        ("defaultConfig: {gatewayTopology: {forwardClientCertDetails: A}}", '"A" is not one of UNDEFINED, SANITIZE'),
        ("localityLbSetting: {distribute: [{from: a, to: {b: 50}}]}", "the shares sum to 50, not to 100"),
    ],
)
def test_settings_that_are_refused(settings: str, message: str) -> None:
    with pytest.raises(InvalidResource) as caught:
        load_alone(mesh(settings))
    assert message in str(caught.value)
