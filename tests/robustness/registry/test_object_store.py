"""Bytes in a real S3: the store goes away and comes back, registries die beside one another, buckets are mistaken."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import grpc
import pytest

from mlmesh.registry.v1 import registry_pb2 as pb
from mlmesh_runtime.errors import NotReady
from tests.support.registry import some_bytes
from tests.support.registry_process import Client, connected, pieces, refused, running
from tests.support.s3 import S3Server

DATA = some_bytes("object store", 10_000_000)
SMALL = some_bytes("small", 5000)


@pytest.fixture
def bucket(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> str:
    return s3.bucket(monkeypatch)


@pytest.fixture
def registry(s3: S3Server, bucket: str, tmp_path: Path) -> Iterator[str]:
    """A registry of this test's own; its address."""
    with running(tmp_path / "data", env={"MLMESH_REGISTRY_BLOBS_URL": bucket, **s3.env}) as (process, address):
        yield address
        assert process.popen.poll() is None


@pytest.fixture
async def client(registry: str) -> AsyncIterator[Client]:
    async with connected(registry) as opened:
        yield opened


async def test_a_store_that_goes_away_is_told_and_nothing_is_lost(client: Client, s3: S3Server) -> None:
    kept = await client.publish((await client.put(SMALL)).name) if await client.create_model() else None
    assert kept is not None
    upload = (await client.start(DATA)).upload
    committed = (await client.send(upload.name, pieces(DATA)[:9])).committed_bytes
    assert committed == 9 << 20
    s3.stop()
    try:
        for failing in (
            client.get(kept.artifacts[0].blob),
            client.send(upload.name, pieces(DATA, committed)),
            client.put(some_bytes("other", 1000)),
        ):
            async with refused(NotReady, "STORAGE_UNAVAILABLE"):
                await failing
        found = await client.stub.GetUpload(pb.GetUploadRequest(name=upload.name))
        assert found.upload.committed_bytes == committed
    finally:
        await asyncio.to_thread(s3.start)
    await client.send(upload.name, pieces(DATA, committed))
    blob = (await client.stub.FinishUpload(pb.FinishUploadRequest(name=upload.name))).blob
    assert await client.get(blob.name) == DATA
    assert await client.get(kept.artifacts[0].blob) == SMALL
    # That it was away said nothing of the bytes.
    version = await client.stub.GetModelVersion(pb.GetModelVersionRequest(name=kept.name))
    assert version.model_version.stage == pb.VERSION_STAGE_ACTIVE


async def test_another_bucket_is_no_reason_to_quarantine(
    client: Client, s3: S3Server, bucket: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    await client.create_model()
    version = await client.publish((await client.put(SMALL)).name)
    s3.make("empty")
    for other in ("s3://empty/prefix", "s3://nowhere/prefix"):
        folder = tmp_path / other.rpartition("//")[2].partition("/")[0]
        folder.mkdir()
        for path in (tmp_path / "data").glob("registry.sqlite*"):
            (folder / path.name).write_bytes(path.read_bytes())
        with running(folder, env={"MLMESH_REGISTRY_BLOBS_URL": other, **s3.env}) as (_, address):
            async with connected(address) as mistaken:
                async with refused(NotReady, "STORAGE_UNAVAILABLE"):
                    await mistaken.get(version.artifacts[0].blob)
                found = await mistaken.stub.GetModelVersion(pb.GetModelVersionRequest(name=version.name))
                assert found.model_version.stage == pb.VERSION_STAGE_ACTIVE


async def test_a_registry_dies_in_an_upload_and_another_goes_on(
    s3: S3Server, bucket: str, tmp_path: Path, shared_url: str
) -> None:
    env = {"MLMESH_REGISTRY_BLOBS_URL": bucket, "MLMESH_REGISTRY_DATABASE_URL": shared_url, **s3.env}
    with running(tmp_path / "one", env=env) as (one, first), running(tmp_path / "two", env=env) as (_, second):
        async with connected(first) as doomed, connected(second) as other:
            upload = (await doomed.start(DATA)).upload
            requests: asyncio.Queue[pb.UploadChunksRequest] = asyncio.Queue()

            async def endless() -> AsyncIterator[pb.UploadChunksRequest]:
                while True:
                    yield await requests.get()

            call = doomed.stub.UploadChunks(endless())
            for chunk in pieces(DATA)[:9]:
                requests.put_nowait(
                    pb.UploadChunksRequest(
                        upload=upload.name, offset=chunk.offset, data=chunk.data, crc32c=chunk.crc32c
                    )
                )
            committed = 0
            async with asyncio.timeout(60):
                while not committed:
                    found = await other.stub.GetUpload(pb.GetUploadRequest(name=upload.name))
                    committed = found.upload.committed_bytes
            one.popen.kill()
            with pytest.raises(grpc.aio.AioRpcError):
                await call
            found = await other.stub.GetUpload(pb.GetUploadRequest(name=upload.name))
            assert found.upload.committed_bytes >= committed >= 1 << 20
            await other.send(upload.name, pieces(DATA, found.upload.committed_bytes))
            blob = (await other.stub.FinishUpload(pb.FinishUploadRequest(name=upload.name))).blob
            assert await other.get(blob.name, 5, 3_000_000) == DATA[5:3_000_005]
        with running(tmp_path / "one", env=env) as (_, again):
            async with connected(again) as back:
                assert await back.get(blob.name) == DATA
