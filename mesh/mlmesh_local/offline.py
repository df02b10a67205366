"""Worlds without processes: what would run if Deployments were started, at addresses that depend on the files alone.

    resources = load_resources(read_paths([Path("manifests/base"), Path("mesh/istio")]).documents)
    world = offline_world(ResourceSet().apply(resources).resources)
    configuration = translate(View(world), world.proxies[0])

Nothing listens at these addresses. Pure.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Collection
from typing import Any

from mlmesh_local.addresses import BLOCKS, INSTANCES_MAX, Block, InstanceAddresses
from mlmesh_local.model import ProxyNode, World
from mlmesh_local.resources.gateway_api.derive import derive
from mlmesh_local.resources.model import Deployment
from mlmesh_local.resources.problems import Problem
from mlmesh_local.resources.resource_set import ResourceSet
from mlmesh_local.translate import service_endpoints
from mlmesh_runtime.errors import InvalidInput

PROXIES_MAX = len(BLOCKS) * INSTANCES_MAX
"""Most proxies of one offline world: 250 in each of 128 blocks of addresses."""

_KEPT = ("pod_address", "application_address", "outbound_address", "extra_addresses", "access_log_path")


def only_for_processes(problem: Problem) -> bool:
    """Whether a problem hinders the running of a process on this machine only, such as a Secret that it reads.

    Give it to `load_resources` as what to overlook where nothing is run.
    """
    kind = problem.at.resource.partition(" ")[0]
    if kind not in ("Deployment", "StatefulSet", "Pod"):
        return False
    return problem.message.startswith("not supported: ") or problem.at.path.endswith("valueFrom")


def offline_world(resources: ResourceSet, *, not_ready: Collection[str] = (), **fields: Any) -> World:
    """A world in which every replica of every Deployment runs, and all are ready but the named ones.

    The first 250 proxies have the addresses that a laptop mesh in the block 127.64 would give them. `fields` are
    others of `World`, such as ``otlp_address``; ``proxies`` and ``endpoints`` replace those made here.

    Raises InvalidInput when there are more than `PROXIES_MAX` replicas.
    """
    resources = derive(resources)
    proxies = tuple(offline_proxies(resources))
    ready = [proxy.id for proxy in proxies if proxy.id not in not_ready]
    made: dict[str, Any] = {"resources": resources, "proxies": proxies}
    if "endpoints" not in fields:
        made["endpoints"] = service_endpoints(resources, fields.get("proxies", proxies), ready=ready)
    return World(**{**made, **fields})


def following_world(before: World, resources: ResourceSet) -> World:
    """What a world becomes when other resources are active: who was there keeps its addresses and its readiness.

    Raises InvalidInput as `offline_world`.
    """
    resources = derive(resources)
    known = {proxy.id: proxy for proxy in before.proxies}
    taken = {proxy.pod_address for proxy in before.proxies}
    numbers = itertools.count(1)
    proxies: list[ProxyNode] = []
    for made in offline_proxies(resources):
        old = known.get(made.id)
        if old is not None:
            kept = {name: getattr(old, name) for name in _KEPT}
            proxies.append(dataclasses.replace(made, **kept))
            continue
        addresses = next(one for number in numbers if (one := _addresses(number)).pod not in taken)
        proxies.append(
            dataclasses.replace(
                made,
                pod_address=addresses.pod,
                application_address=made.application_address and addresses.application,
                outbound_address=made.outbound_address and addresses.outbound,
            )
        )
    waiting = {endpoint.instance for endpoint in before.endpoints if not endpoint.ready}
    ready = [proxy.id for proxy in proxies if proxy.id not in waiting]
    return dataclasses.replace(
        before,
        resources=resources,
        proxies=tuple(proxies),
        endpoints=service_endpoints(resources, proxies, ready=ready),
    )


def offline_proxies(resources: ResourceSet) -> list[ProxyNode]:
    """One proxy a replica, in the order of the Deployments; named "{deployment}-{ordinal}" as in a running mesh.

    A name that two namespaces have is completed by its namespace where it occurs again.
    """
    proxies: list[ProxyNode] = []
    taken: set[str] = set()
    for deployment in resources.specs(Deployment):
        for ordinal in range(deployment.replicas):
            name = f"{deployment.meta.name}-{ordinal}"
            name = f"{name}.{deployment.meta.namespace}" if name in taken else name
            taken.add(name)
            proxies.append(_proxy(name, deployment, _addresses(len(proxies) + 1)))
    return proxies


def _proxy(name: str, deployment: Deployment, addresses: InstanceAddresses) -> ProxyNode:
    gateway = deployment.is_gateway
    return ProxyNode(
        id=name,
        kind="gateway" if gateway else "sidecar",
        namespace=deployment.meta.namespace,
        service_account=deployment.service_account or "default",
        labels=dict(deployment.labels),
        pod_address=addresses.pod,
        application_address="" if gateway else addresses.application,
        outbound_address="" if gateway else addresses.outbound,
        container_ports=dict(deployment.container_ports()),
        settings=deployment.proxy,
    )


def _addresses(number: int) -> InstanceAddresses:
    if number > PROXIES_MAX:
        raise InvalidInput(f"an offline world has at most {PROXIES_MAX} proxies", field="spec.replicas")
    block, rest = divmod(number - 1, INSTANCES_MAX)
    return Block(second=BLOCKS[block]).instance(rest + 1)
