"""Ensembles: what is refused when they are loaded, and how requests go through them."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from mlmesh_inference.pipelines.fusing import FusedStep, Stage, fused
from mlmesh_inference.pipelines.graph import Graph, Part
from mlmesh_inference.pipelines.plan import ANY_SHAPE, GraphError, Node, Plan, ensemble_signature
from mlmesh_inference.pipelines.steps.base import BuiltIn
from mlmesh_inference.running import FutureSink, Work
from mlmesh_inference.scheduling.batcher import Batcher, InferenceError
from mlmesh_inference.scheduling.policy import BatchPolicy
from mlmesh_inference.serving import ServingConfig, TensorConfig
from mlmesh_inference.statistics import Statistics
from mlmesh_inference.tensors import DATATYPES, Array, Signature, TensorSpec
from mlmesh_runtime.errors import InvalidInput, NotReady, Overloaded, TimedOut, Unsupported
from tests.support.inference import GatedEngine, eventually, rows


def spec(name: str, *shape: int, kind: str = "FP32", optional: bool = False) -> TensorSpec:
    return TensorSpec(name=name, datatype=DATATYPES[kind], shape=shape or ANY_SHAPE, optional=optional)


def signature(inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]) -> Signature:
    return Signature(inputs=tuple(inputs), outputs=tuple(outputs))


DOUBLE = signature([spec("x", -1, 4)], [spec("y", -1, 4)])
ENSEMBLE = signature([spec("in", -1, 4)], [spec("out", -1, 4)])


def node(name: str, source: str, target: str, of: Signature = DOUBLE) -> Node:
    return Node(name=name, inputs={"x": source}, outputs={"y": target}, signature=of)


def test_steps_are_put_in_an_order_in_which_they_may_run() -> None:
    plan = Plan.of(ENSEMBLE, [node("c", "b", "out"), node("a", "in", "a"), node("b", "a", "b")])
    assert [each.name for each in plan.nodes] == ["a", "b", "c"]
    assert plan.follows == ((1,), (2,), ())


@pytest.mark.parametrize(
    ("nodes", "text"),
    [
        ([], "has no step"),
        ([node("a", "in", "a")], "output 'out' of the ensemble takes tensor 'out', which no step gives"),
        ([node("a", "nowhere", "out")], "input 'x' of step 'a' takes tensor 'nowhere', which no step gives"),
        (
            [node("a", "in", "out"), node("b", "in", "out")],
            "tensor 'out' is given twice, by output 'y' of step 'a' and",
        ),
        ([node("a", "in", "in")], "given twice, by input 'in' of the ensemble and by output 'y' of step 'a'"),
        ([node("a", "b", "a"), node("b", "a", "b"), node("c", "in", "out")], "wait for each other: a -> b -> a"),
        ([node("a", "a", "a"), node("c", "in", "out")], "wait for each other: a -> a"),
        (
            [Node(name="a", inputs={"z": "in"}, outputs={"y": "out"}, signature=DOUBLE)],
            "step 'a' has no input 'z'; it takes 'x'",
        ),
        (
            [Node(name="a", inputs={"x": "in"}, outputs={"z": "out"}, signature=DOUBLE)],
            "step 'a' has no output 'z'; it gives 'y'",
        ),
        ([Node(name="a", inputs={}, outputs={"y": "out"}, signature=DOUBLE)], "step 'a' is not given its input 'x'"),
        ([Node(name="a", inputs={"x": "in"}, outputs={}, signature=DOUBLE)], "step 'a' gives nothing"),
        (
            [node("a", "in", "out", signature([spec("x", -1, 5)], [spec("y", -1, 4)]))],
            r"has shape \[-1,4\], input 'x' of step 'a' takes \[-1,5\]",
        ),
        (
            [node("a", "in", "out", signature([spec("x", -1, 4, kind="INT64")], [spec("y", -1, 4)]))],
            "input 'in' of the ensemble is FP32, input 'x' of step 'a' takes INT64",
        ),
        (
            [node("a", "in", "b"), node("b", "b", "out", signature([spec("x", -1)], [spec("y", -1, 4)]))],
            r"output 'y' of step 'a' has shape \[-1,4\], input 'x' of step 'b' takes \[-1\]",
        ),
        (
            [node("a", "in", "out", signature([spec("x", -1, 4)], [spec("y", -1, 4, kind="BYTES")]))],
            "is BYTES, output 'out' of the ensemble takes FP32",
        ),
    ],
)
def test_an_ensemble_that_cannot_work_is_refused_by_the_name_of_the_step(nodes: list[Node], text: str) -> None:
    with pytest.raises(GraphError, match=text):
        Plan.of(ENSEMBLE, nodes)


def test_inputs_that_go_nowhere_and_optional_ones_for_steps_that_need_them_are_refused() -> None:
    two = signature([spec("in", -1, 4), spec("more", -1, 4)], [spec("out", -1, 4)])
    with pytest.raises(GraphError, match="input 'more' of the ensemble goes to no step"):
        Plan.of(two, [node("a", "in", "out")])
    optional = signature([spec("in", -1, 4, optional=True)], [spec("out", -1, 4)])
    with pytest.raises(GraphError, match="input 'in' of the ensemble is optional, input 'x' of step 'a' is not"):
        Plan.of(optional, [node("a", "in", "out")])


def test_the_signature_is_the_configurations() -> None:
    said = {"inputs": (TensorConfig(name="in", datatype="FP32", dims=(4,)),)}
    outputs = (TensorConfig(name="out", datatype="BYTES", dims=(-1,)),)
    config = ServingConfig(**said, outputs=outputs, rows_max=8)
    assert ensemble_signature(config) == signature([spec("in", -1, 4)], [spec("out", -1, -1, kind="BYTES")])
    alone = ensemble_signature(ServingConfig(**said, outputs=outputs, rows_max=0))
    assert alone == signature([spec("in", 4)], [spec("out", -1, kind="BYTES")])
    with pytest.raises(GraphError, match="must declare its outputs"):
        ensemble_signature(ServingConfig(**said))
    with pytest.raises(GraphError, match="output 'out' of an ensemble must declare its data_type"):
        ensemble_signature(ServingConfig(**said, outputs=(TensorConfig(name="out"),)))


def test_only_what_is_asked_for_runs() -> None:
    both = signature([spec("in", -1, 4)], [spec("left", -1, 4), spec("right", -1, 4)])
    plan = Plan.of(both, [node("a", "in", "a"), node("l", "a", "left"), node("r", "a", "right")])
    assert plan.course(("left", "right")).waits == (0, 1, 1)
    assert plan.course(("right",)).waits == (0, -1, 1)
    assert plan.course(("right",)).outputs == (("y",), (), ("y",))


class Running:
    """A graph over engines that the test steps."""

    def __init__(self, nodes: Sequence[Node], engines: Sequence[GatedEngine], **arguments: Any) -> None:
        ensemble: Signature = arguments.pop("ensemble", ENSEMBLE)
        policy = BatchPolicy(limiter=False, admission=False, **arguments.pop("policy", {}))
        self.engines = {each.name: engine for each, engine in zip(nodes, engines, strict=True)}
        clock = {"clock": arguments["clock"]} if "clock" in arguments else {}
        plan = Plan.of(ensemble, nodes)
        self.statistics = Statistics("e", 1)
        self.closed = 0
        parts = [
            Part(
                runner=Batcher(self.engines[each.name], policy, Statistics(each.name, 1), name=each.name, **clock),
                batches=True,
                rows_max=policy.rows_max,
            )
            for each in plan.nodes
        ]
        self.graph = Graph(plan, parts, self.statistics, name="e", requests_max=4, closing=[self._close], **arguments)

    def _close(self) -> None:
        self.closed += 1

    def ask(self, *values: float, **fields: Any) -> asyncio.Future[list[Array]]:
        sink = FutureSink()
        outputs = fields.pop("outputs", tuple(each.name for each in self.graph.plan.signature.outputs))
        x = rows(*values)
        self.graph.submit(Work(inputs={"in": x}, outputs=outputs, rows=len(x), **fields), sink)
        return sink.future


def chain(**arguments: Any) -> Running:
    """out = in * 2 * 2."""
    nodes = [node("a", "in", "a"), node("b", "a", "out")]
    return Running(nodes, [GatedEngine(), GatedEngine()], **arguments)


async def first_column(outcome: asyncio.Future[list[Array]]) -> list[float]:
    return [float(row[0]) for row in (await outcome)[0]]


async def test_a_request_goes_through_every_step_and_its_steps_meet_those_of_others_in_batches() -> None:
    it = chain()
    outcomes = [it.ask(1.0), it.ask(2.0, 3.0)]
    it.engines["a"].open()
    it.engines["b"].open()
    assert [await first_column(outcome) for outcome in outcomes] == [[4.0], [8.0, 12.0]]
    assert it.engines["a"].batches == [[1.0, 2.0, 3.0]]
    assert it.engines["b"].batches == [[2.0, 4.0, 6.0]]
    assert (it.graph.depth, it.statistics.success.count, it.statistics.inference_count) == (0, 2, 3)


async def test_branches_run_at_once_and_join() -> None:
    join = signature([spec("x", -1, 4), spec("z", -1, 4)], [spec("y", -1, 4)])
    nodes = [
        node("left", "in", "l"),
        node("right", "in", "r"),
        Node(name="join", inputs={"x": "l", "z": "r"}, outputs={"y": "out"}, signature=join),
    ]
    last = GatedEngine(is_open=True)
    last.signature = join
    it = Running(nodes, [GatedEngine(), GatedEngine(), last])
    outcome = it.ask(1.0)
    await it.engines["left"].begun()
    await it.engines["right"].begun()
    it.engines["right"].open()
    it.engines["left"].open()
    assert await first_column(outcome) == [4.0]


async def test_only_the_step_at_fault_fails_its_request() -> None:
    it = chain()
    it.engines["b"].fail_on = 4.0
    good, bad = it.ask(1.0), it.ask(2.0)
    it.engines["a"].open()
    it.engines["b"].open()
    assert await first_column(good) == [4.0]
    with pytest.raises(InferenceError, match="model 'b'"):
        await bad
    assert (it.statistics.success.count, it.statistics.fail.count, it.graph.depth) == (1, 1, 0)


async def test_a_cancelled_request_goes_no_further() -> None:
    it = chain()
    outcome = it.ask(1.0)
    await it.engines["a"].begun()
    waits = it.ask(2.0)
    waits.cancel()
    outcome.cancel()
    assert it.graph.depth == 2
    it.engines["a"].open()
    await eventually(lambda: it.graph.depth == 0)
    assert (it.engines["a"].batches, it.engines["b"].batches) == ([[1.0]], [])


async def test_deadline_priority_tenant_and_trace_go_with_every_step() -> None:
    class Recorder:
        decoupled = False
        depth, capacity = 0, 10

        def __init__(self) -> None:
            self.seen: list[Work] = []

        def submit(self, work: Work, sink: Any) -> None:
            self.seen.append(work)
            sink.answer([work.inputs["x"] * 2])

    first, second = Recorder(), Recorder()
    plan = Plan.of(ENSEMBLE, [node("a", "in", "a"), node("b", "a", "out")])
    parts = [Part(runner=each, owned=False) for each in (first, second)]  # type: ignore[arg-type]
    graph = Graph(plan, parts, Statistics("e", 1), name="e", requests_max=4, clock=lambda: 5)
    sink = FutureSink()
    said = {"deadline_ns": 99, "timeout_us": 7, "priority": 2, "tenant": "t", "trace": "trace", "parameters": {"p": 1}}
    graph.submit(Work(inputs={"in": rows(1.0)}, outputs=("out",), **said), sink)
    assert await first_column(sink.future) == [4.0]
    for work in (*first.seen, *second.seen):
        assert {name: getattr(work, name) for name in said} == said


async def test_a_request_out_of_time_is_refused_at_once_and_between_steps() -> None:
    now = [10]
    it = chain(clock=lambda: now[0])
    with pytest.raises(TimedOut):
        it.ask(1.0, deadline_ns=10)
    outcome = it.ask(1.0, deadline_ns=100)
    await it.engines["a"].begun()
    now[0] = 100
    it.engines["a"].open()
    with pytest.raises(TimedOut):
        await outcome
    assert (it.engines["b"].batches, it.graph.depth) == ([], 0)


async def test_more_rows_than_a_model_takes_go_there_in_pieces() -> None:
    it = chain(policy={"rows_max": 2, "rows_preferred": 2})
    it.engines["a"].open()
    it.engines["b"].open()
    assert await first_column(it.ask(1.0, 2.0, 3.0, 4.0, 5.0)) == [4.0, 8.0, 12.0, 16.0, 20.0]
    assert [len(batch) for batch in it.engines["a"].batches] == [2, 2, 1]


async def test_no_rows_need_no_engine() -> None:
    it = chain()
    (array,) = await it.ask()
    assert (array.shape, array.dtype, it.engines["a"].batches) == ((0, 4), np.float32, [])


async def test_a_shape_that_a_step_does_not_take_is_the_callers_fault() -> None:
    free = signature([spec("in", -1, -1)], [spec("out", -1, 4)])
    it = Running([node("a", "in", "out")], [GatedEngine(is_open=True)], ensemble=free)
    with pytest.raises(InvalidInput, match=r"step 'a'. Expected \[-1,4\], got \[1,5\]") as refused:
        it.graph.submit(Work(inputs={"in": np.zeros((1, 5), np.float32)}, outputs=("out",)), FutureSink())
    assert (refused.value.reason, it.graph.depth) == ("SHAPE_MISMATCH", 0)


async def test_requests_under_way_are_bounded_and_withdrawn_ones_make_room() -> None:
    it = chain()
    outcomes = [it.ask(float(number)) for number in range(4)]
    with pytest.raises(Overloaded) as refused:
        it.ask(9.0)
    assert refused.value.reason == "QUEUE_FULL"
    it.engines["a"].open()
    it.engines["b"].open()
    await asyncio.gather(*outcomes)
    assert await first_column(it.ask(9.0)) == [36.0]


async def test_draining_finishes_what_was_taken_then_gives_everything_back() -> None:
    it = chain()
    outcome = it.ask(1.0)
    await it.engines["a"].begun()
    draining = asyncio.ensure_future(it.graph.drain())
    await asyncio.sleep(0)
    with pytest.raises(NotReady):
        it.ask(2.0)
    it.engines["a"].open()
    it.engines["b"].open()
    assert await first_column(outcome) == [4.0]
    await draining
    assert [engine.closed for engine in it.engines.values()] == [True, True]
    assert it.closed == 1


async def test_aborting_fails_what_is_under_way() -> None:
    it = chain()
    outcome = it.ask(1.0)
    await it.engines["a"].begun()
    it.graph.abort()
    with pytest.raises(NotReady):
        await outcome
    it.engines["a"].open()


async def test_a_decoupled_ensemble_gives_outputs_as_they_come() -> None:
    both = signature([spec("in", -1, 4)], [spec("a", -1, 4), spec("out", -1, 4)])
    nodes = [node("a", "in", "a"), node("b", "a", "out")]
    it = Running(nodes, [GatedEngine(), GatedEngine()], ensemble=both, decoupled=True)
    with pytest.raises(Unsupported, match="ModelInfer RPC doesn't support models with decoupled transaction policy"):
        it.ask(1.0)
    answers = it.graph.respond(Work(inputs={"in": rows(1.0)}, outputs=("a", "out")))
    it.engines["a"].open()
    first = await anext(answers)
    assert (first.outputs, first.arrays[0][0, 0], it.engines["b"].batches) in [
        (("a",), 2.0, []),
        (("a",), 2.0, [[2.0]]),
    ]
    it.engines["b"].open()
    rest = [answer async for answer in answers]
    assert [(each.outputs, float(each.arrays[0][0, 0])) for each in rest] == [(("out",), 4.0)]
    assert it.graph.depth == 0


async def test_an_ensemble_that_is_not_decoupled_answers_a_reader_once() -> None:
    it = chain()
    it.engines["a"].open()
    it.engines["b"].open()
    answers = [each async for each in it.graph.respond(Work(inputs={"in": rows(1.0)}, outputs=("out",)))]
    assert [(each.outputs, float(each.arrays[0][0, 0])) for each in answers] == [(("out",), 4.0)]


async def test_closing_the_answers_withdraws_the_request_and_a_failure_ends_them() -> None:
    both = signature([spec("in", -1, 4)], [spec("a", -1, 4), spec("out", -1, 4)])
    nodes = [node("a", "in", "a"), node("b", "a", "out")]
    it = Running(nodes, [GatedEngine(is_open=True), GatedEngine(is_open=True)], ensemble=both, decoupled=True)
    it.engines["b"].fail_on = 2.0
    answers = it.graph.respond(Work(inputs={"in": rows(1.0)}, outputs=("a", "out")))
    assert (await anext(answers)).outputs == ("a",)
    with pytest.raises(InferenceError):
        await anext(answers)
    with pytest.raises(StopAsyncIteration):
        await anext(answers)
    gone = Running(nodes, [GatedEngine(), GatedEngine()], ensemble=both, decoupled=True)
    answers = gone.graph.respond(Work(inputs={"in": rows(1.0)}, outputs=("a", "out")))
    await gone.engines["a"].begun()
    await answers.aclose()  # type: ignore[attr-defined]
    gone.engines["a"].open()
    await eventually(lambda: gone.graph.depth == 0)
    assert gone.engines["b"].batches == []


class Plus(BuiltIn):
    """y = x + 1; counts its runs."""

    signature = DOUBLE

    def __init__(self) -> None:
        self.runs = 0

    def compute(self, inputs: Any) -> Any:
        self.runs += 1
        return {"y": inputs["x"] + 1}


def test_built_in_steps_that_follow_on_one_another_become_one() -> None:
    both = signature([spec("in", -1, 4)], [spec("b", -1, 4), spec("out", -1, 4)])
    steps = [Plus(), Plus(), Plus(), Plus()]
    stages = [
        Stage(node=node("a", "in", "a"), step=steps[0]),
        Stage(node=node("b", "a", "b"), step=steps[1]),
        Stage(node=node("model", "b", "m")),
        Stage(node=node("c", "m", "c"), step=steps[2]),
        Stage(node=node("d", "c", "out"), step=steps[3]),
    ]
    joined = fused(both, stages, decoupled=False)
    assert [each.node.name for each in joined] == ["a + b", "model", "c + d"]
    plan = Plan.of(both, [each.node for each in joined])
    assert plan.follows == ((1,), (2,), ())
    first = joined[0].step
    assert isinstance(first, FusedStep)
    assert [each.name for each in first.signature.outputs] == ["b"]
    (array,) = first.run({"in": rows(1.0)}, ["b"])
    assert array[0, 0] == 3.0
    assert [step.runs for step in steps] == [1, 1, 0, 0]


def test_in_a_decoupled_ensemble_an_answer_does_not_wait_for_the_next_step() -> None:
    both = signature([spec("in", -1, 4)], [spec("a", -1, 4), spec("out", -1, 4)])
    stages = [Stage(node=node("a", "in", "a"), step=Plus()), Stage(node=node("b", "a", "out"), step=Plus())]
    assert [each.node.name for each in fused(both, stages, decoupled=True)] == ["a", "b"]
    joined = fused(both, stages, decoupled=False)
    assert [each.node.name for each in joined] == ["a + b"]
    assert joined[0].step is not None
    # Only what is asked for is computed.
    step = stages[1].step
    assert isinstance(step, Plus)
    joined[0].step.run({"in": rows(1.0)}, ["a"])
    assert step.runs == 0
