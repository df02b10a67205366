"""What security and telemetry resources say, as values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from mlmesh_local.resources.meta import Meta

MtlsMode = Literal["UNSET", "DISABLE", "PERMISSIVE", "STRICT"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerAuthentication:
    """Whether workloads take plaintext. No selector: the namespace, or the whole mesh in the root namespace."""

    meta: Meta
    selector: Mapping[str, str]
    mode: MtlsMode
    ports: tuple[tuple[int, MtlsMode], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Values:
    """Any of ``values`` (none: whatever) and none of ``not_values``."""

    key: str
    values: tuple[str, ...]
    not_values: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyRule:
    """Any of the sources and any of the operations and all conditions. No sources, or no operations, is anything."""

    sources: tuple[tuple[Values, ...], ...]
    operations: tuple[tuple[Values, ...], ...]
    conditions: tuple[Values, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class AuthorizationPolicy:
    """Who may call what. ALLOW without rules allows nothing."""

    meta: Meta
    selector: Mapping[str, str]
    action: Literal["ALLOW", "DENY"]
    rules: tuple[PolicyRule, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Tracing:
    """Tracing of requests; None leaves the mesh's default."""

    sampling_percent: float | None
    disabled: bool | None
    tags: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Telemetry:
    """Observation of workloads; the nearest resource that says something wins, field by field."""

    meta: Meta
    selector: Mapping[str, str]
    tracing: Tracing | None
    access_logs: bool | None
