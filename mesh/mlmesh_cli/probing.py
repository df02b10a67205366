"""What a running mesh tells of itself: services by reflection and channelz, Envoys by their admin interfaces."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import grpc
from google.protobuf import descriptor_pb2
from google.protobuf.descriptor_pool import DescriptorPool

from mlmesh.local.v1 import local_pb2, local_pb2_grpc
from mlmesh_cli.configurations import summaries
from mlmesh_local.live.facts import STATS, Certified, Configured, Facts, Socket, counters
from mlmesh_local.model import World
from mlmesh_local.sidecar import admin
from mlmesh_runtime.errors import NotReady

ASK_S = 3.0
SOCKETS_MAX = 100
_INTERNAL = ("grpc.health.", "grpc.reflection.", "grpc.channelz.")


def known_streams() -> frozenset[str]:
    """Streaming methods of the platform's own services, "/package.Service/Method"."""
    from mlmesh.inference.v1 import control_pb2  # noqa: PLC0415  only `mlmesh doctor` needs them all
    from mlmesh.registry.v1 import registry_pb2  # noqa: PLC0415
    from mlmesh.training.v1 import training_pb2  # noqa: PLC0415
    from open_inference import grpc_service_pb2  # noqa: PLC0415

    files = (control_pb2, registry_pb2, training_pb2, grpc_service_pb2)
    services = [service for file in files for service in file.DESCRIPTOR.services_by_name.values()]
    return frozenset(path for path, streams in _methods(services) if streams)


def _methods(services: Iterable[Any]) -> Iterator[tuple[str, bool]]:
    for service in services:
        for method in service.methods:
            streams = method.client_streaming or method.server_streaming
            yield f"/{service.full_name}/{method.name}", bool(streams)


async def probe(control: local_pb2_grpc.LocalMeshServiceAsyncStub, status: local_pb2.MeshStatus, world: World) -> Facts:
    """Ask everybody, each for at most `ASK_S` seconds; who does not answer is named."""
    told = await summaries(control)
    asked = [one for one in status.instances if one.application_address]
    methods, sockets, unasked = await _applications(asked, world)
    figures: dict[str, dict[str, int]] = {}
    for one in told:
        host = one.message.admin_address.rpartition(":")[0]
        try:
            figures[one.name] = counters(await admin(host, STATS, timeout_s=ASK_S)) if host else {}
        except (NotReady, ValueError) as error:
            unasked.append(f"{one.name}: its Envoy could not be asked: {error}")
    return Facts(
        methods=methods,
        certificates=tuple(
            Certified(
                instance=one.name,
                expires_s=float(one.certificate_expire_time.seconds),
                begins_s=float(one.certificate_begin_time.seconds),
            )
            for one in status.instances
            if one.certificate_expire_time.seconds
        ),
        authority_expires_s=float(status.ca_expire_time.seconds),
        configured=tuple(
            Configured(
                instance=one.name,
                connected=one.message.connected,
                acked=one.message.version == one.message.acked_version,
                rejection=one.message.rejection,
            )
            for one in told
        ),
        counters=figures,
        sockets=tuple(sockets),
        unasked=tuple(unasked),
    )


async def _applications(
    instances: Iterable[local_pb2.Instance], world: World
) -> tuple[dict[str, dict[str, bool]], list[Socket], list[str]]:
    hosts: dict[str, set[str]] = {}
    for endpoint in world.endpoints:
        hosts.setdefault(endpoint.instance, set()).add(endpoint.host)
    methods: dict[str, dict[str, bool]] = {}
    sockets: list[Socket] = []
    unasked: list[str] = []
    for one in instances:
        async with grpc.aio.insecure_channel(one.application_address) as channel:
            try:
                found = await _reflected(channel)
            except (grpc.aio.AioRpcError, TimeoutError) as error:
                reason = error.code().name if isinstance(error, grpc.aio.AioRpcError) else "no answer in time"
                unasked.append(f"{one.name}: reflection: {reason}")
                continue
            for host in hosts.get(one.name, ()):
                methods.setdefault(host, {}).update(found)
            sockets += await _sockets(channel, one.name)
    return methods, sockets, unasked


async def _reflected(channel: grpc.aio.Channel) -> dict[str, bool]:
    """Methods of every service of a server, and whether they stream."""
    from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc  # noqa: PLC0415

    stub = reflection_pb2_grpc.ServerReflectionStub(channel)
    pool = DescriptorPool()
    files: dict[str, descriptor_pb2.FileDescriptorProto] = {}
    async with asyncio.timeout(ASK_S):
        call = stub.ServerReflectionInfo()
        await call.write(reflection_pb2.ServerReflectionRequest(list_services=""))
        names = [one.name for one in (await call.read()).list_services_response.service]
        for name in names:
            await call.write(reflection_pb2.ServerReflectionRequest(file_containing_symbol=name))
            answer = await call.read()
            for content in answer.file_descriptor_response.file_descriptor_proto:
                file = descriptor_pb2.FileDescriptorProto.FromString(content)
                files[file.name] = file
        await call.done_writing()
    for file in files.values():
        _add(pool, file, files)
    return dict(_methods(_services(pool, names)))


def _services(pool: DescriptorPool, names: Iterable[str]) -> Iterator[Any]:
    for name in names:
        # A server may list what it cannot describe.
        with contextlib.suppress(KeyError):
            if not name.startswith(_INTERNAL):
                yield pool.FindServiceByName(name)


def _add(pool: DescriptorPool, file: Any, files: dict[str, Any]) -> None:
    """A file after those that it needs; what the server did not send is taken from this process."""
    try:
        pool.FindFileByName(file.name)
    except KeyError:
        for needed in file.dependency:
            if needed in files:
                _add(pool, files[needed], files)
            else:
                _add(pool, _own(needed), files)
        pool.Add(file)


def _own(name: str) -> descriptor_pb2.FileDescriptorProto:
    from google.protobuf import descriptor_pool  # noqa: PLC0415

    found = descriptor_pb2.FileDescriptorProto()
    descriptor_pool.Default().FindFileByName(name).CopyToProto(found)
    return found


async def _sockets(channel: grpc.aio.Channel, instance: str) -> list[Socket]:
    """Connections of a server, where it tells of them by channelz."""
    from mlmesh_cli.channelz import sockets  # noqa: PLC0415

    try:
        async with asyncio.timeout(ASK_S):
            return await sockets(channel, instance, most=SOCKETS_MAX)
    except (grpc.aio.AioRpcError, TimeoutError):
        # Most servers do not serve it.
        return []
