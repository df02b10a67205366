"""Health and reflection, with the stubs that others use for them."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from google.protobuf import descriptor_pb2
from google.protobuf.descriptor_pool import DescriptorPool
from grpc_channelz.v1 import channelz_pb2, channelz_pb2_grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

import open_inference.grpc_service_pb2 as oip
from mlmesh.registry.v1 import registry_pb2, registry_pb2_grpc
from mlmesh_runtime import health
from mlmesh_runtime.channel import mesh_error, open_channel
from mlmesh_runtime.limits import Limits
from mlmesh_runtime.reflection import DescriptorIndex, Protocol
from mlmesh_runtime.server import Service
from tests.support.echo import EchoServicer, Protos, echo_service
from tests.support.server import serving

pytestmark = pytest.mark.usefixtures("each_transport")

SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING


async def test_health_check_by_service_and_model_version() -> None:
    async with serving(echo_service()) as server, grpc.aio.insecure_channel(server.address) as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)  # the stub of grpcio-health-checking, and no deadline
        server.health.set("model:mnist/3", False)
        for name, status in (("", SERVING), ("test.echo.Echo", SERVING), ("model:mnist/3", NOT_SERVING)):
            assert (await stub.Check(health_pb2.HealthCheckRequest(service=name))).status == status
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.Check(health_pb2.HealthCheckRequest(service="model:none"))
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND
        assert mesh_error(caught.value).reason == "HEALTH_NAME_UNKNOWN"


async def test_health_watch_follows_and_ends_with_the_server() -> None:
    async with serving(echo_service()) as server, grpc.aio.insecure_channel(server.address) as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)
        watch = stub.Watch(health_pb2.HealthCheckRequest(service="model:mnist/3"))
        seen = [(await watch.read()).status]
        for serving_now in (True, False):
            server.health.set("model:mnist/3", serving_now)
            seen.append((await watch.read()).status)
        assert seen == [health_pb2.HealthCheckResponse.SERVICE_UNKNOWN, SERVING, NOT_SERVING]
        server.health.set("model:mnist/3", True)
        assert (await watch.read()).status == SERVING
        async with asyncio.timeout(20), asyncio.TaskGroup() as group:
            group.create_task(server.stop(grace_s=30))
            assert (await watch.read()).status == NOT_SERVING
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await watch.read()
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


async def test_channelz_tells_of_connections_only_where_it_is_asked_for() -> None:
    for asked in (False, True):
        settings = {"channelz": asked, "transport": "grpcio"}
        async with serving(echo_service(), **settings) as server, grpc.aio.insecure_channel(server.address) as channel:
            stub: Any = channelz_pb2_grpc.ChannelzStub(channel)
            if not asked:
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await stub.GetServers(channelz_pb2.GetServersRequest())
                assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
                continue
            # The client's own channel is in this process, too.
            channels = (await stub.GetTopChannels(channelz_pb2.GetTopChannelsRequest())).channel
            connected = next(one for one in channels if one.subchannel_ref)
            top = await stub.GetChannel(channelz_pb2.GetChannelRequest(channel_id=connected.ref.channel_id))
            reference = top.channel.subchannel_ref[0].subchannel_id
            part = await stub.GetSubchannel(channelz_pb2.GetSubchannelRequest(subchannel_id=reference))
            assert part.subchannel.ref.subchannel_id == reference
            found = await _connections(stub)
            assert max(one.data.streams_started for one in found) >= 3
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stub.GetSocket(channelz_pb2.GetSocketRequest(socket_id=1 << 40))
            assert caught.value.code() is grpc.StatusCode.NOT_FOUND


async def _connections(stub: Any) -> list[Any]:
    """Sockets of all servers of this process."""
    found: list[Any] = []
    for server in (await stub.GetServers(channelz_pb2.GetServersRequest())).server:
        one = await stub.GetServer(channelz_pb2.GetServerRequest(server_id=server.ref.server_id))
        assert one.server.ref == server.ref
        request = channelz_pb2.GetServerSocketsRequest(server_id=server.ref.server_id)
        for reference in (await stub.GetServerSockets(request)).socket_ref:
            asked = channelz_pb2.GetSocketRequest(socket_id=reference.socket_id)
            found.append((await stub.GetSocket(asked)).socket)
    return found


async def test_health_list() -> None:
    async with serving(echo_service()) as server, grpc.aio.insecure_channel(server.address) as channel:
        server.health.set("model:mnist/3", False)
        call = channel.unary_unary(
            "/grpc.health.v1.Health/List",
            request_serializer=health.ListRequest.SerializeToString,
            response_deserializer=health.ListResponse.FromString,
        )
        listed = await call(health.ListRequest())
    assert {name: status.status for name, status in listed.statuses.items()} == {
        "": SERVING,
        "test.echo.Echo": SERVING,
        "model:mnist/3": NOT_SERVING,
    }


async def test_health_watchers_are_bounded_and_names_checked() -> None:
    async with (
        serving(limits=Limits(watchers_max=1)) as server,
        grpc.aio.insecure_channel(server.address) as channel,
    ):
        stub: Any = health_pb2_grpc.HealthStub(channel)
        first = stub.Watch(health_pb2.HealthCheckRequest())
        await first.read()
        second = stub.Watch(health_pb2.HealthCheckRequest())
        assert await second.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.Check(health_pb2.HealthCheckRequest(service="x" * 10_000))
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


def registry_service() -> Service:
    return Service(
        add=registry_pb2_grpc.add_ModelRegistryServiceServicer_to_server,
        servicer=registry_pb2_grpc.ModelRegistryServiceServicer(),
        descriptor=registry_pb2.DESCRIPTOR.services_by_name["ModelRegistryService"],
    )


def oip_service() -> Service:
    from open_inference import grpc_service_pb2_grpc  # the private pool's stubs

    return Service(
        add=grpc_service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server,
        servicer=grpc_service_pb2_grpc.GRPCInferenceServiceServicer(),
        descriptor=oip.DESCRIPTOR.services_by_name["GRPCInferenceService"],
        validate=False,
    )


class Reflection:
    """A client of one version of the protocol."""

    def __init__(self, channel: Any, version: str) -> None:
        self._protocol = Protocol(version)
        self._call = channel.stream_stream(
            f"/{self._protocol.descriptor.full_name}/ServerReflectionInfo",
            request_serializer=self._protocol.request.SerializeToString,
            response_deserializer=self._protocol.response.FromString,
        )

    async def ask(self, **request: Any) -> Any:
        async def one() -> AsyncIterator[Any]:
            yield self._protocol.request(**request)

        answers = [answer async for answer in self._call(one())]
        assert len(answers) == 1
        return answers[0]

    async def services(self) -> list[str]:
        answer = await self.ask(list_services="")
        return [service.name for service in answer.list_services_response.service]

    async def pool(self, symbol: str) -> DescriptorPool:
        """What a client such as grpcurl builds out of the files of one symbol: they must be complete."""
        answer = await self.ask(file_containing_symbol=symbol)
        assert not answer.HasField("error_response"), answer.error_response.error_message
        files = {}
        for raw in answer.file_descriptor_response.file_descriptor_proto:
            file = descriptor_pb2.FileDescriptorProto.FromString(raw)
            files[file.name] = file
        pool = DescriptorPool()
        added: set[str] = set()

        def add(name: str) -> None:
            if name not in added:
                added.add(name)
                for dependency in files[name].dependency:
                    add(dependency)
                pool.Add(files[name])

        for name in files:
            add(name)
        return pool


@pytest.mark.parametrize("version", ["v1", "v1alpha"])
async def test_reflection_tells_everything_that_is_served(version: str) -> None:
    services = [registry_service(), oip_service(), echo_service()]
    async with serving(*services) as server, grpc.aio.insecure_channel(server.address) as channel:
        reflection = Reflection(channel, version)
        assert await reflection.services() == [
            "grpc.health.v1.Health",
            "grpc.reflection.v1.ServerReflection",
            "grpc.reflection.v1alpha.ServerReflection",
            "inference.GRPCInferenceService",
            "mlmesh.registry.v1.ModelRegistryService",
            "test.echo.Echo",
        ]
        for name in await reflection.services():
            pool = await reflection.pool(name)
            described = pool.FindServiceByName(name)
            assert described.methods
        pool = await reflection.pool("inference.ModelInferRequest.InferInputTensor")
        assert pool.FindMessageTypeByName("inference.ModelInferRequest").fields_by_name["raw_input_contents"]
        pool = await reflection.pool("grpc.health.v1.Health.List")
        assert pool.FindMethodByName("grpc.health.v1.Health.List").output_type.name == "HealthListResponse"


async def test_the_stock_v1alpha_client_understands() -> None:
    async def ask() -> AsyncIterator[Any]:
        yield reflection_pb2.ServerReflectionRequest(file_by_filename="mlmesh/registry/v1/registry.proto", host="h")

    async with serving(registry_service()) as server, grpc.aio.insecure_channel(server.address) as channel:
        stub: Any = reflection_pb2_grpc.ServerReflectionStub(channel)
        answers = [answer async for answer in stub.ServerReflectionInfo(ask())]
    assert answers[0].valid_host == "h"
    assert answers[0].original_request.file_by_filename == "mlmesh/registry/v1/registry.proto"
    assert len(answers[0].file_descriptor_response.file_descriptor_proto) >= 3


async def test_extensions_and_unknown_names() -> None:
    async with serving(registry_service()) as server, grpc.aio.insecure_channel(server.address) as channel:
        reflection = Reflection(channel, "v1")
        answer = await reflection.ask(all_extension_numbers_of_type="google.protobuf.FieldOptions")
        assert list(answer.all_extension_numbers_response.extension_number) == [1159, 1160]  # buf.validate
        answer = await reflection.ask(
            file_containing_extension={"containing_type": "google.protobuf.FieldOptions", "extension_number": 1159}
        )
        assert answer.file_descriptor_response.file_descriptor_proto
        for unknown in (
            {"file_by_filename": "no.proto"},
            {"file_containing_symbol": "no.Such"},
            {"all_extension_numbers_of_type": "no.Such"},
            {"file_containing_extension": {"containing_type": "no.Such", "extension_number": 1}},
        ):
            assert (await reflection.ask(**unknown)).error_response.error_code == 5
        assert (await reflection.ask()).error_response.error_code == 3


def test_two_pools_may_define_the_same_names() -> None:
    one, other = Protos("same.package"), Protos("same.package", extra_field="more")
    index = DescriptorIndex([one.service, other.service])
    assert index.services == ("same.package.Echo", "same.package.Echo")
    files = index.file_with_symbol("same.package.Text.count")
    assert files is not None
    file = descriptor_pb2.FileDescriptorProto.FromString(files[0])
    assert [field.name for field in file.message_type[0].field] == ["text", "count", "data"]  # the first stays


def test_symbols_of_every_sort_are_found() -> None:
    index = DescriptorIndex([registry_service().descriptor, oip_service().descriptor])
    for symbol in (
        "mlmesh.registry.v1.ModelRegistryService",
        "mlmesh.registry.v1.ModelRegistryService.WatchModels",
        "mlmesh.registry.v1.Model",
        "mlmesh.registry.v1.Model.name",
        "mlmesh.registry.v1.Model.LabelsEntry.key",
        "google.protobuf.Timestamp",
        "google.protobuf.FieldDescriptorProto.TYPE_INT32",
        "buf.validate.field",
        "inference.InferParameter.parameter_choice",
        ".inference.ServerLiveRequest",
    ):
        assert index.file_with_symbol(symbol) is not None, symbol


async def test_a_service_must_be_what_its_descriptor_says() -> None:
    wrong = Service(
        add=Protos("other.package").add, servicer=EchoServicer(), descriptor=Protos().service, validate=False
    )
    with pytest.raises(ValueError, match=r"not test\.echo\.Echo"):
        async with serving(wrong):
            pass
    with pytest.raises(ValueError, match="has no method"):
        async with serving(echo_service(deadline_exempt={"Wach"})):
            pass
    async with serving(echo_service(deadline_optional={"Unary"})) as server, open_channel(server.address):
        pass
