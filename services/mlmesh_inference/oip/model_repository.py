"""MLServer's older service for its repository: the RPCs of the protocol's own, under another name.

Its messages are the same bytes as those of inference.GRPCInferenceService, so those are used; only what the service is
called, and how it says that a model is not there, is MLServer's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import grpc
from google.protobuf import descriptor_pb2
from google.protobuf.descriptor import ServiceDescriptor
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message import Message

from mlmesh_inference.oip import repository
from mlmesh_runtime.errors import NotFound
from open_inference import grpc_service_pb2 as pb

_PACKAGE: Final = "inference.model_repository"
_RPCS: Final[Mapping[str, tuple[type[Message], type[Message]]]] = {
    "RepositoryIndex": (pb.RepositoryIndexRequest, pb.RepositoryIndexResponse),
    "RepositoryModelLoad": (pb.RepositoryModelLoadRequest, pb.RepositoryModelLoadResponse),
    "RepositoryModelUnload": (pb.RepositoryModelUnloadRequest, pb.RepositoryModelUnloadResponse),
}
_FIELDS: Final = {
    "RepositoryIndexRequest": ("repository_name", "ready"),
    "RepositoryIndexResponse": ("models",),
    "RepositoryModelLoadRequest": ("repository_name", "model_name"),
    "RepositoryModelLoadResponse": (),
    "RepositoryModelUnloadRequest": ("repository_name", "model_name"),
    "RepositoryModelUnloadResponse": (),
}
METHODS: Final = frozenset(_RPCS)


def _descriptor() -> ServiceDescriptor:
    """What reflection tells of the service; its names are its own, so a pool of its own holds them."""
    field = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name="model_repository.proto", package=_PACKAGE, syntax="proto3")
    for name, names in _FIELDS.items():
        message = file.message_type.add(name=name)
        for number, each in enumerate(names, 1):
            kind = {"ready": field.TYPE_BOOL, "models": field.TYPE_MESSAGE}.get(each, field.TYPE_STRING)
            label = field.LABEL_REPEATED if each == "models" else field.LABEL_OPTIONAL
            made = message.field.add(name=each, number=number, type=kind, label=label)
            if each == "models":
                made.type_name = f".{_PACKAGE}.RepositoryIndexResponse.ModelIndex"
                index = message.nested_type.add(name="ModelIndex")
                for place, part in enumerate(("name", "version", "state", "reason"), 1):
                    index.field.add(name=part, number=place, type=field.TYPE_STRING, label=field.LABEL_OPTIONAL)
    service = file.service.add(name="ModelRepositoryService")
    for name in _RPCS:
        service.method.add(
            name=name, input_type=f".{_PACKAGE}.{name}Request", output_type=f".{_PACKAGE}.{name}Response"
        )
    pool = DescriptorPool()
    pool.Add(file)
    return pool.FindServiceByName(f"{_PACKAGE}.ModelRepositoryService")


DESCRIPTOR: Final = _descriptor()


class ModelRepositoryServicer:
    """Implements the service over the protocol's own servicer."""

    def __init__(self, servicer: Any) -> None:
        self._servicer = servicer

    async def RepositoryIndex(self, request: pb.RepositoryIndexRequest, context: Any) -> Any:
        """See OpenInferenceServicer."""
        return await self._servicer.RepositoryIndex(request, context)

    async def RepositoryModelLoad(self, request: pb.RepositoryModelLoadRequest, context: Any) -> Any:
        """See OpenInferenceServicer; a model that is not there is told in MLServer's words."""
        try:
            return await self._servicer.RepositoryModelLoad(request, context)
        except NotFound as error:
            raise _absent(request) from error

    async def RepositoryModelUnload(self, request: pb.RepositoryModelUnloadRequest, context: Any) -> Any:
        """See OpenInferenceServicer."""
        return await self._servicer.RepositoryModelUnload(request, context)


def _absent(request: pb.RepositoryModelLoadRequest) -> NotFound:
    return NotFound(f"Model {repository.named(request)} not found", reason="MODEL_NOT_FOUND")


def add_to_server(servicer: ModelRepositoryServicer, server: Any) -> None:
    """Register the service, as a generated function would."""
    handlers = {
        name: grpc.unary_unary_rpc_method_handler(
            getattr(servicer, name), request_deserializer=asked.FromString, response_serializer=told.SerializeToString
        )
        for name, (asked, told) in _RPCS.items()
    }
    server.add_registered_method_handlers(DESCRIPTOR.full_name, handlers)
