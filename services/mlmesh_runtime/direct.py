"""The direct lane: RPCs answered without a task, a future or a context of their own.

A service names methods in `Service.direct`. The transport then hands their calls (unary) or messages (of bidirectional
streams) to a `DirectMethod`, in bursts, on the event loop. The method looks at each, starts what is to be done, and
returns; answers follow whenever they are there, from the event loop's thread, by the `DirectCall` they belong to.

    def infer(calls: Sequence[DirectCall]) -> None:
        for call in calls:
            if call.done():
                continue
            try:
                work = read(call.request, deadline_ns=call.deadline_ns)
            except MeshError as error:
                call.fail(error)
            else:
                if work is None:
                    call.generic()  # the servicer's ordinary method answers this one
                else:
                    runner.submit(work, ReplySink(call))

What holds without the method's doing, on every transport: deadlines (an expired call is answered DEADLINE_EXCEEDED and
is `done`), cancellation, message bounds, `Limits`, required deadlines, identity rules of streams, metrics, spans, the
idle bound of streams, drain (a stream ends after what was read is answered, with `Service.going_away`), errors by the
table of `mlmesh_runtime.status`.

A stream's messages are numbered as they come, and its answers leave in that order, whatever order they are given in.
At most `CREDIT` messages of a stream are read and not yet sent an answer for: a client that does not read holds up
only its own stream.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final, Protocol, TypeAlias

from mlmesh_runtime.calls import Call
from mlmesh_runtime.errors import MeshError

CREDIT: Final = 64
"""Messages of one stream between being read and their last answer being sent."""

Payload: TypeAlias = bytes | bytearray | memoryview
"""A piece of an encoded message. A memoryview is C-contiguous bytes, and must not change until the call is over."""


class DirectCall(Protocol):
    """One unary call, or one message of a stream. Belongs to the event loop's thread.

    Exactly one of `reply`, `finish`, `fail` and `generic` ends it. What comes after the end is ignored, and so is
    everything when the peer is gone: nobody needs to ask first.
    """

    @property
    def request(self) -> bytes:
        """The encoded message. May be made anew on each access: read it once."""

    @property
    def deadline_ns(self) -> int:
        """When the caller stops waiting, by `time.monotonic_ns()`; 0: never said. Of the whole stream for a message."""

    @property
    def streaming(self) -> bool:
        """Whether this is a message of a stream."""

    def metadata(self, name: str) -> str | None:
        """The last value of a lower-case metadata key that is text; None when absent."""

    def context(self) -> Call:
        """What `CURRENT` holds inside an ordinary handler: identity, all metadata, peer. Made on the first access."""

    def done(self) -> bool:
        """Whether an answer would reach nobody: it was given, the peer is gone or gave up, or time is over.

        True also for messages that came after one whose stream was given to the ordinary method by `generic`.
        """

    def reply(self, *payload: Payload) -> None:
        """The one answer, or the last one: an encoded message, in pieces that are sent one after the other."""

    def send(self, *payload: Payload) -> None:
        """One of several answers to a message. Streams only; nothing bounds how many wait: for a few, not for many."""

    def finish(self) -> None:
        """No more answers to this message, or none at all. Streams only."""

    def fail(self, error: MeshError) -> None:
        """End the call with an error's status. A message: after the answers to earlier ones, its stream ends so."""

    def generic(self) -> None:
        """Let the servicer's ordinary method answer, as if there were no direct one.

        Only inside of the `DirectMethod`, and before anything was answered. A message: its stream from this message
        on; earlier messages are answered first, and later ones of the burst are `done`.
        """


DirectMethod: TypeAlias = Callable[[Sequence[DirectCall]], None]
"""Takes a burst of calls, on the event loop. Never waits. Must not raise: what does is logged, and those of the burst
that have no answer yet end with INTERNAL."""
