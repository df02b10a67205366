"""What Telemetry makes of metrics: which are disabled, which labels are added, changed or removed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from mlmesh_local.metrics.calls import HttpCall, Role
from mlmesh_local.metrics.expressions import Expression
from mlmesh_local.metrics.names import UNKNOWN, Metric

Tags = tuple[str, ...]
"""Values of a plan's expressions for one request."""
TAG_CHARACTERS_MAX = 200


@dataclass(frozen=True, slots=True)
class MetricPlan:
    """One metric. ``tags`` gives for a label the index of its expression, or None where the label is removed."""

    disabled: bool = False
    tags: tuple[tuple[str, int | None], ...] = ()


@dataclass(frozen=True, slots=True)
class Plan:
    """What one proxy reports as client or as server."""

    disabled: bool = False
    metrics: tuple[tuple[str, MetricPlan], ...] = ()
    expressions: tuple[Expression, ...] = ()

    def evaluate(self, call: HttpCall) -> Tags:
        """Values of all expressions; "unknown" where one has none, as in Istio."""
        return tuple(expression.text(call)[:TAG_CHARACTERS_MAX] or UNKNOWN for expression in self.expressions)

    def labels(self, metric: Metric, values: tuple[str, ...], tags: Tags) -> tuple[tuple[str, str], ...] | None:
        """Labels of a metric; None when it is not wanted."""
        plan = dict(self.metrics).get(metric.selector, _AS_IT_IS)
        if self.disabled or plan.disabled:
            return None
        if not plan.tags:
            return tuple(zip(metric.labels, values, strict=True))
        found = dict(zip(metric.labels, values, strict=True))
        for name, index in plan.tags:
            if index is None:
                found.pop(name, None)
            else:
                found[name] = tags[index] if index < len(tags) else UNKNOWN
        return tuple(found.items())


_AS_IT_IS = MetricPlan()
PLAIN = Plan()


@dataclass(frozen=True, slots=True)
class Plans:
    """Plans of every proxy: by node id, as client and as server."""

    clients: Mapping[str, Plan] = field(default_factory=dict)
    servers: Mapping[str, Plan] = field(default_factory=dict)

    def of(self, node_id: str, role: Role) -> Plan | None:
        """The plan of a listener; gateways report as clients."""
        return (self.servers if role == "inbound" else self.clients).get(node_id)
