"""Where spans come in: OTLP over gRPC and over HTTP, into the laptop's store and on to where the user wants them."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2_grpc

from mlmesh_local import collector_http
from mlmesh_local.addresses import Block
from mlmesh_local.collector import TraceServicer
from mlmesh_local.forwarding import Forwarder
from mlmesh_local.traces import TraceStore
from mlmesh_runtime.executors import BoundedExecutor

EXPORT_BYTES_MAX = 16 * 1024 * 1024


@contextlib.asynccontextmanager
async def receiving(
    block: Block, traces: TraceStore, executor: BoundedExecutor, *, otlp_endpoint: str = ""
) -> AsyncIterator[None]:
    """Take spans until the block ends; ``otlp_endpoint`` is where they also go, empty for nowhere else."""
    forwarder = Forwarder(otlp_endpoint) if otlp_endpoint else None
    servicer = TraceServicer(traces, executor, forwarder)
    async with _grpc(block.otlp, servicer), collector_http.serve(block.otlp_http, servicer.take):
        if forwarder is None:
            yield
            return
        async with asyncio.TaskGroup() as group:
            sending = group.create_task(forwarder.run())
            yield
            sending.cancel()


@contextlib.asynccontextmanager
async def _grpc(address: str, servicer: TraceServicer) -> AsyncIterator[None]:
    options = [("grpc.so_reuseport", 0), ("grpc.max_receive_message_length", EXPORT_BYTES_MAX)]
    server = grpc.aio.server(options=options)
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(servicer, server)  # type: ignore[no-untyped-call]
    server.add_insecure_port(address)
    await server.start()
    try:
        yield
    finally:
        await server.stop(0)
