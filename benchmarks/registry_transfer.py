"""How fast do bytes go in and out of the registry, and what memory does that take?

    python -m benchmarks registry-transfer --mib 256 --rounds 3 --memory-mib 2048

Speed, each with the product's own client from and to a file, the same new bytes for everybody in a round:

- raw: a loopback TCP connection, one process that reads a file and one that writes and syncs one; nothing is checked.
- direct: to the registry's process. Every chunk has a checksum, the whole a digest, and its format is looked at.
- sidecars: to the same process through two Envoys with mutual TLS.
- mlflow: MLflow's client to a real MLflow server that proxies artifacts; one upload of one file, nothing is checked.

Rounds are interleaved and shuffled; ratios are taken within a round, to raw and to mlflow.

Memory: the most that the registry's process held while one large file went in and out, above what it held before, with
bytes in a folder and on a real S3 server. MLflow and S3 are left out where `make tools` did not install them.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import hashlib
import json
import os
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table

from benchmarks.harness import ratio_of_medians, write_results
from benchmarks.paths import mesh
from mlmesh.registry.v1 import registry_pb2 as pb
from mlmesh.registry.v1.registry_pb2_grpc import ModelRegistryServiceStub
from mlmesh_cli.connection import find_instance
from mlmesh_cli.transfer import download, upload
from mlmesh_runtime.channel import open_channel
from tests.support.mlflow import HERE as MLFLOW
from tests.support.mlflow import Mlflow, mlflow_running
from tests.support.registry_process import running
from tests.support.s3 import PYTHON as SWIFT
from tests.support.s3 import S3Server

MIB = 1 << 20
WAYS = ("raw", "direct", "sidecars", "mlflow")
HEADER_BYTES = 96
SAMPLE_S = 0.02

Transfer = Callable[[Path, Path], Awaitable[tuple[float, float]]]
"""Uploads a file and downloads it to another; seconds of each."""

MLFLOW_CLIENT = """
import sys, time, mlflow
url, source, target = sys.argv[1:]
mlflow.set_tracking_uri(url)
client = mlflow.MlflowClient()
run = client.create_run("0").info.run_id
began = time.perf_counter()
client.log_artifact(run, source)
up = time.perf_counter() - began
began = time.perf_counter()
client.download_artifacts(run, source.rpartition("/")[2], target)
print(up, time.perf_counter() - began)
"""

RAW_RECEIVER = """
import os, socket, sys
with socket.create_server(("127.0.0.1", 0)) as server:
    print(server.getsockname()[1], flush=True)
    while True:
        peer, _ = server.accept()
        buffer = bytearray(1 << 20)
        with peer, open(sys.argv[1], "wb", buffering=0) as file:
            while count := peer.recv_into(buffer):
                file.write(memoryview(buffer)[:count])
            os.fsync(file.fileno())
            peer.sendall(b".")
"""


def write_file(path: Path, mib: int) -> None:
    """A safetensors file of new bytes."""
    count = mib * MIB - 8 - HEADER_BYTES
    entry = json.dumps({"noise": {"dtype": "U8", "shape": [count], "data_offsets": [0, count]}})
    block = os.urandom(MIB)
    with path.open("wb") as file:
        file.write(HEADER_BYTES.to_bytes(8, "little") + entry.ljust(HEADER_BYTES).encode())
        for at in range(0, count, MIB):
            file.write(block[: count - at])


def same(one: Path, other: Path) -> bool:
    """Whether two files have the same bytes."""
    digests = []
    for path in (one, other):
        with path.open("rb") as file:
            digests.append(hashlib.file_digest(file, "sha256").hexdigest())
    return digests[0] == digests[1]


@contextlib.contextmanager
def raw(folder: Path) -> Iterator[Transfer]:
    """Copies over a loopback connection. A download is the same copy: there is nothing else to it."""
    process = subprocess.Popen(
        [sys.executable, "-c", RAW_RECEIVER, str(folder / "raw")], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    port = int(process.stdout.readline())

    def copy(source: Path) -> float:
        began = time.perf_counter()
        with source.open("rb", buffering=0) as file, socket.create_connection(("127.0.0.1", port)) as peer:
            buffer = bytearray(MIB)
            while count := file.readinto(buffer):
                peer.sendall(memoryview(buffer)[:count])
            peer.shutdown(socket.SHUT_WR)
            peer.recv(1)
        return time.perf_counter() - began

    async def transfer(source: Path, target: Path) -> tuple[float, float]:
        up, down = await asyncio.to_thread(copy, source), await asyncio.to_thread(copy, source)
        await asyncio.to_thread((folder / "raw").replace, target)
        return up, down

    try:
        yield transfer
    finally:
        process.kill()
        process.communicate()


def through(stub: Any) -> Transfer:
    """To and from a registry with the command line's own functions."""

    async def transfer(source: Path, target: Path) -> tuple[float, float]:
        began = time.perf_counter()
        blob = await upload(stub, source)
        up, began = time.perf_counter() - began, time.perf_counter()
        await download(stub, pb.Artifact(path="noise", blob=blob.name, size_bytes=blob.size_bytes), target)
        return up, time.perf_counter() - began

    return transfer


