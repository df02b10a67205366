"""What do Istio's metrics cost on the laptop, and do they lose calls? Two meshes, one with reports, one without.

    python -m benchmarks mesh-metrics --rounds 5 --requests 4000 --callers 64

In each mesh a client's and a server's Envoy, mutual TLS between them; unary calls of 1 KiB from `--callers` at once.
Rounds alternate between the meshes, shuffled; ratios are taken within a round. Envoy's CPU is that of its processes,
that of the control plane the time in which it reads and counts entries. After all rounds every call must have been
counted once by either side: lost calls are told, and fail the run.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import random
import statistics
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.harness import Result, closed_loop, ratio_of_medians, write_results
from mlmesh_local.access_logs import AccessLogs
from mlmesh_local.metrics.registry import HttpSeries
from tests.support.envoy_mesh import UNARY, EnvoyMesh
from tests.support.mesh_documents import STRICT, deployment, service

RESULT = Path("benchmarks/results/mesh_metrics.json")
WORKLOADS = (
    deployment("client", "client", "client") + service("client") + deployment("server", "server", "server")
    + service("server")
)  # fmt: skip
ROUND_S_MAX = 60.0
COUNTED_S = 10.0
PAYLOAD = b"x" * 1024


class Reading:
    """Time in which the control plane reads entries."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.entries = 0
        self._take = AccessLogs.take

    @contextlib.contextmanager
    def watch(self) -> Iterator[Reading]:
        """Count while the block runs."""
        reading = self

        def take(logs: AccessLogs, node: str, role: Any, message: Any) -> None:
            begin = time.perf_counter()
            reading._take(logs, node, role, message)
            reading.seconds += time.perf_counter() - begin
            reading.entries += len(message.http_logs.log_entry)

        AccessLogs.take = take  # type: ignore[method-assign]
        try:
            yield self
        finally:
            AccessLogs.take = self._take  # type: ignore[method-assign]


@contextlib.asynccontextmanager
async def meshes(folder: Path) -> AsyncIterator[dict[str, EnvoyMesh]]:
    """One mesh without and one with reports."""
    async with contextlib.AsyncExitStack() as stack:
        found: dict[str, EnvoyMesh] = {}
        for name in ("without", "with"):
            (folder / name).mkdir()
            context = EnvoyMesh.start(folder / name, WORKLOADS, STRICT, metrics=name == "with")
            found[name] = await stack.enter_async_context(context)
        yield found


async def measure(mesh: EnvoyMesh, requests: int, callers: int) -> Result:
    """One round."""
    async with mesh.channel() as channel:
        call = channel.unary_unary(UNARY)

        async def request() -> None:
            await call(PAYLOAD, timeout=10)

        await request()
        trees = {name: [process.pid] for name, process in mesh._envoys.items()}
        return await closed_loop([request] * callers, count=requests, time_max_s=ROUND_S_MAX, cpu=trees)


def counted(mesh: EnvoyMesh) -> dict[str, int]:
    """Calls by who reported them."""
    found: dict[str, int] = {}
    assert mesh.metrics is not None
    for series in mesh.metrics.series:
        if isinstance(series, HttpSeries):
            reporter = series.values[0]
            found[reporter] = found.get(reporter, 0) + sum(series.duration.counts)
    return found


async def run(rounds: int, requests: int, callers: int) -> dict[str, Any]:
    """All rounds, the first apart."""
    results: dict[str, list[Result]] = {"without": [], "with": []}
    sent = 0
    with tempfile.TemporaryDirectory() as folder, Reading().watch() as reading:
        async with meshes(Path(folder)) as running:
            for number in range(rounds + 1):
                order = list(running)
                random.shuffle(order)
                for name in order:
                    result = await measure(running[name], requests, callers)
                    if name == "with":
                        sent += result.requests + 1
                    if number:
                        results[name].append(result)
            began = time.monotonic()
            expected = {"source": sent, "destination": sent}
            while counted(running["with"]) != expected and time.monotonic() - began < COUNTED_S:  # noqa: ASYNC110
                await asyncio.sleep(0.05)
            found = counted(running["with"])
            dropped = {
                name: sum((await running["with"].stats(name, "logs_dropped")).values())
                for name in ("client-0", "server-0")
            }
    return {
        "calls": sent,
        "lost": {reporter: sent - found.get(reporter, 0) for reporter in expected},
        "dropped_by_envoy": dropped,
        "envoy_cpu_us_per_request": {
            name: statistics.median(sum(r.cpu_us_per_request.values()) for r in each) for name, each in results.items()
        },
        "envoy_cpu_ratio": ratio_of_medians(
            [sum(r.cpu_us_per_request.values()) for r in results["with"]],
            [sum(r.cpu_us_per_request.values()) for r in results["without"]],
        ),
        "requests_per_s": {
            name: statistics.median(r.requests / r.elapsed_s for r in each) for name, each in results.items()
        },
        "p50_us": {name: statistics.median(r.latency_us["p50"] for r in each) for name, each in results.items()},
        "p99_us": {name: statistics.median(r.latency_us["p99"] for r in each) for name, each in results.items()},
        "control_plane_us_per_entry": reading.seconds * 1e6 / max(reading.entries, 1),
    }


def show(found: dict[str, Any]) -> None:
    """A table for a person."""
    table = Table("", "without", "with")
    for name in ("envoy_cpu_us_per_request", "requests_per_s", "p50_us", "p99_us"):
        table.add_row(name, *(f"{found[name][each]:,.0f}" for each in ("without", "with")))
    Console().print(table)
    Console().print(
        f"Envoy CPU x{found['envoy_cpu_ratio']:.2f}; the control plane takes "
        f"{found['control_plane_us_per_entry']:.0f} us an entry; {found['calls']:,} calls, lost: {found['lost']}"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Run it."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks mesh-metrics", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--requests", type=int, default=4000)
    parser.add_argument("--callers", type=int, default=64)
    found = parser.parse_args(arguments)
    results = asyncio.run(run(found.rounds, found.requests, found.callers))
    show(results)
    write_results(RESULT, results)
    if any(results["lost"].values()):
        raise SystemExit("calls were lost")


if __name__ == "__main__":
    main()
