"""Statuses of Gateways and routes, with the conditions and reasons that Istio writes to the cluster.

Purely from resources and from which ports of Services are served. There is no generation and no time in them: files
have none. pilot/pkg/config/kube/gateway/{conditions,conversion}.go and gatewaycommon/conversion.go of Istio say how.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import yaml

from mlmesh_local.resources.gateway_api.attach import Binding, Fault, rank, reference_text
from mlmesh_local.resources.gateway_api.conditions import Status, condition, judged
from mlmesh_local.resources.gateway_api.convert import Conversion, RouteResult
from mlmesh_local.resources.gateway_api.derive import DOMAIN, conversion_of, derive
from mlmesh_local.resources.gateway_api.listeners import CONTROLLER, ListenerResult
from mlmesh_local.resources.gateway_api.model import GROUP, GatewayClass, ParentRef
from mlmesh_local.resources.gateway_api.owners import GatewayResult, SetResult
from mlmesh_local.resources.gateway_api.policy_status import policy_ancestors
from mlmesh_local.resources.model import Deployment, Service

if TYPE_CHECKING:
    from mlmesh_local.model import Endpoint
    from mlmesh_local.resources.meta import Meta
    from mlmesh_local.resources.resource_set import Resource, ResourceSet

__all__ = [
    "Key",
    "Lookup",
    "ServiceState",
    "Status",
    "proxy_addresses",
    "resource_statuses",
    "statuses",
    "text_with_status",
]
Key = tuple[str, str, str]
Attached = dict[tuple[str, str, str, str], int]
"""How many routes are bound to a listener, by its owner's kind, namespace and name, and its own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceState:
    """A Service behind which proxies stand: its ports, those at which a proxy serves, and its addresses."""

    ports: frozenset[int]
    served: frozenset[int]
    addresses: tuple[str, ...] = ()


Lookup = Callable[[str, str], ServiceState | None]
"""State of a Service by its full host and the namespace that it is looked for in."""


def statuses(conversion: Conversion, lookup: Lookup, classes: Iterable[GatewayClass] = ()) -> dict[Key, Status]:
    """The `status` of each resource, by kind, namespace and name."""
    attached: Attached = {}
    for result in conversion.routes:
        for binding in result.bindings:
            if binding.denied is None and not binding.is_mesh:
                space = binding.ref.namespace or result.route.meta.namespace
                key = (binding.ref.kind, space, binding.ref.name, binding.parent.section)
                attached[key] = attached.get(key, 0) + 1
    found: dict[Key, Status] = {}
    for one in classes:
        if one.controller == CONTROLLER:
            found[_key(one)] = {"conditions": [condition("Accepted", "Accepted", "Handled by Istio controller")]}
    for gateway in conversion.gateways:
        found[_key(gateway.gateway)] = _gateway(gateway, lookup, attached)
        for part in gateway.sets:
            found[_key(part.listener_set)] = _listener_set(part, lookup, attached)
    for policy in conversion.policies:
        found[_key(policy.policy)] = {"ancestors": policy_ancestors(policy)}
    for route in conversion.routes:
        found[_key(route.route)] = {"parents": _parents(route)}
    return found


def resource_statuses(
    resources: ResourceSet, addresses: Mapping[str, tuple[str, ...]] | None = None
) -> dict[Key, Status]:
    """Statuses of all resources of the Gateway API, by kind, namespace and name.

    `addresses` are those of the ready proxies behind each Service, by its full host; None takes every workload for
    ready.
    """
    conversion = conversion_of(resources)
    things = (conversion.gateways, conversion.routes, conversion.policies, resources.specs(GatewayClass))
    if not any(things):
        return {}
    everything = derive(resources)
    deployments = everything.specs(Deployment)
    states: dict[tuple[str, str], ServiceState] = {}
    for service in everything.specs(Service):
        host = f"{service.meta.name}.{service.meta.namespace}.svc.{DOMAIN}"
        ports = frozenset(port.number for port in service.ports)
        found: tuple[str, ...] = (addresses or {}).get(host, ())
        runs = bool(found)
        if addresses is None:
            runs = any(
                one.replicas
                and one.meta.namespace == service.meta.namespace
                and all(one.labels.get(key) == value for key, value in service.selector.items())
                for one in deployments
            )
        state = ServiceState(ports=ports, served=ports if runs and service.selector else frozenset(), addresses=found)
        states[host, service.meta.namespace] = state
    return statuses(conversion, lambda host, namespace: states.get((host, namespace)), resources.specs(GatewayClass))


def _key(spec: Any) -> Key:
    return (spec.meta.kind, spec.meta.namespace, spec.meta.name)


# Routes


