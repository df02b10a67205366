"""Taking a version over from MLflow: which of its files, and what is made of its tags, aliases, metrics, signature."""

from __future__ import annotations

import asyncio
import hashlib
import json
import math
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import yaml

from mlmesh.registry.v1 import registry_pb2 as pb
from mlmesh_cli.errors import CliError, rpc_failure, usage_error
from mlmesh_cli.mlflow import MlflowServer, RemoteFile, RemoteVersion, flavours
from mlmesh_cli.promoting import alias_of
from mlmesh_cli.publishing import progress_bars, read_signature, updating
from mlmesh_cli.terminal import Terminal
from mlmesh_cli.transfer import upload

if TYPE_CHECKING:
    from mlmesh.registry.v1.registry_pb2_grpc import ModelRegistryServiceAsyncStub

_MLMODEL = "MLmodel"
_MLMODEL_BYTES_MAX = 1 << 20
_BESIDE_BYTES_MAX = 1 << 24
_LABELS_MAX, _METRICS_MAX = 64, 256
_KEY_CHARS_MAX, _VALUE_CHARS_MAX, _TEXT_CHARS_MAX = 128, 4096, 65536
_PATH = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)*", re.ASCII)
_MODEL_ID = re.compile(r"[a-z0-9][a-z0-9-]{0,62}", re.ASCII)
_ALIAS_ID = re.compile(r"[a-z][a-z0-9-]{0,62}", re.ASCII)
# Loading any of these runs what is in it.
_PICKLES = (
    ".pkl",
    ".pickle",
    ".cloudpickle",
    ".joblib",
    ".dill",
    ".pt",
    ".pt2",
    ".pth",
    ".bin",
    ".ckpt",
    ".npy",
    ".npz",
)
_MEDIA_TYPES = {".onnx": "application/onnx", ".json": "application/json", ".txt": "text/plain"}
_DATATYPES = {
    "bool": "BOOL", "boolean": "BOOL",
    "uint8": "UINT8", "uint16": "UINT16", "uint32": "UINT32", "uint64": "UINT64",
    "int8": "INT8", "int16": "INT16", "int32": "INT32", "int64": "INT64", "integer": "INT32", "long": "INT64",
    "float16": "FP16", "float32": "FP32", "float64": "FP64", "float": "FP32", "double": "FP64",
    "str": "BYTES", "string": "BYTES", "binary": "BYTES", "object": "BYTES", "bytes": "BYTES",
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Import:
    """What is to be made of a version of MLflow's.

    Attributes:
        remote: the version there.
        model: id of the model here.
        version: without artifacts, whose bytes are not here yet.
        files: by the path that they will have here.
        aliases: to move to it.
        left_out: what is not taken over, and why.
        onnx: path of the ONNX file, empty where there is none.
    """

    remote: RemoteVersion
    model: str
    model_description: str
    model_labels: Mapping[str, str]
    version: pb.ModelVersion
    files: Mapping[str, RemoteFile]
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
    labels, no_labels = _labels(remote.tags)
    metrics, no_metrics = _metrics(remote.metrics)
    aliases, no_aliases = _aliases(remote.aliases)
    model_labels, no_model_labels = _labels(remote.model_tags)
    page = server.page_of(remote)
    if remote.run_id and len(labels) < _LABELS_MAX:
        labels["mlflow.run_id"] = remote.run_id
    version = pb.ModelVersion(
        signature=signature_of(mlmodel),
        metrics=metrics,
        labels=labels,
        description=remote.description[:_TEXT_CHARS_MAX],
        lineage=pb.Lineage(source_uri=page),
    )
    model_id = model or model_id_of(remote.name)
    return Import(
        remote=remote,
        model=model_id,
        model_description=remote.model_description[:_TEXT_CHARS_MAX],
        model_labels=model_labels,
        version=version,
        files={_path(file.path): file for file in chosen},
        aliases=aliases,
        left_out=(*left_out, *no_labels, *no_metrics, *no_aliases, *no_model_labels),
        onnx=onnx,
        request_id="mlflow-" + hashlib.sha256(json.dumps([page, model_id]).encode()).hexdigest(),
    )


def choose(mlmodel: Mapping[str, Any], files: Sequence[RemoteFile]) -> tuple[Sequence[RemoteFile], str, Sequence[str]]:
    """Files to take over, the path of the ONNX file among them ("" for none), and why others are left out.

    Raises:
        CliError: neither ONNX nor safetensors is among them; pickles are named.
    """
    by_path = {file.path: file for file in files}
    onnx = next((str(facts.get("data", "")) for name, facts in flavours(mlmodel) if name == "onnx"), "")
    if onnx and onnx not in by_path:
        raise CliError(f"the MLmodel file names {onnx!r}, which is not there", "log the model again in MLflow")
    wanted = {onnx} if onnx else {file.path for file in files if file.path.endswith(".safetensors")}
    if not wanted:
        names = ", ".join(name for name, _ in flavours(mlmodel)) or "none"
        pickles = ", ".join(file.path for file in files if _is_pickle(file.path))
        why = f"; {pickles} would run whatever is in it when it is loaded" if pickles else ""
        raise CliError(
            f"it has neither an ONNX nor a safetensors flavour (flavours: {names}){why}",
            "log it in MLflow with mlflow.onnx.log_model, then import that",
            reason="FORMAT_NOT_ALLOWED",
        )
    left_out = []
    for file in files:
        if file.path in wanted:
            continue
        if _is_pickle(file.path):
            left_out.append(f"{file.path}: a pickle, or may be one")
        elif file.path != _MLMODEL and not file.path.endswith((".json", ".txt")):
            left_out.append(f"{file.path}: not ONNX, safetensors, JSON or text")
        elif file.size_bytes > _BESIDE_BYTES_MAX:
            left_out.append(f"{file.path}: larger than {_BESIDE_BYTES_MAX} bytes")
        elif not file.size_bytes:
            left_out.append(f"{file.path}: empty")
        elif not _PATH.fullmatch(file.path):
            left_out.append(f"{file.path!a}: no name for a file here")
        else:
            wanted.add(file.path)
    return [by_path[path] for path in sorted(wanted)], onnx, left_out


def signature_of(mlmodel: Mapping[str, Any]) -> pb.ModelSignature:
    """Inputs and outputs as MLflow's signature tells them; what has no datatype here is left out."""
    found = mlmodel.get("signature")
    signature = pb.ModelSignature()
    if not isinstance(found, Mapping):
        return signature
    for side, into in (("inputs", signature.inputs), ("outputs", signature.outputs)):
        try:
            specs = json.loads(found.get(side) or "[]")
        except (ValueError, TypeError):
            continue
        for position, spec in enumerate(specs if isinstance(specs, list) else []):
            if isinstance(spec, dict) and (tensor := _tensor(spec, f"{side.removesuffix('s')}_{position}")) is not None:
                into.append(tensor)
    return signature


def _tensor(spec: Mapping[str, Any], default: str) -> pb.TensorSpec | None:
    """One entry of MLflow's signature: a tensor with its shape, or a column, which is a batch of values."""
    inner = spec.get("tensor-spec")
    kind = str(inner.get("dtype") if isinstance(inner, dict) else spec.get("type"))
    shape = inner.get("shape") if isinstance(inner, dict) else [-1]
    datatype = _DATATYPES.get(kind.removeprefix("<").removeprefix("|"))
    if datatype is None or not isinstance(shape, list) or not all(isinstance(d, int) and d >= -1 for d in shape):
        return None
    return pb.TensorSpec(name=str(spec.get("name") or default)[:256], datatype=datatype, shape=shape)


def model_id_of(name: str) -> str:
    """An id for a name of MLflow's: "My Model" becomes my-model. Raises CliError (exit code 2) when nothing is left."""
    made = _slug(name)
    if not _MODEL_ID.fullmatch(made):
        raise usage_error(f"{name!r} makes no model id", "name one with --as")
    return made


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
        for position, (path, file) in enumerate(sorted(wanted.files.items())):
            # Named by number: the server's names decide nothing on this disk.
            here = Path(name) / str(position)
            task = bars.add_task(f"fetching {path}", total=file.size_bytes)
            await asyncio.to_thread(server.download, wanted.remote, file, here, updating(bars, task))
            if file.path == wanted.onnx:
                version.signature.CopyFrom(await asyncio.to_thread(read_signature, here))
            task = bars.add_task(f"uploading {path}", total=file.size_bytes)
            blob = await upload(stub, here, updating(bars, task))
            here.unlink()
            version.artifacts.add(path=path, blob=blob.name, media_type=_MEDIA_TYPES.get(Path(path).suffix, ""))
    request = pb.CreateModelVersionRequest(
        parent=f"models/{wanted.model}", model_version=version, request_id=wanted.request_id
    )
    return (await stub.CreateModelVersion(request)).model_version


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
    if not any(file.path == _MLMODEL for file in files):
        raise CliError(
            f"{remote.name} version {remote.version} has no MLmodel file: it is no model of MLflow's",
            "import what mlflow's log_model made",
        )
    try:
        value = yaml.safe_load(server.read(remote, _MLMODEL, _MLMODEL_BYTES_MAX))
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise CliError("its MLmodel file is not YAML", "log the model again in MLflow")
    return value


def _path(path: str) -> str:
    if not _PATH.fullmatch(path) or len(path) > 255:
        raise CliError(f"{path!a} is no name for a file here", "log the model under another name in MLflow")
    return path


def _is_pickle(path: str) -> bool:
    return path.lower().endswith(_PICKLES)


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:63].strip("-")


