"""Traffic through real sidecars: where calls go, and that changes reach them at once and break nothing."""

from __future__ import annotations

import asyncio

import grpc
import pytest

from mlmesh_local.xds import ConfigurationRejectedError
from tests.support.envoy_mesh import CHAT, EnvoyMesh
from tests.support.mesh_documents import STRICT, SUBSETS, deployment, service, split
from tests.support.mesh_load import under_load

pytestmark = pytest.mark.asyncio(loop_scope="module")

WORKLOADS = (
    deployment("client", "client", "client")
    + service("client")
    + deployment("server-v1", "server", "server", version="v1", replicas=2)
    + deployment("server-v2", "server", "server", version="v2")
    + service("server")
)
BASE = STRICT + SUBSETS


async def test_without_rules_every_endpoint_is_used(mesh: EnvoyMesh) -> None:
    assert set(await mesh.spread(60)) == {"server-v1-0", "server-v1-1", "server-v2-0"}


async def test_weights_split_and_change_hot(mesh: EnvoyMesh) -> None:
    assert await mesh.apply(split(90, 10)) < 1.0
    first = await mesh.spread(1000)
    assert 60 <= first["server-v2-0"] <= 145  # 90/10 within more than four standard deviations
    assert sum(count for name, count in first.items() if name.startswith("server-v1")) == 1000 - first["server-v2-0"]

    assert await mesh.apply(split(0, 100)) < 1.0
    assert await mesh.spread(100) == {"server-v2-0": 100}


async def test_any_sum_of_weights_is_proportional(mesh: EnvoyMesh) -> None:
    await mesh.apply(split(1, 3))
    found = await mesh.spread(400)
    assert 245 <= found["server-v2-0"] <= 355


async def test_open_stream_survives_all_changes_but_stays_where_it_is(mesh: EnvoyMesh) -> None:
    await mesh.apply(split(0, 100))
    listeners_before = await mesh.configuration("client-0", "?resource=dynamic_listeners")
    async with mesh.channel() as channel:
        stream = channel.stream_stream(CHAT)(timeout=60)
        assert await exchange(stream, b"1") == b"server-v2-0:1"

        await mesh.apply(split(100, 0))
        assert await exchange(stream, b"weights") == b"server-v2-0:weights"

        mesh.rotate()
        for instance in ("client-0", "server-v2-0"):
            await mesh.secrets_taken(instance)
        assert await exchange(stream, b"rotation") == b"server-v2-0:rotation"

        # The stream's own endpoint is taken away, as when its workload drains.
        mesh.not_ready.add("server-v2-0")
        await mesh.ads.wait_acked(mesh.push(), timeout_s=30)
        assert await exchange(stream, b"endpoint gone") == b"server-v2-0:endpoint gone"

        # And the cluster that carries it is changed.
        await mesh.apply(
            SUBSETS.replace("  subsets:", "  trafficPolicy: {connectionPool: {tcp: {connectTimeout: 3s}}}\n  subsets:")
        )
        assert await exchange(stream, b"cluster changed") == b"server-v2-0:cluster changed"

        assert set(await mesh.spread(40)) == {"server-v1-0", "server-v1-1"}
        await stream.done_writing()
        assert await stream.code() is grpc.StatusCode.OK
    assert await mesh.configuration("client-0", "?resource=dynamic_listeners") == listeners_before


async def exchange(stream: grpc.aio.StreamStreamCall, message: bytes) -> bytes:
    await stream.write(message)
    answer = await asyncio.wait_for(stream.read(), 30)
    assert isinstance(answer, bytes), "the stream has ended"
    return answer


async def test_no_call_fails_while_weights_and_certificates_change_under_load(mesh: EnvoyMesh) -> None:
    await mesh.apply(split(100, 0))
    async with under_load(mesh) as outcomes:
        for round_number in range(20):
            await mesh.apply(split(100 - round_number * 5, round_number * 5))
            mesh.rotate()
            await outcomes.more(20)
    assert outcomes.codes() == {grpc.StatusCode.OK}


