"""Checks of Deployments and Services."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from mlmesh_local.doctor.model import Context, Hit
from mlmesh_local.doctor.rules import STREAM_WINDOW_BYTES
from mlmesh_local.resources.catalog import CatalogService, selects, workloads_of
from mlmesh_local.resources.fields import parse_duration
from mlmesh_local.resources.model import (
    AuthorizationPolicy,
    Container,
    Deployment,
    DestinationRule,
    PeerAuthentication,
    Service,
    VirtualService,
)
from mlmesh_local.translate.shadowed import shadowed

MESSAGE_LIMIT = "MLMESH_MESSAGE_BYTES_MAX"
DEFAULT_LIMIT = 16 * 1024 * 1024
DRAIN = "MLMESH_DRAIN_S"
GRACE = "MLMESH_GRACE_S"
PROXY_DRAIN_S = 5.0
_RETRY_POLICY = re.compile(r"retryPolicy|retry_policy|grpc\.enable_retries=1|GRPC_RETRY", re.IGNORECASE)
_SPEC: tuple[str | int, ...] = ("spec", "template", "spec")
_CONTAINER: tuple[str | int, ...] = (*_SPEC, "containers")


def _name(deployment: Deployment) -> str:
    return f"{deployment.meta.namespace}/{deployment.meta.name}"


def _hit(deployment: Deployment, *path: str | int, detail: str) -> Hit:
    return Hit(kind=deployment.meta.kind, name=_name(deployment), path=path, detail=detail)


def _variables(container: Container) -> Mapping[str, str]:
    return {one.name: one.value for one in container.environment}


def _applications(context: Context) -> Iterator[tuple[Deployment, int, Container]]:
    for deployment in context.resources.specs(Deployment):
        if not deployment.is_gateway:
            for index, container in enumerate(deployment.containers):
                yield deployment, index, container


def _speaks_grpc(context: Context, deployment: Deployment) -> bool:
    return any(
        deployment in workloads_of(service, (deployment,)) and any(port.protocol == "grpc" for port in service.ports)
        for service in context.view.services.values()
    )


def two_layers_of_retries(context: Context) -> Iterator[Hit]:
    """MLM002."""
    # Istio retries every route that does not say attempts: 0, so the mesh's layer is there unless all turn it off.
    rules = [rule for service in context.resources.specs(VirtualService) for rule in service.http]
    if rules and all(rule.retries is not None and rule.retries.attempts <= 0 for rule in rules):
        return
    for deployment, index, container in _applications(context):
        for number, variable in enumerate(container.environment):
            if _RETRY_POLICY.search(f"{variable.name}={variable.value}"):
                path = (*_CONTAINER, index, "env", number)
                yield _hit(deployment, *path, detail=f"{variable.name} turns on retries in the client library, too")


def too_large_to_be_retried(context: Context) -> Iterator[Hit]:
    """MLM005."""
    for deployment, index, container in _applications(context):
        limit = _limit(container)
        if limit is not None and limit > STREAM_WINDOW_BYTES:
            number = [one.name for one in container.environment].index(MESSAGE_LIMIT)
            detail = f"messages of up to {limit >> 20} MiB, of which more than 16 MiB are never sent again"
            yield _hit(deployment, *_CONTAINER, index, "env", number, detail=detail)


def _limit(container: Container) -> int | None:
    value = _variables(container).get(MESSAGE_LIMIT, "")
    return int(value) if value.isdigit() else None


def limits_that_differ(context: Context) -> Iterator[Hit]:
    """MLM008."""
    limits = {
        _name(deployment): _limit(container) or DEFAULT_LIMIT
        for deployment, _, container in _applications(context)
        if any(variable.startswith("MLMESH_") for variable in _variables(container))
    }
    if len(set(limits.values())) < 2:
        return
    largest = max(limits.values())
    for deployment, index, _container in _applications(context):
        mine = limits.get(_name(deployment))
        if mine is not None and mine < largest:
            other = next(name for name, limit in limits.items() if limit == largest)
            detail = f"takes {mine} bytes, while {other} sends up to {largest}"
            yield _hit(deployment, *_CONTAINER, index, "env", detail=detail)


def missing_drain(context: Context) -> Iterator[Hit]:
    """MLM009."""
    for deployment, index, container in _applications(context):
        if not _speaks_grpc(context, deployment):
            continue
        variables = _variables(container)
        plain = _plain(context, deployment, index)
        hook = bool(plain.get("lifecycle", {}).get("preStop"))
        drain_s, grace_s = _number(variables.get(DRAIN)), _number(variables.get(GRACE))
        if not hook and not drain_s:
            detail = "nothing makes it wait after SIGTERM until every sidecar knows that its endpoint goes"
            yield _hit(deployment, *_CONTAINER, index, "lifecycle", detail=detail)
            continue
        proxy_s = _proxy_drain_s(deployment)
        needed = max((drain_s or 0.0) + (grace_s or 0.0), proxy_s)
        if deployment.termination_grace_s < needed:
            detail = f"killed after {deployment.termination_grace_s} s, but it may drain for {needed:g} s"
            yield _hit(deployment, *_SPEC, "terminationGracePeriodSeconds", detail=detail)


def _proxy_drain_s(deployment: Deployment) -> float:
    try:
        config = json.loads(deployment.annotations.get("proxy.istio.io/config", "{}"))
        return parse_duration(str(config.get("terminationDrainDuration", ""))) or PROXY_DRAIN_S
    except (ValueError, AttributeError):
        return PROXY_DRAIN_S


def _number(value: str | None) -> float | None:
    try:
        return float(value) if value else None
    except ValueError:
        return None


def _plain(context: Context, deployment: Deployment, index: int) -> Mapping[str, Any]:
    resource = context.provenance.resource(deployment.meta.kind, _name(deployment))
    spec = resource.plain.get("spec", {}).get("template", {}).get("spec", {}) if resource else {}
    containers = spec.get("containers", []) if isinstance(spec, dict) else []
    return containers[index] if index < len(containers) else {}


# Services


def hidden_grpc(context: Context) -> Iterator[Hit]:
    """MLM010."""
    for service in context.resources.specs(Service):
        for index, port in enumerate(service.ports):
            if port.protocol in ("grpc", "grpc-web", "http2", "tls", "https", "udp"):
                continue
            why = _grpc_sign(context, service, port.target)
            if why:
                detail = f'port {port.number} "{port.name}" is taken for {port.protocol}, but {why}'
                name = f"{service.meta.namespace}/{service.meta.name}"
                yield Hit(kind="Service", name=name, path=("spec", "ports", index), detail=detail)


def _grpc_sign(context: Context, service: Service, target: int | str) -> str:
    """Why a target is likely to speak gRPC: its container port's name, or a gRPC probe of it."""
    if isinstance(target, str) and target.startswith("grpc"):
        return f'its target is named "{target}"'
    for deployment in _behind(context, service):
        for container in deployment.containers:
            numbers = {one.name: one.number for one in container.ports}
            number = numbers.get(target) if isinstance(target, str) else target
            if any(name.startswith("grpc") and value == number for name, value in numbers.items()):
                return f"the container port {number} is named so"
            for probe in (container.readiness, container.liveness, container.startup):
                if probe is not None and probe.how == "grpc" and probe.port in (number, target):
                    return f"{_name(deployment)} is probed by gRPC there"
    return ""


