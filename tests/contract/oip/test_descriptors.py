"""Our Open Inference Protocol is NVIDIA's, byte for byte on the wire: compared with tritonclient's own descriptors."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from google.protobuf import descriptor_pb2
from tritonclient.grpc import model_config_pb2 as triton_config_pb2
from tritonclient.grpc import service_pb2 as triton_service_pb2

from open_inference import grpc_service_pb2, model_config_pb2

FILES = [
    pytest.param(grpc_service_pb2, triton_service_pb2, id="grpc_service"),
    pytest.param(model_config_pb2, triton_config_pb2, id="model_config"),
]


def _facts(module: Any) -> Iterator[tuple[Any, ...]]:
    """Everything that decides what is on the wire, and the names by which code and JSON know it."""
    file = descriptor_pb2.FileDescriptorProto()
    module.DESCRIPTOR.CopyToProto(file)
    yield ("file", file.package, file.syntax, len(file.dependency))
    for message in file.message_type:
        yield from _message(message, "")
    for enum in file.enum_type:
        yield from _enum(enum, "")
    for service in file.service:
        for method in service.method:
            yield (
                "rpc",
                service.name,
                method.name,
                method.input_type,
                method.output_type,
                method.client_streaming,
                method.server_streaming,
            )


def _message(message: Any, scope: str) -> Iterator[tuple[Any, ...]]:
    name = f"{scope}.{message.name}"
    yield ("message", name, message.options.map_entry)
    for field in message.field:
        oneof = message.oneof_decl[field.oneof_index].name if field.HasField("oneof_index") else ""
        yield (
            "field",
            name,
            field.name,
            field.number,
            field.type,
            field.label,
            field.type_name,
            field.json_name,
            oneof,
            field.proto3_optional,
            field.options.packed if field.options.HasField("packed") else None,
        )
    for enum in message.enum_type:
        yield from _enum(enum, name)
    for nested in message.nested_type:
        yield from _message(nested, name)


def _enum(enum: Any, scope: str) -> Iterator[tuple[Any, ...]]:
    for value in enum.value:
        yield ("enum", f"{scope}.{enum.name}", value.name, value.number)


@pytest.mark.parametrize(("ours", "theirs"), FILES)
def test_every_message_field_enum_and_rpc_is_the_same(ours: Any, theirs: Any) -> None:
    mine, other = set(_facts(ours)), set(_facts(theirs))
    assert mine - other == set(), "only here"
    assert other - mine == set(), "only in tritonclient"
    assert len(mine) > 50


def test_there_are_twenty_rpcs() -> None:
    service = grpc_service_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"]
    assert service.full_name == "inference.GRPCInferenceService"
    assert len(service.methods) == 20


def test_bytes_are_the_same() -> None:
    def fill(module: Any) -> bytes:
        request = module.ModelInferRequest(model_name="m", model_version="3", id="x")
        request.parameters["a"].double_param = 1.5
        request.parameters["b"].uint64_param = 2**63
        tensor = request.inputs.add(name="x", datatype="INT32", shape=[1, 3])
        tensor.contents.int_contents.extend([1, -2, 3])
        request.outputs.add(name="y").parameters["classification"].int64_param = 2
        request.raw_input_contents.append(b"\x00\x01")
        return bytes(request.SerializeToString(deterministic=True))

    assert fill(grpc_service_pb2) == fill(triton_service_pb2)


@pytest.mark.parametrize(
    "first", ["import tritonclient.grpc; from open_inference import grpc_service_pb2",
              "from open_inference import grpc_service_pb2; import tritonclient.grpc"]
)  # fmt: skip
def test_both_fit_into_one_process(first: str) -> None:
    """One descriptor pool takes a symbol once; ours live in a pool of their own, whoever is imported first."""
    code = (
        f"{first}\n"
        "from tritonclient.grpc import service_pb2\n"
        "a = grpc_service_pb2.ServerLiveResponse(live=True).SerializeToString()\n"
        "assert service_pb2.ServerLiveResponse.FromString(a).live\n"
        "assert grpc_service_pb2.ServerLiveResponse.DESCRIPTOR is not service_pb2.ServerLiveResponse.DESCRIPTOR\n"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, timeout=60)
