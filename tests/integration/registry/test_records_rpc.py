"""Stages, gates, histories, deletion, quotas and the audit log as clients meet them: a process, gRPC, reasons."""

import asyncio
import hashlib
import json
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration

from mlmesh.registry.v1 import registry_pb2 as pb
from mlmesh_runtime.channel import NO_DEADLINE, mesh_error
from mlmesh_runtime.errors import Conflict, InvalidInput, NotFound, Overloaded, WrongState
from tests.support.registry_process import Client, connected, refused, running

OPERATOR = "spiffe://cluster.local/ns/mlmesh/sa/operator"
AS_OPERATOR = (("x-forwarded-client-cert", f"By=x;URI={OPERATOR}"),)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("registry")


@pytest.fixture(scope="module")
def address(folder: Path) -> Iterator[str]:
    """One process for the tests of this file; each uses a model of its own."""
    env = {"MLMESH_IDENTITY_SOURCE": "xfcc", "MLMESH_REGISTRY_GARBAGE_GRACE_S": "1000"}
    with running(folder, env=env) as (_, listening):
        yield listening


@pytest.fixture
async def client(address: str) -> AsyncIterator[Client]:
    async with connected(address) as opened:
        yield opened


GATES = [
    pb.Gate(id="accurate", aliases=["stable"], metric_bounds=pb.MetricBounds(metric="accuracy", min_value=0.8)),
    pb.Gate(id="no-worse", metric_no_worse=pb.MetricNoWorse(metric="loss", lower_is_better=True, tolerance=0.5)),
    pb.Gate(id="callable", signature_compatible=pb.SignatureCompatible()),
    pb.Gate(id="verified", digest_verified=pb.DigestVerified(max_age=Duration(seconds=3600))),
    pb.Gate(id="signed", signed=pb.Signed(key_id="ab")),
    pb.Gate(id="baked", held_alias=pb.HeldAlias(alias="canary", min_age=Duration(seconds=60))),
]


async def test_gates_are_kept_as_they_were_sent_and_refuse_by_name(client: Client) -> None:
    stub = client.stub
    request = pb.CreateModelRequest(model_id="gated", gates=GATES, kind=pb.MODEL_KIND_MODEL)
    model = (await stub.CreateModel(request)).model
    assert list(model.gates) == GATES
    assert model.kind == pb.MODEL_KIND_MODEL
    await client.publish((await client.put(b"gated")).name, "gated")
    move = pb.SetModelAliasRequest(name="models/gated/aliases/stable", version="models/gated/versions/1")
    with pytest.raises(grpc.aio.AioRpcError) as told:
        await stub.SetModelAlias(move)
    error = mesh_error(told.value)
    assert isinstance(error, WrongState)
    assert error.reason == "GATE_REFUSED"
    assert dict(error.metadata) == {
        "accurate": "accuracy is 0.75, at least 0.8 is wanted",
        "no-worse": "the version has no metric loss",
        "verified": "its bytes were never verified",
        "signed": "key ab did not sign it, or is not trusted",
        "baked": "alias canary does not point at it, and never did",
    }
    move.validate_only = True
    asked = await stub.SetModelAlias(move)
    assert not asked.HasField("alias")
    assert [result.passed for result in asked.gate_results] == [False, False, True, False, False, False]
    updated = await stub.UpdateModel(
        pb.UpdateModelRequest(name=model.name, etag=model.etag, gates=pb.Gates(gates=GATES[2:4]))
    )
    verified = await stub.VerifyModelVersion(pb.VerifyModelVersionRequest(name="models/gated/versions/1"))
    assert (list(verified.corrupt_paths), verified.verified_bytes) == ([], 5)
    assert verified.model_version.HasField("verify_time")
    move.validate_only, move.reason = False, "all gates are open"
    moved = await stub.SetModelAlias(move, metadata=AS_OPERATOR)
    assert [(result.gate, result.passed) for result in moved.gate_results] == [("callable", True), ("verified", True)]
    history = await stub.ListModelAliasMoves(pb.ListModelAliasMovesRequest(parent="models/gated/aliases/stable"))
    (entry,) = history.moves
    assert (entry.alias, entry.from_version, entry.to_version) == (moved.alias.name, "", moved.alias.version)
    assert (entry.actor, entry.reason, entry.revision) == (OPERATOR, "all gates are open", moved.alias.revision)
    assert list(entry.gate_results) == list(moved.gate_results)
    assert list((await stub.ListModelAliasMoves(pb.ListModelAliasMovesRequest(parent="models/gated"))).moves) == [entry]
    none = await stub.UpdateModel(pb.UpdateModelRequest(name=model.name, etag=updated.model.etag, gates=pb.Gates()))
    assert list(none.model.gates) == []


