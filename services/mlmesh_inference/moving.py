"""Streams that are open, and which of them are asked to open again elsewhere.

A stream is where it was opened: a mesh chooses at a stream's start, and weights that change later move nothing that is
open. So a server that is asked to (the weights changed, it drains, a stream is old) tells streams to open again; where
they land is the mesh's present choice. Pure: how a stream is told is the business of who opened it.
"""

from __future__ import annotations

import contextlib
import enum
import math
import random
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final, Protocol, cast

from prometheus_client import Counter as MetricCounter
from prometheus_client import Gauge

from mlmesh_inference.tensors import Array
from mlmesh_inference.tokens import SequenceState, pack
from mlmesh_runtime.errors import NotFound
from mlmesh_runtime.telemetry import REGISTRY

STREAMS: Final = Gauge(
    "mlmesh_inference_streams",
    "Inference streams that are open, by the version that they last asked.",
    ("model", "version"),
    registry=REGISTRY,
)
MOVED: Final = MetricCounter(
    "mlmesh_inference_streams_moved",
    "Inference streams that were told to open again elsewhere, by why: asked, drain, age.",
    ("why",),
    registry=REGISTRY,
)
RESUMED: Final = MetricCounter(
    "mlmesh_inference_streams_resumed",
    "Inference streams that came with a token, by outcome: resumed, refused.",
    ("outcome",),
    registry=REGISTRY,
)

# Its age, and a few requests to move that were spread over a long time.
_TIMERS_MAX: Final = 8


class Why(enum.Enum):
    """Why a stream is asked to move. The first answer to that counts, except that a drain overrules all."""

    ASKED = "asked"
    AGE = "age"
    DRAIN = "drain"


class Timer(Protocol):
    """What a `Later` gives back."""

    def cancel(self) -> None:
        """Call nothing after all."""


Later = Callable[[float, Callable[[], object]], Timer]
"""Calls a function after some seconds, as an event loop's `call_later` does."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What became of a request to move streams: how many matched, were asked, and cannot move."""

    stream_count: int
    asked_count: int
    pinned_count: int


class OpenStream:
    """One open stream.

    Args:
        streams: where it is kept. movable: whether its client can open again without losing anything.
        ask: tells it to; called once with the first reason, and again when the server drains.
    """

    __slots__ = ("_ask", "_streams", "_timers", "model", "movable", "version", "why")

    def __init__(self, streams: OpenStreams, *, movable: bool, ask: Callable[[Why], None]) -> None:
        self._streams = streams
        self._ask = ask
        self._timers: list[Timer] = []
        self.movable = movable
        self.model, self.version = "", 0
        self.why: Why | None = None

    def used(self, model: str, version: int) -> None:
        """Its last message asked this version."""
        if version != self.version or model != self.model:
            self._streams.count(self, -1)
            self.model, self.version = model, version
            self._streams.count(self, +1)

    def ask(self, why: Why) -> None:
        """Tell it to move, unless it was told before."""
        if self.why is None or (why is Why.DRAIN and self.why is not Why.DRAIN):
            self.why = why
            self._ask(why)

    def ask_after(self, seconds: float, why: Why, later: Later) -> None:
        """Tell it later, unless it is told or over before."""
        if len(self._timers) < _TIMERS_MAX:
            self._timers.append(later(seconds, lambda: self.ask(why)))

    def close(self) -> None:
        """It is over."""
        for timer in self._timers:
            timer.cancel()
        self._timers.clear()
        self._streams.closed(self)


