"""The registry as its clients meet it: a process, gRPC, statuses with reasons."""

import asyncio
import contextlib
import signal
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import grpc
import psycopg
import pytest

from mlmesh.registry.v1 import registry_pb2 as pb
from mlmesh_runtime.channel import NO_DEADLINE
from mlmesh_runtime.chunks import CHUNK_BYTES, Chunk
from mlmesh_runtime.errors import (
    AlreadyExists,
    Conflict,
    Corrupt,
    InvalidInput,
    NotFound,
    NotReady,
    RevisionLost,
    WrongState,
)
from tests.support.postgres import PostgresServer
from tests.support.registry import some_bytes
from tests.support.registry_process import Client, connected, pieces, refused, running
from tests.support.server import spawn

DATA = some_bytes("process", 2 * CHUNK_BYTES + 99)


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """One process for the tests of this file; each uses a model of its own."""
    env = {"MLMESH_IDENTITY_SOURCE": "xfcc", "MLMESH_REGISTRY_BOOKMARK_S": "0.1"}
    with running(tmp_path_factory.mktemp("registry"), env=env) as (_, listening):
        yield listening


@pytest.fixture
async def client(address: str) -> AsyncIterator[Client]:
    async with connected(address) as opened:
        yield opened


async def test_a_model_from_bytes_to_alias(client: Client) -> None:
    stub = client.stub
    created = await stub.CreateModel(
        pb.CreateModelRequest(model_id="path", description="a model", labels={"team": "vision"}),
        metadata=(("x-forwarded-client-cert", "By=x;URI=spiffe://cluster.local/ns/mlmesh/sa/training"),),
    )
    assert (created.model.name, created.model.latest_version) == ("models/path", 0)
    blob = await client.put(DATA)
    assert blob.size_bytes == len(DATA)
    version = pb.ModelVersion(
        artifacts=[pb.Artifact(path="model.onnx", blob=blob.name, media_type="application/onnx")],
        signature=pb.ModelSignature(inputs=[pb.TensorSpec(name="x", datatype="FP32", shape=[-1, 1, 28, 28])]),
        metrics={"accuracy": 0.98},
        labels={"kind": "cnn"},
        lineage=pb.Lineage(job="jobs/1", dataset="mnist", parents=["models/path/versions/1"]),
        description="the first",
        name="ignored",
        digest="ignored",
        creator="ignored",
    )
    published = await stub.CreateModelVersion(
        pb.CreateModelVersionRequest(parent="models/path", model_version=version),
        metadata=(("x-forwarded-client-cert", "By=x;URI=spiffe://cluster.local/ns/mlmesh/sa/training"),),
    )
    stored = published.model_version
    assert stored.name == "models/path/versions/1"
    assert stored.creator == "spiffe://cluster.local/ns/mlmesh/sa/training"
    assert stored.artifacts[0].size_bytes == len(DATA)
    assert stored.digest.startswith("sha256-")
    for field in ("signature", "lineage"):
        assert getattr(stored, field) == getattr(version, field)
    assert dict(stored.metrics) == {"accuracy": 0.98}
    moved = await client.move("stable", 1, model_id="path")
    by_alias = await stub.GetModelVersion(pb.GetModelVersionRequest(name=moved.name))
    assert list(by_alias.model_version.aliases) == [moved.name]
    assert (by_alias.model_version.digest, moved.updater) == (stored.digest, "")
    assert await client.get(stored.artifacts[0].blob) == DATA
    assert (await stub.GetModel(pb.GetModelRequest(name="models/path"))).model.latest_version == 1
    assert "models/path" in [model.name for model in (await stub.ListModels(pb.ListModelsRequest())).models]
    listed = await stub.ListModelVersions(pb.ListModelVersionsRequest(parent="models/path"))
    assert list(listed.model_versions) == [by_alias.model_version]
    aliases = await stub.ListModelAliases(pb.ListModelAliasesRequest(parent="models/path"))
    assert list(aliases.aliases) == [moved]
    await stub.DeleteModelAlias(pb.DeleteModelAliasRequest(name=moved.name, etag=moved.etag))
    updated = await stub.UpdateModel(pb.UpdateModelRequest(name="models/path", description="", etag=created.model.etag))
    assert (updated.model.description, dict(updated.model.labels)) == ("", {"team": "vision"})


