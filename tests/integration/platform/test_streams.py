"""Open streams follow the weights, through real sidecars: asked by `mlmesh apply`, moved by the client library."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import numpy as np
import pytest

from mlmesh_cli import samples
from mlmesh_client import AioClient
from tests.integration.platform.conftest import WeightsFile
from tests.support.live_platform import HOST, Platform

STREAMS = 16
MODEL, DATASET = "mnist", "mnist"
WITHIN_S = 20.0


class Following:
    """Streams that send one message after the other until told to stop, and where each was answered last."""

    def __init__(self, address: str) -> None:
        self._address = address
        self.versions = [""] * STREAMS
        self.sent = [0] * STREAMS
        self.answered: list[list[str]] = [[] for _ in range(STREAMS)]
        self.moves = [0] * STREAMS
        self._enough = asyncio.Event()

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[Following]:
        image = np.ascontiguousarray(samples.load(DATASET).images[:1])
        client = AioClient(self._address, authority=f"{HOST}:9000", timeout=30)
        async with client, asyncio.TaskGroup() as group:
            for number in range(STREAMS):
                group.create_task(self._stream(client, number, image))
            try:
                yield self
            finally:
                self._enough.set()

    async def _stream(self, client: AioClient, number: int, image: Any) -> None:
        async with client.stream(MODEL, in_flight=2) as stream:
            while not self._enough.is_set():
                self.sent[number] += 1
                await stream.send(image.reshape(1, *stream.model.inputs[0].shape[1:]), id=str(self.sent[number]))
                result = (await stream.receive(timeout=30)).raise_for_error()
                self.answered[number].append(result.id)
                self.versions[number] = result.model_version
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._enough.wait(), 0.02)
            self.moves[number] = stream.moves

    async def at_second(self, least: int, most: int) -> None:
        """Wait until so many streams are answered by version 2."""
        async with asyncio.timeout(WITHIN_S):
            while "" in self.versions or not least <= self.versions.count("2") <= most:  # noqa: ASYNC110
                await asyncio.sleep(0.02)


@pytest.mark.timeout(120)
async def test_open_streams_follow_the_weights_and_lose_nothing(platform: Platform, weights: WeightsFile) -> None:
    async def apply(v1: int, v2: int, *more: str) -> str:
        return (await asyncio.to_thread(platform.mlmesh, "apply", "-f", weights(v1, v2), *more)).stdout

    async with Following(platform.outbound()).running() as streams:
        await streams.at_second(0, 0)
        assert "follow" not in await apply(0, 100, "--leave-streams")
        assert streams.versions.count("2") == 0
        moved = await asyncio.to_thread(platform.json, "streams", "move", "--follow")
        assert (moved["streams"], moved["asked"], moved["pinned"]) == (STREAMS, STREAMS, 0)
        places = {process["name"]: sum(process["streams"].values()) for process in moved["processes"]}
        assert places == {"inference-v1-0": 0, "inference-v1-1": 0, "inference-v2-0": STREAMS}
        await streams.at_second(STREAMS, STREAMS)
        assert f"{STREAMS} open streams" in await apply(50, 50)
        # Chance decides where one lands; whoever is too many is asked again.
        await streams.at_second(STREAMS // 2 - 3, STREAMS // 2 + 3)
    assert sum(streams.moves) >= STREAMS
    assert streams.answered == [[str(n) for n in range(1, sent + 1)] for sent in streams.sent]
