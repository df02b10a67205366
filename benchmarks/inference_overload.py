"""Three times too much for a minute: does the server go on answering, and in time?

    python -m benchmarks inference-overload --seconds 60 --deadline-ms 1000

A real server process with a real registry, over gRPC. First a closed loop of callers that are always answered measures
capacity; then an open loop offers `--factor` times that, evenly, every call with a deadline; then capacity again.

- *goodput*: calls answered within the deadline a second, by the mean of both capacities. Bar: 0.95.
- *p99*: of calls that were answered, from when each was due, by the deadline. Bar: 1.
- *late*: calls that were taken in and then not answered in time (DEADLINE_EXCEEDED), by those taken in.
- *refused*: the rest, RESOURCE_EXHAUSTED; how long the refusals took, and what they cost the server.

Engines: `timed` runs a tiny model and then sleeps (10 ms a batch and 10 ms a row, two instances of eight rows): the
machine is idle, so it shows what the scheduler does. `onnx` keeps both cores busy with matrices instead, so refusing
competes with computing, and with this process, which makes the load on the same cores.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.harness import Request, Result, closed_loop, open_loop, write_results
from benchmarks.peers import ours, servers
from mlmesh_inference import app
from mlmesh_inference.engines.base import Availability, Engine, EngineOptions
from mlmesh_inference.engines.onnx import OnnxKind
from mlmesh_inference.tensors import Array
from mlmesh_runtime.config import Settings
from mlmesh_runtime.server import run
from open_inference import grpc_service_pb2 as oip
from open_inference import grpc_service_pb2_grpc

MODEL, WIDTH = "overloaded", 64
FIXED_S, ROW_S = 0.010, 0.010
CALLERS = 48
GOODPUT_BAR = 0.95


class TimedEngine:
    """Runs a model, then takes as long as a batch of its size is said to take."""

    def __init__(self, inner: Engine) -> None:
        self._inner = inner
        self.name = inner.name
        self.signature = inner.signature
        self.concurrency = inner.concurrency
        self.facts = inner.facts

    def run(self, inputs: Mapping[str, Array], outputs: Sequence[str]) -> list[Array]:
        """As the model does, later."""
        results = self._inner.run(inputs, outputs)
        time.sleep(FIXED_S + ROW_S * len(results[0]))
        return results

    def close(self) -> None:
        """Give memory back."""
        self._inner.close()


class TimedKind:
    """Engines that take their time."""

    def __init__(self) -> None:
        self._inner = OnnxKind()
        self.name, self.precisions = self._inner.name, self._inner.precisions

    def probe(self) -> Availability:
        """As of the engine that it runs."""
        return self._inner.probe()

    def build(self, model: Path, options: EngineOptions) -> Engine:
        """Build an engine."""
        return TimedEngine(self._inner.build(model, options))


async def serve(settings: Settings) -> None:
    """The server's process, with engines that take their time."""
    await app.serve(settings, kinds=[TimedKind()])


def write_model(path: Path, *, layers: int, rows: int) -> None:
    """Matrices of `rows` x `rows`, one after the other: `layers` of them set the cost; 0 gives the input back."""
    from onnx import TensorProto, helper, numpy_helper, save

    nodes, weights, last = [], [], "x"
    if layers:
        generator = np.random.default_rng(0)
        wide = generator.standard_normal((WIDTH, rows)).astype(np.float32) / WIDTH
        square = generator.standard_normal((rows, rows)).astype(np.float32) / rows
        weights = [numpy_helper.from_array(wide, "wide"), numpy_helper.from_array(square, "square")]
        nodes.append(helper.make_node("MatMul", ["x", "wide"], ["h0"]))
        for number in range(layers):
            nodes.append(helper.make_node("MatMul", [f"h{number}", "square"], [f"m{number}"]))
            nodes.append(helper.make_node("Tanh", [f"m{number}"], [f"h{number + 1}"]))
        last = f"h{layers}"
    columns = rows if layers else WIDTH
    nodes.append(helper.make_node("Identity", [last], ["y"]))
    graph = helper.make_graph(
        nodes,
        MODEL,
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", WIDTH])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", columns])],
        weights,
    )
    save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), str(path))


def message() -> oip.ModelInferRequest:
    """One row."""
    tensor = oip.ModelInferRequest.InferInputTensor(name="x", datatype="FP32", shape=[1, WIDTH])
    row = np.zeros((1, WIDTH), np.float32).tobytes()
    return oip.ModelInferRequest(model_name=MODEL, inputs=[tensor], raw_input_contents=[row])


@dataclass(slots=True, kw_only=True)
class Refusals:
    """How long refused calls waited for their refusal, milliseconds; and their reasons' share of retry hints."""

    waited_ms: list[float]
    hinted: int = 0


def requests(stub: Any, *, deadline_s: float, refusals: Refusals | None = None) -> Request:
    """A request function; what is refused is timed."""
    wanted = message()

    async def call() -> None:
        begun = time.perf_counter()
        try:
            await stub.ModelInfer(wanted, timeout=deadline_s)
        except grpc.aio.AioRpcError as error:
            if refusals is not None and error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED:
                refusals.waited_ms.append((time.perf_counter() - begun) * 1000)
                trailers: Any = error.trailing_metadata() or ()
                refusals.hinted += any(key == "grpc-retry-pushback-ms" for key, _ in trailers)
            raise

    return call


