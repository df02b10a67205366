"""`mlmesh engines` against a real server, dialed by its address."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from mlmesh_inference.engines.base import EngineError
from mlmesh_inference.engines.tensorrt_api import flavour, load_module
from tests.support import onnx_models
from tests.support.engine_server import EngineServer, engine_server
from tests.support.registry_source import MemoryRegistry

MLMESH = Path(sys.executable).with_name("mlmesh")


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[EngineServer]:
    try:
        if flavour(load_module()) != "tensorrt_rtx":
            pytest.skip("TensorRT compiles only on a GPU here")
    except EngineError as error:
        pytest.skip(f"TensorRT cannot compile here: {error}")
    source = MemoryRegistry()
    await source.publish("add", 1, onnx_models.add())
    await source.publish("free", 1, onnx_models.identity(["FP32"]))
    async with engine_server(tmp_path, source) as made:
        yield made


async def mlmesh(server: EngineServer, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the command to its end."""
    return await asyncio.to_thread(
        subprocess.run,
        [str(MLMESH), "engines", *arguments, "--address", server.server.address],
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
        stdin=subprocess.DEVNULL,
    )


async def test_an_engine_is_built_followed_and_listed(server: EngineServer) -> None:
    built = await mlmesh(server, "build", "add", "--build-only")
    assert built.returncode == 0, built.stderr
    assert "add/1" in built.stdout
    assert "fp32, built in" in built.stdout
    assert "it was asked to build only" in built.stdout
    again = json.loads((await mlmesh(server, "build", "add/1", "-o", "json", "--build-only")).stdout)
    (build,) = again["builds"]
    assert (build["state"], build["response"]["source"]) == ("done", "cache")
    listed = json.loads((await mlmesh(server, "operations", "-o", "json")).stdout)
    assert [each["metadata"]["name"] for each in listed["builds"]] == ["models/add/versions/1"] * 2
    engines = await mlmesh(server, "list")
    assert "onnxruntime-cpu" in engines.stdout
    assert "tensorrt" in engines.stdout


async def test_what_fails_is_said_with_the_exit_code(server: EngineServer) -> None:
    failed = await mlmesh(server, "build", "free")
    assert failed.returncode == 1
    assert "no optimization profile has been declared" in failed.stderr
    unknown = await mlmesh(server, "build", "none")
    assert unknown.returncode == 1
    assert "no inference process serves none" in unknown.stderr
    cancelled = await mlmesh(server, "cancel", "0123")
    assert cancelled.returncode == 1
    assert "operations/0123 is not known" in cancelled.stderr


async def test_a_build_is_cancelled_by_its_name(server: EngineServer) -> None:
    ended = await server.operations.wait((await server.build("add", build_only=True)).name)
    done = await mlmesh(server, "cancel", ended.name.removeprefix("operations/"))
    assert done.returncode == 0, "asking a build that has ended is no error"
    assert "was asked to stop" in done.stdout