def _behind(context: Context, service: Service) -> list[Deployment]:
    return [
        deployment
        for deployment in context.resources.specs(Deployment)
        if service.selector
        and deployment.meta.namespace == service.meta.namespace
        and selects(service.selector, deployment.labels)
    ]


def undeclared_ports(context: Context) -> Iterator[Hit]:
    """MLM015."""
    for service in context.resources.specs(Service):
        for index, port in enumerate(service.ports):
            for deployment in _behind(context, service):
                declared = deployment.container_ports()
                if isinstance(port.target, str):
                    missing = port.target not in declared
                else:
                    missing = port.target not in declared.values() and _is_suspect(deployment, port.target)
                if missing:
                    detail = f"{_name(deployment)} declares no container port {port.target}"
                    name = f"{service.meta.namespace}/{service.meta.name}"
                    yield Hit(kind="Service", name=name, path=("spec", "ports", index, "targetPort"), detail=detail)


def _is_suspect(deployment: Deployment, number: int) -> bool:
    """Whether nothing but the Service speaks of a port: Kubernetes lets containers listen without a declaration."""
    if not deployment.container_ports():
        return False
    texts = (
        text
        for container in deployment.containers
        for text in (*container.command, *container.args, *(one.value for one in container.environment))
    )
    word = re.compile(rf"(?<!\d){number}(?!\d)")
    return not any(word.search(text) for text in texts)


