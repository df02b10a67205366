"""A method as it is served, one RPC in flight, and the gate that both pass: what handlers and streams share."""

from __future__ import annotations

import asyncio
import dataclasses
import functools
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from mlmesh_runtime import telemetry
from mlmesh_runtime.calls import Call
from mlmesh_runtime.direct import DirectMethod
from mlmesh_runtime.errors import InvalidInput, MeshError, NotReady, Overloaded
from mlmesh_runtime.identity import identity_of
from mlmesh_runtime.limits import Limits

Check = Callable[[Any], None]
Trailers = tuple[tuple[str, str | bytes], ...]
"""Trailing metadata."""


class Meters:
    """A method's metric children; asking prometheus for them on every call costs more than the call's other work."""

    def __init__(self, kind: str, service: str, name: str) -> None:
        labels = (kind, service, name)
        self._labels = labels
        self._handled: dict[str, Callable[[float], None]] = {}
        self.started = telemetry.RPC_STARTED.labels(*labels).inc
        self.seconds = telemetry.RPC_SECONDS.labels(*labels).observe
        """Takes seconds, and an exemplar or None."""
        self.observe_many = functools.partial(telemetry.observe_many, telemetry.RPC_SECONDS.labels(*labels))
        self.received = telemetry.MESSAGES_RECEIVED.labels(*labels).inc
        self.sent = telemetry.MESSAGES_SENT.labels(*labels).inc

    def handled(self, code: str, count: int = 1) -> None:
        inc = self._handled.get(code)
        if inc is None:
            inc = self._handled[code] = telemetry.RPC_HANDLED.labels(*self._labels, code).inc
        inc(count)


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """One RPC method and what was resolved for it.

    Attributes:
        path: "/package.Service/Method".
        streams: whether requests or responses stream.
        deadline_required: a call without a deadline is refused.
        endless: a watch: it has no deadline, and is ended when the server drains.
        internal: health and reflection: outside of limits and traces, so that they answer on a full server.
        check: rules for requests, or None.
        direct: what answers calls without a task of their own, or None.
        going_away: what ends a direct stream when the server drains.
        trailers: metadata of every status, or None.
    """

    service: str
    name: str
    path: str
    streams: bool
    deadline_required: bool
    endless: bool
    internal: bool
    check: Check | None
    decode: Callable[[bytes], Any]
    encode: Callable[[Any], bytes]
    meters: Meters
    direct: DirectMethod | None = None
    going_away: Callable[[], MeshError] = dataclasses.field(default_factory=lambda: going_away)
    trailers: Callable[[], Trailers] | None = None


class Lane(Protocol):
    """A stream that a direct method answers."""

    async def run(self) -> bytes | None:
        """Answer it to its end, or up to the message that was handed over, which is returned."""

    def end(self, error: MeshError) -> None:
        """Read no more; answer what was read, then end with this error."""

    def moved(self) -> int | None:
        """Grows with every message that comes or goes; None where `Rpc.touched` says when that was."""


class Rpc:
    """One RPC in flight."""

    __slots__ = (
        "admitted",
        "call",
        "code",
        "ended",
        "heard",
        "lane",
        "method",
        "peer",
        "reader",
        "span",
        "task",
        "touched",
    )

    def __init__(self, method: Method, context: Any, identity_source: str) -> None:
        self.call = Call(context, method.path, identity_source)
        self.method = method
        self.code = "OK"
        self.admitted = False
        self.peer: str | None = None
        self.ended: MeshError | None = None
        self.reader: asyncio.Task[Any] | None = None
        self.heard: bool | None = False
        """Whether all was read that the caller has to say; None when a read was given up: gRPC begins no other then."""
        self.touched = self.call.started
        self.task: asyncio.Task[Any] | None = None
        self.span: telemetry.ServerSpan | None = None
        self.lane: Lane | None = None

    def end(self, error: MeshError) -> None:
        """Make the servicer's method end, and tell `error` to the client."""
        if self.ended is None and self.task is not None:
            self.ended = error
            self.task.cancel()


class Gate:
    """What the methods of one server share: the bounds, who is inside, and whether the server is going away."""

    def __init__(self, limits: Limits, identity_source: str) -> None:
        self.limits = limits
        self.identity_source = identity_source
        self.in_flight = 0
        self.streams: Counter[str] = Counter()
        self.endless: set[Rpc] = set()
        self.lanes: set[Rpc] = set()
        """Open direct streams."""
        self.direct: Callable[[], int] = lambda: 0
        """How many calls are inside that the transport counts itself."""
        self.draining = False

    def admit(self, rpc: Rpc) -> None:
        """Count an RPC in. Raises Overloaded where a bound is reached, Unauthenticated for an ambiguous identity."""
        limits = self.limits
        if self.in_flight + self.direct() >= limits.concurrent_rpcs_max:
            raise too_many_rpcs(limits)
        if self.identity_source == "tls" or rpc.method.streams:
            identity = identity_of(rpc.call)
            if rpc.method.streams:
                peer = identity or rpc.call.context.peer().rpartition(":")[0]
                if self.streams[peer] >= limits.streams_per_peer_max:
                    raise Overloaded(
                        f"this peer has {limits.streams_per_peer_max} streams open already",
                        reason="TOO_MANY_STREAMS",
                        retry_after_s=limits.retry_after_s,
                    )
                self.streams[peer] += 1
                rpc.peer = peer
        self.in_flight += 1
        rpc.admitted = True
        telemetry.RPC_IN_FLIGHT.inc()
        if rpc.method.endless:
            if self.draining:
                raise going_away()
            self.endless.add(rpc)

    def leave(self, rpc: Rpc) -> None:
        """Count an RPC out."""
        if rpc.peer is not None:
            self.streams[rpc.peer] -= 1
            if not self.streams[rpc.peer]:
                del self.streams[rpc.peer]
        if rpc.admitted:
            self.in_flight -= 1
            telemetry.RPC_IN_FLIGHT.dec()
            self.endless.discard(rpc)

    def end_endless(self) -> None:
        """End the RPCs that have no end of their own (watches, direct streams) so that their clients go elsewhere."""
        self.draining = True
        for rpc in list(self.lanes):
            if rpc.lane is not None:
                rpc.lane.end(rpc.method.going_away())
        for rpc in list(self.endless):
            rpc.end(going_away())


def too_many_rpcs(limits: Limits) -> Overloaded:
    """What a caller is told when the server is full."""
    return Overloaded(
        f"the server handles {limits.concurrent_rpcs_max} calls already",
        reason="TOO_MANY_RPCS",
        retry_after_s=limits.retry_after_s,
    )


def deadline_missing() -> InvalidInput:
    """What a caller is told who set no deadline where one is required."""
    return InvalidInput(
        "a deadline is required: set a timeout on the call (grpcurl: -max-time)", reason="DEADLINE_REQUIRED"
    )


def going_away() -> NotReady:
    """What a caller is told when the server ends its stream."""
    return NotReady("the server is going away; call again", reason="DRAINING")
