"""Which workloads and gateways a policy is for: `selector`, `targetRef`, `targetRefs`."""

from __future__ import annotations

import re
from collections.abc import Mapping

from mlmesh_local.resources.fields import Fields

TARGETS_MAX = 16
LABEL_VALUE_CHARACTERS_MAX = 63
_GROUP = re.compile(r"^\Z|^[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*\Z")
_GATEWAY = ("gateway.networking.k8s.io", "Gateway")
# What Istio allows beside Gateways; only waypoints of the ambient mesh act on them.
_OF_WAYPOINTS = frozenset(
    {
        ("core", "Service"),
        ("networking.istio.io", "ServiceEntry"),
        ("gateway.networking.k8s.io", "GatewayClass"),
    }
)
_WAYPOINT = "acts on waypoints of the ambient mesh only: sidecars and gateways ignore the policy, in Istio too"


def selector(spec: Fields) -> Mapping[str, str]:
    """`selector.matchLabels`; empty selects everything in scope. Kinds without targets refuse them."""
    with spec.message("selector") as inner:
        labels = inner.text_map("matchLabels")
        for key, value in labels.items():
            if not key:
                inner.refuse("matchLabels", "a key must not be empty")
            if "*" in key or "*" in value:
                inner.refuse("matchLabels", f'"{key}: {value}": wildcards are not supported in selectors')
            if len(value) > LABEL_VALUE_CHARACTERS_MAX:
                inner.refuse("matchLabels", f"the value of {key} is longer than {LABEL_VALUE_CHARACTERS_MAX}")
        return labels


def targets(spec: Fields) -> tuple[str, ...]:
    """Names of the Gateway API Gateways that `targetRef` or `targetRefs` name."""
    spec.one_of("selector", "targetRef", "targetRefs")
    found: list[str] = []
    if spec.has("targetRef"):
        found += _target(spec.message("targetRef"))
    spec.ignored("targetRef")
    items = list(spec.messages("targetRefs"))
    if len(items) > TARGETS_MAX:
        spec.refuse("targetRefs", f"has more than {TARGETS_MAX} items")
    for item in items:
        found += _target(item)
    return tuple(found)


def _target(fields: Fields) -> list[str]:
    with fields:
        group, kind = fields.text("group"), fields.text("kind", required=True)
        name = fields.text("name", required=True)
        if fields.text("namespace"):
            fields.refuse("namespace", "must not be set: a policy cannot refer to another namespace")
        if not _GROUP.match(group):
            fields.refuse("group", f'"{group}" is not the group of an API')
        elif (group, kind) == _GATEWAY:
            return [name] if name else []
        elif (group or "core", kind) in _OF_WAYPOINTS:
            fields.refuse("kind", f"not supported: {kind} {_WAYPOINT}")
        elif kind:
            fields.refuse("kind", f'"{group}/{kind}" cannot be targeted; use {"/".join(_GATEWAY)}')
    return []
