"""A proxy for TCP that disturbs: what Envoy cannot do, because it would have to break its own connections."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections import deque
from random import Random

from mlmesh_local.chaos.disturbance import Blackhole, Disturbance

PIECE_BYTES = 64 * 1024
# What is on its way in one direction of one connection: bounds memory, and is the window of a link that is slow.
UNDER_WAY_BYTES_MAX = 4 * 1024 * 1024
CONNECTIONS_MAX = 4096
CONNECT_S = 5.0


class FaultProxy:
    """Listens at ``listen`` and hands everything on to ``target``, both "host, port", disturbed as `set` says.

    A change acts on open connections, too. ``random`` decides what is late by how much, and which bit is turned over.
    """

    def __init__(self, listen: tuple[str, int], target: tuple[str, int], *, random: Random) -> None:
        self.disturbance = Disturbance()
        self._listen = listen
        self._target = target
        self._random = random
        self._server: asyncio.Server | None = None
        self._connections: set[asyncio.Task[None]] = set()
        self._writers: set[asyncio.StreamWriter] = set()

    @property
    def address(self) -> tuple[str, int]:
        """Where it listens."""
        return self._listen

    @property
    def connections(self) -> int:
        """Connections open through it."""
        return len(self._connections)

    async def start(self) -> None:
        """Listen. Raises OSError where the address is taken."""
        self._server = await asyncio.start_server(self._accept, *self._listen, limit=PIECE_BYTES)
        self._listen = self._server.sockets[0].getsockname()[:2]

    def set(self, disturbance: Disturbance) -> None:
        """Disturb in this way from now on; a cut resets what is open."""
        self.disturbance = disturbance
        if disturbance.cut:
            self.reset()

    def reset(self) -> None:
        """End every connection with a reset, as a peer does that has gone."""
        for writer in self._writers:
            _reset(writer)

    async def close(self) -> None:
        """Listen no more and reset what is open."""
        if self._server is not None:
            self._server.close()
        self.reset()
        for task in self._connections:
            task.cancel()
        if self._connections:
            await asyncio.wait(self._connections)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self.disturbance.cut or len(self._connections) >= CONNECTIONS_MAX:
            _reset(writer)
            return
        task = asyncio.current_task()
        if task is not None:
            self._connections.add(task)
            task.add_done_callback(self._connections.discard)
        self._writers.add(writer)
        orderly = False
        try:
            orderly = await self._join(reader, writer)
        except (OSError, TimeoutError):
            # The target is not there, or one side has gone; the other learns it by the reset.
            pass
        finally:
            self._writers.discard(writer)
            if orderly:
                await _close(writer)
            else:
                _reset(writer)

    async def _join(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """Carry both ways until both sides have said all they had; False when one was reset."""
        async with asyncio.timeout(CONNECT_S):
            target_reader, target_writer = await asyncio.open_connection(*self._target, limit=PIECE_BYTES)
        self._writers.add(target_writer)
        orderly = False
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._carry(reader, target_writer, Blackhole.REQUESTS))
                group.create_task(self._carry(target_reader, writer, Blackhole.RESPONSES))
            orderly = True
        except* OSError:
            pass
        finally:
            self._writers.discard(target_writer)
            if orderly:
                await _close(target_writer)
            else:
                _reset(target_writer)
        return orderly

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, direction: Blackhole) -> None:
        """One direction: a reader stamps each piece with its time of arrival, a writer waits until it is due."""
        loop = asyncio.get_running_loop()
        pieces: deque[tuple[float, bytes]] = deque()
        changed = asyncio.Event()
        under_way = 0
        done = False

        async def read() -> None:
            nonlocal under_way, done
            while data := await reader.read(PIECE_BYTES):
                pieces.append((loop.time(), data))
                under_way += len(data)
                changed.set()
                while under_way > UNDER_WAY_BYTES_MAX:
                    changed.clear()
                    await changed.wait()
            done = True
            changed.set()

        async def write() -> None:
            nonlocal under_way
            while True:
                while not pieces:
                    if done:
                        with contextlib.suppress(OSError):
                            writer.write_eof()
                        return
                    changed.clear()
                    await changed.wait()
                arrived, data = pieces.popleft()
                await self._deliver(data, arrived, writer, direction)
                under_way -= len(data)
                changed.set()

        async with asyncio.TaskGroup() as group:
            group.create_task(read())
            group.create_task(write())

    async def _deliver(self, data: bytes, arrived: float, writer: asyncio.StreamWriter, direction: Blackhole) -> None:
        disturbance = self.disturbance
        if disturbance.delay_s or disturbance.jitter_s:
            due = arrived + disturbance.delay_s + self._random.random() * disturbance.jitter_s
            await asyncio.sleep(max(0.0, due - asyncio.get_running_loop().time()))
        # It may have changed meanwhile.
        disturbance = self.disturbance
        if disturbance.blackhole in (direction, Blackhole.BOTH):
            return
        if disturbance.corrupt and self._random.random() < disturbance.corrupt:
            data = self._corrupted(data)
        writer.write(data)
        await writer.drain()
        if disturbance.bytes_per_s:
            await asyncio.sleep(len(data) / disturbance.bytes_per_s)

    def _corrupted(self, data: bytes) -> bytes:
        broken = bytearray(data)
        broken[self._random.randrange(len(broken))] ^= 1 << self._random.randrange(8)
        return bytes(broken)


async def _close(writer: asyncio.StreamWriter) -> None:
    writer.close()
    with contextlib.suppress(OSError):
        await writer.wait_closed()


def _reset(writer: asyncio.StreamWriter) -> None:
    """Close with RST and not FIN: what a crash of the peer's machine, or a firewall, looks like."""
    raw = writer.get_extra_info("socket")
    if raw is not None:
        with contextlib.suppress(OSError):
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()
