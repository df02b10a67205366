"""Settings of MeshConfig about hosts: what applies where no rule says, and who sees what.

https://istio.io/latest/docs/reference/config/istio.mesh.v1alpha1/#MeshConfig
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, cast

from mlmesh_local.resources.balancing import locality_balancing, zone_aware_balancing
from mlmesh_local.resources.checked import duration_s, part
from mlmesh_local.resources.fields import Fields
from mlmesh_local.resources.model_hosts import LocalityBalancing, TcpKeepalive, TrafficPolicy, ZoneAwareBalancing
from mlmesh_local.resources.pools import connection_pool, outlier_detection, tcp_keepalive

CONNECT_TIMEOUT_MAX_S = 30.0
EVERYONE = ("*",)

ON = LocalityBalancing(enabled=True)
"""Endpoints near by come first, where outlier detection lets others take over."""

OutboundMode = Literal["ALLOW_ANY", "REGISTRY_ONLY"]


@dataclass(frozen=True, slots=True, kw_only=True)
class HostSettings:
    """Defaults are Istio's (pkg/config/mesh/mesh.go).

    Attributes:
        service_export, virtual_service_export, destination_rule_export: who sees what names nobody.
        default_policy: connection pool and outlier detection where no rule sets them.
        h2_upgrade: whether plain HTTP is upgraded to HTTP/2.
        dns_refresh_s: between attempts to resolve a name that could not be resolved.
        outbound: what becomes of calls of unknown hosts; see `docs/mesh/hosts.md`.
    """

    connect_timeout_s: float = 10.0
    tcp_keepalive: TcpKeepalive | None = None
    service_export: tuple[str, ...] = EVERYONE
    virtual_service_export: tuple[str, ...] = EVERYONE
    destination_rule_export: tuple[str, ...] = EVERYONE
    locality: LocalityBalancing = ON
    zone_aware: ZoneAwareBalancing | None = None
    default_policy: TrafficPolicy | None = None
    h2_upgrade: bool = False
    dns_refresh_s: float = 60.0
    outbound: OutboundMode = "ALLOW_ANY"


def host_settings(fields: Fields) -> HostSettings:
    """Read the settings about hosts."""
    connect_s = duration_s(fields, "connectTimeout")
    if connect_s is not None and connect_s > CONNECT_TIMEOUT_MAX_S:
        fields.refuse("connectTimeout", f"must be at most {CONNECT_TIMEOUT_MAX_S:g} s, not {connect_s:g} s")
    refresh_s = duration_s(fields, "dnsRefreshRate")
    return HostSettings(
        connect_timeout_s=10.0 if connect_s is None else connect_s,
        tcp_keepalive=part(fields, "tcpKeepalive", tcp_keepalive),
        service_export=fields.texts("defaultServiceExportTo") or EVERYONE,
        virtual_service_export=fields.texts("defaultVirtualServiceExportTo") or EVERYONE,
        destination_rule_export=fields.texts("defaultDestinationRuleExportTo") or EVERYONE,
        locality=part(fields, "localityLbSetting", locality_balancing) or ON,
        zone_aware=part(fields, "zoneAwareLbSetting", zone_aware_balancing),
        default_policy=part(fields, "defaultTrafficPolicy", _default_policy),
        h2_upgrade=fields.choice("h2UpgradePolicy", ("DO_NOT_UPGRADE", "UPGRADE"), "DO_NOT_UPGRADE") == "UPGRADE",
        dns_refresh_s=60.0 if refresh_s is None else refresh_s,
        outbound=part(fields, "outboundTrafficPolicy", _outbound) or "ALLOW_ANY",
    )


def _default_policy(fields: Fields) -> TrafficPolicy:
    return TrafficPolicy(
        connection_pool=part(fields, "connectionPool", connection_pool),
        outlier=part(fields, "outlierDetection", outlier_detection),
    )


def _outbound(fields: Fields) -> OutboundMode:
    fields.unsupported("tls", why="it is for ALLOW_ANY_DYNAMIC_DNS")
    mode = fields.choice(
        "mode", ("REGISTRY_ONLY", "ALLOW_ANY"), "REGISTRY_ONLY", unsupported=("ALLOW_ANY_DYNAMIC_DNS",)
    )
    return cast("OutboundMode", mode)