async def test_every_gate_that_refuses_is_told_however_many(client: Client) -> None:
    gates = [
        pb.Gate(id=f"a-rather-long-name-of-a-gate-{count}", metric_bounds=pb.MetricBounds(metric=f"metric-{count}"))
        for count in range(32)
    ]
    await client.stub.CreateModel(pb.CreateModelRequest(model_id="many", gates=gates))
    await client.publish((await client.put(b"many")).name, "many")
    with pytest.raises(grpc.aio.AioRpcError) as told:
        await client.move("stable", 1, model_id="many")
    error = mesh_error(told.value)
    assert set(error.metadata) == {gate.id for gate in gates}
    assert "32 of 32 gates refuse" in error.message


async def test_gates_that_are_none_name_their_field(client: Client) -> None:
    wrong = [
        pb.Gate(id="Upper", signed=pb.Signed()),
        pb.Gate(id="no-condition"),
        pb.Gate(id="nan", metric_bounds=pb.MetricBounds(metric="f1", min_value=float("nan"))),
        pb.Gate(id="span", metric_bounds=pb.MetricBounds(metric="f1", min_value=2, max_value=1)),
        pb.Gate(id="age", digest_verified=pb.DigestVerified(max_age=Duration(seconds=-5))),
    ]
    for gate in wrong:
        async with refused(InvalidInput, "INVALID_FIELD"):
            await client.stub.CreateModel(pb.CreateModelRequest(model_id="wrong", gates=[gate]))
    async with refused(InvalidInput, "INVALID_FIELD"):
        await client.stub.CreateModel(pb.CreateModelRequest(model_id="wrong", gates=[GATES[0], GATES[0]]))
    async with refused(NotFound, "MODEL_NOT_FOUND"):
        await client.stub.GetModel(pb.GetModelRequest(name="models/wrong"))


async def test_a_version_with_card_kind_and_lineage_comes_back_as_it_was_sent(client: Client) -> None:
    stub = client.stub
    await stub.CreateModel(pb.CreateModelRequest(model_id="dataset", kind=pb.MODEL_KIND_DATASET))
    assert (await stub.GetModel(pb.GetModelRequest(name="models/dataset"))).model.kind == pb.MODEL_KIND_DATASET
    blob = await client.put(b"{}")
    version = pb.ModelVersion(
        artifacts=[pb.Artifact(path="a.json", blob=blob.name), pb.Artifact(path="b.json", blob=blob.name)],
        lineage=pb.Lineage(study="studies/s", source_uri="https://example.org/d", dataset="mnist"),
        model_card="# Card",
        stage=pb.VERSION_STAGE_QUARANTINED,
        etag="ignored",
    )
    published = (
        await stub.CreateModelVersion(pb.CreateModelVersionRequest(parent="models/dataset", model_version=version))
    ).model_version
    assert (published.lineage, published.model_card) == (version.lineage, "# Card")
    assert (published.stage, published.size_bytes) == (pb.VERSION_STAGE_ACTIVE, 4)
    assert published.etag == f"r{published.revision}"


