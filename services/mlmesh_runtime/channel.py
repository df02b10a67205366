"""One way to open a channel: bounds, keepalive that notices a hung peer, deadlines and trace context that follow.

No client interceptors: gRPC wraps every intercepted call in tasks of its own. `MeshChannel` gives the same stubs
multicallables that add a timeout and metadata and then *are* gRPC's own calls.

A channel never retries: the mesh does, and retries multiply.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

import grpc
from opentelemetry import context as otel_context
from opentelemetry import trace

from mlmesh_runtime import telemetry
from mlmesh_runtime.calls import CURRENT, remaining_s
from mlmesh_runtime.config import ConfigError, Settings, split_address
from mlmesh_runtime.limits import DEFAULT, Limits
from mlmesh_runtime.status import mesh_error
from mlmesh_runtime.tls import ClientTls

__all__ = ["NO_DEADLINE", "ClientTls", "MeshChannel", "mesh_error", "open_channel"]

NO_DEADLINE = math.inf
"""`timeout=NO_DEADLINE`: a watch without a deadline of its own. Inside a handler the handler's deadline still holds."""

# What Istio says an application must carry from request to request, for traces and logs to stay in one piece.
_PASSED_ON = ("traceparent", "tracestate", "x-request-id")


def open_channel(
    target: str,
    *,
    settings: Settings | None = None,
    tls: ClientTls | None = None,
    authority: str | None = None,
    outbound_host: str | None = None,
    limits: Limits = DEFAULT,
    default_deadline_s: float = 30.0,
) -> MeshChannel:
    """Open a channel to ``host:port`` or ``unix:path``; it connects on first use.

    Args:
        target: where the service is, by its mesh name.
        settings: takes `outbound_host` and, where `limits` is the default, the limits from here.
        tls: None is plaintext: in the mesh the sidecar encrypts.
        authority: the :authority to send, where it is not the target.
        outbound_host: dial this host with the target's port and send the target as :authority; see
            MLMESH_OUTBOUND_HOST.
        default_deadline_s: the timeout of calls that name none. A call inside a handler never gets longer than the
            handler has left.

    Raises ConfigError for a target that does not parse or unreadable TLS files.
    """
    if settings is not None:
        outbound_host = settings.outbound_host if outbound_host is None else outbound_host
        limits = settings.limits if limits is DEFAULT else limits
    dial = target
    if not target.startswith("unix:"):
        try:
            _, port = split_address(target.removeprefix("dns:///"))
        except ValueError as error:
            raise ConfigError(f"channel target: {error}") from None
        if outbound_host:
            authority = authority or target
            dial = f"{outbound_host}:{port}"
    elif authority is None:
        # gRPC would send the path, percent-encoded: no authority by RFC 3986, and not every server takes it.
        authority = "localhost"
    options = channel_options(limits)
    if authority:
        options.append(("grpc.default_authority", authority))
    if tls is None:
        return MeshChannel(grpc.aio.insecure_channel(dial, options=options), default_deadline_s)
    if tls.server_name:
        options.append(("grpc.ssl_target_name_override", tls.server_name))
    return MeshChannel(grpc.aio.secure_channel(dial, tls.credentials(), options=options), default_deadline_s)


def channel_options(limits: Limits) -> list[tuple[str, Any]]:
    """gRPC core's channel arguments for these limits."""
    return [
        ("grpc.max_receive_message_length", limits.message_bytes_max),
        ("grpc.max_send_message_length", limits.message_bytes_max),
        *keepalive_options(limits),
        ("grpc.enable_retries", 0),
        # A peer that was away for long is found again within seconds; gRPC's own bound is two minutes.
        ("grpc.initial_reconnect_backoff_ms", 200),
        ("grpc.max_reconnect_backoff_ms", 5000),
    ]


def keepalive_options(limits: Limits) -> list[tuple[str, Any]]:
    """Pings that end a connection to a hung peer.

    `grpc.keepalive_timeout_ms` alone does not: the transport waits for a ping by `grpc.http2.ping_timeout_ms`, which is
    60 s unless it is set as well.
    """
    timeout_ms = max(1, int(limits.keepalive_timeout_s * 1000))
    return [
        ("grpc.keepalive_time_ms", max(1, int(limits.keepalive_time_s * 1000))),
        ("grpc.keepalive_timeout_ms", timeout_ms),
        ("grpc.http2.ping_timeout_ms", timeout_ms),
        ("grpc.http2.max_pings_without_data", 0),
    ]