@asynccontextmanager
async def stubs(address: str, channels: int = 4) -> AsyncIterator[list[Any]]:
    """Several connections, as several clients have."""
    options = [("grpc.use_local_subchannel_pool", 1)]
    opened = [grpc.aio.insecure_channel(address, options=options) for _ in range(channels)]
    try:
        yield [grpc_service_pb2_grpc.GRPCInferenceServiceStub(channel) for channel in opened]
    finally:
        for channel in opened:
            await channel.close(None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """One overload. Rates are a second; ratios as the module says."""

    capacity_before: float
    capacity_after: float
    overload: Result
    goodput: float
    p99: float
    late: float
    refused: float
    refusal_p50_ms: float
    hinted: float

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        found = {name: round(getattr(self, name), 4) for name in Outcome.__slots__ if name != "overload"}
        return {**found, "overload": self.overload.as_dict()}

    @property
    def passed(self) -> bool:
        """Whether both bars are met."""
        return self.goodput >= GOODPUT_BAR and self.p99 <= 1.0


async def overload(
    address: str, pids: Sequence[int], *, factor: float, seconds: float, deadline_s: float, capacity_s: float
) -> Outcome:
    """Capacity, overload, capacity."""
    async with stubs(address) as clients:
        patient = [requests(clients[number % len(clients)], deadline_s=60.0) for number in range(CALLERS)]
        await closed_loop(patient, count=1 << 30, time_max_s=capacity_s / 2)
        before = await closed_loop(patient, count=1 << 30, time_max_s=capacity_s)
        rate = factor * before.per_s
        refusals = Refusals(waited_ms=[])
        hurried = [requests(client, deadline_s=deadline_s, refusals=refusals) for client in clients]
        loaded = await open_loop(
            hurried,
            rate_per_s=rate,
            count=int(rate * seconds),
            time_max_s=seconds,
            in_flight_max=100_000,
            cpu={"server": pids},
        )
        after = await closed_loop(patient, count=1 << 30, time_max_s=capacity_s)
    answered = loaded.requests - sum(loaded.failures.values())
    late, refused = loaded.failures.get("DEADLINE_EXCEEDED", 0), loaded.failures.get("RESOURCE_EXHAUSTED", 0)
    return Outcome(
        capacity_before=before.per_s,
        capacity_after=after.per_s,
        overload=loaded,
        goodput=loaded.per_s / ((before.per_s + after.per_s) / 2),
        p99=loaded.latency_us["p99"] / 1e6 / deadline_s,
        late=late / max(1, answered + late),
        refused=refused / max(1, loaded.requests),
        refusal_p50_ms=sorted(refusals.waited_ms)[len(refusals.waited_ms) // 2] if refusals.waited_ms else 0.0,
        hinted=refusals.hinted / max(1, refused),
    )


def measure(engine: str, transport: str, options: argparse.Namespace) -> Outcome:
    """One engine on one transport, in processes of their own."""
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model.onnx"
        write_model(model, layers=0 if engine == "timed" else options.layers, rows=1024)
        module = "mlmesh_inference" if engine == "onnx" else "benchmarks.inference_overload"
        with ours.registry(Path(folder), {MODEL: model}) as registry:
            address, log = f"127.0.0.1:{servers.free_port()}", Path(folder) / "inference.log"
            environ = {
                **ours.SETTINGS,
                "MLMESH_LISTEN": address,
                "MLMESH_DATA_DIR": str(Path(folder) / "inference"),
                "MLMESH_REGISTRY_TARGET": registry,
                "MLMESH_SERVE": "*@stable",
                "MLMESH_TRANSPORT": transport,
                "MLMESH_BATCH_ROWS_PREFERRED": "8",
            }
            with servers.process([sys.executable, "-m", module], log=log, environ=environ) as started:
                servers.await_ready(lambda: _ready(address), started, log)
                return asyncio.run(
                    overload(
                        address,
                        [started.pid],
                        factor=options.factor,
                        seconds=options.seconds,
                        deadline_s=options.deadline_ms / 1000,
                        capacity_s=options.capacity_s,
                    )
                )


def _ready(address: str) -> bool:
    with grpc.insecure_channel(address) as channel:
        stub: Any = grpc_service_pb2_grpc.GRPCInferenceServiceStub(channel)
        return bool(stub.ModelReady(oip.ModelReadyRequest(name=MODEL), timeout=5).ready)


def main(arguments: list[str]) -> None:
    """Measures, prints a table, writes JSON."""
    parser = argparse.ArgumentParser(prog="benchmarks inference-overload", description=__doc__)
    parser.add_argument("--factor", type=float, default=3.0)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--deadline-ms", type=float, default=1000.0)
    parser.add_argument("--capacity-s", type=float, default=6.0)
    parser.add_argument("--layers", type=int, default=240, help="of the model that keeps the cores busy")
    parser.add_argument("--engines", default="timed,onnx")
    parser.add_argument("--transports", default="grpcio,native")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/inference_overload.json"))
    options = parser.parse_args(arguments)
    table = Table(
        "engine", "transport", "capacity", "offered", "goodput", "p99", "late", "refused", "refusal ms", "CPU"
    )
    results: dict[str, Any] = {}
    for engine in options.engines.split(","):
        for transport in options.transports.split(","):
            found = measure(engine, transport, options)
            results[f"{engine} {transport}"] = {**found.as_dict(), "passed": found.passed}
            table.add_row(
                engine,
                transport,
                f"{found.capacity_before:.0f}, {found.capacity_after:.0f}/s",
                f"{found.overload.offered_per_s:.0f}/s",
                f"{found.goodput:.3f}",
                f"{found.p99:.2f}",
                f"{found.late:.4f}",
                f"{found.refused:.3f}",
                f"{found.refusal_p50_ms:.1f}",
                f"{found.overload.cpu_us_per_request['server']:.0f} us",
            )
    Console(width=120).print(table)
    write_results(options.output, {"options": {**vars(options), "output": str(options.output)}, "results": results})


if __name__ == "__main__":
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    run(serve, service="inference")
