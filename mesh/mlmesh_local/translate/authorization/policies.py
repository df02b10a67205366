"""Which policies apply to a proxy, and Envoy's RBAC rules of several policies."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypeVar

from mlmesh_local.envoy_types import Json
from mlmesh_local.model import ProxyNode
from mlmesh_local.resources.catalog import selects
from mlmesh_local.resources.model import AuthorizationPolicy, PolicyAction, RequestAuthentication
from mlmesh_local.translate.authorization.rules import NEVER, Frame, generate
from mlmesh_local.translate.view import View

GATEWAY_NAME = "gateway.networking.k8s.io/gateway-name"
"""Label of the pods of a Gateway API Gateway."""

# How Istio names policies that ask an external authorizer; it is asked where such a name is in the metadata.
CUSTOM_PREFIX = "istio-ext-authz-"
_ENVOY_ACTIONS = {"ALLOW": "ALLOW", "DENY": "DENY", "AUDIT": "LOG", "CUSTOM": "DENY"}

P = TypeVar("P", AuthorizationPolicy, RequestAuthentication)


def attached(policies: Iterable[P], view: View, proxy: ProxyNode) -> list[P]:
    """Policies that apply to a proxy: of the root namespace first, in one namespace the oldest first.

    `targetRefs` bind to pods of Gateway API Gateways of the policy's own namespace and to nothing else
    (pilot/pkg/model/policyattachment.go).
    """
    root = view.world.root_namespace
    gateway = proxy.labels.get(GATEWAY_NAME, "")

    def binds(policy: P) -> bool:
        namespace = policy.meta.namespace
        if policy.gateways:
            return bool(gateway) and namespace == proxy.namespace and gateway in policy.gateways
        return namespace in (root, proxy.namespace) and selects(policy.selector, proxy.labels)

    found = [policy for policy in policies if binds(policy)]
    return sorted(found, key=lambda policy: policy.meta.namespace != root)


def by_action(view: View, proxy: ProxyNode) -> dict[PolicyAction, list[AuthorizationPolicy]]:
    """AuthorizationPolicies of a proxy by action; actions without a policy are absent."""
    result: dict[PolicyAction, list[AuthorizationPolicy]] = {}
    for policy in attached(view.resources.specs(AuthorizationPolicy), view, proxy):
        result.setdefault(policy.action, []).append(policy)
    return result


def rules(
    policies: Sequence[AuthorizationPolicy], action: PolicyAction, domains: tuple[str, ...], *, tcp: bool
) -> Json | None:
    """Envoy's RBAC rules; None without policies, and rules without content where none of theirs can match."""
    if not policies:
        return None
    result: dict[str, Json] = {}
    for policy in policies:
        frame = Frame(namespace=policy.meta.namespace, action=action, domains=domains, tcp=tcp)
        if not policy.rules:
            # ALLOW without rules selects and allows nothing; it must still be there, so that others do not pass.
            result[policy_name(policy, 0)] = NEVER
        for index, rule in enumerate(policy.rules):
            generated = generate(rule, frame)
            if generated is not None:
                result[policy_name(policy, index)] = generated
    return {"action": _ENVOY_ACTIONS[action], "policies": result}


def policy_name(policy: AuthorizationPolicy, rule: int) -> str:
    """Istio's name of a rule, which is in statistics and in the details of a refusal."""
    custom = f"{CUSTOM_PREFIX}{policy.provider}-" if policy.action == "CUSTOM" else ""
    return f"{custom}ns[{policy.meta.namespace}]-policy[{policy.meta.name}]-rule[{rule}]"
