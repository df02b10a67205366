"""AuthorizationPolicies as Envoy's RBAC, put on routes: listeners stay as they are, and a change acts at once on
connections that are already open.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from mlmesh_local.envoy_types import Json, typed
from mlmesh_local.model import ProxyNode
from mlmesh_local.resources.catalog import selects
from mlmesh_local.resources.model import AuthorizationPolicy, PolicyRule, Values
from mlmesh_local.translate.names import filter_of
from mlmesh_local.translate.view import View

DENY_FILTER = "envoy.filters.http.rbac.deny"
ALLOW_FILTER = "envoy.filters.http.rbac.allow"
_RBAC = "envoy.extensions.filters.http.rbac.v3.RBAC"
_PER_ROUTE = "envoy.extensions.filters.http.rbac.v3.RBACPerRoute"
_SPIFFE = "spiffe://"
_NEVER: Json = {
    "permissions": [{"and_rules": {"rules": [{"not_rule": {"any": True}}]}}],
    "principals": [{"and_ids": {"ids": [{"not_id": {"any": True}}]}}],
}

_Generate = Callable[[str, str, AuthorizationPolicy], Json]


def authorization_filters() -> list[Json]:
    """The filters that routes configure: denials before allowances, as in Istio. Without rules they let all pass."""
    return [filter_of(DENY_FILTER, _RBAC), filter_of(ALLOW_FILTER, _RBAC)]


def authorization(view: View, proxy: ProxyNode) -> dict[str, Json]:
    """Configuration of the filters for a proxy's route configuration; empty where no policy applies."""
    result: dict[str, Json] = {}
    for action, name in (("DENY", DENY_FILTER), ("ALLOW", ALLOW_FILTER)):
        policies = [p for p in _policies(view, proxy) if p.action == action]
        if policies:
            rules = {"action": action, "policies": _rules(policies, view.world.trust_domain)}
            result[name] = typed(_PER_ROUTE, {"rbac": {"rules": rules}})
    return result


def _policies(view: View, proxy: ProxyNode) -> list[AuthorizationPolicy]:
    return [
        policy
        for policy in view.resources.specs(AuthorizationPolicy)
        if policy.meta.namespace in (proxy.namespace, view.world.root_namespace)
        and selects(policy.selector, proxy.labels)
    ]


def _rules(policies: list[AuthorizationPolicy], trust_domain: str) -> dict[str, Json]:
    result: dict[str, Json] = {}
    for policy in policies:
        prefix = f"ns[{policy.meta.namespace}]-policy[{policy.meta.name}]-rule"
        if not policy.rules:
            # ALLOW without rules selects and allows nothing; it must still be there, so that others do not pass.
            result[f"{prefix}[0]"] = _NEVER
        for index, rule in enumerate(policy.rules):
            result[f"{prefix}[{index}]"] = _rule(rule, policy, trust_domain)
    return result


def _rule(rule: PolicyRule, policy: AuthorizationPolicy, trust_domain: str) -> Json:
    on_permission = [c for c in rule.conditions if c.key in _PERMISSIONS]
    on_principal = [c for c in rule.conditions if c.key not in _PERMISSIONS]
    permissions = [_all_of([*o, *on_permission], policy, trust_domain, _PERMISSION) for o in rule.operations or ((),)]
    principals = [_all_of([*s, *on_principal], policy, trust_domain, _PRINCIPAL) for s in rule.sources or ((),)]
    return {"permissions": permissions, "principals": principals}


# Names of "and", "or" and "not" in Envoy's Permission and Principal.
_Words = tuple[str, str, str, str]
_PERMISSION: _Words = ("and_rules", "or_rules", "not_rule", "rules")
_PRINCIPAL: _Words = ("and_ids", "or_ids", "not_id", "ids")


def _all_of(values: list[Values], policy: AuthorizationPolicy, trust_domain: str, words: _Words) -> Json:
    all_word, any_word, not_word, list_word = words
    parts: list[Json] = []
    for item in values:
        for texts, negated in ((item.values, False), (item.not_values, True)):
            if texts:
                options = [_generate(item.key, text, policy, trust_domain) for text in texts]
                any_of = {any_word: {list_word: options}}
                parts.append({not_word: any_of} if negated else any_of)
    return {all_word: {list_word: parts or [{"any": True}]}}


def _generate(key: str, value: str, policy: AuthorizationPolicy, trust_domain: str) -> Json:
    if key == "source.principal":
        return _authenticated(pattern(_with_trust_domain(value, trust_domain), _SPIFFE))
    if key.startswith("request.headers["):
        return {"header": _header(key[len("request.headers[") : -1], value, ignore_case=False)}
    return _GENERATORS[key](key, value, policy)


def _with_trust_domain(principal: str, trust_domain: str) -> str:
    """In policies "cluster.local" stands for the mesh's trust domain, whatever it is."""
    own, slash, rest = principal.partition("/")
    return f"{trust_domain}/{rest}" if slash and own == "cluster.local" else principal


def pattern(value: str, prefix: str = "") -> Json:
    """Istio's "*", "*suffix", "prefix*" and exact values as StringMatcher, after a fixed prefix."""
    if value == "*":
        return {"safe_regex": {"regex": ".+"}}
    if value.startswith("*"):
        if not prefix:
            return {"suffix": value[1:]}
        return {"safe_regex": {"regex": f"{prefix}.*{re.escape(value[1:])}"}}
    if value.endswith("*"):
        return {"prefix": prefix + value[:-1]}
    return {"exact": prefix + value}


def _header(name: str, value: str, *, ignore_case: bool) -> Json:
    if value == "*":
        return {"name": name, "present_match": True}
    match = pattern(value)
    return {"name": name, "string_match": {**match, "ignore_case": True} if ignore_case else match}


def _authenticated(match: Json) -> Json:
    return {"authenticated": {"principal_name": match}}


def _namespace(_key: str, value: str, _policy: AuthorizationPolicy) -> Json:
    literal = ".*".join(re.escape(part) for part in value.split("*"))
    return _authenticated({"safe_regex": {"regex": f".*/ns/{literal}/.*"}})


def _service_account(_key: str, value: str, policy: AuthorizationPolicy) -> Json:
    namespace, slash, account = value.partition("/")
    if not slash:
        namespace, account = policy.meta.namespace, value
    regex = f"spiffe://.+/ns/{re.escape(namespace)}/(.+/|)sa/{re.escape(account)}(/.+)?"
    return _authenticated({"safe_regex": {"regex": regex}})


def _block(value: str) -> Json:
    address, slash, length = value.partition("/")
    return {"address_prefix": address, "prefix_len": int(length) if slash else (128 if ":" in address else 32)}


_PERMISSIONS: dict[str, _Generate] = {
    "host": lambda _key, value, _policy: {"header": _header(":authority", value, ignore_case=True)},
    "method": lambda _key, value, _policy: {"header": _header(":method", value, ignore_case=False)},
    "path": lambda _key, value, _policy: {"url_path": {"path": pattern(value)}},
    "destination.port": lambda _key, value, _policy: {"destination_port": int(value)},
    "destination.ip": lambda _key, value, _policy: {"destination_ip": _block(value)},
    "connection.sni": lambda _key, value, _policy: {"requested_server_name": pattern(value)},
}
_GENERATORS: dict[str, _Generate] = {
    **_PERMISSIONS,
    "source.namespace": _namespace,
    "source.serviceAccount": _service_account,
    "source.ip": lambda _key, value, _policy: {"direct_remote_ip": _block(value)},
}
