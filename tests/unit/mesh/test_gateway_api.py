"""The Gateway API without any tool: what follows from its resources, what is refused, and statuses."""

from __future__ import annotations

import pytest

from mlmesh_local.certificates import RootBundle
from mlmesh_local.model import World
from mlmesh_local.offline import offline_world
from mlmesh_local.resources import Deployment, Document, Gateway, InvalidResource, ResourceSet, Service, load_resources
from mlmesh_local.resources.gateway_api.attach import hosts_overlap, intersection, is_subset
from mlmesh_local.resources.gateway_api.derive import conversion_of, derive
from mlmesh_local.resources.gateway_api.status import resource_statuses, text_with_status
from mlmesh_local.resources.model import VirtualService
from mlmesh_local.root_bundles import backend_bundles
from mlmesh_local.translate import View, translate
from tests.support.pki import Authority

SERVICES = """
apiVersion: v1
kind: Service
metadata: {name: server}
spec: {selector: {app: server}, ports: [{name: grpc, port: 9000}]}
---
apiVersion: v1
kind: Service
metadata: {name: other, namespace: lab}
spec: {selector: {app: other}, ports: [{name: grpc, port: 9000}]}
---
"""
GATEWAY = """
apiVersion: gateway.networking.k8s.io/v1
kind: Gateway
metadata: {name: edge, annotations: {gateway.istio.io/service-account: way-in}}
spec:
  gatewayClassName: istio
  infrastructure: {labels: {team: red}}
  listeners: [{name: web, port: 8080, protocol: HTTP, hostname: "*.example.com"}]
---
"""


def route(kind: str, spec: str, name: str = "it", namespace: str = "mlmesh") -> str:
    return f"""
apiVersion: gateway.networking.k8s.io/v1
kind: {kind}
metadata: {{name: {name}, namespace: {namespace}}}
spec: {spec}
---
"""


def grant(name: str = "") -> str:
    named = f", name: {name}" if name else ""
    return f"""
apiVersion: gateway.networking.k8s.io/v1beta1
kind: ReferenceGrant
metadata: {{name: grant, namespace: lab}}
spec:
  from: [{{group: gateway.networking.k8s.io, kind: HTTPRoute, namespace: mlmesh}}]
  to: [{{group: "", kind: Service{named}}}]
---
"""


def load(*texts: str) -> ResourceSet:
    return load_resources([Document(source=f"{i}.yaml", text=text) for i, text in enumerate(texts)])


def reasons(resources: ResourceSet, kind: str = "HTTPRoute") -> list[str]:
    parents = resource_statuses(resources)[kind, "mlmesh", "it"]["parents"]
    return [condition["reason"] for parent in parents for condition in parent["conditions"]]


def refusal(*texts: str) -> str:
    with pytest.raises(InvalidResource) as error:
        load(*texts)
    return error.value.message


def test_a_gateway_brings_a_workload_a_service_and_an_account() -> None:
    resources = derive(load(SERVICES, GATEWAY))
    (deployment,) = resources.specs(Deployment)
    assert (deployment.meta.name, deployment.service_account, deployment.is_gateway) == ("edge-istio", "way-in", True)
    assert deployment.labels["gateway.networking.k8s.io/gateway-name"] == "edge"
    assert deployment.labels["team"] == "red"
    service = next(one for one in resources.specs(Service) if one.meta.name == "edge-istio")
    assert [port.number for port in service.ports] == [8080]
    (gateway,) = resources.specs(Gateway)
    assert gateway.servers[0].hosts == ("*.example.com",)
    # Asking again, and of what was derived, gives the same.
    assert derive(resources) is resources
    assert derive(load(SERVICES, GATEWAY)) is resources


def test_a_deployment_of_the_same_name_stays_a_persons_own() -> None:
    own = """
apiVersion: apps/v1
kind: Deployment
metadata: {name: edge-istio}
spec:
  replicas: 3
  selector: {matchLabels: {a: b}}
  template: {metadata: {labels: {a: b}}, spec: {containers: [{name: x, command: [serve]}]}}
"""
    (deployment,) = derive(load(SERVICES, GATEWAY, own)).specs(Deployment)
    assert deployment.replicas == 3


