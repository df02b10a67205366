"""Versions whose config.pbtxt asks for more than a batcher: sequences, iterations, ensembles of files and models."""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np
import pytest

from mlmesh_inference.catalog import Catalog, State
from mlmesh_inference.overrides import Override
from mlmesh_inference.pipelines.dependencies import Dependencies
from mlmesh_inference.pipelines.plan import GraphError
from mlmesh_inference.pipelines.streams import Iterative
from mlmesh_inference.running import FutureSink, SequenceControl, Work, run
from mlmesh_inference.scheduling.batcher import BatchReport
from mlmesh_inference.sequences import Sequencer
from mlmesh_inference.serving import ServingConfig, Step
from mlmesh_inference.tensors import Array
from mlmesh_runtime.errors import InvalidInput, MeshError, Unsupported
from mlmesh_runtime.telemetry import REGISTRY
from tests.support import onnx_models
from tests.support.inference import eventually
from tests.support.pipelines import answers, platform

ADD = onnx_models.add()
ADD_10 = onnx_models.add(plus=10.0)

SEQUENCE = b"""
max_batch_size: 8
input [ { name: "INPUT" data_type: TYPE_INT32 dims: [ 1 ] } ]
output [ { name: "OUTPUT" data_type: TYPE_INT32 dims: [ 1 ] } ]
sequence_batching {
  max_sequence_idle_microseconds: 5000000
  control_input [
    { name: "START" control [ { kind: CONTROL_SEQUENCE_START int32_false_true: [ 0, 1 ] } ] }
  ]
  state [ { input_name: "SUM" output_name: "SUM_NEXT" data_type: TYPE_INT32 dims: [ 1 ] } ]
}
"""
ITERATIVE = """
max_batch_size: 8
input [ {{ name: "LEFT" data_type: TYPE_INT64 dims: [ 1 ] }} ]
output [ {{ name: "VALUE" data_type: TYPE_INT64 dims: [ 1 ] }} ]
sequence_batching {{
  iterative_sequence: true
  state [ {{ input_name: "TURN" output_name: "TURN_NEXT" data_type: TYPE_INT64 dims: [ 1 ] }} ]
}}
parameters [
  {{ key: "mlmesh.stop" value: {{ string_value: "STOP" }} }},
  {{ key: "mlmesh.iterations_max" value: {{ string_value: "5" }} }}
]
{more}
"""


def step(model: str, source: str, target: str, *, version: int = -1) -> str:
    return (
        f'{{ model_name: "{model}" model_version: {version} input_map {{ key: "x" value: "{source}" }} '
        f'output_map {{ key: "y" value: "{target}" }} }}'
    )


def ensemble(*steps: str, more: str = "", width: int = 4, outputs: str = "") -> bytes:
    return f"""
    platform: "ensemble"
    max_batch_size: 8
    input [ {{ name: "in" data_type: TYPE_FP32 dims: [ {width} ] }} ]
    output [ {{ name: "out" data_type: TYPE_FP32 dims: [ {width} ] }} {outputs} ]
    ensemble_scheduling {{ step [ {", ".join(steps)} ] }}
    {more}
    """.encode()


def ones(count: int = 1) -> dict[str, Array]:
    return {"in": np.ones((count, 4), np.float32)}


def config(text: bytes, **files: bytes) -> dict[str, bytes]:
    return {"config.pbtxt": text, **{f"{name}.onnx": data for name, data in files.items()}}


async def test_a_sequence_model_shows_neither_states_nor_controls(tmp_path: Path) -> None:
    async with platform(tmp_path, {"s": [config(SEQUENCE, model=onnx_models.accumulate())]}) as it:
        ready = await it.ready("s")
        assert isinstance(ready.runner, Sequencer)
        assert (list(ready.inputs), list(ready.outputs)) == (["INPUT"], ["OUTPUT"])
        for number, (value, total) in enumerate([(5, 5), (6, 11), (7, 18)]):
            control = SequenceControl(id="calls", start=number == 0)
            inputs = {"INPUT": np.array([[value]], np.int32)}
            (array,) = await run(ready.runner, Work(inputs=inputs, outputs=("OUTPUT",), sequence=control))
            assert array.tolist() == [[total]]
        labels = {"model": "s", "version": "1"}
        assert REGISTRY.get_sample_value("mlmesh_inference_sequences", labels) == 1
        assert REGISTRY.get_sample_value("mlmesh_inference_sequence_state_bytes", labels) == 4


