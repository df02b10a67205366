"""Envoy's access log service: what sidecars report of requests and connections becomes Istio's metrics.

Calls are counted by the rule that routed them, too.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from typing import Any, Final, cast

import grpc

from mlmesh_local.envoy_types import message_class
from mlmesh_local.metrics.calls import HttpCall, Peers, Role, Routed, TcpReport, grpc_status
from mlmesh_local.metrics.registry import MeshMetrics
from mlmesh_local.metrics.rules import RuleCounts

logger = logging.getLogger(__name__)

SERVICE = "envoy.service.accesslog.v3.AccessLogService"
METHOD = "StreamAccessLogs"
_MESSAGE = "envoy.service.accesslog.v3.StreamAccessLogsMessage"
_RESPONSE = "envoy.service.accesslog.v3.StreamAccessLogsResponse"
_MESSAGE_COUNTS = "envoy.extensions.filters.http.grpc_stats.v3.FilterObject"
GRPC_STATS: Final = "envoy.filters.http.grpc_stats"
UPSTREAM_PEER: Final = "upstream_peer"
"""Custom tag of entries: SPIFFE id of the certificate that the called side showed."""
UPSTREAM_CLUSTER: Final = "cluster"
"""Custom tag of entries: Envoy's cluster, also when none of its hosts took the call."""
RESOURCE: Final = "resource"
"""Custom tag of entries: the VirtualService whose rule routed the call."""
RULE: Final = "rule"
"""Custom tag of entries: which of its rules."""

_FLAGS: Final = {
    "failed_local_healthcheck": "LH",
    "no_healthy_upstream": "UH",
    "upstream_request_timeout": "UT",
    "local_reset": "LR",
    "upstream_remote_reset": "UR",
    "upstream_connection_failure": "UF",
    "upstream_connection_termination": "UC",
    "upstream_overflow": "UO",
    "no_route_found": "NR",
    "delay_injected": "DI",
    "fault_injected": "FI",
    "rate_limited": "RL",
    "unauthorized_details": "UAEX",
    "rate_limit_service_error": "RLSE",
    "downstream_connection_termination": "DC",
    "upstream_retry_limit_exceeded": "URX",
    "stream_idle_timeout": "SI",
    "invalid_envoy_request_headers": "IH",
    "downstream_protocol_error": "DPE",
    "upstream_max_stream_duration_reached": "UMSDR",
    "response_from_cache_filter": "RFCF",
    "no_filter_config_found": "NFCF",
    "duration_timeout": "DT",
    "upstream_protocol_error": "UPE",
    "no_cluster_found": "NC",
    "overload_manager": "OM",
    "dns_resolution_failure": "DF",
    "downstream_remote_reset": "DR",
}
"""Envoy's short names, https://www.envoyproxy.io/docs/envoy/latest/configuration/observability/access_log/usage."""

_ROLES: Final[dict[str, Role]] = {"inbound": "inbound", "outbound": "outbound", "gateway": "gateway"}


