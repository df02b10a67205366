"""Publishing to the real registry: whatever is repeated, a job becomes one version."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from mlmesh.registry.v1 import registry_pb2 as pb
from mlmesh_runtime.channel import MeshChannel, open_channel
from mlmesh_runtime.errors import AlreadyExists, InvalidInput, MeshError, NotReady, WrongState
from mlmesh_runtime.executors import Executors
from mlmesh_training.jobs import File, Job, Publication
from mlmesh_training.publish import RegistryPublisher
from tests.support import registry_process
from tests.support.training import job, model, spec


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with registry_process.running(tmp_path_factory.mktemp("registry")) as (_, address):
        yield address


@pytest.fixture
async def channel(address: str) -> AsyncIterator[MeshChannel]:
    async with open_channel(address) as opened:
        yield opened


@pytest.fixture
async def publisher(channel: MeshChannel, tmp_path: Path) -> AsyncIterator[RegistryPublisher]:
    async with Executors({"disk": 1}) as executors:
        yield RegistryPublisher(channel, folder=lambda uid: tmp_path / uid, executor=executors["disk"])


def trained(tmp_path: Path, uid: str, *aliases: str, size: int = 3_000_000) -> Job:
    """A job with a file on disk, ready to publish."""
    # Text is a format that may be stored.
    data = hashlib.shake_256(uid.encode()).hexdigest(size // 2).encode()
    (tmp_path / uid).mkdir(exist_ok=True)
    (tmp_path / uid / "model.onnx").write_bytes(data)
    digest = hashlib.sha256(data).hexdigest()
    file = File(path="model.onnx", sha256=digest, size_bytes=size, media_type="application/onnx")
    publication = Publication(model=f"models/{uid.rpartition('-')[0]}", aliases=aliases, description="of a test")
    return job(uid, spec=spec(publication=publication), trained=model(files=(file,)))


async def publish(publisher: RegistryPublisher, job: Job) -> Job:
    await publisher.upload(job)
    done = dataclasses.replace(job, model_version=await publisher.register(job))
    await publisher.point(done)
    return done


async def aliases(client: registry_process.Client, model: str) -> dict[str, str]:
    found = (await client.stub.ListModelAliases(pb.ListModelAliasesRequest(parent=f"models/{model}"))).aliases
    return {alias.name.rpartition("/")[2]: alias.version.rpartition("/")[2] for alias in found}


async def test_a_version_has_all_that_is_known_of_the_model(
    publisher: RegistryPublisher, address: str, tmp_path: Path
) -> None:
    done = await publish(publisher, trained(tmp_path, "whole-1", "stable", "best"))
    assert done.model_version == "models/whole/versions/1"
    async with registry_process.connected(address) as client:
        version = (
            await client.stub.GetModelVersion(pb.GetModelVersionRequest(name="models/whole/aliases/stable"))
        ).model_version
        raw = await client.get(version.artifacts[0].blob)
        assert await aliases(client, "whole") == {"stable": "1", "best": "1"}
    assert raw == (tmp_path / "whole-1" / "model.onnx").read_bytes()
    assert (version.artifacts[0].path, version.artifacts[0].media_type) == ("model.onnx", "application/onnx")
    assert [(t.name, t.datatype, list(t.shape)) for t in version.signature.inputs] == [("image", "FP32", [-1, 1, 8, 8])]
    assert version.metrics["accuracy"] == 0.75
    assert version.metrics["f1_macro"] == 0.71
    assert version.labels["classes"] == "0,1"
    assert version.description == "of a test"
    lineage = version.lineage
    assert (lineage.job, lineage.dataset) == ("jobs/whole-1", "digits")
    assert (lineage.dataset_fingerprint, lineage.code_digest) == ("cd" * 32, "ef" * 32)


async def test_repeating_every_step_changes_nothing(publisher: RegistryPublisher, address: str, tmp_path: Path) -> None:
    asked = trained(tmp_path, "again-1", "stable")
    first = await publish(publisher, asked)
    async with registry_process.connected(address) as client:
        before = (await client.stub.ListModelAliases(pb.ListModelAliasesRequest(parent="models/again"))).aliases
        for _ in range(3):
            assert await publish(publisher, asked) == first
        after = (await client.stub.ListModelAliases(pb.ListModelAliasesRequest(parent="models/again"))).aliases
        page = await client.stub.ListModelVersions(pb.ListModelVersionsRequest(parent="models/again"))
    assert list(before) == list(after)
    assert len(page.model_versions) == 1


async def test_a_cut_upload_goes_on_where_it_was(publisher: RegistryPublisher, address: str, tmp_path: Path) -> None:
    asked = trained(tmp_path, "cut-1")
    assert asked.trained is not None
    (file,) = asked.trained.files
    data = (tmp_path / asked.uid / file.path).read_bytes()
    async with registry_process.connected(address) as client:
        # The service began the upload like this, and was killed.
        started = await client.start(data, f"{asked.uid}/{file.path}/0")
        await client.send(started.upload.name, registry_process.pieces(data)[:1])
        await publish(publisher, asked)
        finished = await client.stub.GetBlob(pb.GetBlobRequest(name=f"blobs/sha256-{file.sha256}"))
    assert finished.blob.size_bytes == len(data)


async def test_a_file_that_changed_on_disk_is_never_published(publisher: RegistryPublisher, tmp_path: Path) -> None:
    asked = trained(tmp_path, "changed-1")
    good = (tmp_path / asked.uid / "model.onnx").read_bytes()
    (tmp_path / asked.uid / "model.onnx").write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    with pytest.raises(MeshError) as raised:
        await publisher.upload(asked)
    assert raised.value.reason == "DIGEST_MISMATCH"
    with pytest.raises(WrongState) as missing:
        await publisher.register(asked)
    assert missing.value.reason == "BLOB_NOT_FOUND"
    # Once it is right again, trying again works: the lost upload is started anew.
    (tmp_path / asked.uid / "model.onnx").write_bytes(good)
    await publish(publisher, asked)


async def test_aliases_move_forward_only(publisher: RegistryPublisher, address: str, tmp_path: Path) -> None:
    first = await publish(publisher, trained(tmp_path, "moves-1", "stable"))
    second = await publish(publisher, trained(tmp_path, "moves-2", "stable"))
    assert second.model_version == "models/moves/versions/2"
    async with registry_process.connected(address) as client:
        assert await aliases(client, "moves") == {"stable": "2"}
        # The first job's service comes back and repeats its last step.
        await publisher.point(first)
        assert await aliases(client, "moves") == {"stable": "2"}


async def test_somebody_else_may_move_the_alias_at_the_same_time(
    publisher: RegistryPublisher, address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await publish(publisher, trained(tmp_path, "race-1", "stable"))
    await publish(publisher, trained(tmp_path, "race-2", "stable"))
    third = trained(tmp_path, "race-3", "stable")
    async with registry_process.connected(address) as client:
        look, moved = publisher._alias, [2, 1]

        async def looked(name: str) -> pb.ModelAlias | None:
            present = await look(name)
            if present and moved:
                await client.move("stable", moved.pop(), present.etag, "race")
            return present

        monkeypatch.setattr(publisher, "_alias", looked)
        await publish(publisher, third)
        assert moved == []
        assert await aliases(client, "race") == {"stable": "3"}


async def test_a_request_that_was_used_for_something_else_is_said(publisher: RegistryPublisher, tmp_path: Path) -> None:
    asked = trained(tmp_path, "reused-1")
    await publish(publisher, asked)
    assert asked.trained is not None
    other = dataclasses.replace(asked, trained=dataclasses.replace(asked.trained, labels={"other": "1"}))
    with pytest.raises(AlreadyExists):
        await publisher.register(other)


async def test_what_the_registry_says_comes_back_as_our_errors(publisher: RegistryPublisher, tmp_path: Path) -> None:
    asked = trained(tmp_path, "wrong-1")
    assert asked.trained is not None
    file = dataclasses.replace(asked.trained.files[0], path="../escape")
    wrong = dataclasses.replace(asked, trained=dataclasses.replace(asked.trained, files=(file,)))
    with pytest.raises(InvalidInput):
        await publisher.register(wrong)


async def test_a_registry_that_is_away_is_not_ready(tmp_path: Path) -> None:
    async with Executors({"disk": 1}) as executors, open_channel("127.0.0.1:1") as nowhere:
        away = RegistryPublisher(nowhere, folder=lambda uid: tmp_path / uid, executor=executors["disk"])
        with pytest.raises(NotReady):
            await away.upload(trained(tmp_path, "away-1"))
