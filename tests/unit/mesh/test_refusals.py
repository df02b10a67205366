"""What is refused when resources are read, and that the message leads to the place."""

from __future__ import annotations

from pathlib import Path

import pytest

from mlmesh_local.resources import Document, InvalidResource, ResourceSet, load_resources, read_documents, tree
from mlmesh_local.resources.fields import parse_duration
from mlmesh_local.resources.mesh_config import MeshConfig
from mlmesh_runtime.errors import InvalidInput
from tests.support.mesh_documents import SUBSETS
from tests.support.mesh_world import WORKLOADS, destination_rule, load, load_alone, resource, virtual_service


def refusal(*texts: str) -> str:
    with pytest.raises(InvalidResource) as caught:
        load_alone(*texts)
    return str(caught.value)


def test_the_message_names_file_line_resource_and_path() -> None:
    text = """apiVersion: networking.istio.io/v1
kind: VirtualService
metadata:
  name: inference
  namespace: mlmesh
spec:
  hosts: [inference]
  http:
    - route:
        - destination:
            host: inference
          weight: 90
        - destination: {host: inference}
          wieght: 10
"""
    with pytest.raises(InvalidResource) as caught:
        load_resources([Document(source="mesh/istio/inference.yaml", text=text)])
    assert str(caught.value) == (
        "mesh/istio/inference.yaml:14: VirtualService mlmesh/inference: spec.http[0].route[1].wieght: "
        'unknown field (did you mean "weight"?)'
    )
    (violation,) = caught.value.violations
    assert violation.field == "spec.http[0].route[1].wieght"
    assert caught.value.reason == "INVALID_RESOURCE"
    assert isinstance(caught.value, InvalidInput)


def test_all_problems_are_told_at_once_in_order() -> None:
    text = virtual_service("[{timeout: 5, route: [{destination: {hots: x}}]}]").replace("}]}]}", "}]}]\n, hots: [x]}")
    lines = refusal(text, resource("PeerAuthentication", "{mtls: {mode: STRIKT}}")).splitlines()
    assert len(lines) == 5
    assert [line.split(":")[0] for line in lines] == ["0.yaml"] * 4 + ["1.yaml"]


def route(extra: str) -> str:
    return virtual_service(f"[{{route: [{{destination: {{host: server}}}}], {extra}}}]")


CLIENT = WORKLOADS.split("---")[4]

