"""Istio's control plane on a laptop: the cluster that it is shown, and what is changed of its answers."""

from __future__ import annotations

import asyncio
import json
import os
from pathlib import Path
from typing import Any

import pytest

from mlmesh_local.envoy_types import CLUSTER, ENDPOINTS, EXTENSIONS, LISTENER, ROUTES, build_bytes, typed
from mlmesh_local.istiod.adapt import adapt, listening
from mlmesh_local.istiod.api import KubernetesApi
from mlmesh_local.istiod.defaults import defaulted
from mlmesh_local.istiod.marker import cluster_name, marker, take
from mlmesh_local.istiod.nodes import default_config, node_of
from mlmesh_local.istiod.objects import KINDS, OWNED, PODS, SERVICES, SLICES, Pod, cluster
from mlmesh_local.istiod.process import VARIABLE, find_program
from mlmesh_local.istiod.store import ExpiredError, Resource, Store
from mlmesh_local.istiod.wire import OPAQUE, decode
from mlmesh_local.model import ProxyNode, World
from mlmesh_local.resources import Document, load_resources
from mlmesh_local.snapshot import pack
from mlmesh_local.translate import View
from mlmesh_local.translate.gateway_servers import outside_port
from mlmesh_runtime.errors import NotReady

MANAGER = "envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager"
TLS = "envoy.extensions.transport_sockets.tls.v3.DownstreamTlsContext"
SIDECAR = ProxyNode(
    id="server-0",
    namespace="mlmesh",
    service_account="server",
    labels={"app": "server"},
    pod_address="127.64.1.1",
    application_address="127.64.2.1",
    outbound_address="127.64.3.1",
    container_ports={"grpc": 8000},
)
SERVICE = {
    "apiVersion": "v1",
    "kind": "Service",
    "metadata": {"name": "server"},
    "spec": {"selector": {"app": "server"}, "ports": [{"name": "grpc", "port": 9000, "targetPort": "grpc"}]},
}


def pod(name: str, address: str, **fields: Any) -> Pod:
    return Pod(name=name, namespace="mlmesh", address=address, labels={"app": "server"}, ports={"grpc": 8000}, **fields)


# The cluster


def test_a_service_has_the_endpoints_of_the_pods_that_it_selects() -> None:
    objects = cluster([SERVICE], [pod("a", "127.64.1.1"), pod("b", "127.64.1.2", ready=False)])
    (slice_,) = objects[SLICES]
    assert slice_["ports"] == [{"name": "grpc", "port": 8000, "protocol": "TCP"}]
    ready = {item["addresses"][0]: item["conditions"]["ready"] for item in slice_["endpoints"]}
    assert ready == {"127.64.1.1": True, "127.64.1.2": False}
    assert objects[SERVICES][0]["spec"]["clusterIP"] == cluster([SERVICE], [])[SERVICES][0]["spec"]["clusterIP"]


def test_routes_of_the_gateway_api_get_the_defaults_of_their_schema() -> None:
    route = {"kind": "HTTPRoute", "spec": {"parentRefs": [{"name": "gw"}], "rules": [{"backendRefs": [{"name": "s"}]}]}}
    spec = defaulted("gateway.networking.k8s.io", route)["spec"]
    assert spec["parentRefs"] == [{"name": "gw", "group": "gateway.networking.k8s.io", "kind": "Gateway"}]
    assert spec["rules"][0]["matches"] == [{"path": {"type": "PathPrefix", "value": "/"}}]
    assert spec["rules"][0]["backendRefs"] == [{"name": "s", "group": "", "kind": "Service", "weight": 1}]
    assert "matches" not in route["spec"]["rules"][0]


def test_replacing_changes_as_little_as_possible() -> None:
    store = Store()
    store.replace(cluster([SERVICE], [pod("a", "127.64.1.1")]), OWNED)
    version = store.version
    store.replace(cluster([SERVICE], [pod("a", "127.64.1.1")]), OWNED)
    assert store.version == version
    store.replace(cluster([SERVICE], [pod("b", "127.64.1.1")]), OWNED)
    changes = [(event.action, event.object["metadata"]["name"]) for event in store.since(version)]
    assert changes == [("DELETED", "a"), ("ADDED", "b"), ("MODIFIED", "server-1")]


