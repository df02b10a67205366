"""KServe's client and MLServer's stubs, each in an environment of its own and unchanged, on one port with Triton's."""

from __future__ import annotations

import contextlib
import itertools
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from mlmesh_inference.config import ProtocolSettings
from open_inference import grpc_service_pb2 as pb
from open_inference import grpc_service_pb2_grpc as stubs
from tests.support.oip_server import TRANSPORTS, available, foreign, oip_server, usable

SUM = [[n + 3 for n in range(16)]]
DIFFERENCE = [[n - 3 for n in range(16)]]
METADATA = [["INPUT0", "INT32", [-1, 16]], ["INPUT1", "INT32", [-1, 16]]]


@pytest.fixture(params=TRANSPORTS)
def transport(request: pytest.FixtureRequest) -> str:
    return usable(request.param)


@contextlib.asynccontextmanager
async def servers(root: Path, *dialects: str) -> AsyncIterator[dict[str, str]]:
    """A server of every transport and dialect, by address: one process of a client, slow to start, sees all."""
    here = [name for name in TRANSPORTS if available(name)]
    async with contextlib.AsyncExitStack() as stack:
        found = {}
        for transport, dialect in itertools.product(here, dialects):
            protocol = ProtocolSettings(dialect=dialect)
            folder = root / f"{transport}-{dialect}"
            server = await stack.enter_async_context(oip_server(folder, transport=transport, protocol=protocol))
            found[server.address] = dialect
        yield found


async def test_kserves_client(tmp_path: Path) -> None:
    async with servers(tmp_path, "triton") as found:
        lines = (await foreign("kserve", "kserve_client.py", *found)).splitlines()
    assert len(lines) == len(found)
    for line in lines:
        kserve_saw(json.loads(line))


def kserve_saw(told: dict[str, Any]) -> None:
    assert [told[name] for name in ("live", "ready", "model_ready", "unknown_ready")] == [True, True, True, False]
    for raw in (False, True):
        answer = {"id": "k1", "model": "simple", "version": "1", "sum": SUM, "difference": DIFFERENCE}
        assert told[f"infer_{raw}"] == answer
    assert told["infer_unknown"] == ["NOT_FOUND", "Request for unknown model: 'nobody' is not found"]
    assert told["metadata"] == METADATA
    assert told["server"] == "mlmesh"
    assert told["unload"] == ["simple", True]
    assert not told["after_unload"]
    assert told["load"] == ["simple", True]
    assert told["after_load"]
    assert told["load_unknown"] == ["NOT_FOUND", "failed to load 'nobody', failed to poll from model repository"]
    assert told["unload_unknown"][0] == "NOT_FOUND"
    assert told["path"][0] == "INVALID_ARGUMENT"
    assert told["nothing"][0] == "INVALID_ARGUMENT"


async def test_mlservers_stubs(tmp_path: Path) -> None:
    async with servers(tmp_path, "triton", "mlserver") as found:
        given = [f"{address}={dialect}" for address, dialect in found.items()]
        lines = (await foreign("mlserver", "mlserver_client.py", *given)).splitlines()
    assert len(lines) == len(found)
    for line in lines:
        mlserver_saw(json.loads(line))


