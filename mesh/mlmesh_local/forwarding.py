"""Spans on to another collector: what the laptop's own collector got goes to any OTLP endpoint, too."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc

from mlmesh_runtime.errors import InvalidInput

logger = logging.getLogger(__name__)

EXPORTS_MAX = 256
"""Most exports that wait; more are dropped, and counted: the laptop's own store has them."""
EXPORT_S = 10.0
ATTEMPTS = 3
PAUSE_S = 1.0
_RETRIED = {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.DEADLINE_EXCEEDED}

Export = trace_service_pb2.ExportTraceServiceRequest


class Forwarder:
    """Sends exports to "http://host:port" (plaintext) or "https://host:port", one after the other."""

    def __init__(self, endpoint: str) -> None:
        scheme, _, address = endpoint.partition("://")
        host, colon, port = address.rstrip("/").rpartition(":")
        if scheme not in ("http", "https") or not (host and colon and port.isdigit()) or "/" in host:
            raise InvalidInput(
                f"--otlp-endpoint must be http://HOST:PORT or https://HOST:PORT of an OTLP gRPC collector, "
                f"not {endpoint!r}",
                field="--otlp-endpoint",
            )
        self._secure, self._address = scheme == "https", f"{host}:{port}"
        self._exports: asyncio.Queue[Export] = asyncio.Queue(EXPORTS_MAX)
        self.dropped = 0

    def put(self, export: Export) -> None:
        """Send it some time; dropped where too many wait."""
        try:
            self._exports.put_nowait(export)
        except asyncio.QueueFull:
            self._drop("too many exports wait")

    async def run(self) -> None:
        """Send, for ever."""
        async with self._channel() as channel:
            stub = trace_service_pb2_grpc.TraceServiceStub(channel)  # type: ignore[no-untyped-call]
            while True:
                await self._send(stub, await self._exports.get())

    async def _send(self, stub: trace_service_pb2_grpc.TraceServiceStub, export: Export) -> None:
        for attempt in range(1, ATTEMPTS + 1):
            try:
                await stub.Export(export, timeout=EXPORT_S)
            except grpc.aio.AioRpcError as error:
                if error.code() not in _RETRIED or attempt == ATTEMPTS:
                    self._drop(f"{error.code().name}: {error.details()}")
                    return
                await asyncio.sleep(PAUSE_S * attempt)
            else:
                return

    def _drop(self, reason: str) -> None:
        self.dropped += 1
        # Once is enough to look there; a collector that is away for long must not fill the log.
        if self.dropped in (1, 10) or self.dropped % 1000 == 0:
            logger.warning(
                "spans were not forwarded",
                extra={"endpoint": self._address, "reason": reason, "exports_dropped": self.dropped},
            )

    @contextlib.asynccontextmanager
    async def _channel(self) -> AsyncIterator[grpc.aio.Channel]:
        if self._secure:
            channel = grpc.aio.secure_channel(self._address, grpc.ssl_channel_credentials())
        else:
            channel = grpc.aio.insecure_channel(self._address)
        async with channel:
            yield channel
