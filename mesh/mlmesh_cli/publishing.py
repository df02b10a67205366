"""Publishing an ONNX file as a version, and fetching a version's files."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import grpc
from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn, TransferSpeedColumn

from mlmesh.registry.v1 import registry_pb2 as pb
from mlmesh_cli.errors import CliError, usage_error
from mlmesh_cli.names import ModelReference, parse_pairs
from mlmesh_cli.terminal import Terminal
from mlmesh_cli.transfer import download, upload

if TYPE_CHECKING:
    from mlmesh.registry.v1.registry_pb2_grpc import ModelRegistryServiceAsyncStub


# onnx.TensorProto.DataType → Open Inference Protocol.
_DATATYPES = {
    1: "FP32",
    2: "UINT8",
    3: "INT8",
    4: "UINT16",
    5: "INT16",
    6: "INT32",
    7: "INT64",
    8: "BYTES",
    9: "BOOL",
    10: "FP16",
    11: "FP64",
    12: "UINT32",
    13: "UINT64",
    16: "BF16",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Publication:
    """A file to publish and what to say of it."""

    model: str
    file: Path
    aliases: tuple[str, ...]
    metrics: Mapping[str, float]
    labels: Mapping[str, str]
    description: str

    @classmethod
    def from_options(
        cls, model: str, file: Path, *, aliases: list[str], metrics: list[str], labels: list[str], description: str
    ) -> Publication:
        """From what a person typed. Raises CliError (exit code 2)."""
        figures = {}
        for name, value in parse_pairs(metrics, "--metric").items():
            try:
                figures[name] = float(value)
            except ValueError:
                raise usage_error(f"--metric {name} wants a number, not {value!r}", "such as accuracy=0.98") from None
        return cls(
            model=model,
            file=file,
            aliases=tuple(aliases),
            metrics=figures,
            labels=parse_pairs(labels, "--label"),
            description=description,
        )


def read_signature(path: Path) -> pb.ModelSignature:
    """Inputs and outputs of an ONNX file, weights not loaded. Raises CliError when it is not one."""
    try:
        onnx = import_module("onnx")
    except ImportError:
        raise CliError(
            "reading an ONNX file needs the onnx package", "pip install 'mlmesh[training]'", reason="NOT_INSTALLED"
        ) from None
    try:
        graph = onnx.load(str(path), load_external_data=False).graph
    except Exception as error:
        raise CliError(
            f"{path} is not an ONNX file: {error}", "export the model to ONNX first", reason="NOT_ONNX"
        ) from None
    weights = {initializer.name for initializer in graph.initializer}
    signature = pb.ModelSignature()
    signature.inputs.extend(_tensor(value) for value in graph.input if value.name not in weights)
    signature.outputs.extend(_tensor(value) for value in graph.output)
    if not signature.inputs or not signature.outputs:
        raise CliError(f"{path} has no inputs or no outputs", "export the model to ONNX first", reason="NOT_ONNX")
    return signature


def _tensor(value: Any) -> pb.TensorSpec:
    kind = value.type.tensor_type
    shape = [d.dim_value if d.HasField("dim_value") else -1 for d in kind.shape.dim]
    return pb.TensorSpec(name=value.name, datatype=_DATATYPES.get(kind.elem_type, "FP32"), shape=shape)


def progress_bars(terminal: Terminal) -> Progress:
    """Bars for transfers, on standard error where the output is JSON; gone when they end."""
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(binary_units=True), TransferSpeedColumn())
    return Progress(*columns, console=terminal.err if terminal.json else terminal.out, transient=True)


async def publish_file(stub: ModelRegistryServiceAsyncStub, wanted: Publication, terminal: Terminal) -> pb.ModelVersion:
    """Uploads the file, publishes the version and moves the aliases. Retry-safe up to the alias moves."""
    signature = await asyncio.to_thread(read_signature, wanted.file)
    parent = f"models/{wanted.model}"
    try:
        await stub.CreateModel(pb.CreateModelRequest(model_id=wanted.model, request_id=uuid4().hex))
    except grpc.aio.AioRpcError as error:
        if error.code() is not grpc.StatusCode.ALREADY_EXISTS:
            raise
    blob = await upload_with_progress(stub, wanted.file, terminal)
    version = pb.ModelVersion(
        artifacts=[pb.Artifact(path="model.onnx", blob=blob.name, media_type="application/onnx")],
        signature=signature,
        metrics=dict(wanted.metrics),
        labels=dict(wanted.labels),
        description=wanted.description,
    )
    request = pb.CreateModelVersionRequest(parent=parent, model_version=version, request_id=uuid4().hex)
    created = (await stub.CreateModelVersion(request)).model_version
    await move_aliases(stub, parent, created.name, wanted.aliases)
    return (await stub.GetModelVersion(pb.GetModelVersionRequest(name=created.name))).model_version


async def upload_with_progress(stub: ModelRegistryServiceAsyncStub, file: Path, terminal: Terminal) -> pb.Blob:
    """Uploads a file unless the registry has its bytes already, and shows how far it is."""
    size = (await asyncio.to_thread(file.stat)).st_size
    with progress_bars(terminal) as progress:
        task = progress.add_task(f"uploading {file.name}", total=size)
        return await upload(stub, file, updating(progress, task))


async def move_aliases(stub: ModelRegistryServiceAsyncStub, parent: str, version: str, aliases: Sequence[str]) -> None:
    """Moves aliases to a version, each by compare-and-set."""
    if not aliases:
        return
    present = await stub.ListModelAliases(pb.ListModelAliasesRequest(parent=parent, page_size=1000))
    etags = {alias.name: alias.etag for alias in present.aliases}
    for alias in aliases:
        name = f"{parent}/aliases/{alias}"
        await stub.SetModelAlias(pb.SetModelAliasRequest(name=name, version=version, etag=etags.get(name, "")))


def _inside(folder: Path, name: str) -> Path:
    # The registry only has relative paths; a hostile one must still not leave the folder.
    path = (folder / name).resolve()
    if not path.is_relative_to(folder.resolve()):
        raise CliError(f"the registry names a file outside of the folder: {name!r}", reason="BAD_PATH")
    return path


def updating(progress: Progress, task: TaskID) -> Callable[[int, int], None]:
    """A function that moves a bar to so many bytes of so many."""
    return lambda done, total: progress.update(task, completed=done, total=total)


async def download_version(
    stub: ModelRegistryServiceAsyncStub, reference: ModelReference, folder: Path, terminal: Terminal
) -> tuple[pb.ModelVersion, list[Path]]:
    """Fetches every file of a version (the newest where none is named) into a folder."""
    name = reference.version_name
    if not name:
        listed = await stub.ListModelVersions(pb.ListModelVersionsRequest(parent=reference.parent, page_size=1))
        if not listed.model_versions:
            raise CliError(
                f"{reference.model} has no versions yet", "`mlmesh train` makes one", reason="MODEL_VERSION_NOT_FOUND"
            )
        name = listed.model_versions[0].name
    version = (await stub.GetModelVersion(pb.GetModelVersionRequest(name=name))).model_version
    paths = []
    with progress_bars(terminal) as progress:
        for artifact in version.artifacts:
            path = _inside(folder, artifact.path)
            task = progress.add_task(artifact.path, total=artifact.size_bytes)
            await download(stub, artifact, path, updating(progress, task))
            paths.append(path)
    return version, paths