def hidden_tcp(context: Context) -> Iterator[Hit]:
    """MLM028."""
    for one in shadowed(context.view):
        if one.service.is_entry:
            entry = next((e for e in one.service.entries if one.service.host in e.hosts), one.service.entries[0])
            kind, name = "ServiceEntry", f"{entry.meta.namespace}/{entry.meta.name}"
        else:
            kind, name = "Service", f"{one.service.namespace}/{one.service.name}"
        numbers = [port.number for port in one.service.ports]
        yield Hit(kind=kind, name=name, path=("spec", "ports", numbers.index(one.port)), detail=one.detail)


# mTLS


def plaintext_to_strict(context: Context) -> Iterator[Hit]:
    """MLM013."""
    for rule in context.resources.specs(DestinationRule):
        target = context.service(rule.host, rule.meta.namespace)
        if target is None or target.is_entry:
            continue
        parts: list[tuple[tuple[str | int, ...], Any, Mapping[str, str]]] = [(("trafficPolicy",), rule.policy, {})]
        parts += [(("subsets", i, "trafficPolicy"), one.policy, one.labels) for i, one in enumerate(rule.subsets)]
        for path, policy, labels in parts:
            tls = policy.tls if policy else None
            if tls is None or tls.mode != "DISABLE":
                continue
            strict = _strict(context, target, labels)
            if strict:
                detail = f"plaintext to {strict}, which takes mutual TLS only"
                name = f"{rule.meta.namespace}/{rule.meta.name}"
                yield Hit(kind="DestinationRule", name=name, path=("spec", *path, "tls"), detail=detail)


def _strict(context: Context, target: CatalogService, labels: Mapping[str, str]) -> str:
    for port in target.ports:
        for endpoint in context.view.all_endpoints(target, port.number, labels):
            mode = context.view.mtls_mode(target.namespace, endpoint.labels, endpoint.target_port)
            if endpoint.mesh_tls and mode == "STRICT":
                return endpoint.instance
    return ""


def identities_over_plaintext(context: Context) -> Iterator[Hit]:
    """MLM014."""
    strict = {
        authentication.meta.namespace
        for authentication in context.resources.specs(PeerAuthentication)
        if not authentication.selector and authentication.mode == "STRICT"
    }
    root = context.world.root_namespace
    for policy in context.resources.specs(AuthorizationPolicy):
        if policy.action != "DENY" or {policy.meta.namespace, root} & strict:
            continue
        for index, rule in enumerate(policy.rules):
            keys = {value.key for source in rule.sources for value in source if value.values}
            if keys & {"source.principal", "source.namespace", "source.serviceAccount"}:
                name = f"{policy.meta.namespace}/{policy.meta.name}"
                detail = "it denies by identity, and a caller in plaintext has none: it passes"
                yield Hit(kind="AuthorizationPolicy", name=name, path=("spec", "rules", index), detail=detail)
