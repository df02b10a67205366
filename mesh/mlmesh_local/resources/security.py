"""PeerAuthentication and AuthorizationPolicy: https://istio.io/latest/docs/reference/config/security/."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Literal, cast

from mlmesh_local.resources.fields import Fields, is_cidr
from mlmesh_local.resources.model import (
    AuthorizationPolicy,
    Meta,
    MtlsMode,
    PeerAuthentication,
    PolicyRule,
    Values,
)

_MODES = ("UNSET", "DISABLE", "PERMISSIVE", "STRICT")

# Field of `from.source` and `to.operation`, the condition that says the same, and a check of its values.
_Check = tuple[Callable[[str], bool], str]


def _any_text(text: str) -> bool:
    return bool(text)


def _is_pattern(text: str) -> bool:
    """One "*", at the start or the end: Istio's exact, prefix, suffix and presence matches."""
    inner = text[1:] if text.startswith("*") else text.removesuffix("*")
    return text == "*" or (bool(inner) and "*" not in inner)


def _is_principal(text: str) -> bool:
    return _is_pattern(text) and not text.startswith("spiffe://")


def _is_path(text: str) -> bool:
    return _is_pattern(text) and "{" not in text and (text.startswith(("/", "*")))


def _is_port(text: str) -> bool:
    return text.isdigit() and 0 < int(text) < 65536


def _is_method(text: str) -> bool:
    return _is_pattern(text)


_PATTERN: _Check = (_is_pattern, 'a value with at most one "*", at its start or end')
_PRINCIPAL: _Check = (_is_principal, 'a principal such as "cluster.local/ns/NAMESPACE/sa/ACCOUNT" (without spiffe://)')
_PATH: _Check = (
    _is_path,
    'a path such as "/package.Service/Method" or "/package.Service/*" (no templates with braces here)',
)
_PORT: _Check = (_is_port, "a port number in quotes")
_CIDR: _Check = (is_cidr, "an IP address or block")
_NAMESPACE: _Check = (_any_text, "a namespace")

_SOURCE: Mapping[str, tuple[str, _Check]] = {
    "principals": ("source.principal", _PRINCIPAL),
    "namespaces": ("source.namespace", _NAMESPACE),
    "serviceAccounts": (
        "source.serviceAccount",
        (lambda text: bool(text) and text.count("/") <= 1, "[NAMESPACE/]ACCOUNT"),
    ),
    "ipBlocks": ("source.ip", _CIDR),
}
_OPERATION: Mapping[str, tuple[str, _Check]] = {
    "hosts": ("host", _PATTERN),
    "ports": ("destination.port", _PORT),
    "methods": ("method", (_is_method, "a method such as POST")),
    "paths": ("path", _PATH),
}
_CONDITIONS: Mapping[str, _Check] = {
    "source.principal": _PRINCIPAL,
    "source.namespace": _NAMESPACE,
    "source.serviceAccount": _SOURCE["serviceAccounts"][1],
    "source.ip": _CIDR,
    "destination.ip": _CIDR,
    "destination.port": _PORT,
    "connection.sni": _PATTERN,
}
_UNSUPPORTED_CONDITIONS = ("request.auth.", "remote.ip", "source.trustDomain", "experimental.")
_HEADER_KEY = re.compile(r"^request\.headers\[([^\[\]]+)\]$")
_JWT = "it needs RequestAuthentication (JWT), which the laptop mesh has not"


def parse_peer_authentication(meta: Meta, spec: Fields) -> PeerAuthentication:
    """Read a PeerAuthentication's spec."""
    selected = selector(spec)
    mode = _mtls(spec, "mtls")
    ports: list[tuple[int, MtlsMode]] = []
    with spec.message("portLevelMtls") as inner:
        for key in inner.names():
            port_mode = _mtls(inner, key)
            if _is_port(key):
                ports.append((int(key), port_mode))
            else:
                inner.refuse(key, "is not a port number")
    if ports and not selected:
        spec.refuse("portLevelMtls", 'needs a "selector"')
    return PeerAuthentication(meta=meta, selector=selected, mode=mode, ports=tuple(sorted(ports)))


