"""Kubernetes' probes: gRPC's Health.Check, an HTTP request, a connection, a command.

They ask an application past its sidecar, as the kubelet does after Istio's rewrite.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from mlmesh_local.workloads import Probe

_OPTIONS = [
    # The application restarts behind this channel: try again at once, not after gRPC's 20 s.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 500),
    ("grpc.enable_http_proxy", 0),
    ("grpc.use_local_subchannel_pool", 1),
]
_LINE_BYTES_MAX = 4096

Ask = Callable[[], Awaitable[str]]
"""Asks once: empty when all is well, else why not."""


@contextlib.asynccontextmanager
async def asking(probe: Probe, host: str, environ: Mapping[str, str]) -> AsyncIterator[Ask]:
    """Asks an application at ``host``; a command runs with its environment."""
    if probe.how == "grpc":
        async with grpc.aio.insecure_channel(f"{host}:{probe.port}", options=_OPTIONS) as channel:
            stub = health_pb2_grpc.HealthStub(channel)
            yield lambda: _health(stub, probe)
        return

    async def ask() -> str:
        try:
            async with asyncio.timeout(probe.timeout_s):
                if probe.how == "exec":
                    return await _command(probe.command, environ)
                return await _connection(probe, host)
        except TimeoutError:
            return f"no answer within {probe.timeout_s:g} s"
        except OSError as error:
            return error.strerror or str(error)

    yield ask


async def _health(stub: health_pb2_grpc.HealthStub, probe: Probe) -> str:
    try:
        answer = await stub.Check(health_pb2.HealthCheckRequest(service=probe.service), timeout=probe.timeout_s)
    except grpc.aio.AioRpcError as error:
        # gRPC's text tells every attempt; the last words say why, such as "Connection refused".
        return f"{error.code().name}: {(error.details() or '').rpartition(': ')[2]}"
    if answer.status == health_pb2.HealthCheckResponse.SERVING:
        return ""
    return str(health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status))


async def _connection(probe: Probe, host: str) -> str:
    reader, writer = await asyncio.open_connection(host, probe.port, limit=_LINE_BYTES_MAX)
    try:
        if probe.how == "tcp":
            return ""
        head = f"GET {probe.path} HTTP/1.1\r\nHost: {host}:{probe.port}\r\nUser-Agent: kube-probe/1\r\n"
        writer.write(f"{head}Accept: */*\r\nConnection: close\r\n\r\n".encode())
        await writer.drain()
        words = (await reader.readline()).split(maxsplit=2)
    except ValueError:
        return "no answer of HTTP"
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()
    if len(words) < 2 or not words[0].startswith(b"HTTP/") or not words[1].isdigit():
        return "no answer of HTTP"
    status = int(words[1])
    return "" if 200 <= status < 400 else f"HTTP {status}"


async def _command(command: tuple[str, ...], environ: Mapping[str, str]) -> str:
    nowhere = asyncio.subprocess.DEVNULL
    process = await asyncio.create_subprocess_exec(
        *command, env=dict(environ), stdin=nowhere, stdout=nowhere, stderr=nowhere
    )
    try:
        code = await process.wait()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    return f"the command ended with {code}" if code else ""
