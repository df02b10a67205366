"""ModelStreamInfer: requests as they come, answers in their order, errors in their place, and streams that move.

A reader takes requests as they arrive; the writer sends answers in that order, those of decoupled models as they come.
At most `IN_FLIGHT_MAX` requests of a stream are on their way, and at most `ANSWERS_MAX` answers of decoupled models
wait: a client that does not read holds back only its own stream.

A client that says `mlmesh-stream: resumable` can open its stream again without losing anything, and is asked to when
the server drains, the mesh's weights changed (MoveStreams) or the stream is old. What happens then:

1. The server takes no further message, and answers every one that it took.
2. It sends an answer without id and outputs whose parameter `mlmesh_resume` is a token, and drops what still comes.
3. The client ends its side; the server ends the stream with OK.
4. The client opens a new stream, which the mesh routes by its present weights, puts the token into the parameter
   `mlmesh_resume` of the first message, and sends again what was not answered.

An open sequence of a stateful model lives in the server. Asked by MoveStreams or age, a stream moves when its sequences
have ended. A server that drains puts their states into the token, where it has a key to seal it with
(MLMESH_STREAM_KEY); the same version elsewhere goes on with them. Without a key it waits for them to end, a part of
the grace time; then the stream ends with UNAVAILABLE, as streams of clients that cannot move do at once.

To such a client errors in their place also tell their code and reason, as parameters `mlmesh_code`, `mlmesh_reason`,
`mlmesh_field` and `mlmesh_retry_after_ms` of the answer.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import deque
from collections.abc import AsyncIterable, Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from mlmesh_inference.catalog import Catalog, ReadyModel
from mlmesh_inference.moving import MOVED, RESUMED, OpenSequences, OpenStreams, SequenceKey, Why, travelling
from mlmesh_inference.oip import requests
from mlmesh_inference.oip.infer import Prepared, prepare, shutting_down, unplaced
from mlmesh_inference.oip.stream_replies import MESSAGES, empty, failed, part, unexpected_error
from mlmesh_inference.running import SequenceControl
from mlmesh_inference.statistics import counted
from mlmesh_inference.tensors import Array
from mlmesh_inference.tokens import FIELD, SequenceState, Token, Tokens, unpack
from mlmesh_runtime.errors import InvalidInput, MeshError, NotFound
from open_inference import grpc_service_pb2 as pb

_LOG = logging.getLogger(__name__)

IN_FLIGHT_MAX: Final = 64
"""Requests of one stream between being read and being answered."""
ANSWERS_MAX: Final = 64
"""Answers of decoupled models to one stream that wait for its client."""
ANNOUNCED: Final = ("mlmesh-stream", "resumable")
"""Metadata of a stream whose client can move."""
RESUME: Final = "mlmesh_resume"
"""Parameter that carries the token, both ways."""
LEAVE_S: Final = 10.0
"""A client that was told to move has this long to end its side."""
HEAR_S: Final = 0.02
"""An error that ends a stream waits for the next message of a client that has not ended its side."""
HEAR_TRIES_MAX: Final = 12

Write = Callable[[pb.ModelStreamInferResponse], Awaitable[None]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Streaming:
    """What the streams of a process share.

    Attributes:
        catalog: the models. open: who is open. tokens: writes and reads tokens.
        hold_s: how long a draining server waits for open sequences that cannot travel.
        regions: registered shared memory, if any. always_raw: as of requests.read.
        wall: the wall clock, seconds since 1970.
    """

    catalog: Catalog
    open: OpenStreams
    tokens: Tokens
    hold_s: float = 5.0
    regions: requests.Regions | None = None
    always_raw: bool = False
    wall: Callable[[], float] = time.time


async def answer(
    shared: Streaming,
    messages: AsyncIterable[pb.ModelInferRequest],
    write: Write,
    *,
    movable: bool = False,
    grpc_errors: bool = False,
    owner: str = "",
) -> None:
    """Answer a stream to its end.

    Args:
        write: sends one answer; waits while the client is behind.
        movable: the client can open the stream again without losing anything.
        grpc_errors: the first request that fails ends the stream with its status, instead of an answer in its place.
        owner: identity of the client, "" when unknown.
    """
    stream = _Stream(shared, write, movable=movable, grpc_errors=grpc_errors, owner=owner)
    try:
        await stream.run(messages)
    finally:
        stream.place.close()


class _Slot:
    """The place of one request among the answers, and the sink of its work."""

    __slots__ = ("_stream", "arrays", "error", "model_name", "name", "prepared", "settled", "starts", "withdrawn")

    def __init__(self, stream: _Stream, message: pb.ModelInferRequest) -> None:
        self._stream = stream
        self.name, self.model_name = message.id, message.model_name
        self.prepared: Prepared | None = None
        self.starts: SequenceKey | None = None
        self.arrays: Sequence[Array] = ()
        self.error: Exception | None = None
        self.settled = self.withdrawn = False

    def done(self) -> bool:
        """See Sink."""
        return self.settled or self.withdrawn

    def answer(self, arrays: Sequence[Array]) -> None:
        """See Sink."""
        if not self.settled:
            self.arrays, self.settled = arrays, True
            self._stream.changed.set()

    def fail(self, error: Exception) -> None:
        """See Sink."""
        if not self.settled:
            self.error, self.settled = unplaced(error), True
            if self.starts is not None:
                self._stream.never_began(self.starts)
            self._stream.changed.set()


class _Stream:
    """One stream. `changed` is set whenever the writer may have something to do."""

    def __init__(self, shared: Streaming, write: Write, *, movable: bool, grpc_errors: bool, owner: str) -> None:
        self._shared, self._write = shared, write
        self._movable, self._grpc_errors, self._owner = movable, grpc_errors, owner
        self._slots: deque[_Slot] = deque()
        self._answers: deque[pb.ModelStreamInferResponse] = deque()
        self._room = asyncio.Semaphore(IN_FLIGHT_MAX)
        self._answers_room = asyncio.Semaphore(ANSWERS_MAX)
        self._responding: set[asyncio.Task[None]] = set()
        self._sequences = OpenSequences(owner)
        self._holding: asyncio.TimerHandle | None = None
        self._leaving = self._gave_up = self._read_all = False
        self._dropped = 0
        self._ending: MeshError | None = None
        self._moves = 0
        self._first = True
        self.changed = asyncio.Event()
        self.place = shared.open.open(movable=movable, ask=self._asked)

    async def run(self, messages: AsyncIterable[pb.ModelInferRequest]) -> None:
        """Answer to the end. Raises the error that ends the stream."""
        async with asyncio.TaskGroup() as group:
            reader = group.create_task(self._read(messages, group))
            try:
                try:
                    await self._answer_all()
                except MeshError:
                    await self._hear_out(reader)
                    raise
                if self._ending is not None:
                    raise self._ending
                if self._leaving and (self._dropped or not self._read_all):
                    await self._leave(reader)
            finally:
                reader.cancel()
                for task in self._responding:
                    task.cancel()
                for slot in self._slots:
                    slot.withdrawn = True
                if self._holding is not None:
                    self._holding.cancel()

    # Being asked to move.

    def _asked(self, why: Why) -> None:
        if why is Why.DRAIN and self._holding is None:
            self._holding = asyncio.get_running_loop().call_later(self._shared.hold_s, self._give_up)
        self._look()

    def _give_up(self) -> None:
        self._gave_up = True
        self._look()

    def never_began(self, sequence: SequenceKey) -> None:
        """The request that was to begin a sequence failed."""
        self._sequences.ended(sequence)
        self._look()

    def _look(self) -> None:
        """Leave now, if it was asked for and nothing that is open holds it."""
        why = self.place.why
        if why is None or self._leaving:
            return
        held = self._movable and bool(self._sequences) and not self._gave_up
        if held and why is Why.DRAIN and self._shared.tokens.sealed:
            held = not self._sequences.portable
        self._leaving = not held
        self.changed.set()

    async def _leave(self, reader: asyncio.Task[None]) -> None:
        token = self._token() if self._movable else None
        if token is None:
            raise shutting_down()
        message = pb.ModelStreamInferResponse()
        message.infer_response.parameters[RESUME].string_param = token
        await self._write(message)
        self._sequences.forget()
        MOVED.labels((self.place.why or Why.ASKED).value).inc()
        await asyncio.wait({reader}, timeout=LEAVE_S)

    def _token(self) -> str | None:
        """None when something open cannot be taken along."""
        states: list[SequenceState] = []
        if self._sequences:
            if not self._shared.tokens.sealed or not self._sequences.portable:
                return None
            try:
                states = self._sequences.take()
            except MeshError:
                # On its way from one engine of this process to another at this very moment.
                return None
        token = Token(moves=self._moves + 1, owner=self._owner, written_s=self._shared.wall(), sequences=tuple(states))
        try:
            return self._shared.tokens.write(token)
        except ValueError:
            _LOG.warning("sequences do not fit into a token", extra={"sequences": len(states)})
            return None

    # Requests.

    async def _read(self, messages: AsyncIterable[pb.ModelInferRequest], group: asyncio.TaskGroup) -> None:
        try:
            async for message in messages:
                if not self._leaving:
                    await self._room.acquire()
                # It may have been asked to leave in the meantime.
                if self._leaving:
                    self._dropped += 1
                else:
                    self._take(message, group)
                del message  # it would be kept until the next one comes
        except MeshError as error:
            self._ending = error
        self._read_all = True
        self.changed.set()

    async def _hear_out(self, reader: asyncio.Task[None]) -> None:
        """Read on for a moment before an error ends the stream: not every client gets to see it while it sends."""
        self._leaving = True
        self._room.release()
        for _ in range(HEAR_TRIES_MAX):
            before = self._dropped
            await asyncio.wait({reader}, timeout=HEAR_S)
            if reader.done() or self._dropped == before:
                return

    def _take(self, message: pb.ModelInferRequest, group: asyncio.TaskGroup) -> None:
        slot = _Slot(self, message)
        try:
            if self._first:
                self._first = False
                if RESUME in message.parameters:
                    self._resume(message.parameters[RESUME])
                    del message.parameters[RESUME]
            self._start(slot, message, group)
        except MeshError as error:
            self._slots.append(slot)
            slot.fail(error)
        except Exception as error:
            self._slots.append(slot)
            slot.fail(unexpected_error(error))

    def _start(self, slot: _Slot, message: pb.ModelInferRequest, group: asyncio.TaskGroup) -> None:
        shared = self._shared
        prepared = prepare(shared.catalog, message, regions=shared.regions, always_raw=shared.always_raw)
        model = prepared.model
        self.place.used(model.name, model.version)
        slot.prepared = prepared
        if model.runner.decoupled:
            task = group.create_task(self._respond(slot, prepared))
            self._responding.add(task)
            task.add_done_callback(self._responded)
            return
        model.runner.submit(prepared.work, slot)
        self._slots.append(slot)
        if prepared.work.sequence is not None:
            self._note(slot, model, prepared.work.sequence)

    def _note(self, slot: _Slot, model: ReadyModel, sequence: SequenceControl) -> None:
        key = (model.name, model.version, sequence.id)
        if sequence.end:
            self._sequences.ended(key)
            self._look()
        elif slot.error is None:
            self._sequences.began(key, model.runner)
            slot.starts = key if sequence.start else None

    def _resume(self, parameter: pb.InferParameter) -> None:
        """Take over what the token carries. Nobody fails for a token that is refused: what goes on without a state says
        so itself."""
        try:
            if parameter.WhichOneof("parameter_choice") != "string_param":
                raise InvalidInput(f"'{RESUME}' parameter must be a string", field=FIELD)
            token = self._shared.tokens.read(parameter.string_param, owner=self._owner, now_s=self._shared.wall())
            for item in token.sequences:
                self._restore(item)
        except MeshError as error:
            RESUMED.labels("refused").inc()
            _LOG.info("a stream did not resume", extra={"reason": error.reason, "error": error.message})
        else:
            self._moves = token.moves
            RESUMED.labels("resumed").inc()

    def _restore(self, item: SequenceState) -> None:
        model = self._shared.catalog.find(item.model, str(item.version))
        runner = None if model is None else travelling(model.runner)
        if model is None or runner is None:
            raise NotFound(
                f"sequence {item.id!r} was with version {item.version} of model '{item.model}', which is not served "
                "here: begin it again",
                reason="SEQUENCE_NOT_FOUND",
            )
        runner.restore(self._owner, item.id, unpack(item.state))
        self._sequences.began((item.model, item.version, item.id), model.runner)

    async def _respond(self, slot: _Slot, prepared: Prepared) -> None:
        """All answers of a decoupled model to one request, as they come."""
        try:
            answers: Any = prepared.model.runner.respond(prepared.work)
            async with contextlib.aclosing(counted(answers, prepared.model.statistics)) as parts:
                async for item in parts:
                    await self._say(part(prepared, item))
            MESSAGES.by_code["OK"] += 1
            if prepared.request.options.empty_final:
                await self._say(empty(prepared))
        except MeshError as error:
            slot.fail(error)
        except Exception as error:
            slot.fail(unexpected_error(error))
        if slot.settled:
            self._slots.append(slot)
        else:
            self._room.release()

    def _responded(self, task: asyncio.Task[None]) -> None:
        self._responding.discard(task)
        self.changed.set()

    async def _say(self, reply: pb.ModelStreamInferResponse) -> None:
        await self._answers_room.acquire()
        self._answers.append(reply)
        self.changed.set()

    # Answers.

    async def _answer_all(self) -> None:
        """Send answers until all that was taken is answered and no more is taken."""
        slots, answers, changed, write = self._slots, self._answers, self.changed, self._write
        while True:
            changed.clear()
            while answers:
                await write(answers.popleft())
                self._answers_room.release()
            while slots and slots[0].settled:
                await write(self._reply(slots.popleft()))
                self._room.release()
            if slots or answers or self._responding:
                await changed.wait()
            elif self._leaving or self._read_all:
                return
            else:
                await changed.wait()

    def _reply(self, slot: _Slot) -> pb.ModelStreamInferResponse:
        error = slot.error
        if error is None and slot.prepared is not None:
            try:
                reply = pb.ModelStreamInferResponse(infer_response=slot.prepared.reply(slot.arrays, final=True))
            except Exception as caught:
                error = caught
            else:
                MESSAGES.by_code["OK"] += 1
                return reply
        told = error if isinstance(error, MeshError) else unexpected_error(error)
        if self._grpc_errors:
            raise told
        return failed(slot.name, slot.model_name, told, details=self._movable)
