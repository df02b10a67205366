"""Security resources: what Istio's validation refuses, each with a message that says why; and Istio's own verdicts."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from mlmesh_local.resources import InvalidResource, ResourceSet
from tests.support.mesh_world import WORKLOADS, load_alone, resource
from tests.support.tokens import Issuer

KEYS = Issuer().jwks


def policy(spec: str) -> str:
    return resource("AuthorizationPolicy", spec)


def rules(rule: str, more: str = "") -> str:
    return policy(f"{{rules: [{rule}]{more}}}")


def source(text: str) -> str:
    return rules(f"{{from: [{{source: {{{text}}}}}]}}")


def operation(text: str) -> str:
    return rules(f"{{to: [{{operation: {{{text}}}}}]}}")


def when(key: str, values: str = "values: [a]") -> str:
    return rules(f"{{when: [{{key: '{key}', {values}}}]}}")


def custom(rule: str) -> str:
    return rules(rule, ", action: CUSTOM, provider: {name: ext}")


def tokens(rule: str) -> str:
    return resource("RequestAuthentication", f"{{jwtRules: [{rule}]}}")


def many(count: int, text: str) -> str:
    return f"[{', '.join([text] * count)}]"


def dry_run(value: str, text: str) -> str:
    return text.replace("{name: it}", f"{{name: it, annotations: {{istio.io/dry-run: '{value}'}}}}")


TARGET = "{group: gateway.networking.k8s.io, kind: Gateway, name: way-in}"

# Message, the document, and whether istioctl refuses it (False: only the API server does, by the schema and its CEL).
REFUSED: dict[str, tuple[str, bool]] = {
    # AuthorizationPolicy
    '(did you mean "DENY"?)': (policy("{action: DENNY, rules: [{}]}"), True),
    "denies nothing": (policy("{action: DENY}"), True),
    "asks about nothing": (policy("{action: CUSTOM, provider: {name: ext}}"), True),
    '"provider.name" is required': (policy("{action: CUSTOM, rules: [{}]}"), True),
    "goes with action CUSTOM only": (policy("{action: DENY, provider: {name: ext}, rules: [{}]}"), True),
    "rules[0].from: must not be empty": (rules("{from: []}"), False),
    "rules[0].to: must not be empty": (rules("{to: []}"), False),
    "from[0].source: must not be empty": (source(""), True),
    "to[0].operation: must not be empty": (operation(""), True),
    '"source" is required': (rules("{from: [{}]}"), True),
    '"operation" is required': (rules("{to: [{}]}"), True),
    "principals or namespaces (principals)": (source("serviceAccounts: [a], principals: [b]"), True),
    "principals or namespaces (notNamespaces)": (source("notServiceAccounts: [a], notNamespaces: [b]"), True),
    'source.serviceAccounts[0]: "a/b/c"': (source("serviceAccounts: [a/b/c]"), True),
    'source.serviceAccounts[0]: "*"': (source("serviceAccounts: ['*']"), True),
    'source.serviceAccounts[0]: "a/"': (source("serviceAccounts: [a/]"), True),
    "serviceAccounts: has more than 16": (source(f"serviceAccounts: {many(17, 'a')}"), True),
    'source.trustDomains[0]: "a/b"': (source("trustDomains: [a/b]"), True),
    'source.trustDomains[0]: "a*b"': (source("trustDomains: [a*b]"), True),
    'source.ipBlocks[0]: "1.2.3"': (source("ipBlocks: [1.2.3]"), True),
    'source.notIpBlocks[0]: "1.2.3.4/33"': (source("notIpBlocks: [1.2.3.4/33]"), True),
    'source.remoteIpBlocks[0]: "10.0.0.0/255.0.0.0"': (source("remoteIpBlocks: [10.0.0.0/255.0.0.0]"), True),
    'source.principals[0]: ""': (source("principals: ['']"), True),
    'operation.ports[0]: "http"': (operation("ports: [http]"), True),
    'operation.notPorts[0]: "65536"': (operation("notPorts: ['65536']"), True),
    'operation.paths[0]: "/a/{b}"': (operation("paths: ['/a/{b}']"), True),
    'operation.paths[0]: "/{**}/{*}"': (operation("paths: ['/{**}/{*}']"), True),
    'operation.notPaths[0]: "/a b/{*}"': (operation("notPaths: ['/a b/{*}']"), True),
    'operation.paths[0]: "/x{*}"': (operation("paths: ['/x{*}']"), True),
    '"key" is required': (rules("{when: [{values: [a]}]}"), True),
    'one of "values", "notValues" is required': (when("source.ip", "values: []"), True),
    '"request.header[x]" is no attribute': (when("request.header[x]"), True),
    "should have the form request.headers[KEY]": (when("request.headers"), True),
    "should have the form request.auth.claims[KEY]": (when("request.auth.claims[]"), True),
    "it is replaced by the selector": (when("destination.labels[a]"), True),
    "only the old v1alpha1": (when("destination.user"), True),
    'when[0].values[0]: "x" is not an IP': (when("remote.ip", "values: [x]"), True),
    'when[0].notValues[0]: "x" is not a port': (when("destination.port", "notValues: [x]"), True),
    "principals: cannot be used with action CUSTOM": (custom("{from: [{source: {principals: [a]}}]}"), True),
    "notRequestPrincipals: cannot be used with": (custom("{from: [{source: {notRequestPrincipals: [a]}}]}"), True),
    "key: cannot be used with action CUSTOM": (custom("{when: [{key: request.auth.presenter, values: [a]}]}"), True),
    'cannot be set together with "selector"': (
        policy(f"{{selector: {{matchLabels: {{a: b}}}}, targetRefs: [{TARGET}]}}"),
        True,
    ),
    "another namespace": (policy(f"{{targetRefs: [{TARGET.replace('}', ', namespace: x}')}]}}"), True),
    '"/Pod" cannot be targeted': (policy("{targetRefs: [{kind: Pod, name: a}]}"), True),
    "wildcards are not supported": (policy("{selector: {matchLabels: {app: '*'}}}"), True),
    "spec.rules: has more than 512": (policy(f"{{rules: {many(513, '{}')}}}"), False),
    "is longer than 63": (policy(f"{{selector: {{matchLabels: {{app: {'a' * 64}}}}}}}"), False),
    '(did you mean "principals"?)': (source("principles: [a]"), True),
    "goes with action ALLOW or DENY only, not with CUSTOM": (dry_run("t", custom("{}")), True),
    "goes with action ALLOW or DENY only, not with AUDIT": (dry_run("f", policy("{action: AUDIT, rules: [{}]}")), True),
    'must be "true" or "false", not "yes"': (dry_run("yes", rules("{}")), True),
    # RequestAuthentication
    'one of "issuer", "jwksUri" is required': (tokens("{audiences: [a]}"), True),
    "issuer: must not be empty": (tokens("{issuer: ''}"), True),
    "is not JSON": (tokens("{issuer: a, jwks: '{'}"), True),
    'the key type "XYZ"': (tokens('{issuer: a, jwks: \'{"keys": [{"kty": "XYZ"}]}\'}'), True),
    "keys[0] lacks n, e": (tokens('{issuer: a, jwks: \'{"keys": [{"kty": "RSA"}]}\'}'), True),
    "is not an http:// or https:// address": (tokens("{issuer: a, jwksUri: 'ftp://a/b'}"), True),
    'jwks: cannot be set together with "jwksUri"': (
        tokens(f"{{issuer: a, jwksUri: 'http://a', jwks: '{KEYS}'}}"),
        False,
    ),
    "jwtRules[0].audiences[0]": (tokens("{issuer: a, audiences: ['']}"), True),
    "jwtRules[0].fromParams[0]": (tokens("{issuer: a, fromParams: ['']}"), True),
    "jwtRules[0].fromCookies[0]": (tokens("{issuer: a, fromCookies: ['']}"), True),
    'fromHeaders[0]: "name" is required': (tokens("{issuer: a, fromHeaders: [{prefix: x}]}"), True),
    '"x y" is not a header name': (tokens("{issuer: a, outputClaimToHeaders: [{header: x y, claim: a}]}"), True),
    'outputClaimToHeaders[0]: "claim" is required': (tokens("{issuer: a, outputClaimToHeaders: [{header: x}]}"), True),
    "must be at least 0.001 s": (tokens("{issuer: a, timeout: 1us}"), True),
    "jwksURI: unknown field (did you mean": (tokens("{issuer: a, jwksURI: 'http://a'}"), True),
    # PeerAuthentication
    '(did you mean "STRICT"?)': (resource("PeerAuthentication", "{mtls: {mode: STRIKT}}"), True),
    "portLevelMtls: must have at least one port": (
        resource("PeerAuthentication", "{selector: {matchLabels: {a: b}}, portLevelMtls: {}}"),
        False,
    ),
    'portLevelMtls: needs a "selector"': (resource("PeerAuthentication", "{portLevelMtls: {9: {mode: STRICT}}}"), True),
    "is not a port number": (
        resource("PeerAuthentication", "{selector: {matchLabels: {a: b}}, portLevelMtls: {70000: {mode: STRICT}}}"),
        True,
    ),
}
ACCEPTED = {
    "every field of a source": source(
        "principals: [a, '*', 'b*', '*c', 'd*e'], requestPrincipals: [a/b], namespaces: [x, 'y*z'],"
        " remoteIpBlocks: [10.0.0.0/8, '::1'], notIpBlocks: ['2001:db8::/32'], trustDomains: ['*.example']"
    ),
    "accounts": source("serviceAccounts: [a, b/c], notServiceAccounts: [d]"),
    "every field of an operation": operation(
        "hosts: [a, '*.b'], ports: ['0', '65535'], methods: [GET], paths: [Echo, '/a*', '/{*}/b/{**}'],"
        " notHosts: [x], notPorts: ['1'], notMethods: [PUT], notPaths: ['/z']"
    ),
    "every condition": rules(
        "{when: ["
        + ", ".join(
            f"{{key: '{key}', values: ['{value}'], notValues: ['{value}']}}"
            for key, value in {
                "request.headers[x-role]": "a",
                "source.ip": "10.0.0.1",
                "remote.ip": "10.0.0.0/8",
                "source.namespace": "a",
                "source.principal": "*",
                "source.serviceAccount": "a/b",
                "source.trustDomain": "td",
                "request.auth.principal": "a/b",
                "request.auth.audiences": "a",
                "request.auth.presenter": "a",
                "request.auth.claims[a][b]": "a",
                "destination.ip": "::1",
                "destination.port": "80",
                "connection.sni": "*.a",
                "experimental.envoy.filters.http.lua[a]": "[b]",
            }.items()
        )
        + "]}"
    ),
    "nothing": policy("{}"),
    "an empty rule": rules("{}"),
    "custom": custom("{to: [{operation: {paths: [/a]}}], from: [{source: {ipBlocks: [10.0.0.0/8]}}]}"),
    "a target": policy(f"{{targetRefs: [{TARGET}]}}"),
    "audit": policy("{action: AUDIT, rules: [{}]}"),
    "every field of a token": tokens(
        f"{{issuer: a, audiences: [b], jwks: '{KEYS}', fromHeaders: [{{name: x, prefix: 'y '}}], fromParams: [p],"
        " fromCookies: [c], outputPayloadToHeader: z, outputClaimToHeaders: [{header: x-a_B, claim: d}],"
        " forwardOriginalToken: true, timeout: 1s, spaceDelimitedClaims: [e]}"
    ),
    "keys by address": tokens("{jwksUri: 'https://keys.example:8443/jwks.json'}"),
    "keys by discovery": tokens("{issuer: 'https://issuer.example'}"),
    "one key": tokens('{issuer: a, jwks: \'{"kty": "RSA", "n": "AQAB", "e": "AQAB"}\'}'),
    "no token rules": resource("RequestAuthentication", "{}"),
    "modes of ports": resource(
        "PeerAuthentication",
        "{selector: {matchLabels: {a: b}}, mtls: {mode: UNSET}, portLevelMtls: {80: {mode: DISABLE}, 81: {}}}",
    ),
}


@pytest.mark.parametrize("message", REFUSED)
def test_refused_in_words(message: str) -> None:
    with pytest.raises(InvalidResource) as caught:
        load_alone(REFUSED[message][0])
    assert message in str(caught.value)


@pytest.mark.parametrize("name", ACCEPTED)
def test_accepted(name: str) -> None:
    assert len(load_alone(ACCEPTED[name])) == 1


OURS = {
    "acts on waypoints": policy("{targetRefs: [{kind: Service, name: a}]}"),
}


@pytest.mark.parametrize("message", OURS)
def test_refused_here_and_not_by_istio(message: str) -> None:
    with pytest.raises(InvalidResource, match=re.escape(message)):
        load_alone(OURS[message])


def test_istio_says_the_same(repository: Path, tmp_path: Path) -> None:
    istioctl = repository / ".tools" / "bin" / "istioctl"
    if not istioctl.exists():
        pytest.skip("istioctl is not built: `make tools`")
    documents = {**{name: text for name, (text, its) in REFUSED.items() if its}, **ACCEPTED, **OURS}
    ids = {f"n{number}": name for number, name in enumerate(documents)}
    files = [tmp_path / f"{number}.yaml" for number in ids]
    for file, (number, name) in zip(files, ids.items(), strict=True):
        file.write_text(documents[name].replace("{name: it", f"{{namespace: default, name: {number}"))
    command = [str(istioctl), "validate", *(argument for file in files for argument in ("-f", str(file)))]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    refused = {ids[number] for number in re.findall(r"/default/(n\d+): ", answer.stderr)}
    assert refused == {name for name in documents if name in REFUSED}, answer.stderr


def test_warnings() -> None:
    def warnings(*texts: str) -> str:
        return "\n".join(ResourceSet().apply(load_alone(WORKLOADS, *texts)).warnings)

    deny = policy("{action: DENY, rules: [{to: [{operation: {methods: [GET]}}]}]}")
    assert "denies all traffic to TCP ports in its scope" in warnings(deny)
    assert warnings(deny.replace("methods: [GET]", "methods: [GET], ports: ['80']")) == ""
    assert "principals are written without spiffe://" in warnings(source("principals: ['spiffe://a/ns/b/sa/c']"))
    assert '"a*b" of path is compared as it is' in warnings(operation("paths: [a*b]"))
    assert 'no external authorizer "ext": what it matches is denied' in warnings(custom("{}"))
    assert '(did you mean "ext"?)' in warnings(
        custom("{}").replace("name: ext", "name: exd"), settings(f"name: ext, {GRPC % ''}")
    )
    secret = '{"keys": [{"kty": "oct", "k": "c2VjcmV0"}]}'
    assert "the key at 0 holds secret material" in warnings(tokens(f"{{issuer: a, jwks: '{secret}'}}"))


def settings(provider: str) -> str:
    return f"""
