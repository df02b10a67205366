"""Sequences over an engine that the test steps: state, order, batches, bounds, identity, draining, moving."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest

from mlmesh_inference.engines.base import EngineError
from mlmesh_inference.running import FutureSink, SequenceControl, Work
from mlmesh_inference.scheduling.batcher import Batcher, InferenceError
from mlmesh_inference.scheduling.policy import BatchPolicy
from mlmesh_inference.sequence_plan import SequencePlan
from mlmesh_inference.sequences import Sequencer
from mlmesh_inference.serving import ControlInput, ControlKind, SequenceConfig, StateConfig
from mlmesh_inference.statistics import Statistics
from mlmesh_inference.tensors import DATATYPES, Array, Signature, TensorSpec
from mlmesh_runtime.errors import InvalidInput, NotFound, NotReady, Overloaded, WrongState
from tests.support.inference import GatedEngine, eventually

FP32 = DATATYPES["FP32"]
TOTAL = StateConfig(input="total", output="total_out")
SUM = SequenceConfig(states=(TOTAL,), idle_us=60_000_000)


def spec(name: str, *shape: int, kind: str = "FP32") -> TensorSpec:
    return TensorSpec(name=name, datatype=DATATYPES[kind], shape=shape)


class Summing(GatedEngine):
    """y = total_out = x + total, over [N,1]; remembers what else it was given."""

    def __init__(self, *controls: TensorSpec, **arguments: Any) -> None:
        super().__init__(width=1, **arguments)
        self.signature = Signature(
            inputs=(spec("x", -1, 1), spec("total", -1, 1), *controls),
            outputs=(spec("y", -1, 1), spec("total_out", -1, 1)),
        )
        self.given: list[Mapping[str, Array]] = []

    def run(self, inputs: Mapping[str, Array], outputs: Sequence[str]) -> list[Array]:
        """Wait at the gate, then add."""
        self.given.append(inputs)
        super().run(inputs, ["y"])
        return [inputs["x"] + inputs["total"] for _ in outputs]


def sequencer(engine: Summing, config: SequenceConfig = SUM, **policy: Any) -> Sequencer:
    bounds = BatchPolicy(**{"rows_preferred": 8, "limiter": False, "admission": False, **policy})
    plan = SequencePlan.of(config, engine.signature, batches=True)
    batcher = Batcher(engine, bounds, Statistics("m", 1), name="m/1")
    return Sequencer(batcher, plan, config, name="m", batches=True)


def send(
    to: Sequencer, name: int | str, value: float, *flags: str, tenant: str = "", rows: int = 1
) -> asyncio.Future[list[Array]]:
    sink = FutureSink()
    control = SequenceControl(id=name, start="start" in flags, end="end" in flags)
    x = np.full((rows, 1), value, np.float32)
    to.submit(Work(inputs={"x": x}, outputs=("y",), rows=rows, tenant=tenant, sequence=control), sink)
    return sink.future


async def value(outcome: asyncio.Future[list[Array]]) -> float:
    (array,) = await outcome
    assert array.shape == (1, 1)
    return float(array[0, 0])


async def test_the_state_of_the_last_answer_is_the_next_requests_input() -> None:
    it = sequencer(Summing(is_open=True))
    assert await value(send(it, 7, 1, "start")) == 1
    assert await value(send(it, 7, 10)) == 11
    assert (it.sequences, it.state_bytes) == (1, 4)
    assert await value(send(it, 7, 100, "end")) == 111
    assert (it.sequences, it.state_bytes, it.depth) == (0, 0, 0)


async def test_start_begins_anew_and_one_request_may_be_a_whole_sequence() -> None:
    it = sequencer(Summing(is_open=True))
    assert await value(send(it, 7, 1, "start")) == 1
    assert await value(send(it, 7, 2, "start")) == 2
    assert await value(send(it, 7, 5)) == 7
    assert await value(send(it, 8, 3, "start", "end")) == 3
    assert it.sequences == 1


async def test_requests_of_one_sequence_run_in_order_and_share_batches_with_those_of_others() -> None:
    engine = Summing()
    it = sequencer(engine)
    outcomes = [
        *(send(it, 1, 1, "start"), send(it, 1, 10), send(it, 1, 100, "end")),
        *(send(it, 2, 2, "start"), send(it, 2, 20, "end")),
        send(it, 3, 3, "start", "end"),
    ]
    assert it.depth == 6
    engine.open()
    assert [await value(outcome) for outcome in outcomes] == [1, 11, 111, 2, 22, 3]
    assert engine.batches == [[1, 2, 3], [10, 20], [100]]
    assert it.sequences == 0


async def test_a_sequence_that_ended_and_began_again_while_it_waited() -> None:
    engine = Summing()
    it = sequencer(engine)
    outcomes = [send(it, 1, 1, "start"), send(it, 1, 2, "end"), send(it, 1, 5, "start"), send(it, 1, 6)]
    engine.open()
    assert [await value(outcome) for outcome in outcomes] == [1, 3, 5, 11]
    assert it.sequences == 1


@pytest.mark.parametrize(
    ("arguments", "reason", "text"),
    [
        ({"name": 7}, "SEQUENCE_NOT_FOUND", "sequence 7 to model 'm' must specify the START flag on the first request"),
        ({"name": "a"}, "SEQUENCE_NOT_FOUND", "sequence 'a' to model 'm' must specify the START flag"),
        ({"name": 0}, "INVALID_FIELD", "must specify a non-zero or non-empty correlation ID"),
        ({"name": ""}, "INVALID_FIELD", "must specify a non-zero or non-empty correlation ID"),
        ({"name": 7, "rows": 2}, "SHAPE_MISMATCH", "must specify batch-size 1 due to requirements of sequence batcher"),
    ],
)
async def test_requests_that_are_refused(arguments: dict[str, Any], reason: str, text: str) -> None:
    it = sequencer(Summing(is_open=True))
    with pytest.raises(InvalidInput, match=text) as refused:
        send(it, value=1, **arguments)
    assert refused.value.reason == reason
    with pytest.raises(InvalidInput, match="correlation ID"):
        it.submit(Work(inputs={"x": np.zeros((1, 1), np.float32)}, outputs=("y",)), FutureSink())


async def test_after_the_end_nothing_goes_on() -> None:
    engine = Summing()
    it = sequencer(engine)
    first, last = send(it, 7, 1, "start"), send(it, 7, 2, "end")
    with pytest.raises(InvalidInput, match="START"):
        send(it, 7, 3)
    engine.open()
    assert [await value(first), await value(last)] == [1, 3]
    with pytest.raises(InvalidInput, match="START"):
        send(it, 7, 3)


async def test_nobody_continues_the_sequence_of_another() -> None:
    it = sequencer(Summing(is_open=True))
    assert await value(send(it, 7, 1, "start", tenant="spiffe://mesh/a")) == 1
    with pytest.raises(InvalidInput, match="START"):
        send(it, 7, 1, tenant="spiffe://mesh/b")
    assert await value(send(it, 7, 50, "start", tenant="spiffe://mesh/b")) == 50
    assert await value(send(it, 7, 1, tenant="spiffe://mesh/a")) == 2
    with pytest.raises(NotFound):
        it.snapshot("spiffe://mesh/c", 7)


async def test_a_sequence_that_nobody_continues_is_forgotten() -> None:
    engine = Summing(is_open=True)
    it = sequencer(engine, SequenceConfig(states=(TOTAL,), idle_us=2000))
    await send(it, 7, 1, "start")
    await eventually(lambda: it.sequences == 0)
    with pytest.raises(InvalidInput, match="START"):
        send(it, 7, 1)


async def test_room_is_made_of_idle_sequences_never_of_one_whose_request_runs() -> None:
    engine = Summing()
    now = [0]
    config = SequenceConfig(states=(TOTAL,), idle_us=1000, sequences_max=1)
    plan = SequencePlan.of(config, engine.signature, batches=True)
    batcher = Batcher(engine, BatchPolicy(), Statistics("m", 1), name="m/1")
    it = Sequencer(batcher, plan, config, name="m", batches=True, clock=lambda: now[0])
    outcome = send(it, 7, 1, "start")
    await engine.begun()
    now[0] = 10_000_000
    with pytest.raises(Overloaded, match="1 live sequences already"):
        send(it, 8, 1, "start")
    engine.open()
    assert await value(outcome) == 1
    now[0] = 20_000_000
    assert await value(send(it, 8, 2, "start")) == 2
    assert it.sequences == 1


async def test_the_number_of_sequences_is_bounded() -> None:
    it = sequencer(Summing(is_open=True), SequenceConfig(states=(TOTAL,), idle_us=60_000_000, sequences_max=2))
    await asyncio.gather(send(it, 1, 1, "start"), send(it, 2, 1, "start"))
    with pytest.raises(Overloaded) as refused:
        send(it, 3, 1, "start")
    assert (refused.value.reason, refused.value.retry_after_s) == ("SEQUENCE_LIMIT", 10.0)
    await send(it, 1, 1, "end")
    assert await value(send(it, 3, 5, "start")) == 5


async def test_a_request_that_fails_leaves_the_state_as_it_was() -> None:
    engine = Summing(is_open=True)
    it = sequencer(engine)
    await send(it, 7, 1, "start")
    engine.fail_on = 13.0
    with pytest.raises(InferenceError):
        await send(it, 7, 13)
    assert await value(send(it, 7, 10)) == 11
    # One that never ran has begun nothing.
    with pytest.raises(InferenceError):
        await send(it, 8, 13, "start", "end")
    assert it.sequences == 1


async def test_a_withdrawn_request_changes_nothing_and_lets_the_next_through() -> None:
    engine = Summing()
    it = sequencer(engine)
    running = send(it, 9, 0, "start")
    await engine.begun()
    first, second, third = send(it, 7, 1, "start"), send(it, 7, 10), send(it, 7, 100)
    first.cancel()
    second.cancel()
    engine.open()
    assert await value(running) == 0
    assert await value(third) == 100
    assert 1.0 not in [x for batch in engine.batches for x in batch]


async def test_a_full_queue_refuses_and_a_refused_start_begins_nothing() -> None:
    engine = Summing()
    it = sequencer(engine, queue_items_max=2)
    outcomes = [send(it, 1, 1, "start")]
    await engine.begun()
    outcomes += [send(it, 2, 1, "start"), send(it, 3, 1, "start")]
    with pytest.raises(Overloaded) as refused:
        send(it, 4, 1, "start")
    assert refused.value.reason == "QUEUE_FULL"
    assert it.sequences == 3
    with pytest.raises(Overloaded):
        send(it, 1, 1)
    engine.open()
    assert [await value(outcome) for outcome in outcomes] == [1, 1, 1]
    assert await value(send(it, 1, 5)) == 6


async def test_draining_finishes_what_was_taken_and_forgets() -> None:
    engine = Summing()
    it = sequencer(engine)
    first, second = send(it, 7, 1, "start"), send(it, 7, 2)
    draining = asyncio.ensure_future(it.drain())
    await engine.begun()
    with pytest.raises(NotReady):
        send(it, 7, 3)
    with pytest.raises(NotReady):
        it.restore("", 8, {"total": np.zeros((1, 1), np.float32)})
    engine.open()
    assert [await value(first), await value(second)] == [1, 3]
    await draining
    assert engine.closed
    assert it.sequences == 0


async def test_aborting_fails_what_waits() -> None:
    engine = Summing()
    it = sequencer(engine)
    running, waiting = send(it, 7, 1, "start"), send(it, 7, 2)
    await engine.begun()
    it.abort()
    with pytest.raises(NotReady):
        await waiting
    engine.open()
    assert await value(running) == 1


async def test_a_state_goes_on_elsewhere() -> None:
    here, there = sequencer(Summing(is_open=True)), sequencer(Summing(is_open=True))
    await send(here, "call-1", 5, "start", tenant="a")
    state = here.snapshot("a", "call-1")
    here.forget("a", "call-1")
    assert (here.sequences, {name: array.tolist() for name, array in state.items()}) == (0, {"total": [[5.0]]})
    there.restore("a", "call-1", state)
    assert await value(send(there, "call-1", 1, tenant="a")) == 6
    # What was taken along is a copy.
    assert state["total"].tolist() == [[5.0]]


async def test_another_engine_of_the_version_goes_on_with_its_sequences() -> None:
    old = Summing()
    before, after = sequencer(old), sequencer(Summing(is_open=True))
    running = [send(before, "busy", 1, "start"), send(before, "busy", 2), send(before, "ends", 7, "start", "end")]
    await old.begun()
    before.restore("", "idle", {"total": np.full((1, 1), 40, np.float32)})
    after.adopt(before)
    assert (before.sequences, after.sequences) == (2, 3)
    idle = send(after, "idle", 2)
    waits = [send(after, "busy", 3), send(after, "ends", 1, "start")]
    with pytest.raises(InvalidInput, match="START"):
        send(after, "stranger", 1)
    assert await value(idle) == 42
    assert not any(each.done() for each in waits)
    old.open()
    assert [await value(each) for each in running] == [1, 3, 7]
    assert [await value(each) for each in waits] == [6, 1]
    await before.drain()
    assert (before.sequences, after.sequences) == (0, 3)


async def test_sequences_of_another_kind_of_state_are_left_to_end() -> None:
    before, after = sequencer(Summing(is_open=True)), sequencer(Summing(is_open=True), SequenceConfig())
    await send(before, 7, 1, "start")
    after.adopt(before)
    assert (before.sequences, after.sequences) == (1, 0)


async def test_a_state_is_taken_between_requests_only_and_checked() -> None:
    engine = Summing()
    it = sequencer(engine)
    outcome = send(it, 7, 1, "start")
    state = {"total": np.zeros((1, 1), np.float32)}
    for busy in (lambda: it.snapshot("", 7), lambda: it.forget("", 7), lambda: it.restore("", 7, state)):
        with pytest.raises(WrongState) as refused:
            busy()
        assert refused.value.reason == "SEQUENCE_BUSY"
    engine.open()
    await outcome
    for wrong in (
        {},
        {"total": np.zeros((1, 2), np.float32)},
        {"total": np.zeros((1, 1), np.float64)},
        {"total": np.zeros((1, 1), np.float32), "more": np.zeros(1)},
    ):
        with pytest.raises(InvalidInput):
            it.restore("", 9, wrong)
    assert it.sequences == 1


@pytest.mark.parametrize(
    ("name", "kind", "told"), [(7, "INT64", 7), (1 << 63, "UINT64", 1 << 63), ("a", "BYTES", b"a")]
)
async def test_control_inputs_tell_the_model_where_it_is(name: int | str, kind: str, told: object) -> None:
    controls = (
        ControlInput(name="begins", kind=ControlKind.START, datatype="INT32", false=0, true=1),
        ControlInput(name="ready", kind=ControlKind.READY, datatype="FP32", false=-1, true=2),
        ControlInput(name="ends", kind=ControlKind.END, datatype="BOOL", false=0, true=1),
        ControlInput(name="id", kind=ControlKind.CORRELATION_ID, datatype=kind),
    )
    engine = Summing(
        *(spec(control.name, -1, 1, kind=control.datatype) for control in controls),
        is_open=True,
    )
    it = sequencer(engine, SequenceConfig(states=(TOTAL,), controls=controls, idle_us=60_000_000))
    await send(it, name, 1, "start")
    await send(it, name, 1)
    await send(it, name, 1, "end")
    seen = [[given[control.name][0, 0] for control in controls] for given in engine.given]
    assert seen == [[1, 2.0, False, told], [0, 2.0, False, told], [0, 2.0, True, told]]


async def test_an_id_that_the_model_cannot_take_is_refused() -> None:
    control = ControlInput(name="id", kind=ControlKind.CORRELATION_ID, datatype="INT32")
    engine = Summing(spec("id", -1, 1, kind="INT32"), is_open=True)
    it = sequencer(engine, SequenceConfig(states=(TOTAL,), controls=(control,)))
    for name in ("text", 1 << 40):
        with pytest.raises(InvalidInput, match="correlation ids as INT32"):
            send(it, name, 1, "start")
    assert it.sequences == 0


@pytest.mark.parametrize(
    ("config", "text"),
    [
        (SequenceConfig(states=(StateConfig(input="z", output="y"),)), "no input 'z'"),
        (SequenceConfig(states=(StateConfig(input="total", output="z"),)), "no output 'z'"),
        (SequenceConfig(states=(StateConfig(input="total", output="y", dims=(2,)),)), r"dims \[2\] do not fit"),
        (SequenceConfig(states=(StateConfig(input="total", output="y", datatype="INT8"),)), "configuration says INT8"),
        (SequenceConfig(states=(StateConfig(input="total", output="wide"),)), "do not fit"),
        (SequenceConfig(states=(StateConfig(input="total", output="number"),)), "output 'number' is INT64"),
        (SequenceConfig(states=(StateConfig(input="free", output="free_out"),)), "must be known"),
        (SequenceConfig(states=(TOTAL, TOTAL)), "same input"),
        (SequenceConfig(controls=(ControlInput(name="z", kind=ControlKind.START),)), "no such input"),
        (SequenceConfig(controls=(ControlInput(name="x", kind=ControlKind.END, datatype="BOOL"),)), "it is FP32"),
        (SequenceConfig(controls=(ControlInput(name="x", kind=ControlKind.CORRELATION_ID),)), "id cannot be FP32"),
        (SequenceConfig(controls=(ControlInput(name="s", kind=ControlKind.END, datatype="BYTES"),)), "cannot be BYTES"),
    ],
)
def test_a_configuration_that_does_not_fit_is_refused_by_name(config: SequenceConfig, text: str) -> None:
    signature = Signature(
        inputs=(spec("x", -1, 1), spec("total", -1, 1), spec("free", -1, -1), spec("s", -1, 1, kind="BYTES")),
        outputs=(
            *(spec("y", -1, 1), spec("total_out", -1, 1), spec("wide", -1, 3), spec("free_out", -1, -1)),
            spec("number", -1, 1, kind="INT64"),
        ),
    )
    with pytest.raises(EngineError, match=text):
        SequencePlan.of(config, signature, batches=True)


def test_callers_see_neither_states_nor_controls_unless_an_output_is_named() -> None:
    signature = Signature(
        inputs=(spec("x", -1, 1), spec("total", -1, 1), spec("begins", -1, 1)),
        outputs=(spec("y", -1, 1), spec("total_out", -1, 1)),
    )
    config = SequenceConfig(states=(TOTAL,), controls=(ControlInput(name="begins", kind=ControlKind.START),))
    plan = SequencePlan.of(config, signature, batches=True)
    assert ([each.name for each in plan.signature.inputs], [each.name for each in plan.signature.outputs]) == (
        ["x"],
        ["y"],
    )
    shown = SequencePlan.of(config, signature, batches=True, outputs=["y", "total_out"])
    assert [each.name for each in shown.signature.outputs] == ["y", "total_out"]
    assert shown.wanted(("total_out",)) == ("total_out",)
    assert plan.wanted(("y",)) == ("y", "total_out")
