"""Documents for the analysis: what cannot be read is told, and the rest of it is looked at all the same."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from mlmesh_local.resources.analysis.messages import ON_THE_LAPTOP, Message
from mlmesh_local.resources.meta import Meta
from mlmesh_local.resources.parse import DEFAULT_NAMESPACE, Document, load_tree
from mlmesh_local.resources.problems import At, InvalidResource, Problem
from mlmesh_local.resources.resource_set import Resource, ResourceSet
from mlmesh_local.resources.tree import Tree, parse_yaml

_ISTIO_GROUPS = ("istio.io", "gateway.networking.k8s.io")
_REFUSED_BY_NAME = ("not supported", "the laptop mesh")


@dataclass(frozen=True, slots=True, kw_only=True)
class Unread:
    """A resource that was refused: only its name and what was written are known."""

    meta: Meta


def read_for_analysis(documents: Iterable[Document], base: ResourceSet) -> tuple[ResourceSet, tuple[Message, ...]]:
    """A set with the resources of documents added or replaced, and what is wrong with them one by one (IST0106).

    What only the laptop mesh refuses is an information.
    """
    found: dict[tuple[str, str, str], Resource] = {resource.key: resource for resource in base}
    messages: list[Message] = []
    for document in documents:
        try:
            trees = list(parse_yaml(document.source, document.text))
        except InvalidResource as error:
            messages += [_message(problem, _nameless(problem.at), istio=True) for problem in error.problems]
            continue
        for tree in trees:
            for resource in _read(tree, messages):
                found[resource.key] = resource
    return ResourceSet.of(found.values()), tuple(messages)


def _read(tree: Tree, messages: list[Message]) -> Iterator[Resource]:
    try:
        yield from load_tree(tree)
    except InvalidResource as error:
        plain = tree.root.plain()
        meta = _meta(tree, plain)
        group = str(plain.get("apiVersion", "")).rpartition("/")[0] if isinstance(plain, dict) else ""
        istio = group.endswith(_ISTIO_GROUPS)
        messages += [_message(problem, meta or _nameless(problem.at), istio=istio) for problem in error.problems]
        if meta is not None:
            yield Resource(spec=Unread(meta=meta), plain=plain, text=tree.text)  # type: ignore[arg-type]


def _meta(tree: Tree, plain: Any) -> Meta | None:
    metadata = plain.get("metadata") if isinstance(plain, dict) else None
    if not isinstance(metadata, dict) or not isinstance(plain.get("kind"), str):
        return None
    kind, name = plain["kind"], str(metadata.get("name", "?"))
    if kind == "Gateway" and str(plain.get("apiVersion", "")).startswith("gateway."):
        kind = "KubernetesGateway"
    namespace = "" if kind in {"Namespace", "GatewayClass"} else str(metadata.get("namespace", DEFAULT_NAMESPACE))
    return Meta(
        kind=kind,
        namespace=namespace,
        name=name,
        labels=metadata.get("labels") or {},
        annotations=metadata.get("annotations") or {},
        at=At(source=tree.source, line=tree.root.line, resource=f"{kind} {namespace}/{name}"),
    )


def _nameless(at: At) -> Meta:
    return Meta(kind="Document", namespace="", name=at.source, labels={}, annotations={}, at=at)


def _message(problem: Problem, meta: Meta, *, istio: bool) -> Message:
    ours = not istio or any(words in problem.message for words in _REFUSED_BY_NAME)
    text = f"{problem.at.path}: {problem.message}" if problem.at.path else problem.message
    return Message(code=ON_THE_LAPTOP if ours else "IST0106", meta=meta, at=problem.at, text=text, offline=not ours)
