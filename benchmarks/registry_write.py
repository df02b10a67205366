"""How many versions can be published a second, on SQLite and on PostgreSQL, and how near is that to the disk?

    python -m benchmarks registry-write --versions 300 --callers 8 --rounds 4

A registry process on each database, in turn; callers publish versions of one blob over gRPC (closed loop). In the same
round the database alone commits as many one-row transactions, one after the other, on one connection, with the same
durability: what a commit costs on this machine at that moment. Ratio: versions a second by raw commits a second.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import sqlite3
import statistics
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import psycopg
from rich.console import Console
from rich.table import Table

from benchmarks.harness import closed_loop, ratio_of_medians, write_results
from tests.support.postgres import postgres_running
from tests.support.registry_process import Client, connected, running

RESULT = Path("benchmarks/results/registry_write.json")
ROUND_S_MAX = 60.0
DATA = b'{"weights": [1, 2, 3]}'


@dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """A registry on one database, and that database alone."""

    name: str
    client: Client
    blob: str
    pid: int
    commits: Callable[[int], float]

    def publish(self, numbers: count[int]) -> Callable[[], Awaitable[None]]:
        """A caller."""

        async def request() -> None:
            await self.client.publish(self.blob, request_id=str(next(numbers)))

        return request


def sqlite_commits(path: Path) -> Callable[[int], float]:
    """Commits of one row in a file of their own, as durable as the registry's; commits a second."""

    def commits(number: int) -> float:
        connection = sqlite3.connect(path, isolation_level=None)
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=FULL")
        connection.execute("CREATE TABLE IF NOT EXISTS bench (value TEXT)")
        begun = time.perf_counter()
        for each in range(number):
            connection.execute("INSERT INTO bench VALUES (?)", (str(each),))
        elapsed = time.perf_counter() - begun
        connection.close()
        return number / elapsed

    return commits


def postgres_commits(url: str) -> Callable[[int], float]:
    """The same for PostgreSQL."""

    def commits(number: int) -> float:
        with psycopg.connect(url, autocommit=True) as connection:
            connection.execute("CREATE TABLE IF NOT EXISTS bench (value TEXT)")
            begun = time.perf_counter()
            for each in range(number):
                connection.execute("INSERT INTO bench VALUES (%s)", (str(each),))
            return number / (time.perf_counter() - begun)

    return commits


@contextlib.asynccontextmanager
async def side(name: str, folder: Path, url: str, commits: Callable[[int], float]) -> AsyncIterator[Side]:
    """A registry that serves."""
    with running(folder / name, env={"MLMESH_REGISTRY_DATABASE_URL": url}) as (process, address):
        async with connected(address) as client:
            await client.create_model()
            blob = (await client.put(DATA)).name
            yield Side(name=name, client=client, blob=blob, pid=process.pid, commits=commits)


async def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """All rounds; the databases take turns."""
    rounds: dict[str, list[dict[str, Any]]] = {"sqlite": [], "postgresql": []}
    numbers = count()
    async with contextlib.AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        server = stack.enter_context(postgres_running(durable=True))
        sides = [
            await stack.enter_async_context(side("sqlite", folder, "", sqlite_commits(folder / "raw.sqlite"))),
            await stack.enter_async_context(
                side("postgresql", folder, server.create(), postgres_commits(server.create()))
            ),
        ]
        for number in range(arguments.rounds + 1):
            for each in sides:
                raw = await asyncio.to_thread(each.commits, arguments.versions)
                requests = [each.publish(numbers) for _ in range(arguments.callers)]
                result = await closed_loop(
                    requests, count=arguments.versions, time_max_s=ROUND_S_MAX, cpu={"registry": [each.pid]}
                )
                if number:  # The first warms up.
                    rounds[each.name].append({"raw_commits_per_s": raw, **result.as_dict()})
    ratios = {
        name: ratio_of_medians([row["per_s"] for row in rows], [row["raw_commits_per_s"] for row in rows])
        for name, rows in rounds.items()
    }
    return {"callers": arguments.callers, "versions_to_raw_commits": ratios, "rounds": rounds}


def main(argv: list[str]) -> None:
    """Measure and tell."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks registry-write", description=__doc__)
    parser.add_argument("--versions", type=int, default=300, help="a round")
    parser.add_argument("--callers", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--out", type=Path, default=RESULT)
    arguments = parser.parse_args(argv)
    results = asyncio.run(run(arguments))
    write_results(arguments.out, results)
    table = Table("database", "versions/s", "raw commits/s", "ratio", "p50 ms", "registry CPU us")
    for name, rows in results["rounds"].items():
        table.add_row(
            name,
            f"{statistics.median(row['per_s'] for row in rows):.0f}",
            f"{statistics.median(row['raw_commits_per_s'] for row in rows):.0f}",
            f"{results['versions_to_raw_commits'][name]:.2f}",
            f"{statistics.median(row['latency_us']['p50'] for row in rows) / 1e3:.1f}",
            f"{statistics.median(row['cpu_us_per_request']['registry'] for row in rows):.0f}",
        )
    Console().print(table)
