"""Does it stay as it is? A million requests, and new versions under load.

    python -m benchmarks inference-soak --requests 1000000 --swaps 8

memory: resident memory of the server after each tenth of the requests (unary, 64 in flight). What is told is the growth
over the second half, and by how many bytes a request: flat is about zero.

swap: the alias `stable` moves between two versions, back and forth, while requests flow. Told are failures, which
versions answered, and the latency of the time around the swaps against that of the same load without them, in turns.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import grpc
import psutil
from rich.console import Console
from rich.table import Table

from benchmarks.harness import ratio_of_medians, write_results
from benchmarks.peers import load, models, ours, servers
from benchmarks.peers.run import native_transport
from mlmesh.registry.v1 import registry_pb2 as registry
from mlmesh.registry.v1 import registry_pb2_grpc
from mlmesh_cli.tensors import infer_request
from mlmesh_runtime.channel import open_channel
from open_inference import grpc_service_pb2 as oip
from open_inference import grpc_service_pb2_grpc

TENTHS = 10
IN_FLIGHT = 64
SWAP_IN_FLIGHT = 16


def memory(address: str, pid: int, client: Path, body: Path, requests: int) -> list[float]:
    """MiB resident before, and after each tenth of the requests."""
    process, readings = psutil.Process(pid), []
    body.write_bytes(infer_request(models.TINY, models.inputs(models.TINY)).SerializeToString())
    readings.append(process.memory_info().rss / 2**20)
    for _ in range(TENTHS):
        command = [
            str(client), "--address", address, "--path", servers.OIP_PATH, "--body", str(body), "--mode", "unary",
            "--streams", "8", "--in-flight", str(IN_FLIGHT // 8), "--count", str(requests // TENTHS),
            "--limit-s", "600",
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=900)
        result = json.loads(done.stdout)
        if result["failures"] or result["messages"] < requests // TENTHS // 2:
            raise RuntimeError(f"requests failed: {result}")
        readings.append(process.memory_info().rss / 2**20)
    return readings


class Traffic:
    """Callers that go on until they are told to stop; latency of every answer, and what failed."""

    def __init__(self, address: str) -> None:
        self._address = address
        self.latencies: list[tuple[float, float]] = []
        self.failures: dict[str, int] = {}
        self.versions: dict[str, int] = {}

    async def run(self, stop: asyncio.Event) -> None:
        """Sixteen callers on four connections."""
        message = infer_request(models.TINY, models.inputs(models.TINY))
        async with contextlib.AsyncExitStack() as stack:
            channels = [
                await stack.enter_async_context(
                    grpc.aio.insecure_channel(self._address, [("grpc.use_local_subchannel_pool", 1)])
                )
                for _ in range(4)
            ]
            async with asyncio.TaskGroup() as group:
                for number in range(SWAP_IN_FLIGHT):
                    stub = grpc_service_pb2_grpc.GRPCInferenceServiceStub(channels[number % 4])
                    group.create_task(self._caller(stub, message, stop))

    async def _caller(self, stub: Any, message: oip.ModelInferRequest, stop: asyncio.Event) -> None:
        while not stop.is_set():
            began = time.perf_counter()
            try:
                answer = await stub.ModelInfer(message, timeout=10)
            except grpc.aio.AioRpcError as error:
                name = error.code().name
                self.failures[name] = self.failures.get(name, 0) + 1
            else:
                self.latencies.append((began, time.perf_counter() - began))
                self.versions[answer.model_version] = self.versions.get(answer.model_version, 0) + 1

    def p99_ms(self, windows: Sequence[tuple[float, float]]) -> float:
        """Of requests that began in one of these windows."""
        chosen = sorted(took for began, took in self.latencies if any(start <= began < end for start, end in windows))
        return chosen[int(len(chosen) * 0.99)] * 1000 if chosen else 0.0


async def swaps(address: str, registry_address: str, count: int, window_s: float) -> dict[str, Any]:
    """Move `stable` to the other version `count` times, with quiet windows between."""
    traffic, stop = Traffic(address), asyncio.Event()
    busy: list[tuple[float, float]] = []
    quiet: list[tuple[float, float]] = []
    async with open_channel(registry_address) as channel, asyncio.TaskGroup() as group:
        stub = registry_pb2_grpc.ModelRegistryServiceStub(channel)
        group.create_task(traffic.run(stop))
        try:
            await asyncio.sleep(window_s)
            for number in range(count):
                start = time.perf_counter()
                await asyncio.sleep(window_s)
                quiet.append((start, time.perf_counter()))
                start = time.perf_counter()
                await _point(stub, 2 - number % 2)
                await asyncio.sleep(window_s)
                busy.append((start, time.perf_counter()))
        finally:
            stop.set()
    pairs = [(traffic.p99_ms([one]), traffic.p99_ms([other])) for one, other in zip(busy, quiet, strict=True)]
    return {
        "requests": len(traffic.latencies),
        "failures": traffic.failures,
        "versions": traffic.versions,
        "p99_ms_around_swaps": statistics.median(swap for swap, _ in pairs),
        "p99_ms_otherwise": statistics.median(calm for _, calm in pairs),
        "ratio": ratio_of_medians([swap for swap, _ in pairs], [calm for _, calm in pairs]),
    }


async def _point(stub: Any, version: int) -> None:
    model = f"models/{models.TINY}"
    aliases = await stub.ListModelAliases(registry.ListModelAliasesRequest(parent=model), timeout=10)
    etag = next(alias.etag for alias in aliases.aliases if alias.name.endswith("/stable"))
    await stub.SetModelAlias(
        registry.SetModelAliasRequest(name=f"{model}/aliases/stable", version=f"{model}/versions/{version}", etag=etag),
        timeout=10,
    )


@contextlib.contextmanager
def _served(folder: Path, transport: str) -> Iterator[tuple[str, str, int]]:
    """A registry with two versions of the tiny model, and a server: addresses of both, the server's process."""
    files = {models.TINY: models.write_tiny(folder / "tiny.onnx")}
    with ours.registry(folder, files) as address:
        ours.publish(address, {models.TINY: models.write_tiny(folder / "other.onnx", seed=1)}, alias="")
        with ours.server(
            folder / "server", address, transport, name=transport, ready=(models.TINY,), MLMESH_ENGINE_TUNING="off"
        ) as started:
            yield started.address, address, started.pids[0]