RULES = {
    # VirtualService
    "weight: must be 0 or more, not -1": virtual_service("[{route: [{destination: {host: server}, weight: -1}]}]"),
    "sum to zero": virtual_service(
        "[{route: [{destination: {host: server, subset: v1}, weight: 0}, {destination: {host: server}}]}]"
    ),
    'must be a duration such as "300ms"': route("timeout: 5"),
    "must be at least 0.001 s": route("retries: {attempts: 1, backoff: 1us}"),
    '"unavailble" is no retry condition (did you mean "unavailable"?)': route(
        "retries: {attempts: 1, retryOn: 'unavailble,503'}"
    ),
    "0 turns retries off": route("retries: {attempts: 0, retryOn: unavailable}"),
    '"UNAVAILABEL" is not one of OK': route("fault: {abort: {grpcStatus: UNAVAILABEL}}"),
    'needs "delay", "abort" or both': route("fault: {}"),
    "write {value: 50}": route("fault: {abort: {httpStatus: 503, percentage: 50}}"),
    "must be 0 to 100, not 101": route("fault: {abort: {httpStatus: 503, percentage: {value: 101}}}"),
    'spec.http[0].route: cannot be set together with "redirect"': route("redirect: {uri: /x}"),
    '"FETCH" is not one of': route("corsPolicy: {allowMethods: [FETCH]}"),
    'needs "http", "tls" or "tcp"': virtual_service("[]").replace("http: []", "tcp: []"),
    'cannot be set together with "exact"': route("match: [{uri: {exact: a, prefix: b}}]"),
    "look-around or back-references": route("match: [{uri: {regex: '(?!x)y'}}]"),
    "is not a regular expression": route("match: [{headers: {x: {regex: '('}}}]"),
    '":paths" is not a header name': route("match: [{headers: {':paths': {exact: x}}}]"),
    '"*" is not a host': virtual_service("[{route: [{destination: {host: '*'}}]}]"),
    "must be 1 to 65535, not 70000": virtual_service("[{route: [{destination: {host: a, port: {number: 70000}}}]}]"),
    "without hosts, which is a delegate": virtual_service("[]", fields="hosts: [], gateways: [a]"),
    'needs "route", "redirect", "directResponse" or "delegate"': virtual_service("[{name: x}]"),
    'cannot be set together with "mirror"': route("mirror: {host: a}, mirrors: [{destination: {host: a}}]"),
    '":path" cannot be changed here': route("headers: {request: {remove: [':path']}}"),
    "a percent sign that begins no variable": route("headers: {request: {set: {x: 100%}}}"),
    "whole milliseconds": route("timeout: 1500us"),
    '"hots_2" is not a host name': virtual_service("[{route: [{destination: {host: hots_2}}]}]"),
    '"a.x" and "*.x" overlap': virtual_service("[]", fields="hosts: [a.x, '*.x']"),
    "claims are known at gateways only": route("match: [{headers: {'@request.auth.claims.a': {exact: x}}}]"),
    "the authority is set more than once": route("rewrite: {authority: a}, headers: {request: {set: {host: b}}}"),
    "is none of the hosts": virtual_service("[]").replace(
        "http: []", "tls: [{match: [{sniHosts: [a.b]}], route: [{destination: {host: a}}]}]"
    ),
    "Envoy redirects with 301": virtual_service("[{redirect: {uri: /x, redirectCode: 304}}]"),
    "is not base64": virtual_service("[{directResponse: {status: 200, body: {bytes: '!'}}}]"),
    "must be a string, not a number; quote it": route("headers: {request: {set: {x: 1}}}"),
    # DestinationRule
    'the subset "v1" occurs twice': destination_rule("{}", "[{name: v1}, {name: v1}]"),
    'loadBalancer.warmup: "duration" is required': destination_rule("{loadBalancer: {warmup: {}}}"),
    "must be a prime number, not 4": destination_rule(
        "{loadBalancer: {consistentHash: {useSourceIp: true, maglev: {tableSize: 4}}}}"
    ),
    "must have at least one setting": destination_rule("{}"),
    "takes effect only with": destination_rule("{outlierDetection: {consecutiveLocalOriginFailures: 5}}"),
    'cannot be set together with "credentialName"': destination_rule(
        "{tls: {mode: SIMPLE, credentialName: x, caCertificates: /x}}"
    ),
    '"clientCertificate" is required': destination_rule("{tls: {mode: MUTUAL, privateKey: /x}}"),
    "http2MaxRequests: must be a whole number": destination_rule("{connectionPool: {http: {http2MaxRequests: many}}}"),
    # PeerAuthentication, AuthorizationPolicy
    '(did you mean "STRICT"?)': resource("PeerAuthentication", "{mtls: {mode: STRIKT}}"),
    'portLevelMtls: needs a "selector"': resource("PeerAuthentication", "{portLevelMtls: {9000: {mode: STRICT}}}"),
    "denies nothing": resource("AuthorizationPolicy", "{action: DENY}"),
    "must not be empty; leave it out": resource("AuthorizationPolicy", "{rules: [{from: []}]}"),
    "from[0].source: must not be empty": resource("AuthorizationPolicy", "{rules: [{from: [{source: {}}]}]}"),
    '"request.header[x]" is no attribute': resource(
        "AuthorizationPolicy", "{rules: [{when: [{key: 'request.header[x]', values: [a]}]}]}"
    ),
    "a port number in quotes": resource("AuthorizationPolicy", "{rules: [{to: [{operation: {ports: [http]}}]}]}"),
    # Gateway, ServiceEntry, Telemetry
    'mode MUTUAL needs "caCertificates" or "credentialName"': resource(
        "Gateway",
        "{servers: [{port: {number: 1, name: a, protocol: HTTPS}, tls: {mode: MUTUAL}, hosts: ['*']}]}",
        group="networking.istio.io/v1",
    ),
    'protocol HTTPS needs "tls"': resource(
        "Gateway",
        "{servers: [{port: {number: 1, name: a, protocol: HTTPS}, hosts: ['*']}]}",
        group="networking.istio.io/v1",
    ),
    '"HBONE" is not one of': resource(
        "Gateway",
        "{servers: [{port: {number: 1, name: a, protocol: HBONE}, hosts: ['*']}]}",
        group="networking.istio.io/v1",
    ),
    "of protocol HTTP only httpsRedirect": resource(
        "Gateway",
        "{servers: [{port: {number: 1, name: a, protocol: HTTP}, tls: {mode: SIMPLE, credentialName: c},"
        " hosts: ['*']}]}",
        group="networking.istio.io/v1",
    ),
    '"shop" is a short name': resource(
        "Gateway",
        "{servers: [{port: {number: 1, name: a, protocol: HTTP}, hosts: [shop]}]}",
        group="networking.istio.io/v1",
    ),
    'tls.credentialNames: cannot be set together with "credentialName"': resource(
        "Gateway",
        "{servers: [{port: {number: 1, name: a, protocol: HTTPS}, hosts: ['*'],"
        " tls: {mode: SIMPLE, credentialName: c, credentialNames: [d]}}]}",
        group="networking.istio.io/v1",
    ),
    "does not go with resolution NONE": resource(
        "ServiceEntry",
        "{hosts: [a.example], ports: [{number: 80, name: http, protocol: HTTP}], endpoints: [{address: 10.0.0.1}]}",
        group="networking.istio.io/v1",
    ),
    "randomSamplingPercentage: must be 0 to 100": resource(
        "Telemetry", "{tracing: [{randomSamplingPercentage: 101}]}", group="telemetry.istio.io/v1"
    ),
    # Kubernetes
    "initContainers: not supported": CLIENT.replace("spec: {containers", "spec: {initContainers: [], containers"),
    "must be 0 to 100, not 1000": CLIENT.replace("spec:\n", "spec:\n  replicas: 1000\n", 1),
    "which the template's labels do not have": CLIENT.replace(
        "matchLabels: {app: client}", "matchLabels: {app: cilent}"
    ),
    '"containers" needs at least one container': resource("Deployment", "{template: {spec: {}}}", group="apps/v1"),
    # Documents
    '"VirtualServices" is not supported by the laptop mesh (did you mean "VirtualService"?)': resource(
        "VirtualServices", "{}", group="networking.istio.io/v1"
    ),
    "use networking.istio.io/v1": resource("VirtualService", "{}", group="networking.istio.io/v2"),
    '"kind" is required': "apiVersion: v1\n",
    "must be a mapping, not a string": "just words\n",
    "not valid YAML": "a: [1\n",
    'the key "a" occurs twice': "a: 1\na: 2\n",
    "is also defined at 0.yaml:2": resource("PeerAuthentication", "{}") + resource("PeerAuthentication", "{}"),
    '"Bad_Name" is not a Kubernetes name': resource("PeerAuthentication", "{}", name="Bad_Name"),
    "resources are merged by name": resource("PeerAuthentication", "{}").replace("{name: it}", "{generateName: it-}"),
    "must be a mapping, not a list": resource("PeerAuthentication", "[]"),
    "values are nested too deeply": "a: " + "[" * 600 + "]" * 600,
}