async def test_errors_carry_their_reasons(client: Client) -> None:
    stub = client.stub
    await client.create_model("errors", request_id="errors")
    async with refused(AlreadyExists, "MODEL_EXISTS"):
        await client.create_model("errors")
    async with refused(AlreadyExists, "REQUEST_ID_REUSED"):
        await client.create_model("errors2", request_id="errors")
    async with refused(NotFound, "MODEL_NOT_FOUND"):
        await stub.GetModel(pb.GetModelRequest(name="models/none"))
    async with refused(NotFound, "MODEL_VERSION_NOT_FOUND"):
        await stub.GetModelVersion(pb.GetModelVersionRequest(name="models/errors/versions/1"))
    async with refused(NotFound, "MODEL_ALIAS_NOT_FOUND"):
        await stub.GetModelVersion(pb.GetModelVersionRequest(name="models/errors/aliases/stable"))
    async with refused(NotFound, "BLOB_NOT_FOUND"):
        await stub.GetBlob(pb.GetBlobRequest(name="blobs/sha256-" + "0" * 64))
    async with refused(NotFound, "UPLOAD_NOT_FOUND"):
        await stub.GetUpload(pb.GetUploadRequest(name="uploads/none"))
    async with refused(WrongState, "BLOB_NOT_FOUND"):
        await client.publish("blobs/sha256-" + "0" * 64, "errors")
    async with refused(RevisionLost, "REVISION_LOST"):
        await anext(aiter(stub.WatchModels(pb.WatchModelsRequest(from_revision=2**62))))
    async with refused(InvalidInput, "INVALID_FIELD"):
        await stub.ListModels(pb.ListModelsRequest(page_token="nonsense"))
    async with refused(InvalidInput, "UPLOAD_TOO_LARGE"):
        await stub.StartUpload(pb.StartUploadRequest(size_bytes=2**50, sha256="0" * 64))


async def test_stale_etags_change_nothing(client: Client) -> None:
    model = await client.create_model("etags")
    blob = await client.put(b"etags")
    for _ in range(2):
        await client.publish(blob.name, "etags")
    moved = await client.move("stable", 1, model_id="etags")
    async with refused(Conflict, "ETAG_MISMATCH"):
        await client.move("stable", 2, model_id="etags")
    async with refused(Conflict, "ETAG_MISMATCH"):
        await client.move("stable", 2, "r1", model_id="etags")
    async with refused(Conflict, "ETAG_MISMATCH"):
        await client.stub.DeleteModelAlias(pb.DeleteModelAliasRequest(name=moved.name, etag="r1"))
    async with refused(Conflict, "ETAG_MISMATCH"):
        await client.stub.UpdateModel(pb.UpdateModelRequest(name=model.name, description="x", etag="r0"))
    listed = await client.stub.ListModelAliases(pb.ListModelAliasesRequest(parent="models/etags"))
    assert list(listed.aliases) == [moved]


async def test_of_two_concurrent_moves_exactly_one_wins(client: Client) -> None:
    await client.create_model("race")
    blob = await client.put(b"race")
    for _ in range(2):
        await client.publish(blob.name, "race")
    etag = (await client.move("stable", 1, model_id="race")).etag
    for _ in range(5):
        outcomes = await asyncio.gather(
            client.move("stable", 2, etag, "race"),
            client.move("canary", 2, "", "race"),
            client.move("stable", 2, etag, "race"),
            return_exceptions=True,
        )
        stable = [outcomes[0], outcomes[2]]
        won = [outcome for outcome in stable if isinstance(outcome, pb.ModelAlias)]
        lost = [outcome for outcome in stable if isinstance(outcome, grpc.aio.AioRpcError)]
        assert (len(won), [error.code() for error in lost]) == (1, [grpc.StatusCode.ABORTED])
        etag = (await client.move("stable", 1, won[0].etag, "race")).etag


