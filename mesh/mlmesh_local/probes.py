"""Kubernetes' gRPC probe: one Health.Check, SERVING or not."""

from __future__ import annotations

from types import TracebackType

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

_OPTIONS = [
    # The application restarts behind this channel: try again at once, not after gRPC's 20 s.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 500),
    ("grpc.enable_http_proxy", 0),
    ("grpc.use_local_subchannel_pool", 1),
]


class HealthProbe:
    """Asks an application, past its sidecar (as the kubelet does after Istio's rewrite)."""

    def __init__(self, host: str, port: int) -> None:
        self._target = f"{host}:{port}"

    async def __aenter__(self) -> HealthProbe:
        self._channel = grpc.aio.insecure_channel(self._target, options=_OPTIONS)
        self._stub = health_pb2_grpc.HealthStub(self._channel)
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._channel.close(None)

    async def check(self, service: str, timeout_s: float) -> str:
        """Empty when the service is SERVING, else why not."""
        try:
            answer = await self._stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=timeout_s)
        except grpc.aio.AioRpcError as error:
            # gRPC's text tells every attempt; the last words say why, such as "Connection refused".
            return f"{error.code().name}: {(error.details() or '').rpartition(': ')[2]}"
        if answer.status == health_pb2.HealthCheckResponse.SERVING:
            return ""
        return str(health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status))
