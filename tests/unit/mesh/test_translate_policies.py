"""AuthorizationPolicies become Envoy's RBAC on routes, with Istio's meaning."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from mlmesh_local.envoy_types import ROUTES
from mlmesh_local.resources import AuthorizationPolicy
from mlmesh_local.snapshot import SnapshotBuilder, build_snapshots
from mlmesh_local.translate.authorization import (
    ALLOW_FILTER,
    AUDIT_FILTER,
    AUTHORIZER_FILTER,
    CUSTOM_FILTER,
    DENY_FILTER,
    attached,
    network_checks,
)
from mlmesh_local.translate.authorization.matchers import JWT_FILTER
from mlmesh_local.translate.authorization.trust_domains import with_aliases
from mlmesh_local.translate.view import View
from tests.support.mesh_world import Told, resource, world

INBOUND = "inbound|8000||"


def policy(spec: str, name: str = "it", namespace: str = "") -> str:
    return resource("AuthorizationPolicy", spec, name=name, namespace=namespace)


def rbac(*texts: str, instance: str = "server-v1", filter_name: str = ALLOW_FILTER, **fields: Any) -> dict[str, Any]:
    """Rules of a filter; empty where it lets everything pass."""
    configuration = Told(instance, *texts, **fields).routes[INBOUND].get("typed_per_filter_config", {})
    found: dict[str, Any] = configuration.get(filter_name, {}).get("rbac", {}).get("rules", {})
    return found


SETTINGS = """
apiVersion: v1
kind: ConfigMap
metadata: {name: istio, namespace: istio-system}
data:
  mesh: |
    trustDomain: new
    trustDomainAliases: [old]
