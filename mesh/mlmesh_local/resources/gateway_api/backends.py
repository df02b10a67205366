"""BackendTLSPolicies as DestinationRules, and what their statuses tell.

pilot/pkg/config/kube/gateway/backend_policies.go of Istio says how.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from mlmesh_local.resources.gateway_api.attach import ISTIO_GROUP, Fault, Surroundings
from mlmesh_local.resources.gateway_api.listener_tls import IN_CONFIG_MAP
from mlmesh_local.resources.gateway_api.listeners import INTERNAL_NAME, PARENTS
from mlmesh_local.resources.gateway_api.model import GROUP, ObjectRef, Route
from mlmesh_local.resources.gateway_api.model_tls import BackendTlsPolicy, PolicyTarget
from mlmesh_local.resources.gateway_api.owners import Derived
from mlmesh_local.resources.meta import Meta

IGNORED = "istio.io/ignore-policy-attachment"
NEVER = "invalid://"
"""Istio's name of roots that never come: nothing can be called."""

_SERVICE, _ENTRY = ("", "Service"), (ISTIO_GROUP, "ServiceEntry")
# Before everything that a person wrote, as Istio's, which have no time.
_OLDEST = "0001-01-01T00:00:00Z"
Ports = Mapping[tuple[str, str, str], Mapping[str, int]]


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetResult:
    """A target, and what is wrong when it is looked at: faults of earlier targets stay."""

    target: PolicyTarget
    accepted: Fault | None
    resolved: Fault | None


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyResult:
    """A BackendTLSPolicy with its targets, and the Gateways whose routes send to one of them."""

    policy: BackendTlsPolicy
    targets: tuple[TargetResult, ...]
    gateways: tuple[tuple[str, str], ...] = ()
    warning: str = ""
    ignored: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class _Piece:
    policy: BackendTlsPolicy
    target: PolicyTarget
    host: str
    tls: dict[str, Any]


def convert_policies(
    policies: Iterable[BackendTlsPolicy], routes: Iterable[Route], around: Surroundings, ports: Ports
) -> tuple[tuple[PolicyResult, ...], tuple[Derived, ...]]:
    """What statuses tell, and a DestinationRule for each host. Policies come oldest first."""
    listed = tuple(policies)
    active = [one for one in listed if not _is_ignored(one)]
    parents = _gateways_by_backend(routes) if listed else {}
    results: list[PolicyResult] = []
    pieces: dict[tuple[str, str, str, str], list[_Piece]] = {}
    for policy in listed:
        if _is_ignored(policy):
            faultless = (TargetResult(target=one, accepted=None, resolved=None) for one in policy.targets)
            results.append(PolicyResult(policy=policy, targets=tuple(faultless), ignored=True))
            continue
        result, found = _policy(policy, active, around, ports, parents)
        results.append(result)
        for piece in found:
            key = (piece.target.kind, policy.meta.namespace, piece.target.name, piece.host)
            pieces.setdefault(key, []).append(piece)
    rules = tuple(_rule(some, ports.get(key[:3], {})) for key, some in sorted(pieces.items()))
    return tuple(results), rules


def _is_ignored(policy: BackendTlsPolicy) -> bool:
    return policy.meta.annotations.get(IGNORED, "").lower() == "true"


def _policy(
    policy: BackendTlsPolicy,
    active: list[BackendTlsPolicy],
    around: Surroundings,
    ports: Ports,
    parents: Mapping[tuple[str, str, str, str], set[tuple[str, str]]],
) -> tuple[PolicyResult, list[_Piece]]:
    namespace = policy.meta.namespace
    credential, accepted, resolved = _credential(policy, around)
    tls = {
        "mode": "SIMPLE",
        "sni": policy.hostname,
        **({"subjectAltNames": list(policy.alt_names)} if policy.alt_names else {}),
        **({"credentialName": credential} if credential else {}),
    }
    targets: list[TargetResult] = []
    pieces: list[_Piece] = []
    gateways: set[tuple[str, str]] = set()
    for target in policy.targets:
        problem = _target_problem(target, namespace, around, ports)
        if problem:
            accepted = Fault(reason="TargetNotFound", message=f"targetRefs invalid: {problem}")
        else:
            rival = _rival(policy, target, active)
            if rival is not None:
                message = f'Conflicts with BackendTLSPolicy "{rival.meta.name}" targeting the same backend'
                accepted = Fault(reason="Conflicted", message=message)
            else:
                hosts = _hosts(target, namespace, around)
                pieces += [_Piece(policy=policy, target=target, host=host, tls=tls) for host in hosts]
            gateways |= parents.get((target.group, target.kind, namespace, target.name), set())
        targets.append(TargetResult(target=target, accepted=accepted, resolved=resolved))
    several = len(policy.roots) > 1 and not policy.well_known
    result = PolicyResult(
        policy=policy,
        targets=tuple(targets),
        gateways=tuple(sorted(gateways, key="/".join)),
        warning="; warning: only the first caCertificateRefs will be used" if several else "",
    )
    return result, pieces