def _labels(tags: Mapping[str, str]) -> tuple[dict[str, str], list[str]]:
    labels: dict[str, str] = {}
    left_out = []
    for key, value in tags.items():
        if key.startswith("mlflow."):
            # MLflow's own bookkeeping.
            continue
        if not key or len(key) > _KEY_CHARS_MAX or len(value) > _VALUE_CHARS_MAX or "\0" in key + value:
            left_out.append(f"tag {key[:40]!a}: too long for a label")
        elif len(labels) >= _LABELS_MAX:
            left_out.append(f"tag {key[:40]!a}: more than {_LABELS_MAX} labels")
        else:
            labels[key] = value
    return labels, left_out


def _metrics(found: Mapping[str, float]) -> tuple[dict[str, float], list[str]]:
    metrics: dict[str, float] = {}
    left_out = []
    for name, value in found.items():
        if not math.isfinite(value):
            left_out.append(f"metric {name[:40]!a}: {value} is no figure")
        elif not name or len(name) > _KEY_CHARS_MAX or len(metrics) >= _METRICS_MAX:
            left_out.append(f"metric {name[:40]!a}: its name is too long, or there are more than {_METRICS_MAX}")
        else:
            metrics[name] = value
    return metrics, left_out


def _aliases(found: Sequence[str]) -> tuple[tuple[str, ...], list[str]]:
    made = {alias: _slug(alias) for alias in found}
    left_out = [f"alias {alias!a}: makes no alias here" for alias, id_ in made.items() if not _ALIAS_ID.fullmatch(id_)]
    return tuple(sorted({id_ for id_ in made.values() if _ALIAS_ID.fullmatch(id_)})), left_out