def _parents(result: RouteResult) -> list[Status]:
    by_ref: dict[tuple[Any, ...], list[Binding]] = {}
    for binding in result.bindings:
        by_ref.setdefault(_identity(binding.ref), []).append(binding)
    namespace = result.route.meta.namespace
    ordered = sorted(by_ref.values(), key=lambda some: reference_text(some[0].ref, namespace), reverse=True)
    return [_parent(result, bindings) for bindings in ordered]


def _identity(ref: ParentRef) -> tuple[Any, ...]:
    return (ref.group, ref.kind, ref.namespace, ref.name, ref.section, ref.port)


def _parent(result: RouteResult, bindings: list[Binding]) -> Status:
    fits = sum(binding.denied is None for binding in bindings)
    denied = _denied(bindings)
    message = "Route was valid" if fits <= 1 else f"Route was valid, bound to {fits} parents"
    fault = result.mesh_fault if bindings[0].is_mesh else result.gateway_fault
    return {
        "parentRef": reference(bindings[0].ref),
        "controllerName": CONTROLLER,
        "conditions": [
            judged("Accepted", denied, "Accepted", message),
            judged("ResolvedRefs", fault, "ResolvedRefs", "All references resolved"),
        ],
    }


def _denied(bindings: list[Binding]) -> Fault | None:
    """Why no listener of the parent takes the route; messages of the same severity together."""
    best = min(rank(binding.denied) for binding in bindings)
    faults = [binding.denied for binding in bindings if binding.denied and rank(binding.denied) == best]
    if not best or not faults:
        return None
    return Fault(reason=faults[0].reason, message="; ".join(fault.message for fault in faults))


def reference(ref: ParentRef) -> Status:
    """A reference as it is in a status."""
    document: Status = {"group": ref.group, "kind": ref.kind, "name": ref.name}
    if ref.namespace:
        document["namespace"] = ref.namespace
    if ref.section:
        document["sectionName"] = ref.section
    if ref.port:
        document["port"] = ref.port
    return document


# Gateways


def _gateway(result: GatewayResult, lookup: Lookup, attached: Attached) -> Status:
    gateway = result.gateway
    ports = sorted({item.listener.port for _, item in result.served()})
    seen = _look(result.services, gateway.meta.namespace, ports, lookup)
    status: Status = {
        "conditions": [
            _accepted(result),
            _programmed(result.services, seen),
            judged("ResolvedRefs", result.unresolved, "ResolvedRefs", "All references resolved"),
        ],
    }
    if gateway.tls and gateway.tls.insecure:
        message = "Gateway is operating in AllowInsecureFallback mode for frontend validation"
        status["conditions"].append(condition("InsecureFrontendValidationMode", "ConfigurationChanged", message))
    if result.listeners:
        status["listeners"] = _listeners("Gateway", gateway.meta, result.listeners, attached)
    sets = sum(any(item.valid and item.server is not None for item in one.listeners) for one in result.sets)
    if sets:
        status["attachedListenerSets"] = sets
    addresses = seen.addresses or tuple(host.rpartition(":")[0] for host in seen.internal)
    if addresses:
        status["addresses"] = [
            {"type": "IPAddress" if _is_address(address) else "Hostname", "value": address}
            for address in dict.fromkeys(addresses)
        ]
    return status


def _listener_set(result: SetResult, lookup: Lookup, attached: Attached) -> Status:
    if result.refused:
        return {"conditions": [judged(kind, result.refused, "", "") for kind in ("Accepted", "Programmed")]}
    ports = sorted({item.listener.port for item in result.listeners if item.server is not None})
    seen = _look(result.services, result.gateway.meta.namespace, ports, lookup)
    usable = not result.services or any(item.valid for item in result.listeners)
    invalid = Fault(reason="ListenersNotValid", message="None of the ListenerSet's listeners are valid")
    accepted = None if usable else invalid
    if result.fault:
        accepted = Fault(reason=result.fault.reason, message=f"Parent not accepted: {result.fault.message}")
    programmed = _programmed(result.services, seen) if usable else judged("Programmed", invalid, "", "")
    status: Status = {"conditions": [judged("Accepted", accepted, "Accepted", "Resource accepted"), programmed]}
    if result.listeners:
        meta = result.listener_set.meta
        status["listeners"] = _listeners("ListenerSet", meta, result.listeners, attached)
        for one in status["listeners"]:
            if not one["supportedKinds"]:
                # Of a Gateway's listener the empty list is written.
                del one["supportedKinds"]
    return status


def _listeners(kind: str, meta: Meta, listeners: Iterable[ListenerResult], attached: Attached) -> list[Status]:
    return [
        _listener(item, attached.get((kind, meta.namespace, meta.name, item.listener.name), 0)) for item in listeners
    ]