async def test_subsets_come_and_go_without_a_failed_call(mesh: EnvoyMesh) -> None:
    """Make before break: a route never names a cluster that is not warm, a cluster goes after its last route."""
    await mesh.apply(split(50, 50))
    more = SUBSETS.replace("subsets:\n", "subsets:\n    - {name: every, labels: {app: server}}\n")
    to_every = split(50, 50).replace("subset: v1", "subset: every")
    async with under_load(mesh) as outcomes:
        for _ in range(6):
            await mesh.apply(more, to_every)
            await outcomes.more(20)
            await mesh.apply(SUBSETS, split(50, 50))
            await outcomes.more(20)
    assert outcomes.codes() == {grpc.StatusCode.OK}
    clusters = await mesh.stats("client-0", "cluster_manager.(active|warming)_clusters")
    assert clusters["cluster_manager.warming_clusters"] == 0


RULES = """
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {name: server}
spec:
  hosts: [server]
  http:
    - match:
        - headers: {x-user: {exact: ada}}
        - headers: {x-group: {regex: "beta-[0-9]+"}, x-user: {prefix: b}}
      route: [{destination: {host: server, subset: v2}}]
    - match: [{withoutHeaders: {x-new: {}}, method: {exact: POST}, uri: {exact: /test.Echo/Unary}}]
      headers:
        request: {set: {x-set: by-route}, add: {x-add: two}, remove: [x-gone]}
        response: {set: {x-answer: from-route}}
      route: [{destination: {host: server, subset: v1}}]
    - match: [{headers: {x-new: {exact: aborted}}}]
      fault: {abort: {grpcStatus: RESOURCE_EXHAUSTED, percentage: {value: 100}}}
      route: [{destination: {host: server}}]
    - match: [{headers: {x-new: {exact: delayed}}}]
      fault: {delay: {fixedDelay: 300ms, percentage: {value: 100}}}
      route: [{destination: {host: server}}]
    - match: [{headers: {x-new: {exact: limited}}}]
      timeout: 200ms
      retries: {attempts: 0}
      route: [{destination: {host: server, subset: v2}}]
    - match: [{headers: {x-new: {exact: renamed}}}]
      rewrite: {authority: another.example}
      route: [{destination: {host: server, subset: v2}}]
    - route: [{destination: {host: server, subset: v2}}]
---
"""


async def test_rules_are_tried_in_order(mesh: EnvoyMesh) -> None:
    await mesh.apply(RULES)
    assert (await mesh.call(metadata={"x-user": "ada"})).text == "server-v2-0"
    assert (await mesh.call(metadata={"x-user": "bob", "x-group": "beta-7"})).text == "server-v2-0"
    assert (await mesh.call(metadata={"x-user": "bob", "x-group": "beta"})).text.startswith("server-v1")
    assert (await mesh.call(metadata={"x-new": "whatever"})).text == "server-v2-0"


async def test_headers_are_edited_on_the_way(mesh: EnvoyMesh) -> None:
    await mesh.apply(RULES)
    answer = await mesh.call(metadata={"x-gone": "1", "x-add": "one", "x-set": "by-caller"})
    assert answer.metadata["x-answer"] == "from-route"
    (received,) = mesh.backends[answer.text].metadata
    assert received["x-set"] == "by-route"
    assert received["x-add"] == "one,two"
    assert "x-gone" not in received


async def test_faults_are_what_the_caller_sees_and_are_not_retried(mesh: EnvoyMesh) -> None:
    await mesh.apply(RULES)
    aborted = await mesh.call(metadata={"x-new": "aborted"})
    assert (aborted.code, aborted.text) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "fault filter abort")
    assert mesh.calls() == 0
    for _ in range(10):
        delayed = await mesh.call(metadata={"x-new": "delayed"})
        assert delayed.code is grpc.StatusCode.OK
        if delayed.seconds < 2:
            break  # a busy machine may take longer now and then
    # Envoy lets go a little early now and then: of 2,400 measured, 16 did, by 2.8 ms at most.
    assert 0.295 <= delayed.seconds < 2


async def test_injected_unavailable_is_not_retried(mesh: EnvoyMesh) -> None:
    """UNAVAILABLE is what the mesh retries, but the fault filter stands before the router."""
    fault = "      fault: {abort: {grpcStatus: UNAVAILABLE, percentage: {value: 50}}}"
    await mesh.apply(split(50, 50, fault))
    found = await mesh.spread(200)
    assert 60 <= found["UNAVAILABLE"] <= 140


