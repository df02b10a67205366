"""What do sidecars cost? One inference server, reached directly, through one Envoy, and through two with mutual TLS.

    python -m benchmarks paths --rounds 6 --requests 400

- direct: to the process, plaintext; what the service itself costs.
- one sidecar: through the caller's Envoy, plaintext from there; no TLS.
- two sidecars: through the caller's and the server's Envoy with mutual TLS and authorization; how the mesh really is.

Each is measured unary (one request in flight), as one stream (ping-pong) and as one stream with eight messages in
flight. Rounds are interleaved and shuffled. The model is a tiny one (64 floats in, 10 out), so that the path is what
is measured; through a real model the ratios are nearer to one.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import random
import statistics
import tempfile
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import yaml
from rich.table import Table

from benchmarks.harness import Request, Result, closed_loop, ratio_of_medians, streaming, write_results
from mlmesh.local.v1 import local_pb2
from mlmesh_cli import supervision
from mlmesh_cli.apply import apply_documents
from mlmesh_cli.config import CliSettings, service_target
from mlmesh_cli.connection import SERVICE_PORT, Connection, find_instance, outbound_host
from mlmesh_cli.defaults import builtin_root, read_documents
from mlmesh_cli.options import OutputFormat
from mlmesh_cli.publishing import Publication, publish_file
from mlmesh_cli.tensors import infer_request
from mlmesh_cli.terminal import Terminal
from mlmesh_cli.terminal import run as run_command
from open_inference import grpc_service_pb2 as oip
from open_inference import grpc_service_pb2_grpc

MODEL = "tiny"
ROWS, COLUMNS = 64, 10
PATHS = ("direct", "one sidecar", "two sidecars")
MODES = ("unary", "stream", "stream x8")
DIRECT_HOST = "inference-v1.bench.internal"
STREAM_S = 300.0


def write_manifests(folder: Path) -> None:
    """The default workloads, fewer: one replica of inference-v1, the registry and the toolbox."""
    kept = {"inference-v1": 1, "registry": 1, "toolbox": 1}
    documents = []
    for _, text in read_documents([builtin_root() / "manifests/base"]):
        for document in yaml.safe_load_all(text):
            if not document:
                continue
            if document["kind"] == "Deployment":
                document["spec"]["replicas"] = kept.get(document["metadata"]["name"], 0)
            documents.append(document)
    (folder / "workloads.yaml").write_text(yaml.safe_dump_all(documents))


def direct_yaml(address: str) -> str:
    """Lets the caller's sidecar reach the process itself in plaintext: a path with one sidecar only."""
    host, _, port = address.rpartition(":")
    return f"""
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {{name: bench-direct, namespace: mlmesh}}
spec:
  hosts: [{DIRECT_HOST}]
  location: MESH_EXTERNAL
  resolution: STATIC
  ports: [{{number: {SERVICE_PORT}, name: grpc, protocol: GRPC, targetPort: {port}}}]
  endpoints: [{{address: {host}}}]
---
apiVersion: networking.istio.io/v1
kind: DestinationRule
metadata: {{name: bench-direct, namespace: mlmesh}}
spec:
  host: {DIRECT_HOST}
  trafficPolicy: {{tls: {{mode: DISABLE}}}}
"""


def write_model(path: Path) -> None:
    """64 floats to 10 by one matrix: as little work as a model can be."""
    from onnx import TensorProto, helper, numpy_helper, save

    weights = np.random.default_rng(0).standard_normal((ROWS, COLUMNS)).astype(np.float32)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        MODEL,
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", ROWS])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", COLUMNS])],
        [numpy_helper.from_array(weights, "w")],
    )
    save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), str(path))


@contextlib.asynccontextmanager
async def mesh(folder: Path) -> AsyncIterator[Connection]:
    """A mesh of its own, with the tiny model loaded; ended with the block."""
    (folder / "manifests").mkdir()
    write_manifests(folder / "manifests")
    state_dir = folder / "state"
    istio = builtin_root() / "mesh/istio"
    await supervision.start(supervision.options(state_dir, [folder / "manifests"], [istio], "none"), timeout_s=120)
    try:
        settings = CliSettings()
        async with Connection(state_dir=state_dir, settings=settings) as connection:
            instance = find_instance(await connection.status(), "inference-v1")
            document = (folder / "direct.yaml", direct_yaml(instance.application_address))
            await apply_documents(await connection.control(), [document])
            write_model(folder / "model.onnx")
            wanted = Publication.from_options(
                MODEL, folder / "model.onnx", aliases=["stable"], metrics=[], labels=[], description=""
            )
            await publish_file(await connection.registry(), wanted, Terminal(OutputFormat.JSON))
            await _until_ready(await connection.inference())
            yield connection
    finally:
        await supervision.stop(state_dir)


async def _until_ready(stub: Any) -> None:
    async with asyncio.timeout(60):
        # The registry told it; how far loading is, only it knows.
        while not (await stub.ModelReady(oip.ModelReadyRequest(name=MODEL), timeout=10)).ready:  # noqa: ASYNC110
            await asyncio.sleep(0.1)


def _check(answer: Any) -> None:
    response = getattr(answer, "infer_response", answer)
    if getattr(answer, "error_message", "") or len(response.raw_output_contents[0]) != COLUMNS * 4:
        raise RuntimeError(getattr(answer, "error_message", "") or "wrong answer")


