"""Attributes that policies compare: their names in sources, operations and conditions, and what their values may be.

The checks are Istio's own (pkg/config/security/security.go): what passes here passes there, and the other way round.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Mapping

Check = tuple[Callable[[str], bool], str]
"""Whether a value is valid, and what it should be in words."""

SERVICE_ACCOUNTS_MAX = 16
SERVICE_ACCOUNT_CHARACTERS_MAX = 320
_TEMPLATES = ("{*}", "{**}")
_LITERAL = re.compile(r"^[a-zA-Z0-9\-._~%!$&'()+,;:@=]+\Z")
_PORT_MAX = 65535


def is_template(path: str) -> bool:
    """Whether a path has `{*}` or `{**}` in it."""
    return any(template in path for template in _TEMPLATES)


def _any(text: str) -> bool:
    return bool(text)


def _is_port(text: str) -> bool:
    return text.isascii() and text.isdigit() and int(text) <= _PORT_MAX


def _is_block(text: str) -> bool:
    address, slash, length = text.partition("/")
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return False
    if not slash:
        return True
    plain = length.isascii() and length.isdigit() and (length == "0" or not length.startswith("0"))
    return plain and int(length) <= parsed.max_prefixlen and "%" not in address


def _is_wildcard(text: str) -> bool:
    """At most one "*", at the start or the end."""
    return text.count("*") == 0 or (text.count("*") == 1 and (text.startswith("*") or text.endswith("*")))


def _is_trust_domain(text: str) -> bool:
    return _is_wildcard(text) and "/" not in text


def _is_service_account(text: str) -> bool:
    return (
        len(text) <= SERVICE_ACCOUNT_CHARACTERS_MAX
        and "*" not in text
        and text.count("/") <= 1
        and all(text.split("/"))
    )


def _is_path(text: str) -> bool:
    """`{*}` stands for one segment, `{**}` for any number and is the last of them; braces mean nothing else."""
    ended = False
    for segment in text.strip("/").split("/"):
        if segment in _TEMPLATES:
            if ended:
                return False
            ended = segment == "{**}"
        elif "{" in segment or "}" in segment or (is_template(text) and not _LITERAL.match(segment)):
            return False
    return True


ANY: Check = (_any, "a value")
BLOCK: Check = (_is_block, "an IP address or block")
PORT: Check = (_is_port, "a port number in quotes, 0 to 65535")
WILDCARD: Check = (_is_wildcard, 'a value with at most one "*", at its start or end')
TRUST_DOMAIN: Check = (_is_trust_domain, 'a trust domain, with at most one "*" at its start or end, and no "/"')
SERVICE_ACCOUNT: Check = (_is_service_account, "[NAMESPACE/]ACCOUNT, without wildcards")
PATH: Check = (
    _is_path,
    'a path: "{*}" is one segment, "{**}" any number and the last of them, and braces mean nothing else',
)

# In the order in which Istio compares them (pilot/pkg/security/authz/model/model.go).
SOURCE: Mapping[str, tuple[str, Check]] = {
    "principals": ("source.principal", ANY),
    "requestPrincipals": ("request.auth.principal", ANY),
    "serviceAccounts": ("source.serviceAccount", SERVICE_ACCOUNT),
    "trustDomains": ("source.trustDomain", TRUST_DOMAIN),
    "namespaces": ("source.namespace", ANY),
    "remoteIpBlocks": ("remote.ip", BLOCK),
    "ipBlocks": ("source.ip", BLOCK),
}
"""Field of `from.source`, the attribute, a check of its values."""

OPERATION: Mapping[str, tuple[str, Check]] = {
    "hosts": ("host", ANY),
    "methods": ("method", ANY),
    "paths": ("path", PATH),
    "ports": ("destination.port", PORT),
}
"""Field of `to.operation`, the attribute, a check of its values."""

CONDITIONS: Mapping[str, Check] = {
    "source.ip": BLOCK,
    "remote.ip": BLOCK,
    "source.namespace": ANY,
    "source.serviceAccount": SERVICE_ACCOUNT,
    "source.principal": ANY,
    "source.trustDomain": WILDCARD,
    "request.auth.principal": ANY,
    "request.auth.audiences": ANY,
    "request.auth.presenter": ANY,
    "destination.ip": BLOCK,
    "destination.port": PORT,
    "connection.sni": ANY,
}
KEYED = ("request.headers", "request.auth.claims", "experimental.envoy.filters.")
"""Attributes whose names end with a key in brackets: `request.headers[x-role]`."""

REPLACED = {
    "destination.namespace": "it is replaced by the namespace of the policy",
    "destination.labels": "it is replaced by the selector",
    "destination.name": "only the old v1alpha1 policies knew it",
    "destination.user": "only the old v1alpha1 policies knew it",
}
"""Attributes of older versions of Istio."""

# pkg/config/validation/validation.go: an authorizer is asked before tokens and peers are looked at.
NOT_WITH_CUSTOM = ("source.namespace", "source.serviceAccount", "source.trustDomain", "source.principal")


def condition_check(key: str) -> tuple[Check | None, str]:
    """The check of a condition's values; or None, and what is wrong with its key."""
    if key in CONDITIONS:
        return CONDITIONS[key], ""
    for prefix in KEYED:
        if key.startswith(prefix):
            name, bracket, rest = key.partition("[")
            # Istio skips the whole rule when the name before the brackets is another one.
            whole = prefix.endswith(".") or name == prefix
            if bracket and whole and rest.endswith("]") and len(rest) > 1:
                return ANY, ""
            return None, f'"{key}" should have the form {prefix}{"NAME" if prefix.endswith(".") else ""}[KEY]'
    for old, why in REPLACED.items():
        if key == old or key.startswith(f"{old}["):
            return None, f'"{key}" is no attribute any more: {why}'
    known = ", ".join([*CONDITIONS, *(f"{prefix}[...]" for prefix in KEYED)])
    return None, f'"{key}" is no attribute; use one of {known}'
