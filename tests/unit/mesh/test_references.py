"""Snapshots of resources that another control plane has packed."""

from __future__ import annotations

from mlmesh_local.envoy_types import CLUSTER, ENDPOINTS, EXTENSIONS, LISTENER, ROUTES, SECRET, build_bytes, typed
from mlmesh_local.snapshot import Snapshot, build_snapshots
from mlmesh_local.translate.discovered import discovered
from tests.support.mesh_world import SUBSETS, resource, virtual_service, world

MESSAGE = "envoy.extensions.filters.http.fault.v3.HTTPFault"
MANAGER = "envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager"


def test_bytes_of_a_snapshot_make_the_same_snapshot() -> None:
    strict = resource("PeerAuthentication", "{mtls: {mode: STRICT}}")
    rules = virtual_service("[{route: [{destination: {host: server, subset: v1}}]}]")
    for node, snapshot in build_snapshots(world(SUBSETS, strict, rules)).items():
        contents = {kind: {n: p.content for n, p in named.items()} for kind, named in snapshot.resources.items()}
        assert Snapshot.of_packed(node, snapshot.version, contents) == snapshot


def test_what_comes_from_elsewhere_or_is_not_there_is_not_waited_for() -> None:
    socket = {"api_config_source": {"api_type": "GRPC", "grpc_services": [{"envoy_grpc": {"cluster_name": "sds"}}]}}
    context = {"tls_certificate_sds_secret_configs": [{"name": "default", "sds_config": socket}]}
    tls = typed("envoy.extensions.transport_sockets.tls.v3.DownstreamTlsContext", {"common_tls_context": context})
    manager = typed(
        MANAGER,
        {
            "stat_prefix": "x",
            "rds": {"config_source": {"ads": {}}, "route_config_name": "r"},
            "http_filters": [discovered("here", MESSAGE), discovered("missing", MESSAGE)],
        },
    )
    chain = {
        "filters": [{"name": "m", "typed_config": manager}],
        "transport_socket": {"name": "t", "typed_config": tls},
    }
    cluster = {"name": "c", "type": "EDS", "eds_cluster_config": {"eds_config": {"ads": {}}}}
    filter_of_theirs = {"name": "here", "typed_config": typed(MESSAGE)}
    packed = Snapshot.of_packed(
        "node",
        "one",
        {
            CLUSTER: {"c": build_bytes(CLUSTER, cluster)},
            ENDPOINTS: {"c": build_bytes(ENDPOINTS, {"cluster_name": "c"})},
            LISTENER: {"l": build_bytes(LISTENER, {"name": "l", "filter_chains": [chain]})},
            EXTENSIONS: {"here": build_bytes(EXTENSIONS, filter_of_theirs)},
            ROUTES: {"r": build_bytes(ROUTES, {"name": "r"})},
        },
    )
    assert packed.endpoint_names == {"c"}
    assert packed.route_names == {"r"}
    assert packed.extension_names == {"here"}
    assert packed.secret_names == frozenset()
    assert SECRET not in packed.resources
    unknown = b"\n\x01c\xc2\x3e\x00"
    assert Snapshot.of_packed("node", "two", {CLUSTER: {"c": unknown}}).resources[CLUSTER]["c"].content == unknown