def _is_address(text: str) -> bool:
    return ":" in text or text.replace(".", "").isdigit()


def _accepted(result: GatewayResult) -> Status:
    if result.fault:
        return condition("Accepted", result.fault.reason, result.fault.message, value=False)
    valid = sum(_serves(item) for item in result.listeners)
    if valid == len(result.listeners):
        return condition("Accepted", "Accepted", "Resource accepted")
    if valid:
        return condition("Accepted", "ListenersNotValid", "One or more of the Gateway's listeners are invalid")
    return condition("Accepted", "ListenersNotValid", "None of the Gateway's listeners are valid", value=False)


def _serves(item: ListenerResult) -> bool:
    return not (item.accepted or item.resolved or item.conflicted)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Seen:
    internal: tuple[str, ...]
    addresses: tuple[str, ...]
    warnings: tuple[str, ...]
    usable: bool


def _look(services: tuple[str, ...], namespace: str, ports: list[int], lookup: Lookup) -> _Seen:
    internal: list[str] = []
    addresses: list[str] = []
    warnings: list[str] = []
    usable = True
    for host in services:
        state = lookup(host, namespace)
        if state is None:
            warnings.append(f'hostname "{host}" not found')
            usable = False
            continue
        for port in ports:
            if port in state.served:
                internal.append(f"{host}:{port}")
                addresses.extend(state.addresses)
            elif not state.served:
                warnings.append(f'no instances found for hostname "{host}"')
            elif port not in state.ports:
                warnings.append(f'port {port} not found for hostname "{host}"')
                usable = False
    return _Seen(
        internal=tuple(sorted(set(internal))),
        addresses=tuple(sorted(set(addresses))),
        warnings=tuple(sorted(warnings)),
        usable=usable,
    )


def _programmed(services: tuple[str, ...], seen: _Seen) -> Status:
    if not services:
        return condition("Programmed", "UnsupportedAddress", "Failed to assign to any requested addresses", value=False)
    places = _joined(seen.internal)
    if seen.warnings:
        why = "; ".join(seen.warnings)
        message = f"Failed to assign to any requested addresses: {why}"
        if seen.internal:
            message = f"Assigned to service(s) {places}, but failed to assign to all requested addresses: {why}"
        return condition(
            "Programmed", "AddressNotAssigned" if seen.usable else "AddressNotUsable", message, value=False
        )
    message = f"Resource programmed, assigned to service(s) {places}" if places else "Resource programmed"
    return condition("Programmed", "Programmed", message)


def _joined(words: tuple[str, ...]) -> str:
    if len(words) > 2:
        return f"{', '.join(words[:-1])}, and {words[-1]}"
    return " and ".join(words)


def _listener(item: ListenerResult, attached: int) -> Status:
    fine = "No errors found"
    conflict = condition("Conflicted", "NoConflicts", fine, value=False)
    conditions = [judged("Accepted", item.accepted, "Accepted", fine), conflict]
    if item.conflicted and item.accepted:
        conditions[1] = condition("Conflicted", item.conflicted, item.accepted.message)
    conditions.append(judged("Programmed", item.programmed, "Programmed", fine))
    if not item.kinds_valid:
        conditions.append(condition("ResolvedRefs", "InvalidRouteKinds", "Invalid route kinds", value=False))
    elif not item.conflicted:
        conditions.append(judged("ResolvedRefs", item.resolved, "ResolvedRefs", fine))
    return {
        "name": item.listener.name,
        "supportedKinds": [{"group": GROUP, "kind": kind} for kind in item.parent.kinds],
        "attachedRoutes": attached,
        "conditions": conditions,
    }


def proxy_addresses(endpoints: Iterable[Endpoint]) -> dict[str, tuple[str, ...]]:
    """Addresses of the ready endpoints of each Service, by its full host: what `resource_statuses` wants to know."""
    found: dict[str, set[str]] = {}
    for endpoint in endpoints:
        addresses = found.setdefault(endpoint.host, set())
        if endpoint.ready:
            addresses.add(endpoint.address)
    return {host: tuple(sorted(addresses)) for host, addresses in found.items()}


def text_with_status(resource: Resource, status: Status | None) -> str:
    """YAML of a resource with its status; as it was written where it has none."""
    if status is None:
        return resource.text
    plain = resource.plain if isinstance(resource.plain, dict) else {}
    if "status" in plain or resource.text.lstrip().startswith("{"):
        return yaml.safe_dump({**plain, "status": status}, sort_keys=False)
    return f"{resource.text}\n{yaml.safe_dump({'status': status}, sort_keys=False)}"