def by_mlflow(server: Mlflow) -> Transfer:
    """MLflow's own client, in its own environment; its imports are not counted."""

    async def transfer(source: Path, target: Path) -> tuple[float, float]:
        folder = target.with_suffix(".mlflow")
        folder.mkdir()
        command = [str(MLFLOW / "python"), "-W", "ignore", "-c", MLFLOW_CLIENT, server.url, str(source), str(folder)]
        done = await asyncio.to_thread(subprocess.run, command, capture_output=True, text=True, check=True)
        (folder / source.name).replace(target)
        folder.rmdir()
        up, down = done.stdout.split()[-2:]
        return float(up), float(down)

    return transfer


async def speed(folder: Path, mib: int, rounds: int) -> dict[str, dict[str, list[float]]]:
    """Seconds of each round by way: "upload" and "download"."""
    async with contextlib.AsyncExitStack() as stack:
        ways: dict[str, Transfer] = {"raw": stack.enter_context(raw(folder))}
        connection = await stack.enter_async_context(mesh(folder))
        address = find_instance(await connection.status(), "registry").application_address
        channel = await stack.enter_async_context(open_channel(address))
        ways["direct"] = through(ModelRegistryServiceStub(channel))
        ways["sidecars"] = through(await connection.registry())
        if MLFLOW.exists():
            (folder / "mlflow").mkdir()
            ways["mlflow"] = by_mlflow(stack.enter_context(mlflow_running(folder / "mlflow")))
        found: dict[str, dict[str, list[float]]] = {way: {"upload": [], "download": []} for way in ways}
        for number in range(rounds + 1):
            order = list(ways)
            random.Random(number).shuffle(order)  # noqa: S311
            for way in order:
                source, target = folder / "source", folder / "target"
                # Smaller first, to warm up; new for each: the registry would not take the same bytes twice.
                await asyncio.to_thread(write_file, source, mib if number else 8)
                os.sync()
                up, down = await ways[way](source, target)
                assert await asyncio.to_thread(same, source, target), f"{way} gave other bytes"
                target.unlink()
                if number:
                    found[way]["upload"].append(up)
                    found[way]["download"].append(down)
    return found


class Memory:
    """The most resident memory of a process while this is open, above what it had before, in MiB; and its CPU time."""

    def __init__(self, pid: int) -> None:
        self._process = psutil.Process(pid)
        self._done = threading.Event()
        self.above_idle_mib = 0.0
        self.cpu_s = 0.0

    def __enter__(self) -> Memory:
        self._idle = self._process.memory_info().rss
        self._cpu = sum(self._process.cpu_times()[:2])
        self._sampler = threading.Thread(target=self._sample)
        self._sampler.start()
        return self

    def _sample(self) -> None:
        peak = 0
        while not self._done.wait(SAMPLE_S):
            peak = max(peak, self._process.memory_info().rss)
        self.above_idle_mib = round((peak - self._idle) / MIB, 1)

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._sampler.join()
        self.cpu_s = round(sum(self._process.cpu_times()[:2]) - self._cpu, 2)