def test_a_route_reaches_the_proxy_of_its_gateway() -> None:
    rule = "{matches: [{method: {service: a.B}}], backendRefs: [{name: server, port: 9000}]}"
    spec = f"{{parentRefs: [{{name: edge}}], rules: [{rule}]}}"
    world: World = offline_world(load(SERVICES, GATEWAY, route("GRPCRoute", spec)))
    (proxy,) = world.proxies
    configuration = translate(View(world), proxy)
    routes = next(found for url, found in configuration.items() if url.endswith("RouteConfiguration"))
    (host,) = routes["http.8080"]["virtual_hosts"][:1]
    assert host["routes"][0]["match"]["path_separated_prefix"] == "/a.B"
    assert host["routes"][0]["route"]["cluster_not_found_response_code"] == "INTERNAL_SERVER_ERROR"


def test_a_service_as_parent_routes_sidecars() -> None:
    parent = '{group: "", kind: Service, name: server, port: 9000}'
    spec = f"{{parentRefs: [{parent}], rules: [{{backendRefs: [{{name: server, port: 9000}}]}}]}}"
    (service,) = derive(load(SERVICES, route("HTTPRoute", spec))).specs(VirtualService)
    assert service.hosts == ("server.mlmesh.svc.cluster.local",)
    assert service.gateways == ("mesh",)
    assert service.semantics == "gateway"
    assert service.http[0].matches[0].port == 9000


@pytest.mark.parametrize(("more", "found"), [((), "RefNotPermitted"), ((grant(),), "ResolvedRefs")])
def test_another_namespace_needs_a_grant(more: tuple[str, ...], found: str) -> None:
    spec = "{parentRefs: [{name: edge}], rules: [{backendRefs: [{name: other, namespace: lab, port: 9000}]}]}"
    resources = load(SERVICES, GATEWAY, route("HTTPRoute", spec), *more)
    assert reasons(resources) == ["Accepted", found]


def test_a_grant_for_one_name_is_for_that_name() -> None:
    spec = "{parentRefs: [{name: edge}], rules: [{backendRefs: [{name: other, namespace: lab, port: 9000}]}]}"
    assert reasons(load(SERVICES, GATEWAY, route("HTTPRoute", spec), grant("other")))[1] == "ResolvedRefs"
    assert reasons(load(SERVICES, GATEWAY, route("HTTPRoute", spec), grant("another")))[1] == "RefNotPermitted"


@pytest.mark.parametrize(
    ("parent", "found"),
    [
        ("{name: edge, sectionName: nope}", "NoMatchingParent"),
        ("{name: edge, port: 1}", "NoMatchingParent"),
        ("{name: edge, sectionName: web}", "NoMatchingListenerHostname"),
    ],
)
def test_why_a_listener_does_not_take_a_route(parent: str, found: str) -> None:
    spec = f"{{parentRefs: [{parent}], hostnames: [a.org], rules: [{{backendRefs: [{{name: server, port: 9000}}]}}]}}"
    assert reasons(load(SERVICES, GATEWAY, route("HTTPRoute", spec)))[0] == found


def test_another_namespace_is_not_allowed_by_default() -> None:
    spec = "{parentRefs: [{name: edge, namespace: mlmesh}], rules: [{backendRefs: [{name: other, port: 9000}]}]}"
    resources = load(SERVICES, GATEWAY, route("HTTPRoute", spec, namespace="lab"))
    (parent,) = resource_statuses(resources)["HTTPRoute", "lab", "it"]["parents"]
    assert parent["conditions"][0]["reason"] == "NotAllowedByListeners"


def test_a_gateway_of_another_controller_is_left_alone() -> None:
    resources = load(SERVICES, GATEWAY.replace("gatewayClassName: istio", "gatewayClassName: theirs"))
    assert conversion_of(resources).gateways == ()
    assert derive(resources).specs(Deployment) == ()


