"""A whole inference process but its registry, in this process: real engines, real loader, real port.

`MODELS` is what it serves: the models of the protocol's examples, made here. Tests run on every transport that is here:

    @pytest.fixture(params=TRANSPORTS)
    def transport(request): return usable(request.param)
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import os
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pytest

from mlmesh_inference.app import services
from mlmesh_inference.cache import ModelCache
from mlmesh_inference.catalog import Catalog
from mlmesh_inference.config import InferenceSettings, ProtocolSettings
from mlmesh_inference.desired import parse_selectors
from mlmesh_inference.engines.onnx import OnnxKind
from mlmesh_inference.loader import Loader
from mlmesh_inference.loading import Loading
from mlmesh_inference.oip.stream import Streaming
from mlmesh_inference.tokens import Tokens
from mlmesh_inference.trace_settings import TraceSettings
from mlmesh_runtime.executors import Executors
from mlmesh_runtime.server import Server
from tests.support import onnx_models
from tests.support.inference import open_streams
from tests.support.registry_source import MemoryRegistry
from tests.support.server import settings
from tests.support.tools import ROOT

TRANSPORTS: Final = ("grpcio", "native")
_SIMPLE: Final = b"""
name: "simple"
max_batch_size: 8
input [{ name: "INPUT0" data_type: TYPE_INT32 dims: 16 }, { name: "INPUT1" data_type: TYPE_INT32 dims: 16 }]
output [{ name: "OUTPUT0" data_type: TYPE_INT32 dims: 16 }, { name: "OUTPUT1" data_type: TYPE_INT32 dims: 16 }]
"""
_IMAGES: Final = b"""
max_batch_size: 4
input { name: "x" data_type: TYPE_FP32 format: FORMAT_NCHW dims: [ 1, 8, 8 ] }
output { name: "scores" data_type: TYPE_FP32 dims: 10 label_filename: "classes.txt" }
"""
_ACCUMULATE: Final = b"""
sequence_batching {
  control_input { name: "START" control { kind: CONTROL_SEQUENCE_START int32_false_true: [ 0, 1 ] } }
  state { input_name: "SUM" output_name: "SUM_NEXT" data_type: TYPE_INT32 dims: 1 }
}
"""
_TWICE: Final = b"""
platform: "ensemble"
max_batch_size: 8
input { name: "IN" data_type: TYPE_FP32 dims: 4 }
output { name: "OUT" data_type: TYPE_FP32 dims: 4 }
ensemble_scheduling { step [
  { model_name: "plus" model_version: -1
    input_map { key: "x" value: "IN" } output_map { key: "y" value: "between" } },
  { model_name: "plus" model_version: -1
    input_map { key: "x" value: "between" } output_map { key: "y" value: "OUT" } }
] }
"""
_DECOUPLED: Final = b"model_transaction_policy { decoupled: true }"


def available(transport: str) -> bool:
    """Whether a transport is here."""
    spec = importlib.util.find_spec("mlmesh_front")
    return transport == "grpcio" or (spec is not None and spec.origin is not None)


def usable(transport: str) -> str:
    """The transport, or a visible skip where it was not built."""
    if not available(transport):
        pytest.skip("the native transport is not here: `make front` builds it")
    return transport


@dataclass(frozen=True, slots=True, kw_only=True)
class OipServer:
    """A server that answers at `address`, and what is behind it."""

    address: str
    catalog: Catalog
    loader: Loader
    registry: MemoryRegistry
    traces: TraceSettings


async def example_registry() -> MemoryRegistry:
    """simple (INT32 sum and difference), identity of every datatype, images with labels, accumulate with a state,
    decoupled, plus and the ensemble twice that runs it two times."""
    registry = MemoryRegistry()
    await registry.publish_files("simple", 1, {"model.onnx": onnx_models.add_sub(), "config.pbtxt": _SIMPLE})
    kinds = [kind for kind in onnx_models.DATATYPES if kind != "BF16"]
    await registry.publish("identity", 1, onnx_models.identity(kinds))
    await registry.publish("identity-bf16", 1, onnx_models.identity(["BF16"]))
    labels = "\n".join(f"class {n}" for n in range(10)).encode()
    await registry.publish_files(
        "images", 1, {"model.onnx": onnx_models.image_classes(), "config.pbtxt": _IMAGES, "classes.txt": labels}
    )
    await registry.publish_files("accumulate", 1, {"model.onnx": onnx_models.accumulate(), "config.pbtxt": _ACCUMULATE})
    await registry.publish_files("decoupled", 1, {"model.onnx": onnx_models.add(), "config.pbtxt": _DECOUPLED})
    await registry.publish("plus", 1, onnx_models.add(plus=10.0))
    await registry.publish_files("twice", 1, {"config.pbtxt": _TWICE})
    return registry


@contextlib.asynccontextmanager
async def oip_server(
    root: Path,
    *,
    registry: MemoryRegistry | None = None,
    selectors: str = "*",
    protocol: ProtocolSettings | None = None,
    **changes: Any,
) -> AsyncIterator[OipServer]:
    """Serve what the registry has, with the loader's own cache under `root`. `changes` are fields of `Settings`."""
    registry = registry or await example_registry()
    catalog, traces = Catalog(), TraceSettings()
    inference = InferenceSettings(
        selectors=parse_selectors(selectors), protocol=protocol or ProtocolSettings(), rows_max=64
    )
    async with Executors({"disk": 2, "build": 2}) as executors:
        synced = asyncio.Event()
        loader = Loader(
            Loading(
                source=registry,
                cache=ModelCache(root / "cache"),
                catalog=catalog,
                kinds=[OnnxKind()],
                settings=inference,
                disk=executors["disk"],
                build=executors["build"],
            ),
            on_synced=synced.set,
            fallback_s=0.2,
        )
        going_away = asyncio.Event()
        streaming = Streaming(catalog=catalog, open=open_streams(), tokens=Tokens())
        offered = services(
            catalog, loader, [OnnxKind()], going_away, streaming, protocol=inference.protocol, traces=traces
        )
        async with asyncio.TaskGroup() as group:
            task = group.create_task(loader.run())
            async with Server(settings(**changes), offered) as server:
                server.on_drain(going_away.set)
                server.on_drain(streaming.open.drain)
                async with asyncio.timeout(60):
                    await synced.wait()
                yield OipServer(
                    address=server.address, catalog=catalog, loader=loader, registry=registry, traces=traces
                )
            task.cancel()
        for ready in catalog.ready_models():
            ready.runner.abort()