async def test_timeout_and_the_callers_deadline(mesh: EnvoyMesh) -> None:
    await mesh.apply(RULES)
    mesh.backends["server-v2-0"].delay_s = 20.0
    limited = await mesh.call(metadata={"x-new": "limited"})
    # Which of the two sidecars notices first decides on the code, as in Istio.
    assert limited.code in {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED}
    assert 0.15 <= limited.seconds < 15
    # Without a route timeout the caller's deadline alone counts; its sidecar, too, watches it.
    mine = await mesh.call(metadata={"x-new": "none"}, timeout_s=0.3)
    assert mine.code in {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED}
    assert 0.25 <= mine.seconds < 15


ONLY_REWRITTEN = """
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: only-rewritten}
spec:
  selector: {matchLabels: {app: server}}
  rules: [{to: [{operation: {hosts: [another.example]}}]}]
"""


async def test_authority_is_rewritten(mesh: EnvoyMesh) -> None:
    await mesh.apply(RULES, ONLY_REWRITTEN)
    assert (await mesh.call(metadata={"x-new": "renamed"})).text == "server-v2-0"
    assert (await mesh.call(metadata={"x-new": "other"})).code is grpc.StatusCode.PERMISSION_DENIED


async def test_mirror_copies_requests_and_drops_answers(mesh: EnvoyMesh) -> None:
    mirror = "      mirror: {host: server, subset: v2}\n      mirrorPercentage: {value: 100.0}"
    await mesh.apply(split(100, 0, mirror))
    found = await mesh.spread(30)
    assert set(found) == {"server-v1-0", "server-v1-1"}
    shadow = mesh.backends["server-v2-0"]
    await asyncio.wait_for(shadow.called(30), 30)
    primary = {m["x-request-id"] for name in found for m in mesh.backends[name].metadata}
    assert {m["x-request-id"] for m in shadow.metadata} == primary


async def test_unknown_host_is_refused_in_words(mesh: EnvoyMesh) -> None:
    answer = await mesh.call(host="nobody.example")
    assert answer.code is grpc.StatusCode.UNAVAILABLE
    assert "no service of the mesh has this host name" in answer.text


@pytest.mark.parametrize("host", ["server", "server.mlmesh", "server.mlmesh.svc", "server.mlmesh.svc.cluster.local"])
async def test_short_names_are_known(mesh: EnvoyMesh, host: str) -> None:
    assert (await mesh.call(host=host)).code is grpc.StatusCode.OK


async def test_refused_by_envoy_keeps_the_last_good(mesh: EnvoyMesh) -> None:
    await mesh.apply(split(0, 100))
    # Which variables there are only Envoy knows; Istio's validation and this one look at their form.
    bad = split(0, 100, extra="      headers: {request: {set: {x-who: '%NOBODY%'}}}")
    with pytest.raises(ConfigurationRejectedError, match=r"Envoy refused it: .*NOBODY"):
        await mesh.apply(bad)
    assert await mesh.spread(20) == {"server-v2-0": 20}
    assert mesh.ads.status("client-0").rejection == ""
    assert await mesh.apply(split(100, 0)) < 1.0
    assert set(await mesh.spread(20)) == {"server-v1-0", "server-v1-1"}


async def test_shares_can_be_read_with_their_status(mesh: EnvoyMesh) -> None:
    await mesh.apply(split(0, 100))
    name = "cluster.outbound|9000|v2|server.mlmesh.svc.cluster.local.grpc.test.Echo.Unary"
    before = await mesh.stats("client-0", "grpc.test.Echo.Unary")
    mesh.backends["server-v2-0"].fail = grpc.StatusCode.ABORTED
    await mesh.spread(3)
    mesh.backends["server-v2-0"].fail = None
    await mesh.spread(4)
    after = await mesh.stats("client-0", "grpc.test.Echo.Unary")
    assert after[f"{name}.10"] - before.get(f"{name}.10", 0) == 3
    assert after[f"{name}.0"] - before.get(f"{name}.0", 0) == 4
