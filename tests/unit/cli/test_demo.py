"""The demo's own parts: it must notice what goes wrong, or its claims are worth nothing."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import yaml
from typer.testing import CliRunner

from mlmesh_cli.app import app
from mlmesh_cli.config import CliSettings
from mlmesh_cli.connection import Connection
from mlmesh_cli.demo import director, shift, story, waterfall
from mlmesh_cli.demo.checks import Checks, checks_table
from mlmesh_cli.demo.tables import shift_table, traffic_table
from mlmesh_cli.demo.traffic import OpenStream, Phase, Traffic
from mlmesh_cli.errors import CliError
from mlmesh_cli.inferring import Query
from mlmesh_cli.options import OutputFormat
from mlmesh_cli.terminal import Terminal
from mlmesh_local.options import Options
from mlmesh_local.resources.parse import Document, load_resources, read_documents
from mlmesh_local.resources.resource_set import ResourceSet
from open_inference import grpc_service_pb2 as oip
from open_inference import grpc_service_pb2_grpc
from tests.support.cli import span
from tests.unit.cli.conftest import FakeMesh, abort, text_of

_YAML = sorted(Path(story.__file__).parent.glob("*.yaml"))
_ROOT = Path(__file__).parents[3]


def test_the_story_is_told_with_the_control_plane_that_was_chosen(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    started: list[Options] = []

    async def start(options: Options, **_more: Any) -> None:
        started.append(options)
        raise CliError("far enough")

    monkeypatch.setattr(director, "start", start)
    runner = CliRunner()
    runner.invoke(app, ["demo", "--state-dir", str(tmp_path), "--control-plane", "istiod", "--istiod", "a/program"])
    runner.invoke(app, ["demo", "--state-dir", str(tmp_path), "--gateway-address", "127.0.0.1:0"])
    assert [(one.control_plane, one.istiod, one.gateway_address) for one in started] == [
        ("istiod", "a/program", "none"),
        ("mlmesh", "", "127.0.0.1:0"),
    ]
    assert {one.state_dir for one in started} == {tmp_path}


def test_the_story_s_yaml_is_all_here() -> None:
    names = ["faults", "header", "split-0-100", "split-100-0", "split-50-50", "split-90-10"]
    assert [path.stem for path in _YAML] == names


@pytest.mark.parametrize("path", _YAML, ids=lambda path: path.stem)
def test_the_story_s_yaml_fits_the_default_mesh(path: Path) -> None:
    documents = read_documents([_ROOT / "manifests/base", _ROOT / "mesh/istio"])
    before = ResourceSet().apply(load_resources(documents)).resources
    changes = before.apply(load_resources([Document(source=str(path), text=path.read_text())])).changes
    assert [(change.kind, change.name) for change in changes] == [("VirtualService", "mlmesh/inference")]


def test_weights_are_what_the_file_is_called() -> None:
    for path in _YAML:
        if path.stem.startswith("split"):
            routes = yaml.safe_load(path.read_text())["spec"]["http"][-1]["route"]
            assert "-".join(["split", *(str(route["weight"]) for route in routes)]) == path.stem


def _answer(version: str, best: int = 0) -> oip.ModelInferResponse:
    response = oip.ModelInferResponse(model_version=version)
    response.outputs.add(name="y", datatype="FP32", shape=[1, 3])
    response.raw_output_contents.append(np.eye(3, dtype=np.float32)[best : best + 1].tobytes())
    return response


_QUERIES = [Query(request=oip.ModelInferRequest(model_name="m"), name="0", expected=0)]


async def test_traffic_counts_by_version_right_answers_and_failures(mesh: FakeMesh) -> None:
    numbers = iter(range(10_000))

    def infer(_request: Any, context: Any) -> oip.ModelInferResponse:
        number = next(numbers)
        if number % 10 == 9:
            abort(context, grpc.StatusCode.UNAVAILABLE, "gone")
        return _answer("2" if number % 2 else "1", best=0 if number % 2 else 1)

    mesh.inference["ModelInfer"] = infer
    async with grpc.aio.insecure_channel(mesh.environ["MLMESH_INFERENCE_TARGET"]) as channel:
        traffic = Traffic(grpc_service_pb2_grpc.GRPCInferenceServiceStub(channel), _QUERIES, concurrency=3)
        phase = await traffic.run(Phase(name="a", target=100, share=0.5))
    assert 100 <= phase.requests < 110
    assert len(phase.failures) == phase.requests // 10
    assert phase.failures[0] == "UNAVAILABLE: gone"
    assert 0.4 < phase.observed("2") < 0.5
    assert phase.right["1"] == 0
    assert phase.right["2"] == phase.answers["2"]
    assert traffic.requests == phase.requests == len(phase.latencies_s)
    assert f"{len(phase.failures)}" in text_of(shift_table([phase], ("1", "2")))
    assert "a" in text_of(traffic_table([phase, Phase(name="empty")]))


async def test_requests_belong_to_the_phase_in_which_they_were_sent(mesh: FakeMesh) -> None:
    mesh.inference["ModelInfer"] = lambda _request, _context: _answer("1")
    async with grpc.aio.insecure_channel(mesh.environ["MLMESH_INFERENCE_TARGET"]) as channel:
        traffic = Traffic(grpc_service_pb2_grpc.GRPCInferenceServiceStub(channel), _QUERIES, concurrency=2)
        first, second = Phase(name="first", target=20), Phase(name="second", target=30)
        async with traffic.running(first):
            await traffic.reached(first)
            traffic.begin(second)
            await traffic.reached(second)
    assert 20 <= first.requests <= 24
    assert 30 <= second.requests <= 34
    assert traffic.requests == len(mesh.inference.requests["ModelInfer"])


async def _stream(mesh: FakeMesh, reached: threading.Event) -> OpenStream:
    """A stream that is finished once the server has seen enough."""
    async with grpc.aio.insecure_channel(mesh.environ["MLMESH_INFERENCE_TARGET"]) as channel:
        stream = OpenStream(grpc_service_pb2_grpc.GRPCInferenceServiceStub(channel), _QUERIES)
        async with asyncio.TaskGroup() as group:
            group.create_task(stream.run())
            assert await asyncio.to_thread(reached.wait, 10)
            stream.finish()
    return stream


async def test_an_open_stream_that_lives_has_all_its_answers(mesh: FakeMesh) -> None:
    reached = threading.Event()

    def serve(requests: Any, _context: Any) -> Iterator[oip.ModelStreamInferResponse]:
        for number, _ in enumerate(requests):
            if number == 4:
                reached.set()
            yield oip.ModelStreamInferResponse(infer_response=_answer("1"))

    mesh.inference["ModelStreamInfer"] = serve
    stream = await _stream(mesh, reached)
    assert stream.error == ""
    assert stream.answers["1"] >= 5


async def test_a_stream_that_is_cut_is_noticed(mesh: FakeMesh) -> None:
    reached = threading.Event()

    def serve(requests: Any, context: Any) -> Iterator[oip.ModelStreamInferResponse]:
        for number, _ in enumerate(requests):
            if number == 2:
                reached.set()
                abort(context, grpc.StatusCode.UNAVAILABLE, "drained")
            yield oip.ModelStreamInferResponse(infer_response=_answer("1"))

    mesh.inference["ModelStreamInfer"] = serve
    stream = await _stream(mesh, reached)
    assert stream.error == "UNAVAILABLE: drained"


def _story(mesh: FakeMesh) -> story.Story:
    settings = CliSettings()
    connection = Connection(state_dir=mesh.state_dir, settings=settings)
    return story.Story(terminal=Terminal(OutputFormat.TABLE), connection=connection, scale=story.FULL)


def _phase(name: str, *, first: int, second: int, share: float, failures: int = 0) -> Phase:
    phase = Phase(name=name, share=share, failures=["UNAVAILABLE: x"] * failures)
    phase.answers.update({"1": first, "2": second})
    return phase


@pytest.mark.parametrize(
    ("second", "failures", "error", "versions", "broken"),
    [
        (320, 0, "", {"1": 9}, []),
        (320, 1, "", {"1": 9}, ["no request failed"]),
        (430, 0, "", {"1": 9}, ["observed share"]),
        (320, 0, "UNAVAILABLE: cut", {"1": 9}, ["open stream"]),
        (320, 0, "", {"1": 9, "2": 1}, ["open stream"]),
    ],
    ids=["all well", "one failure", "wrong share", "stream cut", "stream moved"],
)
def test_the_shift_is_judged_by_what_happened(
    mesh: FakeMesh, second: int, failures: int, error: str, versions: dict[str, int], broken: list[str]
) -> None:
    told = _story(mesh)
    phases = [
        _phase("100/0", first=1200, second=0, share=0.0),
        _phase("90/10", first=3200 - second, second=second, share=0.1, failures=failures),
        _phase("0/100", first=0, second=1200, share=1.0),
    ]
    stub: Any = None
    traffic, stream = Traffic(stub, _QUERIES, concurrency=1), OpenStream(stub, _QUERIES)
    traffic.phases, stream.error = phases, error
    stream.answers.update(versions)
    shift._judge_shift(told, traffic, stream, phases, rotated=7)
    failed = [check.claim for check in told.checks.failed]
    assert len(failed) == len(broken)
    assert all(part in claim for part, claim in zip(broken, failed, strict=True))


def test_too_few_requests_are_no_proof(mesh: FakeMesh) -> None:
    told = _story(mesh)
    stub: Any = None
    traffic, stream = Traffic(stub, _QUERIES, concurrency=1), OpenStream(stub, _QUERIES)
    traffic.phases = [_phase("90/10", first=90, second=10, share=0.1)]
    stream.answers.update({"1": 1})
    shift._judge_shift(told, traffic, stream, traffic.phases, rotated=7)
    assert [check.claim for check in told.checks.failed] == ["no request failed while traffic moved"]


def test_the_default_story_is_as_large_as_promised() -> None:
    assert story.FULL.requests >= 5000
    assert story.FULL.share_tolerance == 0.02
    # Four standard deviations of a tenth over so many requests stay within the tolerance... nearly.
    deviation = (0.1 * 0.9 / story.FULL.during) ** 0.5
    assert 3.5 * deviation < story.FULL.share_tolerance


def test_missing_spans_are_named() -> None:
    whole = [
        span("root", service="mlmesh-cli"),
        span("out", service="toolbox.mlmesh", kind="client"),
        span("in", service="inference.mlmesh", kind="server"),
        *(span(name, service="inference") for name in ("queue", "batch", "engine")),
    ]
    assert waterfall.missing_spans(whole) == []
    assert waterfall.missing_spans(whole[1:]) == ["the client"]
    assert waterfall.missing_spans([whole[0], *whole[2:5]]) == ["the client's sidecar", "engine"]


def test_a_claim_that_did_not_hold_stands_out() -> None:
    checks = Checks()
    assert checks.add("holds", True)
    assert not checks.add("breaks", False, "1 of 2")
    assert checks.as_dict()["held"] is False
    text = text_of(checks_table(checks))
    assert "✓   holds" in text
    assert "✗   breaks   1 of 2" in text