@pytest.mark.parametrize("message", RULES)
def test_refused_in_words(message: str) -> None:
    assert message in refusal(RULES[message])


def test_weights_up_to_32_bits_in_sum() -> None:
    half = 2**31 - 1
    item = f"{{destination: {{host: server}}, weight: {half}}}"
    load_alone(virtual_service(f"[{{route: [{item}, {item}]}}]"))
    assert "more than 4294967295" in refusal(virtual_service(f"[{{route: [{item}, {item}, {item}]}}]"))


def test_aliases_cannot_make_a_file_endless(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tree, "NODES_MAX", 1000)
    levels = "\n".join(f"a{n}: &a{n} [{', '.join(f'*a{n - 1}' for _ in range(10))}]" for n in range(1, 8))
    assert "more than 1000 values" in refusal(f"a0: &a0 [x, x]\n{levels}\n")


# Against each other


def crosscheck(*texts: str) -> str:
    with pytest.raises(InvalidResource) as caught:
        load(WORKLOADS, *texts)
    return str(caught.value)


def send(destination: str, fields: str = "hosts: [server]") -> str:
    return virtual_service(f"[{{route: [{{destination: {destination}}}]}}]", fields=fields)


TOGETHER = {
    'has no subset "v3": DestinationRule mlmesh/server has v1, v2': (
        SUBSETS,
        send("{host: server, subset: v3}"),
    ),
    "there is no DestinationRule of that host": (send("{host: server, subset: v1}"),),
    'no Service and no ServiceEntry (did you mean "server.mlmesh.svc.cluster.local"?)': (send("{host: sever}"),),
    "has no port 9001; it has 9000, 9090": (send("{host: server, port: {number: 9001}}"),),
    'spec.gateways[0]: there is no Gateway "mlmesh/way-in"': (
        send("{host: server}", "hosts: [server], gateways: [way-in]"),
    ),
    'there is no ServiceAccount "mlmesh/operater", which its pods name (serviceAccountName)': (
        CLIENT.replace("name: client", "name: toolbox").replace(
            "spec: {containers", "spec: {serviceAccountName: operater, containers"
        ),
    ),
    'spec.ports[0].targetPort: targetPort "grcp" is the name of no container port of Deployment mlmesh/server-v1': (
        resource("Service", "{selector: {app: server}, ports: [{name: grpc, port: 1, targetPort: grcp}]}", group="v1"),
    ),
}


