"""Each command against a mesh of canned answers: what it sends, prints, and exits with."""

from __future__ import annotations

import json
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import typer.main
from typer.testing import CliRunner

from mlmesh.local.v1 import local_pb2 as local
from mlmesh.registry.v1 import registry_pb2 as registry
from mlmesh.training.v1 import training_pb2 as training
from mlmesh_cli.app import app
from open_inference import grpc_service_pb2 as oip
from tests.support.cli import at, span
from tests.unit.cli.conftest import FakeMesh, abort


def _commands(command: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    children = getattr(command, "commands", {})
    if not children or getattr(command, "invoke_without_command", False):
        yield path, command
    for name, child in children.items():
        yield from _commands(child, (*path, name))


_ALL = list(_commands(typer.main.get_command(app)))


def test_every_command_of_the_issue_is_here() -> None:
    names = {path[0] for path, _ in _ALL}
    assert names == {
        "metrics", "init", "up", "down", "status", "apply", "demo", "train",
        "studies", "jobs", "models", "datasets", "infer", "routes", "traces", "certs",
        "quota", "audit", "optimize", "streams", "engines", "translate", "explain", "diff",
        "chaos", "delete", "config", "doctor", "analyze", "conditions", "xds",
    }  # fmt: skip


@pytest.mark.parametrize(("path", "command"), _ALL, ids=[" ".join(path) for path, _ in _ALL])
def test_every_command_has_examples_and_json_output(path: tuple[str, ...], command: Any) -> None:
    assert "Examples" in command.help
    assert f"mlmesh {path[0]}" in command.help
    options = {option for parameter in command.params for option in parameter.opts}
    assert {"--output", "-o"} <= options
    result = CliRunner().invoke(app, [*path, "--help"])
    assert result.exit_code == 0


def test_examples_name_only_commands_and_options_that_exist() -> None:
    for path, command in _ALL:
        for line in command.help.splitlines():
            words = line.split("|")[0].split()
            if words[:1] != ["mlmesh"]:
                continue
            found = [c for p, c in _ALL if tuple(words[1 : 1 + len(p)]) == p]
            assert found, f"{path}: {line}"
            parameters = found[-1].params
            known = {option for each in parameters for option in (*each.opts, *each.secondary_opts)}
            for word in words:
                assert not word.startswith("-") or word in known, f"{path}: {word}"


@pytest.mark.parametrize("command", ["status", "routes", "certs list", "traces list", "apply -f x.yaml", "train list"])
def test_without_a_mesh_it_says_how_to_start_one(tmp_path: Path, command: str, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    Path("x.yaml").write_text("kind: x")
    result = CliRunner().invoke(app, [*command.split(), "--state-dir", "none"])
    assert result.exit_code == 3
    assert "no mesh is running here" in result.stderr
    assert "mlmesh up" in result.stderr


def test_a_socket_that_nobody_serves_is_no_mesh_either(tmp_path: Path) -> None:
    (tmp_path / "control.sock").touch()
    result = CliRunner().invoke(app, ["status", "--state-dir", str(tmp_path)])
    assert result.exit_code == 3


def test_down_without_a_mesh_is_fine(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["down", "--state-dir", str(tmp_path / "none")])
    assert result.exit_code == 0
    assert "no mesh is running" in result.stdout


def test_status_as_table_and_as_json(mesh: FakeMesh) -> None:
    assert "inference-v1-0" in mesh.run("status").stdout
    status = json.loads(mesh.run("status", "--window", "10", "-o", "json").stdout)
    assert status["ready"] is True
    assert status["instances"][0]["certificate_expire_time"] == "2026-03-02T11:00:00Z"
    assert mesh.local.requests["GetStatus"][-1].share_window.seconds == 10


def test_status_watch_is_one_json_object_a_line_and_ends_with_the_mesh(mesh: FakeMesh) -> None:
    ready = local.WatchStatusResponse(status=local.MeshStatus(ready=True))
    mesh.local["WatchStatus"] = lambda _request, _context: iter([ready, ready])
    result = mesh.run("status", "--watch", "-o", "json")
    assert [json.loads(line)["ready"] for line in result.stdout.splitlines()] == [True, True]
    assert result.exit_code == 3
    assert json.loads(result.stderr)["error"]["reason"] == "MESH_ENDED"


def test_apply_sends_files_with_their_names(mesh: FakeMesh, tmp_path: Path) -> None:
    path = tmp_path / "vs.yaml"
    path.write_text("kind: VirtualService")
    response = local.ApplyResponse(config_version="8", acked_sidecars=2, connected_sidecars=2)
    response.changes.add(kind="VirtualService", name="mlmesh/inference", action="configured")
    mesh.local["Apply"] = lambda _request, _context: response
    result = mesh.run("apply", "-f", str(path), "--dry-run", "--prune")
    assert result.exit_code == 0, result.stderr
    assert "configured (dry run)" in result.stdout
    (request,) = mesh.local.requests["Apply"]
    assert [(d.source, d.yaml) for d in request.documents] == [(str(path), "kind: VirtualService")]
    assert request.dry_run
    assert request.prune


def test_a_refused_file_is_told_with_its_line_and_field(mesh: FakeMesh, tmp_path: Path) -> None:
    path = tmp_path / "vs.yaml"
    path.write_text("kind: VirtualService")
    where = f"{path}:12: spec.http[0].route[1].destination.subset"
    mesh.local["Apply"] = lambda _request, context: abort(
        context,
        grpc.StatusCode.INVALID_ARGUMENT,
        f"{where}: no subset 'v3'",
        reason="INVALID_RESOURCE",
    )
    result = mesh.run("apply", str(path))
    assert result.exit_code == 1
    assert f"{where}: no subset 'v3'" in result.stderr.replace("\n", "")
    assert "nothing was changed" in result.stderr


@pytest.mark.parametrize("text", ["", "# nothing\n---\n", "{apiVersion: v1, kind: List, items: []}"])
def test_apply_of_empty_files_is_no_success(mesh: FakeMesh, tmp_path: Path, text: str) -> None:
    path = tmp_path / "empty.yaml"
    path.write_text(text)
    result = mesh.run("apply", "-f", str(path))
    assert result.exit_code == 1
    assert "no objects passed to apply" in result.stderr
    assert "Apply" not in mesh.local.requests


def test_apply_of_nothing_is_wrong_usage(mesh: FakeMesh) -> None:
    assert mesh.run("apply").exit_code == 2
    assert "Apply" not in mesh.local.requests


def test_routes_of_a_short_name(mesh: FakeMesh) -> None:
    mesh.local["ListRoutes"] = lambda _request, _context: local.ListRoutesResponse()
    assert mesh.run("routes", "inference", "--window", "5").exit_code == 0
    (request,) = mesh.local.requests["ListRoutes"]
    assert request.host == "inference.mlmesh.svc.cluster.local"
    assert request.share_window.seconds == 5


def test_traces_are_shown_by_id_or_as_the_latest(mesh: FakeMesh) -> None:
    response = local.GetTraceResponse(trace_id="ab" * 16, spans=[span("client")])
    mesh.local["GetTrace"] = lambda _request, _context: response
    assert "client" in mesh.run("traces", "show").stdout
    assert json.loads(mesh.run("traces", "show", "ab" * 16, "-o", "json").stdout)["trace_id"] == "ab" * 16
    assert [request.trace_id for request in mesh.local.requests["GetTrace"]] == ["latest", "ab" * 16]
    assert mesh.run("traces", "show", "nonsense").exit_code == 2


def test_an_issued_key_is_for_its_owner_only(mesh: FakeMesh, tmp_path: Path) -> None:
    mesh.local["IssueCertificate"] = lambda _request, _context: local.IssueCertificateResponse(
        certificate_chain_pem="CHAIN",
        private_key_pem="KEY",
        trust_bundle_pem="CA",
        identity="spiffe://cluster.local/ns/mlmesh/sa/operator",
        expire_time=at(3600),
    )
    folder = tmp_path / "c"
    folder.mkdir()
    (folder / "key.pem").write_text("old, readable by all")
    result = mesh.run("certs", "issue", "--to", str(folder), "--ttl", "0.5")
    assert result.exit_code == 0, result.stderr
    assert stat.S_IMODE((folder / "key.pem").stat().st_mode) == 0o600
    assert [(folder / f"{name}.pem").read_text() for name in ("cert", "key", "ca")] == ["CHAIN", "KEY", "CA"]
    assert "grpcurl" in result.stdout
    assert "127.0.0.1:8443 list" in result.stdout
    assert mesh.local.requests["IssueCertificate"][0].ttl.seconds == 1800


def test_certificates_are_listed_and_rotated(mesh: FakeMesh) -> None:
    listed = json.loads(mesh.run("certs", "list", "-o", "json").stdout)
    assert listed["certificates"][0]["serial"] == "0a1b2c"
    mesh.local["RotateCertificates"] = lambda _request, _context: local.RotateCertificatesResponse(rotated=6)
    assert "6 certificates rotated" in mesh.run("certs", "rotate").stdout


def test_a_new_root_is_told_step_by_step(mesh: FakeMesh) -> None:
    def rotate(_request: Any, _context: Any) -> Iterator[local.RotateRootResponse]:
        for step in ("a new root is made", "the old root is trusted no more"):
            yield local.RotateRootResponse(message=step)

    mesh.local["RotateRoot"] = rotate
    result = mesh.run("certs", "rotate-root", "--now", "-o", "json")
    assert json.loads(result.stdout)["steps"] == ["a new root is made", "the old root is trusted no more"]
    assert mesh.local.requests["RotateRoot"][0].now
    assert "a new root is made" in mesh.run("certs", "rotate-root").stdout


def test_the_bundle_is_shown_in_both_forms(mesh: FakeMesh, tmp_path: Path) -> None:
    response = local.GetTrustBundleResponse(trust_domain="cluster.local", pem="PEM\n", spiffe_json="{}\n", phase="IDLE")
    mesh.local["GetTrustBundle"] = lambda _request, _context: response
    assert mesh.run("certs", "bundle").stdout == "PEM\n"
    assert mesh.run("certs", "bundle", "--spiffe").stdout == "{}\n"
    assert mesh.run("certs", "bundle", "--to", str(tmp_path / "ca.pem")).exit_code == 0
    assert (tmp_path / "ca.pem").read_text() == "PEM\n"
    assert json.loads(mesh.run("certs", "bundle", "-o", "json").stdout)["phase"] == "IDLE"


def _train(mesh: FakeMesh, state: training.JobState.ValueType, error: str = "") -> None:
    def create(request: training.CreateJobRequest, _context: Any) -> training.CreateJobResponse:
        return training.CreateJobResponse(job=training.Job(name="jobs/1", spec=request.spec))

    def watch(_request: Any, _context: Any) -> Iterator[training.WatchJobResponse]:
        yield training.WatchJobResponse(sequence=1, job=training.Job(name="jobs/1", state=training.JOB_STATE_RUNNING))
        last = training.Job(name="jobs/1", state=state, error=error, model_version="models/mnist/versions/1")
        last.evaluation.accuracy = 0.9
        yield training.WatchJobResponse(sequence=2, job=last)

    mesh.training["CreateJob"], mesh.training["WatchJob"] = create, watch


def test_train_submits_watches_and_shows_the_evaluation(mesh: FakeMesh) -> None:
    _train(mesh, training.JOB_STATE_SUCCEEDED)
    result = mesh.run("train", "--recipe", "cnn", "--set", "epochs=2", "--alias", "canary", "--seed", "3")
    assert result.exit_code == 0, result.stderr
    assert "registered as models/mnist/versions/1" in result.stdout
    assert "90.0 %" in result.stdout
    spec = mesh.training.requests["CreateJob"][0].spec
    assert (spec.recipe, spec.dataset, spec.seed) == ("cnn", "mnist", 3)
    assert dict(spec.hyperparameters) == {"epochs": 2}
    assert (spec.publication.model, list(spec.publication.aliases)) == ("models/mnist", ["canary"])


def test_train_json_is_the_events_one_a_line(mesh: FakeMesh) -> None:
    _train(mesh, training.JOB_STATE_SUCCEEDED)
    result = mesh.run("train", "--no-publish", "-o", "json")
    assert [json.loads(line)["sequence"] for line in result.stdout.splitlines()] == ["1", "2"]
    assert not mesh.training.requests["CreateJob"][0].spec.HasField("publication")


def test_a_failed_job_fails_the_command(mesh: FakeMesh) -> None:
    _train(mesh, training.JOB_STATE_FAILED, "out of memory")
    result = mesh.run("train")
    assert result.exit_code == 1
    assert "jobs/1 failed: out of memory" in result.stderr


def test_options_override_the_job_file(mesh: FakeMesh, tmp_path: Path) -> None:
    _train(mesh, training.JOB_STATE_SUCCEEDED)
    path = tmp_path / "job.json"
    path.write_text('{"recipe": "mlp", "dataset": "digits", "hyperparameters": {"epochs": 9, "width": 4}}')
    assert mesh.run("train", "--job", str(path), "--set", "epochs=1", "--detach").exit_code == 0
    spec = mesh.training.requests["CreateJob"][0].spec
    assert (spec.recipe, spec.publication.model) == ("mlp", "models/digits")
    assert dict(spec.hyperparameters) == {"epochs": 1, "width": 4}
    assert "WatchJob" not in mesh.training.requests


def test_jobs_are_listed_and_cancelled(mesh: FakeMesh) -> None:
    job = training.Job(name="jobs/1", state=training.JOB_STATE_CANCELLING)
    mesh.training["ListJobs"] = lambda _request, _context: training.ListJobsResponse(jobs=[job])
    mesh.training["CancelJob"] = lambda _request, _context: training.CancelJobResponse(job=job)
    assert "cancelling" in mesh.run("train", "list", "-n", "3").stdout
    assert mesh.training.requests["ListJobs"][0].page_size == 3
    assert mesh.run("train", "cancel", "1").exit_code == 0
    assert mesh.training.requests["CancelJob"][0].name == "jobs/1"


def test_models_are_listed_over_all_pages(mesh: FakeMesh) -> None:
    def models(request: registry.ListModelsRequest, _context: Any) -> registry.ListModelsResponse:
        if request.page_token:
            return registry.ListModelsResponse(models=[registry.Model(name="models/b")])
        return registry.ListModelsResponse(models=[registry.Model(name="models/a")], next_page_token="2")

    mesh.registry["ListModels"] = models
    mesh.registry["ListModelAliases"] = lambda _request, _context: registry.ListModelAliasesResponse()
    found = json.loads(mesh.run("models", "list", "-o", "json").stdout)
    assert [model["name"] for model in found["models"]] == ["models/a", "models/b"]


def test_an_alias_is_moved_with_the_etag_read_just_before(mesh: FakeMesh) -> None:
    present = registry.ModelAlias(name="models/m/aliases/stable", version="models/m/versions/1", etag="e1")
    mesh.registry["ListModelAliases"] = lambda _request, _context: registry.ListModelAliasesResponse(aliases=[present])
    mesh.registry["SetModelAlias"] = lambda request, _context: registry.SetModelAliasResponse(
        alias=registry.ModelAlias(name=request.name, version=request.version, etag="e2")
    )
    assert mesh.run("models", "alias", "set", "m", "stable", "2").exit_code == 0
    assert mesh.run("models", "alias", "set", "m", "new", "2").exit_code == 0
    assert mesh.run("models", "alias", "set", "m", "stable", "2", "--etag", "mine").exit_code == 0
    sent = [(request.name, request.version, request.etag) for request in mesh.registry.requests["SetModelAlias"]]
    assert sent == [
        ("models/m/aliases/stable", "models/m/versions/2", "e1"),
        ("models/m/aliases/new", "models/m/versions/2", ""),
        ("models/m/aliases/stable", "models/m/versions/2", "mine"),
    ]


def test_a_lost_compare_and_set_says_to_read_again(mesh: FakeMesh) -> None:
    mesh.registry["ListModelAliases"] = lambda _request, _context: registry.ListModelAliasesResponse()
    mesh.registry["SetModelAlias"] = lambda _request, context: abort(
        context, grpc.StatusCode.ABORTED, "it moved on", reason="ETAG_MISMATCH"
    )
    result = mesh.run("models", "alias", "set", "m", "stable", "2")
    assert result.exit_code == 1
    assert "mlmesh models show" in result.stderr


def _serve_model(mesh: FakeMesh, *, version: str = "1") -> None:
    described = oip.ModelMetadataResponse(name="digits", versions=[version])
    described.inputs.add(name="image", datatype="FP32", shape=[-1, 1, 8, 8])

    def answer(request: oip.ModelInferRequest) -> oip.ModelInferResponse:
        response = oip.ModelInferResponse(model_name="digits", model_version=version, id=request.id)
        response.outputs.add(name="logits", datatype="FP32", shape=[1, 10])
        logits = np.zeros((1, 10), dtype=np.float32)
        logits[0, 7] = 9
        response.raw_output_contents.append(logits.tobytes())
        return response

    def stream(requests: Any, _context: Any) -> Iterator[oip.ModelStreamInferResponse]:
        for request in requests:
            yield oip.ModelStreamInferResponse(infer_response=answer(request))

    mesh.inference["ModelMetadata"] = lambda _request, _context: described
    mesh.inference["ModelInfer"] = lambda request, _context: answer(request)
    mesh.inference["ModelStreamInfer"] = stream


def test_infer_sends_images_and_tells_who_answered(mesh: FakeMesh) -> None:
    _serve_model(mesh)
    result = mesh.run("infer", "digits", "--index", "7", "--count", "3")
    assert result.exit_code == 0, result.stderr
    sent = mesh.inference.requests["ModelInfer"]
    assert len(sent) == 3
    assert list(sent[0].inputs[0].shape) == [1, 1, 8, 8]
    assert len(sent[0].raw_input_contents[0]) == 64 * 4
    assert not sent[0].model_version, "the mesh chooses the version"
    assert "digits 7" in result.stdout
    assert "✓" in result.stdout
    assert "66.7 %" in result.stdout


@pytest.mark.parametrize("way", [[], ["--stream"]])
def test_infer_json_is_an_answer_a_line_in_order(mesh: FakeMesh, way: list[str]) -> None:
    _serve_model(mesh, version="4")
    result = mesh.run("infer", "digits", "--count", "20", "-o", "json", *way)
    answers = [json.loads(line) for line in result.stdout.splitlines()]
    assert [(a["version"], a["predicted"]) for a in answers] == [("4", 7)] * 20
    assert len({a["name"] for a in answers}) == 20
    assert answers[0]["confidence"] > 0.99


def test_infer_sends_headers_and_a_version(mesh: FakeMesh) -> None:
    _serve_model(mesh)
    seen: list[dict[str, Any]] = []
    answer = mesh.inference._answers["ModelInfer"]

    def infer(request: Any, context: Any) -> Any:
        seen.append(dict(context.invocation_metadata()))
        return answer(request, context)

    mesh.inference["ModelInfer"] = infer
    assert mesh.run("infer", "digits/2", "--header", "X-User=ada").exit_code == 0
    assert seen[0]["x-user"] == "ada"
    assert mesh.inference.requests["ModelInfer"][0].model_version == "2"


def test_failed_requests_fail_the_command_but_all_are_sent(mesh: FakeMesh) -> None:
    _serve_model(mesh)
    answer = mesh.inference._answers["ModelInfer"]

    def infer(request: Any, context: Any) -> Any:
        if len(mesh.inference.requests["ModelInfer"]) == 2:
            abort(context, grpc.StatusCode.UNAVAILABLE, "fault filter abort")
        return answer(request, context)

    mesh.inference["ModelInfer"] = infer
    result = mesh.run("infer", "digits", "--count", "4")
    assert result.exit_code == 1
    assert len(mesh.inference.requests["ModelInfer"]) == 4
    assert "1 of 4 requests failed, the first with UNAVAILABLE: fault filter abort" in result.stderr


def test_infer_sends_a_file(mesh: FakeMesh, tmp_path: Path) -> None:
    _serve_model(mesh)
    np.save(tmp_path / "x.npy", np.ones(64))
    assert mesh.run("infer", "digits", "--input", str(tmp_path / "x.npy")).exit_code == 0
    sent = mesh.inference.requests["ModelInfer"][0]
    assert np.frombuffer(sent.raw_input_contents[0], np.float32).tolist() == [1.0] * 64


def test_a_stream_that_ends_early_goes_on(mesh: FakeMesh) -> None:
    _serve_model(mesh)
    whole = mesh.inference._answers["ModelStreamInfer"]
    connections = 0

    def stream(requests: Any, context: Any) -> Iterator[Any]:
        nonlocal connections
        connections += 1
        for number, response in enumerate(whole(requests, context)):
            if number == 2:
                return
            yield response

    mesh.inference["ModelStreamInfer"] = stream
    result = mesh.run("infer", "digits", "--stream", "--count", "5", "-o", "json")
    assert result.exit_code == 0, result.stderr
    assert len(result.stdout.splitlines()) == 5
    assert connections == 3


def test_a_stream_that_is_refused_is_a_failure(mesh: FakeMesh) -> None:
    _serve_model(mesh)
    mesh.inference["ModelStreamInfer"] = lambda _requests, context: abort(
        context, grpc.StatusCode.PERMISSION_DENIED, "RBAC: access denied"
    )
    result = mesh.run("infer", "digits", "--stream", "--count", "5")
    assert result.exit_code == 1
    assert "PERMISSION_DENIED: RBAC: access denied" in result.stderr


def test_services_are_called_through_the_sidecar_of_the_toolbox(mesh: FakeMesh) -> None:
    # Nothing listens there: what matters is where the command went.
    mesh.environ = {}
    result = mesh.run("models", "list")
    assert result.exit_code == 1
    assert "127.64.3.2:9000" in result.stderr


def test_init_says_what_it_wrote(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["init", str(tmp_path), "-o", "json"])
    assert str(tmp_path / "mesh/istio/virtualservice.yaml") in json.loads(result.stdout)["written"]
    assert CliRunner().invoke(app, ["init", str(tmp_path)]).exit_code == 0


def test_version() -> None:
    assert CliRunner().invoke(app, ["--version"]).stdout.startswith("mlmesh 0.")
