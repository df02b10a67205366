"""Requests and responses of ADS, delta and state-of-the-world, between gRPC's messages and values."""

from __future__ import annotations

from typing import Any, cast

from mlmesh_local.delta import Request, Response
from mlmesh_local.envoy_types import message_class
from mlmesh_local.sotw import WholeRequest

SERVICE = "envoy.service.discovery.v3.AggregatedDiscoveryService"
DELTA_METHOD = "DeltaAggregatedResources"
WHOLE_METHOD = "StreamAggregatedResources"
DELTA_REQUEST = "envoy.service.discovery.v3.DeltaDiscoveryRequest"
WHOLE_REQUEST = "envoy.service.discovery.v3.DiscoveryRequest"
_DELTA_RESPONSE = "envoy.service.discovery.v3.DeltaDiscoveryResponse"
_WHOLE_RESPONSE = "envoy.service.discovery.v3.DiscoveryResponse"


def delta_request(message: Any) -> Request:
    """A DeltaDiscoveryRequest."""
    return Request(
        type_url=message.type_url,
        subscribe=tuple(name for name in message.resource_names_subscribe if name != "*"),
        unsubscribe=tuple(message.resource_names_unsubscribe),
        known=dict(message.initial_resource_versions),
        nonce=message.response_nonce,
        error=_error(message),
    )


def whole_request(message: Any) -> WholeRequest:
    """A DiscoveryRequest."""
    return WholeRequest(
        type_url=message.type_url,
        names=tuple(dict.fromkeys(name for name in message.resource_names if name != "*")),
        nonce=message.response_nonce,
        error=_error(message),
    )


def _error(message: Any) -> str:
    if not message.HasField("error_detail"):
        return ""
    return message.error_detail.message or "refused without a reason"


def delta_response(response: Response) -> Any:
    """A DeltaDiscoveryResponse."""
    message = cast("Any", message_class(_DELTA_RESPONSE)())
    message.type_url = response.type_url
    message.nonce = response.nonce
    message.system_version_info = response.nonce
    message.removed_resources.extend(response.removed)
    for packed in response.resources:
        resource = message.resources.add()
        resource.name = packed.name
        resource.version = packed.version
        resource.resource.type_url = response.type_url
        resource.resource.value = packed.content
    return message


def whole_response(response: Response) -> Any:
    """A DiscoveryResponse."""
    message = cast("Any", message_class(_WHOLE_RESPONSE)())
    message.type_url = response.type_url
    message.nonce = response.nonce
    message.version_info = response.nonce
    for packed in response.resources:
        resource = message.resources.add()
        resource.type_url = response.type_url
        resource.value = packed.content
    return message
