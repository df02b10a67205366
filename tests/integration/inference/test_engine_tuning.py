"""Engines are tried, compared and changed while a version serves: real engines, real processes for the trials."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mlmesh_inference.cache import ModelCache
from mlmesh_inference.catalog import Catalog, ReadyModel, State, Status
from mlmesh_inference.choosing import Child, EngineChooser
from mlmesh_inference.config import InferenceSettings
from mlmesh_inference.engines.base import EngineError
from mlmesh_inference.engines.child import Prover, prove, try_in_child
from mlmesh_inference.engines.kinds import engine_kinds
from mlmesh_inference.engines.onnx import OnnxKind
from mlmesh_inference.engines.openvino import OpenVinoKind
from mlmesh_inference.engines.selection import REFERENCE, Candidate, Trial
from mlmesh_inference.engines.trial import Given, TrialOrder, try_engines
from mlmesh_inference.engines.verdicts import VerdictStore
from mlmesh_inference.events import Published
from mlmesh_inference.loading import Loading
from mlmesh_inference.serving import ServingConfig
from mlmesh_inference.tuning import tune
from mlmesh_runtime.executors import Executors
from tests.support import network_models, onnx_models
from tests.support.inference import submitted
from tests.support.registry_source import MemoryRegistry

pytestmark = pytest.mark.skipif(not OpenVinoKind().probe().available, reason=OpenVinoKind().probe().reason)

FAST = Candidate(engine="openvino", precision="fp32")
USED = (OnnxKind(), OpenVinoKind())
KINDS = {kind.name: kind for kind in engine_kinds()}


def order(path: Path, data: bytes, *candidates: Candidate, **changes: object) -> TrialOrder:
    path.write_bytes(data)
    made = TrialOrder(model=path, candidates=candidates, rows_max=4, rows_preferred=2, timing_s=0.01)
    return replace(made, **changes)  # type: ignore[arg-type]


def test_a_trial_compares_every_batch_and_times_it(tmp_path: Path) -> None:
    reference, fast = try_engines(order(tmp_path / "m.onnx", network_models.perceptron(), FAST), KINDS)
    assert (reference.engine, reference.accepted, fast.engine, fast.accepted) == (REFERENCE, True, "openvino", True)
    assert [rows for rows, _ in fast.batch_times] == [1, 2, 4]
    assert all(seconds > 0 for _, seconds in fast.batch_times)
    assert 0 <= fast.error_max < 1e-4


def test_bf16_beyond_a_tight_tolerance_is_refused_and_within_its_own_is_not(tmp_path: Path) -> None:
    low = Candidate(engine="openvino", precision="bf16")
    asked = order(tmp_path / "m.onnx", network_models.perceptron(features=512, hidden=512), low)
    (_, accepted), (_, refused) = try_engines(asked, KINDS), try_engines(replace(asked, tolerance=1e-5), KINDS)
    assert accepted.accepted, accepted.reason
    assert (accepted.precision, accepted.error_max > 1e-5) == ("bf16", True)
    assert not refused.accepted
    assert "outside tolerance: 'logits' of a batch of 1 rows differs by" in refused.reason
    assert "allowed is 1e-05" in refused.reason
    assert refused.batch_times == ()


def test_free_dimensions_get_the_lengths_that_the_model_takes(tmp_path: Path) -> None:
    for changes in ({}, {"lengths": (3, 7)}, {"dims": {"ids": (5,), "mask": (5,)}}):
        trials = try_engines(order(tmp_path / "m.onnx", network_models.embedder(), FAST, **changes), KINDS)
        assert [trial.accepted for trial in trials] == [True, True], trials


def test_samples_of_the_configuration_are_compared_on(tmp_path: Path) -> None:
    """Only they hold what the made-up requests never would."""
    image = np.full((1, 1, 8, 8), np.float32(3e38))
    asked = order(tmp_path / "m.onnx", network_models.convolutions(), FAST)
    assert try_engines(asked, KINDS)[1].accepted
    broken = replace(asked, given=(Given(rows=1, inputs={"image": image[:, :, :4]}),))
    assert not try_engines(broken, KINDS)[1].accepted


async def test_a_trial_in_a_process_of_its_own(tmp_path: Path) -> None:
    reference, fast = await try_in_child(order(tmp_path / "m.onnx", network_models.perceptron(), FAST))
    assert reference.accepted
    assert fast.accepted
    none = await try_in_child(order(tmp_path / "m.onnx", b"this is no model", FAST))
    assert [trial.accepted for trial in none] == [False, False]
    assert "there is nothing to compare with" in none[1].reason


@pytest.mark.parametrize(
    ("code", "text"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "died (signal SIGSEGV)"),
        ("raise SystemExit('no room')", "died (exit status 1): no room"),
        ("print('nonsense')", "died (exit status 0)"),
        ("print('[{}]')", "died (exit status 0)"),
        ("import sys; sys.stdout.write('x' * (9 << 20))", "died (signal SIGKILL)"),
        ("import time; time.sleep(60)", "took longer than 1 s"),
    ],
)
async def test_a_process_that_dies_lies_or_stalls_is_an_error_and_no_more(code: str, text: str, tmp_path: Path) -> None:
    asked = order(tmp_path / "m.onnx", network_models.perceptron(), FAST)
    time_s = 1.0 if "sleep" in code else 20.0
    with pytest.raises(EngineError) as caught:
        await try_in_child(asked, command=(sys.executable, "-c", code), time_s=time_s)
    assert text in str(caught.value)


async def test_a_file_never_seen_before_is_run_where_it_harms_nobody(tmp_path: Path) -> None:
    store = VerdictStore(tmp_path / "verdicts")
    for name, data, accepted in (("good", network_models.perceptron(), True), ("bad", b"no model", False)):
        path = tmp_path / f"{name}.onnx"
        path.write_bytes(data)
        first = await prove(path, name, store)
        path.unlink()
        assert (first.accepted, await prove(path, name, store)) == (accepted, first)
    (tmp_path / "endless.onnx").write_bytes(network_models.endless())
    endless = await prove(tmp_path / "endless.onnx", "endless", store, cpu_s=2)
    assert not endless.accepted
    assert "out of CPU time" in endless.reason


async def test_what_may_be_loaded_is_what_ended_by_itself(tmp_path: Path) -> None:
    prover = Prover(VerdictStore(tmp_path / "verdicts"), cpu_s=2)
    for name, data in (
        ("good", network_models.perceptron()),
        ("bad", b"no model"),
        ("endless", network_models.endless()),
    ):
        (tmp_path / f"{name}.onnx").write_bytes(data)
    # What is no model is told so by whoever loads it: it harms nobody.
    assert await prover(tmp_path / "good.onnx", "good") == ""
    assert await prover(tmp_path / "bad.onnx", "bad") == ""
    assert "out of CPU time" in await prover(tmp_path / "endless.onnx", "endless")


async def test_a_trial_out_of_memory_ends_alone(tmp_path: Path) -> None:
    asked = order(tmp_path / "m.onnx", network_models.perceptron(), FAST)
    with pytest.raises(EngineError, match="the process that tried the model died"):
        await try_in_child(asked, memory_bytes=32 << 20)


async def test_a_trial_that_nobody_waits_for_is_killed(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pid")
    code = (
        "import os, time\n"
        f"with open({str(tmp_path / 'pid')!r}, 'w') as file: file.write(str(os.getpid()))\n"
        "time.sleep(60)"
    )
    asked = order(tmp_path / "m.onnx", network_models.perceptron(), FAST)
    task = asyncio.create_task(try_in_child(asked, command=(sys.executable, "-c", code)))
    async with asyncio.timeout(20):
        pid = int(await asyncio.to_thread((tmp_path / "pid").read_text))
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    with pytest.raises(ProcessLookupError):
        os.kill(pid, signal.SIGCONT)


class World:
    """One loading process over a registry in memory."""

    def __init__(self, root: Path, executors: Executors, child: Child, **settings: str) -> None:
        self.source = MemoryRegistry()
        self.catalog = Catalog(listener=self._hear)
        inference = InferenceSettings(rows_max=8, rows_preferred=4, concurrency=2, **settings)  # type: ignore[arg-type]
        self._changed = asyncio.Event()
        self.loading = Loading(
            source=self.source,
            cache=ModelCache(root / "cache"),
            catalog=self.catalog,
            kinds=USED,
            settings=inference,
            disk=executors["disk"],
            build=executors["build"],
            chooser=EngineChooser(
                USED,
                inference,
                VerdictStore(root / "verdicts"),
                disk=executors["disk"],
                build=executors["build"],
                child=child,
            ),
        )

    def _hear(self, _: Status) -> None:
        self._changed.set()

    async def load(self, data: bytes, **parameters: str) -> Status:
        await self.source.publish("m", 1, data)
        event = self.source.events[-1]
        assert isinstance(event, Published)
        record = event.record
        config = ServingConfig(parameters={f"mlmesh.{name}": value for name, value in parameters.items()})
        await self.loading.load(record, lambda: None, config=config)
        return self.status

    @property
    def status(self) -> Status:
        found = self.catalog.status("m", 1)
        assert found is not None
        return found

    @property
    def ready(self) -> ReadyModel:
        found = self.catalog.ready("m", 1)
        assert found is not None
        return found

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(60):
            while not condition():
                self._changed.clear()
                await self._changed.wait()

    async def ask(self, value: float = 1.0) -> float:
        outcome = submitted(self.ready.runner, {"x": np.full((1, 4), value, np.float32)})
        return float((await outcome)[0][0, 0])


@contextlib.asynccontextmanager
async def world(root: Path, child: Child = try_in_child, **settings: str) -> AsyncIterator[World]:
    async with Executors({"disk": 2, "build": 2}) as executors:
        made = World(root, executors, child, **settings)
        async with asyncio.TaskGroup() as group:
            task = group.create_task(tune(made.loading))
            yield made
            task.cancel()
        for ready in made.catalog.ready_models():
            await ready.runner.drain()


def verdict(engine: str, *, gate: asyncio.Event | None = None, asked: asyncio.Queue[TrialOrder] | None = None) -> Child:
    """Says that an engine is twice as fast as all others; so a test needs no luck."""

    async def child(order: TrialOrder) -> tuple[Trial, ...]:
        if asked is not None:
            asked.put_nowait(order)
        if gate is not None:
            await gate.wait()
        return tuple(
            Trial(
                engine=each.engine,
                precision=each.precision,
                reason="said",
                accepted=True,
                batch_times=((1, 1.0 if each.engine == engine else 2.0),),
            )
            for each in order.candidates
        )

    return child


async def test_onnx_runtime_serves_at_once_and_the_winner_takes_over_without_a_request_noticing(tmp_path: Path) -> None:
    gate = asyncio.Event()
    async with world(tmp_path, verdict("openvino", gate=gate)) as it:
        status = await it.load(onnx_models.add(plus=1.0))
        assert (status.state, status.engine) == (State.READY, REFERENCE)
        first, stop, answers = it.ready, False, 0
        many = asyncio.Event()

        async def ask() -> None:
            nonlocal answers
            while not stop:
                value = float(answers)
                assert await it.ask(value) == value + 1
                answers += 1
                if answers % 100 == 0:
                    many.set()

        async with asyncio.TaskGroup() as group:
            for _ in range(8):
                group.create_task(ask())
            async with asyncio.timeout(20):
                await many.wait()
            gate.set()
            await it.until(lambda: it.status.engine == "openvino")
            many.clear()
            async with asyncio.timeout(20):
                await many.wait()
            stop = True
        assert it.ready is not first
        assert it.ready.runner is not first.runner
        assert it.ready.statistics is first.statistics
        assert it.ready.statistics.inference_count >= answers
        assert it.ready.signature == first.signature
        assert "2.00 times as fast as onnxruntime-cpu" in it.status.engine_reason
        assert [trial.engine for trial in it.ready.trials if trial.chosen] == ["openvino"]
        assert it.ready.facts.precision == "fp32"
        assert it.ready.facts.memory_bytes >= 0


async def test_what_was_found_out_is_remembered(tmp_path: Path) -> None:
    asked: asyncio.Queue[TrialOrder] = asyncio.Queue()
    for expected_first in (REFERENCE, "openvino"):
        async with world(tmp_path, verdict("openvino", asked=asked)) as it:
            status = await it.load(onnx_models.add(plus=1.0))
            assert status.engine == expected_first
            await it.until(lambda: it.status.engine == "openvino")
            assert await it.ask() == 2.0
            assert len(it.ready.trials) > 1
    assert asked.qsize() == 1
    async with world(tmp_path, verdict("openvino", asked=asked)) as it:
        assert (await it.load(onnx_models.add(plus=2.0))).engine == REFERENCE
        await it.until(lambda: it.status.engine == "openvino")
    assert asked.qsize() == 2


async def test_a_trial_that_fails_leaves_what_serves(tmp_path: Path) -> None:
    calls = asyncio.Semaphore(0)

    async def child(order: TrialOrder) -> tuple[Trial, ...]:
        calls.release()
        raise EngineError("the process that tried the model died")

    async with world(tmp_path, child) as it:
        assert (await it.load(onnx_models.add(plus=1.0))).engine == REFERENCE
        async with asyncio.timeout(20):
            await calls.acquire()
        assert await it.ask() == 2.0
        assert it.status.state is State.READY


async def test_a_version_that_goes_during_its_trial_stays_gone(tmp_path: Path) -> None:
    gate, asked = asyncio.Event(), asyncio.Queue[TrialOrder]()
    async with world(tmp_path, verdict("openvino", gate=gate, asked=asked)) as it:
        await it.load(onnx_models.add(plus=1.0))
        async with asyncio.timeout(20):
            await asked.get()
        gone = it.catalog.withdraw("m", 1)
        assert gone is not None
        await gone.runner.drain()
        it.catalog.forget("m", 1)
        gate.set()
        await it.load(onnx_models.add(plus=5.0))
        assert await it.ask() == 6.0


async def test_a_declared_engine_is_compared_before_it_serves(tmp_path: Path) -> None:
    async with world(tmp_path, engine="openvino") as it:
        status = await it.load(onnx_models.add(plus=1.0))
        assert (status.state, status.engine) == (State.READY, "openvino")
        assert "openvino is declared" in status.engine_reason
        assert await it.ask() == 2.0


async def test_a_declared_engine_outside_the_declared_tolerance_is_refused(tmp_path: Path) -> None:
    async with world(tmp_path) as it:
        status = await it.load(
            network_models.perceptron(features=512, hidden=512), engine="openvino", precision="bf16", tolerance="1e-6"
        )
        assert status.state is State.FAILED
        assert "outside tolerance: 'logits'" in status.error


async def test_tuning_at_load_measures_before_the_version_is_ready(tmp_path: Path) -> None:
    async with world(tmp_path, tuning="load") as it:
        status = await it.load(network_models.perceptron())
        assert status.state is State.READY
        winner = next(trial for trial in it.ready.trials if trial.chosen)
        assert status.engine == winner.engine
        timed = {trial.engine: trial.batch_times for trial in it.ready.trials if trial.accepted}
        assert {REFERENCE, "openvino"} <= timed.keys()
        assert all(times for times in timed.values())


async def test_without_tuning_nothing_is_tried(tmp_path: Path) -> None:
    asked: asyncio.Queue[TrialOrder] = asyncio.Queue()
    async with world(tmp_path, verdict("openvino", asked=asked), tuning="off") as it:
        assert (await it.load(onnx_models.add(plus=1.0))).engine == REFERENCE
        assert asked.empty()


@pytest.mark.parametrize(
    ("parameters", "text"),
    [
        ({"engine": "fastest"}, "engine 'fastest' is declared; there are"),
        ({"precision": "fp12"}, "precision 'fp12' is none of"),
        ({"tolerance": "some"}, "tolerance 'some' is no number"),
        ({"lengths": "many"}, "invalid literal"),
    ],
)
async def test_a_declaration_that_makes_no_sense_fails_the_version(
    parameters: dict[str, str], text: str, tmp_path: Path
) -> None:
    async with world(tmp_path, verdict("openvino")) as it:
        status = await it.load(onnx_models.add(), **parameters)
        assert status.state is State.FAILED
        assert text in status.error


def test_the_reference_is_among_the_engines() -> None:
    names: Sequence[str] = [kind.name for kind in engine_kinds()]
    assert REFERENCE in names
