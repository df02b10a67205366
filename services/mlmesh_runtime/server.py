"""One way to build a server: health, reflection, TLS, limits, errors, metrics, traces and a graceful end included."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

from google.protobuf.descriptor import ServiceDescriptor

from mlmesh_runtime import health as health_protocol
from mlmesh_runtime import telemetry, transport
from mlmesh_runtime.channel import keepalive_options
from mlmesh_runtime.config import ConfigError, Settings, split_address
from mlmesh_runtime.direct import DirectMethod
from mlmesh_runtime.errors import MeshError
from mlmesh_runtime.handlers import Wrapper
from mlmesh_runtime.health import HealthServicer, HealthStatuses
from mlmesh_runtime.limits import Limits
from mlmesh_runtime.process import Signals, run
from mlmesh_runtime.reflection import DescriptorIndex, Protocol, ReflectionServicer
from mlmesh_runtime.rpcs import Gate, Meters, Method, Trailers, going_away
from mlmesh_runtime.tls import RotatingCredentials

__all__ = ["Server", "Service", "run"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Service:
    """One gRPC service to serve.

    Attributes:
        add: the generated ``add_XServicer_to_server``.
        servicer: the implementation.
        descriptor: the service's descriptor, of whatever pool it lives in.
        validate: check requests by their protovalidate rules; off on the inference hot path.
        deadline_exempt: methods that may be called without a deadline: watches. They are ended, with UNAVAILABLE, when
            the server drains.
        deadline_optional: methods that clients of a public protocol call without a deadline. They end like any other.
        direct: methods answered in bursts, without a task a call (`mlmesh_runtime.direct`); unary or bidirectional. The
            servicer's method of the same name answers what such a method hands back.
        going_away: the error that ends direct streams, at a message boundary, when the server drains.
        trailers: metadata to send with the status of every call, such as load reports; asked once a call, quick.
    """

    add: Callable[[Any, Any], None]
    servicer: Any
    descriptor: ServiceDescriptor
    validate: bool = True
    deadline_exempt: frozenset[str] | set[str] = field(default_factory=frozenset)
    deadline_optional: frozenset[str] | set[str] = field(default_factory=frozenset)
    direct: Mapping[str, DirectMethod] = field(default_factory=dict)
    going_away: Callable[[], MeshError] = going_away
    trailers: Callable[[], Trailers] | None = None


class Server:
    """A server, serving inside of ``async with``.

    >>> async with Server(settings, services=[Service(...)]) as server:      # doctest: +SKIP
    ...     await server.serve_until_signal()

    Args:
        settings: where to listen, with which certificate, how to drain.
        services: what to serve.
        limits: bounds; the settings' own by default.
        health: statuses made beforehand. Names not set before the start ("" and each service) start as SERVING.

    Raises ConfigError when the address cannot be bound or the certificate cannot be used.
    """

    def __init__(
        self,
        settings: Settings,
        services: Sequence[Service],
        *,
        limits: Limits | None = None,
        health: HealthStatuses | None = None,
    ) -> None:
        self._settings = settings
        self._services = tuple(services)
        self._limits = limits or settings.limits
        self.health = health or HealthStatuses()
        self.address = ""
        self.metrics_address = ""
        self.draining = asyncio.Event()
        """Set when the server begins to go away."""
        self._gate = Gate(self._limits, settings.identity_source)
        self._server: Any = None
        self._metrics: telemetry.MetricsEndpoint | None = None
        self._stopping: asyncio.Task[None] | None = None
        self._hurry = asyncio.Event()
        self._on_drain: list[Callable[[], Awaitable[None] | None]] = []

    def on_drain(self, callback: Callable[[], Awaitable[None] | None]) -> None:
        """Call this after the drain time, before the port closes: to end streams that have no end of their own."""
        self._on_drain.append(callback)

    async def __aenter__(self) -> Server:
        choice = transport.choose(self._settings)
        options = server_options(self._limits, tls=self._settings.tls is not None)
        self._server = transport.make(choice, self._limits, self._gate, options)
        telemetry.TRANSPORT.clear()
        telemetry.TRANSPORT.labels(choice.name, choice.reason).set(1)
        try:
            self._register(self._server)
            self.address = self._bind(self._server)
            if self._settings.metrics_listen:
                self._metrics = _metrics_endpoint(self._settings.metrics_listen)
                self.metrics_address = self._metrics.address
            await self._server.start()
        except BaseException:
            await self._server.stop(0)
            await self._close_metrics()
            raise
        for name in ("", *(service.descriptor.full_name for service in self._services)):
            if self.health.status(name) == health_protocol.SERVICE_UNKNOWN:
                self.health.set(name, True)
        logger.info(
            "listening",
            extra={
                "address": self.address,
                "metrics": self.metrics_address,
                "tls": self._settings.tls is not None,
                "transport": choice.name,
                "transport_reason": choice.reason,
                "services": [service.descriptor.full_name for service in self._services],
                "pid": os.getpid(),
            },
        )
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        # A signal that came before `serve_until_signal` ends up here; clients may have seen the server by then.
        signalled = Signals.current is not None and Signals.current.asked.is_set()
        await self.stop(drain_s=None if signalled else 0)

    async def serve_until_signal(self) -> None:
        """Serve until SIGTERM or SIGINT, then drain and stop. A second signal skips what is left of the waiting."""
        signals = Signals.current
        with contextlib.ExitStack() as stack:
            if signals is None:  # not under `run`
                signals = stack.enter_context(Signals(lambda: None))
            signals.awaited = True
            self._hurry = signals.hurry
            await signals.asked.wait()
            await self.stop()

    async def stop(self, *, drain_s: float | None = None, grace_s: float | None = None) -> None:
        """Drain and stop: NOT_SERVING, wait `drain_s`, end watches, GOAWAY, give calls `grace_s`, cancel the rest.

        Defaults are the settings'. Stopping again waits for the first stop.
        """
        if self._stopping is None:
            drain = self._settings.drain_s if drain_s is None else drain_s
            grace = self._settings.grace_s if grace_s is None else grace_s
            # A task of its own, awaited below: a caller that is cancelled must not leave a half-stopped server.
            self._stopping = asyncio.ensure_future(self._stop(drain, grace))
        await asyncio.shield(self._stopping)

    async def _stop(self, drain_s: float, grace_s: float) -> None:
        self.health.drain()
        self.draining.set()
        if drain_s > 0:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._hurry.wait(), drain_s)
        for callback in self._on_drain:
            result = callback()
            if result is not None:
                await result
        self.health.close()
        self._gate.end_endless()
        if self._server is not None:
            await self._stop_calls(self._server, grace_s)
        await self._close_metrics()
        logger.info("stopped", extra={"address": self.address})

    async def _stop_calls(self, server: Any, grace_s: float) -> None:
        async with asyncio.TaskGroup() as group:
            stopped = group.create_task(server.stop(grace_s))
            hurry = group.create_task(self._hurry.wait())
            await asyncio.wait({stopped, hurry}, return_when=asyncio.FIRST_COMPLETED)
            if not stopped.done():
                await server.stop(0)
            hurry.cancel()

    async def _close_metrics(self) -> None:
        if self._metrics is not None:
            metrics, self._metrics = self._metrics, None
            await asyncio.to_thread(metrics.close)

    def _register(self, server: Any) -> None:
        wrapper = Wrapper(self._gate)
        protocols = [Protocol("v1"), Protocol("v1alpha")]
        asked = [_channelz()] if self._settings.channelz else []
        index = DescriptorIndex(
            [
                *(service.descriptor for service in (*self._services, *asked)),
                health_protocol.DESCRIPTOR,
                *(protocol.descriptor for protocol in protocols),
            ]
        )
        for service in self._services:
            _add(server, wrapper, service, internal=False)
        builtin = [
            Service(
                add=health_protocol.add_to_server,
                servicer=HealthServicer(self.health, watchers_max=self._limits.watchers_max),
                descriptor=health_protocol.DESCRIPTOR,
                validate=False,
            ),
            *(
                Service(
                    add=protocol.add_to_server,
                    servicer=ReflectionServicer(protocol, index),
                    descriptor=protocol.descriptor,
                    validate=False,
                )
                for protocol in protocols
            ),
        ]
        for service in (*builtin, *asked):
            _add(server, wrapper, service, internal=True)

    def _bind(self, server: Any) -> str:
        listen = self._settings.listen
        credentials = RotatingCredentials(self._settings.tls).server_credentials() if self._settings.tls else None
        try:
            with _private_socket(listen):
                if credentials is None:
                    port = server.add_insecure_port(listen)
                else:
                    port = server.add_secure_port(listen, credentials)
        except RuntimeError:
            raise ConfigError(f"MLMESH_LISTEN: cannot listen on {listen}: is the port in use already?") from None
        return listen if listen.startswith("unix:") else f"{listen.rpartition(':')[0]}:{port}"


def server_options(limits: Limits, *, tls: bool) -> list[tuple[str, Any]]:
    """gRPC core's server arguments for these limits."""
    options = [
        ("grpc.max_receive_message_length", limits.message_bytes_max),
        ("grpc.max_send_message_length", limits.message_bytes_max),
        # Without this a second process binds the same port silently and takes half of the connections.
        ("grpc.so_reuseport", 0),
        *keepalive_options(limits),
        # Clients may ping as often as ours do, also while nothing is in flight.
        ("grpc.http2.min_ping_interval_without_data_ms", max(1, int(limits.keepalive_time_s * 500))),
        ("grpc.keepalive_permit_without_calls", 1),
    ]
    if tls:
        options.append(("grpc.max_connection_age_ms", int(limits.connection_age_s * 1000)))
    return options