async def test_a_cut_upload_goes_on(client: Client) -> None:
    data = some_bytes("cut", 3 * CHUNK_BYTES)
    started = await client.start(data, "cut")
    name = started.upload.name
    sent = asyncio.Event()

    async def endless() -> AsyncIterator[pb.UploadChunksRequest]:
        for chunk in pieces(data)[:2]:
            yield pb.UploadChunksRequest(upload=name, offset=chunk.offset, data=chunk.data, crc32c=chunk.crc32c)
        sent.set()
        await asyncio.Event().wait()

    call = client.stub.UploadChunks(endless())
    await sent.wait()
    call.cancel()
    # What a cut stream left is asked for, never guessed: between none and all of the two chunks.
    committed = (await client.stub.GetUpload(pb.GetUploadRequest(name=name))).upload.committed_bytes
    assert committed in {0, CHUNK_BYTES, 2 * CHUNK_BYTES}
    while True:
        try:
            await client.send(name, pieces(data, committed))
            break
        except grpc.aio.AioRpcError as error:
            # Else the server was still taking in what the cut stream had sent.
            if error.code() is not grpc.StatusCode.ABORTED:
                raise
            committed = (await client.stub.GetUpload(pb.GetUploadRequest(name=name))).upload.committed_bytes
    again = await client.start(data, "cut")
    assert (again.upload.name, again.upload.committed_bytes) == (name, len(data))
    blob = (await client.stub.FinishUpload(pb.FinishUploadRequest(name=name))).blob
    assert await client.get(blob.name) == data
    assert (await client.start(data, "cut")).blob == blob


async def test_a_bad_chunk_keeps_what_came_before_it(client: Client) -> None:
    data = some_bytes("bad", 2 * CHUNK_BYTES)
    first, second = pieces(data)
    for bad, kind, reason in (
        (second._replace(crc32c=second.crc32c ^ 1), Corrupt, "CHUNK_CHECKSUM_MISMATCH"),
        (second._replace(offset=5), Conflict, "UPLOAD_OFFSET_MISMATCH"),
        (second._replace(data=second.data + b"x"), InvalidInput, "INVALID_FIELD"),
    ):
        upload = (await client.start(data)).upload
        async with refused(kind, reason):
            await client.send(upload.name, [first, bad])
        found = await client.stub.GetUpload(pb.GetUploadRequest(name=upload.name))
        assert found.upload.committed_bytes == CHUNK_BYTES


async def test_wrong_bytes_are_told_and_discarded(client: Client) -> None:
    upload = (await client.start(b"right")).upload
    await client.send(upload.name, pieces(b"wrong"))
    async with refused(Corrupt, "DIGEST_MISMATCH"):
        await client.stub.FinishUpload(pb.FinishUploadRequest(name=upload.name))
    async with refused(NotFound, "UPLOAD_NOT_FOUND"):
        await client.stub.FinishUpload(pb.FinishUploadRequest(name=upload.name))


async def test_the_first_message_says_which_upload(client: Client) -> None:
    upload = (await client.start(b"abcdef")).upload
    one, two = Chunk(0, b"abc", 0), Chunk(3, b"def", 0)
    for name in ("", "uploads/../x", "uploads/A"):
        async with refused(InvalidInput, "INVALID_FIELD"):
            await client.send(name, [one, two])
    assert (await client.stub.UploadChunks(_nothing())) == pb.UploadChunksResponse()
    assert (await client.send(upload.name, pieces(b"abcdef", chunk_bytes=3))).committed_bytes == 6


async def _nothing() -> AsyncIterator[pb.UploadChunksRequest]:
    nothing: list[pb.UploadChunksRequest] = []
    for request in nothing:
        yield request


async def test_a_range_of_a_blob(client: Client) -> None:
    blob = await client.put(DATA)
    assert await client.get(blob.name, CHUNK_BYTES - 5, 10) == DATA[CHUNK_BYTES - 5 :][:10]
    assert await client.get(blob.name, len(DATA)) == b""
    async with refused(InvalidInput, "INVALID_FIELD"):
        await client.get(blob.name, len(DATA) + 1)


