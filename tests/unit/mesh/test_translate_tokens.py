"""RequestAuthentications become Envoy's jwt_authn, by ECDS; PeerAuthentications decide what a port takes."""

from __future__ import annotations

from typing import Any

import pytest

from mlmesh_local.envoy_types import EXTENSIONS
from mlmesh_local.snapshot import build_snapshots
from mlmesh_local.translate.authorization.matchers import JWT_FILTER
from mlmesh_local.translate.view import View
from tests.support.mesh_world import Told, resource, world

KEYS = '{"keys": []}'
ONE = f"{{issuer: one, jwks: '{KEYS}'}}"
TWO = f"{{issuer: two, jwks: '{KEYS}'}}"
MISSING: dict[str, Any] = {"allow_missing": {}}


def tokens(rules: str, *, name: str = "it", namespace: str = "", more: str = "") -> str:
    return resource("RequestAuthentication", f"{{jwtRules: [{rules}]{more}}}", name=name, namespace=namespace)


def jwt(*texts: str, instance: str = "server-v1") -> dict[str, Any]:
    """Configuration of the filter, without its type."""
    found = dict(Told(instance, *texts).extensions[JWT_FILTER]["typed_config"])
    del found["@type"]
    return found


def provider(text: str, instance: str = "server-v1") -> dict[str, Any]:
    (found,) = jwt(tokens(text), instance=instance)["providers"].values()
    return dict(found)


def requirement(*texts: str) -> dict[str, Any]:
    (rule,) = jwt(*texts)["rules"]
    assert rule["match"] == {"prefix": "/"}
    return dict(rule["requires"])


def test_without_rules_every_request_passes() -> None:
    assert jwt() == {}
    assert jwt(tokens("")) == {}


def test_one_issuer_is_an_alternative_to_no_token() -> None:
    assert requirement(tokens(ONE)) == {"requires_any": {"requirements": [{"provider_name": "origins-0"}, MISSING]}}
    assert jwt(tokens(ONE))["bypass_cors_preflight"] is True


def test_several_issuers_in_one_policy_or_in_two() -> None:
    each = [{"requires_any": {"requirements": [{"provider_name": f"origins-{n}"}, MISSING]}} for n in (0, 1)]
    any_of = [{"provider_name": "origins-0"}, {"provider_name": "origins-1"}]
    expected = {"requires_any": {"requirements": [*any_of, {"requires_all": {"requirements": each}}]}}
    for texts in ((tokens(f"{TWO}, {ONE}"),), (tokens(TWO), tokens(ONE, name="too", namespace="istio-system"))):
        assert requirement(*texts) == expected
        issuers = [found["issuer"] for _, found in sorted(jwt(*texts)["providers"].items())]
        assert issuers == ["one", "two"]


def test_every_field_of_a_rule() -> None:
    found = provider(
        f"{{issuer: one, audiences: [a], jwks: '{KEYS}', fromHeaders: [{{name: x, prefix: 'y '}}, {{name: z}}],"
        " fromParams: [p], fromCookies: [c], outputPayloadToHeader: out, forwardOriginalToken: true, timeout: 1s,"
        " outputClaimToHeaders: [{header: x-sub, claim: sub}], spaceDelimitedClaims: [groups, scope]}"
    )
    assert found == {
        "issuer": "one",
        "audiences": ["a"],
        "local_jwks": {"inline_string": KEYS},
        "from_headers": [{"name": "x", "value_prefix": "y "}, {"name": "z"}],
        "from_params": ["p"],
        "from_cookies": ["c"],
        "forward": True,
        "forward_payload_header": "out",
        "claim_to_headers": [{"header_name": "x-sub", "claim_name": "sub"}],
        "payload_in_metadata": "payload",
        "normalize_payload_in_metadata": {"space_delimited_claims": ["groups", "permission", "scope"]},
    }


def test_only_gateways_choose_the_route_again() -> None:
    assert "clear_route_cache" not in provider(ONE)
    assert provider(ONE, "gateway")["clear_route_cache"] is True


def test_which_workloads_a_policy_is_for() -> None:
    assert jwt(tokens(ONE, more=", selector: {matchLabels: {version: v2}}")) == {}
    assert jwt(tokens(ONE, namespace="other")) == {}
    assert jwt(tokens(ONE, namespace="istio-system"))
    target = ", targetRefs: [{group: gateway.networking.k8s.io, kind: Gateway, name: x}]"
    assert jwt(tokens(ONE, more=target)) == {}


def test_tokens_change_filters_and_nothing_else() -> None:
    before, after = (build_snapshots(world(*texts))["server-v1"] for texts in ((), (tokens(ONE),)))
    for type_url, named in before.resources.items():
        assert (named == after.resources[type_url]) is (type_url != EXTENSIONS)


# Scope, mode of the workload's port 9090 and of its other ports.
MODES = {
    (): "PERMISSIVE",
    ("mesh STRICT",): "STRICT",
    ("mesh STRICT", "namespace DISABLE"): "DISABLE",
    ("mesh STRICT", "namespace UNSET"): "STRICT",
    ("namespace STRICT", "workload PERMISSIVE"): "PERMISSIVE",
    ("namespace STRICT", "workload UNSET"): "STRICT",
    ("namespace STRICT", "elsewhere DISABLE"): "STRICT",
    ("mesh UNSET",): "PERMISSIVE",
    ("mesh STRICT", "port DISABLE"): "DISABLE",
    ("mesh STRICT", "port UNSET"): "STRICT",
}
WHERE = {
    "mesh": ("istio-system", ""),
    "namespace": ("mlmesh", ""),
    "workload": ("mlmesh", "selector: {matchLabels: {app: server}}, "),
    "elsewhere": ("other", "selector: {matchLabels: {app: server}}, "),
}


@pytest.mark.parametrize("texts", MODES)
def test_the_nearest_peer_authentication_that_says_something_wins(texts: tuple[str, ...]) -> None:
    documents: list[str] = []
    for text in texts:
        scope, mode = text.split()
        if scope == "port":
            spec = f"{{{WHERE['workload'][1]}portLevelMtls: {{9090: {{mode: {mode}}}}}}}"
            documents.append(resource("PeerAuthentication", spec, name="port", namespace="mlmesh"))
            continue
        namespace, selector = WHERE[scope]
        spec = f"{{{selector}mtls: {{mode: {mode}}}}}"
        documents.append(resource("PeerAuthentication", spec, name=scope, namespace=namespace))
    view = View(world(*documents))
    assert view.mtls_mode("mlmesh", {"app": "server"}, 9090) == MODES[texts]


def test_there_are_no_policies_of_workloads_in_the_root_namespace() -> None:
    spec = "{selector: {matchLabels: {app: server}}, mtls: {mode: STRICT}, portLevelMtls: {1: {mode: DISABLE}}}"
    view = View(world(resource("PeerAuthentication", spec, namespace="istio-system")))
    for namespace in ("istio-system", "mlmesh"):
        assert view.mtls_mode(namespace, {"app": "server"}, 1) == "PERMISSIVE"
