"""Envoy's own messages, in a descriptor pool of their own, made from proto-JSON.

Packages that ship Envoy's protos as modules clash with opentelemetry-proto and googleapis-common-protos; a private pool
read from `envoy.binpb` clashes with nothing. Unknown fields are refused with the list of valid ones.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from importlib.resources import files
from typing import Any

from google.protobuf import descriptor_pb2, json_format, message_factory
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message import Message

Json = dict[str, Any]
"""A message as proto-JSON."""

TYPE_PREFIX = "type.googleapis.com/"

CLUSTER = TYPE_PREFIX + "envoy.config.cluster.v3.Cluster"
ENDPOINTS = TYPE_PREFIX + "envoy.config.endpoint.v3.ClusterLoadAssignment"
SECRET = TYPE_PREFIX + "envoy.extensions.transport_sockets.tls.v3.Secret"
LISTENER = TYPE_PREFIX + "envoy.config.listener.v3.Listener"
ROUTES = TYPE_PREFIX + "envoy.config.route.v3.RouteConfiguration"
EXTENSIONS = TYPE_PREFIX + "envoy.config.core.v3.TypedExtensionConfig"
"""Configurations of filters by name: a filter that takes its own from there (`config_discovery`) changes while its
listener stays as it is."""

PUSH_ORDER = (CLUSTER, ENDPOINTS, SECRET, EXTENSIONS, LISTENER, ROUTES)
"""Make before break: what is referenced comes before what references it."""

_ANY = "google.protobuf.Any"


class InvalidMessageError(ValueError):
    """Proto-JSON that is not a message of its type: a defect of translation, not of the user's input."""


@functools.cache
def pool() -> DescriptorPool:
    """The pool with Envoy's messages; loaded once, in about 60 ms."""
    result = DescriptorPool()
    content = descriptor_pb2.FileDescriptorSet.FromString((files("mlmesh_local") / "envoy.binpb").read_bytes())
    for file in content.file:
        result.Add(file)
    return result


@functools.cache
def message_class(name: str) -> type[Message]:
    """Class of a message by full name, such as "envoy.service.discovery.v3.DeltaDiscoveryRequest"."""
    return message_factory.GetMessageClass(pool().FindMessageTypeByName(name))


def build(name: str, value: Mapping[str, Any]) -> Message:
    """A message from proto-JSON. Raises InvalidMessageError on unknown fields and wrong values."""
    message = message_class(name)()
    try:
        json_format.ParseDict(dict(value), message, descriptor_pool=pool())
        _settle(message)
    except (json_format.ParseError, AttributeError, KeyError, TypeError) as error:
        # The parser takes for granted that "@type" is there and a string, and that a list is where a list belongs.
        raise InvalidMessageError(f"{name}: {error}") from error
    return message


def plain(message: Message) -> Json:
    """Proto-JSON of a message, fields named as in its file."""
    found: Json = json_format.MessageToDict(message, preserving_proto_field_name=True, descriptor_pool=pool())
    return found


def plain_bytes(type_url: str, content: bytes) -> Json:
    """Proto-JSON of a serialized message."""
    return plain(message_class(type_url.removeprefix(TYPE_PREFIX)).FromString(content))


def build_bytes(type_url: str, value: Mapping[str, Any]) -> bytes:
    """Serialized message of a type URL. Equal values give equal bytes, also inside Any."""
    return build(type_url.removeprefix(TYPE_PREFIX), value).SerializeToString(deterministic=True)


def typed(name: str, value: Mapping[str, Any] | None = None) -> Json:
    """Proto-JSON of an Any that holds a message: ``typed("envoy.….Router")``."""
    return {"@type": TYPE_PREFIX + name, **(value or {})}


def canonical(value: object) -> str:
    """Text that is equal for equal values."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def _settle(message: Message) -> None:
    """Serialize again, deterministically, what is packed in Any: json_format packs maps in no certain order."""
    for descriptor, value in message.ListFields():
        if descriptor.type != FieldDescriptor.TYPE_MESSAGE:
            continue
        inner: Any = descriptor.message_type
        if inner.GetOptions().map_entry:
            if inner.fields_by_name["value"].type == FieldDescriptor.TYPE_MESSAGE:
                for key in value:
                    _settle_one(value[key])
        elif descriptor.is_repeated:
            for item in value:
                _settle_one(item)
        else:
            _settle_one(value)


def _settle_one(message: Message) -> None:
    if message.DESCRIPTOR.full_name != _ANY:
        _settle(message)
        return
    any_message: Any = message
    inner = message_class(any_message.type_url.rpartition("/")[2]).FromString(any_message.value)
    _settle(inner)
    any_message.value = inner.SerializeToString(deterministic=True)
