from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from mlmesh.registry.v1 import registry_pb2 as pb
from mlmesh.registry.v1 import registry_pb2_grpc
from mlmesh_cli import transfer
from mlmesh_cli.errors import CliError
from mlmesh_cli.publishing import _inside, read_signature
from mlmesh_runtime.chunks import crc32c
from mlmesh_runtime.errors import Corrupt
from tests.unit.cli.conftest import FakeMesh, abort

_BYTES = bytes(range(256)) * 4096 * 3  # three chunks
_SHA = hashlib.sha256(_BYTES).hexdigest()


class Registry:
    """Keeps an upload's bytes; cuts every stream after so many chunks while `cuts` are left."""

    def __init__(self, mesh: FakeMesh, *, cuts: int = 0, known: bool = False) -> None:
        self.bytes = b""
        self.cuts = cuts
        self._known = known
        for method in ("StartUpload", "UploadChunks", "GetUpload", "FinishUpload", "DownloadBlob"):
            mesh.registry[method] = getattr(self, method)

    def StartUpload(self, request: pb.StartUploadRequest, _context: Any) -> pb.StartUploadResponse:
        if self._known:
            return pb.StartUploadResponse(blob=pb.Blob(name=f"blobs/sha256-{request.sha256}"))
        return pb.StartUploadResponse(upload=self._upload())

    def _upload(self) -> pb.Upload:
        return pb.Upload(name="uploads/1", size_bytes=len(_BYTES), committed_bytes=len(self.bytes))

    def UploadChunks(self, requests: Iterator[pb.UploadChunksRequest], context: Any) -> pb.UploadChunksResponse:
        for request in requests:
            assert request.offset == len(self.bytes)
            assert request.crc32c == crc32c(request.data)
            self.bytes += request.data
            self._maybe_cut(context)
        return pb.UploadChunksResponse(upload=self._upload())

    def _maybe_cut(self, context: Any) -> None:
        if self.cuts:
            self.cuts -= 1
            abort(context, grpc.StatusCode.UNAVAILABLE, "cut")

    def GetUpload(self, _request: Any, _context: Any) -> pb.GetUploadResponse:
        return pb.GetUploadResponse(upload=self._upload())

    def FinishUpload(self, _request: Any, _context: Any) -> pb.FinishUploadResponse:
        digest = hashlib.sha256(self.bytes).hexdigest()
        return pb.FinishUploadResponse(blob=pb.Blob(name=f"blobs/sha256-{digest}"))

    def DownloadBlob(self, request: pb.DownloadBlobRequest, context: Any) -> Iterator[pb.DownloadBlobResponse]:
        for offset in range(request.offset, len(_BYTES), 1 << 20):
            data = _BYTES[offset : offset + (1 << 20)]
            yield pb.DownloadBlobResponse(offset=offset, data=data, crc32c=crc32c(data))
            self._maybe_cut(context)