async def test_a_watch_tells_of_stages_deletion_and_return(client: Client) -> None:
    stub = client.stub
    await client.create_model("told")
    version = await client.publish((await client.put(b"told")).name, "told")
    head = version.revision
    staged = await stub.SetModelVersionStage(
        pb.SetModelVersionStageRequest(
            name=version.name, stage=pb.VERSION_STAGE_DEPRECATED, reason="slow", etag=version.etag
        ),
        metadata=AS_OPERATOR,
    )
    assert staged.model_version.stage_reason == "slow"
    async with refused(Conflict, "ETAG_MISMATCH"):
        await stub.DeleteModelVersion(pb.DeleteModelVersionRequest(name=version.name, etag=version.etag))
    gone = (await stub.DeleteModelVersion(pb.DeleteModelVersionRequest(name=version.name))).model_version
    assert gone.purge_time.seconds - gone.delete_time.seconds == 30 * 86_400
    back = (await stub.UndeleteModelVersion(pb.UndeleteModelVersionRequest(name=version.name))).model_version
    async with refused(WrongState, "MODEL_NOT_EMPTY"):
        await stub.DeleteModel(pb.DeleteModelRequest(name="models/told"))
    model = (await stub.DeleteModel(pb.DeleteModelRequest(name="models/told", force=True))).model
    assert model.HasField("delete_time")
    async with refused(WrongState, "MODEL_DELETED"):
        await client.publish(version.artifacts[0].blob, "told")
    again = (await stub.UndeleteModel(pb.UndeleteModelRequest(name="models/told"))).model
    watch = stub.WatchModels(pb.WatchModelsRequest(parent="models/told", from_revision=head + 1), timeout=NO_DEADLINE)
    events: list[pb.WatchModelsResponse] = []
    async for event in watch:
        if event.WhichOneof("event") == "bookmark":
            break
        events.append(event)
    watch.cancel()
    assert [event.WhichOneof("event") for event in events] == [
        "model_version",
        "deleted_model_version",
        "model_version",
        "deleted_model_version",
        "deleted_model",
        "model",
        "model_version",
    ]
    assert (events[0].model_version, events[0].actor) == (staged.model_version, OPERATOR)
    assert events[1].deleted_model_version == pb.ModelVersion(
        name=version.name,
        digest=version.digest,
        revision=version.revision,
        etag=gone.etag,
        delete_time=gone.delete_time,
        purge_time=gone.purge_time,
    )
    assert events[2].model_version == back
    assert (events[4].deleted_model, events[5].model) == (model, again)


def overwrite(folder: Path, data: bytes, other: bytes) -> None:
    """What a disk may do to bytes that are stored."""
    (path,) = [path for path in folder.rglob(f"{hashlib.sha256(data).hexdigest()}*") if path.is_file()]
    path.chmod(0o600)
    path.write_bytes(other)


async def test_corrupt_bytes_are_refused_and_their_versions_quarantined(client: Client, folder: Path) -> None:
    await client.create_model("corrupt")
    data = b"these are the bytes"
    blob = await client.put(data)
    version = await client.publish(blob.name, "corrupt")
    overwrite(folder, data, b"THESE are the bytes")
    found = await client.stub.VerifyModelVersion(pb.VerifyModelVersionRequest(name=version.name))
    assert list(found.corrupt_paths) == ["model.onnx"]
    assert found.model_version.stage == pb.VERSION_STAGE_QUARANTINED
    async with refused(WrongState, "VERSION_QUARANTINED"):
        await client.move("stable", 1, model_id="corrupt")
    active = pb.SetModelVersionStageRequest(name=version.name, stage=pb.VERSION_STAGE_ACTIVE)
    async with refused(WrongState, "VERSION_QUARANTINED"):
        await client.stub.SetModelVersionStage(active)
    # The right bytes are brought again; they are let in, verified, and a person lifts the quarantine.
    await client.put(data)
    found = await client.stub.VerifyModelVersion(pb.VerifyModelVersionRequest(name=version.name))
    assert list(found.corrupt_paths) == []
    lifted = await client.stub.SetModelVersionStage(active)
    assert (lifted.model_version.stage, lifted.model_version.digest) == (pb.VERSION_STAGE_ACTIVE, version.digest)
    assert await client.get(blob.name) == data