apiVersion: v1
kind: ConfigMap
metadata: {{name: istio, namespace: istio-system}}
data:
  mesh: |
    extensionProviders:
    - {{{provider}}}
"""


GRPC = "envoyExtAuthzGrpc: {service: a.local, port: 1%s}"
HTTP = "envoyExtAuthzHttp: {service: a.local, port: 1%s}"
PROVIDERS = {
    "the name": f"name: Upper, {GRPC % ''}",
    '"service" is required': "name: a, envoyExtAuthzGrpc: {port: 1}",
    '"port" is required': "name: a, envoyExtAuthzGrpc: {service: a.local}",
    "is not [NAMESPACE/]HOST": "name: a, envoyExtAuthzHttp: {service: a/b/c, port: 1}",
    'must begin with "/"': f"name: a, {HTTP % ', pathPrefix: check'}",
    "is not an HTTP status": f"name: a, {HTTP % ', statusOnError: 299'}".replace("299", "'299'"),
    '"*" is not a header name': f"name: a, {HTTP % ', headersToUpstreamOnAllow: [{}]'}".replace("{}", "'*'"),
    '"maxRequestBytes" is required': f"name: a, {GRPC % ', includeRequestBodyInCheck: {}'}",
    "pathPrefix: unknown field": f"name: a, {GRPC % ', pathPrefix: /'}",
}


@pytest.mark.parametrize("message", PROVIDERS)
def test_authorizers_are_refused_in_words(message: str) -> None:
    with pytest.raises(InvalidResource, match=re.escape(message)):
        load_alone(settings(PROVIDERS[message]))