class _Collector:
    """What a generated ``add_…_to_server`` needs of a server: it gathers the handlers."""

    def __init__(self) -> None:
        self.handlers: dict[str, dict[str, Any]] = {}

    def add_generic_rpc_handlers(self, _handlers: Any) -> None:
        """The same handlers again, in an older form."""

    def add_registered_method_handlers(self, service: str, handlers: dict[str, Any]) -> None:
        self.handlers.setdefault(service, {}).update(handlers)


def _add(server: Any, wrapper: Wrapper, service: Service, *, internal: bool) -> None:
    collector = _Collector()
    service.add(service.servicer, collector)
    name = service.descriptor.full_name
    handlers = collector.handlers.get(name)
    if handlers is None:
        raise ValueError(f"{service.add.__name__} adds {sorted(collector.handlers)}, not {name}")
    without_deadline = service.deadline_exempt | service.deadline_optional
    if unknown := (set(without_deadline) | set(service.direct)) - set(handlers):
        raise ValueError(f"{name} has no method {sorted(unknown)}")
    check = None
    if service.validate:
        from mlmesh_runtime.validation import checker  # noqa: PLC0415  slow to import, and not needed everywhere

        check = checker([method.input_type for method in service.descriptor.methods])
    wrapped: dict[str, Any] = {}
    direct: dict[str, Any] = {}
    for method_name, handler in handlers.items():
        if method_name in service.direct and handler.request_streaming != handler.response_streaming:
            raise ValueError(f"{name}.{method_name} streams in one direction only: no direct method can answer it")
        kind = ("client_stream", "bidi_stream") if handler.request_streaming else ("unary", "server_stream")
        method = Method(
            service=name,
            name=method_name,
            path=f"/{name}/{method_name}",
            streams=handler.request_streaming or handler.response_streaming,
            deadline_required=not internal and method_name not in without_deadline,
            endless=method_name in service.deadline_exempt,
            internal=internal,
            check=check,
            decode=handler.request_deserializer,
            encode=handler.response_serializer,
            meters=Meters(kind[handler.response_streaming], name, method_name),
            direct=service.direct.get(method_name),
            going_away=service.going_away,
            trailers=service.trailers,
        )
        wrapped[method_name] = wrapper.wrap(method, handler)
        if method.direct is not None:
            direct[method_name] = method, wrapper.ordinary(method, handler)
    transport.register(server, name, wrapped, direct)


def _channelz() -> Service:
    from mlmesh_runtime import channelz  # noqa: PLC0415  only for who debugs

    return Service(
        add=channelz.add_to_server,
        servicer=channelz.ChannelzServicer(),
        descriptor=channelz.DESCRIPTOR,
        validate=False,
    )


def _metrics_endpoint(listen: str) -> telemetry.MetricsEndpoint:
    try:
        return telemetry.MetricsEndpoint(listen)
    except OSError as error:
        raise ConfigError(f"MLMESH_METRICS_LISTEN: cannot listen on {listen}: {error.strerror}") from None


@contextlib.contextmanager
def _private_socket(listen: str) -> Iterator[None]:
    """A unix socket is its owner's from the first moment; the umask is how to have it made so."""
    if not listen.startswith("unix:"):
        split_address(listen)
        yield
        return
    before = os.umask(0o177)
    try:
        yield
    finally:
        os.umask(before)