def test_who_asks_too_far_back_lists_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlmesh_local.istiod.store.HISTORY_MAX", 20_000)
    store = Store()
    for number in range(20_001):
        store.put(PODS, {"metadata": {"name": "a"}, "number": number})
    with pytest.raises(ExpiredError):
        store.since(1)
    assert len(store.since(store.version - 1)) == 1


# The API


async def ask(port: int, path: str) -> tuple[str, Any]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
    status = (await reader.readline()).decode().split(" ", 1)[1].strip()
    length = 0
    while line := (await reader.readline()).strip():
        if line.startswith(b"content-length"):
            length = int(line.split(b":")[1])
    body = json.loads(await reader.readexactly(length))
    writer.close()
    return status, body


async def test_lists_are_in_the_version_asked_for_and_only_for_who_knows_the_secret() -> None:
    store = Store()
    routes = Resource(group="networking.istio.io", plural="virtualservices")
    store.put(routes, {"apiVersion": "networking.istio.io/v1beta1", "metadata": {"name": "a", "namespace": "n"}})
    api = KubernetesApi(store, token="secret", kinds=KINDS)
    port = await api.start("127.0.0.1", 0)
    try:
        status, body = await ask(port, "/secret/apis/networking.istio.io/v1/virtualservices")
        assert status == "200 OK"
        assert [item["apiVersion"] for item in body["items"]] == ["networking.istio.io/v1"]
        assert (await ask(port, "/secret/apis/networking.istio.io/v1/namespaces/m/virtualservices"))[1]["items"] == []
        assert (await ask(port, "/wrong/api/v1/pods"))[0] == "401 Unauthorized"
        assert (await ask(port, "/sécret/api/v1/pods"))[0] == "401 Unauthorized"
        assert (await ask(port, "/secret/api/v1/namespaces/n/pods/a"))[0] == "404 Not Found"
    finally:
        await api.stop()


# Its answers


def test_messages_of_unknown_types_stay_opaque() -> None:
    known = build_bytes(
        CLUSTER,
        {
            "name": "c",
            "typed_extension_protocol_options": {
                "a": {"@type": "type.googleapis.com/google.protobuf.Duration", "value": "1s"}
            },
        },
    )
    assert decode(CLUSTER, known)["name"] == "c"
    unknown = decode("type.googleapis.com/istio.Unknown", b"\x0a\x01x")
    assert list(unknown) == [OPAQUE]


def test_the_marker_is_found_and_taken_out() -> None:
    value = marker(7, "istio-system")["spec"]["configPatches"][0]["patch"]["value"]
    resources = {CLUSTER: {value["name"]: value, "other": {}}}
    assert value["name"] == cluster_name(7)
    assert (take(resources), list(resources[CLUSTER]), take(resources)) == (7, ["other"], 0)


def chain(port: int, **match: Any) -> dict[str, Any]:
    filters = [{"name": "router", "typed_config": typed("envoy.extensions.filters.http.router.v3.Router")}]
    unknown = {"name": "istio.stats", "typed_config": {"@type": "type.googleapis.com/stats.PluginConfig", OPAQUE: ""}}
    manager = typed(
        MANAGER, {"stat_prefix": "x", "http_filters": [unknown, *filters], "route_config": {"name": "inbound"}}
    )
    return {
        "name": f"0.0.0.0_{port}",
        "filter_chain_match": {"destination_port": port, **match},
        "filters": [{"name": "manager", "typed_config": manager}],
    }


