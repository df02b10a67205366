"""Taking a version over from MLflow: which of its files, and what is made of its tags, aliases, metrics, signature."""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import yaml

from mlmesh.registry.v1 import registry_pb2 as pb
from mlmesh_cli.errors import CliError, rpc_failure, usage_error
from mlmesh_cli.mlflow import MlflowServer, RemoteFile, RemoteVersion
from mlmesh_cli.mlflow_mapping import (
    LABELS_MAX,
    MEDIA_TYPES,
    MLMODEL,
    PATH,
    TEXT_CHARS_MAX,
    aliases_of,
    choose,
    labels_of,
    metrics_of,
    model_id_of,
    path_of,
    signature_of,
)
from mlmesh_cli.onnx_files import BYTES_MAX, make_whole, outside_files
from mlmesh_cli.promoting import alias_of
from mlmesh_cli.publishing import progress_bars, read_signature, updating
from mlmesh_cli.terminal import Terminal
from mlmesh_cli.transfer import upload

if TYPE_CHECKING:
    from mlmesh.registry.v1.registry_pb2_grpc import ModelRegistryServiceAsyncStub

_MLMODEL_BYTES_MAX = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Import:
    """What is to be made of a version of MLflow's.

    Attributes:
        remote: the version there.
        model: id of the model here.
        version: without artifacts, whose bytes are not here yet.
        files: by the path that they will have here.
        aliases: to move to it.
        listed: every file there, by its path there.
        left_out: what is not taken over, and why.
        onnx: path of the ONNX file, empty where there is none.
    """

    remote: RemoteVersion
    model: str
    model_description: str
    model_labels: Mapping[str, str]
    version: pb.ModelVersion
    files: Mapping[str, RemoteFile]
    listed: Mapping[str, RemoteFile]
    aliases: tuple[str, ...]
    left_out: tuple[str, ...]
    onnx: str = ""
    request_id: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A version as a person names it: NAME/3 or NAME@champion."""

    name: str
    version: str = ""
    alias: str = ""

    @classmethod
    def parse(cls, text: str) -> Source:
        """Reads NAME/VERSION or NAME@ALIAS; a name may hold anything else. Raises CliError (exit code 2)."""
        found = re.fullmatch(r"(?:models:/)?(?P<name>.+)(?:/(?P<version>[1-9][0-9]*)|@(?P<alias>[^/@]+))", text)
        if found is None:
            raise usage_error(
                f"{text!r} names no version of MLflow's", "write NAME/VERSION or NAME@ALIAS, such as mnist/3"
            )
        return cls(name=found["name"], version=found["version"] or "", alias=found["alias"] or "")


def prepare(server: MlflowServer, source: Source, model: str) -> Import:
    """Asks MLflow and decides; nothing is downloaded but the MLmodel file.

    Args:
        model: id for it here; empty makes one of MLflow's name.

    Raises:
        CliError: there is no such version, or nothing of it may be stored here.
    """
    remote = server.version(source.name, version=source.version, alias=source.alias)
    files = server.files(remote)
    mlmodel = _mlmodel(server, remote, files)
    chosen, onnx, left_out = choose(mlmodel, files)
    labels, no_labels = labels_of(remote.tags)
    metrics, no_metrics = metrics_of(remote.metrics)
    aliases, no_aliases = aliases_of(remote.aliases)
    model_labels, no_model_labels = labels_of(remote.model_tags)
    page = server.page_of(remote)
    if remote.run_id and len(labels) < LABELS_MAX:
        labels["mlflow.run_id"] = remote.run_id
    version = pb.ModelVersion(
        signature=signature_of(mlmodel),
        metrics=metrics,
        labels=labels,
        description=remote.description[:TEXT_CHARS_MAX],
        lineage=pb.Lineage(source_uri=page),
    )
    model_id = model or model_id_of(remote.name)
    return Import(
        remote=remote,
        model=model_id,
        model_description=remote.model_description[:TEXT_CHARS_MAX],
        model_labels=model_labels,
        version=version,
        files={path_of(file.path): file for file in chosen},
        listed={file.path: file for file in files},
        aliases=aliases,
        left_out=(*left_out, *no_labels, *no_metrics, *no_aliases, *no_model_labels),
        onnx=onnx,
        request_id="mlflow-" + hashlib.sha256(json.dumps([page, model_id]).encode()).hexdigest(),
    )


async def run_import(
    stub: ModelRegistryServiceAsyncStub, server: MlflowServer, wanted: Import, terminal: Terminal
) -> tuple[pb.ModelVersion, Sequence[str], bool]:
    """Publishes what was prepared: the version, what was to be told besides, and whether it was here already.

    Repeating it gives the same version: it is known by its source, and by its request_id while two run at once.
    """
    parent = f"models/{wanted.model}"
    await _create_model(stub, wanted)
    version = await _known(stub, parent, wanted.version.lineage.source_uri)
    known = version is not None
    if version is None:
        version = await _published(stub, server, wanted, terminal)
    notes = await _moved(stub, parent, version.name, wanted)
    return (await stub.GetModelVersion(pb.GetModelVersionRequest(name=version.name))).model_version, notes, known


async def _create_model(stub: ModelRegistryServiceAsyncStub, wanted: Import) -> None:
    request = pb.CreateModelRequest(
        model_id=wanted.model, description=wanted.model_description, labels=wanted.model_labels
    )
    try:
        await stub.CreateModel(request)
    except grpc.aio.AioRpcError as error:
        if error.code() is not grpc.StatusCode.ALREADY_EXISTS:
            raise


async def _known(stub: ModelRegistryServiceAsyncStub, parent: str, source_uri: str) -> pb.ModelVersion | None:
    escaped = source_uri.replace("\\", "\\\\").replace('"', '\\"').replace("*", "\\*")
    if len(escaped) > 512:
        return None
    request = pb.ListModelVersionsRequest(parent=parent, filter=f'lineage.source_uri = "{escaped}"', page_size=1)
    found = (await stub.ListModelVersions(request)).model_versions
    return found[0] if found else None


async def _published(
    stub: ModelRegistryServiceAsyncStub, server: MlflowServer, wanted: Import, terminal: Terminal
) -> pb.ModelVersion:
    version = pb.ModelVersion()
    version.CopyFrom(wanted.version)
    with tempfile.TemporaryDirectory(prefix="mlmesh-import-") as name, progress_bars(terminal) as bars:

        async def fetch(file: RemoteFile, here: Path) -> None:
            task = bars.add_task(f"fetching {file.path}", total=file.size_bytes)
            await asyncio.to_thread(server.download, wanted.remote, file, here, updating(bars, task))

        for position, (path, file) in enumerate(sorted(wanted.files.items())):
            # In folders named by number: of the server's names, only checked ones appear on this disk.
            here = Path(name) / str(position) / "model.onnx"
            here.parent.mkdir()
            await fetch(file, here)
            if file.path == wanted.onnx:
                for outside, part in (await asyncio.to_thread(_outside, here, wanted)).items():
                    beside = here.parent / outside
                    beside.parent.mkdir(parents=True, exist_ok=True)
                    await fetch(part, beside)
                await asyncio.to_thread(make_whole, here)
                version.signature.CopyFrom(await asyncio.to_thread(read_signature, here))
            task = bars.add_task(f"uploading {path}", total=here.stat().st_size)
            blob = await upload(stub, here, updating(bars, task))
            await asyncio.to_thread(shutil.rmtree, here.parent)
            version.artifacts.add(path=path, blob=blob.name, media_type=MEDIA_TYPES.get(Path(path).suffix, ""))
    request = pb.CreateModelVersionRequest(
        parent=f"models/{wanted.model}", model_version=version, request_id=wanted.request_id
    )
    return (await stub.CreateModelVersion(request)).model_version


def _outside(here: Path, wanted: Import) -> Mapping[str, RemoteFile]:
    """Files that hold tensors of the ONNX file, by their path beside it. Raises CliError when one may not be taken."""
    folder = wanted.onnx.rpartition("/")[0]
    found: dict[str, RemoteFile] = {}
    for location in sorted(outside_files(here)):
        part = wanted.listed.get(f"{folder}/{location}" if folder else location)
        if part is None or not PATH.fullmatch(location) or location == here.name:
            raise CliError(
                f"{wanted.onnx} has tensors in {location[:100]!a}, which is no file of the version",
                "log the model again in MLflow",
                reason="NOT_ONNX",
            )
        found[location] = part
    if sum(part.size_bytes for part in found.values()) > BYTES_MAX:
        raise CliError(
            f"{wanted.onnx} and its tensors are more than 2 GiB, which is all that an ONNX file can hold",
            "publish it as safetensors",
            reason="NOT_ONNX",
        )
    return found


async def _moved(stub: ModelRegistryServiceAsyncStub, parent: str, version: str, wanted: Import) -> Sequence[str]:
    """Moves the aliases; one that the model's gates hold back is told and stays."""
    notes = []
    for alias in wanted.aliases:
        before = await alias_of(stub, parent, alias)
        if before is not None and before.version == version:
            continue
        request = pb.SetModelAliasRequest(
            name=f"{parent}/aliases/{alias}",
            version=version,
            etag=before.etag if before else "",
            reason=f"imported from {wanted.version.lineage.source_uri}"[:4096],
        )
        try:
            await stub.SetModelAlias(request)
        except grpc.aio.AioRpcError as error:
            failure = rpc_failure(error)
            if failure.reason != "GATE_REFUSED":
                raise
            notes.append(f"alias {alias} was not moved: {failure.message}")
    return notes


def _mlmodel(server: MlflowServer, remote: RemoteVersion, files: Sequence[RemoteFile]) -> Mapping[str, Any]:
    if not any(file.path == MLMODEL for file in files):
        raise CliError(
            f"{remote.name} version {remote.version} has no MLmodel file: it is no model of MLflow's",
            "import what mlflow's log_model made",
        )
    try:
        value = yaml.safe_load(server.read(remote, MLMODEL, _MLMODEL_BYTES_MAX))
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise CliError("its MLmodel file is not YAML", "log the model again in MLflow")
    return value