def mlserver_saw(told: dict[str, Any]) -> None:
    assert [told[name] for name in ("live", "ready", "model_ready")] == [True, True, True]
    assert (told["metadata"], told["metadata_parameters"]) == (METADATA, 0)
    for raw in (False, True):
        assert told[f"infer_{raw}"] == {"id": "m0", "model": "simple", "OUTPUT0": SUM, "OUTPUT1": DIFFERENCE}
        assert told[f"mirrors_{raw}"]
    assert told["infer_unknown"][0] == "NOT_FOUND"
    assert told["stream"]["code"] == "OK"
    assert [answer["id"] for answer in told["stream"]["answers"]] == [f"m{n}" for n in range(5)]
    assert told["stream"]["answers"][4]["OUTPUT0"] == [[n + 7 for n in range(16)]]
    assert told["stream_error"]["code"] == "NOT_FOUND"
    assert [answer["id"] for answer in told["stream_error"]["answers"]] == ["m0"]
    assert told["stream_wrong_dialect"]["code"] == "INVALID_ARGUMENT"
    assert ["simple", "1", "READY"] in told["index"]
    assert told["after_unload"][0] == "NOT_FOUND"
    assert told["after_load"]
    assert told["load_unknown"][0] == "NOT_FOUND"
    assert told["older_index"] == told["index"]
    assert (told["older_unload"], told["older_load"]) == (False, True)
    assert told["older_unknown"] == ["NOT_FOUND", "Model nobody not found"]


@pytest.mark.parametrize("default", ["triton", "mlserver"])
async def test_tritons_stream_may_be_asked_for_where_it_is_not_the_default(
    default: str, transport: str, tmp_path: Path
) -> None:
    tensors = [pb.ModelInferRequest.InferInputTensor(name=f"INPUT{n}", datatype="INT32", shape=[1, 16]) for n in (0, 1)]
    message = pb.ModelInferRequest(model_name="simple", id="1", inputs=tensors, raw_input_contents=[bytes(64)] * 2)
    protocol = ProtocolSettings(dialect=default)
    async with (
        oip_server(tmp_path, transport=transport, protocol=protocol) as server,
        grpc.aio.insecure_channel(server.address) as channel,
    ):
        stub: Any = stubs.GRPCInferenceServiceStub(channel)
        call = stub.ModelStreamInfer(iter([message, message]), metadata=[("x-oip-dialect", "triton")], timeout=20)
        answers = [answer async for answer in call]
        assert [answer.infer_response.id for answer in answers] == ["1", "1"]


async def test_compat_triton_answers_raw_and_is_strict_about_readiness(transport: str, tmp_path: Path) -> None:
    inputs = [pb.ModelInferRequest.InferInputTensor(name=f"INPUT{n}", datatype="INT32", shape=[1, 16]) for n in (0, 1)]
    for tensor in inputs:
        tensor.contents.int_contents.extend(range(16))
    message = pb.ModelInferRequest(model_name="simple", inputs=inputs)
    for compat in ("", "triton"):
        async with (
            oip_server(
                tmp_path / f"of{compat}", transport=transport, protocol=ProtocolSettings(compat=compat)
            ) as server,
            grpc.aio.insecure_channel(server.address) as channel,
        ):
            stub: Any = stubs.GRPCInferenceServiceStub(channel)
            answer = await stub.ModelInfer(message, timeout=20)
            assert bool(answer.raw_output_contents) == bool(compat)
            async for streamed in stub.ModelStreamInfer(iter([message]), timeout=20):
                assert bool(streamed.infer_response.raw_output_contents) == bool(compat)
            assert (await stub.ServerReady(pb.ServerReadyRequest(), timeout=20)).ready
            server.catalog.begin("late", 1, total_bytes=1, sha256="")
            assert (await stub.ServerReady(pb.ServerReadyRequest(), timeout=20)).ready == (not compat)
            server.catalog.fail("late", 1, "no model")
            assert (await stub.ServerReady(pb.ServerReadyRequest(), timeout=20)).ready == (not compat)
            assert (await stub.ServerLive(pb.ServerLiveRequest(), timeout=20)).live


async def test_a_repository_of_another_name_is_not_there(transport: str, tmp_path: Path) -> None:
    async with (
        oip_server(tmp_path, transport=transport) as server,
        grpc.aio.insecure_channel(server.address) as channel,
    ):
        stub: Any = stubs.GRPCInferenceServiceStub(channel)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.RepositoryIndex(pb.RepositoryIndexRequest(repository_name="other"), timeout=20)
        assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
        assert caught.value.details() == "'repository_name' specification is not supported"
