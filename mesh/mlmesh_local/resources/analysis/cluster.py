"""The resources as an analyzer sees them: what was written, by kind, and the pods that Deployments would have."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from mlmesh_local.resources.analysis.messages import Message
from mlmesh_local.resources.gateway_api.status import resource_statuses
from mlmesh_local.resources.indexes import LabelIndex
from mlmesh_local.resources.meta import Meta
from mlmesh_local.resources.problems import At
from mlmesh_local.resources.tree import Node, parse_yaml

if TYPE_CHECKING:
    from mlmesh_local.resources.resource_set import Resource, ResourceSet

DOMAIN = "svc.cluster.local"
ALL = "*"
MESH = "mesh"
Path = tuple[str | int, ...]
_TREES_MAX = 100
"""Most resources that are read again for the lines of their fields; of others the line of the resource is told."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """A resource as it was written."""

    meta: Meta
    spec: Mapping[str, Any]
    plain: Mapping[str, Any]
    resource: Resource | None = field(default=None, compare=False, repr=False)

    @property
    def namespace(self) -> str:
        """Its namespace."""
        return self.meta.namespace

    @property
    def full_name(self) -> str:
        """ "namespace/name"."""
        return f"{self.meta.namespace}/{self.meta.name}" if self.meta.namespace else self.meta.name


@dataclass(frozen=True, slots=True, kw_only=True)
class Pod:
    """A pod of a Deployment."""

    namespace: str
    name: str
    labels: Mapping[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Host:
    """A host that can be called: a Service or a host of a ServiceEntry, with the numbers of its ports."""

    ports: tuple[int, ...]
    workload_labels: Mapping[str, str]


class Cluster:
    """Resources by kind, and the findings about them."""

    def __init__(self, resources: ResourceSet) -> None:
        self._items: dict[str, list[Item]] = {}
        self._by_key: dict[tuple[str, str, str], Item] = {}
        self.messages: list[Message] = []
        self._trees: dict[tuple[str, str, str], Node | None] = {}
        for resource in sorted(resources, key=lambda one: one.key):
            plain = resource.plain if isinstance(resource.plain, dict) else {}
            spec = plain.get("spec")
            item = Item(
                meta=resource.spec.meta, spec=spec if isinstance(spec, dict) else {}, plain=plain, resource=resource
            )
            self._items.setdefault(resource.kind, []).append(item)
            self._by_key[resource.kind, item.namespace, item.meta.name] = item
        self._statuses: dict[tuple[str, str, str], dict[str, Any]] | None = None
        self._resources = resources
        pods = tuple(self._pods())
        # Once by namespace, once with those of all namespaces.
        self._pod_index = LabelIndex(
            (namespace, pod.labels, pod) for pod in pods for namespace in dict.fromkeys((pod.namespace, ""))
        )
        self.hosts = self._hosts()
        self._wild = [(scope, host, found) for (scope, host), found in self.hosts.items() if host.startswith("*")]

    def items(self, kind: str) -> list[Item]:
        """Resources of a kind, by name."""
        return self._items.get(kind, [])

    def find(self, kind: str, namespace: str, name: str) -> Item | None:
        """A resource by its name."""
        return self._by_key.get((kind, namespace, name))

    def status(self, item: Item) -> Mapping[str, Any]:
        """The status that a resource of the Gateway API has."""
        if self._statuses is None:
            self._statuses = resource_statuses(self._resources)
        return self._statuses.get((item.meta.kind, item.meta.namespace, item.meta.name), {})

    def report(self, code: str, item: Item, text: str, *path: str | int, offline: bool = False) -> None:
        """Note a finding about a field of a resource."""
        self.messages.append(Message(code=code, meta=item.meta, at=self._at(item, path), text=text, offline=offline))

    def _at(self, item: Item, path: Path) -> At:
        place = item.meta.at
        for step in path:
            place = place.field(f"[{step}]" if isinstance(step, int) else step)
        return At(source=place.source, line=self._line(item, path), resource=place.resource, path=place.path)

    def _line(self, item: Item, path: Path) -> int:
        """Line of the deepest field of the path that is there."""
        line = item.meta.at.line
        key = (item.meta.kind, item.meta.namespace, item.meta.name)
        if len(self._trees) >= _TREES_MAX and key not in self._trees:
            return line
        if key not in self._trees:
            text = item.resource.text if item.resource else ""
            roots = [tree.root for tree in parse_yaml(item.meta.at.source, text)] if text else []
            self._trees[key] = roots[0] if len(roots) == 1 else None
        node = self._trees[key]
        if node is None or not path:
            return line
        # The text of a resource begins where the resource does.
        offset = line - node.line
        for step in path:
            inner = _inside(node, step)
            if inner is None:
                break
            node = inner
        return node.line + offset

    def _pods(self) -> Iterable[Pod]:
        for item in self.items("Deployment"):
            template = item.spec.get("template") or {}
            labels = (template.get("metadata") or {}).get("labels") or {}
            for number in range(item.spec.get("replicas", 1) or 0):
                yield Pod(namespace=item.namespace, name=f"{item.meta.name}-{number}", labels=labels)

    def selected(self, labels: Mapping[str, str], namespace: str = "") -> list[Pod]:
        """Pods that have labels, in a namespace or anywhere."""
        return self._pod_index.select(namespace, labels)

    # Hosts

    def _hosts(self) -> dict[tuple[str, str], Host]:
        found: dict[tuple[str, str], Host] = {}
        for item in self.items("ServiceEntry"):
            host_of = Host(
                ports=tuple(port.get("number", 0) for port in item.spec.get("ports") or ()),
                workload_labels=(item.spec.get("workloadSelector") or {}).get("labels") or {},
            )
            for host in item.spec.get("hosts") or ():
                for scope in scopes(item.spec.get("exportTo"), item.namespace):
                    found[scope, full_host(host, item.namespace)] = host_of
        for item in self.items("Service"):
            host_of = Host(
                ports=tuple(port.get("port", 0) for port in item.spec.get("ports") or ()), workload_labels={}
            )
            wanted = item.meta.annotations.get("networking.istio.io/exportTo", "")
            words = [word.strip() for word in wanted.split(",")] if wanted else None
            for scope in scopes(words, item.namespace):
                found[scope, full_host(item.meta.name, item.namespace)] = host_of
        return found

    def destination(self, host: str, item: Item) -> Host | None:
        """What a host means to a resource, by its namespace and where it is exported to."""
        namespace = item.namespace
        full = full_host(host, namespace)
        exported = item.spec.get("exportTo")
        for scope in (ALL, *(scopes(exported, namespace) if exported else (namespace,))):
            if (scope, full) in self.hosts:
                return self.hosts[scope, full]
        for scope, known, found in self._wild:
            if scope in {ALL, namespace} and host.removeprefix("*").endswith(known[1:]):
                return found
        return None


def _inside(node: Node, step: str | int) -> Node | None:
    value = node.value
    if isinstance(value, dict) and isinstance(step, str):
        return value.get(step)
    if isinstance(value, list) and isinstance(step, int) and step < len(value):
        return value[step]
    return None


def scopes(export_to: Iterable[str] | None, namespace: str) -> tuple[str, ...]:
    """Namespaces that see a resource; "*" for all."""
    words = list(export_to or ())
    if not words or ALL in words:
        return (ALL,)
    return tuple(dict.fromkeys(namespace if word == "." else word for word in words))


def full_host(host: str, namespace: str) -> str:
    """A short name completed."""
    return host if host.startswith("*") or "." in host else f"{host}.{namespace}.{DOMAIN}"


def service_of(host: str, namespace: str) -> tuple[str, str]:
    """(namespace, name) of the Service that a host means; a host of no Service counts as a name."""
    suffix = f".{DOMAIN}"
    if host.endswith(suffix):
        name, dot, space = host.removesuffix(suffix).rpartition(".")
        if dot and name and space:
            return space, name
    return namespace, host


def matches(selector: Mapping[str, str], labels: Mapping[str, str]) -> bool:
    """Whether labels have everything that a selector asks for."""
    return all(labels.get(key) == value for key, value in selector.items())


def selector_text(selector: Mapping[str, str]) -> str:
    """A selector as Kubernetes writes it."""
    return ",".join(f"{key}={value}" for key, value in sorted(selector.items()))


def listed(value: Any) -> list[Any]:
    """A list, empty for anything else."""
    return value if isinstance(value, list) else []


def mapped(value: Any) -> Mapping[str, Any]:
    """A mapping, empty for anything else."""
    return value if isinstance(value, dict) else {}