def _credential(policy: BackendTlsPolicy, around: Surroundings) -> tuple[str, Fault | None, Fault | None]:
    """Istio's name of the roots (empty: those of the system), and what is wrong: accepted, resolved."""
    if policy.well_known or not policy.roots:
        unknown = policy.well_known not in ("", "System")
        message = f"Unknown wellKnownCACertificates: {policy.well_known}"
        return "", Fault(reason="Invalid", message=message) if unknown else None, None
    ref = policy.roots[0]
    namespace = policy.meta.namespace
    if (ref.group, ref.kind) == ("", "ConfigMap") and (namespace, ref.name) in around.bundles:
        return f"{IN_CONFIG_MAP}{namespace}/{ref.name}", None, None
    problem, resolved = _root_problem(ref, namespace, around)
    accepted = Fault(reason="NoValidCACertificate", message=f"Certificate reference invalid: {problem}")
    return NEVER, accepted, resolved


def _root_problem(ref: ObjectRef, namespace: str, around: Surroundings) -> tuple[str, Fault]:
    found = _found((ref.group, ref.kind), namespace, ref.name, around)
    if found is None:
        problem = f"unsupported kind {ref.kind}"
        return problem, Fault(reason="InvalidKind", message=f"Certificate reference not supported: {problem}")
    if found:
        problem = f"unsupported reference kind: {ref.kind}"
        return problem, Fault(reason="InvalidKind", message=f"Certificate reference invalid: {problem}")
    problem = f"reference {namespace}/{ref.name} (of kind {ref.kind}) not found"
    return problem, Fault(reason="InvalidCACertificateRef", message=f"Certificate reference not found: {problem}")


def _found(what: tuple[str, str], namespace: str, name: str, around: Surroundings) -> bool | None:
    """Whether something is there; None for a kind that Istio does not look up. Every Secret is taken to be there."""
    key = (namespace, name)
    known = {
        _SERVICE: key in around.services,
        _ENTRY: key in around.entries,
        ("", "ConfigMap"): key in around.bundles,
        ("", "Secret"): True,
    }
    return known.get(what)


def _target_problem(target: PolicyTarget, namespace: str, around: Surroundings, ports: Ports) -> str:
    what = (target.group, target.kind)
    found = _found(what, namespace, target.name, around)
    if found is None:
        return f"unsupported kind {target.kind}"
    if not found:
        return f"reference {namespace}/{target.name} (of kind {target.kind}) not found"
    if what not in (_SERVICE, _ENTRY):
        return f"unsupported reference kind: {target.kind}"
    if target.section and target.section not in ports.get((target.kind, namespace, target.name), {}):
        return f'sectionName "{target.section}" does not exist in {target.kind} {namespace}/{target.name}'
    return ""


def _hosts(target: PolicyTarget, namespace: str, around: Surroundings) -> tuple[str, ...]:
    if target.kind == "ServiceEntry":
        return around.entries[namespace, target.name]
    return (f"{target.name}.{namespace}.svc.{around.domain}",)


def _rival(policy: BackendTlsPolicy, target: PolicyTarget, active: list[BackendTlsPolicy]) -> BackendTlsPolicy | None:
    """An older policy for the same target."""
    for other in active:
        if other is policy:
            return None
        if other.meta.namespace == policy.meta.namespace and target in other.targets:
            return other
    return None


def _rule(pieces: list[_Piece], numbers: Mapping[str, int]) -> Derived:
    first = pieces[0]
    policy: dict[str, Any] = {}
    by_section: dict[str, dict[str, Any]] = {}
    for piece in pieces:
        if piece.target.section:
            by_section.setdefault(piece.target.section, piece.tls)
        else:
            policy.setdefault("tls", piece.tls)
    if by_section:
        policy["portLevelSettings"] = [
            {"port": {"number": numbers[section]}, "tls": tls} for section, tls in sorted(by_section.items())
        ]
    origin = first.policy.meta
    parents = dict.fromkeys(f"BackendTLSPolicy/{p.policy.meta.namespace}.{p.policy.meta.name}" for p in pieces)
    middle = f"~{first.host.replace('.', '-')}" if first.target.kind == "ServiceEntry" else ""
    meta = Meta(
        kind="DestinationRule",
        namespace=origin.namespace,
        name=f"{first.target.name}{middle}~{INTERNAL_NAME}",
        labels={},
        annotations={PARENTS: ",".join(parents)},
        at=first.target.at,
        created=_OLDEST,
    )
    spec = {"host": first.host, "trafficPolicy": policy}
    return Derived(kind="DestinationRule", meta=meta, spec=spec, origin=origin)


def _gateways_by_backend(routes: Iterable[Route]) -> dict[tuple[str, str, str, str], set[tuple[str, str]]]:
    found: dict[tuple[str, str, str, str], set[tuple[str, str]]] = {}
    for route in routes:
        own = route.meta.namespace
        gateways = {(ref.namespace or own, ref.name) for ref in route.parents if (ref.group, ref.kind) == _GATEWAY}
        for backend in _backends(route):
            found.setdefault((backend[0], backend[1], backend[2] or own, backend[3]), set()).update(gateways)
    return found


_GATEWAY = (GROUP, "Gateway")


def _backends(route: Route) -> Iterator[tuple[str, str, str, str]]:
    for rule in route.rules:
        for one in rule.backends or ():
            yield one.group, one.kind, one.namespace, one.name
