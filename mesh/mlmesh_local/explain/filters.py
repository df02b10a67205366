"""HTTP filters that let a request pass or not, in their order."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from mlmesh_local.envoy_types import Json
from mlmesh_local.explain.answers import grpc_as_http
from mlmesh_local.explain.provenance import Provenance
from mlmesh_local.explain.rbac import evaluate
from mlmesh_local.explain.requests import Request
from mlmesh_local.explain.routing import most_specific
from mlmesh_local.explain.tokens import METADATA, authenticate
from mlmesh_local.explain.values import Check, Outcome


@dataclass(frozen=True, slots=True, kw_only=True)
class Filtered:
    """The request behind the filters, what they said, and the outcome where one of them ended it."""

    request: Request
    checks: tuple[Check, ...]
    ended: Outcome | None


def http_filters(manager: Json, extensions: Mapping[str, Json]) -> Iterator[tuple[str, Json]]:
    """Name and configuration of a connection manager's filters; what comes over ECDS is looked up."""
    for one in manager.get("http_filters", ()):
        name = str(one.get("name", ""))
        if "config_discovery" in one:
            found = extensions.get(name, {})
            yield name, found.get("typed_config") or one["config_discovery"].get("default_config", {})
        else:
            yield name, one.get("typed_config", {})


def kind_of(config: Json) -> str:
    """The last word of a configuration's message type."""
    return str(config.get("@type", "")).rpartition(".")[2]


def pass_filters(
    filters: Iterator[tuple[str, Json]],
    levels: tuple[Json, ...],
    request: Request,
    provenance: Provenance,
    *,
    now_s: float,
) -> Filtered:
    """Let a request pass the filters; `levels` are those of its route, the most specific first."""
    checks: list[Check] = []
    for name, plain in filters:
        override = most_specific(name, *levels)
        disabled, config = _configured(plain, override)
        if disabled:
            continue
        if kind_of(plain) == "RBAC":
            check = _rbac(name, config, request, provenance)
        elif kind_of(plain) == "JwtAuthentication":
            if not config.get("rules"):
                continue
            check, request, code = _token(name, config, request, provenance, now_s)
            if check.verdict == "deny":
                ended = Outcome(kind="unauthenticated", code=code, why=check.why, http=grpc_as_http(code))
                return Filtered(request=request, checks=(*checks, check), ended=ended)
        elif kind_of(plain) == "ExtAuthz":
            check = _service(name, config)
        else:
            continue
        if check is None:
            continue
        checks.append(check)
        if check.verdict == "deny":
            return Filtered(request=request, checks=tuple(checks), ended=_ended(check))
    return Filtered(request=request, checks=tuple(checks), ended=None)


def _configured(plain: Json, override: Json | None) -> tuple[bool, Json]:
    """Whether a filter is off on this route, and its configuration there."""
    if override is None:
        return False, plain
    if kind_of(override) == "FilterConfig":
        if override.get("disabled"):
            return True, plain
        override = override.get("config", {})
    kind = kind_of(override)
    if kind == "RBACPerRoute":
        return "rbac" not in override, override.get("rbac", {})
    if kind == "PerRouteConfig":  # of the JWT filter
        return bool(override.get("disabled")), plain
    if kind == "ExtAuthzPerRoute":
        return bool(override.get("disabled")), plain
    return False, override


def _rbac(name: str, config: Json, request: Request, provenance: Provenance) -> Check | None:
    rules = config.get("rules")
    logged = config.get("shadow_rules")
    if rules is None and logged is None:
        return None
    if rules is None:
        verdict = evaluate(logged or {}, request)
        why = f"{verdict.policy} would apply" if verdict.policy else "no rule would apply"
        place = provenance.of_policy(verdict.policy)
        return Check(
            filter=name, action=verdict.action, verdict="log", policy=verdict.policy, place=place, why=f"dry run: {why}"
        )
    verdict = evaluate(rules, request)
    return Check(
        filter=name,
        action=verdict.action,
        verdict="log" if verdict.action == "LOG" else "allow" if verdict.allowed else "deny",
        policy=verdict.policy,
        place=provenance.of_policy(verdict.policy),
        why=_reason(verdict.action, verdict.policy, rules),
    )


def _reason(action: str, policy: str, rules: Json) -> str:
    if policy:
        return {"ALLOW": "a rule allows it", "DENY": "a rule denies it"}.get(action, "a rule records it")
    if action == "ALLOW":
        names = sorted({name.rpartition("-rule[")[0] for name in rules.get("policies", {})})
        return f"no rule of {', '.join(names) or 'any policy'} allows it"
    return "no rule denies it" if action == "DENY" else "no rule records it"


def _token(
    name: str, config: Json, request: Request, provenance: Provenance, now_s: float
) -> tuple[Check, Request, str]:
    result = authenticate(config, request, now_s=now_s)
    if result.metadata:
        merged = {**request.metadata, METADATA: {**request.metadata.get(METADATA, {}), **result.metadata}}
        request = dataclasses.replace(request, metadata=merged)
    check = Check(
        filter=name,
        action="JWT",
        verdict="allow" if result.allowed else "deny",
        policy=result.provider,
        place=provenance.of_issuer(result.provider),
        why=result.why,
    )
    return check, request, result.code


def _service(name: str, config: Json) -> Check:
    service = config.get("grpc_service", {}).get("envoy_grpc", {}).get("cluster_name", "")
    service = service or config.get("http_service", {}).get("server_uri", {}).get("cluster", "")
    why = f"{service or 'a service'} is asked, and decides"
    return Check(filter=name, action="CUSTOM", verdict="ask", policy="", place=None, why=why)


def _ended(check: Check) -> Outcome:
    return Outcome(kind="denied", code="PERMISSION_DENIED", why=f"{check.policy}: {check.why}".lstrip(": "), http=403)
