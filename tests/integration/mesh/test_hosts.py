"""Rules about hosts through real sidecars: who is called, from where, and who is known."""

from __future__ import annotations

import asyncio
import time
from collections import Counter

import grpc
import pytest

from tests.support.envoy_mesh import HOST, EnvoyMesh
from tests.support.mesh_documents import STRICT, SUBSETS, deployment, service
from tests.support.mesh_world import destination_rule, resource

pytestmark = pytest.mark.asyncio(loop_scope="module")

OUTSIDE = "outside.example"
V1, V2 = {"server-v1-0", "server-v1-1"}, {"server-v2-0"}


def placed(text: str, zone: str) -> str:
    place = f"topology.kubernetes.io/region: r, topology.kubernetes.io/zone: {zone}"
    return text.replace("    spec:\n", f"    spec:\n      nodeSelector: {{{place}}}\n")


WORKLOADS = (
    placed(deployment("client", "client", "client"), "a")
    + service("client")
    + placed(deployment("server-v1", "server", "server", version="v1", replicas=2), "a")
    + placed(deployment("server-v2", "server", "server", version="v2"), "b")
    + service("server")
)
BASE = STRICT + SUBSETS


def networking(kind: str, spec: str, name: str = "it") -> str:
    return resource(kind, spec, name=name, group="networking.istio.io/v1")


def ok(found: Counter[str]) -> set[str]:
    assert sum(found.values()) > 0
    return set(found)


@pytest.mark.parametrize(
    ("algorithm", "key"),
    [
        ("", "httpHeaderName: x-user"),
        (", ringHash: {minimumRingSize: 4096}", "httpHeaderName: x-user"),
        (", maglev: {tableSize: 251}", "httpHeaderName: X-User"),
    ],
)
async def test_calls_of_one_key_go_to_one_endpoint(mesh: EnvoyMesh, algorithm: str, key: str) -> None:
    await mesh.apply(destination_rule(f"{{loadBalancer: {{consistentHash: {{{key}{algorithm}}}}}}}"))
    owners: dict[str, set[str]] = {}
    for user in range(24):
        owners[str(user)] = ok(await mesh.spread(5, metadata={"x-user": str(user)}))
    assert all(len(names) == 1 for names in owners.values())
    assert set().union(*owners.values()) == V1 | V2


async def test_a_cookie_is_made_for_who_has_none(mesh: EnvoyMesh) -> None:
    cookie = "{name: session, path: /, ttl: 60s}"
    await mesh.apply(destination_rule(f"{{loadBalancer: {{consistentHash: {{httpCookie: {cookie}}}}}}}"))
    first = await mesh.call()
    made = first.metadata["set-cookie"]
    assert made.startswith("session=")
    assert "Max-Age=60" in made
    sent = {"cookie": made.partition(";")[0]}
    again = [await mesh.call(metadata=sent) for _ in range(8)]
    assert {answer.text for answer in again} == {first.text}


async def test_the_nearest_zone_and_then_the_next(mesh: EnvoyMesh) -> None:
    outlier = (
        "outlierDetection: {consecutive5xxErrors: 2, interval: 1s, baseEjectionTime: 60s, maxEjectionPercent: 100}"
    )
    await mesh.apply(destination_rule(f"{{{outlier}}}"))
    assert ok(await mesh.spread(40)) == V1
    for name in V1:
        mesh.backends[name].fail = grpc.StatusCode.UNAVAILABLE
    # Whoever fails is ejected; when the zone has none left, the next one is called. Envoy tells its threads of what is
    # ejected within a second of another such change only when that second is over (update_merge_window).
    async with asyncio.timeout(60):
        since = time.monotonic()
        while time.monotonic() - since < 1.2:
            if ok(await mesh.spread(10)) != V2:
                since = time.monotonic()
    assert ok(await mesh.spread(40)) == V2


async def test_shares_of_zones(mesh: EnvoyMesh) -> None:
    share = "{from: 'r/a/*', to: {'r/a/*': 20, 'r/b/*': 80}}"
    await mesh.apply(destination_rule(f"{{loadBalancer: {{localityLbSetting: {{distribute: [{share}]}}}}}}"))
    found = await mesh.spread(400)
    assert 270 <= found["server-v2-0"] <= 370


async def test_endpoints_that_are_not_ready_are_not_called(mesh: EnvoyMesh) -> None:
    mesh.not_ready.update(V1)
    await mesh.ads.wait_acked(mesh.push(), timeout_s=30)
    assert ok(await mesh.spread(30)) == V2
    mesh.not_ready.update(V2)
    await mesh.ads.wait_acked(mesh.push(), timeout_s=30)
    assert ok(await mesh.spread(5)) == {"UNAVAILABLE"}