async def test_quotas(client: Client) -> None:
    stub = client.stub
    await client.create_model("limited")
    blob = await client.put(b"limited")
    quota = (await stub.GetQuota(pb.GetQuotaRequest(name="models/limited"))).quota
    assert quota == pb.Quota(name="models/limited", etag=quota.etag)
    wanted = pb.Quota(name="models/limited", versions_max=1, bytes_used=99)
    stored = (await stub.SetQuota(pb.SetQuotaRequest(quota=wanted, etag=quota.etag))).quota
    assert (stored.versions_max, stored.bytes_used) == (1, 0)
    async with refused(Conflict, "ETAG_MISMATCH"):
        await stub.SetQuota(pb.SetQuotaRequest(quota=wanted, etag=quota.etag))
    await client.publish(blob.name, "limited")
    async with refused(Overloaded, "QUOTA_EXCEEDED"):
        await client.publish(blob.name, "limited")
    everything = (await stub.GetQuota(pb.GetQuotaRequest())).quota
    assert (everything.name, everything.models_max) == ("models/-", 0)
    assert everything.models_used >= 1
    async with refused(NotFound, "MODEL_NOT_FOUND"):
        await stub.GetQuota(pb.GetQuotaRequest(name="models/none"))


async def test_garbage_is_foreseen_and_the_grace_is_kept(client: Client) -> None:
    blob = await client.put(b"nobody uses this")
    foreseen = await client.stub.CollectGarbage(pb.CollectGarbageRequest(dry_run=True, grace=Duration()))
    assert blob.name in foreseen.blobs
    assert (foreseen.dry_run, foreseen.blob_count) == (True, len(foreseen.blobs))
    collected = await client.stub.CollectGarbage(pb.CollectGarbageRequest())
    assert (collected.dry_run, blob.name in collected.blobs) == (False, False)
    async with refused(InvalidInput, "INVALID_FIELD"):
        await client.stub.CollectGarbage(pb.CollectGarbageRequest(grace=Duration(seconds=999)))
    assert await client.get(blob.name) == b"nobody uses this"


async def test_the_audit_log_is_checked_from_the_contract_alone(client: Client) -> None:
    stub = client.stub
    await asyncio.gather(
        *(stub.CreateModel(pb.CreateModelRequest(model_id=f"chain{n}"), metadata=AS_OPERATOR) for n in range(5))
    )
    entries: list[pb.AuditEntry] = []
    token = ""
    while True:
        page = await stub.ListAuditEntries(pb.ListAuditEntriesRequest(page_size=7, page_token=token))
        entries += page.entries
        token = page.next_page_token
        if not token:
            break
    before = "0" * 64
    for sequence, entry in enumerate(entries, 1):
        said = {
            "sequence": entry.sequence,
            "time": entry.time.ToMicroseconds(),
            "actor": entry.actor,
            "method": entry.method,
            "resource": entry.resource,
            "detail": entry.detail,
            "previous_digest": entry.previous_digest,
        }
        text = json.dumps(said, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        assert entry.digest == hashlib.sha256(text.encode()).hexdigest()
        assert (entry.sequence, entry.previous_digest) == (sequence, before)
        before = entry.digest
    mine = await stub.ListAuditEntries(pb.ListAuditEntriesRequest(resource="models/chain3", actor=OPERATOR))
    assert [(entry.method, entry.resource) for entry in mine.entries] == [("CreateModel", "models/chain3")]