def show(results: dict[str, Any], console: Console) -> None:
    """One table a question."""
    for transport, result in results.items():
        table = Table(title=f"{transport}: memory over {result['requests_in_all']:,} requests")
        table.add_column("of the requests", justify="right")
        table.add_column("resident", justify="right")
        for place, reading in enumerate(result["memory_mib"]):
            table.add_row(f"{place * 100 // TENTHS} %", f"{reading:.1f} MiB")
        console.print(table)
        console.print(
            f"second half: {result['second_half_mib']:+.2f} MiB, "
            f"{result['second_half_bytes_per_request']:+.3f} bytes a request"
        )
        swap = result["swap"]
        failed = sum(swap["failures"].values())
        console.print(f"swaps: {swap['requests']:,} requests, {failed} failed, versions {swap['versions']}")
        console.print(
            f"p99 {swap['p99_ms_around_swaps']:.1f} ms around swaps, {swap['p99_ms_otherwise']:.1f} ms otherwise "
            f"(x{swap['ratio']:.2f})"
        )


def main(arguments: Sequence[str]) -> None:
    """Entry point of `python -m benchmarks inference-soak`."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks inference-soak",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--requests", type=int, default=1_000_000)
    parser.add_argument("--swaps", type=int, default=8)
    parser.add_argument("--window-s", type=float, default=2.0, help="of load around a swap, and between two")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/inference_soak.json"))
    chosen = parser.parse_args(arguments)
    console = Console(width=140)
    results: dict[str, Any] = {}
    client = load.build_client()
    for transport in ("native", "grpcio") if native_transport() else ("grpcio",):
        with tempfile.TemporaryDirectory(prefix="mlmesh-soak-") as name:
            folder = Path(name)
            with _served(folder, transport) as (address, registry_address, pid):
                # grpcio's server is slower: a tenth of the requests tells as much.
                requests = chosen.requests if transport == "native" else chosen.requests // 10
                readings = memory(address, pid, client, folder / "body", requests)
                swap = asyncio.run(swaps(address, registry_address, chosen.swaps, chosen.window_s))
        half = readings[-1] - readings[TENTHS // 2]
        results[transport] = {
            "requests_in_all": requests,
            "memory_mib": [round(reading, 2) for reading in readings],
            "second_half_mib": round(half, 3),
            "second_half_bytes_per_request": round(half * 2**20 / (requests / 2), 4),
            "swap": swap,
        }
    show(results, console)
    write_results(chosen.out, results)
    console.print(f"written to {chosen.out}")