---
"""


def rule(text: str, settings: str = "", **fields: Any) -> dict[str, Any]:
    """The only rule of an ALLOW policy."""
    (found,) = rbac(policy(f"{{rules: [{text}]}}"), settings, **fields)["policies"].values()
    return dict(found)


def any_of(key: str, *values: Any) -> dict[str, Any]:
    words = {"permissions": ("or_rules", "rules"), "principals": ("or_ids", "ids")}[key]
    return {words[0]: {words[1]: list(values)}}


def template(text: str) -> dict[str, Any]:
    type_url = "type.googleapis.com/envoy.extensions.path.match.uri_template.v3.UriTemplateMatchConfig"
    return {"uri_template": {"name": "uri-template", "typed_config": {"@type": type_url, "path_template": text}}}


def principal(how: str, value: str) -> dict[str, Any]:
    match: Any = {"regex": value} if how == "safe_regex" else value
    return {"authenticated": {"principal_name": {how: match}}}


def test_without_policies_everything_passes() -> None:
    assert rbac() == {}


def test_allow_without_rules_allows_nothing() -> None:
    found = rbac(policy("{}"))
    assert found["action"] == "ALLOW"
    (never,) = found["policies"].values()
    assert never == {"permissions": [{"not_rule": {"any": True}}], "principals": [{"not_id": {"any": True}}]}


def test_an_empty_rule_allows_everything() -> None:
    anything = rule("{}")
    assert anything["permissions"] == [{"and_rules": {"rules": [{"any": True}]}}]
    assert anything["principals"] == [{"and_ids": {"ids": [{"any": True}]}}]


SOURCES = {
    "principals: [cluster.local/ns/mlmesh/sa/a]": principal("exact", "spiffe://cluster.local/ns/mlmesh/sa/a"),
    "principals: ['*']": principal("safe_regex", ".+"),
    "principals: [cluster.local/ns/mlmesh/*]": principal("prefix", "spiffe://cluster.local/ns/mlmesh/"),
    "principals: ['*/sa/a']": principal("safe_regex", "spiffe://.*/sa/a"),
    "namespaces: [ml.mesh]": principal("safe_regex", r".*/ns/ml\.mesh/.*"),
    "namespaces: ['ml*']": principal("safe_regex", ".*/ns/ml.*/.*"),
    "serviceAccounts: [a]": principal("safe_regex", "spiffe://.+/ns/mlmesh/(.+/|)sa/a(/.+)?"),
    "serviceAccounts: [other/a]": principal("safe_regex", "spiffe://.+/ns/other/(.+/|)sa/a(/.+)?"),
    "ipBlocks: [10.0.0.0/8]": {"direct_remote_ip": {"address_prefix": "10.0.0.0", "prefix_len": 8}},
    "remoteIpBlocks: ['2001:db8::/32']": {"remote_ip": {"address_prefix": "2001:db8::", "prefix_len": 32}},
    "trustDomains: [corp.example]": principal("prefix", "spiffe://corp.example/"),
    "trustDomains: ['*']": principal("prefix", "spiffe://"),
    "trustDomains: ['*.example']": principal("safe_regex", r"spiffe://[^/]*\.example/.*"),
    "ipBlocks: [10.1.2.3]": {"direct_remote_ip": {"address_prefix": "10.1.2.3", "prefix_len": 32}},
}


@pytest.mark.parametrize("text", SOURCES)
def test_sources(text: str) -> None:
    (found,) = rule(f"{{from: [{{source: {{{text}}}}}]}}")["principals"]
    assert found == {"and_ids": {"ids": [any_of("principals", SOURCES[text])]}}


OPERATIONS = {
    "paths: [/p.S/M]": {"url_path": {"path": {"exact": "/p.S/M"}}},
    "paths: [/p.S/*]": {"url_path": {"path": {"prefix": "/p.S/"}}},
    "paths: ['*/M']": {"url_path": {"path": {"suffix": "/M"}}},
    "paths: ['/{*}/M']": template("/*/M"),
    "paths: ['/p.S/{**}']": template("/p.S/**"),
    "methods: [POST]": {"header": {"name": ":method", "string_match": {"exact": "POST"}}},
    "hosts: [a.example]": {
        "header": {"name": ":authority", "string_match": {"exact": "a.example", "ignore_case": True}}
    },
    "ports: ['8000']": {"destination_port": 8000},
}


@pytest.mark.parametrize("text", OPERATIONS)
def test_operations(text: str) -> None:
    (found,) = rule(f"{{to: [{{operation: {{{text}}}}}]}}")["permissions"]
    assert found == {"and_rules": {"rules": [any_of("permissions", OPERATIONS[text])]}}


def claim(*path: str, value: dict[str, Any]) -> dict[str, Any]:
    keys = [{"key": "payload"}, *({"key": key} for key in path)]
    return {"metadata": {"filter": JWT_FILTER, "path": keys, "value": value}}


def text_claim(name: str, how: str, text: str) -> dict[str, Any]:
    match: Any = {"regex": text} if how == "safe_regex" else text
    return claim(name, value={"string_match": {how: match}})


def either(*values: dict[str, Any]) -> dict[str, Any]:
    """A claim that is such a text, or a list with one."""
    match = values[0] if len(values) == 1 else {"or_match": {"value_matchers": list(values)}}
    return {"or_match": {"value_matchers": [{"list_match": {"one_of": match}}, match]}}


ADMIN = {"string_match": {"exact": "admin"}}
REQUESTS = {
    "{key: 'request.auth.claims[role]', values: [admin]}": claim("role", value=either(ADMIN)),
    "{key: 'request.auth.claims[a][b.c]', values: [admin, '*']}": claim(
        "a", "b.c", value=either(ADMIN, {"string_match": {"safe_regex": {"regex": ".+"}}})
    ),
    "{key: request.auth.audiences, values: [admin]}": claim("aud", value=either(ADMIN)),
    "{key: request.auth.presenter, values: [admin]}": claim("azp", value=either(ADMIN)),
    "{key: request.auth.principal, values: ['https://a.example/x/subject']}": {
        "and_ids": {"ids": [text_claim("iss", "exact", "https://a.example/x"), text_claim("sub", "exact", "subject")]}
    },
    "{key: request.auth.principal, values: ['*']}": {
        "and_ids": {"ids": [text_claim("iss", "safe_regex", ".+"), text_claim("sub", "safe_regex", ".+")]}
    },
    "{key: request.auth.principal, values: ['*/s', '*suffix', 'issuer/*', 'pre*']}": {
        "or_ids": {
            "ids": [
                {"and_ids": {"ids": [text_claim("iss", *iss), text_claim("sub", *sub)]}}
                for iss, sub in (
                    (("safe_regex", ".+"), ("exact", "s")),
                    (("safe_regex", ".+"), ("suffix", "suffix")),
                    (("exact", "issuer"), ("safe_regex", ".+")),
                    (("prefix", "pre"), ("safe_regex", ".+")),
                )
            ]
        }
    },
}


@pytest.mark.parametrize("condition", REQUESTS)
def test_what_tokens_say(condition: str) -> None:
    (found,) = rule(f"{{when: [{condition}]}}")["principals"]
    assert found == {"and_ids": {"ids": [REQUESTS[condition]]}}


def test_metadata_of_other_filters() -> None:
    key = "experimental.envoy.filters.http.lua[kind]"
    (found,) = rule(f"{{when: [{{key: '{key}', values: ['[a]', b], notValues: [c]}}]}}")["permissions"]
    where = {"filter": "envoy.filters.http.lua", "path": [{"key": "kind"}]}
    of_list = {"list_match": {"one_of": {"string_match": {"exact": "a"}}}}
    any_match = {"or_match": {"value_matchers": [of_list, {"string_match": {"exact": "b"}}]}}
    assert found["and_rules"]["rules"] == [
        {"metadata": {**where, "value": any_match}},
        {"not_rule": {"metadata": {**where, "value": {"string_match": {"exact": "c"}}}}},
    ]


def test_not_forms_and_several_fields_are_all_demanded() -> None:
    (found,) = rule("{to: [{operation: {paths: [/a, /b], notPaths: [/b], methods: [POST]}}]}")["permissions"]
    kinds = [next(iter(part)) for part in found["and_rules"]["rules"]]
    assert sorted(kinds) == ["not_rule", "or_rules", "or_rules"]
    (source,) = rule("{from: [{source: {notPrincipals: [a/ns/b/sa/c]}}]}")["principals"]
    assert source["and_ids"]["ids"] == [{"not_id": any_of("principals", principal("exact", "spiffe://a/ns/b/sa/c"))}]


def test_several_sources_are_alternatives_and_conditions_go_with_each() -> None:
    found = rule(
        "{from: [{source: {namespaces: [a]}}, {source: {namespaces: [b]}}],"
        " when: [{key: 'request.headers[X-Role]', values: [admin, 'root*']},"
        " {key: destination.port, notValues: ['1']}]}"
    )
    assert len(found["principals"]) == 2
    for source in found["principals"]:
        assert source["and_ids"]["ids"][1] == any_of(
            "principals",
            {"header": {"name": "X-Role", "string_match": {"exact": "admin"}}},
            {"header": {"name": "X-Role", "string_match": {"prefix": "root"}}},
        )
    (permission,) = found["permissions"]
    assert permission["and_rules"]["rules"] == [{"not_rule": any_of("permissions", {"destination_port": 1})}]


def test_cluster_local_stands_for_the_trust_domain() -> None:
    (found,) = rule("{from: [{source: {principals: [cluster.local/ns/a/sa/b]}}]}", trust_domain="corp.example")[
        "principals"
    ]
    assert found["and_ids"]["ids"] == [any_of("principals", principal("exact", "spiffe://corp.example/ns/a/sa/b"))]


ALIASES = {
    # Principal, trust domain and aliases, what it stands for.
    ("cluster.local/ns/a/sa/b", "td"): ("td/ns/a/sa/b",),
    ("cluster.local/ns/a/sa/b", "td1", "td2"): ("td1/ns/a/sa/b", "td2/ns/a/sa/b"),
    ("td2/ns/a/sa/b", "td1", "td2"): ("td1/ns/a/sa/b", "td2/ns/a/sa/b"),
    ("other/ns/a/sa/b", "td1", "td2"): ("other/ns/a/sa/b",),
    ("*/ns/a/sa/b", "td1", "td2"): ("*/ns/a/sa/b",),
    ("*-td/ns/a/sa/b", "old-td", "new-td", "third"): ("*-td/ns/a/sa/b", "third/ns/a/sa/b"),
    ("*/sa/b", "td1", "td2"): ("*/sa/b",),
}


@pytest.mark.parametrize("names", ALIASES)
def test_aliases_of_the_trust_domain(names: tuple[str, ...]) -> None:
    assert with_aliases(names[:1], names[1:]) == ALIASES[names]


def test_aliases_come_from_the_settings_of_the_mesh() -> None:
    (found,) = rule("{from: [{source: {principals: [old/ns/a/sa/b], notTrustDomains: [old]}}]}", settings=SETTINGS)[
        "principals"
    ]
    both = any_of("principals", *(principal("exact", f"spiffe://{td}/ns/a/sa/b") for td in ("new", "old")))
    domains = any_of("principals", *(principal("prefix", f"spiffe://{td}/") for td in ("new", "old")))
    assert found["and_ids"]["ids"] == [both, {"not_id": domains}]


def test_which_workloads_a_policy_applies_to() -> None:
    assert rbac(policy("{selector: {matchLabels: {version: v1}}}"))
    assert not rbac(policy("{selector: {matchLabels: {version: v2}}}"))
    assert not rbac(policy("{}", namespace="other"))
    assert rbac(policy("{}", namespace="istio-system"))


def test_denials_are_a_filter_of_their_own() -> None:
    texts = (policy("{action: DENY, rules: [{}]}", name="never"), policy("{rules: [{}]}", name="ever"))
    assert list(rbac(*texts, filter_name=DENY_FILTER)["policies"]) == ["ns[mlmesh]-policy[never]-rule[0]"]
    assert list(rbac(*texts)["policies"]) == ["ns[mlmesh]-policy[ever]-rule[0]"]
    filters = [f["name"] for f in Told("server-v1").manager("127.64.1.1_8000")["http_filters"]]
    assert filters[:6] == [CUSTOM_FILTER, AUTHORIZER_FILTER, JWT_FILTER, AUDIT_FILTER, DENY_FILTER, ALLOW_FILTER]
    assert filters[-1] == "envoy.filters.http.router"


def test_a_policy_changes_routes_and_nothing_else() -> None:
    before, after = (build_snapshots(world(*texts))["server-v1"] for texts in ((), (policy("{}"),)))
    for type_url, named in before.resources.items():
        assert (named == after.resources[type_url]) is (type_url != ROUTES)
    changed = {name for name, item in before.resources[ROUTES].items() if after.resources[ROUTES][name] != item}
    assert changed == {INBOUND, "inbound|9090||"}


def test_target_refs_bind_to_gateways_of_the_gateway_api_only() -> None:
    target = "{group: gateway.networking.k8s.io, kind: Gateway, name: way-in}"
    texts = (policy(f"{{targetRefs: [{target}]}}"), policy(f"{{targetRef: {target}}}", name="older"))
    found = world(*texts)
    view = View(found)
    gateway = next(proxy for proxy in found.proxies if proxy.id == "gateway")
    labelled = replace(gateway, labels={"gateway.networking.k8s.io/gateway-name": "way-in"})
    names = [p.meta.name for p in attached(view.resources.specs(AuthorizationPolicy), view, labelled)]
    assert names == ["it", "older"]
    assert attached(view.resources.specs(AuthorizationPolicy), view, gateway) == []
    assert attached(view.resources.specs(AuthorizationPolicy), view, replace(labelled, namespace="other")) == []


def test_a_dry_run_is_a_shadow_and_audit_a_log() -> None:
    annotated = "{name: it, annotations: {istio.io/dry-run: 'true'}}"
    dry = policy("{action: DENY, rules: [{}]}").replace("{name: it}", annotated)
    configuration = Told("server-v1", dry, policy("{action: AUDIT, rules: [{}]}", name="log")).routes[INBOUND]
    deny = configuration["typed_per_filter_config"][DENY_FILTER]["rbac"]
    assert "rules" not in deny
    assert deny["shadow_rules_stat_prefix"] == "istio_dry_run_deny_"
    assert list(deny["shadow_rules"]["policies"]) == ["ns[mlmesh]-policy[it]-rule[0]"]
    assert configuration["typed_per_filter_config"][AUDIT_FILTER]["rbac"]["rules"]["action"] == "LOG"


def network(*texts: str) -> list[dict[str, Any]]:
    found = world(*texts)
    proxy = next(proxy for proxy in found.proxies if proxy.id == "server-v1")
    return [each["typed_config"] for each in network_checks(View(found), proxy)]


def test_on_tcp_ports_rules_of_http_never_allow() -> None:
    http = "{from: [{source: {namespaces: [a]}}], to: [{operation: {methods: [GET]}}]}"
    (allow,) = network(policy(f"{{rules: [{http}, {{from: [{{source: {{namespaces: [a]}}}}]}}]}}"))
    assert list(allow["rules"]["policies"]) == ["ns[mlmesh]-policy[it]-rule[1]"]
    (nothing,) = network(policy(f"{{rules: [{http}]}}"))
    assert nothing["rules"] == {"action": "ALLOW", "policies": {}}


def test_on_tcp_ports_denials_lose_their_attributes_of_http() -> None:
    text = "{to: [{operation: {methods: [GET], ports: ['1']}}], when: [{key: 'request.headers[a]', values: [b]}]}"
    (deny,) = network(policy(f"{{action: DENY, rules: [{text}]}}"))
    (found,) = deny["rules"]["policies"].values()
    assert found["permissions"] == [{"and_rules": {"rules": [any_of("permissions", {"destination_port": 1})]}}]
    assert found["principals"] == [{"and_ids": {"ids": [{"any": True}]}}]


AUTHORIZER = """
apiVersion: v1
kind: ConfigMap
metadata: {name: istio, namespace: istio-system}
data:
  mesh: |
    trustDomainAliases: [old]
    extensionProviders: [{name: ext, envoyExtAuthzGrpc: {service: server.mlmesh.svc.cluster.local, port: 9000}}]
---
"""


def test_what_is_kept_from_push_to_push_forgets_no_policy() -> None:
    keys = "https://keys.example/jwks"
    tokens = resource("RequestAuthentication", f"{{jwtRules: [{{issuer: a, jwksUri: '{keys}'}}]}}")
    ask = policy("{action: CUSTOM, provider: {name: ext}, rules: [{}]}")
    allow = policy("{rules: [{from: [{source: {principals: [cluster.local/ns/a/sa/b]}}]}]}", name="allow")
    builder = SnapshotBuilder()
    for texts, known in (
        ((), {}),
        ((ask,), {}),
        ((ask, AUTHORIZER), {}),
        ((ask, AUTHORIZER, allow), {}),
        ((AUTHORIZER.replace("old", "older"), allow, tokens), {}),
        ((allow, tokens), {keys: '{"keys": []}'}),
        ((ask.replace("ext", "another"), AUTHORIZER), {}),
        ((), {}),
    ):
        found = world(*texts, key_sets=known)
        kept, fresh = builder.build(found), build_snapshots(found)
        assert {name: each.resources for name, each in kept.items()} == {
            name: each.resources for name, each in fresh.items()
        }
