"""The filters that check who may do what, in Istio's order: CUSTOM, then (after tokens) AUDIT, DENY, ALLOW."""

from __future__ import annotations

from collections.abc import Sequence

from mlmesh_local.envoy_types import Json, typed
from mlmesh_local.model import ProxyNode
from mlmesh_local.resources.model import AuthorizationPolicy, PolicyAction
from mlmesh_local.translate.authorization.authorizers import (
    AUTHORIZER_MESSAGE,
    DENIED_SUFFIX,
    authorizer,
    http_authorizer,
    network_authorizer,
)
from mlmesh_local.translate.authorization.policies import by_action, rules
from mlmesh_local.translate.discovered import discovered, extension
from mlmesh_local.translate.names import filter_of
from mlmesh_local.translate.view import View

CUSTOM_FILTER = "envoy.filters.http.rbac.custom"
AUTHORIZER_FILTER = "envoy.filters.http.ext_authz"
AUDIT_FILTER = "envoy.filters.http.rbac.audit"
DENY_FILTER = "envoy.filters.http.rbac.deny"
ALLOW_FILTER = "envoy.filters.http.rbac.allow"

_RBAC = "envoy.extensions.filters.http.rbac.v3.RBAC"
_PER_ROUTE = "envoy.extensions.filters.http.rbac.v3.RBACPerRoute"
_NETWORK_RBAC = "envoy.extensions.filters.network.rbac.v3.RBAC"
_NETWORK_NAME = "envoy.filters.network.rbac"
_FILTERS: tuple[tuple[PolicyAction, str], ...] = (
    ("AUDIT", AUDIT_FILTER),
    ("DENY", DENY_FILTER),
    ("ALLOW", ALLOW_FILTER),
)
# pilot/pkg/security/authz/model/model.go: keys of what a rule that is not enforced leaves in the metadata.
_SHADOW_PREFIX = {"CUSTOM": "istio_ext_authz_", "DENY": "istio_dry_run_deny_", "ALLOW": "istio_dry_run_allow_"}
_TCP_PREFIX = "tcp."


def authorization_filters(between: Sequence[Json] = ()) -> list[Json]:
    """The filters that routes and extensions configure; without rules they let all pass.

    ``between`` are those that come after the external authorizer and before the policies that may know its outcome:
    verification of tokens.
    """
    custom = filter_of(CUSTOM_FILTER, _RBAC, _shadow_prefix("CUSTOM"))
    checks = [filter_of(name, _RBAC, _shadow_prefix(action)) for action, name in _FILTERS]
    return [custom, discovered(AUTHORIZER_FILTER, AUTHORIZER_MESSAGE, _RBAC), *between, *checks]


def authorization(view: View, proxy: ProxyNode) -> dict[str, Json]:
    """Configuration of the filters for a proxy's route configurations; empty where no policy applies."""
    found = by_action(view, proxy)
    result: dict[str, Json] = {}
    if "CUSTOM" in found:
        shadow = rules(found["CUSTOM"], "CUSTOM", view.trust_domains, tcp=False)
        result[CUSTOM_FILTER] = typed(_PER_ROUTE, {"rbac": {"shadow_rules": shadow, **_shadow_prefix("CUSTOM")}})
    for action, name in _FILTERS:
        if action in found:
            result[name] = typed(_PER_ROUTE, {"rbac": _checks(found[action], action, view, tcp=False)})
    return result


def authorization_extensions(view: View, proxy: ProxyNode) -> dict[str, Json]:
    """The external authorizer's filter: what it asks, or nothing, or a denial where the authorizer is not known.

    The rules that say when it is asked are on the routes in all three cases, so that no request slips through while one
    is replaced by another.
    """
    custom = by_action(view, proxy).get("CUSTOM", [])
    if not custom:
        return {AUTHORIZER_FILTER: extension(AUTHORIZER_FILTER, _RBAC)}
    chosen = authorizer(view, custom)
    if chosen is None:
        denials = _denials(custom, view, tcp=False)
        return {AUTHORIZER_FILTER: extension(AUTHORIZER_FILTER, _RBAC, {"rules": denials})}
    config = http_authorizer(*chosen, _SHADOW_PREFIX["CUSTOM"])
    return {AUTHORIZER_FILTER: extension(AUTHORIZER_FILTER, AUTHORIZER_MESSAGE, config)}


def network_checks(view: View, proxy: ProxyNode) -> list[Json]:
    """Network filters that check a connection of a TCP port; they come before the one that forwards it."""
    found = by_action(view, proxy)
    filters: list[Json] = []
    if "CUSTOM" in found:
        filters += _network_custom(found["CUSTOM"], view)
    for action, _ in _FILTERS:
        if action in found:
            filters.append(_network_filter(_checks(found[action], action, view, tcp=True)))
    return filters


def _network_custom(policies: list[AuthorizationPolicy], view: View) -> list[Json]:
    chosen = authorizer(view, policies)
    if chosen is None:
        return [_network_filter({"rules": _denials(policies, view, tcp=True)})]
    asked = network_authorizer(*chosen, _SHADOW_PREFIX["CUSTOM"])
    if asked is None:
        # An HTTP service cannot be asked about a connection: Istio lets it pass.
        return []
    shadow = rules(policies, "CUSTOM", view.trust_domains, tcp=True)
    return [_network_filter({"shadow_rules": shadow, **_shadow_prefix("CUSTOM")}), asked]


def _network_filter(value: Json) -> Json:
    return filter_of(_NETWORK_NAME, _NETWORK_RBAC, {"stat_prefix": _TCP_PREFIX, **value})


def _checks(policies: list[AuthorizationPolicy], action: PolicyAction, view: View, *, tcp: bool) -> Json:
    enforced = rules([p for p in policies if not p.dry_run], action, view.trust_domains, tcp=tcp)
    tried = rules([p for p in policies if p.dry_run], action, view.trust_domains, tcp=tcp)
    result: Json = {}
    if enforced is not None:
        result["rules"] = enforced
    if tried is not None:
        result.update({"shadow_rules": tried, **_shadow_prefix(action)})
    return result


def _denials(policies: list[AuthorizationPolicy], view: View, *, tcp: bool) -> Json:
    """What asks an authorizer that is not there is denied."""
    result = rules(policies, "CUSTOM", view.trust_domains, tcp=tcp) or {}
    return {**result, "policies": {f"{name}{DENIED_SUFFIX}": value for name, value in result["policies"].items()}}


def _shadow_prefix(action: PolicyAction) -> Json:
    prefix = _SHADOW_PREFIX.get(action)
    return {"shadow_rules_stat_prefix": prefix} if prefix else {}
