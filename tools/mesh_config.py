"""The schema of MeshConfig, which has no CustomResourceDefinition: made of its proto, as those of the other kinds are.

`make tools` puts the protos into .tools/crds/mesh-config.
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from grpc_tools import protoc

FOLDER = Path(__file__).resolve().parent.parent / ".tools" / "crds" / "mesh-config"
NAME = "istio.mesh.v1alpha1.MeshConfig"

Schema = Mapping[str, Any]
_SCALARS: dict[int, str] = {
    FieldDescriptor.CPPTYPE_BOOL: "boolean",
    FieldDescriptor.CPPTYPE_STRING: "string",
    FieldDescriptor.CPPTYPE_DOUBLE: "number",
    FieldDescriptor.CPPTYPE_FLOAT: "number",
}
_WELL_KNOWN: dict[str, Schema] = {
    "google.protobuf.Duration": {"type": "string"},
    "google.protobuf.Struct": {"type": "object", "additionalProperties": {"type": "string"}},
    "google.protobuf.BoolValue": {"type": "boolean"},
    "google.protobuf.StringValue": {"type": "string"},
    "google.protobuf.DoubleValue": {"type": "number"},
    "google.protobuf.Int32Value": {"type": "integer"},
    "google.protobuf.Int64Value": {"type": "integer"},
    "google.protobuf.UInt32Value": {"type": "integer"},
    "google.protobuf.UInt64Value": {"type": "integer"},
}


@functools.cache
def schema(folder: Path = FOLDER) -> Schema:
    """MeshConfig as a schema of OpenAPI has it."""
    return _message(_compiled(folder).FindMessageTypeByName(NAME))


def _compiled(folder: Path) -> descriptor_pool.DescriptorPool:
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "set.binpb"
        known = files("grpc_tools") / "_proto"
        arguments = [f"-I{folder}", f"-I{known}", "--include_imports", f"--descriptor_set_out={out}"]
        if protoc.main(["protoc", *arguments, str(folder / "mesh" / "v1alpha1" / "config.proto")]) != 0:
            raise ValueError(f"the protos of {folder} cannot be read")
        found = descriptor_pb2.FileDescriptorSet.FromString(out.read_bytes())
    pool = descriptor_pool.DescriptorPool()
    for file in found.file:
        pool.Add(file)
    return pool


def _message(message: Descriptor, around: tuple[str, ...] = ()) -> Schema:
    if message.full_name in _WELL_KNOWN:
        return _WELL_KNOWN[message.full_name]
    if message.full_name in around:
        return {"type": "object"}
    inside = (*around, message.full_name)
    return {
        "type": "object",
        "properties": {field.json_name: _field(field, inside) for field in message.fields if field.json_name},
    }


def _field(field: FieldDescriptor, around: tuple[str, ...]) -> Schema:
    inner = field.message_type
    if inner is not None and inner.GetOptions().map_entry:
        return {"type": "object", "additionalProperties": _one(inner.fields_by_name["value"], around)}
    one = _one(field, around)
    return {"type": "array", "items": one} if field.is_repeated else one


def _one(field: FieldDescriptor, around: tuple[str, ...]) -> Schema:
    if field.message_type is not None:
        return _message(field.message_type, around)
    if field.enum_type is not None:
        return {"type": "string", "enum": [value.name for value in field.enum_type.values]}
    return {"type": _SCALARS.get(field.cpp_type, "integer")}
