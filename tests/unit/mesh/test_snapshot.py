"""Snapshots are consistent, deterministic, and refused otherwise."""

from __future__ import annotations

import pytest

from mlmesh_local.envoy_types import (
    CLUSTER,
    ENDPOINTS,
    EXTENSIONS,
    LISTENER,
    ROUTES,
    InvalidMessageError,
    build_bytes,
    typed,
)
from mlmesh_local.model import CertificateSecret, TrustSecret
from mlmesh_local.resources import ResourceSet
from mlmesh_local.snapshot import build_snapshot, build_snapshots, consistency, pack, pack_secrets
from mlmesh_local.translate import Configuration, View, translate
from mlmesh_local.translate.discovered import discovered, extension
from tests.support.mesh_documents import SUBSETS
from tests.support.mesh_world import WORKLOADS, load, load_alone, resource, virtual_service, world

RULES = virtual_service("[{route: [{destination: {host: server, subset: v1}}]}]")


def test_equal_worlds_give_equal_bytes() -> None:
    one, two = (build_snapshots(world(SUBSETS, RULES)) for _ in range(2))
    assert one == two
    assert all(
        item.content == two[node].resources[type_url][name].content
        for node, snapshot in one.items()
        for type_url, named in snapshot.resources.items()
        for name, item in named.items()
    )
    a_world = world(SUBSETS, RULES)
    assert build_snapshot(a_world, a_world.proxies[0]) == one[a_world.proxies[0].id]


def test_maps_inside_any_are_serialized_in_one_order() -> None:
    names = [f"filter-{number}" for number in range(30)]

    def listener(order: list[str]) -> bytes:
        per_filter = {name: typed("envoy.extensions.filters.http.fault.v3.HTTPFault") for name in order}
        hosts = [{"name": "h", "domains": ["*"], "typed_per_filter_config": per_filter}]
        manager = typed(
            "envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager",
            {"stat_prefix": "x", "route_config": {"virtual_hosts": hosts}},
        )
        return build_bytes(LISTENER, {"filter_chains": [{"filters": [{"name": "hcm", "typed_config": manager}]}]})

    first = listener(names)
    for start in range(1, 30, 6):
        assert listener([*reversed(names[start:]), *names[:start]]) == first


def test_unknown_fields_are_refused_with_the_known_ones() -> None:
    with pytest.raises(InvalidMessageError, match='no field named "connect_timout"'):
        build_bytes(CLUSTER, {"name": "x", "connect_timout": "1s"})


def test_inconsistencies_are_found() -> None:
    a_world = world(SUBSETS, RULES)
    client = next(proxy for proxy in a_world.proxies if proxy.id == "client")
    configuration = translate(View(a_world), client)
    assert consistency(configuration) == []
    name = "outbound|9000|v1|server.mlmesh.svc.cluster.local"
    del configuration[ENDPOINTS][name]
    assert consistency(configuration) == [f"the cluster {name} has no endpoints resource"]
    del configuration[CLUSTER][name]
    del configuration[ROUTES]["9090"]
    configuration[ROUTES]["9000"]["virtual_hosts"][0]["routes"][0]["route"] = {"cluster": "nowhere"}
    assert consistency(configuration) == [
        "a listener needs the route configuration 9090, which there is not",
        "the route configuration 9000 sends to the cluster nowhere, which there is not",
    ]


def test_filters_have_the_configuration_that_they_take_from_elsewhere() -> None:
    message = "envoy.extensions.filters.http.fault.v3.HTTPFault"
    manager = {"stat_prefix": "x", "http_filters": [discovered("fault", message)]}
    hcm = "envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager"
    listener = {"name": "l", "filter_chains": [{"filters": [{"name": "hcm", "typed_config": typed(hcm, manager)}]}]}
    configuration: Configuration = {CLUSTER: {}, ENDPOINTS: {}, EXTENSIONS: {}, LISTENER: {"l": listener}, ROUTES: {}}
    assert consistency(configuration) == ["a listener needs the configuration of the filter fault, which there is not"]
    configuration[EXTENSIONS]["fault"] = extension("fault", message)
    assert pack("node", configuration, "one").extension_names == {"fault"}


def test_endpoints_change_with_their_cluster() -> None:
    """Envoy would keep the changed cluster warming for ever."""
    plain = build_snapshots(world(SUBSETS))["client"]
    changed = SUBSETS.replace("host: server\n", "host: server\n  trafficPolicy: {loadBalancer: {simple: RANDOM}}\n")
    random_choice = build_snapshots(world(changed))["client"]
    for name, item in plain.resources[ENDPOINTS].items():
        other = random_choice.resources[ENDPOINTS][name]
        assert other.content == item.content
        same_cluster = plain.resources[CLUSTER][name] == random_choice.resources[CLUSTER][name]
        assert (other.version == item.version) is same_cluster


def test_versions_change_with_the_world() -> None:
    versions = {
        world().version,
        world(SUBSETS).version,
        world(SUBSETS, not_ready={"server-v1"}).version,
        world(SUBSETS, trust_domain="other").version,
    }
    assert len(versions) == 4
    assert world(SUBSETS).version == world(SUBSETS).version


def test_secrets_do_not_show_keys() -> None:
    secret = CertificateSecret(certificate_chain=b"CHAIN", private_key=b"KEY")
    packed = pack_secrets({"default": secret, "ROOTCA": TrustSecret(roots=b"ROOTS")})
    assert b"KEY" in packed["default"].content
    assert "KEY" not in repr(secret) + repr(packed)


# Applying


def test_applying_merges_by_name_and_tells_what_changed() -> None:
    first = ResourceSet().apply(load_alone(WORKLOADS, SUBSETS))
    assert {change.action for change in first.changes} == {"created"}
    second = first.resources.apply(load_alone(SUBSETS, RULES))
    assert [(change.kind, change.action) for change in second.changes] == [
        ("DestinationRule", "unchanged"),
        ("VirtualService", "created"),
    ]
    third = second.resources.apply(load_alone(RULES.replace("subset: v1", "subset: v2")))
    assert [(change.name, change.action) for change in third.changes] == [("mlmesh/server", "configured")]
    assert third.resources.digest != second.resources.digest


def test_pruning_removes_istios_resources_and_never_workloads() -> None:
    pruned = load(WORKLOADS, SUBSETS, RULES).apply(load_alone(SUBSETS), prune=True)
    assert [(change.kind, change.action) for change in pruned.changes if change.action != "unchanged"] == [
        ("VirtualService", "deleted")
    ]
    assert len(pruned.resources.listed("Deployment")) == 4


def test_the_oldest_stays_the_oldest_when_it_is_configured_anew() -> None:
    both = load(WORKLOADS, resource("PeerAuthentication", "{mtls: {mode: STRICT}}", name="z"))
    both = both.apply(load_alone(resource("PeerAuthentication", "{mtls: {mode: DISABLE}}", name="a"))).resources
    both = both.apply(load_alone(resource("PeerAuthentication", "{mtls: {mode: PERMISSIVE}}", name="z"))).resources
    assert [r.name for r in both if r.kind == "PeerAuthentication"] == ["mlmesh/z", "mlmesh/a"]
    assert [r.name for r in both.listed("PeerAuthentication")] == ["mlmesh/a", "mlmesh/z"]


def test_a_comment_changes_nothing_but_the_text() -> None:
    before = load(WORKLOADS, SUBSETS)
    applied = before.apply(load_alone(SUBSETS.replace("spec:", "# why\nspec:")))
    assert applied.changes[0].action == "unchanged"
    assert applied.resources.digest == before.digest
    assert "# why" in applied.resources.listed("DestinationRule")[0].text
