"""grpc.health.v1: what may be called, per service and per model version.

`HealthStatuses` is the state, `HealthServicer` the protocol. Names are "" (the whole server), a service's full name,
or a name of one's own such as "model:mnist" and "model:mnist/3".
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from typing import Any

import grpc
from google.protobuf import descriptor_pb2, message_factory
from google.protobuf.descriptor_pool import DescriptorPool
from grpc_health.v1 import health_pb2

from mlmesh_runtime.errors import InvalidInput, NotFound, NotReady, Overloaded

SERVICE = "grpc.health.v1.Health"
UNKNOWN, SERVING, NOT_SERVING, SERVICE_UNKNOWN = range(4)
NAMES_MAX = 10_000
NAME_CHARS_MAX = 512


class HealthStatuses:
    """Which names are being served; every change wakes the watchers. Belongs to one event loop."""

    def __init__(self) -> None:
        self._serving: dict[str, bool] = {}
        self._draining = False
        self._closed = False
        self._watchers: dict[asyncio.Event, str] = {}

    def set(self, name: str, serving: bool) -> None:
        """Say whether `name` may be called. While draining everything stays NOT_SERVING, whatever is said."""
        if name not in self._serving and len(self._serving) >= NAMES_MAX:
            raise Overloaded(f"more than {NAMES_MAX} health names", reason="TOO_MANY_HEALTH_NAMES")
        if self._serving.get(name) != serving:
            self._serving[name] = serving
            self._wake(name)

    def remove(self, name: str) -> None:
        """Forget a name (an unloaded model version): unknown from now on. Unknown names are ignored."""
        if self._serving.pop(name, None) is not None:
            self._wake(name)

    def status(self, name: str) -> int:
        """The wire value: SERVING, NOT_SERVING, or SERVICE_UNKNOWN for a name never set."""
        serving = self._serving.get(name)
        if serving is None:
            return SERVICE_UNKNOWN
        return SERVING if serving and not self._draining else NOT_SERVING

    def all(self) -> Mapping[str, int]:
        """Every known name and its status."""
        return {name: self.status(name) for name in self._serving}

    def drain(self) -> None:
        """Everything is NOT_SERVING from now on; there is no way back."""
        if not self._draining:
            self._draining = True
            for changed in self._watchers:
                changed.set()

    def close(self) -> None:
        """End the watchers, so that they do not hold up the server's stop."""
        self._closed = True
        for changed in self._watchers:
            changed.set()

    async def watch(self, name: str, *, watchers_max: int = 200) -> AsyncIterator[int]:
        """The status now, then each change (a slow reader sees the latest, not every one). Ends when closed."""
        if len(self._watchers) >= watchers_max:
            raise Overloaded(f"{watchers_max} health watchers already", reason="TOO_MANY_WATCHERS")
        changed = asyncio.Event()
        self._watchers[changed] = name
        try:
            told: int | None = None
            while True:
                changed.clear()
                if (status := self.status(name)) != told:
                    told = status
                    yield status
                elif self._closed:
                    return
                else:
                    await changed.wait()
        finally:
            del self._watchers[changed]

    def _wake(self, name: str) -> None:
        for changed, watched in self._watchers.items():
            if watched == name:
                changed.set()


def _file() -> Any:
    """The service's file: the installed one, plus List where that is older than List (new in 2025)."""
    proto = descriptor_pb2.FileDescriptorProto()
    health_pb2.DESCRIPTOR.CopyToProto(proto)
    proto.name = "grpc/health/v1/health.proto"
    if not any(method.name == "List" for method in proto.service[0].method):
        proto.message_type.add(name="HealthListRequest")
        response = proto.message_type.add(name="HealthListResponse")
        entry = response.nested_type.add(name="StatusesEntry")
        entry.options.map_entry = True
        text, message = (
            descriptor_pb2.FieldDescriptorProto.TYPE_STRING,
            descriptor_pb2.FieldDescriptorProto.TYPE_MESSAGE,
        )
        one, many = (
            descriptor_pb2.FieldDescriptorProto.LABEL_OPTIONAL,
            descriptor_pb2.FieldDescriptorProto.LABEL_REPEATED,
        )
        entry.field.add(name="key", number=1, type=text, label=one)
        value_type = ".grpc.health.v1.HealthCheckResponse"
        entry.field.add(name="value", number=2, type=message, label=one, type_name=value_type)
        entry_type = ".grpc.health.v1.HealthListResponse.StatusesEntry"
        response.field.add(name="statuses", number=1, type=message, label=many, type_name=entry_type)
        proto.service[0].method.add(
            name="List",
            input_type=".grpc.health.v1.HealthListRequest",
            output_type=".grpc.health.v1.HealthListResponse",
        )
    pool = DescriptorPool()
    pool.Add(proto)
    return pool.FindFileByName(proto.name)


FILE = _file()
DESCRIPTOR = FILE.services_by_name["Health"]


def _message(name: str) -> Any:
    return message_factory.GetMessageClass(FILE.message_types_by_name[name])


CheckRequest = _message("HealthCheckRequest")
CheckResponse = _message("HealthCheckResponse")
ListRequest = _message("HealthListRequest")
ListResponse = _message("HealthListResponse")


class HealthServicer:
    """grpc.health.v1.Health over `HealthStatuses`."""

    def __init__(self, statuses: HealthStatuses, *, watchers_max: int = 200) -> None:
        self._statuses = statuses
        self._watchers_max = watchers_max

    async def Check(self, request: Any, _context: Any) -> Any:
        """The status of one name; NOT_FOUND (HEALTH_NAME_UNKNOWN) when it was never set."""
        status = self._statuses.status(_checked(request.service))
        if status == SERVICE_UNKNOWN:
            raise NotFound(f"no health name {request.service!r}", reason="HEALTH_NAME_UNKNOWN")
        return CheckResponse(status=status)

    async def Watch(self, request: Any, _context: Any) -> AsyncIterator[Any]:
        """The status of one name and its changes; UNAVAILABLE when the server goes away."""
        async for status in self._statuses.watch(_checked(request.service), watchers_max=self._watchers_max):
            yield CheckResponse(status=status)
        raise NotReady("the server is going away", reason="DRAINING")

    async def List(self, _request: Any, _context: Any) -> Any:
        """Every name and its status."""
        return ListResponse(
            statuses={name: CheckResponse(status=status) for name, status in self._statuses.all().items()}
        )


def _checked(name: str) -> str:
    if len(name) > NAME_CHARS_MAX:
        raise InvalidInput(f"service: at most {NAME_CHARS_MAX} characters; got {len(name)}", field="service")
    return name


def add_to_server(servicer: HealthServicer, server: Any) -> None:
    """Register the service, as a generated `add_…_to_server` would."""
    handlers = {
        "Check": grpc.unary_unary_rpc_method_handler(
            servicer.Check, CheckRequest.FromString, CheckResponse.SerializeToString
        ),
        "Watch": grpc.unary_stream_rpc_method_handler(
            servicer.Watch, CheckRequest.FromString, CheckResponse.SerializeToString
        ),
        "List": grpc.unary_unary_rpc_method_handler(
            servicer.List, ListRequest.FromString, ListResponse.SerializeToString
        ),
    }
    server.add_registered_method_handlers(SERVICE, handlers)
