"""Compiled engines shared through the registry, between processes that hold one key.

An engine of model NAME is a version of the model NAME-engines: one file, `engine.safetensors`, whose only tensor holds
the bytes of the engine's file, sealed by the fleet's key. Labels say what it was compiled for, the lineage which
version it was made from. The registry stores it as it stores weights, and nobody who lacks the key takes it for
anything else.

Whoever may write to the registry may offer an engine; only one whose MAC holds under the fleet's key is taken. Offering
is off by default, and the mesh's policy lets inference write nothing until it is opened on purpose.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import AsyncIterator, Callable
from typing import Any, Final

import grpc

from mlmesh.registry.v1 import registry_pb2 as pb
from mlmesh.registry.v1 import registry_pb2_grpc as stubs
from mlmesh_inference.engine_cache import NotBelieved, Plan, PlanKey, opened, sealed
from mlmesh_runtime.channel import mesh_error
from mlmesh_runtime.chunks import CHUNK_BYTES, crc32c
from mlmesh_runtime.errors import AlreadyExists, Corrupt, MeshError, NotFound
from mlmesh_runtime.executors import BoundedExecutor, run_blocking

_LOG = logging.getLogger(__name__)

FILE: Final = "engine.safetensors"
SUFFIX: Final = "-engines"
KIND_LABEL: Final = "mlmesh-kind"
"""Label of a model whose versions are something else than models."""
KIND: Final = "engines"
TRANSFER_S: Final = 600.0
_NAME_CHARS_MAX: Final = 63
_CANDIDATES_MAX: Final = 8
_LENGTH_BYTES: Final = 8
_HEADER_BYTES_MAX: Final = 4096


class SharedEngines:
    """Engines of the fleet in the registry.

    Args:
        channel: to the registry. key: the fleet's. cpu: executor for sealing and opening.
        offers: whether what was built here is uploaded. bytes_max: a larger file is not fetched.
        refused: is told of every file that was not believed, with the reason.
    """

    def __init__(
        self,
        channel: grpc.aio.Channel,
        key: bytes,
        cpu: BoundedExecutor,
        *,
        offers: bool,
        bytes_max: int,
        refused: Callable[[str], None] = lambda _reason: None,
    ) -> None:
        self._stub: Any = stubs.ModelRegistryServiceStub(channel)
        self._key = key
        self._cpu = cpu
        self._bytes_max = bytes_max
        self._refused = refused
        self.offers = offers

    async def fetch(self, model: str, key: PlanKey) -> Plan | None:
        """The fleet's engine for a key; None when it has none, or none that can be believed, or does not answer."""
        try:
            for version in await self._candidates(model, key):
                plan = await self._opened(version, key)
                if plan is not None:
                    return plan
        except NotFound:
            return None
        except MeshError as error:
            _LOG.warning("shared engines cannot be read", extra={"model": model, "error": error.message})
        return None

    async def offer(self, model: str, version: int, plan: Plan) -> None:
        """Upload an engine that was built here, unless the fleet has one. Failing is no error of the build."""
        if not self.offers or len(model) + len(SUFFIX) > _NAME_CHARS_MAX:
            return
        try:
            await self._create_model(model)
            if not await self._candidates(model, plan.key):
                data = await run_blocking(self._cpu, _wrapped, plan, self._key)
                await self._publish(model, version, plan, data)
        except MeshError as error:
            _LOG.warning("an engine cannot be shared", extra={"model": model, "error": error.message})

    async def _candidates(self, model: str, key: PlanKey) -> list[pb.ModelVersion]:
        request = pb.ListModelVersionsRequest(
            parent=f"models/{model}{SUFFIX}",
            filter=f'labels.engine-key = "{key.digest}"',
            page_size=_CANDIDATES_MAX,
        )
        try:
            return list((await self._stub.ListModelVersions(request)).model_versions)
        except grpc.aio.AioRpcError as error:
            raise mesh_error(error) from error

    async def _opened(self, version: pb.ModelVersion, key: PlanKey) -> Plan | None:
        try:
            artifact = next((each for each in version.artifacts if each.path == FILE), None)
            if artifact is None or artifact.size_bytes > self._bytes_max:
                raise NotBelieved(f"it has no {FILE} of at most {self._bytes_max} bytes")
            data = await self._download(artifact)
            return await run_blocking(self._cpu, _unwrapped, data, self._key, key)
        except (NotBelieved, Corrupt) as error:
            _LOG.warning("a shared engine is not believed", extra={"version": version.name, "why": str(error)})
            self._refused(str(error))
            return None

    async def _download(self, artifact: pb.Artifact) -> bytes:
        data = bytearray()
        call = self._stub.DownloadBlob(pb.DownloadBlobRequest(name=artifact.blob), timeout=TRANSFER_S)
        try:
            async for message in call:
                if message.offset != len(data) or len(data) + len(message.data) > artifact.size_bytes:
                    raise NotBelieved("the registry sent other bytes than it announced")
                data += message.data
        except grpc.aio.AioRpcError as error:
            raise mesh_error(error) from error
        finally:
            call.cancel()
        if len(data) != artifact.size_bytes:
            raise NotBelieved("the registry sent fewer bytes than it announced")
        return bytes(data)

    async def _create_model(self, model: str) -> None:
        request = pb.CreateModelRequest(
            model_id=f"{model}{SUFFIX}",
            description=f"Compiled engines of {model}; each belongs to one library, version and GPU.",
            labels={KIND_LABEL: KIND},
        )
        try:
            await self._stub.CreateModel(request)
        except grpc.aio.AioRpcError as error:
            failure = mesh_error(error)
            if not isinstance(failure, AlreadyExists):
                raise failure from error

    async def _publish(self, model: str, version: int, plan: Plan, data: bytes) -> None:
        digest = hashlib.sha256(data).hexdigest()
        key = plan.key
        request = pb.CreateModelVersionRequest(
            parent=f"models/{model}{SUFFIX}",
            request_id=f"{model}/{digest[:48]}",
            model_version=pb.ModelVersion(
                artifacts=[pb.Artifact(path=FILE, blob=f"blobs/sha256-{digest}")],
                labels={
                    "engine-key": key.digest,
                    "engine-flavour": key.flavour,
                    "engine-version": key.version,
                    "engine-target": key.target,
                    "engine-profiles": key.profiles,
                    "engine-precisions": "+".join(plan.facts.precisions),
                },
                lineage=pb.Lineage(parents=[f"models/{model}/versions/{version}"]),
                description=f"{key.flavour} {key.version} for {key.target}",
            ),
        )
        try:
            await self._upload(data, digest)
            await self._stub.CreateModelVersion(request)
        except grpc.aio.AioRpcError as error:
            raise mesh_error(error) from error

    async def _upload(self, data: bytes, digest: str) -> None:
        request = pb.StartUploadRequest(size_bytes=len(data), sha256=digest, request_id=f"upload-{digest}")
        started = await self._stub.StartUpload(request)
        if started.HasField("blob"):
            return
        upload = started.upload
        if upload.committed_bytes < len(data):
            await self._stub.UploadChunks(_chunks(data, upload.name, upload.committed_bytes), timeout=TRANSFER_S)
        await self._stub.FinishUpload(pb.FinishUploadRequest(name=upload.name), timeout=TRANSFER_S)