@contextlib.contextmanager
def oip_server_beside(root: Path, **changes: Any) -> Iterator[OipServer]:
    """The same in a thread of its own, for tests of clients that block. Arguments as of `oip_server`."""
    running: Future[OipServer] = Future()
    leave = asyncio.Event()

    async def serve() -> None:
        async with oip_server(root, **changes) as server:
            running.set_result(server)
            await leave.wait()

    def work() -> None:
        try:
            runner.run(serve())
        except BaseException as error:
            if running.done():
                raise
            running.set_exception(error)

    with asyncio.Runner() as runner:
        loop = runner.get_loop()
        thread = threading.Thread(target=work)
        thread.start()
        try:
            yield running.result(90)
        finally:
            if running.exception() is None:
                loop.call_soon_threadsafe(leave.set)
            thread.join(30)
            assert not thread.is_alive()


async def foreign(environment: str, script: str, *arguments: str) -> str:
    """Run a script of tests/support/oip_clients with the Python of an environment of `make tools`; what it printed."""
    python = ROOT / ".tools" / environment / "bin" / "python"
    if not python.exists():
        pytest.skip(f"{environment} is not here: `make tools` installs it")
    return await script_output(str(python), script, *arguments)


async def own(script: str, *arguments: str) -> str:
    """The same with this environment's Python."""
    return await script_output(sys.executable, script, *arguments)


async def script_output(python: str, script: str, *arguments: str) -> str:
    """Output of a script that ended well; AssertionError with its last words if it did not."""
    path = Path(__file__).parent / "oip_clients" / script
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("MLMESH_", "PYTHON"))}
    process = await asyncio.create_subprocess_exec(
        python,
        "-P",
        "-W",
        "ignore",
        str(path),
        *arguments,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**kept, "GRPC_VERBOSITY": "ERROR"},
    )
    try:
        async with asyncio.timeout(120):
            out, errors = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert process.returncode == 0, f"{script} ended with {process.returncode}:\n{errors.decode()[-3000:]}"
    return out.decode()
