"""What will go wrong, before it does: checks of manifests, and of a mesh that runs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from mlmesh_local.doctor.checks import CHECKS
from mlmesh_local.doctor.model import IGNORE, Check, Context, Finding, Hit, Other
from mlmesh_local.resources import Document
from mlmesh_local.resources.model import Deployment
from mlmesh_local.resources.parse import IGNORED_KINDS
from mlmesh_local.resources.tree import Node, parse_yaml

_ORDER = {"error": 0, "warning": 1, "info": 2}


def examine(context: Context, checks: Iterable[Check] = CHECKS) -> list[Finding]:
    """What checks find, the most severe first, then by place. What resources ask to ignore is left out."""
    found: dict[Finding, None] = {}
    for check in checks:
        if check.layer == "live" and not context.facts.live:
            continue
        for hit in check.find(context):
            if check.id not in ignored(context, hit):
                found[_finding(check, hit, context)] = None
    return sorted(found, key=lambda one: (_ORDER[one.severity], one.id, one.where))


def _finding(check: Check, hit: Hit, context: Context) -> Finding:
    place = context.provenance.place(hit.kind, hit.name, *hit.path) if hit.name and not hit.where else None
    return Finding(
        id=check.id,
        severity=check.severity,
        title=check.title,
        where=hit.where or (place.source if place else ""),
        resource=f"{hit.kind} {hit.name}".strip(),
        part=place.part if place else "",
        detail=hit.detail,
        why=check.why,
        fix=check.fix,
        source=check.source,
    )


def ignored(context: Context, hit: Hit) -> frozenset[str]:
    """Ids that the resource of a hit asks not to be told of."""
    texts: list[str] = []
    resource = context.provenance.resource(hit.kind, hit.name)
    if resource is not None:
        texts.append(resource.spec.meta.annotations.get(IGNORE, ""))
        if isinstance(resource.spec, Deployment):
            texts.append(resource.spec.annotations.get(IGNORE, ""))
    texts += [one.annotations.get(IGNORE, "") for one in context.others if (one.kind, one.name) == (hit.kind, hit.name)]
    return frozenset(word for text in texts for word in text.replace(",", " ").split())


def others_of(documents: Iterable[Document], *, default_namespace: str = "mlmesh") -> Iterator[Other]:
    """Resources of kinds that the mesh does not read. Raises InvalidResource for what is no YAML."""
    for document in documents:
        for tree in parse_yaml(document.source, document.text):
            fields = tree.root.value if isinstance(tree.root.value, dict) else {}
            kind = _text(fields.get("kind"))
            if kind in IGNORED_KINDS or kind in _QUERYING:
                meta = fields.get("metadata")
                plain = meta.plain() if meta is not None and isinstance(meta.value, dict) else {}
                yield Other(
                    kind=kind,
                    name=f"{plain.get('namespace') or default_namespace}/{plain.get('name', '')}",
                    annotations={str(k): str(v) for k, v in (plain.get("annotations") or {}).items()},
                    source=document.source,
                    root=tree.root,
                )


# Kinds of others that hold queries.
_QUERYING = frozenset({"Canary", "MetricTemplate", "AnalysisTemplate", "ClusterAnalysisTemplate", "ScaledObject"})


def _text(node: Node | None) -> str:
    return str(node.value) if node is not None else ""


__all__ = ["CHECKS", "IGNORE", "Check", "Context", "Finding", "Hit", "Other", "examine", "others_of"]
