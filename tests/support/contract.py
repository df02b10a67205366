"""The contract as data: the compiled protos with their comments."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from google.protobuf import descriptor_pb2

ROOT = Path(__file__).resolve().parent.parent.parent
IMAGE = ROOT / "protos" / "mlmesh" / "descriptor_set.binpb"

# Numbers of fields in descriptor.proto, of which the paths of source locations are made.
_FILE_SERVICE = 6
_SERVICE_METHOD = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """An RPC of ours with its comment."""

    file: str
    package: str
    service: str
    name: str
    comment: str
    descriptor: descriptor_pb2.MethodDescriptorProto

    @property
    def full_name(self) -> str:
        return f"{self.package}.{self.service}/{self.name}"


@functools.cache
def image() -> descriptor_pb2.FileDescriptorSet:
    """The descriptor set that the build writes and the wheel carries."""
    result = descriptor_pb2.FileDescriptorSet()
    result.ParseFromString(IMAGE.read_bytes())
    return result


def ours() -> list[descriptor_pb2.FileDescriptorProto]:
    """Files whose conventions are ours to choose."""
    return [f for f in image().file if f.name.startswith("mlmesh/")]


def messages() -> dict[str, descriptor_pb2.DescriptorProto]:
    """Top-level messages of our files by full name with a leading dot, as descriptors refer to them."""
    return {f".{f.package}.{m.name}": m for f in ours() for m in f.message_type}


def _said(comment: str) -> str:
    """A comment without its instructions for the linter."""
    return "\n".join(line for line in comment.splitlines() if not line.strip().startswith("buf:lint:ignore"))


def _comments(file: descriptor_pb2.FileDescriptorProto) -> dict[tuple[int, ...], str]:
    return {tuple(at.path): at.leading_comments for at in file.source_code_info.location}


def methods() -> Iterator[Method]:
    """Every RPC of our services."""
    for file in ours():
        comments = _comments(file)
        for s, service in enumerate(file.service):
            for m, method in enumerate(service.method):
                yield Method(
                    file=file.name,
                    package=file.package,
                    service=service.name,
                    name=method.name,
                    comment=_said(comments.get((_FILE_SERVICE, s, _SERVICE_METHOD, m), "")),
                    descriptor=method,
                )


def service_comments() -> dict[str, str]:
    """Comment of each service of ours by full name."""
    return {
        f"{file.package}.{service.name}": _comments(file).get((_FILE_SERVICE, s), "")
        for file in ours()
        for s, service in enumerate(file.service)
    }
