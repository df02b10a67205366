"""Envoy's JWT filter: who issued a token, for whom, until when, and whether its signature is good.

Keys that are only at an address are not fetched: what depends on them is said so.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from mlmesh_local.envoy_types import Json
from mlmesh_local.explain.requests import Request
from mlmesh_local.explain.routing import route_mismatch
from mlmesh_local.explain.signatures import decoded, is_signed
from mlmesh_local.explain.strings import query_of

METADATA = "envoy.filters.http.jwt_authn"
"""Where the filter leaves claims."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenResult:
    """Whether the filter lets the request pass, why, what it leaves for others, and which provider took the token."""

    allowed: bool
    why: str
    metadata: dict[str, Any]
    provider: str = ""
    code: str = "UNAUTHENTICATED"
    """How the call ends when it may not pass."""


def authenticate(config: Json, request: Request, *, now_s: float) -> TokenResult:
    """The JWT filter's answer. `now_s` is seconds since 1970, for the tokens' times."""
    for rule in config.get("rules", ()):
        if route_mismatch(rule.get("match", {}), request):
            continue
        requirement = rule.get("requires")
        if requirement is None:
            named = rule.get("requirement_name", "")
            requirement = config.get("requirement_map", {}).get(named)
        if requirement is None:
            return TokenResult(allowed=True, why="no token is asked for", metadata={})
        return _meets(requirement, config.get("providers", {}), request, now_s)
    return TokenResult(allowed=True, why="no rule of the filter is about this request", metadata={})


def _meets(requirement: Json, providers: Json, request: Request, now_s: float) -> TokenResult:
    if "requires_any" in requirement:
        results = _each(requirement["requires_any"], providers, request, now_s)
        accepted = next((result for result in results if result.allowed and result.provider), None)
        return accepted or next((r for r in results if r.allowed), None) or _first_refusal(results)
    if "requires_all" in requirement:
        results = _each(requirement["requires_all"], providers, request, now_s)
        refused = [result for result in results if not result.allowed]
        merged = {key: value for result in results for key, value in result.metadata.items()}
        return refused[0] if refused else TokenResult(allowed=True, why=results[0].why, metadata=merged)
    if "allow_missing" in requirement:
        missing = not any(True for provider in providers.values() for _ in _tokens(provider, request))
        why = "no token came, and none is demanded here" if missing else "a token came that no provider accepts"
        return TokenResult(allowed=missing, why=why, metadata={})
    if "allow_missing_or_failed" in requirement:
        return TokenResult(allowed=True, why="tokens are not demanded", metadata={})
    named = requirement.get("provider_and_audiences", requirement)
    provider = providers.get(str(named.get("provider_name", "")), {})
    audiences = named.get("audiences") or provider.get("audiences", ())
    return _of_provider(provider, audiences, request, now_s)


def _each(requirements: Json, providers: Json, request: Request, now_s: float) -> list[TokenResult]:
    return [_meets(one, providers, request, now_s) for one in requirements.get("requirements", ())]


def _first_refusal(results: list[TokenResult]) -> TokenResult:
    return results[0] if results else TokenResult(allowed=False, why="no token is accepted", metadata={})


def _of_provider(provider: Json, audiences: Any, request: Request, now_s: float) -> TokenResult:
    issuer = str(provider.get("issuer", ""))
    why = f"no token of {issuer} came"
    for token in _tokens(provider, request):
        claims = claims_of(token)
        why = _refusal(claims, issuer, audiences, now_s)
        keys = provider.get("local_jwks", {}).get("inline_string")
        if not why and keys is not None and not is_signed(token, str(keys)):
            why = "no key of the issuer signed the token"
        if not why and claims is not None:
            found = f"a token of {issuer}" + ("" if keys is not None else ", if its signature is good")
            name = provider.get("payload_in_metadata")
            metadata = {str(name): _normal(claims, provider)} if name else {}
            return TokenResult(allowed=True, why=found, metadata=metadata, provider=issuer)
    # Envoy tells a token for others from one that is not valid.
    code = "PERMISSION_DENIED" if "is for" in why else "UNAUTHENTICATED"
    return TokenResult(allowed=False, why=why, metadata={}, provider=issuer, code=code)


def _normal(claims: dict[str, Any], provider: Json) -> dict[str, Any]:
    """Claims as filters see them: texts of several words as lists, where the provider says so."""
    split = provider.get("normalize_payload_in_metadata", {}).get("space_delimited_claims", ())
    return {
        name: value.split(" ") if name in split and isinstance(value, str) else value for name, value in claims.items()
    }


def _refusal(claims: dict[str, Any] | None, issuer: str, audiences: Any, now_s: float) -> str:
    if claims is None:
        return "the token is no JWT"
    if issuer and claims.get("iss") != issuer:
        return f'the token is of "{claims.get("iss", "")}", not of "{issuer}"'
    have = claims.get("aud", [])
    have = [have] if isinstance(have, str) else have
    if audiences and not set(audiences) & set(have):
        return f"the token is for {', '.join(have) or 'nobody'}, not for {', '.join(audiences)}"
    try:
        expires, begins = float(claims.get("exp", now_s)), float(claims.get("nbf", now_s))
    except (TypeError, ValueError):
        return "the token's times are no numbers"
    # Envoy allows for clocks that are a minute apart.
    if expires + 60 < now_s:
        return "the token has expired"
    return "the token is not valid yet" if begins - 60 > now_s else ""


def claims_of(token: str) -> dict[str, Any] | None:
    """The claims of a JWT, unverified; None for what is none."""
    parts = token.split(".")
    if len(parts) != 3:
        return None
    try:
        claims = json.loads(decoded(parts[1]))
    except ValueError:
        return None
    return claims if isinstance(claims, dict) else None


def _tokens(provider: Json, request: Request) -> Iterator[str]:
    headers = provider.get("from_headers", ())
    if not headers and not provider.get("from_params") and not provider.get("from_cookies"):
        headers = ({"name": "Authorization", "value_prefix": "Bearer "},)
        token = query_of(request.path).get("access_token")
        if token:
            yield token
    for header in headers:
        value = request.headers.get(str(header.get("name", "")).lower(), "")
        prefix = str(header.get("value_prefix", ""))
        if value and value.startswith(prefix):
            yield value[len(prefix) :].strip()
    for name in provider.get("from_params", ()):
        if name in query_of(request.path):
            yield query_of(request.path)[name]
    cookies = dict(part.strip().partition("=")[::2] for part in request.headers.get("cookie", "").split(";"))
    yield from (cookies[name] for name in provider.get("from_cookies", ()) if name in cookies)
