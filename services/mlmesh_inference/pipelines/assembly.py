"""From a configuration to the runner of a version: a batcher, with what sequences, graphs and streams need around it.

The models of an ensemble are found by name: "mlmesh.NAME" is a built-in step, the path of an .onnx file of the same
version is that file, anything else is another model that this process serves. The latter must answer before the
ensemble can; its version is held as long as the ensemble stands.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

from mlmesh_inference.catalog import Catalog, ReadyModel
from mlmesh_inference.engines.base import Engine, EngineError, EngineFacts, MemorySource
from mlmesh_inference.pipelines.dependencies import Key, OtherModel
from mlmesh_inference.pipelines.fusing import Stage, fused
from mlmesh_inference.pipelines.graph import Graph, Part
from mlmesh_inference.pipelines.plan import GraphError, Plan, ensemble_signature, node_of
from mlmesh_inference.pipelines.steps.kinds import PREFIX, build_step
from mlmesh_inference.pipelines.streams import ITERATIONS_MAX, Decoupled, IterationPlan, Iterative
from mlmesh_inference.running import Runner
from mlmesh_inference.scheduling.batcher import Observer
from mlmesh_inference.scheduling.policy import BatchPolicy
from mlmesh_inference.sequence_plan import SequencePlan
from mlmesh_inference.sequences import Sequencer
from mlmesh_inference.serving import SequenceConfig, ServingConfig, Step
from mlmesh_inference.statistics import Statistics
from mlmesh_inference.tensors import Array, Signature, object_array

_LOG = logging.getLogger(__name__)

STEPS_MAX: Final = 64
"""Most steps of an ensemble."""
PLATFORM: Final = "ensemble"
_WARM: Final = 32


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LocalModel:
    """An engine of one of the version's own files, warmed up, and the bounds of its batches."""

    engine: Engine
    policy: BatchPolicy
    reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Source:
    """What runs a step: one of these."""

    built_in: Engine | None = None
    local: LocalModel | None = None
    served: ReadyModel | None = None


class Ensemble:
    """A checked ensemble and its engines; stands where other versions have their engine, but runs only as a graph.

    Attributes:
        plan: of its steps. composing: (model, version) of other models that it needs, in the catalog.
        facts: what its own engines take of memory, together.
    """

    name = PLATFORM
    concurrency = 1

    def __init__(self, plan: Plan, sources: tuple[_Source, ...], catalog: Catalog) -> None:
        self.plan = plan
        self.sources = sources
        self.catalog = catalog
        self.facts = _facts(self._engines())
        self.reason = "; ".join(_shown(node.name, source) for node, source in zip(plan.nodes, sources, strict=True))
        self.signature = plan.signature
        self.composing: tuple[Key, ...] = tuple(
            sorted({(source.served.name, source.served.version) for source in sources if source.served is not None})
        )

    def run(self, inputs: Mapping[str, Array], outputs: object) -> list[Array]:
        """Never called: its graph runs the steps."""
        raise NotImplementedError

    def close(self) -> None:
        """Give back the engines of its own, once each."""
        for engine in self._engines():
            engine.close()

    def _engines(self) -> list[Engine]:
        return list({id(engine): engine for source in self.sources if (engine := _engine(source))}.values())


def _facts(engines: Sequence[Engine]) -> EngineFacts:
    memory = sum(engine.facts.memory_bytes for engine in engines)
    precisions = sorted({engine.facts.precision for engine in engines} - {""})
    devices = sorted({engine.facts.device for engine in engines})
    return EngineFacts(
        precision="+".join(precisions),
        device=devices[-1] if devices else "cpu",
        memory_bytes=memory,
        memory_source=MemorySource.WEIGHTS if memory else MemorySource.UNKNOWN,
    )


def _shown(name: str, source: _Source) -> str:
    if source.local is not None:
        return f"{name} by {source.local.engine.name}"
    if source.served is not None:
        return f"{name} is version {source.served.version}"
    return name


def _engine(source: _Source) -> Engine | None:
    return source.local.engine if source.local is not None else source.built_in


def is_local(step: Step, files: Collection[str]) -> bool:
    """Whether a step's model is a file of the ensemble's own version."""
    return step.model.endswith(".onnx") and step.model in files


