"""Which Telemetry applies to a proxy, and what follows from all of it together, by Istio's rules of merging.

pilot/pkg/model/telemetry.go: the root namespace's, over it the namespace's, over it every one that selects the
workload, the oldest first; in one scope only the oldest without a selector.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final, Literal

from mlmesh_local.model import ProxyNode
from mlmesh_local.resources.catalog import selects
from mlmesh_local.resources.model_telemetry import (
    LogProvider,
    LogRule,
    Mode,
    Tags,
    Telemetry,
    TelemetrySettings,
    TraceProvider,
)
from mlmesh_local.translate.view import View

Role = Literal["inbound", "outbound", "gateway"]

DEFAULT_SAMPLING_PERCENT: Final = 1.0
"""pilot/pkg/features/telemetry.go."""
GATEWAY_NAME: Final = "gateway.networking.k8s.io/gateway-name"
"""Label of the pods of a Gateway API Gateway."""
BUILT_IN: Final = ""
"""Name of the laptop's own collector: of a provider that nobody names, or that MeshConfig does not define."""


def settings_of(view: View) -> TelemetrySettings:
    """What MeshConfig says."""
    return view.mesh_config.telemetry if view.mesh_config else TelemetrySettings()


def applicable(view: View, proxy: ProxyNode) -> tuple[Telemetry, ...]:
    """Telemetry of a proxy, the widest scope first."""
    everything, root = view.resources.specs(Telemetry), view.root_namespace
    wide = [t for t in everything if t.meta.namespace == root and not t.scoped][:1]
    if proxy.namespace != root:
        wide += [t for t in everything if t.meta.namespace == proxy.namespace and not t.scoped][:1]
    own = [t for t in everything if t.meta.namespace == proxy.namespace and t.scoped and _selects(t, proxy)]
    return (*wide, *own)


def _selects(telemetry: Telemetry, proxy: ProxyNode) -> bool:
    if telemetry.targets:
        return proxy.labels.get(GATEWAY_NAME) in telemetry.targets
    return selects(telemetry.selector, proxy.labels)


def mode_of(role: Role) -> Mode:
    """Gateways are clients of the mesh."""
    return "SERVER" if role == "inbound" else "CLIENT"


def _meets(mode: Mode, role: Role) -> bool:
    return mode in ("CLIENT_AND_SERVER", mode_of(role))


@dataclass(frozen=True, slots=True, kw_only=True)
class TracingSpec:
    """Tracing of one side of a proxy. ``provider`` None is the laptop's own collector."""

    provider: TraceProvider | None = None
    disabled: bool = False
    sampling_percent: float = DEFAULT_SAMPLING_PERCENT
    tags: Tags = ()
    istio_tags: bool = True
    use_request_id: bool = True


def tracing_of(view: View, proxy: ProxyNode, role: Role) -> TracingSpec:
    """The rules together: what a later one sets replaces what an earlier one set, field by field."""
    settings = settings_of(view)
    rules = [rule for telemetry in applicable(view, proxy) for rule in telemetry.tracing]
    spec = TracingSpec(
        sampling_percent=settings.sampling_percent or DEFAULT_SAMPLING_PERCENT,
        tags=settings.tags,
        istio_tags=True,
    )
    if not rules and not settings.default_tracing:
        # Without any Telemetry the proxy's own configuration counts.
        istio_tags = settings.istio_tags is not False
        return replace(spec, disabled=not settings.tracing, istio_tags=istio_tags)
    name = next(iter(settings.default_tracing), BUILT_IN)
    for rule in rules:
        if not _meets(rule.mode, role):
            continue
        name = rule.providers[0] if rule.providers else name
        spec = TracingSpec(
            disabled=spec.disabled if rule.disabled is None else rule.disabled,
            sampling_percent=spec.sampling_percent if rule.sampling_percent is None else rule.sampling_percent,
            tags=spec.tags if rule.tags is None else rule.tags or settings.tags,
            istio_tags=spec.istio_tags if rule.istio_tags is None else rule.istio_tags,
            use_request_id=spec.use_request_id if rule.use_request_id is None else rule.use_request_id,
        )
    found = settings.provider(name) if name else None
    if found is None:
        return spec
    if not isinstance(found, TraceProvider) or cluster_of(view, found.service, found.port) is None:
        # As in Istio: what cannot take spans gets none.
        return replace(spec, disabled=True)
    return replace(spec, provider=found)


def logs_of(view: View, proxy: ProxyNode, role: Role) -> tuple[tuple[LogProvider, str | None], ...] | None:
    """Providers that log, each with its filter, by name; None where MeshConfig's own log file counts."""
    settings = settings_of(view)
    levels = [telemetry.logs for telemetry in applicable(view, proxy) if telemetry.logs]
    if not levels and not settings.default_logs:
        return None
    chosen = _merged_logs(levels, settings.default_logs, role)
    found: list[tuple[LogProvider, str | None]] = []
    spoken_of = False
    for name, (logs, expression) in sorted(chosen.items()):
        provider = settings.provider(name)
        if isinstance(provider, LogProvider):
            spoken_of = True
            found += [(provider, expression)] if logs else []
    # Rules that turn no provider on or off leave the file alone.
    return tuple(found) if spoken_of else None


def _merged_logs(
    levels: list[tuple[LogRule, ...]], defaults: tuple[str, ...], role: Role
) -> dict[str, tuple[bool, str | None]]:
    """Providers that rules speak of: whether each logs, and its filter."""
    if not levels:
        return dict.fromkeys(defaults, (True, None))
    in_scope: set[str] = set(defaults)
    filters: dict[str, str | None] = {}
    for rules in levels:
        named = {name for rule in rules if _meets(rule.mode, role) for name in rule.providers}
        filters |= {name: rule.expression for rule in rules if _meets(rule.mode, role) for name in rule.providers}
        in_scope = named or in_scope
    chosen: dict[str, tuple[bool, str | None]] = {}
    inherited = defaults
    for rule in (rule for rules in levels for rule in rules):
        inherited = rule.providers or inherited
        for name in inherited:
            if name not in in_scope or not _meets(rule.mode, role):
                continue
            chosen[name] = (False, None) if rule.disabled else (True, filters.get(name))
    return chosen


def reporting_interval_s(view: View, proxy: ProxyNode) -> float | None:
    """How often what goes on is reported, where Telemetry says so: the nearest counts."""
    found: float | None = None
    for telemetry in applicable(view, proxy):
        for rule in telemetry.metrics:
            found = found if rule.interval_s is None else rule.interval_s
    return found


def cluster_of(view: View, service: str, port: int) -> tuple[str, str] | None:
    """Host and cluster of a provider's "[NAMESPACE/]HOST"; None where there is no such service or port."""
    namespace, _, host = service.rpartition("/")
    found = view.services.get(host)
    if found is None or (namespace and found.namespace != namespace) or found.port(port) is None:
        return None
    return host, f"outbound|{port}||{host}"
