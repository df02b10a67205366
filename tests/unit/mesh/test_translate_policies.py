"""AuthorizationPolicies become Envoy's RBAC on routes, with Istio's meaning."""

from __future__ import annotations

from typing import Any

import pytest

from mlmesh_local.envoy_types import ROUTES
from mlmesh_local.snapshot import build_snapshots
from mlmesh_local.translate.authorization import ALLOW_FILTER, DENY_FILTER
from tests.support.mesh_world import Told, resource, world

INBOUND = "inbound|8000||"


def policy(spec: str, name: str = "it", namespace: str = "") -> str:
    return resource("AuthorizationPolicy", spec, name=name, namespace=namespace)


def rbac(*texts: str, instance: str = "server-v1", filter_name: str = ALLOW_FILTER, **fields: Any) -> dict[str, Any]:
    """Rules of a filter; empty where it lets everything pass."""
    configuration = Told(instance, *texts, **fields).routes[INBOUND].get("typed_per_filter_config", {})
    found: dict[str, Any] = configuration.get(filter_name, {}).get("rbac", {}).get("rules", {})
    return found


def rule(text: str, **fields: Any) -> dict[str, Any]:
    """The only rule of an ALLOW policy."""
    (found,) = rbac(policy(f"{{rules: [{text}]}}"), **fields)["policies"].values()
    return dict(found)


def any_of(key: str, *values: Any) -> dict[str, Any]:
    words = {"permissions": ("or_rules", "rules"), "principals": ("or_ids", "ids")}[key]
    return {words[0]: {words[1]: list(values)}}


def principal(how: str, value: str) -> dict[str, Any]:
    match: Any = {"regex": value} if how == "safe_regex" else value
    return {"authenticated": {"principal_name": {how: match}}}


def test_without_policies_everything_passes() -> None:
    assert rbac() == {}


def test_allow_without_rules_allows_nothing() -> None:
    found = rbac(policy("{}"))
    assert found["action"] == "ALLOW"
    (never,) = found["policies"].values()
    assert never["permissions"] == [{"and_rules": {"rules": [{"not_rule": {"any": True}}]}}]
    assert never["principals"] == [{"and_ids": {"ids": [{"not_id": {"any": True}}]}}]


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
            {"header": {"name": "x-role", "string_match": {"exact": "admin"}}},
            {"header": {"name": "x-role", "string_match": {"prefix": "root"}}},
        )
    (permission,) = found["permissions"]
    assert permission["and_rules"]["rules"] == [{"not_rule": any_of("permissions", {"destination_port": 1})}]


def test_cluster_local_stands_for_the_trust_domain() -> None:
    (found,) = rule("{from: [{source: {principals: [cluster.local/ns/a/sa/b]}}]}", trust_domain="corp.example")[
        "principals"
    ]
    assert found["and_ids"]["ids"] == [any_of("principals", principal("exact", "spiffe://corp.example/ns/a/sa/b"))]


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
    assert filters[:2] == [DENY_FILTER, ALLOW_FILTER]
    assert filters[-1] == "envoy.filters.http.router"


def test_a_policy_changes_routes_and_nothing_else() -> None:
    before, after = (build_snapshots(world(*texts))["server-v1"] for texts in ((), (policy("{}"),)))
    for type_url, named in before.resources.items():
        assert (named == after.resources[type_url]) is (type_url != ROUTES)
    changed = {name for name, item in before.resources[ROUTES].items() if after.resources[ROUTES][name] != item}
    assert changed == {INBOUND, "inbound|9090||"}
