"""Searching and signing as clients of the registry do: over gRPC, against a process."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path

import grpc
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from google.rpc import error_details_pb2, status_pb2

from mlmesh.registry.v1 import registry_pb2 as pb
from mlmesh_cli.signing import files_of, make_bundle
from mlmesh_runtime.errors import InvalidInput, NotFound
from tests.support.registry_process import Client, connected, refused, running
from tests.support.server import spawn

KEY = ec.generate_private_key(ec.SECP256R1())


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A registry that trusts KEY."""
    trusted = tmp_path_factory.mktemp("trusted")
    form = serialization.PublicFormat.SubjectPublicKeyInfo
    (trusted / "key.pem").write_bytes(KEY.public_key().public_bytes(serialization.Encoding.PEM, form))
    env = {"MLMESH_REGISTRY_TRUSTED_KEYS": str(trusted), "MLMESH_IDENTITY_SOURCE": "xfcc"}
    with running(tmp_path_factory.mktemp("registry"), env=env) as (_, listening):
        yield listening


@pytest.fixture
async def client(address: str) -> AsyncIterator[Client]:
    async with connected(address) as opened:
        yield opened


async def publish(client: Client, model: str, accuracies: Sequence[float], **labels: str) -> None:
    """A version for each accuracy, with lineage from the one before."""
    blob = (await client.put(b'{"weights": []}')).name
    await client.stub.CreateModel(pb.CreateModelRequest(model_id=model, description=f"the {model}", labels=labels))
    parents: list[str] = []
    for accuracy in accuracies:
        version = pb.ModelVersion(
            artifacts=[pb.Artifact(path="model.json", blob=blob)],
            metrics={"accuracy": accuracy},
            labels=labels,
            lineage=pb.Lineage(job="jobs/1", parents=parents),
            description="Weiß trained",
        )
        request = pb.CreateModelVersionRequest(parent=f"models/{model}", model_version=version)
        parents = [(await client.stub.CreateModelVersion(request)).model_version.name]


async def found(client: Client, parent: str, where: str = "", order_by: str = "", size: int = 2) -> list[str]:
    """Names on all pages of a search."""
    names: list[str] = []
    token = ""
    while True:
        request = pb.ListModelVersionsRequest(
            parent=parent, filter=where, order_by=order_by, page_size=size, page_token=token
        )
        page = await client.stub.ListModelVersions(request)
        names += [version.name.removeprefix("models/").replace("/versions", "") for version in page.model_versions]
        token = page.next_page_token
        if not token:
            return names


async def test_a_search_from_publication_to_page(client: Client) -> None:
    await publish(client, "left", [0.5, 0.9, 0.7], team="vision")
    await publish(client, "right", [0.6, 0.8], team="text")
    assert await found(client, "models/-", "metrics.accuracy >= 0.6") == ["right/2", "right/1", "left/3", "left/2"]
    assert await found(client, "models/left", order_by="metrics.accuracy desc") == ["left/2", "left/3", "left/1"]
    both = "labels.team = vision AND metrics.accuracy < 0.8 AND stage = ACTIVE"
    assert await found(client, "models/-", both, "metrics.accuracy") == ["left/1", "left/3"]
    assert await found(client, "models/-", 'lineage.parents:"models/left/versions/1"') == ["left/2"]
    assert await found(client, "models/-", "WEISS -left lineage.job = jobs/1") == ["right/2", "right/1"]
    assert await found(client, "models/-", "labels.team = (vision OR text) number = 1") == ["right/1", "left/1"]
    await client.move("stable", 2, model_id="left")
    assert await found(client, "models/-", "aliases:stable") == ["left/2"]
    models = await client.stub.ListModels(pb.ListModelsRequest(filter="labels.team = text OR latest_version = 3"))
    assert [model.name for model in models.models] == ["models/left", "models/right"]
    newest = await client.stub.ListModels(pb.ListModelsRequest(order_by="create_time desc", page_size=1))
    assert [model.name for model in newest.models] == ["models/right"]
    # What changed about a model is found at once.
    request = pb.UpdateModelRequest(name="models/right", labels={"team": "audio"}, etag=newest.models[0].etag)
    await client.stub.UpdateModel(request)
    audio = await client.stub.ListModels(pb.ListModelsRequest(filter="labels.team = audio"))
    assert [model.name for model in audio.models] == ["models/right"]
    assert not (await client.stub.ListModels(pb.ListModelsRequest(filter="labels.team = text"))).models


async def test_what_changes_while_pages_are_read_is_neither_lost_nor_repeated(client: Client) -> None:
    await publish(client, "moving", [0.1, 0.2, 0.3, 0.4])
    order = "metrics.accuracy desc"
    request = pb.ListModelVersionsRequest(parent="models/moving", order_by=order, page_size=2)
    first = await client.stub.ListModelVersions(request)
    # One before the place of the token, one behind it.
    blob = (await client.put(b'{"weights": []}')).name
    for accuracy in (0.9, 0.05):
        version = pb.ModelVersion(artifacts=[pb.Artifact(path="m.json", blob=blob)], metrics={"accuracy": accuracy})
        await client.stub.CreateModelVersion(
            pb.CreateModelVersionRequest(parent="models/moving", model_version=version)
        )
    request.page_token, request.page_size = first.next_page_token, 10
    rest = await client.stub.ListModelVersions(request)
    assert [round(v.metrics["accuracy"], 2) for v in (*first.model_versions, *rest.model_versions)] == [
        0.4, 0.3, 0.2, 0.1, 0.05,
    ]  # fmt: skip


