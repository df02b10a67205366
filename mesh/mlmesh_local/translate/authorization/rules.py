"""A rule of a policy as one of Envoy's RBAC policies: permissions (what) and principals (who).

Order and nesting are istiod's (pilot/pkg/security/authz/model), so that both can be compared.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from mlmesh_local.envoy_types import Json
from mlmesh_local.resources.model import PolicyAction, PolicyRule, Values
from mlmesh_local.translate.authorization import matchers
from mlmesh_local.translate.authorization.trust_domains import expanded, with_aliases

NEVER: Json = {
    "permissions": [{"not_rule": {"any": True}}],
    "principals": [{"not_id": {"any": True}}],
}
_SPIFFE = "spiffe://"
_HEADERS = "request.headers"
_CLAIMS = "request.auth.claims"
_FILTERS = "experimental.envoy.filters."
_ONLY_OPERATIONS = frozenset({"host", "method", "path"})


class HttpOnlyError(Exception):
    """A TCP connection has no such attribute."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Frame:
    """Where a rule is generated for: namespace and action of its policy, names of the trust domain, TCP or HTTP."""

    namespace: str
    action: PolicyAction
    domains: tuple[str, ...]
    tcp: bool


def generate(rule: PolicyRule, frame: Frame) -> Json | None:
    """The policy; None for a rule of an ALLOW policy that needs HTTP where there is only TCP: it never matches.

    For other actions what needs HTTP is left out there, so that such a rule matches more, as in Istio.
    """
    on_permission = [c for c in rule.conditions if _is_permission(c.key)]
    on_principal = [c for c in rule.conditions if not _is_permission(c.key)]
    try:
        permissions = [_all_of([*o, *on_permission], frame, _PERMISSION) for o in rule.operations or ((),)]
        principals = [_all_of([*s, *on_principal], frame, _PRINCIPAL) for s in rule.sources or ((),)]
    except HttpOnlyError:
        return None
    return {"permissions": permissions, "principals": principals}


def _is_permission(key: str) -> bool:
    known = ("host", "method", "path", "destination.ip", "destination.port", "connection.sni")
    return key in known or key.startswith(_FILTERS)


# Names of "and", "or" and "not" in Envoy's Permission and Principal.
_Words = tuple[str, str, str, str]
_PERMISSION: _Words = ("and_rules", "or_rules", "not_rule", "rules")
_PRINCIPAL: _Words = ("and_ids", "or_ids", "not_id", "ids")


def _all_of(items: Sequence[Values], frame: Frame, words: _Words) -> Json:
    all_word, _, not_word, list_word = words
    parts: list[Json] = []
    for item in items:
        for values, negated in ((item.values, False), (item.not_values, True)):
            match = _any_of(item.key, values, frame, words) if values else None
            if match is not None:
                parts.append({not_word: match} if negated else match)
    return {all_word: {list_word: parts or [{"any": True}]}}


def _any_of(key: str, values: Sequence[str], frame: Frame, words: _Words) -> Json | None:
    _, any_word, _, list_word = words
    if frame.tcp and _is_http(key):
        if frame.action == "ALLOW":
            raise HttpOnlyError
        return None
    whole = _whole(key, values)
    if whole is not None:
        return whole
    found = [_one(key, value, frame) for value in _named(key, values, frame)]
    return {any_word: {list_word: found}}


def _is_http(key: str) -> bool:
    return key in _ONLY_OPERATIONS or key.startswith((_HEADERS, "request.auth."))


def _named(key: str, values: Sequence[str], frame: Frame) -> Sequence[str]:
    if key == "source.principal":
        return with_aliases(values, frame.domains)
    return expanded(values, frame.domains) if key == "source.trustDomain" else values


# Attributes of which all values make one matcher.


