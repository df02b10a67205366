"""Statuses of BackendTLSPolicies: of each target, then of each Gateway whose routes send there."""

from __future__ import annotations

from mlmesh_local.resources.gateway_api.attach import Fault
from mlmesh_local.resources.gateway_api.backends import IGNORED, PolicyResult, TargetResult
from mlmesh_local.resources.gateway_api.conditions import Status, judged
from mlmesh_local.resources.gateway_api.listeners import CONTROLLER
from mlmesh_local.resources.gateway_api.model import GROUP

MESH_CONTROLLER = "istio.io/mesh-controller"
_ANCESTORS_MAX = 16
_VALID = "Configuration is valid"
_IGNORED = Fault(reason="IgnoredByIstio", message=f"Ignored by Istio due to annotation {IGNORED}=true")


def policy_ancestors(result: PolicyResult) -> list[Status]:
    """The `ancestors` of a policy."""
    found = [_ancestor(_reference(one), MESH_CONTROLLER, _conditions(result, one)) for one in result.targets]
    last = result.targets[-1]
    for _, name in result.gateways:
        reference = {"group": GROUP, "kind": "Gateway", "name": name}
        found.append(_ancestor(reference, CONTROLLER, _conditions(result, last)))
    return found[:_ANCESTORS_MAX]


def _conditions(result: PolicyResult, one: TargetResult) -> list[Status]:
    if result.ignored:
        return [judged("Accepted", _IGNORED, "", "")]
    return [
        judged("Accepted", one.accepted, "Accepted", f"{_VALID}{result.warning}"),
        judged("ResolvedRefs", one.resolved, "ResolvedRefs", _VALID),
    ]


def _ancestor(reference: Status, controller: str, conditions: list[Status]) -> Status:
    return {"ancestorRef": reference, "controllerName": controller, "conditions": conditions}


def _reference(one: TargetResult) -> Status:
    target = one.target
    reference = {"group": target.group, "kind": target.kind, "name": target.name}
    return {**reference, "sectionName": target.section} if target.section else reference
