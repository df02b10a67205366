"""Sample models: made out of installed packages or of a trained version, and published."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING
from uuid import uuid4

import grpc

from mlmesh.registry.v1 import registry_pb2 as pb
from mlmesh_cli.errors import CliError, usage_error
from mlmesh_cli.names import parse_model
from mlmesh_cli.publishing import download_version, move_aliases, read_signature, upload_with_progress
from mlmesh_cli.sample_models import minilm, mnist, ocr, voice
from mlmesh_cli.sample_models.base import SampleModel
from mlmesh_cli.terminal import Terminal

if TYPE_CHECKING:
    from mlmesh.registry.v1.registry_pb2_grpc import ModelRegistryServiceAsyncStub

NAMES = ("minilm", "mnist-image", "ocr", "voice")
_MEDIA_TYPES = {
    ".onnx": "application/onnx",
    ".json": "application/json",
    ".pbtxt": "text/plain",
    ".txt": "text/plain",
    ".md": "text/markdown",
}
_NEEDED = ("model.onnx", "statistics.json", "labels.txt")


async def make(
    stub: ModelRegistryServiceAsyncStub, name: str, *, of: str, unary: bool, terminal: Terminal
) -> SampleModel:
    """A sample by its name. Raises CliError when it is unknown or something that it is made of is missing.

    Args:
        of: the trained version that mnist-image is made of; empty for the newest of mnist.
        unary: one answer where the sample would give several.
    """
    if name not in NAMES:
        raise usage_error(f"there is no sample {name!r}", f"choose one of {', '.join(NAMES)}")
    if of and name != "mnist-image":
        raise usage_error("--of is for mnist-image", "the other samples come whole in packages")
    if unary and name != "ocr":
        raise usage_error("--unary is for ocr", "the other samples give one answer anyway")
    if name == "mnist-image":
        return await _of_trained(stub, of or "mnist", terminal)
    if name == "ocr":
        return await asyncio.to_thread(ocr.build, unary=unary)
    return await asyncio.to_thread(minilm.build if name == "minilm" else voice.build)


async def _of_trained(stub: ModelRegistryServiceAsyncStub, of: str, terminal: Terminal) -> SampleModel:
    # What is read must outlive the folder that it came in.
    with tempfile.TemporaryDirectory(prefix="mlmesh-sample-") as folder:
        version, paths = await download_version(stub, parse_model(of), Path(folder), terminal)
        present = {path.name for path in paths}
        signature = version.signature
        if not present.issuperset(_NEEDED) or len(signature.inputs) != 1 or not signature.outputs:
            raise CliError(
                f"{version.name} is not a classifier of images that was trained here",
                "train one: `mlmesh train`",
                reason="NOT_IMAGES",
            )
        names = (signature.inputs[0].name, signature.outputs[0].name)
        made = mnist.build(Path(folder), version.name, names, labels=version.labels)
        files = {path: data if isinstance(data, bytes) else data.read_bytes() for path, data in made.files.items()}
    return SampleModel(
        description=made.description,
        card=made.card,
        files=files,
        inputs=made.inputs,
        outputs=made.outputs,
        labels=made.labels,
    )


async def publish(
    stub: ModelRegistryServiceAsyncStub, model: str, sample: SampleModel, *, aliases: Sequence[str], terminal: Terminal
) -> pb.ModelVersion:
    """Upload every file and publish a version; the model is made when it does not exist."""
    parent = f"models/{model}"
    try:
        created = pb.CreateModelRequest(model_id=model, description=sample.description, request_id=uuid4().hex)
        await stub.CreateModel(created)
    except grpc.aio.AioRpcError as error:
        if error.code() is not grpc.StatusCode.ALREADY_EXISTS:
            raise
    with tempfile.TemporaryDirectory(prefix="mlmesh-sample-") as folder:
        paths = await asyncio.to_thread(write, sample, Path(folder))
        artifacts = []
        for name, path in paths.items():
            blob = await upload_with_progress(stub, path, terminal)
            artifacts.append(pb.Artifact(path=name, blob=blob.name, media_type=_MEDIA_TYPES[path.suffix]))
        signature = _signature(sample)
        if not sample.inputs:
            signature = await asyncio.to_thread(read_signature, paths["model.onnx"])
    version = pb.ModelVersion(
        artifacts=artifacts, signature=signature, labels=dict(sample.labels), description=sample.description
    )
    request = pb.CreateModelVersionRequest(parent=parent, model_version=version, request_id=uuid4().hex)
    made = (await stub.CreateModelVersion(request)).model_version
    await move_aliases(stub, parent, made.name, aliases)
    return (await stub.GetModelVersion(pb.GetModelVersionRequest(name=made.name))).model_version


def write(sample: SampleModel, folder: Path) -> Mapping[str, Path]:
    """A sample's files, by their path in the version; those that lie in a package already stay where they are."""
    paths = {}
    for name, data in sample.files.items():
        path = data if isinstance(data, Path) else folder / name
        if isinstance(data, bytes):
            path.write_bytes(data)
        paths[name] = path
    return paths


def _signature(sample: SampleModel) -> pb.ModelSignature:
    def specs(tensors: Sequence[tuple[str, str, tuple[int, ...]]]) -> list[pb.TensorSpec]:
        return [pb.TensorSpec(name=name, datatype=datatype, shape=shape) for name, datatype, shape in tensors]

    return pb.ModelSignature(inputs=specs(sample.inputs), outputs=specs(sample.outputs))
