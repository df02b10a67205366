"""How one value of a policy is compared, in Envoy's words. Shapes are istiod's (pilot/pkg/security/authz/matcher)."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Sequence

from mlmesh_local.envoy_types import Json, typed
from mlmesh_local.resources.security.attributes import is_template

JWT_FILTER = "envoy.filters.http.jwt_authn"
JWT_PAYLOAD = "payload"
_URI_TEMPLATE = "envoy.extensions.path.match.uri_template.v3.UriTemplateMatchConfig"
ANY_TEXT: Json = {"safe_regex": {"regex": ".+"}}


def pattern(value: str, prefix: str = "") -> Json:
    """Istio's "*", "*suffix", "prefix*" and exact values as StringMatcher, after a fixed prefix."""
    if value == "*":
        return ANY_TEXT
    if value.startswith("*"):
        rest = value[1:]
        return {"safe_regex": {"regex": f"{prefix}.*{quote(rest)}"}} if prefix else {"suffix": rest}
    if value.endswith("*"):
        return {"prefix": prefix + value[:-1]}
    return {"exact": prefix + value}


def quote(text: str) -> str:
    """Text that a regular expression takes as it is. Go's QuoteMeta: Python's own also escapes what needs none."""
    return re.sub(r"([\\.+*?()|\[\]{}^$])", r"\\\1", text)


def header(name: str, value: str, *, ignore_case: bool = False) -> Json:
    """HeaderMatcher; "*" is that the header is there."""
    if value == "*":
        return {"name": name, "present_match": True}
    match = pattern(value)
    return {"name": name, "string_match": {**match, "ignore_case": True} if ignore_case else match}


def block(value: str) -> Json:
    """CidrRange of an IP address or block."""
    address, slash, length = value.partition("/")
    parsed = ipaddress.ip_address(address)
    return {"address_prefix": str(parsed), "prefix_len": int(length) if slash else parsed.max_prefixlen}


def path(value: str) -> Json:
    """Permission for a path, or for a template of one."""
    if not is_template(value):
        return {"url_path": {"path": pattern(value)}}
    template = value.replace("{**}", "**").replace("{*}", "*")
    return {"uri_template": {"name": "uri-template", "typed_config": typed(_URI_TEMPLATE, {"path_template": template})}}


def authenticated(match: Json) -> Json:
    """Principal of a peer whose identity (the URI of its certificate) matches."""
    return {"authenticated": {"principal_name": match}}


def claim_text(claim: str, match: Json) -> Json:
    """Principal of a request whose token has a claim with such a text."""
    return {"metadata": _metadata(JWT_FILTER, (JWT_PAYLOAD, claim), {"string_match": match})}


def claim_values(claims: Sequence[str], values: Sequence[str]) -> Json:
    """Principal of a request whose token has such a value in a claim, be it a text or a list of texts."""
    match = any_value([{"string_match": pattern(value)} for value in values])
    either = {"or_match": {"value_matchers": [{"list_match": {"one_of": match}}, match]}}
    return {"metadata": _metadata(JWT_FILTER, (JWT_PAYLOAD, *claims), either)}


def filter_metadata(name: str, key: str, values: Sequence[str]) -> Json:
    """Permission by metadata that a filter left; a value in brackets is one of a list."""
    matches: list[Json] = []
    for value in values:
        if value.startswith("[") and value.endswith("]"):
            matches.append({"list_match": {"one_of": {"string_match": pattern(value.strip("[]"))}}})
        else:
            matches.append({"string_match": pattern(value)})
    return {"metadata": _metadata(name, (key,), any_value(matches))}


def any_value(matches: list[Json]) -> Json:
    """ValueMatcher for any of several."""
    return matches[0] if len(matches) == 1 else {"or_match": {"value_matchers": matches}}


def _metadata(name: str, keys: Sequence[str], value: Json) -> Json:
    return {"filter": name, "path": [{"key": key} for key in keys], "value": value}