def selector(spec: Fields) -> Mapping[str, str]:
    """`selector.matchLabels`; empty selects everything in scope."""
    spec.unsupported("targetRef", "targetRefs", why="it selects gateways and waypoints of the Gateway API")
    with spec.message("selector") as inner:
        labels = inner.text_map("matchLabels")
        for key in labels:
            if "*" in key or "*" in labels[key]:
                inner.refuse("matchLabels", f'"{key}: {labels[key]}": wildcards are not supported in selectors')
        return labels


def _mtls(fields: Fields, name: str) -> MtlsMode:
    with fields.message(name) as inner:
        return cast("MtlsMode", inner.choice("mode", _MODES, "UNSET"))


def parse_authorization_policy(meta: Meta, spec: Fields) -> AuthorizationPolicy:
    """Read an AuthorizationPolicy's spec."""
    spec.unsupported("provider", why="external authorization is not part of the laptop mesh")
    action = spec.choice("action", ("ALLOW", "DENY"), "ALLOW", unsupported=("AUDIT", "CUSTOM"))
    rules = tuple(_rule(item) for item in spec.messages("rules"))
    if action == "DENY" and not rules:
        spec.problems.add(spec.at, 'action DENY without "rules" denies nothing; write "rules: [{}]" to deny everything')
    return AuthorizationPolicy(
        meta=meta, selector=selector(spec), action=cast('Literal["ALLOW", "DENY"]', action), rules=rules
    )


def _rule(fields: Fields) -> PolicyRule:
    with fields:
        sources = [
            _values(item, "source", _SOURCE, ("requestPrincipals", "notRequestPrincipals"))
            for item in fields.messages("from")
        ]
        operations = [_values(item, "operation", _OPERATION, ()) for item in fields.messages("to")]
        for name in ("from", "to", "when"):
            node = fields.raw(name)
            if node is not None and node.value == []:
                fields.refuse(name, "must not be empty; leave it out to match everything")
        conditions = [condition for item in fields.messages("when") if (condition := _condition(item))]
        return PolicyRule(sources=tuple(sources), operations=tuple(operations), conditions=tuple(conditions))


def _values(
    fields: Fields, name: str, known: Mapping[str, tuple[str, _Check]], jwt: tuple[str, ...]
) -> tuple[Values, ...]:
    result: list[Values] = []
    with fields:
        fields.required(name)
        with fields.message(name) as inner:
            inner.unsupported(*jwt, why=_JWT)
            if name == "source":
                inner.unsupported("remoteIpBlocks", "notRemoteIpBlocks", "trustDomains", "notTrustDomains")
            for field, (key, (check, what)) in known.items():
                values = inner.texts(field, check, what)
                not_values = inner.texts(f"not{field[0].upper()}{field[1:]}", check, what)
                if values or not_values:
                    result.append(Values(key=key, values=values, not_values=not_values))
            if not inner.names():
                inner.problems.add(inner.at, "must not be empty")
            if (
                name == "source"
                and inner.has("serviceAccounts")
                and (inner.has("principals") or inner.has("namespaces"))
            ):
                inner.refuse("serviceAccounts", "cannot be set together with principals or namespaces")
    return tuple(result)


def _condition(fields: Fields) -> Values | None:
    with fields:
        key = fields.text("key", required=True)
        header = _HEADER_KEY.match(key)
        check: _Check = _PATTERN
        if header:
            key = f"request.headers[{header.group(1).lower()}]"
        elif key in _CONDITIONS:
            check = _CONDITIONS[key]
        elif key.startswith(_UNSUPPORTED_CONDITIONS):
            fields.refuse("key", f'not supported: the laptop mesh does not know "{key}"')
        elif key:
            fields.refuse("key", f'"{key}" is no attribute; use one of {", ".join(_CONDITIONS)}, request.headers[NAME]')
        values, not_values = fields.texts("values", *check), fields.texts("notValues", *check)
        if not values and not not_values and not (fields.has("values") or fields.has("notValues")):
            fields.problems.add(fields.at, 'one of "values", "notValues" is required')
        return Values(key=key, values=values, not_values=not_values) if key else None
