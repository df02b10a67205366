"""How soon does a change act, and what do more services cost the Envoys? (What a call costs: `paths`.)

    python -m benchmarks mesh-overhead --services 10 100 1000 --changes 100

Real Envoys (a client's and two servers'), mutual TLS, and that many other services that they are told of, too. A route
changes from one server to the other and back. Measured from the moment at which the change is given to the control
plane: *pushed* when all is translated, packed and handed to the streams; *acked* when every Envoy has acknowledged;
*effective* when a caller that calls without pause is first answered by the other server. Beside it the Envoys' CPU time
a change, their resident memory, and p50 of a call, as ratios to the smallest mesh.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import grpc
import psutil
from rich.console import Console
from rich.table import Table

from benchmarks import mesh_worlds as worlds
from benchmarks.harness import CpuMeter, closed_loop, write_results
from benchmarks.mesh_robustness import percentiles
from tests.support.envoy_mesh import EnvoyMesh, load, unary
from tests.support.mesh_documents import STRICT, SUBSETS, deployment, service, split

WORKLOADS = (
    deployment("client", "client", "client")
    + service("client")
    + deployment("server-v1", "server", "server", version="v1")
    + deployment("server-v2", "server", "server", version="v2")
    + service("server")
)
EFFECTIVE_S_MAX = 10.0
CALLS = 1000


async def measure(services: int, changes: int) -> dict[str, Any]:
    """One size of mesh."""
    others = worlds.yaml_of(worlds.service_documents(services))
    with tempfile.TemporaryDirectory(prefix="mlmesh-bench-") as folder:
        async with EnvoyMesh.start(Path(folder), WORKLOADS + others, STRICT + SUBSETS) as mesh:
            documents = [mesh.resources.apply(load(split(v1, 100 - v1))).resources for v1 in (100, 0)]
            pids = mesh.envoy_pids()
            pushed: list[float] = []
            acked: list[float] = []
            effective: list[float] = []
            meter = CpuMeter({"envoys": pids})
            async with mesh.channel() as channel:
                with meter.measuring():
                    for number in range(changes):
                        expected = f"server-v{1 + number % 2}-0"
                        mesh.resources = documents[number % 2]
                        began = time.perf_counter()
                        version = mesh.push()
                        pushed.append(time.perf_counter() - began)
                        answered = asyncio.create_task(_until(channel, expected))
                        await mesh.ads.wait_acked(version, timeout_s=30)
                        acked.append(time.perf_counter() - began)
                        effective.append(await answered - began)

                async def call() -> None:
                    answer = await unary(channel, b"", {}, 10)
                    if answer.code is not grpc.StatusCode.OK:
                        raise RuntimeError(answer.text)

                calls = await closed_loop([call], count=CALLS, time_max_s=20)
            resident = [psutil.Process(pid).memory_info().rss for pid in pids]
    return {
        "pushed_ms": percentiles(pushed),
        "acked_ms": percentiles(acked),
        "effective_ms": percentiles(effective),
        "envoys_cpu_ms_per_change": round(meter.used_s["envoys"] / changes * 1000, 2),
        "envoy_rss_mib": round(statistics.mean(resident) / 2**20, 1),
        "call_us": {name: round(value) for name, value in calls.latency_us.items()},
        "failures": dict(calls.failures),
    }


async def _until(channel: grpc.aio.Channel, expected: str) -> float:
    """When the first answer of a server came."""
    async with asyncio.timeout(EFFECTIVE_S_MAX):
        while (await unary(channel, b"", {}, 10)).text != expected:
            pass
    return time.perf_counter()


def show(results: dict[int, dict[str, Any]]) -> None:
    """Prints a table."""
    table = Table("services", title="milliseconds from the change; p50 / p99")
    for column in ("pushed", "acked", "effective", "Envoys' CPU a change", "Envoy MiB", "call p50 to smallest"):
        table.add_column(column, justify="right")
    base = next(iter(results.values()))["call_us"]["p50"]
    for size, row in results.items():
        pairs = [f"{row[key]['p50']:.1f} / {row[key]['p99']:.1f}" for key in ("pushed_ms", "acked_ms", "effective_ms")]
        table.add_row(
            str(size),
            *pairs,
            f"{row['envoys_cpu_ms_per_change']:.1f} ms",
            f"{row['envoy_rss_mib']:.0f}",
            f"{row['call_us']['p50'] / base:.2f}",
        )
    Console(width=120).print(table)


def main(arguments: Sequence[str]) -> None:
    """Entry point of `python -m benchmarks mesh-overhead`."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks mesh-overhead",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--services", type=int, nargs="+", default=[10, 100, 1000])
    parser.add_argument("--changes", type=int, default=100)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/mesh_overhead.json"))
    chosen = parser.parse_args(arguments)
    results = {size: asyncio.run(measure(size, chosen.changes)) for size in chosen.services}
    show(results)
    write_results(chosen.out, {"sizes": {str(size): row for size, row in results.items()}})
    print(f"written to {chosen.out}")
