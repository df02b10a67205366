"""The dialects that share the protocol's names and not its wire, told apart on one port.

Triton, KServe and MLServer each have a `inference.GRPCInferenceService`. Three methods differ:

- RepositoryModelLoad and -Unload: KServe's request has the model's name in field 1, where all others have the name of a
  repository; field 1 alone means KServe. KServe's answer tells the name and whether it is loaded; others read nothing,
  and pass over what they do not know. So every answer tells both.
- ModelStreamInfer: MLServer answers with ModelInferResponse, where Triton wraps it and can tell an error in band. The
  requests are the same bytes, so the caller says which it speaks in the metadata `x-oip-dialect`, or the process has a
  default. In MLServer's dialect the first error ends the stream with its status.

All else that differs is a matter of not using it: field 6 of ModelMetadataResponse is left empty, and no answer holds a
parameter of double or uint64.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, Final

import grpc
from google.protobuf import descriptor_pb2, message_factory
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message import Message

from mlmesh_inference.oip.infer import parse
from mlmesh_runtime.errors import InvalidInput
from open_inference import grpc_service_pb2 as pb
from open_inference import grpc_service_pb2_grpc as stubs

HEADER: Final = "x-oip-dialect"
TRITON: Final = "triton"
MLSERVER: Final = "mlserver"
DIALECTS: Final = (TRITON, MLSERVER)
"""Dialects of ModelStreamInfer."""

RepositoryRequest = pb.RepositoryModelLoadRequest | pb.RepositoryModelUnloadRequest


def _kserve() -> dict[str, type[Message]]:
    """KServe's two answers, in a pool of their own: their names are those of other messages elsewhere."""
    file = descriptor_pb2.FileDescriptorProto(name="kserve.proto", package="inference", syntax="proto3")
    field = descriptor_pb2.FieldDescriptorProto
    for name, flag in (("RepositoryModelLoadResponse", "isLoaded"), ("RepositoryModelUnloadResponse", "isUnloaded")):
        message = file.message_type.add(name=name)
        message.field.add(name="model_name", number=1, type=field.TYPE_STRING, label=field.LABEL_OPTIONAL)
        message.field.add(name=flag, number=2, type=field.TYPE_BOOL, label=field.LABEL_OPTIONAL)
    pool = DescriptorPool()
    pool.Add(file)
    made = pool.FindFileByName("kserve.proto").message_types_by_name
    return {name: message_factory.GetMessageClass(descriptor) for name, descriptor in made.items()}


_KSERVE: Final = _kserve()


def model_named(request: RepositoryRequest) -> str:
    """The model that a load or unload is about, in either dialect."""
    return request.repository_name if is_kserve(request) else request.model_name


def is_kserve(request: RepositoryRequest) -> bool:
    """Whether a load or unload comes from KServe's client: the name is where others name a repository."""
    return not request.model_name and bool(request.repository_name)


def loaded(model: str) -> pb.RepositoryModelLoadResponse:
    """The answer to a load: empty to most, and KServe reads the model's name and that it is loaded."""
    told = _KSERVE["RepositoryModelLoadResponse"](model_name=model, isLoaded=True)
    return pb.RepositoryModelLoadResponse.FromString(told.SerializeToString())


def unloaded(model: str) -> pb.RepositoryModelUnloadResponse:
    """The answer to an unload, likewise."""
    told = _KSERVE["RepositoryModelUnloadResponse"](model_name=model, isUnloaded=True)
    return pb.RepositoryModelUnloadResponse.FromString(told.SerializeToString())


def stream_dialect(said: str | None, default: str) -> str:
    """The dialect of a stream, by its metadata. Raises InvalidInput for one that is none."""
    if said is None:
        return default
    dialect = said.strip().lower()
    if dialect not in DIALECTS:
        raise InvalidInput(f"{HEADER}: expected {' or '.join(DIALECTS)}, got {said[:32]!r}", field=HEADER)
    return dialect


def unwrapped(write: Callable[[Any], Awaitable[None]]) -> Callable[[pb.ModelStreamInferResponse], Awaitable[None]]:
    """What sends Triton's answers in MLServer's dialect: without the wrapper."""

    async def send(message: pb.ModelStreamInferResponse) -> None:
        await write(message.infer_response)

    return send


def add_to_server(servicer: Any, server: Any) -> None:
    """The generated function's work, but that ModelStreamInfer may answer with messages of another dialect."""
    adding: Any = _Adding(server)
    stubs.add_GRPCInferenceServiceServicer_to_server(servicer, adding)


class _Adding:
    """A server as the generated function sees it."""

    def __init__(self, server: Any) -> None:
        self._server = server

    def add_generic_rpc_handlers(self, handlers: Any) -> None:
        """Passed on; our own server takes the registered ones."""
        self._server.add_generic_rpc_handlers(handlers)

    def add_registered_method_handlers(self, service: str, handlers: dict[str, Any]) -> None:
        """Passed on, with the one handler replaced. Its requests are looked over before they are parsed."""
        stream = handlers["ModelStreamInfer"]
        replaced = grpc.stream_stream_rpc_method_handler(
            stream.stream_stream,
            request_deserializer=parse,
            response_serializer=_serialized,
        )
        self._server.add_registered_method_handlers(service, {**handlers, "ModelStreamInfer": replaced})


_serialized: Final[Callable[[Message], bytes]] = lambda message: message.SerializeToString()  # noqa: E731
