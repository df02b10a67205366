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
    """Where a route sends. Port 0: none is named."""

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
    headers: HeaderEdits | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class HttpMatch:
    """Conditions that must all hold.

    Keys of ``headers`` and ``without_headers`` are header names as written, or claims of a JWT in Istio's form
    "@request.auth.claims...". ``index`` is the place in the rule's `match`.
    """

    name: str = ""
    uri: StringMatch | None = None
    ignore_uri_case: bool = False
    scheme: StringMatch | None = None
    method: StringMatch | None = None
    authority: StringMatch | None = None
    headers: tuple[tuple[str, StringMatch], ...] = ()
    without_headers: tuple[tuple[str, StringMatch], ...] = ()
    query_params: tuple[tuple[str, StringMatch], ...] = ()
    port: int = 0
    source_labels: Mapping[str, str] = field(default_factory=dict)
    source_namespace: str = ""
    gateways: tuple[str, ...] = ()
    stat_prefix: str = ""
    index: int = 0
    at: At = field(compare=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Retries:
    """Retry policy; 0 attempts turn retries off. ``remote_localities``: other localities are tried, too."""

    attempts: int
    per_try_timeout_s: float | None
    retry_on: str
    ignore_previous_hosts: bool | None
    backoff_s: float | None
    remote_localities: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class FaultDelay:
    """Delay of a percentage of requests."""

    fixed_delay_s: float
    percent: float


@dataclass(frozen=True, slots=True, kw_only=True)
class FaultAbort:
    """Abort of a percentage of requests, with one of the two statuses. Without a percentage none is aborted."""

    http_status: int | None
    grpc_status: str | None
    percent: float | None


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


def effective_mirrors(
    mirror: Destination | None, percent: float | None, listed: tuple[Mirror, ...]
) -> tuple[Mirror, ...]:
    """The mirrors that act. 0 % means none; without a percentage everything is mirrored."""
    single = () if mirror is None else (Mirror(destination=mirror, percent=100.0 if percent is None else percent),)
    return tuple(item for item in (*single, *listed) if item.percent > 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class RegexRewrite:
    """What of a path is replaced: every match of a regular expression, by a text with \\1 for groups."""

    match: str
    rewrite: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Rewrite:
    """What is rewritten before the request is sent on; empty leaves it."""

    authority: str
    uri: str
    uri_regex: RegexRewrite | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Redirect:
    """An answer that sends the client elsewhere. ``port`` 0 and ``same_port`` false leave the scheme's default."""

    uri: str = ""
    authority: str = ""
    port: int = 0
    same_port: bool = False
    scheme: str = ""
    code: int = 301
    prefix_rewrite: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class DirectResponse:
    """An answer of the proxy itself."""

    status: int
    body: str | bytes | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Cors:
    """Which other origins a browser's page may call from. ``max_age_s`` is whole seconds.

    ``origins`` None: none are listed.
    """

    origins: tuple[StringMatch, ...] | None = None
    methods: tuple[str, ...] = ()
    headers: tuple[str, ...] = ()
    expose: tuple[str, ...] = ()
    max_age_s: int | None = None
    credentials: bool | None = None
    forward_unmatched: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Delegate:
    """Another VirtualService, without hosts, whose rules stand in place of a rule. Namespace "" is the root's."""

    name: str
    namespace: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """Where a rule was written: the place in `spec.http` of its VirtualService, and of the delegate it came from.

    ``delegate`` is "namespace/name", empty where the rule is the VirtualService's own.
    """

    rule: int = 0
    delegate: str = ""
    delegate_rule: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class HttpRule:
    """One entry of `spec.http`: any of the matches (none: everything) leads to its action.

    The action is ``redirect``, ``direct_response``, ``delegate`` or sending to the destinations by weight.
    ``mirrors`` are those that act; ``mirror``, ``mirror_percent`` and ``listed_mirrors`` are as written, for merging
    with a delegate.
    """

    name: str = ""
    matches: tuple[HttpMatch, ...] = ()
    destinations: tuple[WeightedDestination, ...] = ()
    timeout_s: float | None = None
    retries: Retries | None = None
    fault: Fault | None = None
    mirrors: tuple[Mirror, ...] = ()
    mirror: Destination | None = None
    mirror_percent: float | None = None
    listed_mirrors: tuple[Mirror, ...] = ()
    headers: HeaderEdits | None = None
    rewrite: Rewrite | None = None
    redirect: Redirect | None = None
    direct_response: DirectResponse | None = None
    delegate: Delegate | None = None
    cors: Cors | None = None
    origin: Origin = Origin()
    at: At = field(compare=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer4Match:
    """Conditions on a connection that must all hold; ``sni_hosts`` only in `spec.tls`."""

    sni_hosts: tuple[str, ...] = ()
    destination_subnets: tuple[str, ...] = ()
    port: int = 0
    source_labels: Mapping[str, str] = field(default_factory=dict)
    source_namespace: str = ""
    gateways: tuple[str, ...] = ()
    at: At = field(compare=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer4Rule:
    """One entry of `spec.tls` or `spec.tcp`: any of the matches (none: every connection) sends by weight."""

    matches: tuple[Layer4Match, ...]
    destinations: tuple[WeightedDestination, ...]
    at: At = field(compare=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class VirtualService:
    """Routing rules of hosts, tried in order; ``gateways`` contains "mesh" for sidecars.

    Without ``hosts`` it is a delegate. ``export_to`` empty means the mesh's default. ``semantics`` is "gateway" where
    it was made of a route of the Gateway API: prefixes then match whole path segments, and what cannot be sent
    anywhere is answered with 500.
    """

    meta: Meta
    hosts: tuple[str, ...]
    gateways: tuple[str, ...]
    export_to: tuple[str, ...]
    http: tuple[HttpRule, ...] = ()
    tls: tuple[Layer4Rule, ...] = ()
    tcp: tuple[Layer4Rule, ...] = ()
    semantics: Literal["", "gateway"] = ""