async def test_a_wrong_filter_is_told_with_its_place(client: Client) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as told:
        await client.stub.ListModelVersions(
            pb.ListModelVersionsRequest(parent="models/-", filter="stage = ACTIVE AND colour = red")
        )
    assert told.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    trailers = dict(told.value.trailing_metadata() or ())
    info, bad = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest()
    for detail in status_pb2.Status.FromString(trailers["grpc-status-details-bin"]).details:
        detail.Unpack(info)
        detail.Unpack(bad)
    assert (info.reason, info.metadata["position"], info.metadata["found"]) == ("INVALID_FILTER", "20", "'colour'")
    assert bad.field_violations[0].field == "filter"
    assert "metrics.KEY" in (told.value.details() or "")


@pytest.mark.parametrize(
    ("where", "order_by"),
    [
        ("stage = GREEN", ""), ("number = one", ""), ("number > 99999999999999999999", ""), ("metrics.a = high", ""),
        ("metrics.a = inf", ""), ("create_time > yesterday", ""), ("create_time = 2026-13-01T00:00:00Z", ""),
        ("aliases = stable", ""), ("stage < ACTIVE", ""), ('labels.a < "x*"', ""), ("labels = x", ""),
        ("lineage.nothing = 1", ""), ("metrics = 1", ""), ("(", ""), ("x" * 3000, ""),
        ("", "colour"), ("", "labels"), ("", "aliases"), ("", "description"), ("", "number sideways"),
    ],
)  # fmt: skip
async def test_what_makes_no_sense_is_refused(client: Client, where: str, order_by: str) -> None:
    reason = "INVALID_FILTER" if where and len(where) < 3000 else "INVALID_FIELD"
    async with refused(InvalidInput, reason):
        await client.stub.ListModelVersions(
            pb.ListModelVersionsRequest(parent="models/-", filter=where, order_by=order_by)
        )


async def test_a_model_that_is_not_there_is_said_so(client: Client) -> None:
    async with refused(NotFound, "MODEL_NOT_FOUND"):
        await client.stub.ListModelVersions(pb.ListModelVersionsRequest(parent="models/nobody", filter="number = 1"))


async def test_a_signature_over_grpc(client: Client) -> None:
    await publish(client, "signed", [0.5])
    name = "models/signed/versions/1"
    version = (await client.stub.GetModelVersion(pb.GetModelVersionRequest(name=name))).model_version
    bundle = make_bundle("signed/1", files_of(version), KEY)
    added = await client.stub.AddModelVersionSignature(pb.AddModelVersionSignatureRequest(parent=name, bundle=bundle))
    assert (added.signature.valid, len(added.signature.key_id)) == (True, 64)
    listed = await client.stub.ListModelVersionSignatures(pb.ListModelVersionSignaturesRequest(parent=name))
    assert [*listed.signatures] == [added.signature]
    async with refused(InvalidInput, "SIGNATURE_INVALID"):
        await client.stub.AddModelVersionSignature(pb.AddModelVersionSignatureRequest(parent=name, bundle="{}"))
    # A gate that wants this key lets the version pass; one that wants another does not.
    gates = [pb.Gate(id="signed", signed=pb.Signed(key_id=added.signature.key_id))]
    model = (await client.stub.GetModel(pb.GetModelRequest(name="models/signed"))).model
    await client.stub.UpdateModel(pb.UpdateModelRequest(name=model.name, etag=model.etag, gates=pb.Gates(gates=gates)))
    asked = pb.SetModelAliasRequest(name="models/signed/aliases/stable", version=name, validate_only=True)
    results = (await client.stub.SetModelAlias(asked)).gate_results
    assert [(result.gate, result.passed) for result in results] == [("signed", True)]


async def test_many_searches_at_once_are_all_answered(client: Client) -> None:
    await publish(client, "busy", [0.1] * 5, team="busy")
    searches = [found(client, "models/busy", f"labels.team = busy AND number <= {n % 5 + 1}") for n in range(40)]
    assert sorted({len(names) for names in await asyncio.gather(*searches)}) == [1, 2, 3, 4, 5]


def test_the_folder_of_keys_is_named_when_it_is_wrong(tmp_path: Path) -> None:
    env = {
        "MLMESH_LISTEN": "127.0.0.1:0",
        "MLMESH_DATA_DIR": str(tmp_path / "data"),
        "MLMESH_REGISTRY_TRUSTED_KEYS": str(tmp_path / "none"),
    }
    with spawn("-m", "mlmesh_registry", env=env) as process:
        assert process.wait() != 0
        assert "MLMESH_REGISTRY_TRUSTED_KEYS" in process.log()
