"""What `istioctl analyze` would say of resources, were all of them in a cluster: same codes, objects and severities.

    for message in analyze(resources):
        print(message)

Pods are those that the Deployments would have. What needs a live cluster (versions of images, webhooks, several
clusters) is left out, and so are Secrets: the laptop mesh issues certificates itself.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable
from typing import TYPE_CHECKING

from mlmesh_local.resources.analysis.cluster import Cluster
from mlmesh_local.resources.analysis.conditions import analyze_conditions
from mlmesh_local.resources.analysis.gateways import analyze_gateways
from mlmesh_local.resources.analysis.hosts import analyze_hosts
from mlmesh_local.resources.analysis.messages import CODES, LEVELS, Level, Message
from mlmesh_local.resources.analysis.policies import analyze_policies
from mlmesh_local.resources.analysis.validity import analyze_validity
from mlmesh_local.resources.analysis.virtual_services import analyze_virtual_services
from mlmesh_local.resources.analysis.workloads import analyze_workloads

if TYPE_CHECKING:
    from mlmesh_local.resources.resource_set import ResourceSet

SUPPRESS = "galley.istio.io/analyze-suppress"
"""Annotation with the codes that a resource does not want to hear, separated by commas; "*" for all."""


def analyze(resources: ResourceSet, *, suppress: Iterable[str] = ()) -> tuple[Message, ...]:
    """All findings, the worst first, then by code and resource, each once.

    `suppress` holds istioctl's "CODE=Kind namespace/name" (or "Kind name.namespace"); "*" stands for any part.
    """
    cluster = Cluster(resources)
    for part in (
        analyze_virtual_services,
        analyze_gateways,
        analyze_hosts,
        analyze_policies,
        analyze_workloads,
        analyze_conditions,
        analyze_validity,
    ):
        part(cluster)
    wishes = [wish.partition("=") for wish in suppress]
    found: dict[tuple[str, str, str], Message] = {}
    for message in cluster.messages:
        quiet = {word.strip() for word in message.meta.annotations.get(SUPPRESS, "").split(",")}
        if not ({"*", message.code} & quiet or any(_wished(message, code, name) for code, _, name in wishes)):
            found.setdefault((message.code, message.origin, message.text), message)
    return tuple(
        sorted(found.values(), key=lambda one: (-LEVELS.index(one.level), one.code, one.origin, one.at.line, one.text))
    )


def _wished(message: Message, code: str, name: str) -> bool:
    kind = message.origin.partition(" ")[0]
    dotted = f"{kind} {message.meta.name}.{message.meta.namespace}"
    return message.code == code and any(fnmatch.fnmatchcase(known, name) for known in (message.origin, dotted))


__all__ = ["CODES", "LEVELS", "SUPPRESS", "Level", "Message", "analyze"]
