"""An ensemble as values: its steps, checked against each other before anything runs. Pure.

An ensemble is a graph without cycles, declared as in Triton's `ModelEnsembling`: every step maps its own tensors to
tensors of the ensemble, and an edge runs from the step that gives a tensor to every step that takes it. What cannot
work is refused when the version is loaded, by the step's name, not when the first request comes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from mlmesh_inference.engines.base import EngineError
from mlmesh_inference.serving import ServingConfig, Step
from mlmesh_inference.tensors import DATATYPES, Signature, TensorSpec, show

ANY_SHAPE: Final = (-2,)
"""Shape of a built-in step's tensor that may be anything."""


class GraphError(EngineError):
    """An ensemble that cannot work. The text names the step and what is wrong with it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """A step with what is known of its model.

    Attributes:
        name: for texts and metrics; two steps may run the same model.
        inputs, outputs: tensors of the ensemble by the names that the model has for them.
        signature: of the model, as its callers see it.
    """

    name: str
    inputs: Mapping[str, str]
    outputs: Mapping[str, str]
    signature: Signature


@dataclass(frozen=True, slots=True, kw_only=True)
class Course:
    """What of an ensemble must run for some of its outputs.

    Attributes:
        waits: by step, how many steps it waits for; -1 for a step that is not needed.
        outputs: by step, the model's outputs to ask for.
    """

    waits: tuple[int, ...]
    outputs: tuple[tuple[str, ...], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """An ensemble that is in order.

    Attributes:
        signature: of the ensemble. nodes: its steps, in an order in which they may run.
        follows: by step, the steps that wait for it.
    """

    signature: Signature
    nodes: tuple[Node, ...]
    follows: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, signature: Signature, nodes: Sequence[Node]) -> Plan:
        """Check an ensemble. Raises GraphError."""
        if not nodes:
            raise GraphError("ensemble_scheduling has no step")
        for node in nodes:
            _check_names(node)
        givers = _givers(signature, nodes)
        _check_tensors(signature, nodes, givers)
        order = _order(nodes, givers)
        nodes = [nodes[place] for place in order]
        makers = {tensor: place for place, node in enumerate(nodes) for tensor in node.outputs.values()}
        follows: list[list[int]] = [[] for _ in nodes]
        for place, node in enumerate(nodes):
            for giver in sorted({makers[tensor] for tensor in node.inputs.values() if tensor in makers}):
                follows[giver].append(place)
        return cls(signature=signature, nodes=tuple(nodes), follows=tuple(map(tuple, follows)))

    def course(self, outputs: Sequence[str]) -> Course:
        """What must run for these outputs of the ensemble."""
        wanted = set(outputs)
        needed = [False] * len(self.nodes)
        asked: list[tuple[str, ...]] = [()] * len(self.nodes)
        for place in reversed(range(len(self.nodes))):
            node = self.nodes[place]
            asked[place] = tuple(own for own, tensor in node.outputs.items() if tensor in wanted)
            if asked[place]:
                needed[place] = True
                wanted.update(node.inputs.values())
        waits = [0 if need else -1 for need in needed]
        for place, followers in enumerate(self.follows):
            for follower in followers:
                if needed[place] and needed[follower]:
                    waits[follower] += 1
        return Course(waits=tuple(waits), outputs=tuple(asked))


def ensemble_signature(config: ServingConfig) -> Signature:
    """Inputs and outputs that a configuration declares, batch dimension included. Raises GraphError."""
    batch = (-1,) if config.rows_max else ()

    def specs(kind: str) -> tuple[TensorSpec, ...]:
        tensors = config.inputs if kind == "input" else config.outputs
        if not tensors:
            raise GraphError(f"an ensemble must declare its {kind}s")
        for tensor in tensors:
            if tensor.datatype not in DATATYPES:
                raise GraphError(f"{kind} '{tensor.name}' of an ensemble must declare its data_type")
        return tuple(
            TensorSpec(
                name=tensor.name,
                datatype=DATATYPES[tensor.datatype],
                shape=(*batch, *tensor.dims),
                optional=tensor.optional,
            )
            for tensor in tensors
        )

    return Signature(inputs=specs("input"), outputs=specs("output"))


def node_of(name: str, step: Step, signature: Signature) -> Node:
    """A step of a configuration, with its model's signature."""
    return Node(name=name, inputs=step.inputs, outputs=step.outputs, signature=signature)


