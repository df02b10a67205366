"""Where workloads run, and which of several places calls go to.

The rules are those of pilot/pkg/networking/core/loadbalancer in Istio's source.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from mlmesh_local.model import Endpoint
from mlmesh_local.resources.balancing import REGION, SUBZONE, ZONE
from mlmesh_local.resources.model import LocalityBalancing, ZoneAwareBalancing

NETWORK = "topology.istio.io/network"
HOSTNAME = "kubernetes.io/hostname"
_NODE = "laptop"
_LABELS = ("topology.istio.io/locality", "istio-locality")

Balancing = LocalityBalancing | ZoneAwareBalancing


def locality_of(labels: Mapping[str, str]) -> str:
    """ "region/zone/subzone" that a pod's labels say, or empty.

    `istio-locality` ("region.zone.subzone") counts first. In a cluster the rest are labels of the node; here a pod has
    them itself.
    """
    for label in _LABELS:
        text = labels.get(label, "")
        if text:
            return text if "/" in text else text.replace(".", "/")
    steps = [labels.get(label, "") for label in (REGION, ZONE, SUBZONE)]
    return "/".join(steps).rstrip("/") if any(steps) else ""


def split(locality: str) -> tuple[str, str, str]:
    """Region, zone and subzone; empty where there is none."""
    steps = [*locality.split("/"), "", "", ""]
    return steps[0], steps[1], steps[2]


def located(labels: Mapping[str, str], locality: str, network: str = "") -> Mapping[str, str]:
    """Labels with those that say where it is, as Istio adds them: subsets and priorities may go by them."""
    places = zip((REGION, ZONE, SUBZONE), split(locality), strict=True)
    more = {label: step for label, step in places if step}
    if network and NETWORK not in labels:
        more[NETWORK] = network
    return {**labels, **more} if more else labels


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Endpoints of one locality that get traffic together."""

    locality: str
    endpoints: tuple[Endpoint, ...]
    weight: int
    priority: int = 0


def groups(by_locality: Mapping[str, Sequence[Endpoint]]) -> list[Group]:
    """A group a locality, weighing what its endpoints weigh."""
    return [
        Group(locality=locality, endpoints=tuple(found), weight=sum(one.weight for one in found))
        for locality, found in by_locality.items()
    ]


def balanced(
    found: list[Group], balancing: Balancing, locality: str, labels: Mapping[str, str], *, failover: bool
) -> list[Group]:
    """Groups with the shares or priorities that they have for a client at a locality.

    Without `failover` (outlier detection) no priority is given: nothing would ever move to a lower one.
    """
    if isinstance(balancing, ZoneAwareBalancing):
        if balancing.failover_priority:
            found = _by_labels(found, labels, balancing.failover_priority)
        return _by_region(found, locality, balancing.failover)
    if balancing.distribute:
        return _distributed(found, locality, balancing)
    if not failover:
        return found
    if balancing.failover_priority:
        found = _by_labels(found, labels, balancing.failover_priority)
        return _by_nearness(found, locality, balancing.failover) if balancing.failover else found
    return _by_nearness(found, locality, balancing.failover)


def _matches(locality: str, rule: str) -> bool:
    return all(
        wanted in ("*", step) or (not wanted and place)
        for place, (step, wanted) in enumerate(zip(split(locality), split(rule), strict=True))
    )


def _distributed(found: list[Group], locality: str, balancing: LocalityBalancing) -> list[Group]:
    for origin, shares in balancing.distribute:
        if not _matches(locality, origin):
            continue
        weights: dict[int, int] = {}
        for place, share in _most_specific_first(shares):
            taken = {i: one.weight for i, one in enumerate(found) if i not in weights and _matches(one.locality, place)}
            total = sum(taken.values())
            # A wildcard may cover several localities: they divide its share by their own weights.
            weights |= {i: max(1, math.ceil(weight * share / total)) for i, weight in taken.items()}
        return [
            replace(one, weight=weights[i]) if i in weights else replace(one, endpoints=())
            for i, one in enumerate(found)
        ]
    return found


def _most_specific_first(shares: Iterable[tuple[str, int]]) -> list[tuple[str, int]]:
    # Istio takes them in no certain order, and so must never be given localities that overlap.
    return sorted(shares, key=lambda share: ("*" in share[0], -share[0].count("/"), share[0]))


def _by_nearness(found: list[Group], locality: str, failover: Sequence[tuple[str, str]]) -> list[Group]:
    """0: same subzone, 1: same zone, 2: same region, 3: elsewhere, 4: elsewhere, and not where failover leads."""
    mine = split(locality)
    wanted = next((target for origin, target in failover if origin == mine[0]), None)
    priorities: list[int] = []
    for one in found:
        theirs = split(one.locality)
        same = next((i for i, (a, b) in enumerate(zip(mine, theirs, strict=True)) if a != b), 3)
        priority = 3 - same
        if priority == 3 and wanted is not None and theirs[0] != wanted:
            priority = 4
        priorities.append(one.priority * 5 + priority)
    return _dense(found, priorities)


def _by_region(found: list[Group], locality: str, failover: Sequence[tuple[str, str]]) -> list[Group]:
    """0: same region (Envoy balances its zones), 1: where failover leads, 2: elsewhere."""
    region = split(locality)[0]
    wanted = next((target for origin, target in failover if origin == region), None)
    priorities = [
        one.priority * 3 + (0 if split(one.locality)[0] == region else 1 if split(one.locality)[0] == wanted else 2)
        for one in found
    ]
    return _dense(found, priorities)


def _by_labels(found: list[Group], labels: Mapping[str, str], wanted: Sequence[str]) -> list[Group]:
    """Groups split by how many of the labels, in order, their endpoints share with the client."""
    if not labels:
        return found
    labels = {HOSTNAME: _NODE, **labels}
    pairs = [
        (key, value if equals else labels.get(key, "")) for key, equals, value in (w.partition("=") for w in wanted)
    ]
    result: list[Group] = []
    for group in found:
        parts: dict[int, list[Endpoint]] = {}
        for endpoint in group.endpoints:
            # Pods are on the laptop's one node, what resources name themselves is elsewhere.
            own = located(
                {HOSTNAME: _NODE, **endpoint.labels} if endpoint.instance else endpoint.labels, group.locality
            )
            parts.setdefault(_distance(own, pairs), []).append(endpoint)
        for priority, part in sorted(parts.items()):
            weight = sum(endpoint.weight for endpoint in part)
            result.append(replace(group, endpoints=tuple(part), weight=weight, priority=priority))
    return _dense(result, [one.priority for one in result])


def _distance(labels: Mapping[str, str], pairs: Sequence[tuple[str, str]]) -> int:
    """0 when all labels are shared, else how many are left from the first that is not. Another network is further."""
    further = 0
    for place, (key, value) in enumerate(pairs):
        if labels.get(key, "") != value:
            if place == 0 and key == NETWORK:
                further = len(pairs)
                continue
            return len(pairs) - place + further
    return further


def _dense(found: list[Group], priorities: Sequence[int]) -> list[Group]:
    """Groups with priorities from 0 on without gaps, as Envoy wants them."""
    order = {priority: rank for rank, priority in enumerate(sorted(set(priorities)))}
    return [replace(one, priority=order[priority]) for one, priority in zip(found, priorities, strict=True)]
