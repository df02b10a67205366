"""One load for every server: benchmarks/load, a raw HTTP/2 client in Rust; for HTTP servers, plain sockets here.

The client takes a few microseconds a message, so that on two cores it is the server that is measured, Python or not.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import psutil

from benchmarks.peers import models
from benchmarks.peers.servers import (
    OIP_PATH,
    ROOT,
    TORCHSERVE_PATH,
    Started,
    Unavailable,
    http_request,
    torchserve_request,
)
from mlmesh_cli.tensors import infer_request

STREAM_PATH: Final = "/inference.GRPCInferenceService/ModelStreamInfer"
CONNECTIONS_MAX: Final = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """How a load is put: `streams` connections (unary) or streams with `in_flight` messages each."""

    model: str
    mode: str
    streams: int
    in_flight: int

    @property
    def name(self) -> str:
        """As the table shows it."""
        if self.mode == "stream":
            return f"{self.model} stream {self.streams}x{self.in_flight}"
        return f"{self.model} unary {self.streams * self.in_flight}"


def unary(model: str, in_flight: int) -> Shape:
    """Calls over at most eight connections."""
    connections = min(in_flight, CONNECTIONS_MAX)
    return Shape(model=model, mode="unary", streams=connections, in_flight=in_flight // connections)


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """One measurement: `cpu_us` is user and system time of the server's process tree, a message."""

    messages: int
    per_s: float
    p50_us: float
    p99_us: float
    cpu_us: float
    failures: Mapping[str, int]


def build_client() -> Path:
    """The client's binary, compiled when it is not there. Raises Unavailable without cargo."""
    binary = ROOT / "build" / "load" / "release" / "grpc-load"
    cargo = shutil.which("cargo")
    if cargo is None:
        if binary.exists():
            return binary
        raise Unavailable("the load generator needs cargo to be built")
    subprocess.run(
        [
            cargo,
            "build",
            "--quiet",
            "--release",
            "--locked",
            "--manifest-path",
            str(ROOT / "benchmarks/load/Cargo.toml"),
        ],
        check=True,
        env={**os.environ, "CARGO_TARGET_DIR": str(ROOT / "build" / "load")},
    )
    return binary


def measure(started: Started, shape: Shape, client: Path, body: Path, *, seconds: float) -> Measured:
    """One load for about this long. Raises RuntimeError when answers are not what they should be."""
    if started.protocol == "http":
        return _http(started, shape, seconds)
    message = torchserve_request(shape.model) if started.protocol == "torchserve" else _oip(shape.model)
    body.write_bytes(message)
    probe = _run(started, shape, client, body, count=max(64, 4 * shape.streams * shape.in_flight))
    step = shape.streams * shape.in_flight
    count = max(step * 4, int(probe["messages"] / probe["elapsed_s"] * seconds) // step * step)
    with _cpu(started.pids) as used:
        result = _run(started, shape, client, body, count=count)
    messages = int(result["messages"])
    if result["failures"] or messages == 0:
        raise RuntimeError(f"{started.name}, {shape.name}: {result}")
    if result["bytes"] < messages * models.output_bytes(shape.model):
        raise RuntimeError(f"{started.name}, {shape.name}: answers are too small: {result}")
    return Measured(
        messages=messages,
        per_s=messages / result["elapsed_s"],
        p50_us=result["p50_us"],
        p99_us=result["p99_us"],
        cpu_us=used[0] / messages * 1e6,
        failures=result["failures"],
    )


def _oip(model: str) -> bytes:
    encoded: bytes = infer_request(model, models.inputs(model)).SerializeToString()
    return encoded


def _run(started: Started, shape: Shape, client: Path, body: Path, *, count: int) -> dict[str, float | dict[str, int]]:
    address, _, authority = started.address.partition("|")
    path = TORCHSERVE_PATH if started.protocol == "torchserve" else OIP_PATH
    command = [
        str(client), "--address", address, "--path", STREAM_PATH if shape.mode == "stream" else path,
        "--body", str(body), "--mode", shape.mode, "--streams", str(shape.streams),
        "--in-flight", str(shape.in_flight), "--count", str(count), "--limit-s", "30",
    ]  # fmt: skip
    if authority:
        command += ["--authority", authority]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=90)
    if done.returncode:
        raise RuntimeError(f"{started.name}, {shape.name}: {done.stderr.strip()[-300:]}")
    answer: dict[str, float | dict[str, int]] = json.loads(done.stdout)
    return answer


@contextlib.contextmanager
def _cpu(pids: Sequence[int]) -> Iterator[list[float]]:
    """CPU seconds of process trees over a block."""
    family = [each for pid in pids for root in [psutil.Process(pid)] for each in (root, *root.children(recursive=True))]
    before = _used(family)
    seconds = [0.0]
    try:
        yield seconds
    finally:
        seconds[0] = _used(family) - before


def _used(family: Sequence[psutil.Process]) -> float:
    total = 0.0
    for each in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            times = each.cpu_times()
            total += times.user + times.system
    return total


def _http(started: Started, shape: Shape, seconds: float) -> Measured:
    addresses = dict(pair.split("=", 1) for pair in started.address.split(","))
    host, _, port = addresses[shape.model].rpartition(":")
    with _cpu(started.pids) as used:
        latencies, elapsed = asyncio.run(
            _http_load(host, int(port), http_request(shape.model), shape.streams * shape.in_flight, seconds)
        )
    latencies.sort()
    return Measured(
        messages=len(latencies),
        per_s=len(latencies) / elapsed,
        p50_us=latencies[len(latencies) // 2] * 1e6,
        p99_us=latencies[int(len(latencies) * 0.99)] * 1e6,
        cpu_us=used[0] / len(latencies) * 1e6,
        failures={},
    )


async def _http_load(host: str, port: int, body: bytes, callers: int, seconds: float) -> tuple[list[float], float]:
    head = f"POST /predict HTTP/1.1\r\nhost: {host}\r\ncontent-type: application/json\r\n"
    message, latencies = f"{head}content-length: {len(body)}\r\n\r\n".encode() + body, []
    began = time.perf_counter()

    async def caller() -> None:
        reader, writer = await asyncio.open_connection(host, port)
        while not latencies or time.perf_counter() - began < seconds:
            sent = time.perf_counter()
            writer.write(message)
            header = await reader.readuntil(b"\r\n\r\n")
            if b" 200 " not in header[:16]:
                raise RuntimeError(header[:100].decode())
            length = int(header.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
            await reader.readexactly(length)
            latencies.append(time.perf_counter() - sent)
        writer.close()

    async with asyncio.TaskGroup() as group:
        for _ in range(callers):
            group.create_task(caller())
    return latencies, time.perf_counter() - began
