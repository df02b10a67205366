"""Faults on purpose, in a real mesh: what callers see, and that everything comes back."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from typing import Any

import grpc
import psutil
import pytest

from mlmesh.local.v1 import local_pb2 as pb
from mlmesh_cli.chaos import RouteFault, inject, prepared, restore, virtual_services
from mlmesh_cli.connection import duration
from mlmesh_local.options import Options
from tests.integration.local.conftest import ECHO, RunningMesh, answer, start
from tests.support.echo import Text


@contextlib.asynccontextmanager
async def injected(mesh: RunningMesh, target: str, seconds: float = 30.0, **fault: Any) -> AsyncIterator[Any]:
    """A fault, removed at the end."""
    async with mesh.control() as stub:
        request = pb.InjectFaultRequest(target=target, duration=duration(seconds), **fault)
        try:
            yield await stub.InjectFault(request)
        finally:
            await stub.RemoveFaults(pb.RemoveFaultsRequest())
            assert not (await stub.ListFaults(pb.ListFaultsRequest())).faults


async def acknowledged(mesh: RunningMesh) -> None:
    """Wait until every sidecar knows the endpoints of now."""
    await mesh.until(lambda s: s.ready and all(i.acked_version == s.config_version for i in s.instances))


async def test_a_killed_process_starts_again(small: Options) -> None:
    # In a mesh of its own: what was restarted stays counted.
    mesh = RunningMesh(small, await asyncio.to_thread(start, small))
    before = await mesh.instance("toolbox-0")
    for part, field in ((pb.PROCESS_PART_APPLICATION, "restarts"), (pb.PROCESS_PART_SIDECAR, "sidecar_restarts")):
        async with mesh.control() as stub:
            killed = await stub.InjectFault(pb.InjectFaultRequest(target="toolbox", process=pb.ProcessFault(part=part)))
        assert list(killed.instances) == ["toolbox-0"]
        assert not killed.faults
        await mesh.until(lambda s, field=field: s.ready and getattr(_of(s, "toolbox-0"), field) == 1)
    after = await mesh.instance("toolbox-0")
    assert after.application_pid not in {0, before.application_pid}
    assert after.sidecar_pid not in {0, before.sidecar_pid}


def _of(status: pb.MeshStatus, name: str) -> pb.Instance:
    return next(item for item in status.instances if item.name == name)


async def _goes_on(pid: int) -> None:
    async with asyncio.timeout(10):
        while psutil.Process(pid).status() == psutil.STATUS_STOPPED:  # noqa: ASYNC110  (another process)
            await asyncio.sleep(0.01)


async def test_a_stopped_process_hangs_until_its_time_is_over(mesh: RunningMesh) -> None:
    pid = (await mesh.instance("echo-v2-0")).application_pid
    async with injected(mesh, "echo-v2", process=pb.ProcessFault(stop=True)) as response:
        async with asyncio.timeout(10):
            # The signal is on its way when the answer comes.
            while psutil.Process(pid).status() != psutil.STATUS_STOPPED:  # noqa: ASYNC110  (another process)
                await asyncio.sleep(0.01)
        assert [fault.description for fault in response.faults] == ["application stopped"]
        assert 0 < response.faults[0].end_time.ToSeconds() - time.time() <= 31
    await _goes_on(pid)
    async with mesh.control() as stub:
        request = pb.InjectFaultRequest(target="echo-v2", duration=duration(0.2), process=pb.ProcessFault(stop=True))
        await stub.InjectFault(request)
        async with asyncio.timeout(10):
            while (await stub.ListFaults(pb.ListFaultsRequest())).faults:  # noqa: ASYNC110  (another process)
                await asyncio.sleep(0.05)
    await _goes_on(pid)
    await acknowledged(mesh)


async def test_connections_are_slowed_and_cut_below_tls(mesh: RunningMesh) -> None:
    async with mesh.echo() as stub, injected(mesh, "echo-v1", network=pb.NetworkFault(delay=duration(0.15))):
        await acknowledged(mesh)
        # Open connections go on without the proxy: a new host of the cluster is connected to anew.
        started = time.monotonic()
        assert (await answer(stub))["identity"] == "spiffe://cluster.local/ns/mlmesh/sa/operator"
        assert time.monotonic() - started >= 0.3
        async with mesh.control() as control:
            (first, second) = (await control.ListFaults(pb.ListFaultsRequest())).faults
            assert {first.instance, second.instance} == {"echo-v1-0", "echo-v1-1"}
            assert first.description == second.description == "delay 150 ms"
            assert first.connections + second.connections >= 1
            request = pb.InjectFaultRequest(target="echo-v1", network=pb.NetworkFault(cut=True))
            await control.InjectFault(request)
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await answer(stub)
        assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
    await acknowledged(mesh)
    async with mesh.echo() as stub:
        assert (await answer(stub))["pod"].startswith("echo-v1-")


async def test_an_open_stream_that_began_under_watch_is_cut_by_corruption(mesh: RunningMesh) -> None:
    async with injected(mesh, "echo-v1", network=pb.NetworkFault()) as response, mesh.echo() as stub:
        assert {fault.description for fault in response.faults} == {"watched"}
        await acknowledged(mesh)
        call = stub.Chat(timeout=20)
        await call.write(Text(text="one"))
        await call.read()
        async with mesh.control() as control:
            request = pb.InjectFaultRequest(target="echo-v1", network=pb.NetworkFault(corrupt_percent=100))
            await control.InjectFault(request)
        # TLS notices the bit that was turned over; nobody takes it for an answer.
        with pytest.raises(grpc.aio.AioRpcError) as broken:
            await _talk_for_ever(call)
        assert broken.value.code() in {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.INTERNAL}
    await acknowledged(mesh)


async def _talk_for_ever(call: Any) -> None:
    async with asyncio.timeout(10):
        while True:
            await call.write(Text(text="two"))
            assert await call.read() is not grpc.aio.EOF


async def test_what_cannot_be_disturbed_is_refused(mesh: RunningMesh) -> None:
    async with mesh.control() as stub:
        for request, code in (
            (pb.InjectFaultRequest(target="nobody", process=pb.ProcessFault()), grpc.StatusCode.NOT_FOUND),
            (
                pb.InjectFaultRequest(target="ingressgateway", network=pb.NetworkFault()),
                grpc.StatusCode.INVALID_ARGUMENT,
            ),
            (pb.InjectFaultRequest(target="echo-v1"), grpc.StatusCode.INVALID_ARGUMENT),
            (
                pb.InjectFaultRequest(target="ingressgateway", process=pb.ProcessFault()),
                grpc.StatusCode.FAILED_PRECONDITION,
            ),
        ):
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await stub.InjectFault(request)
            assert refused.value.code() is code


async def test_faults_that_istio_has_a_word_for_come_by_its_yaml_and_are_taken_back(mesh: RunningMesh) -> None:
    async with mesh.control() as control, mesh.echo() as stub:
        before = {each.name: each.text for each in await virtual_services(control)}
        fault = RouteFault(grpc_status="RESOURCE_EXHAUSTED", headers={"x-user": "ada"})
        texts = prepared(await virtual_services(control), ECHO, fault)
        assert list(texts) == ["mlmesh/echo"]
        await inject(control, texts)
        try:
            assert (await answer(stub))["pod"].startswith("echo-v1-")
            with pytest.raises(grpc.aio.AioRpcError) as aborted:
                await answer(stub, metadata=(("x-user", "ada"),))
            assert aborted.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            # Another replaces it, and still knows what was there before both.
            slower = prepared(await virtual_services(control), ECHO, RouteFault(delay_s=0.2))
            await inject(control, slower)
            started = time.monotonic()
            await answer(stub, metadata=(("x-user", "ada"),))
            assert time.monotonic() - started >= 0.19
        finally:
            assert await restore(control) == ["mlmesh/echo"]
        assert {each.name: each.text for each in await virtual_services(control)} == before
        assert (await answer(stub, metadata=(("x-user", "ada"),)))["pod"].startswith("echo-v1-")


async def test_a_host_without_rules_gets_one_that_goes_again(mesh: RunningMesh) -> None:
    entry = """
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {name: other, namespace: mlmesh}
spec:
  hosts: [other.example]
  ports: [{number: 9000, name: grpc, protocol: GRPC}]
  resolution: STATIC
  endpoints: [{address: 127.0.0.1}]
