"""What routing resources say, as values: VirtualService."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from mlmesh_local.resources.meta import Meta
from mlmesh_local.resources.problems import At


@dataclass(frozen=True, slots=True, kw_only=True)
class StringMatch:
    """How a string is compared. ``present`` matches whatever value there is."""

    how: Literal["exact", "prefix", "regex", "present"]
    value: str = ""

    def __str__(self) -> str:
        if self.how == "present":
            return "present"
        return f"{'=' if self.how == 'exact' else self.how} {self.value}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Destination:
    """Where a route sends. Port 0: the service's only port, else the port of the listener."""

    host: str
    subset: str
    port: int
    at: At = field(compare=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class HeaderEdits:
    """Edits of request and response headers. Set overwrites, add appends."""

    request_set: Mapping[str, str]
    request_add: Mapping[str, str]
    request_remove: tuple[str, ...]
    response_set: Mapping[str, str]
    response_add: Mapping[str, str]
    response_remove: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightedDestination:
    """A destination with its share: its weight over the sum of the route's weights."""

    destination: Destination
    weight: int
    headers: HeaderEdits | None


@dataclass(frozen=True, slots=True, kw_only=True)
class HttpMatch:
    """Conditions that must all hold."""

    name: str
    uri: StringMatch | None
    ignore_uri_case: bool
    scheme: StringMatch | None
    method: StringMatch | None
    authority: StringMatch | None
    headers: tuple[tuple[str, StringMatch], ...]
    without_headers: tuple[tuple[str, StringMatch], ...]
    query_params: tuple[tuple[str, StringMatch], ...]
    port: int
    source_labels: Mapping[str, str]
    source_namespace: str
    gateways: tuple[str, ...]
    at: At = field(compare=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Retries:
    """Retry policy; 0 attempts turn retries off."""

    attempts: int
    per_try_timeout_s: float | None
    retry_on: str
    ignore_previous_hosts: bool | None
    backoff_s: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class FaultDelay:
    """Delay of a percentage of requests."""

    fixed_delay_s: float
    percent: float


@dataclass(frozen=True, slots=True, kw_only=True)
class FaultAbort:
    """Abort of a percentage of requests, with one of the two statuses."""

    http_status: int | None
    grpc_status: str | None
    percent: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """Faults injected before the router: retries do not see them."""

    delay: FaultDelay | None
    abort: FaultAbort | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Mirror:
    """A copy of a percentage of requests, whose answers are dropped."""

    destination: Destination
    percent: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Rewrite:
    """What is rewritten before the request is sent on; empty leaves it."""

    authority: str
    uri: str


@dataclass(frozen=True, slots=True, kw_only=True)
class HttpRule:
    """One entry of `spec.http`: any of the matches (none: everything) sends to the destinations by weight."""

    name: str
    matches: tuple[HttpMatch, ...]
    destinations: tuple[WeightedDestination, ...]
    timeout_s: float | None
    retries: Retries | None
    fault: Fault | None
    mirrors: tuple[Mirror, ...]
    headers: HeaderEdits | None
    rewrite: Rewrite | None
    at: At = field(compare=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class VirtualService:
    """Routing rules of hosts, tried in order; ``gateways`` contains "mesh" for sidecars."""

    meta: Meta
    hosts: tuple[str, ...]
    gateways: tuple[str, ...]
    export_to: tuple[str, ...]
    http: tuple[HttpRule, ...]
