"""EnvoyFilter: https://istio.io/latest/docs/reference/config/networking/envoy-filter/.

Of its many ways to change what Istio made, the laptop mesh knows one: more HTTP filters in connection managers. That is
what gateways use for gRPC-JSON transcoding, rate limits and the like. All else is refused by name.
"""

from __future__ import annotations

from typing import Final, cast

from mlmesh_local.envoy_types import InvalidMessageError, build
from mlmesh_local.resources.checked import part, selector
from mlmesh_local.resources.fields import Fields
from mlmesh_local.resources.model import EnvoyFilter, FilterPatch, Meta, PatchContext, PatchOperation

HTTP_FILTER: Final = "envoy.extensions.filters.network.http_connection_manager.v3.HttpFilter"
_MANAGER: Final = "envoy.filters.network.http_connection_manager"
_ELSEWHERE: Final = (
    "LISTENER",
    "FILTER_CHAIN",
    "NETWORK_FILTER",
    "ROUTE_CONFIGURATION",
    "VIRTUAL_HOST",
    "HTTP_ROUTE",
    "CLUSTER",
    "EXTENSION_CONFIG",
    "BOOTSTRAP",
    "LISTENER_FILTER",
)


def parse_envoy_filter(meta: Meta, spec: Fields) -> EnvoyFilter:
    """Read an EnvoyFilter's spec."""
    spec.unsupported("targetRefs", why="it selects gateways and waypoints of the Gateway API")
    chosen = selector(spec, "workloadSelector", "labels")
    priority = spec.integer("priority", low=-(2**31), high=2**31 - 1) or 0
    patches = tuple(_patch(item) for item in spec.messages("configPatches"))
    return EnvoyFilter(meta=meta, selector=chosen or {}, priority=priority, patches=patches)


def _patch(fields: Fields) -> FilterPatch:
    with fields:
        if fields.required("applyTo"):
            fields.choice("applyTo", ("HTTP_FILTER",), "HTTP_FILTER", unsupported=_ELSEWHERE)
        context, port, before = "ANY", 0, ""
        with fields.message("match") as match:
            context = match.choice(
                "context", ("ANY", "SIDECAR_INBOUND", "SIDECAR_OUTBOUND", "GATEWAY"), "ANY", unsupported=("WAYPOINT",)
            )
            match.unsupported("proxy", "routeConfiguration", "cluster", "waypoint")
            with match.message("listener") as listener:
                listener.unsupported("name", "portName", "listenerFilter", why="select by portNumber")
                port = listener.port("portNumber")
                with listener.message("filterChain") as chain:
                    before = _sub_filter(chain)
        operation, value = "INSERT_BEFORE", {}
        if fields.required("patch"):
            with fields.message("patch") as patch:
                patch.unsupported("filterClass", why="place it by the operation")
                patch.required("operation")
                operation = patch.choice(
                    "operation",
                    ("INSERT_FIRST", "INSERT_BEFORE", "INSERT_AFTER"),
                    "INSERT_BEFORE",
                    unsupported=("ADD", "MERGE", "MERGE_AND_REPLACE_LIST", "REMOVE", "REPLACE"),
                )
                value = _value(patch)
        return FilterPatch(
            context=cast("PatchContext", context),
            port=port,
            operation=cast("PatchOperation", operation),
            sub_filter=before,
            value=value,
        )


def _sub_filter(chain: Fields) -> str:
    chain.unsupported(
        "name", "sni", "transportProtocol", "applicationProtocols", "destinationPort", why="select by portNumber"
    )
    return part(chain, "filter", _manager_filter) or ""


def _manager_filter(network: Fields) -> str:
    if network.required("name"):
        network.choice("name", (_MANAGER,), _MANAGER, unsupported=_others(network))
    return part(network, "subFilter", lambda sub: sub.text("name", required=True)) or ""


def _others(network: Fields) -> tuple[str, ...]:
    """Any other network filter: what the laptop mesh does not patch."""
    name = network.text("name")
    return (name,) if name not in ("", _MANAGER) else ()


def _value(patch: Fields) -> dict[str, object]:
    """The filter as proto-JSON, held against Envoy's own message."""
    node = patch.raw("value")
    if node is None:
        patch.required("value")
        return {}
    value = node.plain()
    if not isinstance(value, dict) or not value.get("name") or "typed_config" not in value:
        wanted = 'must be an HTTP filter: "name" and "typed_config" with its "@type"; the laptop mesh takes no other'
        patch.refuse("value", wanted)
        return {}
    try:
        build(HTTP_FILTER, value)
    except InvalidMessageError as error:
        patch.refuse("value", f"is not a filter that Envoy knows, so the laptop mesh does not send it: {error}")
    return value
