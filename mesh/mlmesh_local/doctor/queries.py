"""Checks of Prometheus queries, wherever they are written: rules, metric templates, dashboards, autoscalers."""

from __future__ import annotations

import re
from collections.abc import Iterator

from mlmesh_local.doctor.model import Context, Hit
from mlmesh_local.resources.tree import Node

METRIC = "istio_request"
_BY_HTTP = re.compile(r"response_code\s*(?:=~|!~|=|!=)\s*[\"']?\\?[\"']?[^\"',}]*5")
_BY_GRPC = "grpc_response_status"


def blind_queries(context: Context) -> Iterator[Hit]:
    """MLM021."""
    for other in context.others:
        for line, query in _texts(other.root):
            if METRIC in query and _BY_HTTP.search(query) and _BY_GRPC not in query:
                shown = " ".join(query.split())
                yield Hit(
                    kind=other.kind,
                    name=other.name,
                    detail=shown if len(shown) <= 120 else f"{shown[:120]}…",
                    where=f"{other.source}:{line}",
                )


def _texts(node: Node) -> Iterator[tuple[int, str]]:
    value = node.value
    if isinstance(value, dict):
        for inner in value.values():
            yield from _texts(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _texts(inner)
    elif isinstance(value, str):
        # In a block of text the query has a line of its own.
        place = next((i for i, part in enumerate(value.splitlines()) if METRIC in part), 0)
        yield node.line + place + (1 if "\n" in value else 0), value
