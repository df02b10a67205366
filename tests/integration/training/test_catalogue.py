"""What a running service can train: recipes of other distributions, data sets of the registry; to their versions."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Iterator

import grpc
import pytest

from mlmesh.registry.v1 import registry_pb2
from mlmesh.training.v1 import training_pb2 as pb
from mlmesh_runtime.channel import mesh_error
from mlmesh_runtime.errors import InvalidInput, NotReady
from tests.support import foreign, registry_process
from tests.support.datasets import houses, registered
from tests.support.server import Process
from tests.support.training_process import SUCCEEDED, Client, connected, last, refused, running


@pytest.fixture(scope="module")
def registry_running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Process, str]]:
    with registry_process.running(tmp_path_factory.mktemp("registry")) as started:
        yield started


@pytest.fixture(scope="module")
def registry(registry_running: tuple[Process, str]) -> str:
    return registry_running[1]


@pytest.fixture(scope="module")
def training(registry: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Process, str]]:
    site = foreign.installed(tmp_path_factory.mktemp("foreign"))
    env = {"MLMESH_TRAINING_THREADS": "1", "MLMESH_TRAINING_WARM": "0", "PYTHONPATH": str(site)}
    with running(tmp_path_factory.mktemp("training"), registry=registry, env=env) as running_now:
        yield running_now


@pytest.fixture
async def client(training: tuple[Process, str]) -> AsyncIterator[Client]:
    async with connected(training[1]) as opened:
        yield opened


async def test_recipes_and_data_sets_are_listed_with_all_that_is_known_of_them(client: Client) -> None:
    recipes = {each.name: each for each in (await client.stub.ListRecipes(pb.ListRecipesRequest())).recipes}
    assert list(recipes) == sorted(recipes)
    assert set(recipes) == {"cnn", "mlp", "regression", "tabular", "text", "threshold"}
    assert recipes["threshold"].distribution == "acme-recipes 1.2"
    assert recipes["cnn"].distribution.startswith("mlmesh ")
    assert recipes["cnn"].description.startswith("Convolutional")
    assert (recipes["regression"].task, recipes["regression"].dataset_kind) == (
        pb.TASK_REGRESSION,
        pb.DATASET_KIND_TABULAR,
    )
    assert (recipes["text"].task, recipes["text"].dataset_kind) == (pb.TASK_CLASSIFICATION, pb.DATASET_KIND_TEXT)
    logarithmic = {each.name for each in recipes["mlp"].hyperparameters if each.log_scale}
    assert logarithmic == {"batch_size", "learning_rate", "width"}
    datasets = {each.name: each for each in (await client.stub.ListDatasets(pb.ListDatasetsRequest())).datasets}
    assert list(datasets) == sorted(datasets)
    assert datasets["mnist"].kind == pb.DATASET_KIND_IMAGE
    assert list(datasets["mnist"].example_shape) == [1, 28, 28]
    assert list(datasets["iris"].classes) == ["setosa", "versicolor", "virginica"]
    assert list(datasets["diabetes"].classes) == []
    assert datasets["utterances"].distribution == "chatterbot-corpus"
    assert {name for recipe in recipes.values() for name in recipe.datasets} == {*datasets, "petals"}


async def test_a_recipe_of_another_distribution_is_trained_and_its_code_runs_in_the_trainer_alone(
    client: Client, training: tuple[Process, str], registry: str
) -> None:
    spec = pb.JobSpec(
        recipe="threshold",
        dataset="petals",
        hyperparameters={"epochs": 12.0},
        publication=pb.Publication(model="models/petals"),
    )
    events = await client.end((await client.create(spec)).name)
    job = last(events)
    assert job.state == SUCCEEDED, job.error
    assert job.evaluation.accuracy > 0.7
    printed = [event.log.message for event in events if event.HasField("log") and "acme loaded" in event.log.message]
    (line,) = printed
    assert int(line.rpartition(" ")[2]) != training[0].popen.pid
    async with registry_process.connected(registry) as reader:
        request = registry_pb2.GetModelVersionRequest(name=job.model_version)
        version = (await reader.stub.GetModelVersion(request)).model_version
        notice = next(each for each in version.artifacts if each.path == "acme/notice.txt")
        assert await reader.get(notice.blob) == b"made by Acme"
    assert version.labels["made_by"] == "acme"
    assert {each.path for each in version.artifacts} >= {
        "model.onnx",
        "plots/confusion_matrix.png",
        "plots/reliability.png",
        "plots/learning_curves.png",
    }
    assert version.signature.inputs[0].name == "row"
    assert version.metrics["latency_ms_batch_1"] > 0.0
    assert 0.0 <= version.metrics["expected_calibration_error"] <= 1.0


async def test_wrong_entry_points_were_told_in_the_log(client: Client, training: tuple[Process, str]) -> None:
    await client.stub.ListRecipes(pb.ListRecipesRequest())
    told = "\n".join(training[0].lines)
    assert re.search(r"a recipe is left out.*broken", told)
    assert re.search(r"a recipe is left out.*there is a recipe 'cnn'", told)


async def test_a_job_trains_on_the_version_that_an_alias_meant_and_says_so_in_its_lineage(
    client: Client, registry: str
) -> None:
    labels = {"kind": "tabular", "target": "price"}
    async with registry_process.connected(registry) as reader:
        version = await registered(reader, "houses", {"data.csv": houses()}, labels, aliases=["latest"])
        spec = pb.JobSpec(
            recipe="regression",
            dataset="models/houses/aliases/latest",
            hyperparameters={"epochs": 40.0, "learning_rate": 0.02},
            publication=pb.Publication(model="models/prices"),
        )
        accepted = await client.create(spec, request_id="houses-1")
        assert accepted.resolved_dataset == version == "models/houses/versions/1"
        again = await registered(reader, "houses", {"data.csv": houses(60)}, labels)
        alias = (
            await reader.stub.ListModelAliases(registry_pb2.ListModelAliasesRequest(parent="models/houses"))
        ).aliases[0]
        await reader.stub.SetModelAlias(
            registry_pb2.SetModelAliasRequest(name=alias.name, version=again, etag=alias.etag)
        )
        # The same request is the same job, wherever the alias points by now.
        assert (await client.create(spec, request_id="houses-1")).resolved_dataset == version
        events = await client.end(accepted.name)
        job = last(events)
        assert job.state == SUCCEEDED, job.error
        made = (
            await reader.stub.GetModelVersion(registry_pb2.GetModelVersionRequest(name=job.model_version))
        ).model_version
    assert job.evaluation.regression.r2 > 0.8
    assert not job.evaluation.HasField("calibration")
    assert [each.batch_size for each in job.evaluation.latency] == [1, 8, 32]
    assert (made.lineage.dataset, list(made.lineage.parents)) == (version, [version])
    assert made.metrics["r2"] == job.evaluation.regression.r2
    assert "accuracy" not in made.metrics
    assert {each.path for each in made.artifacts} >= {"plots/residuals.png", "statistics.json"}
    lines = [event.log.message for event in events if event.HasField("log")]
    assert any(line.startswith("data: 122 read") for line in lines)


async def test_a_data_set_that_is_not_there_or_of_another_kind_is_refused_when_the_job_comes(
    client: Client, registry: str
) -> None:
    async with registry_process.connected(registry) as reader:
        text = await registered(reader, "notes", {"data.jsonl": b'{"text": "a", "label": "b"}\n'}, {"kind": "text"})
    for dataset in ("models/nowhere/versions/1", text, "wine"):
        async with refused(InvalidInput, "UNKNOWN_DATASET"):
            await client.create(pb.JobSpec(recipe="regression", dataset=dataset))


async def test_without_the_registry_a_registered_data_set_can_be_asked_for_again(
    client: Client, registry_running: tuple[Process, str]
) -> None:
    # The last test here: nobody needs the registry any more.
    registry_running[0].popen.kill()
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await client.create(pb.JobSpec(recipe="regression", dataset="models/houses/versions/1"), "once")
    assert isinstance(mesh_error(raised.value), NotReady)