@pytest.mark.parametrize(
    "policy",
    [
        "{loadBalancer: {simple: ROUND_ROBIN, warmup: {duration: 5s, minimumPercent: 20, aggression: 2}}}",
        "{loadBalancer: {warmupDurationSecs: 2s}}",
        "{loadBalancer: {simple: PASSTHROUGH}}",
        "{loadBalancer: {zoneAwareLbSetting: {minClusterSize: 1}}}",
        "{connectionPool: {http: {h2UpgradePolicy: UPGRADE, http2KeepAlive: {interval: 5s, timeout: 1s},"
        " maxConcurrentStreams: 50, maxRequestsPerConnection: 1000, idleTimeout: 30s},"
        " tcp: {tcpKeepalive: {time: 60s, interval: 10s, probes: 3}, maxConnectionDuration: 60s, idleTimeout: 0s}}}",
        "{connectionPool: {http: {useClientProtocol: true}}}",
        "{retryBudget: {percent: 20, minRetryConcurrency: 2}}",
        "{portLevelSettings: [{port: {number: 9000}, loadBalancer: {simple: RANDOM}, tls: {mode: ISTIO_MUTUAL}}]}",
        "{outlierDetection: {splitExternalLocalOriginErrors: true, consecutiveLocalOriginFailures: 5,"
        " consecutiveGatewayErrors: 3, minHealthPercent: 10}}",
    ],
)
async def test_policies_that_envoy_takes(mesh: EnvoyMesh, policy: str) -> None:
    await mesh.apply(destination_rule(policy))
    assert ok(await mesh.spread(20)) <= V1 | V2


async def test_subsets_override_parts(mesh: EnvoyMesh) -> None:
    """The subset's own pool lets one call through at a time; the rule's would let all through."""
    pool = "connectionPool: {http: {http2MaxRequests: 1}}"
    subset = f"{{name: v2, labels: {{version: v2}}, trafficPolicy: {{{pool}}}}}"
    rule = destination_rule("{connectionPool: {http: {http2MaxRequests: 100}}}", f"[{subset}]")
    to_subset = networking(
        "VirtualService",
        "{hosts: [server], http: [{retries: {attempts: 0}, route: [{destination: {host: server, subset: v2}}]}]}",
    )
    await mesh.apply(rule, to_subset)
    mesh.backends["server-v2-0"].delay_s = 0.3
    found = await mesh.spread(10)
    assert set(found) == {"server-v2-0", "UNAVAILABLE"}
    assert (await mesh.stats("client-0", f"outbound.9000.v2.{HOST}.upstream_rq_pending_overflow")) != {}


async def test_hosts_of_service_entries(mesh: EnvoyMesh) -> None:
    """The same workload by an address, by a name that DNS resolves, and by a wildcard whose name is resolved then."""
    address = mesh.proxy("server-v2-0").application_address
    ports = "ports: [{number: 9100, name: grpc, protocol: GRPC, targetPort: 9000}]"
    fixed = f"{{hosts: [{OUTSIDE}], resolution: STATIC, endpoints: [{{address: {address}}}], {ports}}}"
    await mesh.apply(networking("ServiceEntry", fixed))
    assert ok(await mesh.spread(5, host=OUTSIDE, port=9100)) == V2
    # Every Linux resolves localhost; the application listens elsewhere, so that nobody answers.
    named = f"{{hosts: [named.example], resolution: DNS, endpoints: [{{address: localhost}}], {ports}}}"
    await mesh.apply(networking("ServiceEntry", named, name="named"))
    dump = str(await mesh.configuration("client-0", "?include_eds&resource=dynamic_endpoint_configs"))
    assert (await mesh.call(host="named.example", port=9100)).code is grpc.StatusCode.UNAVAILABLE
    assert dump
    any_host = "{hosts: ['*.localhost'], resolution: DYNAMIC_DNS, ports: [{number: 9200, name: grpc, protocol: GRPC}]}"
    await mesh.apply(networking("ServiceEntry", any_host, name="dynamic"))
    answer = await mesh.call(host="any.localhost", port=9200)
    assert answer.code is grpc.StatusCode.UNAVAILABLE
    assert "no healthy" not in answer.text


async def test_sidecars_know_what_they_import(mesh: EnvoyMesh) -> None:
    nothing = networking(
        "Sidecar", "{workloadSelector: {labels: {app: client}}, egress: [{hosts: ['elsewhere/*']}]}", name="client"
    )
    assert ok(await mesh.spread(5)) <= V1 | V2
    await mesh.apply(nothing)
    answer = await mesh.call()
    assert answer.code is grpc.StatusCode.UNAVAILABLE
    await mesh.reset(BASE)
    assert ok(await mesh.spread(5)) <= V1 | V2


async def test_ports_that_a_sidecar_names(mesh: EnvoyMesh) -> None:
    """The sidecar listens on a port of its own and leads to the application's."""
    ingress = "{port: {number: 9000, protocol: GRPC, name: grpc}, defaultEndpoint: '127.0.0.1:9000'}"
    text = f"{{workloadSelector: {{labels: {{version: v2}}}}, ingress: [{ingress}]}}"
    await mesh.apply(networking("Sidecar", text, name="server"))
    assert ok(await mesh.spread(40)) == V1 | V2