def others(config: ServingConfig, files: Collection[str]) -> list[Step]:
    """Steps of an ensemble whose model is another one. Raises GraphError for steps that cannot be."""
    if len(config.steps) > STEPS_MAX:
        raise GraphError(f"ensemble_scheduling has {len(config.steps)} steps, at most {STEPS_MAX} are allowed")
    if config.warmups:
        raise GraphError("model_warmup: the models of an ensemble warm up by themselves, leave it out")
    if config.sequence is not None or config.batching is not None:
        raise GraphError("an ensemble has no scheduling of its own: leave dynamic_batching and sequence_batching out")
    return [step for step in config.steps if not step.model.startswith(PREFIX) and not is_local(step, files)]


def build_ensemble(
    config: ServingConfig,
    *,
    folder: Path,
    files: Collection[str],
    served: Mapping[Key, ReadyModel],
    catalog: Catalog,
    build: Callable[[Path], LocalModel],
) -> Ensemble:
    """Check an ensemble and build what it has of its own. Blocking; raises EngineError, nothing is left open then.

    Args:
        folder: of the version, with `files`. served: what Dependencies.served found in the catalog.
        build: an engine of a file, warmed up.
    """
    signature = ensemble_signature(config)
    locals_: dict[str, LocalModel] = {}
    sources: dict[str, _Source] = {}
    try:
        stages = []
        for place, step in enumerate(config.steps):
            name = step.model if step.model not in sources else f"{step.model} (step {place + 1})"
            if step.model.startswith(PREFIX):
                built_in = build_step(step.model, config.parameters, folder)
                sources[name] = _Source(built_in=built_in)
                stages.append(Stage(node=node_of(name, step, built_in.signature), step=built_in))
                continue
            if is_local(step, files):
                if step.model not in locals_:
                    locals_[step.model] = build(folder / step.model)
                sources[name] = _Source(local=locals_[step.model])
                found = locals_[step.model].engine.signature
            else:
                ready = served[step.model, step.version]
                if ready.runner.decoupled:
                    raise GraphError(f"step '{name}': a decoupled model cannot be a step")
                sources[name], found = _Source(served=ready), ready.signature
            stages.append(Stage(node=node_of(name, step, found)))
        _check_parameters(config)
        joined = fused(signature, stages, decoupled=config.decoupled)
        plan = Plan.of(signature, [stage.node for stage in joined])
        by_name = {stage.node.name: stage for stage in joined}
        ordered = [by_name[node.name] for node in plan.nodes]
        chosen = [_Source(built_in=each.step) if each.step else sources[each.node.name] for each in ordered]
        return Ensemble(plan, tuple(chosen), catalog)
    except BaseException:
        for local in locals_.values():
            local.engine.close()
        raise


def warm_up_step(engine: Engine, *, batches: bool) -> None:
    """Run a model of a step once on zeros, so that the first request does not pay for what an engine puts off.

    Free dimensions are taken as 32, which images and texts have plenty of; a model that wants others is passed over.
    Blocking.
    """
    inputs = {}
    for spec in engine.signature.inputs:
        shape = [_WARM if dim == -1 else dim for dim in spec.shape]
        if batches:
            shape[0] = 1
        inputs[spec.name] = (
            np.zeros(shape, spec.datatype.dtype)
            if spec.datatype.itemsize
            else object_array([b""] * math.prod(shape), shape)
        )
    try:
        engine.run(inputs, [spec.name for spec in engine.signature.outputs])
    except EngineError as error:
        _LOG.warning("warm-up passed over", extra={"error": str(error)})


def _check_parameters(config: ServingConfig) -> None:
    """Refuse options of steps that are not there, and bounds that are none."""
    _requests_max(config, BatchPolicy())
    known = {step.model for step in config.steps}
    for name in config.parameters:
        step = name.rpartition(".")[0]
        if step.startswith(PREFIX) and step not in known:
            raise GraphError(f"parameter {name}: the ensemble has no step '{step}'")


def callers_signature(config: ServingConfig, signature: Signature, *, batches: bool) -> Signature:
    """What callers see of a model: states and controls are the sequencer's. Raises EngineError."""
    if config.sequence is None:
        return signature
    plan = _sequence_plan(config, config.sequence, signature, batches=batches)
    if config.sequence.iterative:
        return _iteration_plan(config, plan, signature).signature
    return plan.signature


def _sequence_plan(
    config: ServingConfig, sequence: SequenceConfig, signature: Signature, *, batches: bool
) -> SequencePlan:
    return SequencePlan.of(sequence, signature, batches=batches, outputs=[output.name for output in config.outputs])


