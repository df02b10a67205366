"""Where rules of VirtualServices send: destinations with weights, and mirrors."""

from __future__ import annotations

from mlmesh_local.resources.domains import domain_problem, is_label
from mlmesh_local.resources.fields import INT32_MAX, UINT32_MAX, Fields
from mlmesh_local.resources.http_actions import parse_headers, percentage
from mlmesh_local.resources.model_routes import Destination, Mirror, WeightedDestination


def parse_destinations(fields: Fields, *, headers: bool) -> tuple[WeightedDestination, ...]:
    """Read `route`: destinations with weights, and with header edits where the rule is of HTTP."""
    result: list[WeightedDestination] = []
    for item in fields.messages("route"):
        with item:
            destination = parse_destination(item.message("destination")) if item.required("destination") else None
            item.ignored("destination")
            weight = item.integer("weight", low=0, high=INT32_MAX)
            edits = parse_headers(item.message("headers")) if headers and item.has("headers") else None
            if headers:
                item.ignored("headers")
            if destination:
                result.append(WeightedDestination(destination=destination, weight=weight or 0, headers=edits))
    if len(result) > 1:
        total = sum(destination.weight for destination in result)
        if total == 0:
            fields.refuse("route", "the weights sum to zero")
        elif total > UINT32_MAX:
            fields.refuse("route", f"the weights sum to {total}, more than {UINT32_MAX}")
    return tuple(result)


def parse_destination(fields: Fields) -> Destination:
    """Read a destination."""
    with fields:
        host = fields.text("host", required=True)
        problem = ""
        if host:
            problem = '"*" is not a host' if host == "*" else domain_problem(host, wildcard=True)
        if problem:
            fields.refuse("host", problem)
        port = 0
        if fields.has("port"):
            with fields.message("port") as inner:
                port = inner.port("number", required=True)
        fields.ignored("port")
        subset = fields.text("subset")
        if subset and not is_label(subset):
            fields.refuse("subset", f'"{subset}" is not the name of a subset')
        return Destination(host=host.lower(), subset=subset, port=port, at=fields.at)


def parse_mirror(fields: Fields) -> tuple[Destination | None, float | None, tuple[Mirror, ...]]:
    """Read `mirror` with its percentage, and `mirrors`."""
    percent = percentage_of_mirror(fields)
    single: Destination | None = None
    if fields.has("mirror"):
        single = parse_destination(fields.message("mirror"))
        if fields.has("mirrors"):
            fields.refuse("mirrors", 'cannot be set together with "mirror"')
    fields.ignored("mirror")
    listed: list[Mirror] = []
    for item in fields.messages("mirrors"):
        with item:
            share = item.percent("percentage")
            if item.required("destination"):
                destination = parse_destination(item.message("destination"))
                listed.append(Mirror(destination=destination, percent=100.0 if share is None else share))
            item.ignored("destination")
    return single, percent, tuple(listed)


def percentage_of_mirror(fields: Fields) -> float | None:
    """`mirrorPercentage`, else the deprecated whole `mirrorPercent`, which has a second spelling."""
    percent = percentage(fields, "mirrorPercentage")
    whole = [fields.integer(name, low=0, high=100) for name in ("mirrorPercent", "mirror_percent")]
    if percent is not None:
        return percent
    return next((float(value) for value in whole if value is not None), None)
