"""A tiny service with all four kinds of RPC, its protos made here: one copy per descriptor pool.

Messages are ``Text {string text = 1; int32 count = 2; bytes data = 3;}``.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
from google.protobuf import descriptor_pb2, message_factory
from google.protobuf.descriptor_pool import DescriptorPool

from mlmesh_runtime.server import Service


class Protos:
    """The service's descriptors and message in a pool of their own."""

    def __init__(self, package: str = "test.echo", *, extra_field: str = "") -> None:
        file = descriptor_pb2.FileDescriptorProto(name=f"{package}.proto", package=package, syntax="proto3")
        text = file.message_type.add(name="Text")
        kinds = descriptor_pb2.FieldDescriptorProto
        fields = [("text", kinds.TYPE_STRING), ("count", kinds.TYPE_INT32), ("data", kinds.TYPE_BYTES)]
        if extra_field:
            fields.append((extra_field, kinds.TYPE_STRING))
        for number, (name, kind) in enumerate(fields, 1):
            text.field.add(name=name, number=number, type=kind, label=kinds.LABEL_OPTIONAL)
        service = file.service.add(name="Echo")
        for name, (requests, responses) in METHODS.items():
            service.method.add(
                name=name,
                input_type=f".{package}.Text",
                output_type=f".{package}.Text",
                client_streaming=requests,
                server_streaming=responses,
            )
        self.pool = DescriptorPool()
        self.pool.Add(file)
        self.service = self.pool.FindServiceByName(f"{package}.Echo")
        self.Text: Any = message_factory.GetMessageClass(self.pool.FindMessageTypeByName(f"{package}.Text"))

    def add(self, servicer: Any, server: Any) -> None:
        """What a generated add_EchoServicer_to_server does."""
        handlers = {}
        for name, (requests, responses) in METHODS.items():
            make = getattr(grpc, f"{_kind(requests)}_{_kind(responses)}_rpc_method_handler")
            handlers[name] = make(
                getattr(servicer, name),
                request_deserializer=self.Text.FromString,
                response_serializer=self.Text.SerializeToString,
            )
        server.add_registered_method_handlers(self.service.full_name, handlers)

    def stub(self, channel: Any) -> Any:
        """A stub with one attribute a method."""
        return _Stub(self, channel)

    def raw(self, channel: Any, name: str) -> Any:
        """A multicallable that sends and receives bytes as they are."""
        requests, responses = METHODS[name]
        make = getattr(channel, f"{_kind(requests)}_{_kind(responses)}")
        return make(f"/{self.service.full_name}/{name}")


METHODS = {
    "Unary": (False, False),
    "Collect": (True, False),
    "Expand": (False, True),
    "Chat": (True, True),
    "Watch": (False, True),
}


def _kind(streams: bool) -> str:
    return "stream" if streams else "unary"


class _Stub:
    def __init__(self, protos: Protos, channel: Any) -> None:
        for name, (requests, responses) in METHODS.items():
            make = getattr(channel, f"{_kind(requests)}_{_kind(responses)}")
            multicallable = make(
                f"/{protos.service.full_name}/{name}",
                request_serializer=protos.Text.SerializeToString,
                response_deserializer=protos.Text.FromString,
            )
            setattr(self, name, multicallable)


PROTOS = Protos()
Text = PROTOS.Text
Hook = Callable[[Any], Awaitable[None]]


class EchoServicer:
    """Answers what it is sent; `hook(request)` runs first in every method, `calls` counts handlers begun."""

    def __init__(self, hook: Hook | None = None, protos: Protos = PROTOS) -> None:
        self.calls = 0
        self._hook = hook
        self._text = protos.Text

    async def _begin(self, request: Any) -> None:
        if self._hook is not None:
            await self._hook(request)

    async def Unary(self, request: Any, _context: Any) -> Any:
        self.calls += 1
        await self._begin(request)
        return request

    async def Collect(self, requests: AsyncIterator[Any], _context: Any) -> Any:
        self.calls += 1
        texts = []
        async for request in requests:
            await self._begin(request)
            texts.append(request.text)
        return self._text(text="".join(texts), count=len(texts))

    async def Expand(self, request: Any, _context: Any) -> AsyncIterator[Any]:
        self.calls += 1
        for number in range(request.count):
            await self._begin(request)
            yield self._text(text=request.text, count=number, data=request.data)

    async def Chat(self, requests: AsyncIterator[Any], _context: Any) -> AsyncIterator[Any]:
        self.calls += 1
        async for request in requests:
            await self._begin(request)
            yield request

    async def Watch(self, request: Any, _context: Any) -> AsyncIterator[Any]:
        self.calls += 1
        yield request
        await self._begin(request)


def echo_service(servicer: Any = None, protos: Protos = PROTOS, **fields: Any) -> Service:
    """The service, as a server takes it; Watch needs no deadline."""
    return Service(
        add=protos.add,
        servicer=servicer or EchoServicer(),
        descriptor=protos.service,
        **{"validate": False, "deadline_exempt": {"Watch"}, **fields},
    )