async def test_a_watch_replays_and_follows(client: Client) -> None:
    first = await client.create_model("watched")
    watch = client.stub.WatchModels(pb.WatchModelsRequest(parent="models/watched"), timeout=NO_DEADLINE)
    events = aiter(watch)
    event = await anext(events)
    assert event.model == first
    assert (await anext(events)).WhichOneof("event") == "bookmark"
    blob = await client.put(b"watched")
    version = await client.publish(blob.name, "watched")
    alias = await client.move("stable", 1, model_id="watched")
    await client.stub.DeleteModelAlias(pb.DeleteModelAliasRequest(name=alias.name, etag=alias.etag))
    seen: list[pb.WatchModelsResponse] = []
    while len(seen) < 3:
        event = await anext(events)
        if event.WhichOneof("event") != "bookmark":
            seen.append(event)
    watch.cancel()
    assert seen[0].model_version == version
    assert seen[1].alias == alias
    assert seen[2].deleted_alias == pb.ModelAlias(name=alias.name, version=alias.version)
    assert [seen[0].revision, seen[1].revision] == [version.revision, alias.revision]
    again = client.stub.WatchModels(
        pb.WatchModelsRequest(parent="models/watched", from_revision=alias.revision), timeout=NO_DEADLINE
    )
    assert [await anext(aiter(again)), await anext(aiter(again))] == seen[1:]
    again.cancel()


async def test_a_drain_ends_watches_and_everything_is_there_afterwards(tmp_path: Path) -> None:
    with running(tmp_path / "data") as (process, address):
        async with connected(address) as client:
            await client.create_model()
            version = await client.publish((await client.put(b"kept")).name)
            events = aiter(client.stub.WatchModels(pb.WatchModelsRequest(), timeout=NO_DEADLINE))
            assert (await anext(events)).model.name == "models/m"
            process.signal(signal.SIGTERM)
            async with refused(NotReady, "DRAINING"):
                while True:
                    await anext(events)
        assert await asyncio.to_thread(process.wait) == 0, process.log()
    with running(tmp_path / "data") as (_, address):
        async with connected(address) as client:
            found = await client.stub.GetModelVersion(pb.GetModelVersionRequest(name=version.name))
            assert found.model_version == version
            assert await client.get(version.artifacts[0].blob) == b"kept"


def test_a_folder_in_use_is_a_clear_line_and_exit_code_2(tmp_path: Path) -> None:
    with running(tmp_path / "data"):
        env = {"MLMESH_LISTEN": "127.0.0.1:0", "MLMESH_DATA_DIR": str(tmp_path / "data")}
        with spawn("-m", "mlmesh_registry", env=env) as second:
            assert second.wait(timeout_s=60) == 2
            assert "is used by another registry process" in second.log()
            assert "Traceback" not in second.log()


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("postgresql://locked:hunter-2@/postgres?host={folder}", "password authentication failed"),
        ("postgresql://someone:hunter-2@/nowhere?host={folder}", "does not exist"),
    ],
)
def test_a_wrong_database_is_a_clear_line_without_its_password(
    tmp_path: Path, postgres: PostgresServer, url: str, told: str
) -> None:
    with contextlib.suppress(psycopg.errors.DuplicateObject):
        postgres.execute("CREATE ROLE locked LOGIN PASSWORD 'another'")
        postgres.execute("CREATE ROLE someone LOGIN")
    env = {
        "MLMESH_LISTEN": "127.0.0.1:0",
        "MLMESH_DATA_DIR": str(tmp_path / "data"),
        "MLMESH_REGISTRY_DATABASE_URL": url.format(folder=postgres.folder),
    }
    with spawn("-m", "mlmesh_registry", env=env) as process:
        assert process.wait(timeout_s=60) == 2
        assert told in process.log()
        assert "MLMESH_REGISTRY_DATABASE_URL" in process.log()
        assert "Traceback" not in process.log()
        assert "hunter-2" not in process.log()


@pytest.mark.parametrize(
    ("variable", "value", "told"),
    [
        ("MLMESH_LISTEN", None, "is the port in use already?"),
        ("MLMESH_REGISTRY_BOOKMARK_S", "soon", "MLMESH_REGISTRY_BOOKMARK_S: expected a number"),
        ("MLMESH_DATA_DIR", "/dev/null/x", "MLMESH_DATA_DIR: cannot use"),
    ],
)
def test_a_wrong_setting_is_a_clear_line_and_exit_code_2(
    tmp_path: Path, address: str, variable: str, value: str | None, told: str
) -> None:
    env = {"MLMESH_LISTEN": "127.0.0.1:0", "MLMESH_DATA_DIR": str(tmp_path / "data"), variable: value or address}
    with spawn("-m", "mlmesh_registry", env=env) as process:
        assert process.wait(timeout_s=60) == 2
        assert told in process.log()
        assert "Traceback" not in process.log()
