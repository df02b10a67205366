"""What does the control plane's work cost as a mesh grows, and does a change cost what it changes?

    python -m benchmarks mesh-scale --services 10 100 1000 --endpoints 5 --proxies 20 --repeat 5

Worlds without processes (1,000 services have 5,000 endpoints and 2,000 routes). For each size: the first build of all
snapshots, then one route, one endpoint, one policy and one rule changed, several times each. Measured are the CPU time
and the time of translating and packing (validation of the document apart: `apply`), resources and bytes that are sent,
and the process's resident memory. *from nothing* is the same build without memory of the one before; ratios are to it.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table

from benchmarks import mesh_worlds as worlds
from benchmarks.harness import write_results
from mlmesh_local.model import World
from mlmesh_local.resources import ResourceSet
from mlmesh_local.snapshot import Snapshot, SnapshotBuilder

CHANGED = 2
"""The service that changes; it has subsets at every size."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Build:
    """One build: seconds, CPU seconds, and what of it must be sent."""

    elapsed_s: float
    cpu_s: float
    apply_s: float
    resources: int
    sent_bytes: int


class Clock:
    """Elapsed and CPU time of this process since it was made."""

    def __init__(self) -> None:
        self._elapsed, self._cpu = time.perf_counter(), time.process_time()

    def read(self) -> tuple[float, float]:
        """Both, in seconds."""
        return time.perf_counter() - self._elapsed, time.process_time() - self._cpu


def changes(services: int, endpoints: int, repeat: int) -> Mapping[str, list[Callable[[World], World]]]:
    """Changes by name; each takes a world to the next."""

    def applied(document: dict[str, Any]) -> Callable[[World], World]:
        return lambda world: dataclasses.replace(
            world, resources=world.resources.apply(worlds.read([document])).resources
        )

    def scaled(more: int) -> Callable[[World], World]:
        made = worlds.endpoints_of(services, endpoints, more_of=more)
        return lambda world: dataclasses.replace(world, endpoints=made)

    return {
        "route": [applied(worlds.route_document(CHANGED, subsets=True, weight=10 + n)) for n in range(repeat)],
        "endpoint": [scaled(CHANGED if n % 2 == 0 else -1) for n in range(repeat)],
        "policy": [applied(worlds.policy_document(CHANGED, f"ns{n}")) for n in range(repeat)],
        "rule": [
            applied(worlds.rule_document(CHANGED, "RANDOM" if n % 2 == 0 else "ROUND_ROBIN")) for n in range(repeat)
        ],
    }


def to_send(before: Mapping[str, Snapshot], after: Mapping[str, Snapshot]) -> tuple[int, int]:
    """Resources and bytes that streams send for a change."""
    found = list(_differences(before, after))
    return len(found), sum(found)


def _differences(before: Mapping[str, Snapshot], after: Mapping[str, Snapshot]) -> Iterator[int]:
    for node, snapshot in after.items():
        for type_url, named in snapshot.resources.items():
            old = before[node].resources[type_url] if node in before else {}
            if named is not old:
                yield from (len(p.content) for name, p in named.items() if name not in old or old[name] != p)