async def _chunks(data: bytes, upload: str, start: int) -> AsyncIterator[pb.UploadChunksRequest]:
    for offset in range(start, len(data), CHUNK_BYTES):
        piece = data[offset : offset + CHUNK_BYTES]
        yield pb.UploadChunksRequest(upload=upload, offset=offset, data=piece, crc32c=crc32c(piece))


def _wrapped(plan: Plan, key: bytes) -> bytes:
    """A safetensors file with the sealed engine as its one tensor."""
    inside = sealed(plan, key)
    header = json.dumps({"engine": {"dtype": "U8", "shape": [len(inside)], "data_offsets": [0, len(inside)]}}).encode()
    header += b" " * (-len(header) % 8)
    return b"".join((len(header).to_bytes(_LENGTH_BYTES, "little"), header, inside))


def _unwrapped(data: bytes, key: bytes, wanted: PlanKey) -> Plan:
    """The engine inside. The MAC is over all but the wrapping, which only says how long it is. Raises NotBelieved."""
    size = int.from_bytes(data[:_LENGTH_BYTES], "little")
    if size > _HEADER_BYTES_MAX or len(data) < _LENGTH_BYTES + size:
        raise NotBelieved("it is not wrapped as engines are")
    return opened(data[_LENGTH_BYTES + size :], key, wanted, source="registry")