class MeshChannel(grpc.aio.Channel):
    """A gRPC channel whose calls carry a deadline and the trace context. Use it with any generated stub."""

    def __init__(self, channel: grpc.aio.Channel, default_deadline_s: float) -> None:
        self._channel = channel
        self._default_s = default_deadline_s

    def unary_unary(self, method: str, *args: Any, **kwargs: Any) -> Any:
        """A unary call; the multicallable takes gRPC's own arguments."""
        return _Multicallable(method, self._channel.unary_unary(method, *args, **kwargs), self._default_s, unary=True)

    def unary_stream(self, method: str, *args: Any, **kwargs: Any) -> Any:
        """A call with a response stream."""
        return _Multicallable(method, self._channel.unary_stream(method, *args, **kwargs), self._default_s, unary=True)

    def stream_unary(self, method: str, *args: Any, **kwargs: Any) -> Any:
        """A call with a request stream."""
        return _Multicallable(method, self._channel.stream_unary(method, *args, **kwargs), self._default_s, unary=False)

    def stream_stream(self, method: str, *args: Any, **kwargs: Any) -> Any:
        """A call with both streams."""
        return _Multicallable(
            method, self._channel.stream_stream(method, *args, **kwargs), self._default_s, unary=False
        )

    async def close(self, grace: float | None = None) -> None:
        """Close; calls in flight get `grace` seconds."""
        await self._channel.close(grace)

    def get_state(self, try_to_connect: bool = False) -> grpc.ChannelConnectivity:
        """The connection's state; `try_to_connect` leaves IDLE."""
        return self._channel.get_state(try_to_connect)

    async def wait_for_state_change(self, last_observed_state: grpc.ChannelConnectivity) -> None:
        """Wait until the state is another one."""
        await self._channel.wait_for_state_change(last_observed_state)

    async def channel_ready(self) -> None:
        """Wait until connected; has no bound of its own."""
        await self._channel.channel_ready()

    async def __aenter__(self) -> MeshChannel:
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        await self._channel.close(None)


class _Multicallable:
    """One method of a stub."""

    __slots__ = ("_call", "_default_s", "_method", "_unary")

    def __init__(self, method: str, call: Callable[..., Any], default_s: float, *, unary: bool) -> None:
        self._method, self._call, self._default_s, self._unary = method, call, default_s, unary

    def __call__(
        self,
        request: Any = None,
        *,
        timeout: float | None = None,
        metadata: Sequence[tuple[str, str | bytes]] | None = None,
        **kwargs: Any,
    ) -> Any:
        timeout = bounded_timeout(timeout, self._default_s)
        span, metadata = _traced(self._method, metadata)
        call = self._call(request, timeout=timeout, metadata=metadata, **kwargs)
        if span is not None:
            call.add_done_callback(lambda done: _end_span(span, done))
        return call


def bounded_timeout(timeout: float | None, default_s: float) -> float | None:
    """Own timeout (or the default), never more than the RPC being handled has left. None: no deadline at all."""
    own = default_s if timeout is None else timeout
    left = remaining_s()
    if left is not None and left < own:
        own = left
    return None if own == math.inf else own


def _traced(
    method: str, metadata: Sequence[tuple[str, str | bytes]] | None
) -> tuple[trace.Span | None, Sequence[tuple[str, str | bytes]] | None]:
    """A client span where something is recorded, and metadata that carry the trace on."""
    added: dict[str, str] = {}
    span = None
    call = CURRENT.get()
    if call is not None:
        for name in _PASSED_ON:
            if (value := call.header(name)) is not None:
                added[name] = value
    if telemetry.tracing():
        span = telemetry.client_span(method)
        if span is not None:
            added.update(telemetry.inject(trace.set_span_in_context(span, otel_context.get_current())))
    if not added:
        return span, metadata
    given = tuple(metadata or ())
    names = {key for key, _ in given}
    return span, (*given, *((key, value) for key, value in added.items() if key not in names))


def _end_span(span: trace.Span, call: Any) -> None:
    telemetry.end_rpc_span(span, _code_name(call))


def _code_name(call: Any) -> str:
    """The status code of a call that is over. Asking it is a coroutine, which then ends at its first step."""
    coroutine = call.code()
    try:
        coroutine.send(None)
    except StopIteration as done:
        return str(done.value.name)
    coroutine.close()
    return "UNKNOWN"
