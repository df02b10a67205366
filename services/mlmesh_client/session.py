"""One stream's bookkeeping, whatever carries it: what waits for an answer, in which order, what is to be sent again.

A stream of the library outlives connections. Every request gets a number, which is its id on the wire; an answer is
given out once, in the order of the requests (for decoupled models: as it comes). When a connection ends, requests
without an answer are sent again on the next one: inference changes nothing on the server, so the worst is work done
twice, never an answer given twice.

Requests of a sequence do change something. They are sent again after the server asked to move, for then it had answered
all that it took, and its token brings the state along or says that there is none. After a connection that just broke
nobody knows what the server had done: a sequence that had begun there is lost (SequenceLost), one whose first request
has no answer yet begins anew.

A request that was refused with a hint when to come back is sent again then, a few times; results wait for it where they
have an order.

Not thread-safe: whoever carries the stream sees to that.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from mlmesh_client.errors import InferenceError, SequenceLost, from_stream
from mlmesh_client.messages import FINAL, RESUME, Result, SequencePlace, result_of
from open_inference import grpc_service_pb2 as pb


@dataclass(slots=True, kw_only=True, eq=False)
class _Entry:
    """A request without its last answer. `given` answers were given out; `skip` more come again and are dropped."""

    number: int
    name: str
    request: pb.ModelInferRequest
    sequence: SequencePlace | None
    sent: bool = False
    tries: int = 1
    due_s: float = 0.0
    given: int = 0
    skip: int = 0
    done: bool = False
    results: deque[Result] = field(default_factory=deque)


class Session:
    """See the module.

    Args:
        ordered: give results in the order of the requests; False gives them as they come.
        retry: seconds after which a request that failed for the so-manieth time is sent again; None for never.
        clock: seconds that never go back.
    """

    def __init__(
        self,
        *,
        ordered: bool = True,
        retry: Callable[[InferenceError, int], float | None] = lambda _error, _tries: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._ordered, self._retry, self._clock = ordered, retry, clock
        self._pending: dict[int, _Entry] = {}
        self._unsent: deque[_Entry] = deque()
        self._delayed: list[_Entry] = []
        self._last = 0
        self._token: str | None = None
        self._token_sent = False
        self._live: set[int | str] = set()
        self._lost: set[int | str] = set()
        self.leaving = False
        """The server asked to move: send nothing more on this connection, and end it."""
        self.moves = 0
        self.resent = 0
        self.duplicates = 0

    def __len__(self) -> int:
        return len(self._pending)

    @property
    def to_send(self) -> bool:
        """Whether there is something to send on the present connection."""
        return bool(self._unsent) and not self.leaving

    def add(self, request: pb.ModelInferRequest, *, name: str, sequence: SequencePlace | None = None) -> list[Result]:
        """Take a request; `name` is the caller's id for it. Gives results there are at once: of a lost sequence."""
        self._last += 1
        entry = _Entry(number=self._last, name=name or str(self._last), request=request, sequence=sequence)
        request.id = str(entry.number)
        self._pending[entry.number] = entry
        if sequence is not None and sequence.id in self._lost:
            if not sequence.start:
                self._fail(entry, _lost(sequence.id))
                return self._ready()
            self._lost.discard(sequence.id)
        self._unsent.append(entry)
        return []

    def next(self) -> pb.ModelInferRequest | None:
        """The next request to send on the present connection; None when there is none now."""
        if self._delayed:
            now_s = self._clock()
            self._unsent.extend(entry for entry in self._delayed if entry.due_s <= now_s)
            self._delayed = [entry for entry in self._delayed if entry.due_s > now_s]
        if not self.to_send:
            return None
        entry = self._unsent.popleft()
        if entry.sent:
            self.resent += 1
        entry.sent = True
        if self._token is None or self._token_sent:
            return entry.request
        self._token_sent = True
        first = pb.ModelInferRequest()
        first.CopyFrom(entry.request)
        first.parameters[RESUME].string_param = self._token
        return first

    def due_s(self) -> float | None:
        """Seconds until a request is to be sent again; None when none is."""
        if not self._delayed:
            return None
        return max(0.0, min(entry.due_s for entry in self._delayed) - self._clock())

    def opened(self) -> None:
        """There is a new connection: all that has no answer is sent on it."""
        self.leaving = self._token_sent = False
        self._delayed.clear()
        self._unsent = deque(entry for entry in self._pending.values() if not entry.done)
        for entry in self._unsent:
            entry.skip = entry.given

    def received(self, message: pb.ModelStreamInferResponse) -> list[Result]:
        """A message came. Gives the results that can be given out now, in their order."""
        response = message.infer_response
        if RESUME in response.parameters:
            self._token = response.parameters[RESUME].string_param
            self.leaving = True
            self._unsent.clear()
            self.moves += 1
            return []
        # From the first answer on the token is of the past: sequences have gone on.
        self._token = None
        entry = self._entry(response.id)
        if entry is None or entry.done:
            self.duplicates += 1
            return []
        final = response.parameters[FINAL].bool_param if FINAL in response.parameters else True
        error = from_stream(message) if message.error_message else None
        if error is not None and self._again(entry, error):
            return []
        final = final or error is not None
        if entry.skip:
            entry.skip -= 1
            self.duplicates += 1
        else:
            self._give(entry, response, final=final, error=error)
        if final:
            self._finish(entry, error)
        return self._ready(entry)

    def broke(self) -> list[Result]:
        """The connection ended. Gives the results of what cannot be sent again."""
        if self._token is not None:
            return []
        lost = self._live
        self._live = set()
        self._lost |= lost
        for entry in list(self._pending.values()):
            sequence = entry.sequence
            if sequence is None or sequence.id not in self._lost or entry.done:
                continue
            if sequence.start:
                self._lost.discard(sequence.id)
            else:
                self._fail(entry, _lost(sequence.id))
        return self._ready()

    def fail(self, error: InferenceError) -> list[Result]:
        """Nothing is sent any more: all that has no answer fails."""
        for entry in self._pending.values():
            if not entry.done:
                self._fail(entry, error)
        self._unsent.clear()
        self._delayed.clear()
        return self._ready()

    def _again(self, entry: _Entry, error: InferenceError) -> bool:
        """Whether a refused request is sent again; those of a sequence are not, for later ones may have been taken."""
        if entry.sequence is not None or entry.given or (wait_s := self._retry(error, entry.tries)) is None:
            return False
        entry.tries += 1
        entry.due_s = self._clock() + wait_s
        self._delayed.append(entry)
        return True

    def _entry(self, name: str) -> _Entry | None:
        """Whose answer it is. Some servers leave the id out of errors; then it is the oldest that was sent."""
        if name:
            return self._pending.get(int(name)) if name.isascii() and name.isdigit() and len(name) < 19 else None
        return next((entry for entry in self._pending.values() if entry.sent and not entry.done), None)

    def _give(
        self, entry: _Entry, response: pb.ModelInferResponse, *, final: bool, error: InferenceError | None
    ) -> None:
        try:
            result = result_of(response, request_id=entry.name, final=final, error=error)
        except InferenceError as unreadable:
            result = Result(id=entry.name, model=response.model_name, final=final, error=unreadable)
        entry.given += 1
        entry.results.append(result)

    def _finish(self, entry: _Entry, error: InferenceError | None) -> None:
        entry.done = True
        sequence = entry.sequence
        if sequence is not None:
            if sequence.end or (error is not None and error.reason == "SEQUENCE_NOT_FOUND"):
                self._live.discard(sequence.id)
            elif error is None:
                self._live.add(sequence.id)

    def _fail(self, entry: _Entry, error: InferenceError) -> None:
        entry.results.append(Result(id=entry.name, model=entry.request.model_name, error=error))
        entry.done = True

    def _ready(self, entry: _Entry | None = None) -> list[Result]:
        """Results that can be given out; `entry`: where something changed, None for everywhere."""
        ready: list[Result] = []
        pending = self._pending
        if self._ordered:
            while pending:
                first = next(iter(pending.values()))
                ready.extend(first.results)
                first.results.clear()
                if not first.done:
                    break
                del pending[first.number]
            return ready
        for each in (entry,) if entry is not None else list(pending.values()):
            ready.extend(each.results)
            each.results.clear()
            if each.done:
                del pending[each.number]
        return ready


def _lost(sequence: int | str) -> SequenceLost:
    return SequenceLost(
        f"the connection broke, and with it the state of sequence {sequence!r}: begin it again",
        code="UNAVAILABLE",
        reason="SEQUENCE_LOST",
        field="parameters[sequence_id]",
    )