@pytest.fixture(autouse=True)
def _no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "_PAUSE_S", 0)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A file of three chunks."""
    path = tmp_path / "model.onnx"
    path.write_bytes(_BYTES)
    return path


async def _upload(mesh: FakeMesh, source: Path) -> tuple[pb.Blob, list[int]]:
    done: list[int] = []
    async with grpc.aio.insecure_channel(mesh.environ["MLMESH_REGISTRY_TARGET"]) as channel:
        stub = registry_pb2_grpc.ModelRegistryServiceStub(channel)
        return await transfer.upload(stub, source, lambda now, _all: done.append(now)), done


@pytest.mark.parametrize("cuts", [0, 1, 2])
async def test_an_upload_goes_on_where_it_was_cut(mesh: FakeMesh, source: Path, cuts: int) -> None:
    registry = Registry(mesh, cuts=cuts)
    blob, done = await _upload(mesh, source)
    assert blob.name == f"blobs/sha256-{_SHA}"
    assert registry.bytes == _BYTES
    assert done[-1] == len(_BYTES)


async def test_an_upload_of_a_killed_command_goes_on(mesh: FakeMesh, source: Path) -> None:
    registry = Registry(mesh)
    registry.bytes = _BYTES[: 1 << 20]
    _, done = await _upload(mesh, source)
    assert registry.bytes == _BYTES
    assert done[0] == 2 << 20
    assert [request.request_id for request in mesh.registry.requests["StartUpload"]] == [f"upload-{_SHA}"]


async def test_an_answer_that_is_lost_at_the_end_costs_nothing(mesh: FakeMesh, source: Path) -> None:
    registry = Registry(mesh)
    whole = registry.UploadChunks

    def lose(requests: Iterator[pb.UploadChunksRequest], context: Any) -> None:
        whole(requests, context)
        abort(context, grpc.StatusCode.UNAVAILABLE, "cut")

    mesh.registry["UploadChunks"] = lose
    blob, _ = await _upload(mesh, source)
    assert blob.name == f"blobs/sha256-{_SHA}"
    assert len(mesh.registry.requests["UploadChunks"]) == 1


async def test_two_that_send_the_same_bytes_do_so_together(mesh: FakeMesh, source: Path) -> None:
    registry = Registry(mesh)
    whole = registry.UploadChunks

    def late(requests: Iterator[pb.UploadChunksRequest], context: Any) -> Any:
        if not registry.bytes:
            registry.bytes = _BYTES[: 2 << 20]
            abort(context, grpc.StatusCode.ABORTED, "another offset", reason="UPLOAD_OFFSET_MISMATCH")
        return whole(requests, context)

    mesh.registry["UploadChunks"] = late
    await _upload(mesh, source)
    assert registry.bytes == _BYTES


async def test_bytes_that_are_there_already_are_not_sent(mesh: FakeMesh, source: Path) -> None:
    Registry(mesh, known=True)
    blob, done = await _upload(mesh, source)
    assert blob.name == f"blobs/sha256-{_SHA}"
    assert done == [len(_BYTES)]
    assert "UploadChunks" not in mesh.registry.requests


async def test_an_upload_that_is_always_cut_is_given_up(mesh: FakeMesh, source: Path) -> None:
    registry = Registry(mesh, cuts=1000)
    registry.StartUpload(pb.StartUploadRequest(), None)

    def refuse(_requests: Any, context: Any) -> None:
        abort(context, grpc.StatusCode.UNAVAILABLE, "cut")

    mesh.registry["UploadChunks"] = refuse
    with pytest.raises(grpc.aio.AioRpcError, match="cut"):
        await _upload(mesh, source)
    assert len(mesh.registry.requests["UploadChunks"]) == 6


async def _download(mesh: FakeMesh, path: Path, digest: str = _SHA) -> None:
    artifact = pb.Artifact(path="model.onnx", blob=f"blobs/sha256-{digest}", size_bytes=len(_BYTES))
    async with grpc.aio.insecure_channel(mesh.environ["MLMESH_REGISTRY_TARGET"]) as channel:
        await transfer.download(registry_pb2_grpc.ModelRegistryServiceStub(channel), artifact, path)


@pytest.mark.parametrize("cuts", [0, 2])
async def test_a_download_goes_on_where_it_was_cut(mesh: FakeMesh, tmp_path: Path, cuts: int) -> None:
    Registry(mesh, cuts=cuts)
    await _download(mesh, tmp_path / "got")
    assert (tmp_path / "got").read_bytes() == _BYTES
    offsets = [request.offset for request in mesh.registry.requests["DownloadBlob"]]
    assert offsets == [0, 1 << 20, 2 << 20][: cuts + 1]


async def test_bytes_other_than_promised_leave_no_file(mesh: FakeMesh, tmp_path: Path) -> None:
    Registry(mesh)
    with pytest.raises(Corrupt):
        await _download(mesh, tmp_path / "got", digest="0" * 64)
    assert not [path for path in os.listdir(tmp_path) if path.startswith("got")]


def test_a_registry_cannot_name_a_file_outside_of_the_folder(tmp_path: Path) -> None:
    assert _inside(tmp_path, "a/model.onnx") == tmp_path / "a/model.onnx"
    for name in ("../x", "/etc/passwd", "a/../../x"):
        with pytest.raises(CliError, match="outside of the folder"):
            _inside(tmp_path, name)


def test_what_is_no_onnx_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    for data in (b"not onnx at all", b""):
        path.write_bytes(data)
        with pytest.raises(CliError, match="onnx"):
            read_signature(path)
