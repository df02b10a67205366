"""Registered data sets and sources of optimisations, from the registry: resolved to a version, fetched, verified."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path, PurePosixPath
from typing import Any, ParamSpec, TypeVar

import grpc

from mlmesh.registry.v1 import registry_pb2 as pb
from mlmesh.registry.v1.registry_pb2_grpc import ModelRegistryServiceStub
from mlmesh_runtime.channel import mesh_error
from mlmesh_runtime.chunks import VerifyingWriter, fsync_directory, sha256_of
from mlmesh_runtime.errors import Corrupt, InvalidInput, MeshError, NotFound, NotReady, WrongState
from mlmesh_runtime.executors import BoundedExecutor, run_blocking
from mlmesh_training.jobs import Job
from mlmesh_training.ports import DATASET_FOLDER, SOURCE_FOLDER, VERSION_FILE

DOWNLOAD_S = 3600.0
"""Longest time for one stream of bytes; what came by then stays, and the next one goes on from there."""

CUTS_MAX = 5
"""Streams cut in a row, without a byte in between, before a fetch is given up for this time."""
_NAMED_MAX = 10
_PAGES_MAX = 5

P = ParamSpec("P")
T = TypeVar("T")


class RegistryFetcher:
    """Fetches from mlmesh.registry.v1.ModelRegistryService; implements `mlmesh_training.ports.Fetcher`.

    Args:
        channel: to the registry.
        executor: threads that write files.
    """

    def __init__(self, channel: grpc.aio.Channel, *, executor: BoundedExecutor) -> None:
        self._stub: Any = ModelRegistryServiceStub(channel)
        self._executor = executor

    async def resolve_dataset(self, reference: str, *, kind: str = "") -> str:
        """The version that a registered data set means now.

        Args:
            reference: a version or an alias of a model of kind DATASET.
            kind: "IMAGE", "TEXT" or "TABULAR": what the recipe takes, empty for any; a version that
                says nothing of its kind passes.

        Errors: InvalidInput (UNKNOWN_DATASET), which says what there is; the registry's.
        """
        try:
            version = await self._version(reference)
            model = await self._model(version.name)
        except NotFound as error:
            raise _unknown(f"{error.message}; {await self._present()}") from error
        except InvalidInput as error:
            raise _unknown(f"{reference!r} names no version: {error.message}") from error
        if model.kind != pb.MODEL_KIND_DATASET:
            raise _unknown(f"{model.name} holds models, not data sets; {await self._present()}")
        if version.stage == pb.VERSION_STAGE_QUARANTINED:
            raise _unknown(
                f"{version.name} is quarantined{f': {version.stage_reason}' if version.stage_reason else ''}"
            )
        found = version.labels.get("kind", "")
        if kind and found and found.upper() != kind:
            raise _unknown(f"{version.name} holds {found} examples; the recipe takes {kind.lower()} ones")
        return str(version.name)

    async def resolve_source(self, reference: str) -> str:
        """The version that the source of an optimisation means now. Errors: InvalidInput, the registry's."""
        field = "spec.optimization.source"
        try:
            version = await self._version(reference)
            model = await self._model(version.name)
        except (NotFound, InvalidInput) as error:
            raise InvalidInput(error.message, field=field) from error
        if model.kind == pb.MODEL_KIND_DATASET:
            raise InvalidInput(f"{model.name} holds data sets, not models", field=field)
        if version.stage == pb.VERSION_STAGE_QUARANTINED:
            raise InvalidInput(f"{version.name} is quarantined", field=field)
        return str(version.name)

    async def fetch(self, job: Job, folder: Path) -> None:
        """Have the files of the job's data set and source in its folder, whole; see the port.

        Errors: MeshError, OSError.
        """
        wanted = {DATASET_FOLDER: job.resolved_dataset, SOURCE_FOLDER: job.resolved_source}
        for name, version in wanted.items():
            if version.startswith("models/"):
                await self._fetch_version(version, folder / name)

    async def _fetch_version(self, name: str, folder: Path) -> None:
        description = folder / VERSION_FILE
        if await run_blocking(self._executor, _described, description) == name:
            return
        version = await self._version(name)
        if version.stage == pb.VERSION_STAGE_QUARANTINED:
            raise WrongState(f"{name} is quarantined", reason="UNKNOWN_DATASET")
        for artifact in version.artifacts:
            await self._fetch_file(artifact, _inside(folder, artifact.path))
        document = {
            "version": name,
            "digest": version.digest,
            "labels": dict(version.labels),
            "files": [artifact.path for artifact in version.artifacts],
        }
        await run_blocking(self._executor, _write, description, json.dumps(document, sort_keys=True).encode())

    async def _fetch_file(self, artifact: pb.Artifact, path: Path) -> None:
        """One file, from where an earlier fetch was cut."""
        digest = artifact.blob.removeprefix("blobs/sha256-")
        if await run_blocking(self._executor, _holds, path, digest, artifact.size_bytes):
            return
        try:
            await self._fetch_rest(artifact, path, digest)
        except Corrupt as error:
            if error.reason != "DIGEST_MISMATCH":
                raise
            # What an earlier fetch left was changed on the disk; it is thrown away by now.
            await self._fetch_rest(artifact, path, digest)

    async def _fetch_rest(self, artifact: pb.Artifact, path: Path, digest: str) -> None:
        async with self._writer(path, digest, artifact.size_bytes) as writer:
            cuts = 0
            while writer.committed < artifact.size_bytes:
                before = writer.committed
                try:
                    await self._download(artifact.blob, writer)
                except NotReady:
                    cuts = 0 if writer.committed > before else cuts + 1
                    if cuts >= CUTS_MAX:
                        raise
            await self._whole(writer.finish)

    async def _download(self, blob: str, writer: VerifyingWriter) -> None:
        call = self._stub.DownloadBlob(pb.DownloadBlobRequest(name=blob, offset=writer.committed), timeout=DOWNLOAD_S)
        try:
            async for chunk in call:
                await self._whole(writer.write, chunk.offset, chunk.data, chunk.crc32c)
        except grpc.aio.AioRpcError as error:
            raise mesh_error(error) from error
        finally:
            call.cancel()

    @asynccontextmanager
    async def _writer(self, path: Path, digest: str, size: int) -> AsyncIterator[VerifyingWriter]:
        writer = await self._whole(VerifyingWriter, path, digest, size)
        try:
            yield writer
        finally:
            writer.close()

    async def _whole(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """Blocking work that has ended when this ends, also when this is cancelled: the file is closed after it."""
        work = asyncio.ensure_future(run_blocking(self._executor, fn, *args, **kwargs))
        try:
            return await asyncio.shield(work)
        except asyncio.CancelledError:
            await asyncio.wait([work])
            if not work.cancelled() and work.exception() is None and isinstance(made := work.result(), VerifyingWriter):
                made.close()
            raise

    async def _version(self, name: str) -> pb.ModelVersion:
        try:
            response: pb.GetModelVersionResponse = await self._stub.GetModelVersion(
                pb.GetModelVersionRequest(name=name)
            )
        except grpc.aio.AioRpcError as error:
            raise mesh_error(error) from error
        return response.model_version

    async def _model(self, version: str) -> pb.Model:
        name = version.partition("/versions/")[0]
        try:
            found: pb.Model = (await self._stub.GetModel(pb.GetModelRequest(name=name))).model
        except grpc.aio.AioRpcError as error:
            raise mesh_error(error) from error
        return found

    async def _present(self) -> str:
        """What data sets the registry has, for a person."""
        found: list[str] = []
        request = pb.ListModelsRequest(page_size=1000)
        try:
            for _ in range(_PAGES_MAX):
                page = await self._stub.ListModels(request)
                found += [model.name for model in page.models if model.kind == pb.MODEL_KIND_DATASET]
                request.page_token = page.next_page_token
                if not request.page_token or len(found) > _NAMED_MAX:
                    break
        except grpc.aio.AioRpcError as error:
            raise mesh_error(error) from error
        if not found:
            return "no data set is registered"
        more = ", …" if len(found) > _NAMED_MAX else ""
        return f"registered are {', '.join(found[:_NAMED_MAX])}{more}"


def _unknown(message: str) -> MeshError:
    return InvalidInput(message, field="spec.dataset", reason="UNKNOWN_DATASET")


def _inside(folder: Path, name: str) -> Path:
    """A file's place. Errors: InvalidInput for a path that would leave the folder."""
    parts = PurePosixPath(name)
    if parts.is_absolute() or ".." in parts.parts or not parts.parts:
        raise InvalidInput(
            f"the version has a file called {name!r}, which would leave its folder", field="spec.dataset"
        )
    return folder.joinpath(*parts.parts)


def _described(path: Path) -> str:
    """The version whose files are here whole; empty when none are."""
    try:
        return str(json.loads(path.read_bytes())["version"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def _holds(path: Path, digest: str, size: int) -> bool:
    return path.is_file() and sha256_of(path) == (digest, size)


def _write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".part")
    partial.write_bytes(data)
    partial.replace(path)
    fsync_directory(path.parent)