@pytest.mark.parametrize("message", TOGETHER)
def test_refused_together(message: str) -> None:
    assert message in crosscheck(*TOGETHER[message])


@pytest.mark.parametrize(
    "text",
    [
        resource("Service", "{selector: {app: a}, ports: [{name: grpc, port: 1}]}", name='"web\\n"', group="v1"),
        resource("Service", '{selector: {app: a}, ports: [{name: "grpc\\n", port: 1}]}', group="v1"),
        virtual_service('[{route: [{destination: {host: "server\\n"}}]}]'),
        destination_rule("{loadBalancer: {simple: RANDOM}}", '[{name: v1, labels: {version: "v1\\n"}}]'),
        resource("HTTPRoute", '{parentRefs: [{name: a}], hostnames: ["a.b\\n"]}', group="gateway.networking.k8s.io/v1"),
    ],
)
def test_a_line_break_at_the_end_belongs_to_a_name(text: str) -> None:
    """Block scalars of YAML end in one, and Python's `$` overlooks it."""
    with pytest.raises(InvalidResource):
        load_alone(text)
    load_alone(text.replace("\\n", ""))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("namespace: shop", "namespace: Shop", '"Shop" is not a Kubernetes name'),
        ("namespace: shop", "namespace: a.b", "namespace"),
        ("namespace: shop", 'namespace: shop, labels: {"a b": c}', '"a b"'),
        ("namespace: shop", "namespace: shop, labels: {a: b c}", '"b c"'),
        ("namespace: shop", "namespace: shop, labels: {a: 1}", "metadata.labels.a: must be a string, not a number"),
        ("namespace: shop", 'namespace: shop, annotations: {"a b": c}', '"a b"'),
        ("egress: [{hosts: [./*]}]", "egress: [{hosts: [web]}]", '"web" must be NAMESPACE/HOST'),
        ("egress: [{hosts: [./*]}]", "egress: [null]", "spec.egress[0]: must be a mapping, not null"),
        ("egress: [{hosts: [./*]}]", "egress: []", "at least one of"),
        (
            "egress: [{hosts: [./*]}]",
            "egress: [{hosts: [./*]}], ingres: null",
            'unknown field (did you mean "ingress"?)',
        ),
    ],
)
def test_what_a_cluster_refuses_of_any_kind(old: str, new: str, message: str) -> None:
    text = """apiVersion: networking.istio.io/v1
kind: Sidecar
metadata: {name: it, namespace: shop}
spec: {egress: [{hosts: [./*]}]}
"""
    load_alone(text)
    assert message in refusal(text.replace(old, new))


