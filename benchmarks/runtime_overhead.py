"""What does the runtime cost on top of a bare `grpc.aio` server?

Method: the same unary echo of 256 bytes, served by a bare grpc.aio server and by `mlmesh_runtime.server.Server`, each
in a process of its own; one client process keeps 16 calls in flight (closed loop). Rounds alternate between the two, so
that a slow moment of the machine meets both. Reported: the server's CPU time per call (user + system, medians over
rounds), calls per second, and the ratios. CPU per call is the figure to trust on a shared machine.

    python benchmarks/runtime_overhead.py --calls 3000 --rounds 5 > overhead.json
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import grpc

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from mlmesh_runtime.config import Settings
from mlmesh_runtime.server import Server
from tests.support.echo import PROTOS, EchoServicer, Text, echo_service

IN_FLIGHT = 16
PAYLOAD = bytes(256)


async def serve(kind: str) -> None:
    """The server process: prints its address, serves until its stdin closes."""
    loop = asyncio.get_running_loop()
    if kind == "bare":
        server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
        PROTOS.add(EchoServicer(), server)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        print(f"127.0.0.1:{port}", flush=True)
        await loop.run_in_executor(None, sys.stdin.read)
        await server.stop(0)
    else:
        async with Server(Settings(service="bench", listen="127.0.0.1:0"), [echo_service()]) as ours:
            print(ours.address, flush=True)
            await loop.run_in_executor(None, sys.stdin.read)


def cpu_s(pid: int) -> float:
    """User and system time of a process so far, seconds."""
    fields = Path(f"/proc/{pid}/stat").read_text("utf-8").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def load(stub: Any, calls: int) -> None:
    """Closed loop: IN_FLIGHT callers, `calls` calls altogether."""
    request = Text(text="x", data=PAYLOAD)

    async def caller() -> None:
        for _ in range(calls // IN_FLIGHT):
            await stub.Unary(request, timeout=30)

    async with asyncio.TaskGroup() as group:
        for _ in range(IN_FLIGHT):
            group.create_task(caller())


async def measure(processes: dict[str, subprocess.Popen[str]], calls: int, rounds: int) -> dict[str, Any]:
    """Alternate rounds between the servers; medians of what each took."""
    taken: dict[str, list[tuple[float, float]]] = {kind: [] for kind in processes}
    channels, stubs = {}, {}
    for kind, process in processes.items():
        assert process.stdout is not None
        channels[kind] = grpc.aio.insecure_channel(process.stdout.readline().strip())
        stubs[kind] = PROTOS.stub(channels[kind])
        await load(stubs[kind], 500)  # warm up
    for _ in range(rounds):
        for kind, process in processes.items():
            cpu, began = cpu_s(process.pid), time.perf_counter()
            await load(stubs[kind], calls)
            taken[kind].append((cpu_s(process.pid) - cpu, time.perf_counter() - began))
    for channel in channels.values():
        await channel.close()
    done = calls // IN_FLIGHT * IN_FLIGHT
    report: dict[str, Any] = {"calls": done, "rounds": rounds, "in_flight": IN_FLIGHT, "grpcio": grpc.__version__}
    for kind, rows in taken.items():
        report[kind] = {
            "server_cpu_us_per_call": round(statistics.median(cpu for cpu, _ in rows) / done * 1e6, 1),
            "calls_per_s": round(done / statistics.median(wall for _, wall in rows)),
        }
    report["cpu_ratio"] = round(
        report["runtime"]["server_cpu_us_per_call"] / report["bare"]["server_cpu_us_per_call"], 3
    )
    return report


def main() -> None:
    """Start both servers, measure, print JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=3000, help="calls a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--serve", choices=["bare", "runtime"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        asyncio.run(serve(arguments.serve))
        return
    processes = {
        kind: subprocess.Popen(
            [sys.executable, __file__, "--serve", kind], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for kind in ("bare", "runtime")
    }
    try:
        print(json.dumps(asyncio.run(measure(processes, arguments.calls, arguments.rounds)), indent=2))
    finally:
        for process in processes.values():
            process.communicate(timeout=20)


if __name__ == "__main__":
    main()