def measure(services: int, endpoints: int, proxies: int, repeat: int) -> dict[str, Any]:
    """All builds of one size."""
    resident = psutil.Process().memory_info().rss
    resources = ResourceSet().apply(worlds.read(worlds.service_documents(services))).resources
    world = World(
        resources=resources,
        endpoints=worlds.endpoints_of(services, endpoints),
        proxies=worlds.proxies_of(min(proxies, services)),
    )
    read_rss = psutil.Process().memory_info().rss
    builder = SnapshotBuilder()
    clock = Clock()
    built = builder.build(world)
    elapsed, cpu = clock.read()
    count, size = to_send({}, built)
    result: dict[str, Any] = {
        "first": [Build(elapsed_s=elapsed, cpu_s=cpu, apply_s=0.0, resources=count, sent_bytes=size)],
        "rss_mib": {
            "resources": (read_rss - resident) >> 20,
            "first": (psutil.Process().memory_info().rss - resident) >> 20,
        },
    }
    for name, steps in changes(services, endpoints, repeat).items():
        result[name] = []
        for step in steps:
            clock = Clock()
            world = step(world)
            apply_s, _ = clock.read()
            clock = Clock()
            before, built = built, builder.build(world)
            elapsed, cpu = clock.read()
            count, size = to_send(before, built)
            result[name].append(Build(elapsed_s=elapsed, cpu_s=cpu, apply_s=apply_s, resources=count, sent_bytes=size))
    result["rss_mib"]["after"] = (psutil.Process().memory_info().rss - resident) >> 20
    clock = Clock()
    SnapshotBuilder().build(world)
    elapsed, cpu = clock.read()
    result["from nothing"] = [Build(elapsed_s=elapsed, cpu_s=cpu, apply_s=0.0, resources=0, sent_bytes=0)]
    return result


def summarise(results: Mapping[int, dict[str, Any]]) -> dict[str, Any]:
    """Medians by size and change; CPU also as a ratio to a build from nothing."""
    summary: dict[str, Any] = {}
    for services, measured in results.items():
        whole = measured["from nothing"][0].cpu_s
        rows: dict[str, Any] = {"rss_mib": measured["rss_mib"]}
        for name, builds in measured.items():
            if name == "rss_mib":
                continue
            cpu = statistics.median(build.cpu_s for build in builds)
            rows[name] = {
                "cpu_ms": round(cpu * 1000, 1),
                "cpu_to_nothing": round(cpu / whole, 3),
                "elapsed_ms": round(statistics.median(b.elapsed_s for b in builds) * 1000, 1),
                "apply_ms": round(statistics.median(b.apply_s for b in builds) * 1000, 1),
                "resources": statistics.median(b.resources for b in builds),
                "kib": round(statistics.median(b.sent_bytes for b in builds) / 1024, 1),
            }
        summary[str(services)] = rows
    return summary


def show(summary: Mapping[str, Any]) -> None:
    """Prints a table."""
    table = Table("services", "change", title="medians; CPU of translating and packing for all proxies")
    for column in ("CPU", ": from nothing", "time", "apply", "resources sent", "KiB sent"):
        table.add_column(column, justify="right")
    for services, rows in summary.items():
        for name, row in rows.items():
            if name != "rss_mib":
                table.add_row(
                    services,
                    name,
                    f"{row['cpu_ms']:,.0f} ms",
                    f"{row['cpu_to_nothing']:.2f}",
                    f"{row['elapsed_ms']:,.0f} ms",
                    f"{row['apply_ms']:,.0f} ms",
                    f"{row['resources']:,.0f}",
                    f"{row['kib']:,.0f}",
                )
        table.add_row(services, f"MiB {rows['rss_mib']}")
    Console(width=120).print(table)


def main(arguments: Sequence[str]) -> None:
    """Entry point of `python -m benchmarks mesh-scale`."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks mesh-scale",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--services", type=int, nargs="+", default=[10, 100, 1000])
    parser.add_argument("--endpoints", type=int, default=5, help="of each service")
    parser.add_argument("--proxies", type=int, default=20)
    parser.add_argument("--repeat", type=int, default=5, help="changes of each sort")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/mesh_scale.json"))
    chosen = parser.parse_args(arguments)
    results = {size: measure(size, chosen.endpoints, chosen.proxies, chosen.repeat) for size in chosen.services}
    summary = summarise(results)
    show(summary)
    rounds = {
        str(size): {
            name: [dataclasses.asdict(build) for build in builds]
            for name, builds in measured.items()
            if name != "rss_mib"
        }
        for size, measured in results.items()
    }
    write_results(chosen.out, {"summary": summary, "builds": rounds})
    print(f"written to {chosen.out}")
