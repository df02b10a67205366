"""What the sync and the aio client share: their arguments, the messages of each call, what is cached."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from mlmesh_client.connecting import TIMEOUT_S
from mlmesh_client.errors import InferenceError, TimedOut
from mlmesh_client.messages import Model, model_of
from mlmesh_client.retry import Retries
from open_inference import grpc_service_pb2 as pb

Metadata = Sequence[tuple[str, str]]

MODEL_FRESH_S: Final = 1.0
"""What a server said of a model this short ago is not asked again before a request is refused here."""
MODEL_KEPT_S: Final = 300.0
MODELS_MAX: Final = 1000
ANNOUNCED: Final = ("mlmesh-stream", "resumable")
CONNECTION_S: Final = 3600.0
"""Deadline of one connection of a stream; it then opens another."""
STALLED_S: Final = 30.0
"""A stream that waits this long for an answer looks for another server."""
GIVE_UP_S: Final = 60.0
"""A stream that gets no answer for this long, however often it connects, fails."""
IN_FLIGHT: Final = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Of a client; see Client."""

    target: str
    metadata: tuple[tuple[str, str], ...] = ()
    timeout_s: float = TIMEOUT_S


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamOptions:
    """Of a stream; see Client.stream."""

    in_flight: int = IN_FLIGHT
    metadata: tuple[tuple[str, str], ...] = ()
    timeout_s: float = TIMEOUT_S
    connection_s: float = CONNECTION_S
    stalled_s: float = STALLED_S
    give_up_s: float = GIVE_UP_S


class Models:
    """What servers said of models. Thread-safe."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._known: dict[tuple[str, str, Any], tuple[float, Model]] = {}
        self._lock = threading.Lock()

    def get(self, name: str, version: str, metadata: Any, *, younger_s: float = MODEL_KEPT_S) -> Model | None:
        """A model that a server described at most so long ago."""
        found = self._known.get((name, version, metadata))
        return found[1] if found is not None and self._clock() - found[0] <= younger_s else None

    def put(self, name: str, version: str, metadata: Any, model: Model) -> Model:
        """Keep a description."""
        with self._lock:
            if len(self._known) >= MODELS_MAX:
                self._known.clear()
            self._known[name, version, metadata] = (self._clock(), model)
        return model

    def drop(self, name: str, version: str, metadata: Any) -> None:
        """It may be wrong."""
        with self._lock:
            self._known.pop((name, version, metadata), None)


def described(reply: pb.ModelMetadataResponse, config: pb.ModelConfigResponse | None) -> Model:
    """A model from what the server says of it; `config` is None where the server cannot tell it."""
    if config is None:
        return model_of(reply)
    found = config.config
    return model_of(reply, rows_max=found.max_batch_size, decoupled=found.model_transaction_policy.decoupled)


def merged(first: Metadata, second: Metadata | None) -> tuple[tuple[str, str], ...]:
    """A client's metadata and a call's own."""
    return (*first, *((key.lower(), value) for key, value in second or ()))


class Clocked:
    """The deadline of one call over all its attempts."""

    __slots__ = ("_end_s",)

    def __init__(self, timeout_s: float) -> None:
        if not timeout_s > 0:
            raise ValueError(f"a timeout is seconds, more than 0; got {timeout_s!r}")
        self._end_s = time.monotonic() + timeout_s

    def left_s(self) -> float:
        """Seconds, more than 0. Raises TimedOut."""
        left_s = self._end_s - time.monotonic()
        if left_s <= 0:
            raise TimedOut("the deadline has passed", code="DEADLINE_EXCEEDED")
        return left_s


class Reconnecting:
    """Whether, and after which time, a stream whose connection ended connects again.

    Args:
        options: of the stream. retries: of the client, for waits between failures.
    """

    def __init__(self, options: StreamOptions, retries: Retries, clock: Callable[[], float] = time.monotonic) -> None:
        self._options, self._retries, self._clock = options, retries, clock
        self._failures = 0
        self._since_s = clock()

    def again_s(self, error: InferenceError, tries: int) -> float | None:
        """Seconds after which a request that a server refused in its place is sent again; None for never."""
        return self._retries.wait_s(error, tries, left_s=self._options.timeout_s)

    def progressed(self) -> None:
        """An answer came, or the server asked to move."""
        self._failures = 0

    def wait_s(self, error: InferenceError | None, *, moved: bool) -> float | None:
        """Seconds to wait before connecting again; None: the stream has failed. `error`: None for an end with OK."""
        if moved:
            return 0.0
        if error is not None and not _again(error):
            return None
        now_s = self._clock()
        if not self._failures:
            self._since_s = now_s
        self._failures += 1
        if now_s - self._since_s > self._options.give_up_s:
            return None
        wait_s = 0.0 if self._failures == 1 else self._retries.backoff_s(self._failures - 1)
        hint_s = error.retry_after_s if error is not None else None
        return wait_s if hint_s is None else hint_s + wait_s


# Ends of a connection, or of the server behind it, as gRPC and proxies tell them. A server of ours gives a reason where
# it means the request.
_BROKEN: Final = frozenset({"UNAVAILABLE", "INTERNAL", "UNKNOWN", "CANCELLED", "DEADLINE_EXCEEDED", "ABORTED"})
_BROKEN_REASONS: Final = frozenset({"DRAINING", "STREAM_IDLE", "MODEL_NOT_READY"})


def _again(error: InferenceError) -> bool:
    if not error.retryable:
        return False
    if error.code == "RESOURCE_EXHAUSTED":
        return error.retry_after_s is not None
    return error.code in _BROKEN and (error.reason == error.code or error.reason in _BROKEN_REASONS)


def chance_of(chance: random.Random | None) -> random.Random:
    """A source of chance: the one given, or a new one."""
    return random.Random() if chance is None else chance  # noqa: S311  spreads waits


def stream_options(
    options: Options, in_flight: int, metadata: Metadata | None, **bounds: float | None
) -> StreamOptions:
    """Of a stream, where None leaves a bound as it is."""
    if in_flight < 1:
        raise ValueError(f"in_flight is 1 or more; got {in_flight}")
    return StreamOptions(
        in_flight=in_flight,
        metadata=merged(options.metadata, metadata),
        timeout_s=options.timeout_s,
        **{name: value for name, value in bounds.items() if value is not None},
    )


def stalled(seconds: float) -> InferenceError:
    """A connection on which nothing comes any more."""
    return InferenceError(f"no answer for {seconds:g} s", code="UNAVAILABLE")


FOREVER_S: Final = 86400.0 * 365
LEAVE_S: Final = 5.0
"""A server that asked to move has this long to end the connection."""
RESULTS_MAX: Final = 256
"""Results that nobody took yet; more are not read from the server."""
