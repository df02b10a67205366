"""Names from outside never become paths: whatever is sent, nothing appears outside of what the registry made."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from mlmesh.registry.v1 import registry_pb2 as pb
from tests.support.registry_process import connected, running

hostile = st.one_of(
    st.text(max_size=80),
    st.lists(st.sampled_from(["..", ".", "", "a", "\0", "%2e%2e", "~", "CON", "․․"]), min_size=1, max_size=6).map(  # noqa: RUF001
        "/".join
    ),
)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str]]:
    folder = tmp_path_factory.mktemp("outside")
    with running(folder / "data") as (_, address):
        yield folder, address


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(hostile)
@example("../../../../tmp/x")
@example("/etc/passwd")
@example("a/../b")
@example("m" * 300)
def test_no_text_in_any_place_leaves_the_folder(served: tuple[Path, str], text: str) -> None:
    folder, address = served
    before = {path for path in folder.rglob("*") if "registry.sqlite" not in path.name}
    codes = asyncio.run(_everywhere(address, text))
    assert {path for path in folder.rglob("*") if "registry.sqlite" not in path.name} == before
    assert set(codes) <= {grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND}, codes


async def _everywhere(address: str, text: str) -> list[grpc.StatusCode]:
    """Put a text in every place that takes a name; the statuses of what was refused."""
    sha = "0" * 64
    version = pb.ModelVersion(artifacts=[pb.Artifact(path=f"{text}/", blob=f"blobs/sha256-{sha}")])
    async with connected(address) as client:
        stub = client.stub
        calls: list[Any] = [
            stub.GetModel(pb.GetModelRequest(name=f"models/{text}")),
            stub.CreateModel(pb.CreateModelRequest(model_id=f"{text}/")),
            stub.CreateModelVersion(pb.CreateModelVersionRequest(parent=f"models/{text}", model_version=version)),
            stub.GetModelVersion(pb.GetModelVersionRequest(name=f"models/{text}/versions/1")),
            stub.SetModelAlias(pb.SetModelAliasRequest(name=f"models/m/aliases/{text}", version="models/m/versions/1")),
            stub.StartUpload(pb.StartUploadRequest(size_bytes=1, sha256=text)),
            stub.GetUpload(pb.GetUploadRequest(name=f"uploads/{text}")),
            stub.FinishUpload(pb.FinishUploadRequest(name=f"uploads/{text}")),
            stub.GetBlob(pb.GetBlobRequest(name=f"blobs/{text}")),
        ]
        outcomes = await asyncio.gather(*calls, return_exceptions=True)
        download = stub.DownloadBlob(pb.DownloadBlobRequest(name=f"blobs/sha256-{text}"))
        watch = stub.WatchModels(pb.WatchModelsRequest(parent=f"models/{text}/"))
        for stream in (download, watch):
            outcomes += await asyncio.gather(anext(aiter(stream)), return_exceptions=True)
    assert all(isinstance(outcome, grpc.aio.AioRpcError) for outcome in outcomes), outcomes
    return [outcome.code() for outcome in outcomes if isinstance(outcome, grpc.aio.AioRpcError)]
