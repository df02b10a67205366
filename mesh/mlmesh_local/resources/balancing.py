"""Load balancers: https://istio.io/latest/docs/reference/config/networking/destination-rule/#LoadBalancerSettings."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from typing import cast

from mlmesh_local.resources.checked import duration_s, part
from mlmesh_local.resources.fields import Fields
from mlmesh_local.resources.model_hosts import (
    BalancerPolicy,
    HashKey,
    LoadBalancer,
    LocalityBalancing,
    Warmup,
    ZoneAwareBalancing,
)

MAGLEV_TABLE_MAX = 5_000_011
UINT64_MAX = 2**64 - 1
REGION, ZONE, SUBZONE = "topology.kubernetes.io/region", "topology.kubernetes.io/zone", "topology.istio.io/subzone"
"""Labels that say where a workload runs."""

_SIMPLE = ("UNSPECIFIED", "LEAST_CONN", "RANDOM", "PASSTHROUGH", "ROUND_ROBIN", "LEAST_REQUEST")


def load_balancer(fields: Fields) -> LoadBalancer:
    """Read `loadBalancer`."""
    fields.one_of("simple", "consistentHash")
    fields.one_of("localityLbSetting", "zoneAwareLbSetting")
    simple = fields.choice("simple", _SIMPLE, "UNSPECIFIED")
    # Istio's default, and what it makes of the deprecated LEAST_CONN.
    policy = "LEAST_REQUEST" if simple in {"UNSPECIFIED", "LEAST_CONN"} else simple
    balancer = part(fields, "consistentHash", _consistent_hash) or LoadBalancer(policy=cast("BalancerPolicy", policy))
    plain_s = duration_s(fields, "warmupDurationSecs")
    plain = None if plain_s is None else Warmup(duration_s=plain_s, plain=True)
    return dataclasses.replace(
        balancer,
        locality=part(fields, "localityLbSetting", locality_balancing),
        zone_aware=part(fields, "zoneAwareLbSetting", zone_aware_balancing),
        warmup=part(fields, "warmup", _warmup) or plain,
    )


def _warmup(fields: Fields) -> Warmup:
    fields.required("duration")
    aggression = fields.number("aggression", low=0.0, high=math.inf)
    if aggression == 0:
        fields.refuse("aggression", "must be more than 0")
    return Warmup(
        duration_s=duration_s(fields, "duration") or 1.0,
        minimum_percent=fields.number("minimumPercent", low=0.0, high=100.0),
        aggression=aggression,
    )


def _consistent_hash(fields: Fields) -> LoadBalancer:
    how = fields.one_of("httpHeaderName", "httpCookie", "useSourceIp", "httpQueryParameterName")
    header, query = fields.text("httpHeaderName"), fields.text("httpQueryParameterName")
    source_ip = fields.boolean("useSourceIp")
    cookie = part(fields, "httpCookie", _cookie)
    key: HashKey | None = None
    if how == "httpHeaderName":
        key = HashKey(how="header", name=header)
    elif how == "httpQueryParameterName":
        key = HashKey(how="query", name=query)
    elif how == "httpCookie":
        key = cookie
    elif source_ip:
        key = HashKey(how="source_ip")
    algorithm = fields.one_of("ringHash", "maglev")
    ring = part(fields, "ringHash", lambda inner: inner.integer("minimumRingSize", high=UINT64_MAX))
    table = part(fields, "maglev", _table_size)
    old = fields.integer("minimumRingSize", high=UINT64_MAX)
    if old and algorithm:
        fields.refuse("minimumRingSize", f'cannot be set together with "{algorithm}"')
    if algorithm == "maglev":
        return LoadBalancer(policy="MAGLEV", hash_key=key, table_size=table or None)
    if algorithm == "ringHash":
        return LoadBalancer(policy="RING_HASH", hash_key=key, table_size=ring or None)
    # Envoy's own default, which Istio writes out where no algorithm is named.
    return LoadBalancer(policy="RING_HASH", hash_key=key, table_size=old or 1024)


def _table_size(fields: Fields) -> int:
    size = fields.integer("tableSize", high=UINT64_MAX) or 0
    if not 0 < size < MAGLEV_TABLE_MAX:
        fields.refuse("tableSize", f"must be 1 to {MAGLEV_TABLE_MAX - 1}, not {size}")
    elif not _is_prime(size):
        fields.refuse("tableSize", f"must be a prime number, not {size}")
    return size


def _is_prime(number: int) -> bool:
    # As Envoy counts, which lets 1 pass.
    return number < 4 or (number % 2 == 1 and all(number % odd for odd in range(3, math.isqrt(number) + 1, 2)))


def _cookie(fields: Fields) -> HashKey:
    attributes: dict[str, str] = {}
    for item in fields.messages("attributes"):
        with item:
            name = item.text("name", required=True)
            if name in attributes:
                item.refuse("name", f'the attribute "{name}" occurs twice')
            attributes[name] = item.text("value")
    return HashKey(
        how="cookie",
        name=fields.text("name", required=True),
        cookie_path=fields.text("path"),
        cookie_ttl_s=fields.duration_s("ttl", low_s=0.0),
        cookie_attributes=tuple(attributes.items()),
    )


def locality_balancing(fields: Fields) -> LocalityBalancing:
    """Read `localityLbSetting`."""
    distribute: list[tuple[str, tuple[tuple[str, int], ...]]] = []
    for item in fields.messages("distribute"):
        with item:
            distribute.append((item.text("from"), _shares(item)))
    found = LocalityBalancing(
        enabled=fields.boolean_or_none("enabled"),
        distribute=tuple(distribute),
        failover=_failover(fields),
        failover_priority=fields.texts("failoverPriority"),
    )
    if found.distribute and found.failover:
        fields.refuse("failover", 'cannot be set together with "distribute"')
    for label in found.failover_priority:
        if found.failover and label in (REGION, ZONE, SUBZONE):
            fields.refuse("failoverPriority", f'"{label}" does not go with "failover"')
    overlap = overlapping(origin for origin, _ in found.distribute)
    if overlap:
        fields.refuse("distribute", overlap)
    return found


def _shares(fields: Fields) -> tuple[tuple[str, int], ...]:
    shares: dict[str, int] = {}
    for locality, node, at in fields.entries("to"):
        weight = node.value
        if isinstance(weight, int) and not isinstance(weight, bool) and 1 <= weight <= 100:
            shares[locality] = weight
        else:
            fields.problems.add(at, "must be a whole number, 1 to 100")
            return ()
    total = sum(shares.values())
    if total != 100:
        fields.refuse("to", f"the shares sum to {total}, not to 100")
    overlap = overlapping(shares)
    if overlap:
        fields.refuse("to", overlap)
    return tuple(shares.items())


def overlapping(localities: Iterable[str]) -> str:
    """What is wrong with localities of one list, or empty: "*" ends one, none is empty, none is part of another."""
    seen: dict[str, dict[str, set[str]]] = {}
    for locality in localities:
        if locality.count("*") > 1 or ("*" in locality and not locality.endswith("*")):
            return f'"{locality}": "*" is the end of a locality, or nowhere'
        steps = locality.split("/", 2)
        if not all(steps):
            return f'"{locality}" has an empty region, zone or subzone'
        region, *inner = steps
        if "*" in seen or _taken(seen.get(region), inner):
            return f'"{locality}" overlaps with another one'
        zone, subzone = [*inner, "*", "*"][:2]
        seen.setdefault(region, {}).setdefault(zone, set()).add(subzone)
    return ""


def _taken(zones: dict[str, set[str]] | None, inner: list[str]) -> bool:
    """Whether a zone and subzone (none: the whole region) of a region are among those before. The order counts."""
    if zones is None:
        return False
    if not inner or "*" in zones:
        return True
    subzones = zones.get(inner[0])
    return subzones is not None and (len(inner) == 1 or "*" in subzones or inner[1] in subzones)


def zone_aware_balancing(fields: Fields) -> ZoneAwareBalancing:
    """Read `zoneAwareLbSetting`."""
    priority = fields.texts("failoverPriority")
    for label in priority:
        if label in (REGION, ZONE, SUBZONE):
            fields.refuse("failoverPriority", f'"{label}": regions and zones are in the order by themselves')
    return ZoneAwareBalancing(
        enabled=fields.boolean_or_none("enabled"),
        failover=_failover(fields),
        failover_priority=priority,
        min_cluster_size=fields.integer("minClusterSize", low=1),
    )


def _failover(fields: Fields) -> tuple[tuple[str, str], ...]:
    pairs: list[tuple[str, str]] = []
    for item in fields.messages("failover"):
        with item:
            origin, target = item.text("from"), item.text("to")
            if origin == target:
                item.refuse("to", "must be another region")
            for name, region in (("from", origin), ("to", target)):
                if "/" in region or "*" in region:
                    item.refuse(name, f'"{region}" is not a region')
            pairs.append((origin, target))
    return tuple(pairs)
