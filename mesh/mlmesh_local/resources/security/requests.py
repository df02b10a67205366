"""RequestAuthentication: https://istio.io/latest/docs/reference/config/security/request_authentication/."""

from __future__ import annotations

import re
from urllib.parse import urlsplit

from mlmesh_local.resources.fields import Fields
from mlmesh_local.resources.model import JwtRule, Meta, RequestAuthentication
from mlmesh_local.resources.security.keys import problem_of_keys
from mlmesh_local.resources.security.scope import selector, targets

RULES_MAX = 4096
URI_CHARACTERS_MAX = 2048
SPACE_DELIMITED_MAX = 64
_HEADER = re.compile(r"^[-_A-Za-z0-9]+\Z")


def parse_request_authentication(meta: Meta, spec: Fields) -> RequestAuthentication:
    """Read a RequestAuthentication's spec."""
    gateways = targets(spec)
    selected = selector(spec)
    rules = tuple(_rule(item) for item in spec.messages("jwtRules"))
    if len(rules) > RULES_MAX:
        spec.refuse("jwtRules", f"has more than {RULES_MAX} items")
    return RequestAuthentication(meta=meta, selector=selected, gateways=gateways, rules=rules)


def _rule(fields: Fields) -> JwtRule:
    with fields:
        issuer = fields.text("issuer")
        if fields.has("issuer") and not issuer:
            fields.refuse("issuer", "must not be empty; leave it out")
        uri = _key_set_uri(fields)
        jwks = fields.text("jwks")
        if jwks and (problem := problem_of_keys(jwks)):
            fields.refuse("jwks", problem)
        if not issuer and not uri and not fields.has("jwksUri"):
            fields.problems.add(fields.at, 'one of "issuer", "jwksUri" is required')
        delimited = fields.texts("spaceDelimitedClaims")
        if len(delimited) > SPACE_DELIMITED_MAX:
            fields.refuse("spaceDelimitedClaims", f"has more than {SPACE_DELIMITED_MAX} items")
        return JwtRule(
            issuer=issuer,
            audiences=fields.texts("audiences"),
            jwks=jwks,
            jwks_uri=uri,
            from_headers=tuple(_header(item) for item in fields.messages("fromHeaders")),
            from_params=fields.texts("fromParams"),
            from_cookies=fields.texts("fromCookies"),
            payload_header=fields.text("outputPayloadToHeader"),
            claim_headers=tuple(_claim_header(item) for item in fields.messages("outputClaimToHeaders")),
            forward=fields.boolean("forwardOriginalToken"),
            timeout_s=fields.duration_s("timeout"),
            space_delimited_claims=delimited,
        )


def _key_set_uri(fields: Fields) -> str:
    # The CustomResourceDefinition also knows the field by its old name.
    name = fields.one_of("jwksUri", "jwks_uri", "jwks")
    uri = fields.text("jwksUri") or fields.text("jwks_uri")
    fields.ignored("jwks_uri")
    if name not in ("jwksUri", "jwks_uri"):
        return ""
    if not 0 < len(uri) <= URI_CHARACTERS_MAX:
        fields.refuse(name, f"must have 1 to {URI_CHARACTERS_MAX} characters")
        return ""
    try:
        parts = urlsplit(uri)
        valid = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        valid = False
    if not valid:
        fields.refuse(name, f'"{uri}" is not an http:// or https:// address')
        return ""
    return uri


def _header(fields: Fields) -> tuple[str, str]:
    with fields:
        return fields.text("name", required=True), fields.text("prefix")


def _claim_header(fields: Fields) -> tuple[str, str]:
    with fields:
        header, claim = fields.text("header", required=True), fields.text("claim", required=True)
        if header and not _HEADER.match(header):
            fields.refuse("header", f'"{header}" is not a header name of letters, digits, "-" and "_"')
        return header, claim
