"""Envoy's RBAC, evaluated as Envoy does.

https://www.envoyproxy.io/docs/envoy/v1.40.0/api-v3/config/rbac/v3/rbac.proto
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from mlmesh_local.envoy_types import Json
from mlmesh_local.explain.chains import inside
from mlmesh_local.explain.requests import Request
from mlmesh_local.explain.routing import metadata_mismatch
from mlmesh_local.explain.strings import header_mismatch, regex_matches, string_matches, without_query
from mlmesh_runtime.errors import InvalidInput

PEER_STATE = "io.istio.peer_principal"
"""Filter state in which Istio keeps the identity of the peer."""


_Holds = Callable[[Json, Request], bool]


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What the rules say. ``policy`` names the one that matched, empty when none did."""

    allowed: bool
    policy: str
    action: str


def evaluate(rules: Json, request: Request) -> Verdict:
    """The verdict of `config.rbac.v3.RBAC`: policies are tried in the order of their names."""
    action = str(rules.get("action", "ALLOW"))
    policies: Mapping[str, Json] = rules.get("policies", {})
    matched = next((name for name in sorted(policies) if policy_matches(policies[name], request)), "")
    allowed = {"ALLOW": bool(matched), "DENY": not matched}.get(action, True)
    return Verdict(allowed=allowed, policy=matched, action=action)


def policy_matches(policy: Json, request: Request) -> bool:
    """Whether any permission and any principal of a policy hold."""
    return any(permitted(one, request) for one in policy.get("permissions", ())) and any(
        is_principal(one, request) for one in policy.get("principals", ())
    )


def permitted(permission: Json, request: Request) -> bool:
    """config.rbac.v3.Permission."""
    (kind, value) = _only(permission)
    if kind == "and_rules":
        return all(permitted(one, request) for one in value.get("rules", ()))
    if kind == "or_rules":
        return any(permitted(one, request) for one in value.get("rules", ()))
    if kind == "not_rule":
        return not permitted(value, request)
    return _holds(_PERMISSIONS, kind)(value, request)


def is_principal(principal: Json, request: Request) -> bool:
    """config.rbac.v3.Principal."""
    (kind, value) = _only(principal)
    if kind == "and_ids":
        return all(is_principal(one, request) for one in value.get("ids", ()))
    if kind == "or_ids":
        return any(is_principal(one, request) for one in value.get("ids", ()))
    if kind == "not_id":
        return not is_principal(value, request)
    return _holds(_PRINCIPALS, kind)(value, request)


def _holds(own: Mapping[str, _Holds], kind: str) -> _Holds:
    found = own.get(kind) or _COMMON.get(kind)
    if found is None:
        raise InvalidInput(f"a policy asks by {kind}, of which it cannot be told here whether it holds")
    return found


def _only(rule: Json) -> tuple[str, Json]:
    ((kind, value),) = rule.items()
    return kind, value


def _block(value: Json, address: str) -> bool:
    return inside([value], address) >= 0


def _authenticated(value: Json, request: Request) -> bool:
    # Without a certificate nobody is authenticated, whatever name is asked for.
    if not request.peer:
        return False
    matcher = value.get("principal_name")
    return matcher is None or string_matches(matcher, request.peer)


def _filter_state(value: Json, request: Request) -> bool:
    if value.get("key") != PEER_STATE or not request.peer:
        return False
    return string_matches(value.get("string_match", {}), request.peer)


def _uri_template(value: Json, request: Request) -> bool:
    """Istio's "{*}" is one segment of the path, "{**}" any number of them."""
    template = str(value.get("typed_config", {}).get("path_template", ""))
    # Longest first: "{**}" before "{*}", and both in Envoy's form without braces, too.
    parts = re.split(r"(\{\*\*\}|\{\*\}|\*\*|\*)", template)
    pattern = "".join(_SEGMENTS.get(part.strip("{}"), re.escape(part)) for part in parts)
    return regex_matches(pattern, without_query(request.path))


_SEGMENTS = {"**": ".*", "*": "[^/]+"}
_COMMON: Mapping[str, _Holds] = {
    "any": lambda value, _request: bool(value),
    "header": lambda value, request: not header_mismatch(value, request.headers),
    "url_path": lambda value, request: string_matches(value.get("path", {}), without_query(request.path)),
    "metadata": lambda value, request: not metadata_mismatch(value, request),
    "sourced_metadata": lambda value, request: not metadata_mismatch(value.get("metadata_matcher", {}), request),
}
_PERMISSIONS: Mapping[str, _Holds] = {
    "destination_ip": lambda value, request: _block(value, request.destination),
    "destination_port": lambda value, request: int(str(value)) == request.port,
    "destination_port_range": lambda value, request: int(value.get("start", 0)) <= request.port < int(value["end"]),
    "uri_template": _uri_template,
    "requested_server_name": lambda value, request: string_matches(value, request.sni),
}
_PRINCIPALS: Mapping[str, _Holds] = {
    "authenticated": _authenticated,
    "filter_state": _filter_state,
    "source_ip": lambda value, request: _block(value, request.source),
    "direct_remote_ip": lambda value, request: _block(value, request.source),
    "remote_ip": lambda value, request: _block(value, request.source),
}
