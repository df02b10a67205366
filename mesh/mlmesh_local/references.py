"""What packed resources refer to, read out of their bytes: for configuration that another control plane has made."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import DecodeError, Message

from mlmesh_local.envoy_types import (
    CLUSTER,
    ENDPOINTS,
    EXTENSIONS,
    LISTENER,
    ROUTES,
    SECRET,
    TYPE_PREFIX,
    message_class,
)

_RDS = "envoy.extensions.filters.network.http_connection_manager.v3.Rds"
_SDS = "envoy.extensions.transport_sockets.tls.v3.SdsSecretConfig"
_CLUSTER = "envoy.config.cluster.v3.Cluster"
_DISCOVERED = frozenset(
    {
        "envoy.extensions.filters.network.http_connection_manager.v3.HttpFilter",
        "envoy.config.listener.v3.Filter",
        "envoy.config.listener.v3.ListenerFilter",
    }
)
_ANY = "google.protobuf.Any"


def references(resources: Mapping[str, Mapping[str, bytes]]) -> dict[str, frozenset[str]]:
    """Names that clusters, listeners and filters ask for over ADS, by the type asked for.

    What they take from elsewhere (a Unix socket, a file) is left out, and so is what is inside of messages that this
    program has no description of.
    """
    found: dict[str, set[str]] = {ENDPOINTS: set(), ROUTES: set(), SECRET: set(), EXTENSIONS: set()}
    for type_url in (CLUSTER, EXTENSIONS, LISTENER):
        cls = message_class(type_url.removeprefix(TYPE_PREFIX))
        for content in resources.get(type_url, {}).values():
            for kind, name in _within(cls.FromString(content)):
                found[kind].add(name)
    return {kind: frozenset(names) for kind, names in found.items()}


def _within(message: Any) -> Iterator[tuple[str, str]]:
    kind = message.DESCRIPTOR.full_name
    if kind == _RDS:
        if _by_ads(message, "config_source"):
            yield ROUTES, message.route_config_name
    elif kind == _SDS:
        if _by_ads(message, "sds_config"):
            yield SECRET, message.name
    elif kind in _DISCOVERED:
        if message.WhichOneof("config_type") == "config_discovery" and _by_ads(
            message.config_discovery, "config_source"
        ):
            yield EXTENSIONS, message.name
    elif kind == _CLUSTER and _by_ads(message.eds_cluster_config, "eds_config"):
        yield ENDPOINTS, message.eds_cluster_config.service_name or message.name
    for inner in _messages(message):
        yield from _within(inner)


def _by_ads(message: Any, field: str) -> bool:
    return bool(message.HasField(field)) and getattr(message, field).WhichOneof("config_source_specifier") == "ads"


def _messages(message: Any) -> Iterator[Message]:
    if message.DESCRIPTOR.full_name == _ANY:
        try:
            yield message_class(message.type_url.rpartition("/")[2]).FromString(message.value)
        except (KeyError, DecodeError):
            return
        return
    for field, value in message.ListFields():
        if field.type != FieldDescriptor.TYPE_MESSAGE:
            continue
        if field.message_type.GetOptions().map_entry:
            if field.message_type.fields_by_name["value"].type == FieldDescriptor.TYPE_MESSAGE:
                yield from (value[key] for key in value)
        elif field.is_repeated:
            yield from value
        else:
            yield value
