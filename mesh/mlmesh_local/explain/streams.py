"""What moves an open stream to another endpoint, and what cuts it. Measured with Envoy 1.40."""

from __future__ import annotations

from collections.abc import Iterator

from mlmesh_local.envoy_types import Json
from mlmesh_local.explain.durations import seconds, text
from mlmesh_local.explain.values import Destination, Timed

DRAIN_S = 45.0
"""How long a listener that changes keeps its connections: Istio's drainDuration."""


def streams(manager: Json, action: Json, timed: Timed, destinations: tuple[Destination, ...]) -> Iterator[str]:
    """What a person with a long stream should know."""
    names = [one.subset or one.host for one in destinations]
    if len(destinations) > 1:
        yield (
            f"the weights of {', '.join(names)} act when a stream begins: one that is open stays where it is, "
            "and a share of streams is not a share of messages"
        )
    else:
        yield "routes act when a stream begins: one that is open stays where it is when they change"
    yield "load balancing and outlier ejection choose an endpoint for a new stream; they move none that is open"
    yield (
        "an endpoint that is no longer ready gets no new streams; open ones go on until it ends. When it ends, or its "
        "sidecar does, its open streams end with INTERNAL (RST_STREAM) where an answer has begun"
    )
    if timed.route_s:
        yield f"CUT by the route: no stream lives longer than {text(timed.route_s)}, whatever flows on it"
    if timed.deadline_s:
        yield f"CUT by the client's own deadline after {text(timed.deadline_s)}"
    idle = seconds(action.get("idle_timeout", manager.get("stream_idle_timeout", "300s")))
    if idle:
        yield f"CUT after {text(idle)} without a message in either direction"
    yield (
        f"CUT {DRAIN_S:.0f} s after a change of a listener on its way (ports, TLS modes, filters): the client sees "
        "UNAVAILABLE where it is its own sidecar's, INTERNAL (RST_STREAM) where the server's; `mlmesh diff` tells "
        "whether a change is one"
    )
    yield "not cut by new routes, weights, endpoints or certificates"
    yield (
        "policies are asked when a stream begins: a new denial ends none that is open; Istio's own control plane "
        "writes them into listeners, so there a change of them cuts like one"
    )
    for one in destinations:
        renewed = next((part for part in one.connections if part.startswith("renewed")), "")
        if renewed:
            where = f" to {one.subset or one.host}" if len(destinations) > 1 else ""
            yield f"connections{where} are {renewed}: new streams take the new one, open ones end on the old"