def _whole(key: str, values: Sequence[str]) -> Json | None:
    if key == "request.auth.principal":
        found = [_request_principal(value) for value in values]
        return found[0] if len(found) == 1 else {"or_ids": {"ids": found}}
    if key == "request.auth.audiences":
        return matchers.claim_values(("aud",), values)
    if key == "request.auth.presenter":
        return matchers.claim_values(("azp",), values)
    if key.startswith(_CLAIMS):
        return matchers.claim_values(tuple(_claims(key.removeprefix(_CLAIMS))), values)
    if key.startswith(_FILTERS):
        name, _, rest = key.removeprefix("experimental.").removesuffix("]").partition("[")
        return matchers.filter_metadata(name, rest, values)
    return None


def _claims(text: str) -> Iterator[str]:
    """`[a][b]` are nested claims; what is not of that form is the name of one."""
    inner = text[1:-1]
    names = inner.split("][")
    yield from names if not any("[" in name or "]" in name for name in names) else [inner]


def _request_principal(value: str) -> Json:
    """ "ISSUER/SUBJECT", either with a wildcard at the value's end."""
    # The issuer may be an address, with slashes of its own.
    issuer, slash, subject = value.rpartition("/")
    if not slash:
        issuer, subject = value, ""
    anything = matchers.ANY_TEXT
    if value == "*":
        of_issuer, of_subject = anything, anything
    elif value.startswith("*"):
        if slash:
            of_issuer = anything if issuer == "*" else {"suffix": issuer[1:]}
            of_subject = {"exact": subject}
        else:
            of_issuer, of_subject = anything, {"suffix": value[1:]}
    elif value.endswith("*"):
        of_issuer = {"exact": issuer} if slash else {"prefix": value[:-1]}
        of_subject = anything if subject == "*" or not slash else {"prefix": subject[:-1]}
    else:
        of_issuer, of_subject = {"exact": issuer}, {"exact": subject}
    ids = [matchers.claim_text("iss", of_issuer), matchers.claim_text("sub", of_subject)]
    return {"and_ids": {"ids": ids}}


# Attributes of which each value makes a matcher.


def _one(key: str, value: str, frame: Frame) -> Json:
    if key == "source.principal":
        return matchers.authenticated(matchers.pattern(value, _SPIFFE))
    if key == "source.serviceAccount":
        return matchers.authenticated({"safe_regex": {"regex": _service_account(value, frame.namespace)}})
    if key.startswith(_HEADERS):
        return {"header": matchers.header(key.removeprefix(_HEADERS)[1:-1], value)}
    return _ONE[key](value)


def _service_account(value: str, own_namespace: str) -> str:
    namespace, slash, account = value.partition("/")
    if not slash:
        namespace, account = own_namespace, value
    return f"spiffe://.+/ns/{matchers.quote(namespace)}/(.+/|)sa/{matchers.quote(account)}(/.+)?"


def _namespace(value: str) -> Json:
    literal = ".*".join(matchers.quote(part) for part in value.split("*"))
    return matchers.authenticated({"safe_regex": {"regex": f".*/ns/{literal}/.*"}})


def _trust_domain(value: str) -> Json:
    if value == "*":
        match: Json = {"prefix": _SPIFFE}
    elif "*" not in value:
        match = {"prefix": f"{_SPIFFE}{value}/"}
    else:
        before, _, after = value.partition("*")
        match = {"safe_regex": {"regex": f"{_SPIFFE}{matchers.quote(before)}[^/]*{matchers.quote(after)}/.*"}}
    return matchers.authenticated(match)


_ONE: dict[str, Callable[[str], Json]] = {
    "host": lambda value: {"header": matchers.header(":authority", value, ignore_case=True)},
    "method": lambda value: {"header": matchers.header(":method", value)},
    "path": matchers.path,
    "destination.port": lambda value: {"destination_port": int(value)},
    "destination.ip": lambda value: {"destination_ip": matchers.block(value)},
    "connection.sni": lambda value: {"requested_server_name": matchers.pattern(value)},
    "source.ip": lambda value: {"direct_remote_ip": matchers.block(value)},
    "remote.ip": lambda value: {"remote_ip": matchers.block(value)},
    "source.namespace": _namespace,
    "source.trustDomain": _trust_domain,
}
