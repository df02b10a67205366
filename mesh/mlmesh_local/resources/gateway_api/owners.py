"""Gateways and their ListenerSets: what is made of them, and the results that statuses tell."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from mlmesh_local.resources.gateway_api.attach import Fault, Parent, Surroundings
from mlmesh_local.resources.gateway_api.deploy import workload_documents
from mlmesh_local.resources.gateway_api.listener_tls import client_certificate_fault
from mlmesh_local.resources.gateway_api.listeners import (
    CLASS_ISTIO,
    CONTROLLER,
    PARENT_NAMESPACE,
    PARENTS,
    SEMANTICS,
    SERVICE_ACCOUNT,
    SERVICES,
    ListenerResult,
    Owner,
    account_name,
    conflicts_of,
    convert_listeners,
    gateway_services,
    internal_name,
    is_managed,
    takes_sets_of,
)
from mlmesh_local.resources.gateway_api.model import (
    GROUP,
    GatewayClass,
    KubernetesGateway,
    ListenerSet,
    Namespace,
    RouteRule,
)
from mlmesh_local.resources.meta import Meta

Document = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Derived:
    """A resource that follows from others. ``rules`` are those of ``spec``, in its order, where it has some."""

    kind: str
    meta: Meta
    spec: Document
    origin: Meta
    rules: tuple[RouteRule, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class SetResult:
    """A ListenerSet of a Gateway of ours: its listeners, or why it is not taken."""

    listener_set: ListenerSet
    gateway: KubernetesGateway
    listeners: tuple[ListenerResult, ...]
    services: tuple[str, ...]
    fault: Fault | None
    refused: Fault | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewayResult:
    """A Gateway of ours: its listeners and sets, the Services of its proxies, and what is wrong with its addresses.

    ``unresolved`` is what is wrong with its own certificate.
    """

    gateway: KubernetesGateway
    listeners: tuple[ListenerResult, ...]
    services: tuple[str, ...]
    fault: Fault | None
    sets: tuple[SetResult, ...] = ()
    unresolved: Fault | None = None

    def served(self) -> Iterator[tuple[Owner, ListenerResult]]:
        """Listeners that routes can bind to, with whose they are."""
        for item in self.listeners:
            if item.server is not None:
                yield self.gateway, item
        for one in self.sets:
            for item in one.listeners:
                if item.server is not None and item.valid:
                    yield one.listener_set, item


_NOT_ALLOWED = Fault(
    reason="NotAllowed",
    message="The parent Gateway does not allow this reference; check the 'spec.allowedRoutes'",
)


def is_ours(gateway: KubernetesGateway, classes: Iterable[GatewayClass]) -> bool:
    """Whether Istio serves it: by its class, of which "istio" need not be there."""
    for one in classes:
        if one.meta.name == gateway.class_name:
            return one.controller == CONTROLLER
    return gateway.class_name == CLASS_ISTIO


def sets_of(gateway: KubernetesGateway, sets: Iterable[ListenerSet]) -> tuple[ListenerSet, ...]:
    """ListenerSets that name a Gateway as their parent, the oldest first."""
    key = (GROUP, "Gateway", gateway.meta.namespace, gateway.meta.name)
    return tuple(
        one
        for one in sets
        if (one.parent.group, one.parent.kind, one.parent.namespace or one.meta.namespace, one.parent.name) == key
    )


def workload(
    gateway: KubernetesGateway, sets: Iterable[ListenerSet], namespaces: tuple[Namespace, ...]
) -> Iterator[Derived]:
    """What is made for a Gateway of ours: nothing for one that names a Service which is there."""
    if not is_managed(gateway):
        return
    taken = [one for one in sets_of(gateway, sets) if takes_sets_of(gateway, one.meta.namespace, namespaces)]
    for kind, name, labels, spec in workload_documents(gateway, taken):
        meta = Meta(
            kind=kind,
            namespace=gateway.meta.namespace,
            name=name,
            labels=labels,
            annotations={},
            at=gateway.meta.at,
            created=gateway.meta.created,
        )
        yield Derived(kind=kind, meta=meta, spec=spec, origin=gateway.meta)


def convert_gateway(
    gateway: KubernetesGateway, sets: Iterable[ListenerSet], around: Surroundings, namespaces: tuple[Namespace, ...]
) -> GatewayResult:
    """A Gateway of ours with its sets."""
    services, fault = gateway_services(gateway, around.domain)
    attached = sets_of(gateway, sets)
    taken = [one for one in attached if takes_sets_of(gateway, one.meta.namespace, namespaces)]
    conflicts = conflicts_of([gateway, *taken])
    usable = bool(services) or fault is None

    def listeners(owner: Owner) -> tuple[ListenerResult, ...]:
        return convert_listeners(owner, gateway, conflicts, around, namespaces) if usable else ()

    return GatewayResult(
        gateway=gateway,
        listeners=listeners(gateway),
        services=services,
        fault=fault,
        sets=tuple(
            SetResult(
                listener_set=one,
                gateway=gateway,
                listeners=listeners(one) if one in taken else (),
                services=services,
                fault=fault,
                refused=None if one in taken else _NOT_ALLOWED,
            )
            for one in attached
        ),
        unresolved=client_certificate_fault(
            gateway.meta, gateway.tls.client_certificate if gateway.tls else None, around
        ),
    )


def parents_of(results: Iterable[GatewayResult]) -> Mapping[tuple[str, str, str], tuple[Parent, ...]]:
    """Listeners by the kind, namespace and name of their Gateway or ListenerSet."""
    found: dict[tuple[str, str, str], list[Parent]] = {}
    for result in results:
        for owner, item in result.served():
            key = (kind_of(owner), owner.meta.namespace, owner.meta.name)
            found.setdefault(key, []).append(item.parent)
    return {key: tuple(parents) for key, parents in found.items()}


def kind_of(owner: Owner) -> str:
    """Kind as references have it."""
    return "Gateway" if isinstance(owner, KubernetesGateway) else "ListenerSet"


def istio_gateways(result: GatewayResult) -> Iterator[Derived]:
    """An Istio Gateway for each listener that is served."""
    gateway = result.gateway
    for owner, item in result.served():
        if not item.valid or item.server is None:
            continue
        annotations = {
            SEMANTICS: "gateway",
            SERVICES: ",".join(result.services),
            SERVICE_ACCOUNT: account_name(gateway) if is_managed(gateway) else "",
            PARENTS: f"{kind_of(owner)}/{owner.meta.name}/{item.listener.name}.{owner.meta.namespace}",
        }
        if isinstance(owner, ListenerSet):
            annotations[PARENT_NAMESPACE] = gateway.meta.namespace
        meta = Meta(
            kind="Gateway",
            namespace=owner.meta.namespace,
            name=internal_name(owner.meta, item.listener),
            labels={},
            annotations=annotations,
            at=item.listener.at,
            created=owner.meta.created,
        )
        yield Derived(kind="Gateway", meta=meta, spec={"servers": [item.server]}, origin=owner.meta)