def istio() -> dict[str, Any]:
    secret = {"name": "default", "sds_config": {"api_config_source": {"api_type": "GRPC"}}}
    tls = typed(TLS, {"common_tls_context": {"tls_certificate_sds_secret_configs": [secret]}})
    secure = chain(8000, transport_protocol="tls", application_protocols=["istio"])
    secure["transport_socket"] = {"name": "tls", "typed_config": tls}
    capture = {"name": "virtualInbound-blackhole", "filter_chain_match": {"destination_port": 15006}, "filters": []}
    inspector = {"name": "envoy.filters.listener.tls_inspector", "filter_disabled": {"any_match": True}}
    inbound = {
        "name": "virtualInbound",
        "address": {"socket_address": {"address": "0.0.0.0", "port_value": 15006}},
        "listener_filters": [{"name": "envoy.filters.listener.original_dst"}, inspector],
        "filter_chains": [capture, secure, chain(8000, transport_protocol="raw_buffer")],
    }
    outbound = {
        "name": "0.0.0.0_9000",
        "address": {"socket_address": {"address": "0.0.0.0", "port_value": 9000}},
        "bind_to_port": False,
        "default_filter_chain": {"name": "PassthroughFilterChain", "filters": []},
        "filter_chains": [chain(0, application_protocols=["http/1.1", "h2c"], transport_protocol="raw_buffer")],
    }
    return {
        CLUSTER: {
            "inbound|8000||": {
                "name": "inbound|8000||",
                "type": "ORIGINAL_DST",
                "lb_policy": "CLUSTER_PROVIDED",
                "cleanup_interval": "60s",
                "upstream_bind_config": {"source_address": {"address": "127.0.0.6", "port_value": 0}},
            },
            "InboundPassthroughCluster": {"name": "InboundPassthroughCluster", "type": "ORIGINAL_DST"},
        },
        LISTENER: {
            "virtualInbound": inbound,
            "virtualOutbound": {"name": "virtualOutbound"},
            "0.0.0.0_9000": outbound,
        },
        ENDPOINTS: {},
        ROUTES: {},
        EXTENSIONS: {},
    }


def test_a_captured_pod_becomes_one_that_a_laptop_can_run() -> None:
    adapted = adapt(istio(), SIDECAR)
    listeners = adapted[LISTENER]
    assert set(listeners) == {"127.64.1.1_8000", "127.64.3.1_9000"}
    inbound, outbound = listeners["127.64.1.1_8000"], listeners["127.64.3.1_9000"]
    assert inbound["address"] == {"socket_address": {"address": "127.64.1.1", "port_value": 8000}}
    assert inbound["listener_filters"] == [{"name": "envoy.filters.listener.tls_inspector"}]
    assert [item["filter_chain_match"].get("transport_protocol") for item in inbound["filter_chains"]] == [
        "tls",
        "raw_buffer",
    ]
    context = inbound["filter_chains"][0]["transport_socket"]["typed_config"]["common_tls_context"]
    assert "ads" in context["tls_certificate_sds_secret_configs"][0]["sds_config"]
    filters = inbound["filter_chains"][0]["filters"][0]["typed_config"]["http_filters"]
    assert [item["name"] for item in filters] == ["router"]
    assert outbound["filter_chains"][0]["filter_chain_match"] == {}
    (name, application), *rest = adapted[CLUSTER].items()
    place = application["load_assignment"]["endpoints"][0]["lb_endpoints"][0]["endpoint"]["address"]
    assert (name, application["type"], rest) == ("inbound|8000||", "STATIC", [])
    assert place == {"socket_address": {"address": "127.64.2.1", "port_value": 8000}}
    pack(SIDECAR.id, adapted, "1")


def test_files_that_an_agent_would_serve_are_read_by_envoy() -> None:
    resources = istio()
    chains = resources[LISTENER]["virtualInbound"]["filter_chains"]
    common = chains[1]["transport_socket"]["typed_config"]["common_tls_context"]
    common["tls_certificate_sds_secret_configs"][0]["name"] = "file-cert:/c.pem~/k.pem"
    common["combined_validation_context"] = {
        "default_validation_context": {"match_subject_alt_names": [{"exact": "a"}]},
        "validation_context_sds_secret_config": {"name": "file-root:/ca.pem"},
    }
    listener = adapt(resources, SIDECAR)[LISTENER]["127.64.1.1_8000"]
    context = listener["filter_chains"][0]["transport_socket"]["typed_config"]["common_tls_context"]
    assert context == {
        "tls_certificates": [{"certificate_chain": {"filename": "/c.pem"}, "private_key": {"filename": "/k.pem"}}],
        "validation_context": {"match_subject_alt_names": [{"exact": "a"}], "trusted_ca": {"filename": "/ca.pem"}},
    }


