"""Envoy's decisions, one by one: matchers, virtual hosts, filter chains, RBAC, tokens, timeouts.

What real Envoys make of whole calls is compared in tests/integration/mesh/test_explain.py.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlmesh_local.explain import Call, Scene, document, explain
from mlmesh_local.explain.answers import http_as_grpc, location
from mlmesh_local.explain.chains import chain_of
from mlmesh_local.explain.policies import retries, timeout
from mlmesh_local.explain.rbac import evaluate
from mlmesh_local.explain.requests import Request, edited, rewritten
from mlmesh_local.explain.routing import share, value_matches, virtual_host
from mlmesh_local.explain.strings import header_mismatch, path_mismatch, query_mismatch, regex_matches, string_matches
from mlmesh_local.explain.tokens import authenticate
from mlmesh_local.offline import offline_world
from mlmesh_runtime.errors import InvalidInput, NotFound
from tests.support.mesh_documents import SUBSETS
from tests.support.mesh_world import WORKLOADS, load, resource, virtual_service
from tests.support.tokens import Issuer

WORD = st.text(alphabet="abAB-/.", max_size=6)
NOW_S = 1_800_000_000.0


def _request(**headers: str) -> Request:
    return Request(headers={":path": "/a.B/C", ":authority": "server:9000", **headers})


@given(WORD, WORD)
def test_strings_are_compared_as_written_or_folded(wanted: str, value: str) -> None:
    assert string_matches({"exact": wanted}, value) == (wanted == value)
    assert string_matches({"prefix": wanted}, value) == value.startswith(wanted)
    assert string_matches({"suffix": wanted}, value) == value.endswith(wanted)
    assert string_matches({"contains": wanted}, value) == (wanted in value)
    folded = string_matches({"exact": wanted, "ignore_case": True}, value)
    assert folded == (wanted.lower() == value.lower())


@given(st.text(alphabet="ab|*+?.", max_size=6), st.text(alphabet="ab", max_size=6))
def test_regular_expressions_match_all_of_a_value(pattern: str, value: str) -> None:
    try:
        expected = re.fullmatch(pattern, value) is not None
        # Possessive quantifiers are Python's own.
        if re.search(r"[*+?]\+|[*+?]{2}", pattern):
            return
    except re.error:
        return
    assert regex_matches(pattern, value) == expected


@pytest.mark.parametrize(
    ("matcher", "headers", "mismatch"),
    [
        ({"name": "X", "string_match": {"exact": "1"}}, {"x": "1"}, ""),
        ({"name": "x", "string_match": {"exact": "1"}}, {"x": "2"}, 'header x is "2", not "1"'),
        ({"name": "x", "string_match": {"exact": "1"}}, {}, "header x is missing"),
        ({"name": "x", "present_match": True}, {}, "header x is missing"),
        ({"name": "x", "present_match": True, "invert_match": True}, {}, ""),
        ({"name": "x", "present_match": True, "invert_match": True}, {"x": ""}, 'header x is present ("")'),
        # Inverted and missing: no match, unless a missing one is taken as empty.
        ({"name": "x", "string_match": {"exact": "1"}, "invert_match": True}, {}, "header x is missing"),
        (
            {
                "name": "x",
                "string_match": {"exact": "1"},
                "invert_match": True,
                "treat_missing_header_as_empty": True,
            },
            {},
            "",
        ),
        ({"name": "x", "range_match": {"start": "1", "end": "3"}}, {"x": "2"}, ""),
        ({"name": "x", "range_match": {"start": "1", "end": "3"}}, {"x": "3"}, 'header x is "3", not in [1, 3)'),
        ({"name": "x", "range_match": {"start": "1", "end": "3"}}, {"x": "two"}, 'header x is "two", not in [1, 3)'),
    ],
)
def test_headers(matcher: dict[str, Any], headers: dict[str, str], mismatch: str) -> None:
    assert header_mismatch(matcher, headers) == mismatch


@pytest.mark.parametrize(
    ("match", "path", "fits"),
    [
        ({"prefix": "/a"}, "/ab?x=1", True),
        ({"path": "/a"}, "/a?x=1", True),
        ({"path": "/a"}, "/A", False),
        ({"path": "/a", "case_sensitive": False}, "/A", True),
        ({"path_separated_prefix": "/a"}, "/a/b", True),
        ({"path_separated_prefix": "/a"}, "/ab", False),
        ({"safe_regex": {"regex": "/a|/b"}}, "/b?x", True),
        ({"safe_regex": {"regex": "/a"}}, "/ab", False),
        ({"connect_matcher": {}}, "/a", False),
    ],
)
def test_paths(match: dict[str, Any], path: str, fits: bool) -> None:
    assert (not path_mismatch(match, path)) == fits


def test_query_parameters_count_by_their_first_value() -> None:
    matcher = {"name": "v", "string_match": {"exact": "1"}}
    assert not query_mismatch(matcher, {"v": "1"})
    assert query_mismatch(matcher, {}) == "query parameter v is missing"
    assert query_mismatch(matcher, {"v": "2"}) == 'query parameter v is "2", not "1"'


def test_the_most_specific_domain_wins() -> None:
    domains = {
        "all": ["*"],
        "suffix": ["*.example"],
        "longer": ["*.b.example"],
        "prefix": ["a.*"],
        "exact": ["a.b.example"],
    }
    hosts = [{"name": name, "domains": names} for name, names in domains.items()]
    for authority, name in (
        ("a.b.example", "exact"),
        ("A.B.EXAMPLE", "exact"),
        ("c.b.example", "longer"),
        ("c.example", "suffix"),
        ("a.other", "prefix"),
        ("example", "all"),
    ):
        found = virtual_host({"virtual_hosts": hosts}, authority)
        assert found is not None
        assert found["name"] == name, authority
    assert virtual_host({"virtual_hosts": hosts[1:]}, "nobody") is None
    found = virtual_host({"virtual_hosts": hosts, "ignore_port_in_host_matching": True}, "a.b.example:80")
    assert found is not None
    assert found["name"] == "exact"


def test_filter_chains_are_found_level_by_level_without_going_back() -> None:
    tls = {"transport_protocol": "tls"}
    chains = [
        {"name": "plain", "filter_chain_match": {"transport_protocol": "raw_buffer"}},
        {"name": "mesh", "filter_chain_match": {**tls, "application_protocols": ["istio"]}},
        {"name": "other", "filter_chain_match": tls},
        {"name": "named", "filter_chain_match": {**tls, "server_names": ["a.example"], "application_protocols": ["x"]}},
        {"name": "wild", "filter_chain_match": {**tls, "server_names": ["*.example"]}},
    ]
    listener = {"filter_chains": chains}

    def chosen(**fields: Any) -> str:
        found = chain_of(listener, Request(headers={}, **fields))
        return str(found["name"]) if found else ""

    assert chosen() == "plain"
    assert chosen(tls=True, alpn=("istio", "h2")) == "mesh"
    assert chosen(tls=True, alpn=("h2",)) == "other"
    assert chosen(tls=True, sni="b.example") == "wild"
    # The name is the more specific level: what fits it is tried alone, and fails.
    assert chosen(tls=True, sni="a.example", alpn=("h2",)) == ""
    assert chain_of(
        {**listener, "default_filter_chain": {"name": "rest"}}, Request(headers={}, tls=True, sni="a.example")
    )


def _policy(permission: dict[str, Any], principal: dict[str, Any]) -> dict[str, Any]:
    return {"policies": {"p": {"permissions": [permission], "principals": [principal]}}}


@pytest.mark.parametrize(
    ("permission", "principal", "matches"),
    [
        ({"any": True}, {"any": True}, True),
        ({"url_path": {"path": {"prefix": "/a.B/"}}}, {"any": True}, True),
        ({"not_rule": {"url_path": {"path": {"prefix": "/a.B/"}}}}, {"any": True}, False),
        ({"or_rules": {"rules": [{"destination_port": 1}, {"destination_port": 9000}]}}, {"any": True}, True),
        ({"and_rules": {"rules": [{"destination_port": 1}, {"any": True}]}}, {"any": True}, False),
        ({"destination_port_range": {"start": 9000, "end": 9001}}, {"any": True}, True),
        ({"destination_ip": {"address_prefix": "127.64.0.0", "prefix_len": 16}}, {"any": True}, True),
        ({"any": True}, {"authenticated": {"principal_name": {"suffix": "/sa/x"}}}, True),
        ({"any": True}, {"authenticated": {"principal_name": {"exact": "x"}}}, False),
        ({"any": True}, {"not_id": {"authenticated": {}}}, False),
        ({"uri_template": {"typed_config": {"path_template": "/{*}/C"}}}, {"any": True}, True),
        ({"uri_template": {"typed_config": {"path_template": "/{**}"}}}, {"any": True}, True),
        ({"uri_template": {"typed_config": {"path_template": "/{*}"}}}, {"any": True}, False),
        ({"any": True}, {"direct_remote_ip": {"address_prefix": "10.0.0.0", "prefix_len": 8}}, False),
        ({"any": True}, {"and_ids": {"ids": [{"header": {"name": "x", "present_match": True}}]}}, False),
        ({"any": True}, {"filter_state": {"key": "io.istio.peer_principal", "string_match": {"suffix": "x"}}}, True),
    ],
)
def test_rbac(permission: dict[str, Any], principal: dict[str, Any], matches: bool) -> None:
    request = Request(
        headers={":path": "/a.B/C?q"}, peer="spiffe://d/ns/n/sa/x", destination="127.64.1.1", port=9000, tls=True
    )
    rules = _policy(permission, principal)
    assert evaluate({"action": "ALLOW", **rules}, request).allowed == matches
    assert evaluate({"action": "DENY", **rules}, request).allowed != matches
    assert evaluate({"action": "LOG", **rules}, request).allowed


def test_rules_without_policies_allow_nothing_and_deny_nothing() -> None:
    assert not evaluate({}, _request()).allowed
    assert evaluate({"action": "DENY"}, _request()).allowed


def test_without_a_certificate_nobody_is_authenticated() -> None:
    rules = _policy({"any": True}, {"authenticated": {}})
    assert not evaluate(rules, _request()).allowed


@pytest.mark.parametrize(
    ("matcher", "value", "matches"),
    [
        ({"string_match": {"exact": "a"}}, "a", True),
        ({"string_match": {"exact": "1"}}, 1, False),
        ({"list_match": {"one_of": {"string_match": {"exact": "a"}}}}, ["b", "a"], True),
        ({"or_match": {"value_matchers": [{"bool_match": True}, {"null_match": {}}]}}, None, True),
        ({"double_match": {"range": {"start": 1, "end": 2}}}, 1.5, True),
        ({"double_match": {"exact": 1}}, True, False),
        ({"present_match": True}, None, False),
    ],
)
def test_values_of_metadata(matcher: dict[str, Any], value: Any, matches: bool) -> None:
    assert value_matches(matcher, value) == matches


def test_routes_edit_headers_as_envoy_does() -> None:
    level = {
        "request_headers_to_remove": ["x-gone"],
        "request_headers_to_add": [
            {"header": {"key": "x-set", "value": "new"}, "append_action": "OVERWRITE_IF_EXISTS_OR_ADD"},
            {"header": {"key": "x-add", "value": "two"}, "append_action": "APPEND_IF_EXISTS_OR_ADD"},
            {"header": {"key": "x-keep", "value": "new"}, "append_action": "ADD_IF_ABSENT"},
        ],
    }
    after = edited(_request(**{"x-gone": "1", "x-set": "old", "x-add": "one", "x-keep": "old"}), [level])
    assert {name: after.headers.get(name) for name in ("x-gone", "x-set", "x-add", "x-keep")} == {
        "x-gone": None,
        "x-set": "new",
        "x-add": "one,two",
        "x-keep": "old",
    }
    action = {"prefix_rewrite": "/z/", "host_rewrite_literal": "other"}
    sent = rewritten(_request(), {"prefix": "/a.B/"}, action, {})
    assert (sent.path, sent.authority) == ("/z/C", "other")
    swapped = {"regex_rewrite": {"pattern": {"regex": r"/a\.(\w)"}, "substitution": r"/\1"}}
    assert rewritten(_request(), {"prefix": "/"}, swapped, {}).path == "/B/C"


@pytest.mark.parametrize(
    ("action", "asked", "effective"),
    [
        ({"timeout": "0s", "max_grpc_timeout": "0s"}, "", None),
        ({"timeout": "0s", "max_grpc_timeout": "0s"}, "200m", 0.2),
        ({"timeout": "0.3s", "max_grpc_timeout": "0.3s"}, "", 0.3),
        ({"timeout": "0.3s", "max_grpc_timeout": "0.3s"}, "5S", 0.3),
        # With this set Envoy does not look at the route's own timeout.
        ({"timeout": "0.3s", "max_stream_duration": {"grpc_timeout_header_max": "0s"}}, "", None),
        ({"timeout": "0s", "max_grpc_timeout": "0s", "max_stream_duration": {"max_stream_duration": "2s"}}, "", 2.0),
        ({}, "", 15.0),
    ],
)
def test_timeouts(action: dict[str, Any], asked: str, effective: float | None) -> None:
    assert timeout(action, _request(**({"grpc-timeout": asked} if asked else {}))).effective_s == effective


def test_retries_and_statuses() -> None:
    assert retries({}, {}).attempts == 1
    assert retries({}, {"retry_policy": {"retry_on": "5xx"}}).attempts == 2
    assert any("sheds load" in note for note in retries({"retry_policy": {"retry_on": "5xx"}}, {}).notes)
    assert [http_as_grpc(status) for status in (401, 403, 404, 503, 418)] == [
        "UNAUTHENTICATED",
        "PERMISSION_DENIED",
        "UNIMPLEMENTED",
        "UNAVAILABLE",
        "UNKNOWN",
    ]
    assert share({"numerator": 5000, "denominator": "MILLION"}) == 0.005


def test_tokens_are_verified_and_their_claims_left_for_policies() -> None:
    issuer, other = Issuer(), Issuer()
    provider = {"issuer": issuer.name, "payload_in_metadata": "payload", "local_jwks": {"inline_string": issuer.jwks}}
    config = {
        "providers": {"p": provider},
        "rules": [{"match": {"prefix": "/"}, "requires": {"requires_any": {"requirements": [
            {"provider_name": "p"}, {"allow_missing": {}}]}}}],
    }  # fmt: skip

    def answer(token: str) -> Any:
        headers = {"authorization": f"Bearer {token}"} if token else {}
        return authenticate(config, _request(**headers), now_s=NOW_S)

    assert answer("").allowed
    good = answer(issuer.token(exp=NOW_S + 60, role="admin"))
    assert good.allowed
    assert good.metadata["payload"]["role"] == "admin"
    assert not answer(other.token(exp=NOW_S + 60)).allowed
    assert not answer(issuer.token(exp=NOW_S - 120)).allowed
    assert not answer("a.b.c").allowed


def test_what_this_client_was_never_given_is_told_with_the_reason() -> None:
    rules = virtual_service(
        "[{match: [{sourceLabels: {team: blue}}], route: [{destination: {host: server, subset: v2}}]},"
        " {match: [{port: 9090}], route: [{destination: {host: server, subset: v2}}]},"
        " {route: [{destination: {host: server, subset: v1}}]},"
        " {route: [{destination: {host: server, subset: v2}}]}]"
    )
    scene = Scene(offline_world(load(WORKLOADS, SUBSETS, rules)), now_s=NOW_S)
    said = explain(scene, Call(source="client", host="server", port=9000, path="/a.B/C"))
    assert [one.why for one in said.rejected] == [
        "it is for clients with the labels team=blue",
        "it is for port 9090",
        "it is not reached: an earlier rule takes everything",
    ]
    assert [one.subset for one in said.destinations] == ["v1"]
    assert document(said)["rejected"][0]["place"]["part"] == "spec.http[0].match[0]"


def test_plaintext_to_a_strict_server_names_the_policy() -> None:
    strict = resource("PeerAuthentication", "{mtls: {mode: STRICT}}", name="default")
    plain = resource(
        "DestinationRule", "{host: server, trafficPolicy: {tls: {mode: DISABLE}}}", group="networking.istio.io/v1"
    )
    scene = Scene(offline_world(load(WORKLOADS, strict, plain)), now_s=NOW_S)
    said = explain(scene, Call(source="client", host="server", port=9000, path="/a.B/C"))
    assert (said.outcome.kind, said.outcome.code) == ("tls_failed", "UNAVAILABLE")
    (one,) = said.destinations
    assert one.tls is not None
    assert one.tls.place is not None
    assert (one.tls.server, one.tls.place.source) == ("STRICT", "1.yaml:5")


def test_a_token_that_is_refused_names_the_rule_that_knows_its_issuer() -> None:
    issuer = Issuer()
    known = f"{{issuer: '{issuer.name}', jwks: '{issuer.jwks}'}}"
    rule = f"{{selector: {{matchLabels: {{app: server}}}}, jwtRules: [{known}]}}"
    scene = Scene(offline_world(load(WORKLOADS, resource("RequestAuthentication", rule, name="tokens"))), now_s=NOW_S)
    headers = {"authorization": f"Bearer {issuer.token(exp=1)}"}
    said = explain(scene, Call(source="client", host="server", port=9000, path="/a.B/C", headers=headers))
    assert (said.outcome.kind, said.outcome.code) == ("unauthenticated", "UNAUTHENTICATED")
    (check,) = said.destinations[0].checks
    assert check.place is not None
    assert (check.why, check.place.part) == ("the token has expired", "spec.jwtRules[0]")


def test_a_host_that_nobody_serves_and_a_port_that_nobody_listens_on() -> None:
    scene = Scene(offline_world(load(WORKLOADS)), now_s=NOW_S)
    nowhere = explain(scene, Call(source="client", host="server", port=1, path="/"))
    assert nowhere.outcome.kind == "no_listener"
    unknown = explain(scene, Call(source="client", host="nobody.example", port=9000, path="/"))
    assert unknown.outcome.kind in ("answered", "routed", "no_endpoint")
    assert unknown.virtual_host in ("block_all", "allow_any")


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"host": ""}, "name the host that is called"),
        ({"path": "a.B/C"}, 'a method is "/package.Service/Method", not "a.B/C"'),
        ({"source_ip": "1.2.3"}, '"1.2.3" is no IP address'),
        ({"identity": "client"}, 'not "client"'),
        ({"source": ""}, "name the workload that calls"),
        ({"gateway": "nobody"}, 'no gateway is called "nobody"; there are mlmesh/edge'),
    ],
)
def test_wrong_questions_are_told_what_is_wrong(wrong: dict[str, str], says: str) -> None:
    scene = Scene(offline_world(load(WORKLOADS, _EDGE)), now_s=NOW_S)
    asked = Call(source="client", host="server", port=9000, path="/a.B/C")
    with pytest.raises((InvalidInput, NotFound), match=re.escape(says)):
        explain(scene, dataclasses.replace(asked, **wrong))  # type: ignore[arg-type]


_EDGE = """
apiVersion: gateway.networking.k8s.io/v1
kind: Gateway
metadata: {name: edge}
spec: {gatewayClassName: istio, listeners: [{name: a, port: 8090, protocol: HTTP}]}
---
"""


@pytest.mark.parametrize("name", ["edge", "mlmesh/edge", "edge-istio", "mlmesh/edge-istio"])
def test_a_gateway_of_the_gateway_api_goes_by_its_name_and_by_that_of_its_workload(name: str) -> None:
    scene = Scene(offline_world(load(WORKLOADS, _EDGE)), now_s=NOW_S)
    said = explain(scene, Call(source="client", host="a.example", gateway=name))
    assert (said.proxy, said.outcome.kind) == ("edge-istio-0", "no_route")


def test_the_header_host_is_the_authority() -> None:
    assert not header_mismatch({"name": "host", "present_match": True}, {":authority": "web:8000"})
    assert header_mismatch({"name": "Host", "string_match": {"exact": "api"}}, {":authority": "web"})


@pytest.mark.parametrize(
    ("redirect", "authority", "path", "where"),
    [
        ({"path_redirect": "/new"}, "web:8000", "/a?q=1", "http://web:8000/new?q=1"),
        ({"path_redirect": "/new?x=2"}, "web:8000", "/a?q=1", "http://web:8000/new?x=2"),
        ({"path_redirect": "", "scheme_redirect": "https"}, "web:8000", "/a?q=1", "https://web:8000/a?q=1"),
        ({"https_redirect": True}, "web:80", "/a", "https://web/a"),
        ({"host_redirect": "c.example.com"}, "web:8000", "/a", "http://c.example.com/a"),
        ({"host_redirect": "c", "port_redirect": 81, "strip_query": True}, "web:8000", "/a?q=1", "http://c:81/a"),
        ({"prefix_rewrite": "/n"}, "web", "/a/b?q=1", "http://web/n/b?q=1"),
    ],
)
def test_redirects_lead_where_envoy_sends(redirect: dict[str, Any], authority: str, path: str, where: str) -> None:
    request = Request(headers={":path": path, ":authority": authority, ":scheme": "http"})
    assert location(redirect, {"prefix": "/a"}, request) == where


def test_a_gateway_that_asks_for_https_redirects_before_any_rule() -> None:
    gateway = resource(
        "Gateway",
        "{selector: {istio: gateway}, servers: [{port: {number: 8080, name: http, protocol: HTTP}, "
        "hosts: [a.example], tls: {httpsRedirect: true}}]}",
        name="way-in",
        group="networking.istio.io/v1",
    )
    scene = Scene(offline_world(load(WORKLOADS, gateway)), now_s=NOW_S)
    said = explain(scene, Call(gateway="way-in", host="a.example", path="/x?q=1", http="GET"))
    assert (said.outcome.kind, said.outcome.http) == ("redirected", 301)
    assert said.outcome.location == "https://a.example/x?q=1"


def test_calls_without_grpc_end_with_http_statuses_and_tell_what_is_sent() -> None:
    rules = virtual_service(
        "[{match: [{uri: {prefix: /no}}], directResponse: {status: 404}}, "
        "{match: [{uri: {prefix: /old}}], rewrite: {uri: /new, authority: else}, "
        "route: [{destination: {host: server, port: {number: 9000}}, headers: {request: {set: {x-set: 50%%}}}}]}]"
    )
    scene = Scene(offline_world(load(WORKLOADS, rules)), now_s=NOW_S)

    def ask(path: str) -> Any:
        return explain(scene, Call(source="client", host="server", port=9000, path=path, http="GET"))

    assert (ask("/no").outcome.http, ask("/no").outcome.code) == (404, "UNIMPLEMENTED")
    assert ask("/other").outcome.http == 404
    (one,) = ask("/old/x").destinations
    assert (one.sent.method, one.sent.path, one.sent.authority) == ("GET", "/new/x", "else")
    assert one.sent.headers == {"x-set": "50%"}
