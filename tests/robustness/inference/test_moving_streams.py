"""Streams over servers that die, drain and are asked, and over connections that break: every answer once, in order."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import signal
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from mlmesh.inference.v1 import control_pb2, control_pb2_grpc
from mlmesh_client import AioClient, Client, SequencePlace
from tests.support.fault_proxy import FaultProxy, fault_proxy
from tests.support.inference import eventually
from tests.support.server import Process, spawn
from tests.support.tools import ROOT

PROCESS = str(ROOT / "tests" / "support" / "moving_process.py")
TIMEOUT_S = 60.0
PART = 150
PAUSE_S = 0.002

pytestmark = pytest.mark.timeout(180)


class Servers:
    """Two server processes, versions 1 and 2, behind one proxy; a fresh one takes the place of one that went."""

    def __init__(self, stack: contextlib.ExitStack, transport: str, *arguments: str) -> None:
        self._stack, self._transport, self._arguments = stack, transport, arguments
        self.running: dict[int, tuple[Process, str]] = {}

    def _spawn(self, version: int) -> Process:
        environment = {"MLMESH_LISTEN": "127.0.0.1:0", "MLMESH_TRANSPORT": self._transport, "MLMESH_GRACE_S": "5"}
        return self._stack.enter_context(spawn(PROCESS, str(version), *self._arguments, env=environment))

    async def start(self, *versions: int) -> None:
        """Start these versions, at once."""
        started = [(version, self._spawn(version)) for version in versions]
        for version, process in started:
            self.running[version] = (process, await asyncio.to_thread(process.listening))

    def address(self, version: int) -> str:
        return self.running[version][1]

    def signal(self, version: int, number: signal.Signals) -> Process:
        process, _ = self.running.pop(version)
        process.signal(number)
        return process


@contextlib.asynccontextmanager
async def two_servers(transport: str, *arguments: str) -> AsyncIterator[tuple[Servers, FaultProxy]]:
    with contextlib.ExitStack() as stack:
        servers = Servers(stack, transport, *arguments)
        await servers.start(1, 2)
        async with fault_proxy(servers.address(1)) as proxy:
            yield servers, proxy


async def ask_to_move(address: str) -> control_pb2.MoveStreamsResponse:
    async with grpc.aio.insecure_channel(address) as channel:
        stub: Any = control_pb2_grpc.InferenceControlServiceStub(channel)
        answer: control_pb2.MoveStreamsResponse = await stub.MoveStreams(control_pb2.MoveStreamsRequest(), timeout=10)
        return answer


# Beyond the rows that the model of the process fails on.
FIRST = 1000


def row(number: int) -> Any:
    return np.array([[number]], np.float32)


class Seen:
    """What came back: numbers in the order of their results, and the versions that answered; `enough` ends it."""

    def __init__(self) -> None:
        self.numbers: list[int] = []
        self.versions: Counter[str] = Counter()
        self.enough = False

    def add(self, result: Any) -> None:
        self.numbers.append(int(result["y"][0, 0]))
        self.versions[result.model_version] += 1

    async def more(self) -> None:
        """Wait until some more results are there."""
        count = len(self.numbers) + PART
        await eventually(lambda: len(self.numbers) >= count, timeout_s=TIMEOUT_S)

    def numbers_to_send(self) -> Iterator[int]:
        """Until it is enough."""
        for number in itertools.count(FIRST):
            if self.enough:
                return
            yield number


async def stream_async(address: str, seen: Seen) -> tuple[int, int]:
    async def numbers() -> AsyncIterator[Any]:
        for number in seen.numbers_to_send():
            await asyncio.sleep(PAUSE_S)
            yield {"x": row(number)}

    client = AioClient(address, timeout=TIMEOUT_S)
    async with client, client.stream("echo", in_flight=16, stalled_s=2.0, give_up_s=TIMEOUT_S) as stream:
        async for result in stream.map(numbers()):
            seen.add(result)
        return stream.moves, stream.connections


def stream_blocking(address: str, seen: Seen) -> tuple[int, int]:
    client = Client(address, timeout=TIMEOUT_S)
    with client, client.stream("echo", in_flight=16, stalled_s=2.0, give_up_s=TIMEOUT_S) as stream:
        for result in stream.map({"x": row(number)} for number in seen.numbers_to_send()):
            seen.add(result)
            time.sleep(PAUSE_S)
        return stream.moves, stream.connections


async def disturb(servers: Servers, proxy: FaultProxy, seen: Seen) -> None:
    """Everything that may happen, one after the other, while answers come."""
    for step in range(6):
        await seen.more()
        here, there = (1, 2) if proxy.upstream == servers.address(1) else (2, 1)
        if step == 0:
            # The weights changed: the proxy leads elsewhere, and only who opens again gets there.
            proxy.upstream = servers.address(there)
            await ask_to_move(servers.address(here))
            proxy.cut()
        elif step == 1:
            proxy.cut()
        elif step == 2:
            proxy.upstream = servers.address(there)
            servers.signal(here, signal.SIGKILL)
            await servers.start(here)
        elif step == 3:
            proxy.upstream = servers.address(there)
            drained = servers.signal(here, signal.SIGTERM)
            assert await asyncio.to_thread(drained.wait) == 0
            await servers.start(here)
        elif step == 4:
            # A server that hangs: nothing is reset, nothing comes.
            proxy.hung = True
            await asyncio.sleep(2.5)
            proxy.cut()
            proxy.hung = False
        else:
            assert (await ask_to_move(servers.address(here))).asked_count >= 1
    await seen.more()
    seen.enough = True


async def test_every_message_is_answered_once_and_in_order_whatever_happens(each_transport: str) -> None:
    # Processes take seconds to start: one kind of client a transport is enough.
    kind = "async" if each_transport == "grpcio" else "blocking"
    seen = Seen()
    async with two_servers(each_transport) as (servers, proxy), asyncio.TaskGroup() as group:
        group.create_task(disturb(servers, proxy, seen))
        if kind == "async":
            moves, connections = await stream_async(proxy.address, seen)
        else:
            moves, connections = await asyncio.to_thread(stream_blocking, proxy.address, seen)
    assert len(seen.numbers) >= 7 * PART
    assert seen.numbers == list(range(FIRST, FIRST + len(seen.numbers)))
    assert set(seen.versions) == {"1", "2"}
    assert moves >= 2
    assert connections >= 6


async def test_a_draining_server_sends_a_sequences_state_along(tmp_path: Path) -> None:
    key = tmp_path / "key"
    key.write_bytes(b"a key of sixteen bytes or more")
    async with two_servers("grpcio", str(key)) as (servers, proxy):
        client = AioClient(proxy.address, timeout=TIMEOUT_S)
        async with client, client.stream("sum") as stream:
            total = 0
            for number in range(20):
                total += number
                await stream.send(row(number), sequence=SequencePlace(id=9, start=number == 0, end=number == 19))
                result = await stream.receive(timeout=TIMEOUT_S)
                assert float(result["y"][0, 0]) == total, (number, result)
                if number == 10:
                    proxy.upstream = servers.address(2)
                    drained = servers.signal(1, signal.SIGTERM)
                    assert await asyncio.to_thread(drained.wait) == 0
            assert stream.moves == 1
