"""gRPC server reflection, v1 and v1alpha, over the files of the services that are really served.

Nothing is asked of protobuf's default pool: a file comes from the pool of the service that brought it, so services
whose messages live in a pool of their own are reflected too, and two pools may even define the same symbol.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Sequence
from typing import Any

import grpc
from google.protobuf import descriptor_pb2, message_factory
from google.protobuf.descriptor import FileDescriptor, ServiceDescriptor
from google.protobuf.descriptor_pool import DescriptorPool
from google.rpc import error_details_pb2
from grpc_reflection.v1alpha import reflection_pb2

NOT_FOUND, INVALID_ARGUMENT = 5, 3


class DescriptorIndex:
    """Finds files by name, symbol and extension among the given services' files and what these import.

    Where two pools bring a file of the same name, the first stays: services given first win.
    """

    def __init__(self, services: Sequence[ServiceDescriptor]) -> None:
        self.services = tuple(sorted(service.full_name for service in services))
        self._files: dict[str, bytes] = {}
        self._imports: dict[str, tuple[str, ...]] = {}
        self._symbols: dict[str, str] = {}
        self._extensions: dict[str, dict[int, str]] = {}
        for service in services:
            self._add(service.file)
        # Every service answers errors with these details: tools that know us by reflection alone can then print them.
        self._add(error_details_pb2.DESCRIPTOR)

    def file_by_name(self, name: str) -> list[bytes] | None:
        """The serialized file and everything it imports; None when unknown."""
        if name not in self._files:
            return None
        found: dict[str, bytes] = {}
        waiting = [name]
        while waiting:
            current = waiting.pop()
            if current not in found:
                found[current] = self._files[current]
                waiting.extend(self._imports[current])
        return list(found.values())

    def file_with_symbol(self, symbol: str) -> list[bytes] | None:
        """The file that defines a service, method, message, field, enum or enum value."""
        name = self._symbols.get(symbol.removeprefix("."))
        return None if name is None else self.file_by_name(name)

    def file_with_extension(self, message: str, number: int) -> list[bytes] | None:
        """The file that defines an extension of a message."""
        name = self._extensions.get(message.removeprefix("."), {}).get(number)
        return None if name is None else self.file_by_name(name)

    def extension_numbers(self, message: str) -> list[int] | None:
        """Numbers of the known extensions of a message; None when the message is unknown."""
        message = message.removeprefix(".")
        if message not in self._symbols:
            return None
        return sorted(self._extensions.get(message, {}))

    def _add(self, file: FileDescriptor) -> None:
        if file.name in self._files:
            return
        self._files[file.name] = file.serialized_pb
        self._imports[file.name] = tuple(dependency.name for dependency in file.dependencies)
        proto = descriptor_pb2.FileDescriptorProto.FromString(file.serialized_pb)
        prefix = f"{proto.package}." if proto.package else ""
        for symbol in _symbols(proto, prefix):
            self._symbols.setdefault(symbol, file.name)
        for field in _extensions(proto):
            self._extensions.setdefault(field.extendee.removeprefix("."), {}).setdefault(field.number, file.name)
        for dependency in file.dependencies:
            self._add(dependency)


def _symbols(proto: descriptor_pb2.FileDescriptorProto, prefix: str) -> Iterable[str]:
    for message in proto.message_type:
        yield from _message_symbols(message, prefix)
    yield from _enum_symbols(proto.enum_type, prefix)
    for service in proto.service:
        yield prefix + service.name
        for method in service.method:
            yield f"{prefix}{service.name}.{method.name}"
    for extension in proto.extension:
        yield prefix + extension.name


def _message_symbols(message: descriptor_pb2.DescriptorProto, prefix: str) -> Iterable[str]:
    yield prefix + message.name
    inner = f"{prefix}{message.name}."
    for field in (*message.field, *message.extension):
        yield inner + field.name
    for oneof in message.oneof_decl:
        yield inner + oneof.name
    yield from _enum_symbols(message.enum_type, inner)
    for nested in message.nested_type:
        yield from _message_symbols(nested, inner)


def _enum_symbols(enums: Iterable[descriptor_pb2.EnumDescriptorProto], prefix: str) -> Iterable[str]:
    for enum in enums:
        yield prefix + enum.name
        for value in enum.value:
            yield prefix + value.name  # a value is a sibling of its enum, not a child


def _extensions(proto: descriptor_pb2.FileDescriptorProto) -> Iterable[descriptor_pb2.FieldDescriptorProto]:
    yield from proto.extension
    waiting = list(proto.message_type)
    while waiting:
        message = waiting.pop()
        yield from message.extension
        waiting.extend(message.nested_type)


class Protocol:
    """One version of the reflection protocol: the same messages in another package."""

    def __init__(self, version: str) -> None:
        proto = descriptor_pb2.FileDescriptorProto()
        reflection_pb2.DESCRIPTOR.CopyToProto(proto)
        package = f"grpc.reflection.{version}"
        _rename(proto, proto.package, package)
        proto.name = f"grpc/reflection/{version}/reflection.proto"
        pool = DescriptorPool()
        pool.Add(proto)
        file = pool.FindFileByName(proto.name)
        self.descriptor: ServiceDescriptor = file.services_by_name["ServerReflection"]
        self.request: Any = message_factory.GetMessageClass(file.message_types_by_name["ServerReflectionRequest"])
        self.response: Any = message_factory.GetMessageClass(file.message_types_by_name["ServerReflectionResponse"])

    def add_to_server(self, servicer: ReflectionServicer, server: Any) -> None:
        """Register the service, as a generated `add_…_to_server` would."""
        handler = grpc.stream_stream_rpc_method_handler(
            servicer.ServerReflectionInfo, self.request.FromString, self.response.SerializeToString
        )
        server.add_registered_method_handlers(self.descriptor.full_name, {"ServerReflectionInfo": handler})


def _rename(proto: descriptor_pb2.FileDescriptorProto, old: str, new: str) -> None:
    proto.package = new
    for message in proto.message_type:
        for field in message.field:
            if field.HasField("type_name"):
                field.type_name = field.type_name.replace(f".{old}.", f".{new}.")
    for method in proto.service[0].method:
        method.input_type = method.input_type.replace(f".{old}.", f".{new}.")
        method.output_type = method.output_type.replace(f".{old}.", f".{new}.")


class ReflectionServicer:
    """Answers one version of the protocol."""

    def __init__(self, protocol: Protocol, index: DescriptorIndex) -> None:
        self._protocol = protocol
        self._index = index

    async def ServerReflectionInfo(self, requests: AsyncIterator[Any], _context: Any) -> AsyncIterator[Any]:
        """One answer a request, in order. What is unknown is an error_response, not the end of the stream."""
        async for request in requests:
            yield self._answer(request)

    def _answer(self, request: Any) -> Any:
        response = self._protocol.response(valid_host=request.host)
        response.original_request.CopyFrom(request)
        index = self._index
        match request.WhichOneof("message_request"):
            case "list_services":
                for name in index.services:
                    response.list_services_response.service.add(name=name)
            case "file_by_filename":
                _files(response, index.file_by_name(request.file_by_filename), request.file_by_filename)
            case "file_containing_symbol":
                symbol = request.file_containing_symbol
                _files(response, index.file_with_symbol(symbol), symbol)
            case "file_containing_extension":
                wanted = request.file_containing_extension
                files = index.file_with_extension(wanted.containing_type, wanted.extension_number)
                _files(response, files, f"{wanted.containing_type}[{wanted.extension_number}]")
            case "all_extension_numbers_of_type":
                name = request.all_extension_numbers_of_type
                numbers = index.extension_numbers(name)
                if numbers is None:
                    _unknown(response, name)
                else:
                    response.all_extension_numbers_response.base_type_name = name
                    response.all_extension_numbers_response.extension_number.extend(numbers)
            case _:
                response.error_response.error_code = INVALID_ARGUMENT
                response.error_response.error_message = "an empty reflection request"
        return response


def _files(response: Any, files: list[bytes] | None, name: str) -> None:
    if files is None:
        _unknown(response, name)
    else:
        response.file_descriptor_response.file_descriptor_proto.extend(files)


def _unknown(response: Any, name: str) -> None:
    response.error_response.error_code = NOT_FOUND
    response.error_response.error_message = f"not found: {name[:200]}"