@contextlib.asynccontextmanager
async def registry(folder: Path, env: Mapping[str, str]) -> AsyncIterator[tuple[int, Any]]:
    """A registry of its own that has done something already; its process id and a stub."""
    with running(folder, env=env) as (process, address):
        async with open_channel(address) as channel:
            stub: Any = ModelRegistryServiceStub(channel)
            small = folder / "small"
            small.write_text("hello")
            await upload(stub, small)
            # What starts and what was imported settles.
            await asyncio.sleep(1)
            yield process.pid, stub


async def memory(folder: Path, mib: int, env: Mapping[str, str]) -> dict[str, Any]:
    """Memory of a registry while a large file goes in, and out again."""
    source, target = folder / "source", folder / "target"
    await asyncio.to_thread(write_file, source, mib)
    async with registry(folder / "data", env) as (pid, stub):
        began = time.perf_counter()
        with Memory(pid) as going_in:
            blob = await upload(stub, source)
        up, began = time.perf_counter() - began, time.perf_counter()
        with Memory(pid) as going_out:
            await download(stub, pb.Artifact(path="noise", blob=blob.name, size_bytes=blob.size_bytes), target)
        down = time.perf_counter() - began
    for path in (source, target):
        path.unlink()
    return {
        name: {"above_idle_mib": used.above_idle_mib, "cpu_s": used.cpu_s, "mib_per_s": round(mib / took, 1)}
        for name, used, took in (("upload", going_in, up), ("download", going_out, down))
    }


async def memories(folder: Path, mib: int) -> dict[str, Any]:
    """By where the bytes are."""
    (folder / "local").mkdir()
    found = {"folder": await memory(folder / "local", mib, {})}
    if SWIFT.exists():
        (folder / "swift").mkdir()
        (folder / "s3").mkdir()
        server = S3Server(folder / "swift")
        try:
            os.environ.update(server.env)
            server.make("bench")
            env = {"MLMESH_REGISTRY_BLOBS_URL": "s3://bench/blobs", **server.env}
            found["s3"] = await memory(folder / "s3", mib, env)
        finally:
            server.stop()
    return found


def summarise(found: Mapping[str, Mapping[str, list[float]]], mib: int) -> dict[str, Any]:
    """Medians, and ratios of rates: above 1 is faster than the other."""
    summary: dict[str, Any] = {}
    for way, taken in found.items():
        for what, seconds in taken.items():
            entry: dict[str, Any] = {"seconds": [round(each, 3) for each in seconds]}
            entry["mib_per_s"] = round(mib / statistics.median(seconds), 1)
            for other in ("raw", "mlflow"):
                if other in found and other != way:
                    entry[f"rate_to_{other}"] = round(ratio_of_medians(found[other][what], seconds), 3)
            summary.setdefault(way, {})[what] = entry
    return summary


def show(summary: Mapping[str, Any], held: Mapping[str, Any], console: Console) -> None:
    """Two tables."""
    table = Table("way", "what", "MiB/s", "x raw", "x mlflow", title="Transfers")
    for way, entries in summary.items():
        for what, entry in entries.items():
            ratios = [str(entry.get(f"rate_to_{other}", "")) for other in ("raw", "mlflow")]
            table.add_row(way, what, str(entry["mib_per_s"]), *ratios)
    console.print(table)
    table = Table("bytes in", "what", "MiB above idle", "CPU s", "MiB/s", title="The registry's memory")
    for place, entries in held.items():
        for what, entry in entries.items():
            table.add_row(place, what, *(str(entry[name]) for name in ("above_idle_mib", "cpu_s", "mib_per_s")))
    console.print(table)


def main(arguments: list[str]) -> None:
    """Measure, print, write benchmarks/results/registry_transfer.json."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks registry-transfer", description=__doc__)
    parser.add_argument("--mib", type=int, default=256, help="size of a file whose transfer is timed")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--memory-mib", type=int, default=2048, help="size of the file for memory; 0: not measured")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="mlmesh-bench-") as folder:
        found = asyncio.run(speed(Path(folder), options.mib, options.rounds)) if options.rounds else {}
        summary = summarise(found, options.mib)
        held = asyncio.run(memories(Path(folder), options.memory_mib)) if options.memory_mib else {}
    show(summary, held, Console())
    results = {"mib": options.mib, "speed": summary, "memory_mib": options.memory_mib, "memory": held}
    write_results(Path("benchmarks/results/registry_transfer.json"), results)
