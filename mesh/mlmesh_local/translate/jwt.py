"""RequestAuthentications as Envoy's jwt_authn, by ECDS. The shape is istiod's (pilot/pkg/security/authn)."""

from __future__ import annotations

from mlmesh_local.envoy_types import Json
from mlmesh_local.model import ProxyNode
from mlmesh_local.resources.model import JwtRule, RequestAuthentication
from mlmesh_local.translate.authorization.matchers import JWT_FILTER, JWT_PAYLOAD
from mlmesh_local.translate.authorization.policies import attached
from mlmesh_local.translate.discovered import discovered, extension
from mlmesh_local.translate.view import View

JWT_MESSAGE = "envoy.extensions.filters.http.jwt_authn.v3.JwtAuthentication"
_SPACE_DELIMITED = ("permission", "scope")

_MODULUS = (
    "1NGCmrMys4hGfvDHXygmmGMetgfSHv1R4y6bkoOlKX9Uzt1E05AWfIGz3bYrX-CwaM8QOlqPv2uyYyfO8oxFnl4ricUdhHsemT0S"
    "LTDjRxQBYc-XvZsk7M01-7MPHQHQoG7cRsDT3HL1IlZfLeFEyPj-s926ZqC5hmVheGYz4XEi3mR-dqX3TuAT4SrrwD4X6f4JTl3p"
    "Kx_z-T7lR35GQFgTVnRRe38nx82DEqFLO7Z-5-UGVX-FMKVDkWzbBpP7ZSbRsSZiW6PSGbCn7V2770Ne8g-Qx5qUhHjOs4gNG4Pl"
    "eFywl58OAAAA_bqSibsNGllyVFTUJWXmqTAFUs6Jkw"
)
NO_KEYS = f'{{"keys":[{{"kty":"RSA","e":"AQAB","n":"{_MODULUS}"}}]}}'
"""A key set of one key whose private half was thrown away when it was made: no token can be valid for it."""


def jwt_filter() -> Json:
    """The filter of a listener that verifies tokens; without rules it lets all pass."""
    return discovered(JWT_FILTER, JWT_MESSAGE)


def jwt_extensions(view: View, proxy: ProxyNode) -> dict[str, Json]:
    """The filter's configuration. A token that is there must be valid; that there is one is for policies to demand."""
    rules = jwt_rules(view, proxy)
    if not rules:
        return {JWT_FILTER: extension(JWT_FILTER, JWT_MESSAGE)}
    # As in Istio: on gateways, where routes may match claims, the route is chosen again after verification.
    clear = proxy.kind == "gateway"
    names = [f"origins-{index}" for index in range(len(rules))]
    providers = {name: _provider(view, rule, clear=clear) for name, rule in zip(names, rules, strict=True)}
    config: Json = {
        "providers": providers,
        "rules": [{"match": {"prefix": "/"}, "requires": _requirement(names)}],
        "bypass_cors_preflight": True,
    }
    return {JWT_FILTER: extension(JWT_FILTER, JWT_MESSAGE, config)}


def jwt_rules(view: View, proxy: ProxyNode) -> list[JwtRule]:
    """Rules of all policies that apply to a proxy, by issuer."""
    own, root = proxy.namespace, view.world.root_namespace
    policies = attached(view.resources.specs(RequestAuthentication), view, proxy)
    # Istio asks the workload's namespace first here, and the root namespace first for AuthorizationPolicies.
    policies.sort(key=lambda policy: own != root and policy.meta.namespace == root)
    return sorted((rule for policy in policies for rule in policy.rules), key=lambda rule: rule.issuer)


def _requirement(names: list[str]) -> Json:
    missing: Json = {"allow_missing": {}}
    each: list[Json] = [{"requires_any": {"requirements": [{"provider_name": name}, missing]}} for name in names]
    if len(each) == 1:
        return each[0]
    # Any of them, for tokens of several issuers in one place; else each token that is there must be valid.
    any_of: list[Json] = [{"provider_name": name} for name in names]
    return {"requires_any": {"requirements": [*any_of, {"requires_all": {"requirements": each}}]}}


def _provider(view: View, rule: JwtRule, *, clear: bool) -> Json:
    delimited = sorted({*_SPACE_DELIMITED, *rule.space_delimited_claims})
    keys = rule.jwks or view.world.key_sets.get(key_source(rule)) or NO_KEYS
    provider: Json = {
        "forward": rule.forward,
        "payload_in_metadata": JWT_PAYLOAD,
        "normalize_payload_in_metadata": {"space_delimited_claims": delimited},
        "local_jwks": {"inline_string": keys},
    }
    if clear:
        provider["clear_route_cache"] = True
    optional: Json = {
        "issuer": rule.issuer,
        "audiences": list(rule.audiences),
        "forward_payload_header": rule.payload_header,
        "claim_to_headers": [{"header_name": header, "claim_name": claim} for header, claim in rule.claim_headers],
        "from_headers": [
            {"name": name, "value_prefix": prefix} if prefix else {"name": name} for name, prefix in rule.from_headers
        ],
        "from_params": list(rule.from_params),
        "from_cookies": list(rule.from_cookies),
    }
    provider.update({name: value for name, value in optional.items() if value})
    return provider


def key_source(rule: JwtRule) -> str:
    """Where the keys of a rule are fetched: their address, or that of the issuer's OpenID configuration."""
    return rule.jwks_uri or f"{rule.issuer.removesuffix('/')}/.well-known/openid-configuration"
