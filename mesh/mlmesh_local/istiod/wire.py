"""Envoy's messages as Istio sends them, as proto-JSON. Messages of Istio's own extensions stay opaque."""

from __future__ import annotations

import base64
import functools
from typing import Any, cast

from google.protobuf import json_format
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import DecodeError, Message

from mlmesh_local.envoy_types import TYPE_PREFIX, Json, message_class, pool

_ANY = "google.protobuf.Any"
_WELL_KNOWN = "google.protobuf."
DECODED_MAX = 4096
"""Most messages that are kept: most of a push is what it was before."""
OPAQUE = "@opaque"
"""Key under which the content of a message of an unknown type stands, as base64."""


def decode(type_url: str, content: bytes) -> Json:
    """A serialized message as proto-JSON; unknown types are opaque, also inside of others."""
    name = type_url.rpartition("/")[2]
    try:
        message = message_class(name)()
        message.ParseFromString(content)
    except (KeyError, DecodeError):
        return {OPAQUE: base64.b64encode(content).decode()}
    return cast("Json", _message(message))


@functools.lru_cache(maxsize=DECODED_MAX)
def decode_shared(type_url: str, content: bytes) -> Json:
    """As `decode`; equal content gives the same value, which is not to be changed."""
    return decode(type_url, content)


def _message(message: Message) -> Any:
    name = message.DESCRIPTOR.full_name
    if name == _ANY:
        any_message = cast("Any", message)
        inner = decode(any_message.type_url, any_message.value)
        url = TYPE_PREFIX + any_message.type_url.rpartition("/")[2]
        return {"@type": url, **(inner if isinstance(inner, dict) else {"value": inner})}
    if name.startswith(_WELL_KNOWN):
        return json_format.MessageToDict(message, preserving_proto_field_name=True, descriptor_pool=pool())
    result: Json = {}
    for field, value in message.ListFields():
        if _is_map(field):
            values = cast("Any", field.message_type).fields_by_name["value"]
            result[field.name] = {str(key): _value(values, value[key]) for key in sorted(value)}
        elif field.is_repeated:
            result[field.name] = [_value(field, item) for item in value]
        else:
            result[field.name] = _value(field, value)
    return result


def _is_map(field: FieldDescriptor) -> bool:
    return field.message_type is not None and bool(field.message_type.GetOptions().map_entry)


def _value(field: FieldDescriptor, value: Any) -> Any:
    if field.type == FieldDescriptor.TYPE_MESSAGE:
        return _message(value)
    if field.type == FieldDescriptor.TYPE_ENUM:
        known = cast("Any", field.enum_type).values_by_number.get(value)
        return known.name if known else value
    if field.type == FieldDescriptor.TYPE_BYTES:
        return base64.b64encode(value).decode()
    return value
