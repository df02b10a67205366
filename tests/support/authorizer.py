"""External authorizers for tests: Envoy's Authorization service over gRPC, and a plain HTTP one."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import grpc

from mlmesh_local.envoy_types import message_class

SERVICE = "envoy.service.auth.v3.Authorization"
HEADER = "x-ext-authz"
ALLOW = "allow"


@dataclass
class Authorizer:
    """Allows what has `x-ext-authz: allow`; records what it was asked."""

    asked: list[Mapping[str, str]] = field(default_factory=list)
    bodies: list[bytes] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)
    connections: bool = True
    """Whether connections that are not HTTP are allowed."""

    async def check(self, request: Any, _context: Any) -> Any:
        """Envoy's Check."""
        http = request.attributes.request.http
        headers = dict(http.headers)
        self.asked.append(headers)
        self.bodies.append(http.raw_body or http.body.encode())
        self.paths.append(http.path)
        response: Any = message_class("envoy.service.auth.v3.CheckResponse")()
        if headers.get(HEADER) == ALLOW if http.path else self.connections:
            response.status.code = grpc.StatusCode.OK.value[0]
            option = response.ok_response.headers.add()
            option.header.key, option.header.value = "x-checked", "yes"
        else:
            response.status.code = grpc.StatusCode.PERMISSION_DENIED.value[0]
        return response

    @contextlib.asynccontextmanager
    async def serve_grpc(self, address: str) -> AsyncIterator[None]:
        """Over gRPC at "host:port"."""
        server = grpc.aio.server(options=(("grpc.so_reuseport", 0),))
        handler = grpc.unary_unary_rpc_method_handler(
            self.check,
            request_deserializer=message_class("envoy.service.auth.v3.CheckRequest").FromString,
            response_serializer=lambda message: message.SerializeToString(),
        )
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, {"Check": handler}),))
        server.add_insecure_port(address)
        await server.start()
        try:
            yield
        finally:
            await server.stop(None)

    @contextlib.asynccontextmanager
    async def serve_http(self, address: str) -> AsyncIterator[None]:
        """Over HTTP/1.1 at "host:port"."""
        host, _, port = address.rpartition(":")
        server = await asyncio.start_server(self._answer, host, int(port))
        async with server:
            yield

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                lines = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
                headers = dict(line.lower().split(": ", 1) for line in lines[1:] if line)
                self.bodies.append(await reader.readexactly(int(headers.get("content-length", 0))))
                self.asked.append(headers)
                self.paths.append(lines[0].split(" ")[1])
                status = "200 OK" if headers.get(HEADER) == ALLOW else "403 Forbidden"
                more = f"x-checked: yes\r\nx-reason: {status[:3]}\r\ncontent-length: 0\r\n"
                writer.write(f"HTTP/1.1 {status}\r\n{more}\r\n".encode())
                await writer.drain()
        writer.close()