def _check_names(node: Node) -> None:
    """Every tensor that a step maps is its model's; every input that the model needs is mapped."""
    inputs = {spec.name: spec for spec in node.signature.inputs}
    outputs = {spec.name for spec in node.signature.outputs}
    for own in node.inputs:
        if own not in inputs:
            raise GraphError(f"step '{node.name}' has no input '{own}'; it takes {_names(inputs)}")
    for own in node.outputs:
        if own not in outputs:
            raise GraphError(f"step '{node.name}' has no output '{own}'; it gives {_names(outputs)}")
    missing = [spec.name for spec in inputs.values() if not spec.optional and spec.name not in node.inputs]
    if missing:
        raise GraphError(f"step '{node.name}' is not given its input '{missing[0]}'")
    if not node.outputs:
        raise GraphError(f"step '{node.name}' gives nothing: its output_map is empty")


def _givers(signature: Signature, nodes: Sequence[Node]) -> dict[str, tuple[str, TensorSpec]]:
    """Who gives each tensor of the ensemble, in words, and as what."""
    givers = {spec.name: (f"input '{spec.name}' of the ensemble", spec) for spec in signature.inputs}
    for node in nodes:
        specs = {spec.name: spec for spec in node.signature.outputs}
        for own, tensor in node.outputs.items():
            who = f"output '{own}' of step '{node.name}'"
            if tensor in givers:
                raise GraphError(f"tensor '{tensor}' is given twice, by {givers[tensor][0]} and by {who}")
            givers[tensor] = (who, specs[own])
    return givers


def _check_tensors(signature: Signature, nodes: Sequence[Node], givers: Mapping[str, tuple[str, TensorSpec]]) -> None:
    """Everything that is taken is given, and is what its taker takes; every input of the ensemble goes somewhere."""
    taken = set()
    for node in nodes:
        specs = {spec.name: spec for spec in node.signature.inputs}
        for own, tensor in node.inputs.items():
            who = f"input '{own}' of step '{node.name}'"
            _check_edge(givers, tensor, who, specs[own])
            taken.add(tensor)
            if givers[tensor][1].optional and not specs[own].optional:
                raise GraphError(f"{givers[tensor][0]} is optional, {who} is not")
    for spec in signature.outputs:
        _check_edge(givers, spec.name, f"output '{spec.name}' of the ensemble", spec)
    for spec in signature.inputs:
        if spec.name not in taken:
            raise GraphError(f"input '{spec.name}' of the ensemble goes to no step")


def _check_edge(givers: Mapping[str, tuple[str, TensorSpec]], tensor: str, who: str, taker: TensorSpec) -> None:
    if tensor not in givers:
        raise GraphError(f"{who} takes tensor '{tensor}', which no step gives")
    source, giver = givers[tensor]
    if giver.datatype is not taker.datatype:
        raise GraphError(f"{source} is {giver.datatype.name}, {who} takes {taker.datatype.name}")
    if not _fits(giver.shape, taker.shape):
        raise GraphError(f"{source} has shape {show(giver.shape)}, {who} takes {show(taker.shape)}")


def _fits(given: Sequence[int], taken: Sequence[int]) -> bool:
    if ANY_SHAPE in (tuple(given), tuple(taken)):
        return True
    return len(given) == len(taken) and all(
        have == want or -1 in (have, want) for have, want in zip(given, taken, strict=True)
    )


def _order(nodes: Sequence[Node], givers: Mapping[str, object]) -> list[int]:
    """Steps so that each comes after those that it takes from. Raises GraphError that names a cycle."""
    makers = {tensor: place for place, node in enumerate(nodes) for tensor in node.outputs.values()}
    left = {
        place: {makers[tensor] for tensor in node.inputs.values() if tensor in makers and tensor in givers}
        for place, node in enumerate(nodes)
    }
    order: list[int] = []
    while left:
        free = [place for place, waits in left.items() if not waits]
        if not free:
            raise GraphError(f"the steps wait for each other: {' -> '.join(_cycle(nodes, left))}")
        for place in free:
            del left[place]
            order.append(place)
        for waits in left.values():
            waits.difference_update(free)
    return order


def _cycle(nodes: Sequence[Node], left: Mapping[int, set[int]]) -> list[str]:
    """Names of a cycle, its first step again at the end."""
    place, seen = next(iter(left)), [next(iter(left))]
    while True:
        place = next(iter(left[place]))
        if place in seen:
            path = [*seen[seen.index(place) :], place]
            return [nodes[each].name for each in reversed(path)]
        seen.append(place)


def _names(names: Mapping[str, object] | set[str]) -> str:
    return ", ".join(f"'{name}'" for name in sorted(names)) or "none"