class OpenStreams:
    """The open streams of a process. Everything happens on the event loop.

    Args:
        later: the event loop's `call_later`. chance: chooses among streams, and spreads them over time.
        age_s: streams that can move are asked to when they are about this old; 0 for never.
    """

    def __init__(self, later: Later, *, chance: random.Random, age_s: float = 0.0) -> None:
        self._later, self._chance, self._age_s = later, chance, age_s
        self._open: dict[OpenStream, None] = {}
        self._counts: Counter[tuple[str, int]] = Counter()
        self._draining = False

    def __len__(self) -> int:
        return len(self._open)

    def open(self, *, movable: bool, ask: Callable[[Why], None]) -> OpenStream:
        """Keep a stream that was opened; see OpenStream. Close it when it is over."""
        stream = OpenStream(self, movable=movable, ask=ask)
        self._open[stream] = None
        if movable and self._age_s:
            # Streams that were opened together should not all move together.
            age_s = self._age_s * self._chance.uniform(0.8, 1.2)
            stream.ask_after(age_s, Why.AGE, self._later)
        if self._draining:
            stream.ask(Why.DRAIN)
        return stream

    def closed(self, stream: OpenStream) -> None:
        """Forget a stream; for OpenStream."""
        if stream in self._open:
            del self._open[stream]
            self.count(stream, -1)

    def count(self, stream: OpenStream, change: int) -> None:
        """Count a stream in or out of its version; for OpenStream."""
        if not stream.version:
            return
        key = (stream.model, stream.version)
        self._counts[key] += change
        left = self._counts[key]
        if left:
            STREAMS.labels(key[0], str(key[1])).set(left)
        else:
            del self._counts[key]
            with contextlib.suppress(KeyError):
                STREAMS.remove(key[0], str(key[1]))

    def open_at(self, model: str, version: int) -> int:
        """Open streams that last asked a version."""
        return self._counts[model, version]

    def move(self, *, model: str = "", version: int = 0, share: float = 0.0, spread_s: float = 0.0) -> Asked:
        """Ask streams to move.

        Args:
            model, version: only streams that last asked these; "" and 0 for all.
            share: of those that can move, above 0 to 1; 0 asks all.
            spread_s: time over which the asking is spread evenly by chance.
        """
        matched = [stream for stream in self._open if _matches(stream, model, version)]
        movable = [stream for stream in matched if stream.movable]
        count = _rounded(len(movable) * (share or 1.0), self._chance)
        chosen = self._chance.sample(movable, count)
        for stream in chosen:
            if spread_s > 0:
                stream.ask_after(self._chance.uniform(0, spread_s), Why.ASKED, self._later)
            else:
                stream.ask(Why.ASKED)
        return Asked(stream_count=len(matched), asked_count=count, pinned_count=len(matched) - len(movable))

    def drain(self) -> None:
        """The server goes away: every stream is asked now, and so is each that is still to come."""
        self._draining = True
        for stream in list(self._open):
            stream.ask(Why.DRAIN)


def _matches(stream: OpenStream, model: str, version: int) -> bool:
    return (not model or stream.model == model) and (not version or stream.version == version)


def _rounded(count: float, chance: random.Random) -> int:
    """A whole number whose expectation is `count`: over many processes shares come out right."""
    whole = math.floor(count)
    return whole + (chance.random() < count - whole)


SequenceKey = tuple[str, int, int | str]
"""A sequence of a stream: model, version, correlation id."""


class Travelling(Protocol):
    """What a runner whose sequences can go on elsewhere offers; `sequences.Sequencer` does."""

    def snapshot(self, tenant: str, sequence_id: int | str) -> Mapping[str, Array]:
        """The state of a sequence between two requests."""

    def restore(self, tenant: str, sequence_id: int | str, arrays: Mapping[str, Array]) -> None:
        """Let a sequence go on here."""

    def forget(self, tenant: str, sequence_id: int | str) -> None:
        """It goes on elsewhere."""


def travelling(runner: object) -> Travelling | None:
    """The runner, if its sequences can go on elsewhere."""
    if hasattr(runner, "snapshot") and hasattr(runner, "restore") and hasattr(runner, "forget"):
        return cast("Travelling", runner)
    return None


class OpenSequences:
    """The sequences that a stream has begun or goes on with, and not ended.

    Args:
        tenant: whose they are.
    """

    def __init__(self, tenant: str) -> None:
        self._tenant = tenant
        self._open: dict[SequenceKey, Travelling | None] = {}

    def __bool__(self) -> bool:
        return bool(self._open)

    def __len__(self) -> int:
        return len(self._open)

    def began(self, key: SequenceKey, runner: object) -> None:
        """A request of it was taken."""
        if key not in self._open:
            self._open[key] = travelling(runner)

    def ended(self, key: SequenceKey) -> None:
        """Its last request was taken, or it did not begin after all."""
        self._open.pop(key, None)

    @property
    def portable(self) -> bool:
        """Whether all of them can go on elsewhere."""
        return all(runner is not None for runner in self._open.values())

    def take(self) -> list[SequenceState]:
        """Their states, to go on elsewhere with; none of their requests may be under way.

        One that the server forgot meanwhile is left out: it would be unknown elsewhere as here.
        """
        states = []
        for (model, version, name), runner in self._open.items():
            if runner is None:
                raise TypeError(f"a sequence of model '{model}' cannot go on elsewhere")
            with contextlib.suppress(NotFound):
                state = pack(runner.snapshot(self._tenant, name))
                states.append(SequenceState(model=model, version=version, id=name, state=state))
        return states

    def forget(self) -> None:
        """Give their memory back, once they are on their way."""
        for (_, _, name), runner in self._open.items():
            if runner is not None:
                runner.forget(self._tenant, name)
        self._open.clear()