def _iteration_plan(config: ServingConfig, plan: SequencePlan, signature: Signature) -> IterationPlan:
    said = config.parameter("iterations_max") or str(ITERATIONS_MAX)
    if not (said.isascii() and said.isdigit() and 0 < int(said) <= 1 << 20):
        raise EngineError(f"parameter mlmesh.iterations_max: expected a number from 1 to {1 << 20}; got {said[:64]!r}")
    return IterationPlan.of(
        plan,
        signature,
        stop=config.parameter("stop"),
        iterations_max=int(said),
        outputs=[output.name for output in config.outputs],
    )


MakeRunner = Callable[[Engine, BatchPolicy, Observer, str], Runner]
"""Makes the batcher of an engine: (engine, policy, observer, name)."""


def runner_for(
    config: ServingConfig,
    engine: Engine,
    policy: BatchPolicy,
    statistics: Statistics,
    *,
    name: str,
    make: MakeRunner,
) -> Runner:
    """The runner of a version, on the event loop. `name` is "MODEL/VERSION". Raises EngineError."""
    if isinstance(engine, Ensemble):
        return _graph(config, engine, policy, statistics, name=name, make=make)
    runner = make(engine, policy, statistics, name)
    if config.sequence is not None:
        plan = _sequence_plan(config, config.sequence, engine.signature, batches=policy.batches)
        model = name.partition("/")[0]
        if config.sequence.iterative:
            iteration = _iteration_plan(config, plan, engine.signature)
            return Iterative(runner, iteration, name=model, batches=policy.batches, decoupled=config.decoupled)
        runner = sequencer = Sequencer(runner, plan, config.sequence, name=model, batches=policy.batches)
        statistics.sequences = lambda: (sequencer.sequences, sequencer.state_bytes)
    return Decoupled(runner) if config.decoupled else runner


def take_over(runner: Runner, before: Runner) -> None:
    """Let a version's new runner go on where the one before it was; what that one runs, it ends."""
    if isinstance(runner, Sequencer) and isinstance(before, Sequencer):
        runner.adopt(before)


def _requests_max(config: ServingConfig, policy: BatchPolicy) -> int:
    """Requests under way at once: those of a graph hold what every step of theirs made. Raises EngineError."""
    said = config.parameter("requests_max")
    if not said:
        return policy.queue_items_max
    if not (said.isascii() and said.isdigit() and int(said)):
        raise EngineError(f"parameter mlmesh.requests_max: expected a number of 1 or more; got {said[:64]!r}")
    return min(int(said), policy.queue_items_max)


def _step_policy(queue_items_max: int) -> BatchPolicy:
    """Of a built-in step: every request by itself. What a run takes depends on the request, so no time is foretold."""
    return BatchPolicy(
        batches=False,
        rows_max=1,
        rows_preferred=1,
        queue_items_max=queue_items_max,
        limiter=False,
        admission=False,
    )


def _graph(
    config: ServingConfig,
    ensemble: Ensemble,
    policy: BatchPolicy,
    statistics: Statistics,
    *,
    name: str,
    make: MakeRunner,
) -> Graph:
    model = name.partition("/")[0]
    own: list[Statistics] = []
    runners: dict[int, Runner] = {}

    def part(source: _Source, step: str) -> Part:
        if source.served is not None:
            bounds = source.served.policy
            other = OtherModel(ensemble.catalog, source.served.name, source.served.version)
            return Part(runner=other, batches=bounds.batches, rows_max=bounds.rows_max, owned=False)
        engine = _engine(source)
        if engine is None:
            raise TypeError("a step has a model")
        bounds = source.local.policy if source.local is not None else _step_policy(policy.queue_items_max)
        runner = runners.get(id(engine))
        if runner is None:
            own.append(Statistics(f"{model}:{step}", statistics.version, tracer=statistics.tracer))
            runner = make(engine, bounds, own[-1], f"{name}:{step}")
            runners[id(engine)] = runner
        return Part(runner=runner, batches=bounds.batches, rows_max=bounds.rows_max)

    parts = [part(source, node.name) for source, node in zip(ensemble.sources, ensemble.plan.nodes, strict=True)]
    return Graph(
        ensemble.plan,
        parts,
        statistics,
        name=model,
        requests_max=_requests_max(config, policy),
        decoupled=config.decoupled,
        closing=[each.close for each in own],
    )
