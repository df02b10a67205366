"""Checks resources against each other: what one names, another must define."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from mlmesh_local.resources.analysis import analyze
from mlmesh_local.resources.catalog import (
    MESH_GATEWAY,
    CatalogService,
    catalog,
    full_gateway,
    full_host,
    host_matches,
    selects,
)
from mlmesh_local.resources.credentials import Credential, client_rules, roots_for, secret_place
from mlmesh_local.resources.gateway_api.derive import derive
from mlmesh_local.resources.indexes import LabelIndex
from mlmesh_local.resources.meta import Meta
from mlmesh_local.resources.model import (
    AuthorizationPolicy,
    ClientTls,
    Deployment,
    Destination,
    DestinationRule,
    EnvoyFilter,
    Gateway,
    HttpRule,
    MeshConfig,
    PeerAuthentication,
    RequestAuthentication,
    Service,
    ServiceAccount,
    VirtualService,
)
from mlmesh_local.resources.places import field_place
from mlmesh_local.resources.problems import At, Problems, did_you_mean
from mlmesh_local.resources.rules import RuleIndex, chosen
from mlmesh_local.resources.security import security_warnings

if TYPE_CHECKING:
    from mlmesh_local.resources.resource_set import ResourceSet

DOMAIN = "cluster.local"
ROOT_NAMESPACE = "istio-system"


def crosscheck(resources: ResourceSet) -> tuple[str, ...]:
    """Check a whole set. Returns warnings; raises InvalidResource with everything for which calls would fail.

    What `mlmesh analyze` finds and what can be served all the same is among the warnings, but for mere information.
    """
    check = _Check(resources)
    check.virtual_services()
    check.workloads()
    check.credentials()
    check.policies()
    check.problems.refuse()
    found = [message.warning for message in analyze(resources) if message.level != "Info"]
    return (*(str(warning) for warning in check.warnings.found()), *found)


class _Check:
    def __init__(self, resources: ResourceSet) -> None:
        self.problems = Problems()
        self.warnings = Problems()
        self._resources = resources
        # What follows from the Gateway API can be called, too; here it is refused when it asks for what cannot be.
        self._services = catalog(derive(resources), DOMAIN)
        self._patterns = [host for host in self._services if host.startswith("*")]
        self._gateways = {f"{g.meta.namespace}/{g.meta.name}": g for g in resources.specs(Gateway)}
        self._rules = RuleIndex(resources.specs(DestinationRule), domain=DOMAIN, root_namespace=ROOT_NAMESPACE)
        self._deployments = resources.specs(Deployment)
        self._pods = LabelIndex((one.meta.namespace, one.labels, one) for one in self._deployments)

    def _field(self, meta: Meta, *path: str | int) -> At:
        resource = next((one for one in self._resources if one.spec.meta is meta), None)
        return field_place(resource, *path) if resource else meta.at

    # VirtualService

    def virtual_services(self) -> None:
        for service in self._resources.specs(VirtualService):
            self._check_gateways(service)
            if MESH_GATEWAY in {full_gateway(name, service.meta.namespace) for name in service.gateways}:
                self._served(service)
            for rule in service.http:
                self._rule(service, rule)

    def _check_gateways(self, service: VirtualService) -> None:
        unknown = [
            (index, name)
            for index, name in enumerate(service.gateways)
            if full_gateway(name, service.meta.namespace) not in (MESH_GATEWAY, *self._gateways)
        ]
        named = [(name, self._field(service.meta, "spec", "gateways", index)) for index, name in unknown]
        named += [(name, match.at) for rule in service.http for match in rule.matches for name in match.gateways]
        for name, at in named:
            full = full_gateway(name, service.meta.namespace)
            if full != MESH_GATEWAY and full not in self._gateways:
                self.problems.add(at, f'there is no Gateway "{full}"{did_you_mean(full, self._gateways)}')

    def _served(self, service: VirtualService) -> None:
        for host in service.hosts:
            full = full_host(host, service.meta.namespace, DOMAIN)
            known = full in self._services or (
                full.startswith("*") and any(host_matches(full, service_host) for service_host in self._services)
            )
            if not known and not self._wild(full):
                self.warnings.add(
                    service.meta.at, f'"{full}" is the host of no Service and no ServiceEntry: sidecars do not route it'
                )

    def _wild(self, host: str) -> bool:
        """Whether a host with a wildcard covers it."""
        return any(host_matches(pattern, host) for pattern in self._patterns)

    def _rule(self, service: VirtualService, rule: HttpRule) -> None:
        per_try_s = rule.retries.per_try_timeout_s if rule.retries else None
        if per_try_s and rule.timeout_s and per_try_s > rule.timeout_s:
            self.warnings.add(
                rule.at,
                f"perTryTimeout {per_try_s:g} s is longer than the timeout, {rule.timeout_s:g} s: it never acts",
            )
        destinations = [weighted.destination for weighted in rule.destinations]
        for destination in [*destinations, *(mirror.destination for mirror in rule.mirrors)]:
            self._destination(service, destination)

    def _destination(self, service: VirtualService, destination: Destination) -> None:
        namespace = service.meta.namespace
        host = full_host(destination.host, namespace, DOMAIN)
        target = self._services.get(host)
        at = destination.at
        if target is None and self._wild(host):
            return
        if target is None:
            hint = did_you_mean(host, self._services)
            self.problems.add(at.field("host"), f'"{host}" is the host of no Service and no ServiceEntry{hint}')
            return
        numbers = [port.number for port in target.ports]
        if destination.port and destination.port not in numbers:
            known = ", ".join(map(str, numbers))
            self.problems.add(at.field("port"), f'"{host}" has no port {destination.port}; it has {known}')
        if destination.subset:
            self._subset(target, destination, namespace)

    def _subset(self, target: CatalogService, destination: Destination, namespace: str) -> None:
        policy = chosen(self._rules.candidates(target.host, target.namespace, namespace), namespace, {})
        if policy.subset(destination.subset) is None:
            names = [subset.name for subset in policy.subsets]
            where = " or ".join(policy.rules) if policy.rules else "there is no DestinationRule of that host"
            known = f"{where} has {', '.join(names) or 'none'}" if policy.rules else where
            self.problems.add(
                destination.at.field("subset"),
                f'"{target.host}" has no subset "{destination.subset}": {known}'
                f"{did_you_mean(destination.subset, names)}",
            )

    # Workloads

    def workloads(self) -> None:
        accounts = {(a.meta.namespace, a.meta.name) for a in self._resources.specs(ServiceAccount)}
        for deployment in self._deployments:
            account = (deployment.meta.namespace, deployment.service_account)
            if account[1] != "default" and account not in accounts:
                names = [name for namespace, name in accounts if namespace == account[0]]
                self.problems.add(
                    self._field(deployment.meta, "spec", "template", "spec", "serviceAccountName"),
                    f'there is no ServiceAccount "{account[0]}/{account[1]}", which its pods name (serviceAccountName)'
                    f": a cluster would start none of them{did_you_mean(account[1], names)}",
                )
        for service in self._resources.specs(Service):
            self._service(service)

    def _service(self, service: Service) -> None:
        target = self._services.get(full_host(service.meta.name, service.meta.namespace, DOMAIN))
        if target is None or target.is_entry:
            return
        workloads = self._pods.select(target.namespace, target.selector) if target.selector else []
        if not workloads:
            self.warnings.add(service.meta.at, "selects no workload")
        for index, port in enumerate(service.ports):
            for workload in workloads:
                names = workload.container_ports()
                if isinstance(port.target, str) and port.target not in names and not workload.is_gateway:
                    self.problems.add(
                        self._field(service.meta, "spec", "ports", index, "targetPort"),
                        f'targetPort "{port.target}" is the name of no container port of {workload.meta}'
                        f"{did_you_mean(port.target, names)}",
                    )

    # DestinationRule

    def credentials(self) -> None:
        known = {(one.meta.namespace, one.meta.name): one for one in self._resources.specs(Credential)}
        for rule in self._resources.specs(DestinationRule):
            for tls in client_rules(rule):
                for namespace in self._readers(rule) if tls.credential_name else ():
                    place = secret_place(tls.credential_name, namespace)
                    missing = _missing(tls, place, known) if place else ""
                    if missing:
                        self.warnings.add(
                            rule.meta.at,
                            f'credentialName "{tls.credential_name}": {missing}; Envoys in "{namespace}" that call by '
                            "this rule wait for it, and calls fail",
                        )

    def _readers(self, rule: DestinationRule) -> list[str]:
        """Namespaces of the proxies to which a rule's credentials are given."""
        own = rule.meta.namespace
        found = {
            pod.meta.namespace
            for pod in self._deployments
            if (pod.is_gateway if rule.selector is None else selects(rule.selector, pod.labels))
            and (pod.meta.namespace == own or (rule.selector is None and "." not in rule.export_to))
        }
        return sorted(found)

    # Policies

    def policies(self) -> None:
        known = [one.name for config in self._resources.specs(MeshConfig) for one in config.authorizers]
        for problem in security_warnings(self._resources.specs(AuthorizationPolicy), authorizers=known):
            self.warnings.add(problem.at, problem.message)
        # `analyze` tells it of the others.
        selecting: tuple[PeerAuthentication | RequestAuthentication | EnvoyFilter, ...] = (
            *self._resources.specs(PeerAuthentication),
            *self._resources.specs(RequestAuthentication),
            *self._resources.specs(EnvoyFilter),
        )
        for policy in selecting:
            scope = policy.meta.namespace
            everywhere = scope == ROOT_NAMESPACE
            if policy.selector and not any(
                selects(policy.selector, workload.labels)
                for workload in self._deployments
                if everywhere or workload.meta.namespace == scope
            ):
                self.warnings.add(policy.meta.at, "selects no workload")
        scopes: dict[tuple[str, tuple[tuple[str, str], ...]], At] = {}
        for authentication in self._resources.specs(PeerAuthentication):
            key = (authentication.meta.namespace, tuple(sorted(authentication.selector.items())))
            first = scopes.setdefault(key, authentication.meta.at)
            if first is not authentication.meta.at:
                self.warnings.add(
                    authentication.meta.at, f"has no effect: {first.resource} has the same scope and is older"
                )


def _missing(tls: ClientTls, place: tuple[str, str], known: Mapping[tuple[str, str], Credential]) -> str:
    """What a Secret lacks for what a rule asks of it."""
    namespace, name = place
    own = known.get(place)
    if own is None and known.get((namespace, f"{name}-cacert")) is None:
        return f'there is no Secret "{namespace}/{name}" with certificates'
    lacks = []
    if tls.mode == "MUTUAL" and not (own and own.certificate):
        lacks.append("tls.crt with tls.key")
    if not tls.insecure_skip_verify and not roots_for(place, known):
        lacks.append("ca.crt")
    return f'Secret "{namespace}/{name}" has no {" and no ".join(lacks)} that Envoy can read' if lacks else ""
