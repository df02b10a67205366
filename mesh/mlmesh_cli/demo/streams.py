"""Step 4, traffic: open streams that go where the weights say."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rich.console import RenderableType

from mlmesh_cli.demo.story import Story
from mlmesh_cli.inferring import Query
from mlmesh_cli.render import text as t
from mlmesh_cli.render.status import table
from mlmesh_client import AioClient, AioStream
from open_inference import grpc_service_pb2 as oip

STREAMS = 24
_PAUSE_S = 0.05
_BEGIN_S = 30.0
_FOLLOW_S = 15.0
# Where one lands is chance; moving goes on until at most one stream in twenty is not where it should be.
_TOLERANCE = 0.15


class MovingStream:
    """A stream that stays open: a message, its answer, a short pause, and so on, wherever it is.

    Attributes:
        version: that gave the last answer. sent, answered: messages. wrong: answers out of order, or to nothing.
        error: why it ended too early; empty while it lives.
    """

    def __init__(self, client: AioClient, model: str, queries: Sequence[Query]) -> None:
        self._client, self._model = client, model
        self._queries = itertools.cycle(queries)
        self._stream: AioStream | None = None
        self._done = False
        self.version = ""
        self.sent = self.answered = self.wrong = 0
        self.error = ""

    @property
    def moves(self) -> int:
        """How often a server asked it to move."""
        return self._stream.moves if self._stream is not None else 0

    async def run(self) -> None:
        """Streams until `finish`. A failure is noted in `error`, not raised."""
        try:
            opened = self._client.stream(self._model, in_flight=4)
            async with opened as self._stream, asyncio.TaskGroup() as group:
                group.create_task(self._send(self._stream))
                async for result in self._stream:
                    if result.error is not None:
                        raise result.error
                    self.answered += 1
                    self.wrong += result.id != str(self.answered)
                    self.version = result.model_version
        except* Exception as errors:
            self.error = str(errors.exceptions[0])

    async def _send(self, stream: AioStream) -> None:
        while not self._done:
            message = oip.ModelInferRequest()
            message.CopyFrom(next(self._queries).request)
            self.sent += 1
            await stream.send_message(message, id=str(self.sent))
            await asyncio.sleep(_PAUSE_S)
        stream.done_sending()

    def finish(self) -> None:
        """Sends no more; it ends when all is answered."""
        self._done = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """Where streams were once a change had had its time: by version; wanted share of the second; how long it took."""

    weights: str
    versions: Counter[str]
    share: float
    took_s: float

    def observed(self, version: str) -> float:
        """The share of the streams at a version, 0 to 1."""
        total = self.versions.total()
        return self.versions[version] / total if total else 0.0


def streams_table(spreads: Iterable[Spread], versions: Sequence[str]) -> RenderableType:
    """One row a change of weights: open streams by version, and how long they took to follow."""
    first, second = versions
    result = table("weights", ">streams at v1", ">at v2", ">v2 wanted", ">v2 seen", "", ">followed in")
    for spread in spreads:
        seen = spread.observed(second)
        result.add_row(
            spread.weights,
            str(spread.versions[first]),
            str(spread.versions[second]),
            t.percent(spread.share),
            t.percent(seen),
            t.bar(seen, width=10),
            t.duration(spread.took_s),
        )
    return result


async def streams_follow(story: Story) -> None:
    """100/0 → 50/50 → 0/100 with streams open all the while: they move, and nobody notices."""
    await story.apply("split-100-0.yaml")
    client = await story.connection.inference_client()
    streams = [MovingStream(client, story.model, story.queries) for _ in range(STREAMS)]
    spreads: list[Spread] = []
    async with asyncio.TaskGroup() as group:
        for stream in streams:
            group.create_task(stream.run())
        try:
            begin = time.monotonic()
            await _until(streams, story.versions[1], 0.0, _BEGIN_S)
            spreads.append(_spread("100/0", streams, 0.0, time.monotonic() - begin))
            for weights, file, share in (("50/50", "split-50-50.yaml", 0.5), ("0/100", "split-0-100.yaml", 1.0)):
                begin = time.monotonic()
                await story.apply(file)
                await _until(streams, story.versions[1], share, _FOLLOW_S)
                spreads.append(_spread(weights, streams, share, time.monotonic() - begin))
        finally:
            for stream in streams:
                stream.finish()
    story.show(streams_table(spreads, story.versions))
    judge(story, streams, spreads)


def _spread(weights: str, streams: Sequence[MovingStream], share: float, took_s: float) -> Spread:
    return Spread(weights=weights, versions=Counter(s.version for s in streams), share=share, took_s=took_s)


def close(observed: float, wanted: float) -> bool:
    """Whether a share of the streams is the configured one; all and nothing are exact."""
    return observed == wanted if wanted in {0.0, 1.0} else abs(observed - wanted) <= _TOLERANCE


async def _until(streams: Sequence[MovingStream], version: str, share: float, most_s: float) -> None:
    """Waits until streams are where they should be, or for the time that they have."""
    end = time.monotonic() + most_s
    while time.monotonic() < end:
        # Who never had an answer is nowhere yet.
        spread = _spread("", streams, share, 0.0)
        if "" not in spread.versions and close(spread.observed(version), share):
            return
        await asyncio.sleep(_PAUSE_S)


def judge(story: Story, streams: Sequence[MovingStream], spreads: Sequence[Spread]) -> None:
    """Claims what the figures show."""
    second = story.versions[1]
    slowest = max(spread.took_s for spread in spreads[1:])
    story.check(
        "open streams follow the weights within seconds",
        all(close(spread.observed(second), spread.share) for spread in spreads) and slowest <= _FOLLOW_S,
        f"{len(streams)} streams, moved {sum(s.moves for s in streams)} times, at most {t.duration(slowest)}",
    )
    sent, answered = sum(s.sent for s in streams), sum(s.answered for s in streams)
    wrong = sum(s.wrong for s in streams)
    failed = [s.error for s in streams if s.error]
    story.check(
        "no message of theirs was lost, answered twice or out of order",
        sent == answered and answered > 0 and not wrong and not failed,
        f"{sent:,} sent, {answered:,} answered, {wrong} out of order"
        + (f"; first failure: {failed[0]}" if failed else ""),
    )
