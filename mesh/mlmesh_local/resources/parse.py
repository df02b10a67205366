"""Documents to resources: which kinds there are, what is read and ignored, what is refused."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from mlmesh_local.resources.credentials import holds_credential, parse_credential
from mlmesh_local.resources.destinations import parse_destination_rule
from mlmesh_local.resources.entries import parse_service_entry, parse_workload_entry
from mlmesh_local.resources.extensions import parse_envoy_filter
from mlmesh_local.resources.fields import Fields
from mlmesh_local.resources.gateway_api.gateways import (
    parse_gateway_class,
    parse_kubernetes_gateway,
    parse_listener_set,
    parse_namespace,
    parse_reference_grant,
)
from mlmesh_local.resources.gateway_api.policies import parse_backend_tls_policy, parse_ca_bundle, roots_of
from mlmesh_local.resources.gateway_api.routes import (
    parse_grpc_route,
    parse_http_route,
    parse_tcp_route,
    parse_tls_route,
)
from mlmesh_local.resources.gateways import parse_gateway
from mlmesh_local.resources.mesh_config import is_mesh_config, parse_mesh_config
from mlmesh_local.resources.model import Meta, Spec
from mlmesh_local.resources.names import is_namespace, key_problem, value_problem
from mlmesh_local.resources.networking import parse_virtual_service
from mlmesh_local.resources.problems import At, InvalidResource, Problem, Problems, did_you_mean
from mlmesh_local.resources.proxies import parse_proxy_config
from mlmesh_local.resources.resource_set import Resource, ResourceSet
from mlmesh_local.resources.scopes import parse_sidecar
from mlmesh_local.resources.security import (
    parse_authorization_policy,
    parse_peer_authentication,
    parse_request_authentication,
)
from mlmesh_local.resources.services import parse_service
from mlmesh_local.resources.telemetry import parse_telemetry
from mlmesh_local.resources.tree import Node, Tree, parse_yaml
from mlmesh_local.resources.workload import (
    parse_deployment,
    parse_pod,
    parse_service_account,
)
from mlmesh_local.resources.workload_groups import parse_workload_group

DEFAULT_NAMESPACE = "mlmesh"
DOCUMENT_BYTES_MAX = 4 * 1024 * 1024

_Parse = Callable[[Meta, Fields], Spec]


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """YAML text, possibly of several resources, and where it came from."""

    source: str
    text: str


def _always(_meta: Meta, _body: Fields) -> bool:
    return True


def _means_something(meta: Meta, body: Fields) -> bool:
    return is_mesh_config(meta.namespace, meta.name) or bool(roots_of(body))


def _config_map(meta: Meta, body: Fields) -> Spec:
    read = parse_mesh_config if is_mesh_config(meta.namespace, meta.name) else parse_ca_bundle
    return read(meta, body)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Kind:
    """A kind that is read. ``body``: it has no `spec`; ``only``: which of them mean something, others are ignored.

    ``title`` is the kind in names and messages where another group has the same kind.
    """

    group: str
    kind: str
    versions: tuple[str, ...]
    parse: _Parse
    body: bool = False
    cluster_scoped: bool = False
    only: Callable[[Meta, Fields], bool] = _always
    title: str = ""


_NETWORKING = ("v1", "v1beta1", "v1alpha3")
_SECURITY = ("v1", "v1beta1")
_GATEWAY_API = "gateway.networking.k8s.io"
_STREAM_ROUTES = ("v1", "v1alpha3", "v1alpha2")
_KINDS: tuple[_Kind, ...] = (
    _Kind(group="networking.istio.io", kind="VirtualService", versions=_NETWORKING, parse=parse_virtual_service),
    _Kind(group="networking.istio.io", kind="DestinationRule", versions=_NETWORKING, parse=parse_destination_rule),
    _Kind(group="networking.istio.io", kind="Gateway", versions=_NETWORKING, parse=parse_gateway),
    _Kind(group="networking.istio.io", kind="ServiceEntry", versions=_NETWORKING, parse=parse_service_entry),
    _Kind(group="networking.istio.io", kind="WorkloadEntry", versions=_NETWORKING, parse=parse_workload_entry),
    _Kind(group="networking.istio.io", kind="WorkloadGroup", versions=_NETWORKING, parse=parse_workload_group),
    _Kind(group="networking.istio.io", kind="Sidecar", versions=_NETWORKING, parse=parse_sidecar),
    _Kind(group="networking.istio.io", kind="ProxyConfig", versions=("v1beta1",), parse=parse_proxy_config),
    _Kind(group="networking.istio.io", kind="EnvoyFilter", versions=("v1alpha3",), parse=parse_envoy_filter),
    _Kind(group="security.istio.io", kind="PeerAuthentication", versions=_SECURITY, parse=parse_peer_authentication),
    _Kind(group="security.istio.io", kind="AuthorizationPolicy", versions=_SECURITY, parse=parse_authorization_policy),
    _Kind(
        group="security.istio.io",
        kind="RequestAuthentication",
        versions=_SECURITY,
        parse=parse_request_authentication,
    ),
    _Kind(group="telemetry.istio.io", kind="Telemetry", versions=("v1", "v1alpha1"), parse=parse_telemetry),
    _Kind(
        group=_GATEWAY_API,
        kind="Gateway",
        versions=("v1", "v1beta1"),
        parse=parse_kubernetes_gateway,
        title="KubernetesGateway",
    ),
    _Kind(
        group=_GATEWAY_API,
        kind="GatewayClass",
        versions=("v1", "v1beta1"),
        parse=parse_gateway_class,
        cluster_scoped=True,
    ),
    _Kind(group=_GATEWAY_API, kind="HTTPRoute", versions=("v1", "v1beta1"), parse=parse_http_route),
    _Kind(group=_GATEWAY_API, kind="GRPCRoute", versions=("v1",), parse=parse_grpc_route),
    _Kind(group=_GATEWAY_API, kind="TLSRoute", versions=_STREAM_ROUTES, parse=parse_tls_route),
    _Kind(group=_GATEWAY_API, kind="TCPRoute", versions=_STREAM_ROUTES, parse=parse_tcp_route),
    _Kind(group=_GATEWAY_API, kind="ReferenceGrant", versions=("v1", "v1beta1"), parse=parse_reference_grant),
    _Kind(group=_GATEWAY_API, kind="ListenerSet", versions=("v1",), parse=parse_listener_set),
    _Kind(group=_GATEWAY_API, kind="BackendTLSPolicy", versions=("v1", "v1alpha3"), parse=parse_backend_tls_policy),
    _Kind(group="", kind="Namespace", versions=("v1",), parse=parse_namespace, body=True, cluster_scoped=True),
    _Kind(group="apps", kind="Deployment", versions=("v1",), parse=parse_deployment),
    _Kind(group="apps", kind="StatefulSet", versions=("v1",), parse=parse_deployment),
    _Kind(group="", kind="Pod", versions=("v1",), parse=parse_pod),
    _Kind(group="", kind="Service", versions=("v1",), parse=parse_service),
    _Kind(group="", kind="ServiceAccount", versions=("v1",), parse=parse_service_account, body=True),
    _Kind(group="", kind="ConfigMap", versions=("v1",), parse=_config_map, body=True, only=_means_something),
    _Kind(group="", kind="Secret", versions=("v1",), parse=parse_credential, body=True, only=holds_credential),
)
IGNORED_KINDS = frozenset(
    {
        "ClusterRole",
        "ClusterRoleBinding",
        "Component",
        "CustomResourceDefinition",
        "HorizontalPodAutoscaler",
        "Kustomization",
        "LimitRange",
        "MutatingWebhookConfiguration",
        "NetworkPolicy",
        "PersistentVolume",
        "PersistentVolumeClaim",
        "PodDisruptionBudget",
        "PodMonitor",
        "PriorityClass",
        "PrometheusRule",
        "ResourceQuota",
        "Role",
        "RoleBinding",
        "ServiceMonitor",
        "StorageClass",
        "ValidatingWebhookConfiguration",
    }
)
"""Kinds that mean something to a cluster only."""


def load_resources(
    documents: Iterable[Document],
    *,
    default_namespace: str = DEFAULT_NAMESPACE,
    overlook: Callable[[Problem], bool] = lambda _problem: False,
) -> ResourceSet:
    """Read and validate documents, each resource on its own; `ResourceSet.apply` checks them against each other.

    Raises InvalidResource with every problem found but those to `overlook`: for who looks and does not run.
    """
    problems: list[Problem] = []
    resources: dict[tuple[str, str, str], Resource] = {}
    for document in documents:
        try:
            found = _document(document, default_namespace, overlook)
        except InvalidResource as error:
            problems.extend(error.problems)
            continue
        for resource in found:
            twin = resources.get(resource.key)
            if twin is not None:
                at = resource.spec.meta.at
                other = twin.spec.meta.at
                problems.append(Problem(at=at, message=f"is also defined at {other.source}:{other.line}"))
            resources[resource.key] = resource
    if problems:
        raise InvalidResource(problems)
    return ResourceSet.of(resources.values())


def load_names(documents: Iterable[Document], *, default_namespace: str = DEFAULT_NAMESPACE) -> list[tuple[str, str]]:
    """Kinds and names ("{namespace}/{name}") of what documents define and a mesh keeps, whatever else they say.

    Raises InvalidResource for what has no name, or is of a kind that is not known.
    """
    problems = Problems()
    roots = [
        (root, tree.source)
        for document in documents
        for tree in parse_yaml(document.source, document.text)
        for root in _flatten(tree)
    ]
    found = [_named(root, At(source=source, line=root.line), default_namespace, problems) for root, source in roots]
    problems.refuse()
    return [name for name in found if name is not None]


def defines_nothing(documents: Iterable[Document]) -> bool:
    """Whether there is no resource of any kind in documents. Raises InvalidResource for what is no YAML."""
    return not any(_flatten(tree) for document in documents for tree in parse_yaml(document.source, document.text))


def _named(root: Node, at: At, default_namespace: str, problems: Problems) -> tuple[str, str] | None:
    body = Fields(root, at, problems)
    known = _known(root, body)
    if known is None:
        return None
    metadata = body.raw("metadata")
    values = metadata.plain() if metadata and isinstance(metadata.value, dict) else {}
    if not values.get("name"):
        problems.add(at.field("metadata.name"), "is missing")
        return None
    # What else is wrong with it is no reason to keep it.
    overlooked = Problems()
    meta = _meta(known, Fields(root, at, overlooked), at, default_namespace)
    if not known.only(meta, Fields(root, at, overlooked)):
        return None
    namespace = "" if known.cluster_scoped else values.get("namespace") or default_namespace
    return known.title or known.kind, f"{namespace}/{values['name']}"


def read_documents(paths: Iterable[Path]) -> tuple[Document, ...]:
    """YAML files, and those of folders (not of folders in folders), in the order of their names.

    Raises InvalidResource for a path that cannot be read or is too large.
    """
    documents: list[Document] = []
    for path in paths:
        files = sorted(p for p in path.iterdir() if p.suffix in {".yaml", ".yml"}) if path.is_dir() else [path]
        documents.extend(_read(file) for file in files)
    return tuple(documents)


def _read(file: Path) -> Document:
    try:
        if file.stat().st_size > DOCUMENT_BYTES_MAX:
            raise _refusal(str(file), f"is larger than {DOCUMENT_BYTES_MAX} bytes")
        return Document(source=str(file), text=file.read_text())
    except OSError as error:
        raise _refusal(str(file), f"cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise _refusal(str(file), "is not UTF-8 text") from error


def _refusal(source: str, message: str) -> InvalidResource:
    return InvalidResource([Problem(at=At(source=source, line=0), message=message)])


def load_tree(tree: Tree) -> list[Resource]:
    """The resources of one document of a file. Raises InvalidResource with every problem found."""
    return _trees([tree], DEFAULT_NAMESPACE, lambda _problem: False)


def _document(document: Document, default_namespace: str, overlook: Callable[[Problem], bool]) -> list[Resource]:
    return _trees(parse_yaml(document.source, document.text), default_namespace, overlook)


def _trees(trees: Iterable[Tree], default_namespace: str, overlook: Callable[[Problem], bool]) -> list[Resource]:
    problems = Problems()
    resources: list[Resource] = []
    for tree in trees:
        for root in _flatten(tree):
            resource = _resource(root, tree, default_namespace, problems)
            if resource is not None:
                resources.append(resource)
    serious = [problem for problem in problems.found() if not overlook(problem)]
    if serious:
        raise InvalidResource(serious)
    return resources


def _flatten(tree: Tree) -> list[Node]:
    """The resources of a document: itself, or the items of a List, or of a list of one kind (VirtualServiceList)."""
    return _items(tree.root)


def _items(root: Node) -> list[Node]:
    value = root.value
    kind = str(value["kind"].value) if isinstance(value, dict) and "kind" in value else ""
    if isinstance(value, dict) and (kind == "List" or (kind.endswith("List") and "items" in value)):
        items = value["items"].value if "items" in value else []
        # A List may hold Lists; YAML itself bounds how deep.
        return [one for item in items for one in _items(item)] if isinstance(items, list) else []
    return [root]


def _resource(root: Node, tree: Tree, default_namespace: str, problems: Problems) -> Resource | None:
    at = At(source=tree.source, line=root.line)
    body = Fields(root, at, problems)
    known = _known(root, body)
    if known is None:
        return None
    meta = _meta(known, body, at, default_namespace)
    if not known.only(meta, body):
        return None
    body.at = meta.at
    body.ignored("status")
    if known.body:
        spec = known.parse(meta, body)
    else:
        body.required("spec")
        with body.message("spec") as fields:
            spec = known.parse(meta, fields)
    body.done()
    return Resource(spec=spec, plain=root.plain(), text=tree.text)


def _known(root: Node, body: Fields) -> _Kind | None:
    """The kind of a document; None for what a mesh does not keep, and for what is refused."""
    if not isinstance(root.value, dict):
        return None
    kind_name, api_version = body.text("kind", required=True), body.text("apiVersion", required=True)
    if kind_name in IGNORED_KINDS or not (kind_name and api_version):
        return None
    group, slash, version = api_version.rpartition("/")
    named = [kind for kind in _KINDS if kind.kind == kind_name]
    if not named:
        hint = did_you_mean(kind_name, [kind.kind for kind in _KINDS])
        body.refuse("kind", f'"{kind_name}" is not supported by the laptop mesh{hint}')
        return None
    for kind in named:
        if kind.group == (group if slash else "") and version in kind.versions:
            return kind
    expected = " or ".join(f"{kind.group}/{kind.versions[0]}".lstrip("/") for kind in named)
    body.refuse("apiVersion", f'"{api_version}" of {kind_name} is not supported by the laptop mesh; use {expected}')
    return None


def _meta(known: _Kind, body: Fields, at: At, default_namespace: str) -> Meta:
    kind_name = known.title or known.kind
    if known.cluster_scoped:
        default_namespace = ""
    plain = body.raw("metadata")
    guess = plain.value if plain and isinstance(plain.value, dict) else {}
    name = str(guess["name"].value) if "name" in guess else "?"
    namespace = str(guess["namespace"].value) if "namespace" in guess else default_namespace
    # Every later message names the resource, those about its metadata too.
    full = f"{namespace}/{name}" if namespace else name
    place = At(source=at.source, line=at.line, resource=f"{kind_name} {full}")
    body.at = place
    body.required("metadata")
    with body.message("metadata") as metadata:
        metadata.ignored(
            "generation",
            "managedFields",
            "resourceVersion",
            "uid",
            "finalizers",
            "ownerReferences",
        )
        metadata.unsupported("generateName", why="resources are merged by name")
        scope = metadata.name("namespace")
        if scope and not is_namespace(scope):
            metadata.refuse("namespace", f'"{scope}" is not the name of a namespace: a DNS label in lower case')
        return Meta(
            kind=kind_name,
            namespace=scope or default_namespace,
            name=metadata.name("name", required=True),
            labels=_checked(metadata, "labels", values=True),
            annotations=_checked(metadata, "annotations", values=False),
            at=place,
            created=metadata.text("creationTimestamp"),
        )


def _checked(metadata: Fields, name: str, *, values: bool) -> Mapping[str, str]:
    """Labels, or annotations, whose values are free."""
    found = metadata.text_map(name)
    for key, value in found.items():
        problem = key_problem(key) or (value_problem(value) if values else "")
        if problem:
            metadata.refuse(name, problem)
    return found
