"""How a cluster chooses among its endpoints.

The rules are those of pilot/pkg/networking/core/cluster_traffic_policy.go and loadbalancer.go in Istio's source.
"""

from __future__ import annotations

from dataclasses import dataclass

from mlmesh_local.envoy_types import Json
from mlmesh_local.resources.balancing import REGION, SUBZONE, ZONE
from mlmesh_local.resources.catalog import CatalogService
from mlmesh_local.resources.model import LoadBalancer, LocalityBalancing, Warmup, ZoneAwareBalancing
from mlmesh_local.translate.localities import HOSTNAME, NETWORK, Balancing
from mlmesh_local.translate.names import seconds

_SLOW_START = {"LEAST_REQUEST": "least_request_lb_config", "ROUND_ROBIN": "round_robin_lb_config"}
# Istio's own text: there is no such key, so the default counts.
_NO_KEY = "("
_NEAREST = {"zone": (NETWORK, REGION, ZONE), "node": (NETWORK, REGION, ZONE, SUBZONE, HOSTNAME)}


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalityChoice:
    """How localities are balanced, and whether the nearest comes first even without outlier detection."""

    balancing: Balancing | None
    forced: bool = False

    @property
    def zone_aware(self) -> ZoneAwareBalancing | None:
        """The setting, if it is that of Envoy's zone-aware routing."""
        return self.balancing if isinstance(self.balancing, ZoneAwareBalancing) else None

    @property
    def active(self) -> Balancing | None:
        """The setting, if endpoints are to be grouped by it."""
        return None if self.zone_aware is not None and self.zone_aware.enabled is False else self.balancing


def locality_choice(
    balancer: LoadBalancer, service: CatalogService, mesh: Balancing | None, mesh_zone_aware: ZoneAwareBalancing | None
) -> LocalityChoice:
    """What counts: the rule's setting, else the Service's traffic distribution, else the mesh's."""
    if balancer.zone_aware is not None:
        return LocalityChoice(balancing=balancer.zone_aware, forced=balancer.zone_aware.enabled is not False)
    if balancer.locality is not None:
        return LocalityChoice(balancing=None if balancer.locality.enabled is False else balancer.locality)
    if service.distribution:
        nearest = LocalityBalancing(enabled=True, failover_priority=_NEAREST[service.distribution])
        return LocalityChoice(balancing=nearest, forced=True)
    if mesh_zone_aware is not None:
        return LocalityChoice(balancing=mesh_zone_aware, forced=mesh_zone_aware.enabled is not False)
    return LocalityChoice(balancing=None if mesh is None or mesh.enabled is False else mesh)


def apply_load_balancer(cluster: Json, balancer: LoadBalancer) -> None:
    """Policy of a cluster with its settings."""
    # PASSTHROUGH means the address that the application dialled; here that is its sidecar's, so any endpoint will do.
    policy = "RANDOM" if balancer.policy == "PASSTHROUGH" else balancer.policy
    cluster["lb_policy"] = policy
    if policy == "RING_HASH" and balancer.table_size:
        cluster["ring_hash_lb_config"] = {"minimum_ring_size": balancer.table_size}
    elif policy == "MAGLEV" and balancer.table_size:
        cluster["maglev_lb_config"] = {"table_size": balancer.table_size}
    elif balancer.warmup is not None and policy in _SLOW_START:
        cluster[_SLOW_START[policy]] = {"slow_start_config": _slow_start(balancer.warmup)}


def _slow_start(warmup: Warmup) -> Json:
    result: Json = {"slow_start_window": seconds(warmup.duration_s)}
    if not warmup.plain:
        aggression = 1.0 if warmup.aggression is None else warmup.aggression
        least = 10.0 if warmup.minimum_percent is None else warmup.minimum_percent
        result["aggression"] = {"default_value": aggression, "runtime_key": _NO_KEY}
        result["min_weight_percent"] = {"value": least}
    return result


def locality_config(choice: LocalityChoice, *, outlier: bool) -> Json:
    """The part of CommonLbConfig that makes localities count."""
    balancing = choice.balancing
    if isinstance(balancing, ZoneAwareBalancing):
        config: Json = {} if balancing.min_cluster_size is None else {"min_cluster_size": balancing.min_cluster_size}
        if balancing.enabled is False:
            config["routing_enabled"] = {"value": 0}
        return {"zone_aware_lb_config": config}
    if isinstance(balancing, LocalityBalancing):
        moves = (outlier or choice.forced) and bool(balancing.failover or balancing.failover_priority)
        if moves or balancing.distribute:
            return {"locality_weighted_lb_config": {}}
    return {}
