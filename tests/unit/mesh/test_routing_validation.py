"""VirtualServices and Gateways that Istio takes are taken, what it refuses is refused: a table, and istioctl on it."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterable
from pathlib import Path

import pytest

from mlmesh_local.resources import InvalidResource
from mlmesh_local.resources.header_values import header_value_problem
from mlmesh_local.resources.regexes import regex_problem
from tests.support.mesh_world import load_alone

TO_A = "route: [{destination: {host: a}}]"


def rules(*extras: str) -> list[str]:
    """VirtualServices of one rule that has a route and more."""
    return [f"{{hosts: [a], http: [{{{TO_A}, {extra}}}]}}" for extra in extras]


def bare(*contents: str) -> list[str]:
    """VirtualServices of one rule."""
    return [f"{{hosts: [a], http: [{{{content}}}]}}" for content in contents]


def matches(*conditions: str) -> list[str]:
    return rules(*(f"match: [{condition}]" for condition in conditions))


VALID_SERVICES = [
    *matches(
        "{}",
        "{port: 0}",
        "{uri: {}}",
        "{uri: {prefix: ''}}",
        "{method: {}}",
        "{headers: {x: {}}}",
        "{headers: {x: null}}",
        "{headers: {':path': {exact: a}}}",
        "{headers: {x: {exact: ''}}}",
        "{withoutHeaders: {x: {regex: '*'}}}",
        "{queryParams: {q: {}}}",
        "{queryParams: {q: {exact: ''}}}",
        "{uri: {regex: '/(?P<a>x)[[:alpha:]]+\\pN*'}}",
        "{uri: {regex: '(?i)a{2,1000}?'}}",
        "{gateways: [mesh, ns/gate, gate, gate.ns.svc.cluster.local]}",
        "{sourceLabels: {app.kubernetes.io/name: ''}}",
        "{statPrefix: x, name: b, sourceNamespace: default}",
    ),
    *rules(
        "timeout: 1h30m",
        "retries: {attempts: 0}",
        "retries: {attempts: 2, retryOn: '5xx,503', retryRemoteLocalities: true, retryIgnorePreviousHosts: false}",
        "fault: {delay: {}}",
        "fault: {delay: {percentage: {value: 1}}, abort: {}}",
        "fault: {abort: {httpStatus: 600}}",
        "mirrorPercentage: {value: 10}",
        "mirror: {host: a}, mirror_percent: 10",
        "mirror: {host: a}, mirrorPercent: 0",
        "mirrors: [{destination: {host: a}, percentage: {value: 0.00001}}]",
        "corsPolicy: {allowOrigin: ['*'], maxAge: 15s, allowCredentials: true, unmatchedPreflights: IGNORE}",
        "corsPolicy: {allowOrigins: [{regex: '.*'}], allowMethods: ['*'], allowHeaders: ['*'], exposeHeaders: [x-a]}",
        "headers: {request: {set: {':authority': b, x: '%PROTOCOL% 100%%'}, remove: [x y]}, response: {add: {a: ''}}}",
        "rewrite: {uriRegexRewrite: {match: '^/(.*)', rewrite: '/v2/\\\\1'}}",
        "rewrite: {authority: b}",
    ),
    *bare(
        "redirect: {prefixRewrite: /x}, match: [{uri: {prefix: /a}}, {method: {exact: GET}}]",
        "redirect: {derivePort: FROM_REQUEST_PORT, redirectCode: 308}",
        "redirect: {port: 0, scheme: https}",
        "directResponse: {status: 204}",
        "directResponse: {status: 200, body: {bytes: aGk=}}",
        "directResponse: {status: 200, body: {}}",
        "delegate: {name: x, namespace: other}, match: [{uri: {prefix: /a}}], timeout: 3s",
        "delegate: {}",
        "route: [{destination: {host: '*.Upper'}, weight: 0}]",
        "route: [{destination: {host: a, subset: v1, port: {number: 1}}, weight: 1}, {destination: {host: b}}]",
    ),
    "{http: [{route: [{destination: {host: a}}]}]}",
    f"{{hosts: ['*'], gateways: [gate], http: [{{{TO_A}}}]}}",
    f"{{hosts: [10.0.0.1, 'a-b.c.', '*.x'], http: [{{{TO_A}}}], exportTo: [., other]}}",
    f"{{hosts: [a], gateways: [gate], http: [{{{TO_A},"
    " match: [{headers: {'@request.auth.claims.a.b': {exact: x}, '@request.auth.claims[a][b]': {exact: x}}}]}]}",
    f"{{hosts: [a.x, b], tls: [{{match: [{{sniHosts: [a.x], destinationSubnets: [10.0.0.0/8, 1.2.3.4]}}], {TO_A}}}]}}",
    f"{{hosts: ['*.x'], gateways: [gate], tls: [{{match: [{{sniHosts: ['*.a.x', b.x], port: 443}}], {TO_A}}}]}}",
    f"{{hosts: [a], tcp: [{{{TO_A}}}, {{match: [{{port: 1, sourceLabels: {{a: b}}, gateways: [mesh]}}], {TO_A}}}]}}",
    "{hosts: [outbound_.80_._.e2e.mesh], gateways: [gate], tls: [{match: [{sniHosts: [outbound_.80_._.e2e.mesh]}],"
    f" {TO_A}}}]}}",
]
REFUSED_SERVICES = [
    *matches(
        "{headers: {x: {regex: '*'}}}",
        "{queryParams: {x: {regex: '*'}}}",
        "{headers: {x: {prefix: ''}}}",
        "{headers: {x: {regex: ''}}}",
        "{headers: {'x y': {exact: a}}}",
        "{headers: {':paths': {exact: a}}}",
        "{headers: {'@request.auth.claims.x': {exact: a}}}",
        "{uri: {regex: '(?!x)y'}}",
        "{uri: {regex: '(a)\\1'}}",
        "{uri: {regex: 'a{1001}'}}",
        "{uri: {regex: 'a++'}}",
        "{method: {prefix: ''}}",
        "{port: 65536}",
        "{sourceLabels: {'a b': c}}",
        "{sourceLabels: {a: 'b c'}}",
        "{sourceNamespace: a.b}",
        "{gateways: [a/b/c]}",
        "{gateways: [a_b]}",
    ),
    *rules(
        "timeout: 0s",
        "timeout: 1500us",
        "foo: 1",
        "retries: {attempts: -1}",
        "retries: {attempts: 0, retryOn: 5xx}",
        "retries: {perTryTimeout: 1s}",
        "retries: {attempts: 1, retryOn: '5xx, 503'}",
        "retries: {attempts: 1, retryOn: '299'}",
        "retries: {attempts: 1, backoff: 0s}",
        "fault: {}",
        "fault: {abort: {httpStatus: 199}}",
        "fault: {abort: {grpcStatus: NOPE}}",
        "fault: {abort: {http2Error: x}}",
        "fault: {delay: {exponentialDelay: 1s}}",
        "fault: {abort: {httpStatus: 503, percentage: {value: 0.00001}}}",
        "mirror: {host: a}, mirrors: [{destination: {host: a}}]",
        "mirror: {host: a}, mirrorPercent: 101",
        "mirrors: [{percentage: {value: 1}}]",
        "corsPolicy: {allowMethods: [FOO]}",
        "corsPolicy: {allowOrigins: [{exact: ''}]}",
        "corsPolicy: {maxAge: 1500ms}",
        "corsPolicy: {exposeHeaders: ['a b']}",
        "headers: {request: {set: {x: 100%}}}",
        "headers: {request: {set: {':path': /x}}}",
        "headers: {request: {remove: [host]}}",
        "headers: {response: {set: {host: x}}}",
        "headers: {request: {set: {host: x}, add: {':authority': z}}}",
        "rewrite: {authority: b}, headers: {request: {set: {host: x}}}",
        "rewrite: {}",
        "rewrite: {uri: /, uriRegexRewrite: {match: a, rewrite: b}}",
        "rewrite: {uriRegexRewrite: {match: a}}",
        "redirect: {uri: /x}",
        "directResponse: {status: 200}",
        "delegate: {name: x}",
    ),
    *bare(
        "name: x",
        "redirect: {}",
        "redirect: {uri: /x, prefixRewrite: /y}",
        "redirect: {prefixRewrite: /y}, match: [{uri: {exact: /a}}]",
        "redirect: {uri: /x, redirectCode: 200}",
        "redirect: {scheme: ftp}",
        "redirect: {uri: /x}, fault: {abort: {httpStatus: 500}}",
        "redirect: {uri: /x}, directResponse: {status: 200}",
        "directResponse: {status: 199}",
        "directResponse: {status: 200}, rewrite: {uri: /}",
        "delegate: {name: x}, redirect: {uri: /x}",
        "route: [{weight: 1}]",
        "route: [{destination: {}}]",
        "route: [{destination: {host: '*'}}]",
        "route: [{destination: {host: a_b}}]",
        "route: [{destination: {host: a, subset: a.b}}]",
        "route: [{destination: {host: a, port: {}}}]",
        "route: [{destination: {host: a, port: {number: 0}}}]",
        "route: [{destination: {host: a}, weight: -1}]",
        "route: [{destination: {host: a}}, {destination: {host: b}}]",
    ),
    "{hosts: [a]}",
    f"{{hosts: ['*'], http: [{{{TO_A}}}]}}",
    f"{{hosts: ['*'], gateways: [gate, mesh], http: [{{{TO_A}}}]}}",
    f"{{hosts: [a.x, '*.x'], http: [{{{TO_A}}}]}}",
    f"{{hosts: [a, a], http: [{{{TO_A}}}]}}",
    f"{{hosts: ['a.*'], http: [{{{TO_A}}}]}}",
    f"{{hosts: [a.123], http: [{{{TO_A}}}]}}",
    f"{{hosts: [a], gateways: [gate/], http: [{{{TO_A}}}]}}",
    f"{{hosts: [a], http: [{{{TO_A}}}], exportTo: [a, a]}}",
    f"{{hosts: [a], http: [{{{TO_A}}}], exportTo: [., default]}}",
    f"{{hosts: [a], http: [{{{TO_A}}}], exportTo: ['*', a]}}",
    f"{{hosts: [a], http: [{{{TO_A}}}], exportTo: ['~']}}",
    f"{{gateways: [gate], http: [{{{TO_A}}}]}}",
    "{http: [{delegate: {name: x}}]}",
    f"{{hosts: [a], tls: [{{{TO_A}}}]}}",
    f"{{hosts: [a], tls: [{{match: [{{port: 1}}], {TO_A}}}]}}",
    f"{{hosts: [a], tls: [{{match: [{{sniHosts: [b.x]}}], {TO_A}}}]}}",
    "{hosts: [a], tls: [{match: [{sniHosts: [a]}]}]}",
    "{hosts: [a], tcp: [{}]}",
    f"{{hosts: [a], tcp: [{{match: [{{destinationSubnets: [10.0.0.0/99]}}], {TO_A}}}]}}",
    f"{{hosts: [a], tcp: [{{match: [{{port: 70000}}], {TO_A}}}]}}",
]


def servers(*contents: str) -> list[str]:
    return [f"{{servers: [{{{content}}}]}}" for content in contents]


HTTP = "port: {number: 80, name: http, protocol: HTTP}"
HTTPS = "port: {number: 443, name: https, protocol: HTTPS}, hosts: ['*']"
VALID_GATEWAYS = [
    *servers(
        f"{HTTP}, hosts: ['*', ./a.b, ns/*.c.d, '*/e.f', 10.0.0.1, '*/*']",
        f"{HTTP}, hosts: ['*'], bind: 127.0.0.1, name: x, defaultEndpoint: 127.0.0.1:1",
        f"{HTTP}, hosts: ['*'], tls: {{httpsRedirect: true}}",
        "port: {number: 0, name: http, protocol: http2}, hosts: ['*'], bind: 'unix:///tmp/a'",
        *(
            f"port: {{number: 1, name: a, protocol: {name}}}, hosts: ['*']"
            for name in ("HTTP2", "GRPC", "GRPC-Web", "mongo", "TCP", "MySQL", "REDIS", "UDP", "HTTP_PROXY")
        ),
        f"{HTTPS}, tls: {{}}",
        f"{HTTPS}, tls: {{mode: SIMPLE, credentialName: a, minProtocolVersion: TLSV1_0, cipherSuites: [nope]}}",
        f"{HTTPS}, tls: {{mode: MUTUAL, credentialNames: [a, b], subjectAltNames: [c], caCertCredentialName: d}}",
        f"{HTTPS}, tls: {{mode: OPTIONAL_MUTUAL, serverCertificate: /a, privateKey: /b, caCertificates: c, caCrl: d}}",
        f"{HTTPS}, tls: {{mode: SIMPLE, tlsCertificates: [{{serverCertificate: /a, privateKey: /b}}]}}",
        f"{HTTPS}, tls: {{mode: ISTIO_MUTUAL, subjectAltNames: [a]}}",
        f"{HTTPS}, tls: {{mode: PASSTHROUGH, credentialName: a}}",
        "port: {number: 443, name: tls, protocol: TLS}, hosts: ['*.local'], tls: {mode: AUTO_PASSTHROUGH}",
    ),
]
REFUSED_GATEWAYS = [
    "{selector: {a: b}}",
    *servers(
        HTTP,
        f"{HTTP}, hosts: [short]",
        f"{HTTP}, hosts: ['*-a.b']",
        f"{HTTP}, hosts: [a_b.c]",
        f"{HTTP}, hosts: ['a/b/c.d']",
        f"{HTTP}, hosts: ['~/c.d']",
        f"{HTTP}, hosts: ['*'], bind: nowhere",
        f"{HTTP}, hosts: ['*'], bind: 'unix://a'",
        f"{HTTP}, hosts: ['*'], tls: {{mode: SIMPLE, credentialName: a}}",
        "port: {number: 80, name: http, protocol: SMTP}, hosts: ['*']",
        "port: {number: 0, name: http, protocol: HTTP}, hosts: ['*']",
        "port: {number: 80, protocol: HTTP}, hosts: ['*']",
        "port: {number: 80, name: a, protocol: HTTP, targetPort: 1}, hosts: ['*']",
        "port: {number: 80, name: a, protocol: TCP}, hosts: ['*'], tls: {mode: SIMPLE, credentialName: a}",
        HTTPS,
        f"{HTTPS}, tls: {{mode: SIMPLE}}",
        f"{HTTPS}, tls: {{mode: SIMPLE, serverCertificate: /a}}",
        f"{HTTPS}, tls: {{mode: MUTUAL, serverCertificate: /a, privateKey: /b}}",
        f"{HTTPS}, tls: {{mode: SIMPLE, serverCertificate: /a, privateKey: /b, caCrl: /c}}",
        f"{HTTPS}, tls: {{mode: SIMPLE, credentialName: a, credentialNames: [b]}}",
        f"{HTTPS}, tls: {{mode: SIMPLE, credentialName: a, serverCertificate: /a, privateKey: /b}}",
        f"{HTTPS}, tls: {{mode: ISTIO_MUTUAL, credentialName: a}}",
        f"{HTTPS}, tls: {{mode: NONE}}",
    ),
    f"{{servers: [{{{HTTP}, hosts: ['*']}}, {{{HTTP}, hosts: ['*']}}]}}",
]
# Refused here only: what Envoy would reject, and what the API server refuses before Istio is asked.
OURS_ALONE = [
    *bare("redirect: {uri: /x, redirectCode: 304}"),
    *rules("retries: {attempts: '1'}"),
    *servers(f"{HTTPS}, tls: {{mode: SIMPLE, credentialNames: [a, b, c]}}"),
]


def document(spec: str, name: str) -> str:
    kind = "Gateway" if "servers:" in spec or spec.startswith("{selector") else "VirtualService"
    return f"""
