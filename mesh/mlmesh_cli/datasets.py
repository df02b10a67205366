"""Data sets: looked at before they are sent, and registered as versions of a model of kind DATASET."""

from __future__ import annotations

import asyncio
import csv
import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import grpc

from mlmesh.registry.v1 import registry_pb2 as pb
from mlmesh_cli.errors import CliError, usage_error
from mlmesh_cli.names import parse_model, parse_pairs
from mlmesh_cli.publishing import move_aliases, upload_with_progress
from mlmesh_cli.terminal import Terminal

if TYPE_CHECKING:
    from mlmesh.registry.v1.registry_pb2_grpc import ModelRegistryServiceAsyncStub

_HEADER_BYTES_MAX = 100_000_000
_FORMATS = {
    "image": {".safetensors": "application/octet-stream"},
    "text": {".jsonl": "application/jsonl", ".csv": "text/csv"},
    "tabular": {".csv": "text/csv"},
}


class Kind(StrEnum):
    """What the examples are."""

    IMAGE = "image"
    TEXT = "text"
    TABULAR = "tabular"


@dataclass(frozen=True, slots=True, kw_only=True)
class Registration:
    """A file to register and what to say of it."""

    name: str
    file: Path
    kind: Kind
    aliases: tuple[str, ...]
    labels: Mapping[str, str]
    description: str

    @classmethod
    def from_options(
        cls,
        file: Path,
        *,
        name: str,
        kind: Kind,
        target: str,
        classes: str,
        aliases: list[str],
        labels: list[str],
        description: str,
    ) -> Registration:
        """From what a person typed, the file looked at. Raises CliError (exit code 2) for what cannot be."""
        reference = parse_model(name)
        if reference.version_name:
            raise usage_error(f"{name!r} names a version", "give the data set's name alone, such as --name animals")
        if file.suffix not in _FORMATS[kind]:
            raise usage_error(
                f"{file.name}: {kind} data sets are {' or '.join(_FORMATS[kind])} files", "see `mlmesh datasets --help`"
            )
        if (kind is Kind.TABULAR) != bool(target):
            raise usage_error(
                "--target names the column of a tabular data set" if target else "a tabular data set needs --target",
                "such as --kind tabular --target price",
            )
        found = {"kind": str(kind), **_looked_at(file, kind, target)}
        if target:
            found["target"] = target
        if classes:
            found["classes"] = classes
        return cls(
            name=reference.model,
            file=file,
            kind=kind,
            aliases=tuple(aliases),
            labels={**found, **parse_pairs(labels, "--label")},
            description=description,
        )


async def register(
    stub: ModelRegistryServiceAsyncStub, wanted: Registration, terminal: Terminal
) -> tuple[pb.ModelVersion, bool]:
    """Uploads the file and publishes a version of the data set. Retry-safe up to the alias moves.

    Returns the version, and whether its bytes were those of the version before. Raises CliError when the name is a
    model's.
    """
    parent = f"models/{wanted.name}"
    request = pb.CreateModelRequest(model_id=wanted.name, kind=pb.MODEL_KIND_DATASET, request_id=uuid4().hex)
    try:
        await stub.CreateModel(request)
    except grpc.aio.AioRpcError as error:
        if error.code() is not grpc.StatusCode.ALREADY_EXISTS:
            raise
        present = (await stub.GetModel(pb.GetModelRequest(name=parent))).model
        if present.kind != pb.MODEL_KIND_DATASET:
            raise CliError(
                f"{parent} holds models, not data sets", "register it under another --name", reason="MODEL_EXISTS"
            ) from None
    blob = await upload_with_progress(stub, wanted.file, terminal)
    path = f"data{wanted.file.suffix}"
    latest = (await stub.ListModelVersions(pb.ListModelVersionsRequest(parent=parent, page_size=1))).model_versions
    version = pb.ModelVersion(
        artifacts=[pb.Artifact(path=path, blob=blob.name, media_type=_FORMATS[wanted.kind][wanted.file.suffix])],
        labels=dict(wanted.labels),
        description=wanted.description,
    )
    made = pb.CreateModelVersionRequest(parent=parent, model_version=version, request_id=uuid4().hex)
    created = (await stub.CreateModelVersion(made)).model_version
    await move_aliases(stub, parent, created.name, wanted.aliases)
    same = bool(latest) and [each.blob for each in latest[0].artifacts] == [blob.name]
    return (await stub.GetModelVersion(pb.GetModelVersionRequest(name=created.name))).model_version, same


