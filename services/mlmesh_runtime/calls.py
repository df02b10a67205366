"""The RPC being handled: what outgoing calls, logs and domain code may know about it, without passing it around."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any


class Call:
    """One RPC in a server. Only what every call needs is computed up front; the rest is read on demand."""

    __slots__ = ("_metadata", "context", "deadline", "identity", "identity_source", "method", "started")

    def __init__(self, context: Any, method: str, identity_source: str) -> None:
        self.context = context
        self.method = method
        self.identity_source = identity_source
        self.identity: str | None = None  # not looked up yet
        self.started = time.monotonic()
        remaining = context.time_remaining()
        self.deadline: float | None = None if remaining is None else self.started + remaining
        self._metadata: tuple[tuple[str, str | bytes], ...] | None = None

    @property
    def metadata(self) -> tuple[tuple[str, str | bytes], ...]:
        """The request's metadata, as pairs in the order received."""
        if self._metadata is None:
            self._metadata = tuple(self.context.invocation_metadata())
        return self._metadata

    def header(self, name: str) -> str | None:
        """The last value of one metadata key, None when absent."""
        found = None
        for key, value in self.metadata:
            if key == name and isinstance(value, str):
                found = value
        return found


CURRENT: ContextVar[Call | None] = ContextVar("mlmesh_call", default=None)


def remaining_s() -> float | None:
    """Seconds left to the RPC being handled; None outside of one, or where it has no deadline. Never negative."""
    call = CURRENT.get()
    if call is None or call.deadline is None:
        return None
    return max(0.0, call.deadline - time.monotonic())


def metadata_value(name: str) -> str | None:
    """The last value of a metadata key of the RPC being handled; None when absent."""
    call = CURRENT.get()
    return None if call is None else call.header(name)


@contextlib.contextmanager
def detached() -> Iterator[None]:
    """Run as if outside of any RPC: for background work that a handler starts and that must outlive its deadline."""
    token = CURRENT.set(None)
    try:
        yield
    finally:
        CURRENT.reset(token)