"""
    await mesh.apply(entry)
    async with mesh.control() as control:
        texts = prepared(await virtual_services(control), "other.example", RouteFault(http_status=503))
        assert list(texts) == ["mlmesh/other-chaos"]
        await inject(control, texts)
        assert await restore(control) == ["mlmesh/other-chaos"]
        assert [each.name for each in await virtual_services(control)] == ["mlmesh/echo"]
        request = pb.DeleteResourcesRequest()
        request.resources.add(kind="ServiceEntry", name="other")
        await control.DeleteResources(request)


async def test_resources_are_deleted_everywhere_or_nowhere(mesh: RunningMesh) -> None:
    policy = """
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: closed, namespace: mlmesh}
spec: {}
"""
    await mesh.apply(policy)
    async with mesh.control() as control, mesh.echo() as stub:
        with pytest.raises(grpc.aio.AioRpcError) as denied:
            await answer(stub)
        assert denied.value.code() is grpc.StatusCode.PERMISSION_DENIED
        request = pb.DeleteResourcesRequest()
        request.resources.add(kind="AuthorizationPolicy", name="closed")
        dry = pb.DeleteResourcesRequest(dry_run=True, resources=request.resources)
        assert [change.action for change in (await control.DeleteResources(dry)).changes] == ["deleted"]
        response = await control.DeleteResources(request)
        assert [change.action for change in response.changes] == ["deleted"]
        assert response.acked_sidecars == response.connected_sidecars == 5
        assert (await answer(stub))["pod"].startswith("echo-v1-")
        with pytest.raises(grpc.aio.AioRpcError) as missing:
            await control.DeleteResources(request)
        assert missing.value.code() is grpc.StatusCode.NOT_FOUND
        request.allow_missing = True
        assert [change.action for change in (await control.DeleteResources(request)).changes] == ["missing"]
        # The VirtualService needs its subsets.
        needed = pb.DeleteResourcesRequest()
        needed.resources.add(kind="DestinationRule", name="mlmesh/echo")
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await control.DeleteResources(needed)
        assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert "subset" in (refused.value.details() or "")
