"""What does one message cost on each transport, answered by a task of its own (generic) or in bursts (direct)?

Method: an echo of 1 KB by `mlmesh_runtime.server.Server`, one process for each of grpcio and native, generic and
direct, and one of a bare grpc.aio server. The load comes from benchmarks/load, a client that costs a few microseconds a
message. Rounds visit every server for every shape, in another order each time; the first is thrown away. Reported:
medians of messages a second, latency, and the server's CPU time a message (user and system, by psutil), which is the
figure to trust.

    python -m benchmarks transports --rounds 5 --seconds 1
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import grpc
import psutil

from benchmarks.peers.load import build_client
from benchmarks.peers.servers import Unavailable
from mlmesh_runtime.config import ConfigError, Settings
from mlmesh_runtime.direct import DirectCall
from mlmesh_runtime.server import Server, Service
from mlmesh_runtime.transport import choose
from tests.support.echo import PROTOS, EchoServicer, Text, echo_service

SERVERS = ("native direct", "native generic", "grpcio direct", "grpcio generic", "bare grpc.aio")
SHAPES = {
    "unary 1": ("unary", 1, 1),
    "unary 16": ("unary", 4, 4),
    "unary 64": ("unary", 8, 8),
    "stream 1x1": ("stream", 1, 1),
    "stream 1x32": ("stream", 1, 32),
    "stream 8x8": ("stream", 8, 8),
}
RESULTS = Path("benchmarks/results")


def echo(calls: Sequence[DirectCall]) -> None:
    """Answers every call with its request."""
    for call in calls:
        call.reply(call.request)


def service(kind: str) -> Service:
    """The echo; clients of the load set no deadline."""
    free: set[str] = {"Unary", "Chat", "Collect", "Expand"}
    direct: Any = {"Unary": echo, "Chat": echo} if kind == "direct" else {}
    return echo_service(deadline_optional=free, direct=direct)


async def serve(name: str) -> None:
    """The server process: prints its address, serves until its stdin closes."""
    loop = asyncio.get_running_loop()
    if name.startswith("bare"):
        bare = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
        PROTOS.add(EchoServicer(), bare)
        port = bare.add_insecure_port("127.0.0.1:0")
        await bare.start()
        print(f"127.0.0.1:{port}", flush=True)
        await loop.run_in_executor(None, sys.stdin.read)
        await bare.stop(0)
        return
    transport, kind = name.split()
    async with Server(Settings(service="bench", transport=transport), [service(kind)]) as server:
        print(server.address, flush=True)
        await loop.run_in_executor(None, sys.stdin.read)


class Started:
    """A server process."""

    def __init__(self, name: str) -> None:
        command = [sys.executable, "-m", "benchmarks.transports", "--serve", name]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        self.address = self.process.stdout.readline().strip()
        self._usage = psutil.Process(self.process.pid)

    def cpu_s(self) -> float:
        """CPU time so far, seconds."""
        times = self._usage.cpu_times()
        return float(times.user + times.system)

    def close(self) -> None:
        """End it."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()


def load(client: Path, body: Path, started: Started, shape: str, count: int) -> dict[str, Any]:
    """One load of `count` messages, and the server's CPU microseconds a message."""
    mode, streams, in_flight = SHAPES[shape]
    method = "Unary" if mode == "unary" else "Chat"
    command = [str(client), "--address", started.address, "--path", f"/test.echo.Echo/{method}", "--body", str(body)]
    command += ["--mode", mode, "--streams", str(streams), "--in-flight", str(in_flight), "--count", str(count)]
    before = started.cpu_s()
    result: dict[str, Any] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    if result["failures"] or not result["messages"]:
        raise RuntimeError(f"{shape}: {result}")
    result["cpu_us"] = (started.cpu_s() - before) / result["messages"] * 1e6
    result["per_s"] = result["messages"] / result["elapsed_s"]
    return result


def main(arguments: list[str] | None = None) -> None:
    """Measure; write benchmarks/results/transports.json."""
    parser = argparse.ArgumentParser(prog="transports")
    parser.add_argument("--serve", default="")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.0)
    parser.add_argument("--servers", default=",".join(SERVERS))
    parser.add_argument("--shapes", default=",".join(SHAPES))
    given = parser.parse_args(arguments)
    if given.serve:
        asyncio.run(serve(given.serve))
        return
    try:
        choose(Settings(service="bench", transport="native"))
    except ConfigError as missing:
        print(f"transports: only grpcio is measured: {missing}")
        given.servers = ",".join(name for name in given.servers.split(",") if not name.startswith("native"))
    try:
        client = build_client()
    except Unavailable as missing:
        print(f"transports: {missing}")
        return
    measure(given, client)


def measure(given: argparse.Namespace, client: Path) -> None:
    """All servers, all shapes, round by round."""
    chance = random.Random(7)  # noqa: S311
    servers: dict[str, Started] = {}
    cells: dict[tuple[str, str], list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        body = Path(folder) / "body.bin"
        body.write_bytes(Text(data=bytes(1021)).SerializeToString())
        try:
            servers = {name: Started(name) for name in given.servers.split(",")}
            rounds = [(name, shape) for name in servers for shape in given.shapes.split(",")]
            counts = {}
            for name, shape in rounds:
                probe = load(client, body, servers[name], shape, 640)
                counts[name, shape] = max(640, int(probe["per_s"] * given.seconds) // 64 * 64)
            for _ in range(given.rounds):
                chance.shuffle(rounds)
                for cell in rounds:
                    cells.setdefault(cell, []).append(load(client, body, servers[cell[0]], cell[1], counts[cell]))
        finally:
            for started in servers.values():
                started.close()
    report(cells)


def report(cells: dict[tuple[str, str], list[dict[str, Any]]]) -> None:
    """A table for people, JSON for programs."""
    found = {
        f"{name} | {shape}": {
            what: round(statistics.median(run[what] for run in runs[1:] or runs), 1)
            for what in ("per_s", "cpu_us", "p50_us", "p99_us")
        }
        for (name, shape), runs in sorted(cells.items())
    }
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / "transports.json").write_text(json.dumps({"load": os.getloadavg(), "cells": found}, indent=1))
    for key, value in found.items():
        print(f"{key:34} {value['per_s']:9.0f}/s  CPU {value['cpu_us']:6.1f} us  p50 {value['p50_us']:6.0f} us")


if __name__ == "__main__":
    main()