def test_a_problem_is_told_once() -> None:
    lines = refusal(virtual_service("[{route: {destination: {host: server}}}]")).splitlines()
    assert len(lines) == len(set(lines)) == 2


def warnings(*texts: str) -> str:
    return "\n".join(ResourceSet().apply(load_alone(WORKLOADS, *texts)).warnings)


def test_what_is_odd_but_possible_is_a_warning() -> None:
    assert warnings() == ""
    found = warnings(destination_rule("{tls: {mode: ISTIO_MUTUAL}}", "[{name: v3, labels: {version: v3}}]"))
    # As other problems are told, with Istio's code; "Error" beside "warning" would be one word too many.
    assert ": DestinationRule mlmesh/server: " in found
    assert found.endswith("[IST0173]")
    assert "Error" not in found
    twin = send("{host: server}").replace("name: server}", "name: twin}")
    assert "VirtualService mlmesh/twin: " in warnings(send("{host: server}"), twin)
    one = "{route: [{destination: {host: server}}]}"
    assert "it never acts" in warnings(route("timeout: 1s, retries: {attempts: 1, perTryTimeout: 2s}"))
    assert "sidecars do not route it" in warnings(virtual_service(f"[{one}]", fields="hosts: [shop.example]"))
    assert "is never reached" in warnings(virtual_service(f"[{one}, {one}]"))
    assert 'no workload has the labels "app=x"' in warnings(
        resource("AuthorizationPolicy", "{selector: {matchLabels: {app: x}}}")
    )
    two = resource("PeerAuthentication", "{}") + resource("PeerAuthentication", "{}", name="later")
    assert "PeerAuthentication mlmesh/it has the same scope and is older" in warnings(two)


def test_kinds_that_only_a_cluster_needs_are_ignored() -> None:
    kinds = ("PodDisruptionBudget", "HorizontalPodAutoscaler", "ServiceMonitor")
    assert len(load_alone(*(resource(kind, "{whatever: 1}", group="any/v1") for kind in kinds))) == 0
    assert len(load_alone("{apiVersion: v1, kind: ConfigMap, metadata: {name: settings}, data: {a: b}}")) == 0


def test_the_settings_of_the_mesh_are_read_from_istios_configmap() -> None:
    text = """
apiVersion: v1
kind: ConfigMap
metadata: {name: istio, namespace: istio-system}
data:
  mesh: |
    trustDomain: example.org
    trustDomainAliases: [old.example.org]
"""
    (config,) = load_alone(text).specs(MeshConfig)
    assert (config.trust_domain, config.trust_domain_aliases) == ("example.org", ("old.example.org",))
    with pytest.raises(InvalidResource, match=r"0.yaml:8: ConfigMap istio-system/istio: data.mesh.trustDomainAlias: "):
        load_alone(text.replace("trustDomainAliases", "trustDomainAlias"))


def test_the_projects_own_files_are_accepted(repository: Path) -> None:
    documents = read_documents([repository / "manifests" / "base", repository / "mesh" / "istio"])
    applied = ResourceSet().apply(load_resources(documents))
    assert applied.warnings == ()
    assert {resource.kind for resource in applied.resources} >= {"Deployment", "VirtualService", "Gateway"}


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(InvalidResource, match="cannot be read: No such file"):
        read_documents([tmp_path / "missing.yaml"])
    (tmp_path / "latin.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InvalidResource, match="is not UTF-8 text"):
        read_documents([tmp_path])


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("300ms", 0.3), ("1h30m", 5400), ("0s", 0), ("0", 0), ("1.5s", 1.5), (".5s", 0.5), ("2m3s", 123)],
)
def test_durations(text: str, seconds: float) -> None:
    assert parse_duration(text) == pytest.approx(seconds)


@pytest.mark.parametrize("text", ["", "5", "s", "1s ", "1 s", "-1s", "1d", "1sx", "s1"])
def test_not_durations(text: str) -> None:
    assert parse_duration(text) is None
