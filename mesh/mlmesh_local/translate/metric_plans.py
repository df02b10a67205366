"""What Telemetry makes of the metrics of a proxy, by Istio's rules of merging (mergeMetrics of telemetry.go)."""

from __future__ import annotations

from dataclasses import dataclass, field

from mlmesh_local.metrics.expressions import Expression
from mlmesh_local.metrics.names import BY_SELECTOR
from mlmesh_local.metrics.overrides import MetricPlan, Plan, Plans
from mlmesh_local.model import ProxyNode
from mlmesh_local.resources.model_telemetry import MetricOverride, MetricsProvider, MetricsRule, Mode
from mlmesh_local.translate.telemetry import Role, applicable, mode_of, settings_of
from mlmesh_local.translate.view import View

_OFF = Plan(disabled=True)


@dataclass(slots=True)
class _Merged:
    """Overrides of one provider so far. ``all_off``: everything was disabled, and nothing said since."""

    all_off: bool = False
    disabled: dict[str, bool] = field(default_factory=dict)
    tags: dict[str, dict[str, str | None]] = field(default_factory=dict)


def plans_of(view: View) -> Plans:
    """Plans of every proxy of a world."""
    proxies = view.world.proxies
    return Plans(
        clients={proxy.id: plan_of(view, proxy, "outbound") for proxy in proxies},
        servers={proxy.id: plan_of(view, proxy, "inbound") for proxy in proxies},
    )


def plan_of(view: View, proxy: ProxyNode, role: Role) -> Plan:
    """What a proxy reports as client (also a gateway) or as server."""
    settings = settings_of(view)
    rules = [rule for telemetry in applicable(view, proxy) for rule in telemetry.metrics]
    in_scope = settings.default_metrics
    for rule in rules:
        in_scope = rule.providers or in_scope
    # Prometheus is the only kind of provider; of several the first counts, for there is one place to be scraped.
    known = [name for name in in_scope if isinstance(settings.provider(name), MetricsProvider)]
    if not known:
        return _OFF
    merged = _merge(rules, settings.default_metrics, known[0], mode_of(role))
    return _OFF if merged.all_off else _plan(merged)


def _merge(rules: list[MetricsRule], defaults: tuple[str, ...], provider: str, mode: Mode) -> _Merged:
    merged = _Merged()
    inherited = defaults
    for rule in rules:
        inherited = rule.providers or inherited
        if provider not in inherited:
            continue
        for override in rule.overrides:
            if override.mode in ("CLIENT_AND_SERVER", mode):
                _apply(merged, override)
    return merged


def _apply(merged: _Merged, override: MetricOverride) -> None:
    if not override.metric and override.disabled:
        merged.all_off = True
        return
    merged.all_off = False
    for metric in (override.metric,) if override.metric else BY_SELECTOR:
        if override.disabled is not None:
            merged.disabled[metric] = override.disabled
        merged.tags.setdefault(metric, {}).update({tag.name: tag.expression for tag in override.tags})


def _plan(merged: _Merged) -> Plan:
    sources = sorted({source for tags in merged.tags.values() for source in tags.values() if source is not None})
    metrics = {
        metric: MetricPlan(
            disabled=merged.disabled.get(metric, False),
            tags=tuple(
                (name, None if source is None else sources.index(source))
                for name, source in sorted(merged.tags.get(metric, {}).items())
            ),
        )
        for metric in BY_SELECTOR
        if merged.disabled.get(metric) or merged.tags.get(metric)
    }
    return Plan(metrics=tuple(metrics.items()), expressions=tuple(Expression(source) for source in sources))
