"""Steps 1 to 3: the mesh is up, two models are trained and registered, inference has loaded them."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime

import grpc

from mlmesh.inference.v1 import control_pb2, control_pb2_grpc
from mlmesh.local.v1 import local_pb2
from mlmesh.registry.v1 import registry_pb2
from mlmesh.training.v1 import training_pb2
from mlmesh_cli.demo.story import Story
from mlmesh_cli.demo.tables import served_table
from mlmesh_cli.errors import CliError
from mlmesh_cli.jobs import follow, submit
from mlmesh_cli.names import ModelReference
from mlmesh_cli.progress import JobProgress
from mlmesh_cli.queries import queries_for
from mlmesh_cli.render import text as t
from mlmesh_cli.render.models import versions_table
from mlmesh_cli.render.status import status_view
from mlmesh_cli.render.training import job_view

_LOAD_S = 60.0
_QUERIES = 1000
_SEE_LOG = "its log, in the state folder under logs/, tells more"


async def show_mesh(story: Story) -> None:
    """Step 1: what runs."""
    status = await story.connection.status()
    story.show(status_view(status, datetime.now(UTC)))
    with_sidecar = sum(1 for i in status.instances if i.sidecar_pid)
    story.check(
        "every process runs behind an Envoy of its own with a certificate",
        status.ready and with_sidecar == len(status.instances),
        f"{len(status.instances)} instances, {len({i.identity for i in status.instances})} identities",
    )


async def train_two(story: Story) -> None:
    """Step 2: a weak model becomes stable, a better one canary."""
    first = await _train(story, "a small CNN", story.scale.first, "stable")
    second = await _train(story, "a wider CNN", story.scale.second, "canary")
    story.versions = (t.last(first.model_version), t.last(second.model_version))
    accuracies = (first.evaluation.accuracy, second.evaluation.accuracy)
    detail = f"{t.percent(accuracies[0])} → {t.percent(accuracies[1])} on {second.evaluation.examples} unseen images"
    story.check("the second model is better than the first", accuracies[1] > accuracies[0], detail)
    differences = max(first.evaluation.export_max_abs_diff, second.evaluation.export_max_abs_diff)
    story.check(
        "the ONNX files answer as the trained models do", differences < 1e-2, f"max |difference| {differences:.1e}"
    )


async def _train(story: Story, what: str, settings: dict[str, float], alias: str) -> training_pb2.Job:
    stub = await story.connection.training()
    spec = training_pb2.JobSpec(recipe="cnn", dataset=story.scale.dataset, hyperparameters=settings, seed=7)
    spec.publication.model = f"models/{story.model}"
    spec.publication.aliases.append(alias)
    spec.publication.description = what
    created = await submit(stub, spec)
    last = created
    terminal = story.terminal
    with JobProgress(terminal.err if terminal.json else terminal.out, what) as progress:
        async for event in follow(stub, created.name):
            progress.update(event)
            if event.HasField("job"):
                last = event.job
    story.show(job_view(last))
    if last.state != training_pb2.JOB_STATE_SUCCEEDED:
        raise CliError(f"training failed: {last.error}", "the log of `training` in the state folder tells more")
    return last


async def wait_for_versions(story: Story) -> None:
    """Step 3: inference loads what the registry's watch told it to; nobody restarts anything."""
    status = await story.connection.status()
    replicas = [i for i in status.instances if i.labels.get("app") == "inference"]
    number = {"v1": story.versions[0], "v2": story.versions[1]}
    async with asyncio.timeout(_LOAD_S):
        rows = await asyncio.gather(*(_loaded(i, story.model, number[i.labels["version"]]) for i in replicas))
    registry = await story.connection.registry()
    listed = await registry.ListModelVersions(registry_pb2.ListModelVersionsRequest(parent=f"models/{story.model}"))
    story.show(versions_table(listed.model_versions, datetime.now(UTC)), served_table(rows))
    story.check(
        "each subset serves its alias: v1 stable, v2 canary",
        len(rows) == len(replicas),
        f"{len(rows)} replicas ready",
    )
    stub = await story.connection.inference()
    reference = ModelReference(model=story.model)
    story.queries = await queries_for(
        stub, reference, (), start=0, count=_QUERIES, dataset=story.scale.dataset, input_file=None
    )


async def _loaded(instance: local_pb2.Instance, model: str, number: str) -> tuple[str, control_pb2.ServedVersion]:
    """Waits until a replica serves a version. Asked at the process itself: a route leads to one subset only."""
    wanted = f"models/{model}/versions/{number}"
    async with grpc.aio.insecure_channel(instance.application_address) as channel:
        stub = control_pb2_grpc.InferenceControlServiceStub(channel)
        request = control_pb2.WatchServedVersionsRequest(parent=f"models/{model}")
        async for event in stub.WatchServedVersions(request, timeout=_LOAD_S):
            served = event.served_version
            if served.name != wanted:
                continue
            if served.state == control_pb2.SERVED_STATE_READY:
                return instance.name, served
            if served.state == control_pb2.SERVED_STATE_FAILED:
                raise CliError(
                    f"{instance.name} could not load {wanted}: {served.error}", "see its log in the state folder"
                )
    raise CliError(f"{instance.name} did not load {wanted}", "see its log in the state folder")