def test_programmed_says_whether_a_proxy_serves() -> None:
    resources = load(SERVICES, GATEWAY)
    key = ("KubernetesGateway", "mlmesh", "edge")

    def programmed(addresses: dict[str, tuple[str, ...]]) -> tuple[str, str]:
        condition = resource_statuses(resources, addresses)[key]["conditions"][1]
        return condition["status"], condition["reason"]

    host = "edge-istio.mlmesh.svc.cluster.local"
    assert programmed({host: ("127.64.1.1",)}) == ("True", "Programmed")
    assert programmed({host: ()}) == ("False", "AddressNotAssigned")


def test_a_status_is_written_beside_the_text_of_its_resource() -> None:
    resources = load(SERVICES, GATEWAY)
    gateway = next(one for one in resources if one.kind == "KubernetesGateway")
    text = text_with_status(gateway, resource_statuses(resources)[gateway.key])
    assert "attachedRoutes: 0" in text
    assert load(text).listed("KubernetesGateway")[0].key == gateway.key


REFUSED = {
    "sessionPersistence: not supported": "{rules: [{sessionPersistence: {}}]}",
    "ExtensionRef is not supported": (
        "{rules: [{filters: [{type: ExtensionRef, extensionRef: {group: a, kind: B, name: c}}]}]}"
    ),
    '"port" is required for a Service': "{rules: [{backendRefs: [{name: a}]}]}",
    'unknown field (did you mean "backendRefs"?)': "{rules: [{backendrefs: []}]}",
    'must begin with "/"': "{rules: [{matches: [{path: {value: a}}]}]}",
    "needs exactly one match": (
        "{rules: [{matches: [{path: {type: Exact, value: /a}}], filters: [{type: URLRewrite, "
        "urlRewrite: {path: {type: ReplacePrefixMatch, replacePrefixMatch: /b}}}]}]}"
    ),
    "ExternalAuth is not supported: Istio does not serve a route with it": (
        "{rules: [{filters: [{type: ExternalAuth, externalAuth: {protocol: GRPC, backendRef: {name: a, port: 1}}}]}]}"
    ),
    "takes no URLRewrite on a backend": (
        "{rules: [{backendRefs: [{name: a, port: 1, filters: [{type: URLRewrite, urlRewrite: {}}]}]}]}"
    ),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_is_refused(message: str) -> None:
    assert message in refusal(route("HTTPRoute", REFUSED[message]))


def test_hosts_are_compared_as_istio_does() -> None:
    assert hosts_overlap("*.com", "*.example.com")
    assert hosts_overlap("a.example.com", "*.com")
    assert not hosts_overlap("a.example.com", "b.example.com")
    assert is_subset("*.a.com", "*.com")
    assert not is_subset("*.com", "*.a.com")
    assert intersection(["*.com", "a.org"], ["*.example.com"]) == ["*.example.com"]


POLICY = """
apiVersion: v1
kind: ConfigMap
metadata: {name: %s}
data: {ca.crt: "%s"}
---
apiVersion: gateway.networking.k8s.io/v1
kind: BackendTLSPolicy
metadata: {name: it}
spec:
  targetRefs: [{group: "", kind: Service, name: server}]
  validation: {hostname: a.example.com, caCertificateRefs: [{group: "", kind: ConfigMap, name: roots}]}
---
"""


def test_roots_of_backends_are_given_to_everybody() -> None:
    roots = Authority().pem.decode()
    found = backend_bundles(derive(load(SERVICES, POLICY % ("roots", roots.replace("\n", "\\n")))))
    assert found == (RootBundle(name="configmap://mlmesh/roots-cacert", roots=roots),)
    assert not backend_bundles(derive(load(SERVICES, POLICY % ("others", "none"))))
    # What is no certificate is not sent: an Envoy would refuse it.
    assert not backend_bundles(derive(load(SERVICES, POLICY % ("roots", "none"))))
