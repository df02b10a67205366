"""What a running mesh does: identities, routes, shares, traces, certificates, restarts."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families

from mlmesh.local.v1 import local_pb2
from mlmesh_cli.measuring import scrape
from mlmesh_local.instance import State
from mlmesh_runtime.channel import ClientTls, open_channel
from mlmesh_runtime.telemetry import FORCE_HEADER
from tests.integration.local.conftest import ECHO, ECHO_TARGET, HERE, RunningMesh, answer, start
from tests.support.echo import PROTOS, Text

ISTIO = (HERE / "istio.yaml").read_text()
ROUTES = next(text for text in ISTIO.split("---\n") if "kind: VirtualService" in text)


def weights(first: int, second: int) -> str:
    return ROUTES.replace("weight: 100", f"weight: {first}").replace("weight: 0", f"weight: {second}")


async def test_status_tells_everything(mesh: RunningMesh) -> None:
    status = await mesh.status()
    assert status.ready
    assert {item.name for item in status.instances} == {
        "echo-v1-0", "echo-v1-1", "echo-v2-0", "ingressgateway-0", "toolbox-0",
    }  # fmt: skip
    assert psutil.Process(status.supervisor_pid).is_running()
    assert status.trust_domain == "cluster.local"
    assert status.ca_expire_time.ToSeconds() > status.start_time.ToSeconds() > 0
    for item in status.instances:
        assert item.state == local_pb2.INSTANCE_STATE_READY
        assert (item.reason, item.restarts, item.sidecar_restarts) == ("", 0, 0)
        assert psutil.Process(item.sidecar_pid).name() == "envoy"
        assert item.acked_version == status.config_version
        assert re.fullmatch(r"[0-9a-f]+", item.certificate_serial)
        assert 0 < item.certificate_expire_time.ToSeconds() - time.time() <= 86400
        assert item.address.startswith("127.")
        assert item.admin_address.endswith(":15000")
        assert item.namespace == "mlmesh"
    echo = next(item for item in status.instances if item.name == "echo-v1-1")
    assert echo.identity == "spiffe://cluster.local/ns/mlmesh/sa/echo"
    assert (echo.workload, dict(echo.labels)) == ("echo-v1", {"app": "echo", "version": "v1"})
    assert psutil.Process(echo.application_pid).is_running()
    assert echo.application_address.endswith(":9000")
    assert [listener.port for listener in echo.outbound_listeners] == [9000, 9443]
    gateway = next(item for item in status.instances if item.name == "ingressgateway-0")
    assert (gateway.application_pid, gateway.application_address) == (0, "")
    assert [(item.gateway, item.tls_mode) for item in status.gateways] == [("mlmesh/mlmesh", "MUTUAL")] * 2
    assert mesh.gateway in {item.address for item in status.gateways}


def test_the_start_told_its_progress(mesh: RunningMesh) -> None:
    states = [progress.state for progress in mesh.progress if progress.instance == "echo-v1-0"]
    assert states[-1] == State.READY.value
    assert mesh.progress[-1].ready


async def test_a_call_through_two_sidecars_shows_who_calls(mesh: RunningMesh) -> None:
    async with mesh.echo() as stub:
        reply = await answer(stub, "hello")
    assert reply["identity"] == "spiffe://cluster.local/ns/mlmesh/sa/operator"
    assert reply["asked"] == "hello"
    assert reply["pod"].startswith("echo-v1-")


async def test_a_call_through_the_gateway_needs_a_certificate_of_the_mesh(mesh: RunningMesh, tmp_path: Path) -> None:
    async with mesh.control() as stub:
        issued = await stub.IssueCertificate(local_pb2.IssueCertificateRequest(service_account="operator"))
    assert issued.identity == "spiffe://cluster.local/ns/mlmesh/sa/operator"
    files = {"cert": issued.certificate_chain_pem, "key": issued.private_key_pem, "ca": issued.trust_bundle_pem}
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    tls = ClientTls(ca=tmp_path / "ca", cert=tmp_path / "cert", key=tmp_path / "key", server_name=ECHO)
    async with open_channel(mesh.gateway, tls=tls) as channel:
        reply = await answer(PROTOS.stub(channel))
    assert reply["identity"] == "spiffe://cluster.local/ns/mlmesh/sa/ingressgateway"
    async with open_channel(mesh.gateway, tls=ClientTls(ca=tmp_path / "ca", server_name=ECHO)) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await answer(PROTOS.stub(channel))
    assert refused.value.code() == grpc.StatusCode.UNAVAILABLE


async def test_plaintext_to_a_pod_is_refused(mesh: RunningMesh) -> None:
    pod = await mesh.instance("echo-v1-0")
    async with open_channel(f"{pod.address}:9000", authority=ECHO_TARGET) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await answer(PROTOS.stub(channel))
    assert refused.value.code() == grpc.StatusCode.UNAVAILABLE


async def test_weights_reach_every_sidecar_and_shares_are_observed(mesh: RunningMesh) -> None:
    before = await mesh.apply(weights(100, 0))
    assert [change.action for change in before.changes] == ["unchanged"]
    applied = await mesh.apply(weights(50, 50))
    try:
        assert [(change.kind, change.name, change.action) for change in applied.changes] == [
            ("VirtualService", "mlmesh/echo", "configured")
        ]
        assert applied.acked_sidecars == applied.connected_sidecars == 5
        for _ in range(5):  # now and then other programs have the processors
            if applied.ack_latency.ToNanoseconds() < 1_000_000_000:
                break
            await mesh.apply(weights(100, 0))
            applied = await mesh.apply(weights(50, 50))
        assert applied.ack_latency.ToNanoseconds() < 1_000_000_000
        async with mesh.echo() as stub:
            pods = Counter([(await answer(stub))["pod"].rpartition("-")[0] for _ in range(200)])
        assert 60 <= pods["echo-v2"] <= 140
        (route,) = await routes(mesh, lambda found: requests(found[0]) >= 200)
    finally:
        await mesh.apply(weights(100, 0))
    assert (route.virtual_service, route.host, route.rule, route.match) == ("mlmesh/echo", ECHO, "split", "any")
    second = next(item for item in route.destinations if item.subset == "v2")
    assert second.configured_share == 0.5
    assert second.requests >= pods["echo-v2"]
    assert 0 < second.observed_share < 0.8
    assert sum(item.observed_share for item in route.destinations) == pytest.approx(1.0)


def requests(route: local_pb2.Route) -> int:
    return sum(item.requests for item in route.destinations)


async def routes(mesh: RunningMesh, condition: Callable[[Sequence[local_pb2.Route]], bool]) -> list[local_pb2.Route]:
    """Routes of the echo service, once they fulfil a condition: sidecars report a moment after a call."""
    async with mesh.control() as stub, asyncio.timeout(30):
        while True:
            answer = await stub.ListRoutes(local_pb2.ListRoutesRequest(host=ECHO))
            if condition(answer.routes):
                return list(answer.routes)
            await asyncio.sleep(0.05)


async def test_calls_are_counted_by_the_rule_that_routed_them(mesh: RunningMesh) -> None:
    apart = """
      match: [{headers: {x-user: {exact: tester}}}]
      route: [{destination: {host: echo.mlmesh.svc.cluster.local, subset: v1, port: {number: 9000}}}]
    - match: [{headers: {x-user: {exact: nobody}}}]
      directResponse: {status: 403}
    - name: rest"""
    await mesh.apply(ROUTES.replace("name: split", f"name: tester{apart}"))
    try:
        async with mesh.echo() as stub:
            for user in ("tester", "tester", "nobody", "other", "other", "other"):
                with contextlib.suppress(grpc.aio.AioRpcError):
                    await answer(stub, metadata=(("x-user", user),))
        found = await routes(mesh, lambda found: sum(requests(route) for route in found) >= 6)
    finally:
        await mesh.apply(weights(100, 0))
    counts = [[(item.subset, item.requests, item.failures) for item in route.destinations] for route in found]
    assert counts == [[("v1", 2, 0)], [("", 1, 1)], [("v1", 3, 0), ("v2", 0, 0)]]


async def test_a_sidecar_that_hangs_is_named_and_takes_the_change_later(mesh: RunningMesh) -> None:
    sidecar = (await mesh.instance("toolbox-0")).sidecar_pid
    os.kill(sidecar, signal.SIGSTOP)
    try:
        applied = await mesh.apply(weights(90, 10), timeout_s=3.0)
        late = [warning for warning in applied.warnings if "not acknowledged within" in warning]
        assert [warning.rpartition(" by ")[2] for warning in late] == ["toolbox-0"]
        assert applied.acked_sidecars < applied.connected_sidecars
    finally:
        os.kill(sidecar, signal.SIGCONT)
        resumed = await mesh.apply(weights(100, 0))
    assert resumed.acked_sidecars == resumed.connected_sidecars


async def test_failed_calls_are_counted(mesh: RunningMesh) -> None:
    def failures(status: local_pb2.MeshStatus) -> int:
        return sum(item.failures for item in status.shares if item.host == ECHO)

    before = failures(await mesh.status())
    async with mesh.echo() as stub:
        with pytest.raises(grpc.aio.AioRpcError):
            await answer(stub, "fail")
    await mesh.until(lambda status: failures(status) == before + 1)


@pytest.mark.parametrize(
    ("text", "field"),
    [
        (ROUTES.replace("subset: v2", "subset: v9"), "subset"),
        (ROUTES.replace("weight: 100", "weight: -1"), "weight"),
        (ROUTES.replace("weight: 100", "wait: 1"), "wait"),
        ("kind: [", "test.yaml"),
    ],
)
async def test_a_refused_change_changes_nothing(mesh: RunningMesh, text: str, field: str) -> None:
    before = await mesh.status()
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await mesh.apply(text)
    assert refused.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert field in (refused.value.details() or "")
    assert "test.yaml" in (refused.value.details() or "")
    assert (await mesh.status()).config_version == before.config_version
    async with mesh.echo() as stub:
        await answer(stub)


async def test_a_dry_run_changes_nothing(mesh: RunningMesh) -> None:
    before = await mesh.status()
    applied = await mesh.apply(weights(1, 99), dry_run=True)
    assert [change.action for change in applied.changes] == ["configured"]
    assert (await mesh.status()).config_version == before.config_version


async def test_resources_are_listed_as_yaml(mesh: RunningMesh) -> None:
    async with mesh.control() as stub:
        listed = await stub.ListResources(local_pb2.ListResourcesRequest(kind="VirtualService"))
    (resource,) = listed.resources
    assert (resource.kind, resource.name) == ("VirtualService", "mlmesh/echo")
    assert "weight" in resource.yaml


async def test_rotation_keeps_an_open_stream(mesh: RunningMesh) -> None:
    before = {item.name: item.certificate_serial for item in (await mesh.status()).instances}
    async with mesh.echo() as echo, mesh.control() as stub:
        stream = echo.Chat(timeout=30)
        await stream.write(Text(text="one"))
        first = await stream.read()
        rotated = await stub.RotateCertificates(local_pb2.RotateCertificatesRequest())
        assert rotated.rotated == 5
        after = {item.name: item.certificate_serial for item in (await mesh.status()).instances}
        assert not set(before.values()) & set(after.values())
        await asyncio.gather(*(answer(echo) for _ in range(20)))
        await stream.write(Text(text="two"))
        second = await stream.read()
        await stream.done_writing()
    assert '"asked": "one"' in first.text
    assert '"asked": "two"' in second.text


async def test_a_new_root_fails_no_call_and_everybody_uses_it(mesh: RunningMesh) -> None:
    async with mesh.echo() as echo, mesh.control() as stub:
        before = await stub.GetTrustBundle(local_pb2.GetTrustBundleRequest())
        steps = []
        async for step in stub.RotateRoot(local_pb2.RotateRootRequest(now=True)):
            steps.append(step.message)
            await asyncio.gather(*(answer(echo) for _ in range(5)))
        after = await stub.GetTrustBundle(local_pb2.GetTrustBundleRequest())
    assert steps[0] == "a new root is made"
    assert steps[-1] == "the old root is trusted no more"
    assert (after.trust_domain, after.phase, after.pem.count("BEGIN")) == ("cluster.local", "IDLE", 1)
    assert after.pem != before.pem
    sequences = [json.loads(bundle.spiffe_json)["spiffe_sequence"] for bundle in (before, after)]
    assert sequences[0] < sequences[1]
    async with mesh.echo() as echo:
        assert (await answer(echo))["identity"] == "spiffe://cluster.local/ns/mlmesh/sa/operator"


async def test_a_rolling_restart_fails_no_call(mesh: RunningMesh) -> None:
    before = {item.name: item for item in (await mesh.status()).instances}
    stop = asyncio.Event()
    pods: Counter[str] = Counter()

    async def call(stub: Any) -> None:
        while not stop.is_set():
            pods[(await answer(stub))["pod"]] += 1

    async with mesh.echo() as echo, mesh.control() as stub, asyncio.TaskGroup() as group:
        for _ in range(3):
            group.create_task(call(echo))
        answered = await stub.RestartWorkload(local_pb2.RestartWorkloadRequest(name="echo-v1"), timeout=60)
        stop.set()
    assert list(answered.instances) == ["echo-v1-0", "echo-v1-1"]
    after = {item.name: item for item in (await mesh.status()).instances}
    for name in answered.instances:
        assert after[name].application_pid != before[name].application_pid
        assert after[name].restarts == before[name].restarts + 1
        assert after[name].state == local_pb2.INSTANCE_STATE_READY
    assert sum(pods.values()) > 50
    assert len(pods) == 2


async def test_applying_a_deployment_starts_and_ends_processes(mesh: RunningMesh) -> None:
    (deployment,) = [
        text for text in (HERE / "manifests.yaml").read_text().split("---\n") if "{name: toolbox, namesp" in text
    ]
    tools = deployment.replace("{name: toolbox, namespace", "{name: tools, namespace").replace(
        "spec:\n  selector", "spec:\n  replicas: 1\n  selector"
    )
    before = {item.name: item for item in (await mesh.status()).instances}
    created = await mesh.apply(tools)
    assert [(change.name, change.action) for change in created.changes] == [("mlmesh/tools", "created")]
    await mesh.until(lambda status: status.ready and "tools-0" in {item.name for item in status.instances})
    tool = await mesh.instance("tools-0")
    assert tool.identity == "spiffe://cluster.local/ns/mlmesh/sa/operator"
    await mesh.apply(tools.replace("replicas: 1", "replicas: 0"))
    after = {item.name: item for item in (await mesh.status()).instances}
    assert set(after) == set(before)
    assert not psutil.pid_exists(tool.application_pid)
    assert all(after[name].application_pid == item.application_pid for name, item in before.items())


async def test_an_unknown_workload_is_not_restarted(mesh: RunningMesh) -> None:
    async with mesh.control() as stub:
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await stub.RestartWorkload(local_pb2.RestartWorkloadRequest(name="nobody"))
    assert refused.value.code() == grpc.StatusCode.NOT_FOUND
    assert "echo-v1" in (refused.value.details() or "")


async def test_a_trace_goes_through_both_sidecars(mesh: RunningMesh) -> None:
    trace_id = os.urandom(16).hex()
    async with mesh.echo() as stub:
        sampled = (("traceparent", f"00-{trace_id}-{os.urandom(8).hex()}-01"), (FORCE_HEADER, trace_id))
        await answer(stub, metadata=sampled)
    async with mesh.control() as stub, asyncio.timeout(20):
        while True:
            try:
                trace = await stub.GetTrace(local_pb2.GetTraceRequest(trace_id=trace_id))
            except grpc.aio.AioRpcError as error:
                assert error.code() == grpc.StatusCode.NOT_FOUND  # noqa: PT017
            else:
                kinds = {(span.service, span.kind) for span in trace.spans}
                if {("toolbox.mlmesh", "client"), ("echo.mlmesh", "server")} <= kinds:
                    break
            await asyncio.sleep(0.1)
        listed = await stub.ListTraces(local_pb2.ListTracesRequest(page_size=1000))
    by_id = {span.span_id: span for span in trace.spans}
    server = next(span for span in trace.spans if span.service == "echo.mlmesh" and span.kind == "server")
    assert by_id[server.parent_span_id].service == "toolbox.mlmesh"
    assert trace_id in {item.trace_id for item in listed.traces}


async def test_a_killed_application_comes_back(mesh: RunningMesh) -> None:
    before = await mesh.instance("echo-v1-0")
    os.kill(before.application_pid, signal.SIGKILL)

    def back(status: local_pb2.MeshStatus) -> bool:
        now = next(item for item in status.instances if item.name == "echo-v1-0")
        return now.restarts == before.restarts + 1 and now.state == local_pb2.INSTANCE_STATE_READY

    async with mesh.echo() as stub:
        # The other replica answers; retries hide the one that is gone.
        for _ in range(20):
            await answer(stub)
        await mesh.until(back)
        pods = {(await answer(stub))["pod"] for _ in range(40)}
    assert pods == {"echo-v1-0", "echo-v1-1"}
    after = await mesh.instance("echo-v1-0")
    assert after.application_pid not in {0, before.application_pid}
    assert after.sidecar_pid == before.sidecar_pid


async def test_a_killed_sidecar_comes_back_with_its_counts(mesh: RunningMesh) -> None:
    def requests(status: local_pb2.MeshStatus) -> int:
        return sum(item.requests for item in status.shares)

    before = await mesh.instance("toolbox-0")
    counted = requests(await mesh.status())
    os.kill(before.sidecar_pid, signal.SIGKILL)

    def back(status: local_pb2.MeshStatus) -> bool:
        now = next(item for item in status.instances if item.name == "toolbox-0")
        return (
            now.sidecar_restarts == before.sidecar_restarts + 1
            and now.state == local_pb2.INSTANCE_STATE_READY
            and now.acked_version == status.config_version
        )

    await mesh.until(back)
    async with mesh.echo() as stub:
        await answer(stub)
    await mesh.until(lambda status: requests(status) > counted > 0)


async def test_istios_metrics_can_be_scraped_and_asked(mesh: RunningMesh) -> None:
    async with mesh.echo() as stub:
        for _ in range(3):
            await answer(stub)
    labels = ("source_workload", "destination_workload", "connection_security_policy")
    request = local_pb2.GetMetricsRequest(by=labels, where={"source_workload": "toolbox"})
    async with mesh.control() as stub, asyncio.timeout(10):
        found = local_pb2.GetMetricsResponse()
        while sum(group.requests for group in found.groups) < 3:
            found = await stub.GetMetrics(request)
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await stub.GetMetrics(local_pb2.GetMetricsRequest(by=["colour"]))
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert {group.labels["connection_security_policy"] for group in found.groups} == {"mutual_tls"}
    assert {group.labels["destination_workload"] for group in found.groups} <= {"echo-v1", "echo-v2"}
    assert all(group.statuses for group in found.groups)
    page = await scrape((await mesh.status()).metrics_address)
    families = {family.name: family for family in text_string_to_metric_families(page)}
    assert {sample.labels["reporter"] for sample in families["istio_requests"].samples} == {"source", "destination"}


async def test_the_status_is_watched(mesh: RunningMesh) -> None:
    async with mesh.control() as stub:
        request = local_pb2.WatchStatusRequest()
        request.interval.FromMilliseconds(200)
        stream = stub.WatchStatus(request, timeout=10)
        first, second = await stream.read(), await stream.read()
        stream.cancel()
    assert len(first.status.instances) == len(second.status.instances) == 5


def test_a_second_supervisor_in_the_same_folder_is_refused(mesh: RunningMesh) -> None:
    with pytest.raises(Exception, match=r"already runs in .* \(supervisor pid \d+\).*mlmesh down") as refused:
        start(mesh.options)
    assert f"pid {mesh.state.running_pid()}" in str(refused.value)
    assert asyncio.run(mesh.status()).ready


async def test_the_control_socket_is_its_owners_only(mesh: RunningMesh) -> None:
    assert mesh.state.socket.stat().st_mode & 0o777 == 0o600
    assert mesh.state.path.stat().st_mode & 0o777 == 0o700
