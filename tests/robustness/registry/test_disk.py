"""A full disk: refused with its reason, nothing half visible, reads go on, and it works again when there is room."""

from __future__ import annotations

import contextlib
import resource
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from mlmesh.registry.v1 import registry_pb2 as pb
from mlmesh_runtime.errors import Overloaded
from tests.support.registry import some_bytes
from tests.support.registry_process import Client, connected, pieces, refused, running

KIB = 1024
SMALL = some_bytes(1, 100 * KIB)
WORDS = "x" * 2000
LARGE = some_bytes(2, 3000 * KIB)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)]
    try:
        mounted = subprocess.run(mount, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        mounted = False
    if not mounted:
        pytest.skip("a small file system needs the right to mount one")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def _fill(folder: Path) -> Path:
    """A file that takes all the room there is."""
    ballast = folder / "ballast"
    with ballast.open("ab", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4 * KIB))
    return ballast


async def test_no_room_for_an_upload_and_then_room_again(small_disk: Path) -> None:
    with running(small_disk / "data", env={"MLMESH_REGISTRY_COMMIT_BYTES": "100000"}) as (process, address):
        async with connected(address) as client:
            await client.create_model()
            kept = await client.publish((await client.put(SMALL)).name)
            ballast = small_disk / "ballast"
            ballast.write_bytes(bytes(1000 * KIB))
            upload = (await client.start(LARGE)).upload
            async with refused(Overloaded, "DISK_FULL"):
                await client.send(upload.name, pieces(LARGE, chunk_bytes=200 * KIB))
            await _still_reads(client, kept)
            ballast.unlink()
            found = (await client.stub.GetUpload(pb.GetUploadRequest(name=upload.name))).upload
            assert 0 < found.committed_bytes < len(LARGE)
            await client.send(upload.name, pieces(LARGE, found.committed_bytes))
            blob = (await client.stub.FinishUpload(pb.FinishUploadRequest(name=upload.name))).blob
            assert await client.get(blob.name) == LARGE
        assert process.popen.poll() is None


async def test_no_room_for_a_change_and_then_room_again(small_disk: Path) -> None:
    with running(small_disk / "data") as (_, address):
        async with connected(address) as client:
            await client.create_model()
            kept = await client.publish((await client.put(SMALL)).name)
            upload = (await client.start(b"one more")).upload
            await client.send(upload.name, pieces(b"one more"))
            ballast = _fill(small_disk)
            count = await _publish_until_full(client, kept)
            async with refused(Overloaded, "DISK_FULL"):
                await client.create_model("another")
            await _still_reads(client, kept)
            ballast.unlink()
            # The refused request again: now it is done, with the next number and no hole.
            published = await client.publish(kept.artifacts[0].blob, description=WORDS, request_id=str(count))
            assert published.name == f"models/m/versions/{count + 2}"
            blob = (await client.stub.FinishUpload(pb.FinishUploadRequest(name=upload.name))).blob
            assert await client.get(blob.name) == b"one more"


async def test_a_limit_on_file_size_is_a_full_disk_too(tmp_path: Path) -> None:
    with running(tmp_path / "data") as (process, address):
        async with connected(address) as client:
            kept = await client.put(SMALL)
            upload = (await client.start(LARGE)).upload
            unlimited = resource.RLIM_INFINITY
            # Everything but the upload stays below it: the database is small yet.
            resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (2000 * KIB, unlimited))
            async with refused(Overloaded, "DISK_FULL"):
                await client.send(upload.name, pieces(LARGE))
            assert await client.get(kept.name) == SMALL
            resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (unlimited, unlimited))
            found = (await client.stub.GetUpload(pb.GetUploadRequest(name=upload.name))).upload
            await client.send(upload.name, pieces(LARGE, found.committed_bytes))
            blob = (await client.stub.FinishUpload(pb.FinishUploadRequest(name=upload.name))).blob
            assert await client.get(blob.name) == LARGE


async def _publish_until_full(client: Client, like: pb.ModelVersion) -> int:
    """Publish with request ids 0, 1, ... until one is refused; its number."""
    count = 0
    async with refused(Overloaded, "DISK_FULL"):
        while True:
            await client.publish(like.artifacts[0].blob, description=WORDS, request_id=str(count))
            count += 1
    return count


async def _still_reads(client: Client, version: pb.ModelVersion) -> None:
    found = await client.stub.GetModelVersion(pb.GetModelVersionRequest(name=version.name))
    assert found.model_version == version
    assert await client.get(version.artifacts[0].blob) == SMALL
