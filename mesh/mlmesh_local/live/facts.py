"""What a running mesh tells of itself, for `mlmesh doctor`: methods by reflection, certificates, configuration,
Envoy's counters, and sockets by channelz. Values only.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field

STATS = (
    "/stats?format=json&type=Counters&usedonly&filter="
    "upstream_rq_pending_overflow%7Cupstream_rq_active_overflow%7Cupstream_cx_overflow%7Cupstream_rq_retry_overflow"
    "%7Cretry_or_shadow_abandoned"
    "%7Cssl%5C.fail_verify%7Cssl%5C.connection_error%7Cupstream_rq_timeout%7Cdownstream_rq_idle_timeout"
)
"""What to ask an Envoy's admin interface for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Certified:
    """A sidecar's certificate; times are seconds since 1970, 0 where one is not known."""

    instance: str
    expires_s: float
    begins_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Configured:
    """How far a sidecar took its configuration; ``rejection`` are its own words."""

    instance: str
    connected: bool
    acked: bool
    rejection: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Socket:
    """A connection that a server has, as channelz tells of it."""

    instance: str
    remote: str
    streams_started: int
    streams_failed: int
    keepalives_sent: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """Everything that was found out; what could not be asked is not there."""

    methods: Mapping[str, Mapping[str, bool]] = field(default_factory=dict)
    """By service host: paths "/package.Service/Method", and whether they stream."""
    certificates: tuple[Certified, ...] = ()
    authority_expires_s: float = 0.0
    configured: tuple[Configured, ...] = ()
    counters: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    """By instance: Envoy's counters that are not zero, by name."""
    sockets: tuple[Socket, ...] = ()
    unasked: tuple[str, ...] = ()
    """What could not be asked, and why."""

    @property
    def live(self) -> bool:
        """Whether anything runs."""
        return bool(self.configured)


def counters(body: bytes) -> dict[str, int]:
    """Envoy's answer to `STATS`. Raises ValueError for anything else."""
    found = json.loads(body)
    if not isinstance(found, dict) or not isinstance(found.get("stats"), list):
        raise ValueError("the answer holds no statistics")  # noqa: TRY004  what was read is wrong, not a type
    return {str(one["name"]): int(one["value"]) for one in found["stats"] if one.get("value")}
