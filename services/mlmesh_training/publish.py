"""Publishing to the model registry: files, version, aliases. Each step may be repeated after any crash.

Request ids derive from the job, so the registry answers a repeated step as it did the first time: a job publishes one
version, however often it tries.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from pathlib import Path

import grpc

from mlmesh.registry.v1 import registry_pb2 as pb
from mlmesh.registry.v1.registry_pb2_grpc import ModelRegistryServiceStub
from mlmesh_runtime.channel import mesh_error
from mlmesh_runtime.chunks import read_chunks
from mlmesh_runtime.errors import AlreadyExists, Conflict, Corrupt, MeshError, NotFound
from mlmesh_runtime.executors import BoundedExecutor, run_blocking
from mlmesh_training.jobs import Evaluation, File, Job, Tensor

UPLOAD_S = 600.0
"""Longest time for one file."""
_ALIAS_TRIES = 10


class RegistryPublisher:
    """Publishes to mlmesh.registry.v1.ModelRegistryService.

    Args:
        channel: to the registry.
        folder: the folder in which a job's files are, by uid.
        executor: threads that read them.

    Errors of all methods: the registry's, as MeshError.
    """

    def __init__(self, channel: grpc.aio.Channel, *, folder: Callable[[str], Path], executor: BoundedExecutor) -> None:
        self._stub = ModelRegistryServiceStub(channel)
        self._folder = folder
        self._executor = executor
        # How often a file's upload was lost and had to be started anew; part of its request id.
        self._lost: dict[tuple[str, str], int] = {}

    async def upload(self, job: Job) -> None:
        """Make sure that the model exists and the files' bytes are there."""
        publication, trained = job.spec.publication, job.trained
        if publication is None or trained is None:
            raise ValueError(f"{job.name} has nothing to publish")
        await self._create_model(job, publication.model.removeprefix("models/"))
        for file in trained.files:
            await self._upload_file(job, file)

    async def register(self, job: Job) -> str:
        """Create the version and return its name."""
        request = version_request(job)
        try:
            response = await self._stub.CreateModelVersion(request)
        except grpc.aio.AioRpcError as error:
            raise mesh_error(error) from error
        return str(response.model_version.name)

    async def point(self, job: Job) -> None:
        """Move each alias by compare-and-set. One that points at a newer version already stays there."""
        publication = job.spec.publication
        for alias in publication.aliases if publication else ():
            await self._point(f"{job.model_version.partition('/versions/')[0]}/aliases/{alias}", job.model_version)

    async def _create_model(self, job: Job, model: str) -> None:
        request = pb.CreateModelRequest(model_id=model, request_id=f"{job.uid}/model")
        try:
            await self._stub.CreateModel(request)
        except grpc.aio.AioRpcError as error:
            failure = mesh_error(error)
            if not isinstance(failure, AlreadyExists):
                raise failure from error

    async def _upload_file(self, job: Job, file: File) -> None:
        key = (job.uid, file.path)
        request = pb.StartUploadRequest(
            size_bytes=file.size_bytes,
            sha256=file.sha256,
            request_id=f"{job.uid}/{file.sha256[:32]}/{self._lost.get(key, 0)}",
        )
        try:
            started = await self._stub.StartUpload(request)
            if started.HasField("blob"):
                return
            upload = started.upload
            if upload.committed_bytes < file.size_bytes:
                chunks = self._chunks(self._folder(job.uid) / file.path, upload.name, upload.committed_bytes)
                await self._stub.UploadChunks(chunks, timeout=UPLOAD_S)
            await self._stub.FinishUpload(pb.FinishUploadRequest(name=upload.name), timeout=UPLOAD_S)
        except grpc.aio.AioRpcError as error:
            failure = mesh_error(error)
            if isinstance(failure, NotFound | Corrupt):
                self._lost[key] = self._lost.get(key, 0) + 1
            raise failure from error
        self._lost.pop(key, None)

    async def _chunks(self, path: Path, upload: str, offset: int) -> AsyncIterator[pb.UploadChunksRequest]:
        chunks = read_chunks(path, offset=offset)
        while chunk := await run_blocking(self._executor, next, chunks, None):
            yield pb.UploadChunksRequest(upload=upload, offset=chunk.offset, data=chunk.data, crc32c=chunk.crc32c)

    async def _point(self, name: str, version: str) -> None:
        for _ in range(_ALIAS_TRIES):
            try:
                present = await self._alias(name)
                if present and _number(present.version) >= _number(version):
                    return
                etag = present.etag if present else ""
                await self._stub.SetModelAlias(pb.SetModelAliasRequest(name=name, version=version, etag=etag))
            except grpc.aio.AioRpcError as error:
                failure = mesh_error(error)
                if not isinstance(failure, Conflict):
                    raise failure from error
            else:
                return
        raise MeshError(f"{name} moves too fast to be set", reason="ETAG_MISMATCH")

    async def _alias(self, name: str) -> pb.ModelAlias | None:
        request = pb.ListModelAliasesRequest(parent=name.partition("/aliases/")[0], page_size=1000)
        while True:
            page = await self._stub.ListModelAliases(request)
            for alias in page.aliases:
                if alias.name == name:
                    return alias
            if not page.next_page_token:
                return None
            request.page_token = page.next_page_token