class AccessLogs:
    """Takes access log streams. What comes from a proxy that is not known is dropped, and counted."""

    def __init__(self, metrics: MeshMetrics, rules: RuleCounts | None = None) -> None:
        self._metrics = metrics
        self._rules = rules
        self._counts = message_class(_MESSAGE_COUNTS)

    def attach(self, server: grpc.aio.Server) -> None:
        """Serve it on a server that has not started yet."""
        handler = grpc.stream_unary_rpc_method_handler(
            self._serve,
            request_deserializer=message_class(_MESSAGE).FromString,
            response_serializer=lambda message: message.SerializeToString(),
        )
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, {METHOD: handler}),))

    async def _serve(self, requests: AsyncIterator[Any], context: grpc.aio.ServicerContext[Any, Any]) -> Any:  # noqa: ARG002
        node, role = "", cast("Role", "")
        async for message in requests:
            if message.HasField("identifier"):
                node = message.identifier.node.id
                role = _ROLES.get(message.identifier.log_name, cast("Role", ""))
            self.take(node, role, message)
        return message_class(_RESPONSE)()

    def take(self, node: str, role: Role, message: Any) -> None:
        """Count the entries of a message."""
        http, tcp = message.http_logs.log_entry, message.tcp_logs.log_entry
        if not role or not self._metrics.knows(node):
            self._metrics.refused(len(http) + len(tcp))
            return
        for entry in http:
            call = self._http(node, role, entry)
            self._metrics.http(call)
            if self._rules is not None:
                self._rules.take(call)
        for entry in tcp:
            self._metrics.tcp(_tcp(node, role, entry))

    def _http(self, node: str, role: Role, entry: Any) -> HttpCall:
        common, request, response = entry.common_properties, entry.request, entry.response
        headers = request.request_headers
        code: int = response.response_code.value
        grpc_call = headers.get("content-type", "").startswith("application/grpc")
        trailers, response_headers = response.response_trailers, response.response_headers
        status = trailers.get("grpc-status") or response_headers.get("grpc-status") or ""
        received = sent = 0
        if grpc_call and GRPC_STATS in common.filter_state_objects:
            counts: Any = self._counts.FromString(common.filter_state_objects[GRPC_STATS].value)
            received, sent = counts.request_message_count, counts.response_message_count
        start = common.start_time
        duration = common.duration
        return HttpCall(
            peers=_peers(node, role, common, request.authority),
            stream=(start.seconds * 1_000_000_000 + start.nanos, common.stream_id or request.request_id),
            ended=not common.intermediate_log_entry,
            grpc=grpc_call,
            code=code,
            grpc_status=grpc_status(status, code) if grpc_call else -1,
            flags=_flags(common),
            duration_ms=duration.seconds * 1000 + duration.nanos // 1_000_000,
            received_bytes=common.downstream_wire_bytes_received,
            sent_bytes=common.downstream_wire_bytes_sent,
            received_messages=received,
            sent_messages=sent,
            method=_METHODS.get(request.request_method, ""),
            path=request.path,
            authority=request.authority,
            user_agent=request.user_agent,
            destination_port=common.downstream_local_address.socket_address.port_value,
            headers=tuple(headers.items()) if len(headers) > 1 else (),
            response_headers=tuple(response_headers.items()) if len(response_headers) > 1 else (),
            route=_routed(common) if role != "inbound" else None,
        )


# envoy.config.core.v3.RequestMethod
_METHODS: Final = dict(enumerate(("", "GET", "HEAD", "POST", "PUT", "DELETE", "CONNECT", "OPTIONS", "TRACE", "PATCH")))


def _tcp(node: str, role: Role, entry: Any) -> TcpReport:
    common, connection = entry.common_properties, entry.connection_properties
    start = common.start_time
    return TcpReport(
        peers=_peers(node, role, common, ""),
        stream=(start.seconds * 1_000_000_000 + start.nanos, common.stream_id or str(_port(common))),
        ended=not common.intermediate_log_entry,
        flags=_flags(common),
        received_bytes=connection.received_bytes,
        sent_bytes=connection.sent_bytes,
    )


def _routed(common: Any) -> Routed:
    tags = common.custom_tags
    return Routed(_known(tags.get(RESOURCE, "")), _known(tags.get(RULE, "")), common.route_name)


def _port(common: Any) -> int:
    port: int = common.downstream_direct_remote_address.socket_address.port_value
    return port


def _peers(node: str, role: Role, common: Any, authority: str) -> Peers:
    if role == "inbound":
        tls = common.tls_properties
        peer, local = _uri(tls.peer_certificate_properties), _uri(tls.local_certificate_properties)
        upstream_host = upstream_peer = authority = ""
        # An application that is down leaves no cluster behind.
        cluster = f"inbound|{common.downstream_local_address.socket_address.port_value}||"
        downstream_host = common.downstream_direct_remote_address.socket_address.address
    else:
        peer = local = downstream_host = ""
        upstream_host = common.upstream_remote_address.socket_address.address
        tags = common.custom_tags
        cluster, upstream_peer = _known(tags.get(UPSTREAM_CLUSTER, "")), _known(tags.get(UPSTREAM_PEER, ""))
        authority = "" if cluster or role != "outbound" else authority
    return Peers(
        node=node,
        role=role,
        cluster=cluster,
        route=common.route_name if common.route_name in _OPEN_ROUTES else "",
        authority=authority,
        downstream_host=downstream_host,
        upstream_host=upstream_host,
        downstream_peer=peer,
        downstream_local=local,
        upstream_peer=upstream_peer,
    )


_OPEN_ROUTES: Final = ("block_all", "allow_any")


def _known(text: str) -> str:
    """Envoy writes "-" for nothing."""
    return "" if text == "-" else text


def _uri(certificate: Any) -> str:
    for name in certificate.subject_alt_name:
        if name.uri:
            uri: str = name.uri
            return uri
    return ""


def _flags(common: Any) -> str:
    found = common.response_flags.ListFields()
    if not found:
        return "-"
    return ",".join(_FLAGS[field.name] for field, _ in found if field.name in _FLAGS) or "-"