async def test_a_sequence_configuration_that_does_not_fit_fails_the_version(tmp_path: Path) -> None:
    text = SEQUENCE.replace(b'"SUM_NEXT"', b'"TOTAL"')
    async with platform(tmp_path, {"s": [config(text, model=onnx_models.accumulate())]}) as it:
        status = await it.settled("s")
        assert (status.state, "no output 'TOTAL'" in status.error) == (State.FAILED, True)


async def test_a_model_is_run_until_it_says_stop(tmp_path: Path) -> None:
    text = ITERATIVE.format(more="").encode()
    async with platform(tmp_path, {"c": [config(text, model=onnx_models.countdown())]}) as it:
        ready = await it.ready("c")
        assert isinstance(ready.runner, Iterative)
        assert (list(ready.inputs), list(ready.outputs), ready.runner.decoupled) == (["LEFT"], ["VALUE"], False)
        found = await asyncio.gather(
            *(it.ask("c", {"LEFT": np.array([[turns]], np.int64)}) for turns in (1, 3, 4)),
        )
        assert [each["VALUE"].tolist() for each in found] == [[[0]], [[0]], [[0]]]
        bounded = await it.ask("c", {"LEFT": np.array([[9]], np.int64)})
        assert bounded["VALUE"].tolist() == [[4]]
        with pytest.raises(InvalidInput, match="batch-size 1"):
            await it.ask("c", {"LEFT": np.array([[1], [2]], np.int64)})
        assert ready.runner.depth == 0


async def test_a_decoupled_one_answers_every_run(tmp_path: Path) -> None:
    text = ITERATIVE.format(more="model_transaction_policy { decoupled: true }").encode()
    async with platform(tmp_path, {"c": [config(text, model=onnx_models.countdown())]}) as it:
        ready = await it.ready("c")
        work = Work(inputs={"LEFT": np.array([[3]], np.int64)}, outputs=("VALUE",))
        assert [answer.arrays[0].item() for answer in await answers(ready, work)] == [2, 1, 0]
        with pytest.raises(Unsupported):
            ready.runner.submit(work, FutureSink())
        # Whoever stops reading stops the model.
        reading = ready.runner.respond(work)
        assert (await anext(reading)).arrays[0].item() == 2
        await reading.aclose()  # type: ignore[attr-defined]
        assert ready.runner.depth == 0


@pytest.mark.parametrize(
    ("old", "new", "text"),
    [
        ('"STOP"', '"NO"', "no output 'NO'"),
        ("mlmesh.stop", "mlmesh.stopped", "needs parameter mlmesh.stop"),
        ('"5"', '"many"', "expected a number from 1"),
    ],
)
async def test_iterations_that_could_never_end_are_refused(old: str, new: str, text: str, tmp_path: Path) -> None:
    wrong = ITERATIVE.format(more="").replace(old, new).encode()
    async with platform(tmp_path, {"c": [config(wrong, model=onnx_models.countdown())]}) as it:
        status = await it.settled("c")
        assert status.state is State.FAILED
        assert text in status.error


async def test_a_decoupled_model_without_more_answers_once(tmp_path: Path) -> None:
    text = b"model_transaction_policy { decoupled: true }"
    async with platform(tmp_path, {"m": [config(text, model=ADD)]}) as it:
        ready = await it.ready("m")
        work = Work(inputs={"x": np.ones((1, 4), np.float32)}, outputs=("y",))
        assert [answer.arrays[0][0, 0] for answer in await answers(ready, work)] == [2.0]
        with pytest.raises(Unsupported):
            ready.runner.submit(work, FutureSink())


async def test_an_ensemble_of_the_versions_own_files(tmp_path: Path) -> None:
    text = ensemble(step("first.onnx", "in", "a"), step("second.onnx", "a", "b"), step("first.onnx", "b", "out"))
    async with platform(tmp_path, {"e": [config(text, first=ADD, second=ADD_10)]}) as it:
        ready = await it.ready("e")
        assert (ready.platform, ready.composing, ready.policy.batches) == ("ensemble", (), True)
        found = await it.ask("e", ones(3))
        assert found["out"].tolist() == [[13.0] * 4] * 3
        assert ready.statistics.inference_count == 3


