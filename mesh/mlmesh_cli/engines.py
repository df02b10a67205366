"""Engines of inference processes: which there are, building them, and the operations that do. Each has its own."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any, Self
from uuid import uuid4

import grpc
from google.longrunning import operations_pb2 as ops
from google.protobuf.empty_pb2 import Empty

from mlmesh.inference.v1 import control_pb2 as pb
from mlmesh.inference.v1 import control_pb2_grpc as stubs
from mlmesh_cli.connection import SERVICE_DEADLINE_S, Connection, duration
from mlmesh_cli.errors import CliError, rpc_failure
from mlmesh_cli.moving import processes_of
from mlmesh_cli.names import ModelReference

LOOK_S = 0.4
"""How often, at least, the state of a build is looked at."""
_PAGE_SIZE = 200


@dataclass(frozen=True, slots=True, kw_only=True)
class Build:
    """An operation and the process that it is of."""

    process: str
    operation: ops.Operation

    @property
    def metadata(self) -> pb.EngineBuildMetadata:
        """How far it is."""
        found = pb.EngineBuildMetadata()
        self.operation.metadata.Unpack(found)
        return found

    @property
    def result(self) -> pb.EngineBuild | None:
        """What was built, None while there is nothing."""
        found = pb.EngineBuild()
        return found if self.operation.response.Unpack(found) else None

    @property
    def state(self) -> str:
        """One word for a person."""
        if not self.operation.done:
            return "cancelling" if self.metadata.cancel_requested else "building"
        if self.operation.HasField("error"):
            return "cancelled" if self.operation.error.code == grpc.StatusCode.CANCELLED.value[0] else "failed"
        return "done"


class Process:
    """One inference process."""

    def __init__(self, name: str, channel: grpc.aio.Channel) -> None:
        self.name = name
        self._channel = channel
        self._control: Any = stubs.InferenceControlServiceStub(channel)

    async def engines(self) -> Sequence[pb.Engine]:
        """Engines in the order of preference."""
        listed: pb.ListEnginesResponse = await self._control.ListEngines(
            pb.ListEnginesRequest(), timeout=SERVICE_DEADLINE_S
        )
        return listed.engines

    async def versions(self, model: str = "") -> Sequence[pb.ServedVersion]:
        """Versions that it knows, of one model or of all."""
        request = pb.ListServedVersionsRequest(parent=f"models/{model}" if model else "")
        listed: pb.ListServedVersionsResponse = await self._control.ListServedVersions(
            request, timeout=SERVICE_DEADLINE_S
        )
        return listed.served_versions

    async def build(self, version: str, engine: str, *, build_only: bool) -> Build:
        """Begin a build, or join the one under way."""
        request = pb.BuildEngineRequest(name=version, engine=engine, request_id=uuid4().hex, build_only=build_only)
        return self._build(await self._control.BuildEngine(request, timeout=SERVICE_DEADLINE_S))

    async def follow(self, name: str, look_s: float = LOOK_S) -> AsyncIterator[Build]:
        """A build as it is, again and again until it has ended."""
        request = ops.WaitOperationRequest(name=name, timeout=duration(look_s))
        while True:
            build = self._build(await self._call("WaitOperation", request, ops.Operation))
            yield build
            if build.operation.done:
                return

    async def operations(self, filter: str = "") -> list[Build]:  # noqa: A002  the field's own name
        """Builds, newest first."""
        request = ops.ListOperationsRequest(name="operations", filter=filter, page_size=_PAGE_SIZE)
        page = await self._call("ListOperations", request, ops.ListOperationsResponse)
        return [self._build(each) for each in page.operations]

    async def cancel(self, name: str) -> bool:
        """Ask to stop a build; whether it is this process's."""
        try:
            await self._call("CancelOperation", ops.CancelOperationRequest(name=name), Empty)
        except grpc.aio.AioRpcError as error:
            if rpc_failure(error).reason != "BUILD_NOT_FOUND":
                raise
            return False
        return True

    async def _call(self, name: str, request: Any, response: Any) -> Any:
        call = self._channel.unary_unary(
            f"/google.longrunning.Operations/{name}",
            request_serializer=type(request).SerializeToString,
            response_deserializer=response.FromString,
        )
        return await call(request, timeout=SERVICE_DEADLINE_S)

    def _build(self, operation: ops.Operation) -> Build:
        return Build(process=self.name, operation=operation)


class Processes:
    """The inference processes of the mesh, or at some addresses, each dialed by itself: builds are each one's own."""

    def __init__(self, connection: Connection, addresses: Sequence[str] = ()) -> None:
        self._connection = connection
        self._addresses = addresses
        self._stack = AsyncExitStack()
        self.all: list[Process] = []

    async def __aenter__(self) -> Self:
        for found in await processes_of(self._connection, self._addresses):
            channel = await self._stack.enter_async_context(grpc.aio.insecure_channel(found.address))
            self.all.append(Process(found.name, channel))
        if not self.all:
            raise CliError("no inference process is ready", "`mlmesh status` shows why", reason="NOT_READY")
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()

    async def serving(self, reference: ModelReference) -> list[tuple[Process, str]]:
        """Processes that serve a version, and its name there; a model alone is its default version.

        Raises CliError when none does.
        """
        found = []
        for process in self.all:
            name = _named(await process.versions(reference.model), reference)
            if name:
                found.append((process, name))
        if not found:
            raise CliError(
                f"no inference process serves {reference.model}",
                "`mlmesh engines list` shows what is served",
                reason="MODEL_NOT_FOUND",
            )
        return found

    async def built(
        self,
        wanted: Sequence[tuple[Process, str]],
        engine: str,
        *,
        build_only: bool,
        wait: bool,
        told: Callable[[Build], None],
    ) -> list[Build]:
        """Build on each of the processes, at the same time; `told` sees every step."""

        async def one(process: Process, version: str) -> Build:
            build = await process.build(version, engine, build_only=build_only)
            told(build)
            if wait:
                async for now in process.follow(build.operation.name):
                    build = now
                    told(build)
            return build

        return list(await asyncio.gather(*(one(process, version) for process, version in wanted)))

    async def cancel(self, name: str) -> None:
        """Ask to stop a build, wherever it is. Raises CliError when no process knows it."""
        for process in self.all:
            if await process.cancel(name):
                return
        raise CliError(f"{name} is not known to any inference process", HINT, reason="BUILD_NOT_FOUND")


HINT = "`mlmesh engines operations` shows the builds"


def operation_name(text: str) -> str:
    """An operation's name from what a person typed: with or without "operations/"."""
    return text if text.startswith("operations/") else f"operations/{text}"


def _named(versions: Sequence[pb.ServedVersion], reference: ModelReference) -> str:
    ready = [version for version in versions if version.state == pb.SERVED_STATE_READY]
    if reference.version:
        wanted = f"models/{reference.model}/versions/{reference.version}"
        return next((version.name for version in ready if version.name == wanted), "")
    return next((version.name for version in ready if version.default_version), "")
