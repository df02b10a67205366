"""Built-in steps that follow on one another, made one: they run on one thread without a way through the event loop."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mlmesh_inference.pipelines.plan import Node, Plan
from mlmesh_inference.pipelines.steps.base import BuiltIn
from mlmesh_inference.tensors import Array, Signature, TensorSpec


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Stage:
    """A step with what computes it: `step` where that is built in, None for a model."""

    node: Node
    step: BuiltIn | None = None


class FusedStep(BuiltIn):
    """Several steps as one, whose tensors have the ensemble's names; computes only what is asked for.

    Args:
        stages: built-in steps, in an order in which they may run. signature: of all of them together.
    """

    def __init__(self, stages: Sequence[Stage], signature: Signature) -> None:
        self._stages = tuple(stages)
        self.signature = signature
        self.name = " + ".join(stage.node.name for stage in stages)

    def run(self, inputs: Mapping[str, Array], outputs: Sequence[str]) -> list[Array]:
        """See Engine.run."""
        wanted, needed = set(outputs), []
        for stage in reversed(self._stages):
            if wanted.intersection(stage.node.outputs.values()):
                needed.append(stage)
                wanted.update(stage.node.inputs.values())
        values = dict(inputs)
        for stage in reversed(needed):
            node, step = stage.node, stage.step
            if step is None:
                raise TypeError("a fused step is made of built-in ones")
            found = step.compute({own: values[name] for own, name in node.inputs.items() if name in values})
            values.update({name: found[own] for own, name in node.outputs.items()})
        return [values[name] for name in outputs]


def fused(signature: Signature, stages: Sequence[Stage], *, decoupled: bool) -> list[Stage]:
    """The same ensemble with chains of built-in steps made one each. Raises GraphError where it is not in order.

    A step joins the one before it when all that it takes comes from there or from the ensemble's inputs. In a decoupled
    ensemble a step that gives an output of the ensemble is joined by none: its answer is not to wait.
    """
    plan = Plan.of(signature, [stage.node for stage in stages])
    by_node = {id(stage.node): stage for stage in stages}
    ordered = [by_node[id(node)] for node in plan.nodes]
    outputs = {spec.name for spec in signature.outputs}
    given = {spec.name for spec in signature.inputs}
    groups: list[list[Stage]] = []
    home: dict[str, int] = {}
    for stage in ordered:
        sources = {home[name] for name in stage.node.inputs.values() if name not in given}
        place = len(groups)
        if stage.step is not None and len(sources) == 1:
            (source,) = sources
            group = groups[source]
            early = decoupled and any(outputs.intersection(each.node.outputs.values()) for each in group)
            if group[0].step is not None and not early:
                place = source
        if place == len(groups):
            groups.append([])
        groups[place].append(stage)
        home.update(dict.fromkeys(stage.node.outputs.values(), place))
    return [group[0] if len(group) == 1 else _joined(group, ordered, outputs) for group in groups]


def _joined(group: Sequence[Stage], stages: Sequence[Stage], outputs: set[str]) -> Stage:
    inside = {id(stage) for stage in group}
    needed = outputs.union(*(stage.node.inputs.values() for stage in stages if id(stage) not in inside))
    made: dict[str, TensorSpec] = {}
    taken: dict[str, TensorSpec] = {}
    for stage in group:
        for own, name in stage.node.inputs.items():
            if name not in made:
                taken.setdefault(name, _renamed(stage.node.signature.inputs, own, name))
        for own, name in stage.node.outputs.items():
            made[name] = _renamed(stage.node.signature.outputs, own, name)
    signature = Signature(
        inputs=tuple(taken.values()), outputs=tuple(spec for name, spec in made.items() if name in needed)
    )
    step = FusedStep(group, signature)
    return Stage(
        node=Node(
            name=step.name,
            inputs={spec.name: spec.name for spec in signature.inputs},
            outputs={spec.name: spec.name for spec in signature.outputs},
            signature=signature,
        ),
        step=step,
    )


def _renamed(specs: Sequence[TensorSpec], own: str, name: str) -> TensorSpec:
    spec = next(spec for spec in specs if spec.name == own)
    return TensorSpec(name=name, datatype=spec.datatype, shape=spec.shape, optional=spec.optional)
