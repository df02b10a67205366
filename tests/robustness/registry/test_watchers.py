"""Watchers that do not read, and registries that do not answer."""

from __future__ import annotations

import asyncio
import signal
import urllib.request
from pathlib import Path

import psutil

from mlmesh.registry.v1 import registry_pb2 as pb
from mlmesh_runtime.channel import NO_DEADLINE, open_channel
from mlmesh_runtime.errors import NotReady, Overloaded
from mlmesh_runtime.limits import Limits
from tests.support.registry_process import Client, connected, refused, running
from tests.support.server import Process

MIB = 1 << 20


async def _update(client: Client, etag: str, count: int) -> str:
    """Make changes of 60 KB each; the last etag."""
    for number in range(count):
        request = pb.UpdateModelRequest(name="models/m", description=f"{number} " + "x" * 60_000, etag=etag)
        etag = (await client.stub.UpdateModel(request)).model.etag
    return etag


def _ended_as_too_slow(process: Process) -> bool:
    metrics = process.wait_for(lambda entry: entry.get("event") == "listening")["metrics"]
    with urllib.request.urlopen(f"http://{metrics}/metrics", timeout=30) as page:
        text = page.read().decode()
    return any(
        line.startswith("grpc_server_handled_total") and "WatchModels" in line and "RESOURCE_EXHAUSTED" in line
        for line in text.splitlines()
    )


async def test_a_watcher_that_stops_reading_is_ended_while_others_go_on(tmp_path: Path) -> None:
    env = {
        "MLMESH_REGISTRY_WATCH_STALL_S": "0.5",
        "MLMESH_REGISTRY_BOOKMARK_S": "0.1",
        "MLMESH_METRICS_LISTEN": "127.0.0.1:0",
    }
    with running(tmp_path / "data", env=env) as (process, address):
        async with connected(address) as slow, connected(address) as client:
            etag = (await client.create_model()).etag
            stuck = aiter(slow.stub.WatchModels(pb.WatchModelsRequest(), timeout=NO_DEADLINE))
            first = await anext(stuck)
            reading = aiter(client.stub.WatchModels(pb.WatchModelsRequest(), timeout=NO_DEADLINE))
            before = psutil.Process(process.pid).memory_info().rss
            await _update(client, etag, 200)
            async with asyncio.timeout(20):
                # Its end is the server's doing: this client has not read on.
                while not await asyncio.to_thread(_ended_as_too_slow, process):
                    await anext(reading)
                seen = [first.revision]
                async with refused(Overloaded, "WATCHER_TOO_SLOW"):
                    while True:
                        seen.append((await anext(stuck)).revision)
            # 12 MB of changes went by; what was held for the one that did not read is a window's worth at most.
            assert psutil.Process(process.pid).memory_info().rss - before < 60 * MIB
            resumed = aiter(
                slow.stub.WatchModels(pb.WatchModelsRequest(from_revision=max(seen) + 1), timeout=NO_DEADLINE)
            )
            last = max(seen)
            while last < 201:
                event = await anext(resumed)
                if event.WhichOneof("event") != "bookmark":
                    assert event.revision == last + 1
                    last = event.revision


async def test_hundreds_of_watchers_take_little_each_and_all_see_everything(tmp_path: Path) -> None:
    watchers, changes = 300, 5
    env = {
        "MLMESH_REGISTRY_BOOKMARK_S": "60",
        "MLMESH_STREAMS_PER_PEER_MAX": "1000",
    }
    with running(tmp_path / "data", env=env) as (process, address):
        async with connected(address) as client:
            etag = (await client.create_model()).etag
            etag = await _update(client, etag, 20)
            ready = asyncio.Semaphore(0)

            async def follow() -> list[int]:
                """Revisions behind the bookmark."""
                seen: list[int] = []
                call = client.stub.WatchModels(pb.WatchModelsRequest(), timeout=NO_DEADLINE)
                async for event in call:
                    if event.WhichOneof("event") == "bookmark":
                        ready.release()
                    elif event.revision > 21:
                        seen.append(event.revision)
                        if len(seen) == changes:
                            return seen
                return seen

            before = psutil.Process(process.pid).memory_info().rss
            async with asyncio.timeout(60), asyncio.TaskGroup() as group:
                tasks = [group.create_task(follow()) for _ in range(watchers)]
                for _ in tasks:
                    await ready.acquire()
                idle = psutil.Process(process.pid).memory_info().rss
                await _update(client, etag, changes)
            assert all(task.result() == list(range(22, 22 + changes)) for task in tasks)
            # Some 25 KiB each are measured; what grows with the changes is shared by all.
            assert (idle - before) / watchers < 200 * 1024
            assert psutil.Process(process.pid).memory_info().rss - idle < 100 * MIB


async def test_a_hung_registry_ends_a_watch_and_nothing_is_missed(tmp_path: Path) -> None:
    limits = Limits(keepalive_time_s=0.5, keepalive_timeout_s=0.5)
    with running(tmp_path / "data") as (process, address):
        async with connected(address) as client, open_channel(address, limits=limits) as channel:
            await client.create_model("a")
            watching = Client(channel)
            events = aiter(watching.stub.WatchModels(pb.WatchModelsRequest(), timeout=NO_DEADLINE))
            assert (await anext(events)).model.name == "models/a"
            assert (await anext(events)).WhichOneof("event") == "bookmark"
            process.signal(signal.SIGSTOP)
            async with asyncio.timeout(20), refused(NotReady, "NOT_READY"):
                await anext(events)
            process.signal(signal.SIGCONT)
            await client.create_model("b")
            async with asyncio.timeout(20):
                again = aiter(watching.stub.WatchModels(pb.WatchModelsRequest(from_revision=2), timeout=NO_DEADLINE))
                assert (await anext(again)).model.name == "models/b"