def version_request(job: Job) -> pb.CreateModelVersionRequest:
    """The version of a trained job. The same job always gives the same request."""
    publication, trained = job.spec.publication, job.trained
    if publication is None or trained is None:
        raise ValueError(f"{job.name} has nothing to publish")
    dataset = job.resolved_dataset or job.spec.dataset
    return pb.CreateModelVersionRequest(
        parent=publication.model,
        request_id=f"{job.uid}/version" + (f"/{job.generation}" if job.generation else ""),
        model_version=pb.ModelVersion(
            artifacts=[
                pb.Artifact(path=file.path, blob=f"blobs/sha256-{file.sha256}", media_type=file.media_type)
                for file in trained.files
            ],
            signature=pb.ModelSignature(inputs=map(_spec, trained.inputs), outputs=map(_spec, trained.outputs)),
            metrics={**metrics(trained.evaluation), **trained.metrics},
            labels=dict(trained.labels),
            lineage=pb.Lineage(
                job=job.name,
                dataset=dataset,
                parents=[version for version in (dataset, job.resolved_source) if version.startswith("models/")],
                dataset_fingerprint=trained.dataset_fingerprint,
                code_digest=trained.code_digest,
                environment_digest=trained.environment_digest,
                study=job.study,
            ),
            description=publication.description,
        ),
    )


def metrics(evaluation: Evaluation) -> dict[str, float]:
    """The figures of a version, by the names that gates and searches use. Times are milliseconds."""
    found = {
        "loss": evaluation.loss,
        "examples": float(evaluation.examples),
        "export_max_abs_diff": evaluation.export_max_abs_diff,
    }
    if (errors := evaluation.regression) is not None:
        found |= {
            "mean_absolute_error": errors.mean_absolute_error,
            "root_mean_squared_error": errors.root_mean_squared_error,
            "r2": errors.r2,
        }
    else:
        found |= {
            "accuracy": evaluation.accuracy,
            "precision_macro": evaluation.precision,
            "recall_macro": evaluation.recall,
            "f1_macro": evaluation.f1,
        }
    if (calibration := evaluation.calibration) is not None:
        found |= {
            "expected_calibration_error": calibration.expected_error,
            "max_calibration_error": calibration.max_error,
            "brier": calibration.brier,
        }
    for each in evaluation.latency:
        found[f"latency_ms_batch_{each.batch_size}"] = each.median_s * 1e3
        found[f"latency_p95_ms_batch_{each.batch_size}"] = each.p95_s * 1e3
    return found


def _spec(tensor: Tensor) -> pb.TensorSpec:
    return pb.TensorSpec(name=tensor.name, datatype=tensor.datatype, shape=tensor.shape)


def _number(version: str) -> int:
    return int(version.rpartition("/")[2])