def dataset_reference(text: str) -> str:
    """A data set as a JobSpec names it: "mnist" as it is, "animals/3" and "animals@stable" as registered.

    Raises CliError (exit code 2).
    """
    if text.startswith("models/") and text.count("/") == 3:
        return text
    if "/" in text or "@" in text:
        reference = parse_model(text)
        if not reference.version_name:
            raise usage_error(f"{text!r} names no version", "write NAME/VERSION or NAME@ALIAS")
        return reference.version_name
    return text


def default_model(recipe: str, dataset: str) -> str:
    """The model that is published to where none is named: that of the data set's name."""
    if dataset.startswith("models/"):
        return f"models/{dataset.split('/')[1]}-{recipe}"[: len("models/") + 63]
    return f"models/{dataset}"


def _looked_at(file: Path, kind: Kind, target: str) -> dict[str, str]:
    """What the file says of itself. Raises CliError when a recipe could not read it."""
    try:
        if file.suffix == ".safetensors":
            return _safetensors(file)
        if file.suffix == ".csv":
            return _csv(file, {"text", "label"} if kind is Kind.TEXT else {target})
        return _jsonl(file)
    except (ValueError, csv.Error, KeyError, TypeError) as error:
        raise CliError(
            f"{file} cannot be read: {error}", "see `mlmesh datasets --help`", reason="BAD_DATASET"
        ) from None


def _safetensors(file: Path) -> dict[str, str]:
    with file.open("rb") as stream:
        (size,) = struct.unpack("<Q", stream.read(8)) if file.stat().st_size > 8 else (0,)
        if not 2 <= size <= _HEADER_BYTES_MAX:
            raise ValueError("it is no safetensors file")
        header: dict[str, Any] = json.loads(stream.read(size))
    image, target = header.get("image"), header.get("target")
    if image is None or target is None:
        names = ", ".join(sorted(set(header) - {"__metadata__"}))
        raise ValueError(f"it has the tensors {names}; expected image, target")
    if image["dtype"] not in {"U8", "F32"} or target["dtype"] != "I64" or image["shape"][:1] != target["shape"]:
        raise ValueError(f"image is {image['dtype']} {image['shape']}, target {target['dtype']} {target['shape']}")
    return {"examples": str(image["shape"][0]), "shape": "x".join(map(str, image["shape"][1:]))}


def _csv(file: Path, wanted: set[str]) -> dict[str, str]:
    with file.open(encoding="utf-8-sig", newline="") as stream:
        reader = csv.reader(stream, strict=True)
        header = [name.strip() for name in next(reader, [])]
        if missing := wanted - set(header):
            raise ValueError(
                f"its header has {', '.join(header) or 'nothing'}; {', '.join(sorted(missing))} is missing"
            )
        rows = 0
        for row in reader:
            if row and len(row) != len(header):
                raise ValueError(f"line {reader.line_num} has {len(row)} values, the header {len(header)}")
            rows += bool(row)
    return {"examples": str(rows)}


def _jsonl(file: Path) -> dict[str, str]:
    rows = 0
    with file.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            if not line.strip():
                continue
            try:
                document = json.loads(line)
                if not isinstance(document["text"], str) or isinstance(document["label"], dict | list):
                    raise TypeError("text must be a string, label a string or a number")
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f'line {number}: expected an object with "text" and "label" ({error})') from None
            rows += 1
    return {"examples": str(rows)}


async def listed(registry: Any, training: Any) -> tuple[list[Any], list[pb.Model], list[pb.ModelAlias]]:
    """Named data sets of the training service; registered ones, and all aliases, of the registry."""
    from mlmesh.training.v1 import training_pb2  # noqa: PLC0415  keeps `mlmesh --help` quick

    named, models, aliases = await asyncio.gather(
        training.ListDatasets(training_pb2.ListDatasetsRequest()), _models(registry), _aliases(registry)
    )
    return list(named.datasets), models, aliases


async def _models(registry: Any) -> list[pb.Model]:
    request, found = pb.ListModelsRequest(page_size=1000), []
    while True:
        page = await registry.ListModels(request)
        found += [model for model in page.models if model.kind == pb.MODEL_KIND_DATASET]
        request.page_token = page.next_page_token
        if not request.page_token:
            return found


async def _aliases(registry: Any) -> list[pb.ModelAlias]:
    request, found = pb.ListModelAliasesRequest(parent="models/-", page_size=1000), []
    while True:
        page = await registry.ListModelAliases(request)
        found += page.aliases
        request.page_token = page.next_page_token
        if not request.page_token:
            return found