@contextlib.asynccontextmanager
async def requests_on(channel: grpc.aio.Channel, mode: str) -> AsyncIterator[list[Request]]:
    """One request function a caller, for a mode."""
    stub: Any = grpc_service_pb2_grpc.GRPCInferenceServiceStub(channel)
    message = infer_request(MODEL, [("x", "FP32", np.ones((1, ROWS), np.float32))])
    if mode == "unary":

        async def request() -> None:
            _check(await stub.ModelInfer(message, timeout=30))

        yield [request]
        return
    async with streaming(
        lambda messages: stub.ModelStreamInfer(messages, timeout=STREAM_S), message, check=_check
    ) as request_on_stream:
        yield [request_on_stream] * (8 if mode == "stream x8" else 1)


def _processes(status: local_pb2.MeshStatus) -> dict[str, list[int]]:
    server, client = find_instance(status, "inference-v1"), find_instance(status, "toolbox")
    return {"server": [server.application_pid], "envoys": [server.sidecar_pid, client.sidecar_pid]}


async def measure(connection: Connection, *, rounds: int, requests: int, seed: int) -> dict[str, list[Result]]:
    """Interleaved rounds; results by "path, mode"."""
    status = await connection.status()
    client = find_instance(status, "toolbox")
    server = find_instance(status, "inference-v1")
    outbound = f"{outbound_host(client, SERVICE_PORT)}:{SERVICE_PORT}"
    dials = {
        "direct": (server.application_address, ""),
        "one sidecar": (outbound, f"{DIRECT_HOST}:{SERVICE_PORT}"),
        "two sidecars": (outbound, service_target("inference")),
    }
    results: dict[str, list[Result]] = {f"{path}, {mode}": [] for path in PATHS for mode in MODES}
    async with contextlib.AsyncExitStack() as stack:
        channels = {
            path: await stack.enter_async_context(
                grpc.aio.insecure_channel(address, options=[("grpc.default_authority", authority)] if authority else [])
            )
            for path, (address, authority) in dials.items()
        }
        order = [(path, mode) for path in PATHS for mode in MODES]
        shuffle = random.Random(seed).shuffle  # noqa: S311
        for number in range(rounds + 1):
            shuffle(order)
            for path, mode in order:
                async with requests_on(channels[path], mode) as callers:
                    await closed_loop(callers, count=20)
                    result = await closed_loop(callers, count=requests, time_max_s=20, cpu=_processes(status))
                # The first round warms up caches, connections and the batcher.
                if number:
                    results[f"{path}, {mode}"].append(result)
    return results


def summarise(results: dict[str, list[Result]]) -> dict[str, Any]:
    """Medians over the rounds, and ratios to the direct path of the same mode, round by round."""
    summary: dict[str, Any] = {}
    for mode in MODES:
        direct = [result.latency_us["p50"] for result in results[f"direct, {mode}"]]
        for path in PATHS:
            rows = results[f"{path}, {mode}"]
            p50 = [result.latency_us["p50"] for result in rows]
            summary[f"{path}, {mode}"] = {
                "p50_us": statistics.median(p50),
                "p99_us": statistics.median(result.latency_us["p99"] for result in rows),
                "per_s": round(statistics.median(result.per_s for result in rows), 1),
                "failures": sum(sum(result.failures.values()) for result in rows),
                "p50_ratio_to_direct": round(ratio_of_medians(p50, direct), 2),
                "server_cpu_us": round(statistics.median(r.cpu_us_per_request["server"] for r in rows), 1),
                "envoys_cpu_us": round(statistics.median(r.cpu_us_per_request["envoys"] for r in rows), 1),
            }
    return summary


def show(summary: dict[str, Any], terminal: Terminal) -> None:
    """Prints the summary as a table."""
    table = Table("path, mode", title="medians over the rounds; CPU is per request")
    for column in ("p50", "p99", "requests/s", "p50 : direct", "server CPU", "Envoy CPU", "failed"):
        table.add_column(column, justify="right")
    for name, row in summary.items():
        table.add_row(
            name,
            f"{row['p50_us']:.0f} µs",
            f"{row['p99_us']:.0f} µs",
            f"{row['per_s']:,.0f}",
            f"{row['p50_ratio_to_direct']:.2f}",
            f"{row['server_cpu_us']:.0f} µs",
            f"{row['envoys_cpu_us']:.0f} µs",
            str(row["failures"]),
        )
    terminal.say(table)


async def run(arguments: argparse.Namespace) -> None:
    """Measures and writes JSON."""
    with tempfile.TemporaryDirectory(prefix="mlmesh-bench-") as name:
        async with mesh(Path(name)) as connection:
            results = await measure(
                connection, rounds=arguments.rounds, requests=arguments.requests, seed=arguments.seed
            )
    summary = summarise(results)
    show(summary, Terminal(OutputFormat.TABLE))
    rounds = {name: [result.as_dict() for result in rows] for name, rows in results.items()}
    write_results(arguments.out, {"summary": summary, "rounds": rounds})
    print(f"written to {arguments.out}")


def main(arguments: Sequence[str]) -> None:
    """Entry point of `python -m benchmarks paths`."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks paths", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--requests", type=int, default=400, help="requests a measurement")
    parser.add_argument("--seed", type=int, default=1, help="of the order of the measurements")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/paths.json"))
    chosen = parser.parse_args(arguments)
    run_command(Terminal(OutputFormat.TABLE), lambda: run(chosen))
