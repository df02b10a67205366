"""Continuous traffic whose answers are counted by phase and by the version that gave them."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import grpc

from mlmesh_cli.inferring import Metadata, Query, read_answer
from open_inference import grpc_service_pb2 as oip

if TYPE_CHECKING:
    from open_inference.grpc_service_pb2_grpc import GRPCInferenceServiceAsyncStub


# Generous: a request that waits out a busy laptop is slow, not failed.
REQUEST_DEADLINE_S = 20.0
_STREAM_PAUSE_S = 0.02
_STREAM_DEADLINE_S = 600.0


@dataclass(slots=True, kw_only=True)
class Phase:
    """What happened to the requests sent while it lasted.

    Attributes:
        name: what the traffic was told to do.
        target: requests wanted.
        share: configured share of the second version, 0 to 1; -1 where none applies.
    """

    name: str
    target: int = 0
    share: float = -1.0
    answers: Counter[str] = field(default_factory=Counter)
    right: Counter[str] = field(default_factory=Counter)
    latencies_s: list[float] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    complete: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def requests(self) -> int:
        """Requests that ended, well or not."""
        return self.answers.total() + len(self.failures)

    def observed(self, version: str) -> float:
        """The share of the answers that a version gave, 0 to 1."""
        total = self.answers.total()
        return self.answers[version] / total if total else 0.0

    def percentile_s(self, share: float) -> float:
        """A percentile of the latencies, seconds."""
        ordered = sorted(self.latencies_s)
        return ordered[min(int(len(ordered) * share), len(ordered) - 1)] if ordered else 0.0


class Traffic:
    """Workers that send one unary request after the other, round the queries, until told to stop.

    Args:
        stub: inference, through the mesh.
        queries: what to send.
        concurrency: workers.
        metadata: headers of every request.
    """

    def __init__(
        self,
        stub: GRPCInferenceServiceAsyncStub,
        queries: Sequence[Query],
        *,
        concurrency: int,
        metadata: Metadata = (),
    ) -> None:
        self._stub = stub
        self._queries = itertools.cycle(queries)
        self._concurrency = concurrency
        self._metadata = metadata
        self._stopped = False
        self.phases: list[Phase] = []

    def begin(self, phase: Phase) -> Phase:
        """Requests sent from now on belong to this phase."""
        self.phases.append(phase)
        return phase

    @property
    def failures(self) -> list[str]:
        """What went wrong, in all phases."""
        return [failure for phase in self.phases for failure in phase.failures]

    @property
    def requests(self) -> int:
        """Requests that ended, in all phases."""
        return sum(phase.requests for phase in self.phases)

    @contextlib.asynccontextmanager
    async def running(self, first: Phase) -> AsyncIterator[None]:
        """Sends while the block runs; requests under way at its end are waited for."""
        self.begin(first)
        self._stopped = False
        async with asyncio.TaskGroup() as group:
            for _ in range(self._concurrency):
                group.create_task(self._work())
            try:
                yield
            finally:
                self._stopped = True

    async def run(self, phase: Phase) -> Phase:
        """Sends until the phase has its target."""
        async with self.running(phase):
            await self.reached(phase)
        return phase

    async def reached(self, phase: Phase) -> None:
        """Waits until the phase has its target."""
        await phase.complete.wait()

    async def _work(self) -> None:
        while not self._stopped:
            await self._send(next(self._queries), self.phases[-1])

    async def _send(self, query: Query, phase: Phase) -> None:
        begin = time.perf_counter()
        try:
            response = await self._stub.ModelInfer(query.request, metadata=self._metadata, timeout=REQUEST_DEADLINE_S)
        except grpc.aio.AioRpcError as error:
            phase.failures.append(f"{error.code().name}: {error.details()}")
        else:
            answer = read_answer(query, response, 0.0)
            phase.answers[answer.version] += 1
            phase.right[answer.version] += answer.predicted == query.expected
        phase.latencies_s.append(time.perf_counter() - begin)
        if phase.requests >= phase.target:
            phase.complete.set()


class OpenStream:
    """One ModelStreamInfer that stays open: a message, its answer, a short pause, and so on.

    Attributes:
        answers: by the version that gave them.
        error: why it ended too early; empty while it lives.
    """

    def __init__(self, stub: GRPCInferenceServiceAsyncStub, queries: Sequence[Query]) -> None:
        self._stub = stub
        self._queries = itertools.cycle(queries)
        self._done = False
        self._sent = 0
        self.answers: Counter[str] = Counter()
        self.error = ""

    async def run(self) -> None:
        """Streams until `finish`. A failure is noted in `error`, not raised."""
        answered = asyncio.Event()

        async def requests() -> AsyncIterator[oip.ModelInferRequest]:
            while not self._done:
                self._sent += 1
                yield next(self._queries).request
                await answered.wait()
                answered.clear()
                await asyncio.sleep(_STREAM_PAUSE_S)

        try:
            async for message in self._stub.ModelStreamInfer(requests(), timeout=_STREAM_DEADLINE_S):
                answered.set()
                if message.error_message:
                    self.error = message.error_message
                    return
                self.answers[message.infer_response.model_version] += 1
        except grpc.aio.AioRpcError as error:
            self.error = f"{error.code().name}: {error.details()}"
        if not self.error and self.answers.total() != self._sent:
            self.error = f"{self._sent - self.answers.total()} messages were not answered"

    def finish(self) -> None:
        """Half-closes the stream after the message under way."""
        self._done = True