class Recorder:
    """A tracer that remembers whose batches it was told of."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, int]] = []

    def batch(self, report: BatchReport, *, model: str, version: int) -> None:
        self.seen.append((model, version))


async def test_requests_under_way_and_steps_in_traces_are_what_was_said(tmp_path: Path) -> None:
    more = 'parameters { key: "mlmesh.requests_max" value { string_value: "3" } }'
    text = ensemble(step("first.onnx", "in", "out"), more=more)
    tracer = Recorder()
    async with platform(tmp_path, {"e": [config(text, first=ADD)]}, tracer=tracer) as it:
        ready = await it.ready("e")
        assert ready.runner.capacity == 3
        await run(ready.runner, Work(inputs=ones(), outputs=("out",), trace="sampled"))
        assert sorted(tracer.seen) == [("e", 1), ("e:first.onnx", 1)]


async def test_an_ensemble_of_other_models_waits_for_them_and_keeps_their_versions(tmp_path: Path) -> None:
    text = ensemble(step("m", "in", "a"), step("n", "a", "out", version=1))
    models = {"e": [config(text)], "m": [{"model.onnx": ADD}], "n": [{"model.onnx": ADD_10}]}
    async with platform(tmp_path, models) as it:
        ready = await it.ready("e")
        assert ready.composing == (("m", 1), ("n", 1))
        assert "m is version 1" in (await it.settled("e")).engine_reason
        assert (await it.ask("e", ones()))["out"][0, 0] == 12.0
        # A new default of m is not the ensemble's, and the old one stays for it.
        await it.source.publish_files("m", 2, {"model.onnx": ADD_10})
        await it.until(lambda: it.catalog.default_version("m") == 2)
        assert it.catalog.ready("m", 1) is not None
        assert (await it.ask("e", ones()))["out"][0, 0] == 12.0
        # Without the ensemble nobody wants it any more.
        await it.source.delete("e", 1)
        await it.until(lambda: it.catalog.status("m", 1) is None)


@pytest.mark.parametrize(
    ("files", "text"),
    [
        (config(ensemble(step("gone", "in", "out"))), "needs model 'gone', which is neither served here nor a file of"),
        (config(ensemble(step("gone.onnx", "in", "out"))), "needs model 'gone.onnx'"),
        (config(ensemble(step("bad", "in", "out"))), "needs model 'bad', which failed"),
        (config(ensemble(step("e", "in", "out"))), "wait for each other: e -> e"),
        (config(ensemble(step("m", "in", "a"), step("m", "b", "out"))), "takes tensor 'b', which no step gives"),
        (config(ensemble(step("m", "in", "out"), width=5)), r"has shape \[-1,5\], input 'x' of step 'm' takes"),
        (config(ensemble(step("m", "in", "a"), step("m", "a", "b"))), "takes tensor 'out', which no step gives"),
        (config(ensemble(step("mlmesh.no", "in", "out"))), "no built-in step 'mlmesh.no'"),
        (config(ensemble(step("d", "in", "out"))), "step 'd': a decoupled model cannot be a step"),
        (config(ensemble(step("m", "in", "out"), more="dynamic_batching { }")), "another member of oneof"),
        (
            config(
                ensemble(
                    step("m", "in", "out"),
                    more='parameters { key: "mlmesh.classes.k" value { string_value: "1" } }',
                )
            ),
            "the ensemble has no step 'mlmesh.classes'",
        ),
        (
            config(
                ensemble(
                    step("m", "in", "out"),
                    more='parameters { key: "mlmesh.requests_max" value { string_value: "0" } }',
                )
            ),
            "mlmesh.requests_max: expected a number of 1 or more",
        ),
        (config(ensemble(step("broken.onnx", "in", "out")), broken=b"no model"), "it is no well-formed ONNX model"),
    ],
)
async def test_an_ensemble_that_cannot_work_fails_by_name_and_the_others_serve(
    files: dict[str, bytes], text: str, tmp_path: Path
) -> None:
    models = {
        "e": [files],
        "m": [{"model.onnx": ADD}],
        "d": [config(b"model_transaction_policy { decoupled: true }", model=ADD)],
        "bad": [{"model.onnx": b"no model"}],
    }
    async with platform(tmp_path, models) as it:
        status = await it.settled("e")
        assert status.state is State.FAILED
        assert text.replace("\\", "") in status.error
        await it.ready("m")


async def test_ensembles_that_wait_for_each_other_fail(tmp_path: Path) -> None:
    models = {
        "a": [config(ensemble(step("b", "in", "out")))],
        "b": [config(ensemble(step("c", "in", "out")))],
        "c": [config(ensemble(step("a", "in", "out")))],
    }
    async with platform(tmp_path, models) as it:
        errors = [(await it.settled(name)).error for name in models]
        assert any("the models wait for each other: " in error for error in errors)
        assert all("wait for each other" in error or "which failed" in error for error in errors)


async def test_a_step_that_is_a_sequence_model_gets_the_requests_sequence(tmp_path: Path) -> None:
    text = b"""
    platform: "ensemble"
    max_batch_size: 8
    input [ { name: "in" data_type: TYPE_INT32 dims: [ 1 ] } ]
    output [ { name: "out" data_type: TYPE_INT32 dims: [ 1 ] } ]
    ensemble_scheduling { step [ {
      model_name: "s" model_version: -1
      input_map { key: "INPUT" value: "in" } output_map { key: "OUTPUT" value: "out" }
    } ] }
    """
    models = {"e": [config(text)], "s": [config(SEQUENCE, model=onnx_models.accumulate())]}
    async with platform(tmp_path, models) as it:
        ready = await it.ready("e")
        sums = []
        for number, tenant in enumerate(["a", "a", "b", "a"]):
            control = SequenceControl(id=1, start=number in {0, 2})
            inputs = {"in": np.array([[5]], np.int32)}
            work = Work(inputs=inputs, outputs=("out",), sequence=control, tenant=tenant)
            sums.append((await run(ready.runner, work))[0].item())
        assert sums == [5, 10, 5, 15]


async def test_an_ensemble_of_ensembles(tmp_path: Path) -> None:
    inner = step("inner", "in", "a").replace('"x"', '"in"').replace('"y"', '"out"')
    models = {
        "outer": [config(ensemble(inner, step("last.onnx", "a", "out")), last=ADD_10)],
        "inner": [config(ensemble(step("m", "in", "a"), step("m", "a", "out")))],
        "m": [{"model.onnx": ADD}],
    }
    async with platform(tmp_path, models) as it:
        await it.ready("outer")
        assert (await it.ask("outer", ones(2)))["out"].tolist() == [[13.0] * 4] * 2


async def test_a_model_of_an_ensemble_may_be_loaded_anew_or_go_by_hand(tmp_path: Path) -> None:
    models = {"e": [config(ensemble(step("m", "in", "out")))], "m": [{"model.onnx": ADD}]}
    async with platform(tmp_path, models) as it:
        await it.ready("e")
        before = it.catalog.resolve("m", "1").runner
        await it.loader.load("m", Override(config=ServingConfig(parameters={"note": "anew"}), files={}))
        assert it.catalog.resolve("m", "1").runner is not before
        assert (await it.ask("e", ones()))["out"][0, 0] == 2.0
        await it.loader.unload("m")
        with pytest.raises(MeshError, match="'m'"):
            await it.ask("e", ones())
        await it.loader.load("m")
        assert (await it.ask("e", ones()))["out"][0, 0] == 2.0


async def test_versions_of_an_ensemble_that_wait_at_once() -> None:
    catalog, told = Catalog(), list[str]()
    waits = [Step(model="later", inputs={"x": "in"}, outputs={"y": "out"})]
    dependencies = Dependencies(catalog)
    catalog.begin("later", 1, total_bytes=0, sha256="")
    versions = [asyncio.ensure_future(dependencies.served("e", waits, told.append)) for _ in range(2)]
    await asyncio.sleep(0)
    with pytest.raises(GraphError, match="wait for each other: later -> e -> later"):
        await dependencies.served("later", [Step(model="e")], told.append)
    catalog.progress("later", 1, State.FETCHING, error="the registry does not answer")
    catalog.progress("later", 1, State.FETCHING, error="the registry does not answer")
    await eventually(lambda: told == ["waits for model 'later': the registry does not answer"] * 2)
    catalog.forget("later", 1)
    errors = await asyncio.gather(*versions, return_exceptions=True)
    assert ["neither served here" in str(error) for error in errors] == [True, True]


async def test_sequences_outlive_a_load_under_another_configuration(tmp_path: Path) -> None:
    async with platform(tmp_path, {"s": [config(SEQUENCE, model=onnx_models.accumulate())]}) as it:
        await it.ready("s")

        async def add(value: int, *, start: bool = False) -> int:
            control = SequenceControl(id=3, start=start)
            work = Work(inputs={"INPUT": np.array([[value]], np.int32)}, outputs=("OUTPUT",), sequence=control)
            return int((await run(it.catalog.resolve("s", "").runner, work))[0].item())

        assert await add(5, start=True) == 5
        before = it.catalog.resolve("s", "")
        await it.loader.load("s", Override(config=before.config))
        assert it.catalog.resolve("s", "").runner is not before.runner
        assert await add(6) == 11
