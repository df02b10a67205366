"""Headers that proxies add and take away, and what a gateway trusts of what is in front of it.

The rules are those of pilot/pkg/networking/util/proxy_headers.go and pilot/pkg/networking/core/gateway.go.
"""

from __future__ import annotations

from typing import Final, Literal

from mlmesh_local.envoy_types import Json, typed
from mlmesh_local.model import ProxyNode
from mlmesh_local.resources.model_sidecars import GatewayTopology, ProxyHeaders, ProxySettings
from mlmesh_local.translate.view import View

Role = Literal["inbound", "outbound", "gateway"]

_PROXY_PROTOCOL: Final = "envoy.extensions.filters.listener.proxy_protocol.v3.ProxyProtocol"
PROXY_PROTOCOL: Final[Json] = {"name": "envoy.filters.listener.proxy_protocol", "typed_config": typed(_PROXY_PROTOCOL)}
"""Listener filter of a gateway behind a balancer that says who calls before anything else."""

_SAID_UNLESS_TOLD: Final[Json] = {"subject": True, "dns": True, "uri": True}
_SETS_DETAILS = ("APPEND_FORWARD", "SANITIZE_SET")


def _settings(view: View, proxy: ProxyNode) -> ProxySettings:
    own = proxy.settings or ProxySettings()
    return own.over(view.mesh_config.proxies if view.mesh_config else ProxySettings())


def headers_of(view: View, proxy: ProxyNode) -> ProxyHeaders:
    """What a proxy does about headers: by its pod's annotation, else by MeshConfig."""
    return _settings(view, proxy).headers or ProxyHeaders()


def topology_of(view: View, proxy: ProxyNode) -> GatewayTopology:
    """What is in front of a gateway, said in the same places."""
    return _settings(view, proxy).topology or GatewayTopology()


def manager_headers(view: View, proxy: ProxyNode, role: Role) -> Json:
    """What a connection manager does about headers."""
    headers = headers_of(view, proxy)
    config: Json = {} if role == "outbound" else _certificates(view, proxy, role, headers)
    if headers.server == "":
        config["server_header_transformation"] = "PASS_THROUGH"
    elif headers.server or role != "outbound":
        # Istio leaves Envoy's own name on the way out.
        config["server_name"] = headers.server or "istio-envoy"
    if not headers.request_id:
        config["generate_request_id"] = False
    if headers.forwarded_port:
        config["append_x_forwarded_port"] = True
    if role == "gateway":
        trusted = topology_of(view, proxy).trusted_proxies
        config |= {"use_remote_address": True, **({"xff_num_trusted_hops": trusted} if trusted else {})}
    return config


def counted(view: View, proxy: ProxyNode, virtual_hosts: list[Json]) -> list[Json]:
    """Virtual hosts that tell the other side which attempt a request is, unless that is not wanted."""
    if headers_of(view, proxy).attempt_count:
        return virtual_hosts
    return [{key: host[key] for key in host if key != "include_request_attempt_count"} for host in virtual_hosts]


def _certificates(view: View, proxy: ProxyNode, role: Role, headers: ProxyHeaders) -> Json:
    """The last element of x-forwarded-client-cert is who called; a gateway drops what clients sent unless told."""
    if role == "gateway":
        way = topology_of(view, proxy).client_certificates or "SANITIZE_SET"
        details: Json = {**_SAID_UNLESS_TOLD, "cert": True} if way in _SETS_DETAILS else {}
    else:
        way = headers.client_certificates or "APPEND_FORWARD"
        details = {**_SAID_UNLESS_TOLD, "cert": False, **dict(headers.certificate_details)}
    return {
        "forward_client_cert_details": way,
        **({"set_current_client_cert_details": details} if details else {}),
    }