# The program


def test_the_program_is_found_or_it_is_said_how_to_get_it(tmp_path: Path) -> None:
    program = tmp_path / "pilot-discovery"
    with pytest.raises(NotReady, match="make tools"):
        find_program("", {"PATH": str(tmp_path)})
    program.touch(mode=0o755)
    assert find_program("", {"PATH": str(tmp_path)}) == program
    assert find_program("", {"PATH": "", VARIABLE: str(program)}) == program
    # It is started in another folder than the one where it was named.
    assert find_program(os.path.relpath(program), {"PATH": ""}) == Path.cwd() / os.path.relpath(program)
    with pytest.raises(NotReady, match="is not a program"):
        find_program(str(tmp_path / "other"), {"PATH": ""})


GATEWAY = ProxyNode(
    id="edge-0",
    kind="gateway",
    namespace="mlmesh",
    service_account="edge",
    labels={"app": "edge"},
    pod_address="127.64.1.1",
    container_ports={"https": 8443, "http": 8080},
    extra_addresses=((443, "127.0.0.1:9443"),),
)
EDGE = """
apiVersion: v1
kind: Service
metadata: {name: edge}
spec:
  selector: {app: edge}
  ports: [{name: http, port: 80, targetPort: http}, {name: tls, port: 443, targetPort: https}]
---
apiVersion: v1
kind: ConfigMap
metadata: {name: istio, namespace: istio-system}
data: {mesh: "defaultConfig: {drainDuration: 5s, proxyHeaders: {server: {value: a}, requestId: {disabled: true}}}"}
---
"""


def test_an_address_outside_is_of_the_port_that_istio_listens_on() -> None:
    resources = load_resources([Document(source="it.yaml", text=EDGE)])
    view = View(World(resources=resources, proxies=(GATEWAY,), endpoints=()))
    listeners = {
        f"0.0.0.0_{port}": {
            "name": f"0.0.0.0_{port}",
            "address": {"socket_address": {"address": "0.0.0.0", "port_value": port}},
            "filter_chains": [],
        }
        for port in (8080, 8443)
    }
    given = {CLUSTER: {}, ENDPOINTS: {}, ROUTES: {}, EXTENSIONS: {}, LISTENER: listeners}
    adapted = adapt(given, listening(GATEWAY, view))[LISTENER]
    assert adapted["0.0.0.0_8080"]["additional_addresses"] == []
    (outside,) = adapted["0.0.0.0_8443"]["additional_addresses"]
    assert outside["address"]["socket_address"] == {"address": "127.0.0.1", "port_value": 9443}


@pytest.mark.parametrize(
    ("ports", "outside", "chosen"),
    [((80, 443), 8443, 443), ((80, 443), 443, 443), ((443, 80), 9000, 80), ((80,), 443, 80), ((), 443, None)],
)
def test_an_address_outside_is_for_the_port_of_its_number(
    ports: tuple[int, ...], outside: int, chosen: int | None
) -> None:
    resources = load_resources([Document(source="it.yaml", text=EDGE)])
    services = View(World(resources=resources, proxies=(GATEWAY,), endpoints=())).services.values()
    assert outside_port(services, GATEWAY, ports, outside) == chosen


def test_a_pods_own_settings_come_before_those_of_the_mesh() -> None:
    defaults = default_config(load_resources([Document(source="it.yaml", text=EDGE)]))
    node = node_of(GATEWAY, {"proxy.istio.io/config": "proxyHeaders: {server: {value: b}}\nconcurrency: 1"}, defaults)
    assert node.metadata["PROXY_CONFIG"] == {
        "drainDuration": "5s",
        "concurrency": 1,
        "proxyHeaders": {"server": {"value": "b"}, "requestId": {"disabled": True}},
    }
    # Without any of its own Istio takes those of the mesh itself, also when they change.
    assert "PROXY_CONFIG" not in node_of(GATEWAY, {}, defaults).metadata
