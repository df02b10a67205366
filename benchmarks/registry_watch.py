"""What does a thousandth watcher cost? Changes fan out to one watcher and to many; the registry's time and memory.

    python -m benchmarks registry-watch --watchers 1000 --changes 20 --rounds 3 --database postgresql

A registry process, one client process with all the watchers on `--channels` connections, as gateways and inference
processes have them. A change is written when everybody has seen the one before. Latency counts from when the write was
sent until a watcher has the event, so it includes the commit and the time that the one Python client needs to read all
the streams. Rounds with one watcher and with all of them alternate; ratios are taken within a round.

Memory is the registry's resident set with all watchers idle, less that without them, by the number of watchers.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import statistics
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table

from benchmarks.harness import CpuMeter, Recorder, ratio_of_medians, write_results
from mlmesh.registry.v1 import registry_pb2 as pb
from mlmesh_runtime.channel import NO_DEADLINE
from tests.support.registry_process import Client, connected, running

RESULT = Path("benchmarks/results/registry_watch.json")
ROUND_S_MAX = 120.0


class Fan:
    """Watchers, each on a stream of its own, and when the last change reached them."""

    def __init__(self) -> None:
        self.recorder = Recorder()
        self._sent = 0.0
        self._expected = 0
        self._seen = 0
        self._all_seen = asyncio.Event()
        self._ready = asyncio.Semaphore(0)

    async def follow(self, client: Client, revision: int) -> None:
        """One watcher, from a revision on."""
        request = pb.WatchModelsRequest(from_revision=revision)
        ready = False
        async for event in client.stub.WatchModels(request, timeout=NO_DEADLINE):
            if event.WhichOneof("event") == "bookmark":
                if not ready:
                    ready = True
                    self._ready.release()
                continue
            self.recorder.answered(time.perf_counter() - self._sent)
            self._seen += 1
            if self._seen == self._expected:
                self._all_seen.set()

    async def ready(self, watchers: int) -> None:
        """Wait until so many have caught up."""
        for _ in range(watchers):
            await self._ready.acquire()

    async def change(self, client: Client, watchers: int, etag: str) -> str:
        """Make a change and wait until everybody has seen it; the new etag."""
        self._expected, self._seen = watchers, 0
        self._all_seen.clear()
        self._sent = time.perf_counter()
        request = pb.UpdateModelRequest(name="models/m", description=str(self._sent), etag=etag)
        etag = (await client.stub.UpdateModel(request)).model.etag
        await self._all_seen.wait()
        return etag


@contextlib.asynccontextmanager
async def fanned_out(clients: Sequence[Client], watchers: int, revision: int) -> AsyncIterator[Fan]:
    """So many watchers, spread over the clients, caught up."""
    fan = Fan()
    tasks = [asyncio.ensure_future(fan.follow(clients[number % len(clients)], revision)) for number in range(watchers)]
    try:
        await fan.ready(watchers)
        yield fan
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)


async def measure(client: Client, clients: Sequence[Client], pid: int, watchers: int, changes: int) -> dict[str, Any]:
    """One round with so many watchers."""
    process = psutil.Process(pid)
    model = (await client.stub.GetModel(pb.GetModelRequest(name="models/m"))).model
    idle_rss = process.memory_info().rss
    begun = time.perf_counter()
    async with asyncio.timeout(ROUND_S_MAX), fanned_out(clients, watchers, int(model.etag[1:]) + 1) as fan:
        caught_up_s = time.perf_counter() - begun
        rss = process.memory_info().rss
        etag = await fan.change(client, watchers, model.etag)
        fan.recorder = Recorder()
        meter = CpuMeter({"registry": [pid]})
        begun = time.perf_counter()
        with meter.measuring():
            for _ in range(changes):
                etag = await fan.change(client, watchers, etag)
        histogram = fan.recorder.histogram
        return {
            "watchers": watchers,
            "changes": changes,
            "p50_us": float(histogram.get_value_at_percentile(50)),
            "p99_us": float(histogram.get_value_at_percentile(99)),
            "max_us": float(histogram.get_max_value()),
            "events_per_s": watchers * changes / (time.perf_counter() - begun),
            "registry_cpu_us_per_event": meter.used_s["registry"] / (watchers * changes) * 1e6,
            "caught_up_s": caught_up_s,
            "rss_kib_per_watcher": (rss - idle_rss) / 1024 / watchers,
            "rss_mib": process.memory_info().rss / 2**20,
        }


@contextlib.contextmanager
def database(kind: str) -> Iterator[str]:
    """URL of a database that syncs to disk; "" for SQLite."""
    if kind == "sqlite":
        yield ""
        return
    from tests.support.postgres import postgres_running

    with postgres_running(durable=True) as server:
        yield server.create()


async def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """All rounds of one database."""
    env = {
        "MLMESH_CONCURRENT_RPCS_MAX": str(arguments.watchers + 100),
        # Behind no mesh all watchers are of one address.
        "MLMESH_STREAMS_PER_PEER_MAX": str(arguments.watchers + 100),
        "MLMESH_REGISTRY_BOOKMARK_S": "30",
    }
    rounds: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder, database(arguments.database) as url:
        env["MLMESH_REGISTRY_DATABASE_URL"] = url
        with running(Path(folder) / "data", env=env) as (process, address):
            async with contextlib.AsyncExitStack() as stack:
                client = await stack.enter_async_context(connected(address))
                clients = [await stack.enter_async_context(connected(address)) for _ in range(arguments.channels)]
                await client.create_model()
                for _ in range(arguments.rounds):
                    one = await measure(client, clients, process.pid, 1, arguments.changes)
                    many = await measure(client, clients, process.pid, arguments.watchers, arguments.changes)
                    rounds.append({"one": one, "many": many})
    ratios = {
        f"{name}_many_to_one": ratio_of_medians([r["many"][name] for r in rounds], [r["one"][name] for r in rounds])
        for name in ("p50_us", "p99_us", "registry_cpu_us_per_event")
    }
    # What the first round made the process allocate stays with it, so only that one tells what a watcher takes.
    memory = {"rss_kib_per_watcher": rounds[0]["many"]["rss_kib_per_watcher"]}
    return {"database": arguments.database, "ratios": ratios, **memory, "rounds": rounds}


def main(argv: list[str]) -> None:
    """Measure and tell."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks registry-watch", description=__doc__)
    parser.add_argument("--watchers", type=int, default=1000)
    parser.add_argument("--changes", type=int, default=20, help="a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--channels", type=int, default=20)
    parser.add_argument("--database", choices=["sqlite", "postgresql"], default="sqlite")
    parser.add_argument("--out", type=Path, default=RESULT)
    arguments = parser.parse_args(argv)
    results = asyncio.run(run(arguments))
    write_results(arguments.out, results)
    table = Table("watchers", "p50 ms", "p99 ms", "events/s", "CPU us/event", "caught up s")
    for kind in ("one", "many"):
        rows = [each[kind] for each in results["rounds"]]

        def median(name: str, rows: list[dict[str, Any]] = rows) -> float:
            return statistics.median(row[name] for row in rows)

        table.add_row(
            str(rows[0]["watchers"]),
            f"{median('p50_us') / 1e3:.1f}",
            f"{median('p99_us') / 1e3:.1f}",
            f"{median('events_per_s'):.0f}",
            f"{median('registry_cpu_us_per_event'):.0f}",
            f"{median('caught_up_s'):.2f}",
        )
    console = Console()
    console.print(table)
    console.print({**results["ratios"], "rss_kib_per_watcher": round(results["rss_kib_per_watcher"], 1)})
