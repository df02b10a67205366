"""What an explanation says. `document` gives it as JSON values; the names of its fields are stable.

Shares are 0 to 1. Text is for a person, and not stable. Absent is None, empty text or an empty tuple.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

SCHEMA = "mlmesh.explain/v1"
"""Version of the JSON form; a field that changes its meaning changes it."""

OutcomeKind = Literal[
    "routed", "answered", "redirected", "aborted", "no_route", "no_listener", "no_cluster", "no_endpoint",
    "denied", "unauthenticated", "tls_failed", "unknown", "mixed",
]  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What becomes of a call.

    ``code`` is the gRPC status that the mesh gives; "OK" where the application decides. ``http`` is the status that a
    client that does not speak gRPC gets from the mesh, 0 where it is the application's; ``location`` where it is sent.
    """

    kind: OutcomeKind
    code: str
    why: str
    http: int = 0
    location: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where something was written: a resource ("mlmesh/inference"), a part of it, and "file:line" of that part."""

    kind: str
    name: str
    part: str = ""
    source: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rejected:
    """A rule that was tried, or could have been, and did not take the call."""

    route: str
    place: Place | None
    matches: str
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Decided:
    """The route that took the call."""

    route: str
    place: Place | None
    matches: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """What a filter said of the call. ``verdict``: "allow", "deny", "log", or "ask" where a service decides."""

    filter: str
    action: str
    verdict: Literal["allow", "deny", "log", "ask"]
    policy: str
    place: Place | None
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Tls:
    """How two ends of a connection meet.

    ``client`` and ``server`` say what each does or demands, ``used`` what comes of it. ``expected`` are the identities
    that the client accepts, ``server_identity`` what it will be shown. ``problem`` is empty when they agree.
    """

    client: str
    server: str
    used: Literal["mutual TLS", "TLS", "plaintext", "none"]
    sni: str
    client_identity: str
    server_identity: str
    expected: tuple[str, ...]
    place: Place | None
    problem: str


@dataclass(frozen=True, slots=True, kw_only=True)
class EndpointSeen:
    """One endpoint; ``instance`` is empty outside of the mesh. Priority 0 is used before 1."""

    address: str
    instance: str
    weight: int
    priority: int
    locality: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Sent:
    """The request as the other end gets it: rewritten, and with the headers that routes set or take away."""

    method: str
    path: str
    authority: str
    headers: Mapping[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Destination:
    """One place where the call may go, with its share of such calls.

    ``headers`` are the edits of this destination alone; those of its rule stand in the explanation.
    """

    cluster: str
    host: str
    port: int
    subset: str
    share: float
    weight: int
    rule: Place | None
    load_balancer: str
    circuit_breakers: Mapping[str, int]
    outlier_detection: str
    connections: tuple[str, ...]
    endpoints: tuple[EndpointSeen, ...]
    tls: Tls | None
    checks: tuple[Check, ...]
    outcome: Outcome
    sent: Sent
    headers: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Mirrored:
    """Where copies go."""

    cluster: str
    share: float
    rule: Place | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Retried:
    """The retry policy; ``attempts`` counts the first one, too, so 1 is none."""

    attempts: int
    conditions: tuple[str, ...]
    status_codes: tuple[int, ...]
    per_try_timeout_s: float | None
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Timed:
    """``route_s``: what the route allows, None without limit; ``deadline_s``: what the client asked for."""

    route_s: float | None
    deadline_s: float | None
    effective_s: float | None
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Faulty:
    """Faults on purpose: shares of calls that are delayed and aborted; ``abort_http`` for clients without gRPC."""

    delay_s: float
    delay_share: float
    abort_code: str
    abort_http: int
    abort_share: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Explanation:
    """Everything about one call. ``proxy`` is whose outbound configuration was read; see the other values."""

    call: Mapping[str, Any]
    proxy: str
    listener: str
    virtual_host: str
    outcome: Outcome
    route: Decided | None = None
    rejected: tuple[Rejected, ...] = ()
    checks: tuple[Check, ...] = ()
    destinations: tuple[Destination, ...] = ()
    mirrors: tuple[Mirrored, ...] = ()
    retries: Retried | None = None
    timeout: Timed | None = None
    faults: Faulty | None = None
    headers: tuple[str, ...] = ()
    telemetry: tuple[str, ...] = ()
    streams: tuple[str, ...] = ()
    notes: tuple[str, ...] = field(default=())


def document(explanation: Explanation) -> dict[str, Any]:
    """The explanation as JSON values, with its schema."""
    return {"schema": SCHEMA, **_plain(explanation)}


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return {item.name: _plain(getattr(value, item.name)) for item in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (tuple, list)) else value
