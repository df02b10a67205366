"""What is valid and likely a mistake: Istio's own warnings about security resources, and a few of ours."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator

from mlmesh_local.resources.model import (
    AuthorizationPolicy,
    PolicyRule,
    RequestAuthentication,
    Values,
)
from mlmesh_local.resources.problems import Problem, did_you_mean
from mlmesh_local.resources.security.keys import secret_keys

# Attributes that TCP connections have too (validation.go: tcpRulesInFrom, tcpRulesInTo).
_TCP_SOURCE = frozenset({"source.principal", "source.namespace", "source.serviceAccount", "source.ip", "remote.ip"})
_TCP_OPERATION = frozenset({"destination.port"})


def security_warnings(
    policies: Iterable[AuthorizationPolicy], *, authorizers: Collection[str] = ()
) -> tuple[Problem, ...]:
    """Warnings of ours about policies, in their order. ``authorizers`` are those that MeshConfig defines, by name."""
    found: list[Problem] = []
    for policy in policies:
        if policy.provider and policy.provider not in authorizers:
            hint = did_you_mean(policy.provider, authorizers)
            message = f'MeshConfig defines no external authorizer "{policy.provider}"{hint}: what it matches is denied'
            found.append(Problem(at=policy.meta.at.field("spec.provider.name"), message=message))
        found += [Problem(at=policy.meta.at.field(path), message=message) for path, message in _patterns(policy)]
    return tuple(found)


def denies_streams(policy: AuthorizationPolicy) -> Iterator[tuple[int, str]]:
    """Istio's warning: rules, by their place, that deny every TCP connection because they ask for HTTP."""
    for index, rule in enumerate(policy.rules):
        if policy.action == "DENY" and _http_only(rule):
            yield (
                index,
                "denies all traffic to TCP ports in its scope, because it has only attributes of HTTP; "
                'name the ports it is for ("to.operation.ports")',
            )


def _patterns(policy: AuthorizationPolicy) -> Iterator[tuple[str, str]]:
    for index, rule in enumerate(policy.rules):
        path = f"spec.rules[{index}]"
        for values in _all_values(rule):
            for value in (*values.values, *values.not_values):
                if values.key == "source.principal" and value.startswith("spiffe://"):
                    yield path, f'"{value}" never matches: principals are written without spiffe://'
                elif _is_inner_star(values.key, value):
                    yield path, f'"{value}" of {values.key} is compared as it is: "*" has a meaning at an end only'


def _http_only(rule: PolicyRule) -> bool:
    sources = {values.key for source in rule.sources for values in source}
    operations = {values.key for operation in rule.operations for values in operation}
    source_tcp, operation_tcp = bool(sources & _TCP_SOURCE), bool(operations & _TCP_OPERATION)
    return bool((sources and not operations and not source_tcp) or (operations and not operation_tcp))


def _all_values(rule: PolicyRule) -> Iterator[Values]:
    for side in (*rule.sources, *rule.operations):
        yield from side
    yield from rule.conditions


def _is_inner_star(key: str, value: str) -> bool:
    if key in ("source.namespace", "source.ip", "remote.ip") or (key == "path" and "{" in value):
        return False
    inner = value[1:] if value.startswith("*") else value.removesuffix("*")
    return "*" in inner


def secret_jwks(authentication: RequestAuthentication) -> Iterator[tuple[int, str]]:
    """Istio's warning: rules, by their place, whose keys are not only public ones."""
    for index, rule in enumerate(authentication.rules):
        for position in secret_keys(rule.jwks):
            yield index, f"the key at {position} holds secret material; verification needs public keys only"