apiVersion: networking.istio.io/v1
kind: {kind}
metadata: {{name: {name}, namespace: default}}
spec: {spec}
"""


@pytest.mark.parametrize("spec", [*VALID_SERVICES, *VALID_GATEWAYS])
def test_what_is_valid_is_taken(spec: str) -> None:
    assert len(load_alone(document(spec, "it"))) == 1


@pytest.mark.parametrize("spec", [*REFUSED_SERVICES, *REFUSED_GATEWAYS, *OURS_ALONE])
def test_what_is_not_is_refused_with_its_place(spec: str) -> None:
    with pytest.raises(InvalidResource) as caught:
        load_alone(document(spec, "it"))
    (problem, *_) = caught.value.problems
    assert problem.at.line == 5
    assert problem.at.path.startswith("spec")


def test_istio_says_the_same(repository: Path, tmp_path: Path) -> None:
    istioctl = repository / ".tools" / "bin" / "istioctl"
    if not istioctl.exists():
        pytest.skip("istioctl is not built: `make tools`")
    valid = [*VALID_SERVICES, *VALID_GATEWAYS, *OURS_ALONE]
    refused = [*REFUSED_SERVICES, *REFUSED_GATEWAYS]
    assert by_istio(istioctl, tmp_path, [*valid, *refused]) == set(refused)


def by_istio(istioctl: Path, folder: Path, specs: Iterable[str]) -> set[str]:
    """Those of the specs that Istio refuses."""
    names = {f"n{number}": spec for number, spec in enumerate(specs)}
    command = [str(istioctl), "validate"]
    for name, spec in names.items():
        file = folder / f"{name}.yaml"
        file.write_text(document(spec, name))
        command += ["-f", str(file)]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    refused = answer.stderr.partition("Error:")[2]
    return {names[name] for name in re.findall(r"\* \w+/default/(n\d+): ", refused)}


def test_a_gateways_name_is_a_label() -> None:
    text = document(f"{{servers: [{{{HTTP}, hosts: ['*']}}]}}", "it.is")
    with pytest.raises(InvalidResource, match=r"it\.is"):
        load_alone(text)


@pytest.mark.parametrize(
    ("expression", "fine"),
    [
        (r"\Qa.b\E+", True),
        (r"[]a[:digit:]\]-]+", True),
        (r"[^]]\x{10FFFF}\z", True),
        (r"(?U)(?<n>a|b)(?:c)(?-i:d)", True),
        (r"\8", False),
        ("(?#x)", False),
        ("(?>x)", False),
        (r"a\Z", False),
        ("[z-a]", False),
        ("a**", False),
        ("(", False),
        ("x" * 1025, False),
    ],
)
def test_regular_expressions_are_those_of_re2(expression: str, fine: bool) -> None:
    assert (regex_problem(expression) == "") is fine


@pytest.mark.parametrize(
    ("value", "fine"),
    [
        ("", True),
        ("100%%", True),
        ("%REQ(:path)%", True),
        ('%UPSTREAM_METADATA(["a", "b"])%x%PROTOCOL%', True),
        ("%", False),
        ("%A", False),
        ("%A(b", False),
        ('%A(["b"]%', False),
        ("a\nb", False),
    ],
)
def test_values_of_headers(value: str, fine: bool) -> None:
    assert (header_value_problem(value) == "") is fine
