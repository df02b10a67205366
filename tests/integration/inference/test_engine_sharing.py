"""Engines shared through a real registry: found by whoever holds the key, believed from nobody else."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from mlmesh.inference.v1 import control_pb2 as inference_pb
from mlmesh.registry.v1 import registry_pb2 as pb
from mlmesh_inference.engine_cache import Plan, PlanKey, sealed
from mlmesh_inference.engines.base import EngineError
from mlmesh_inference.engines.tensorrt_api import flavour, load_module
from mlmesh_inference.engines.tensorrt_compile import PlanFacts
from mlmesh_inference.follow import Follower
from mlmesh_inference.registry import RegistryClient
from mlmesh_inference.sharing import FILE, SharedEngines
from mlmesh_runtime.executors import BoundedExecutor
from tests.support import onnx_models
from tests.support.engine_server import engine_server
from tests.support.registry_process import Client, connected, running
from tests.support.registry_source import MemoryRegistry

FLEET, STRANGER = b"f" * 32, b"s" * 32
KEY = PlanKey(
    model="0" * 64,
    flavour="tensorrt_rtx",
    version="1.7",
    target="default capabilities",
    profiles="rows 1..64@8",
    precision="as the model says",
)


def plan(data: bytes = b"machine code " * 1000, key: PlanKey = KEY) -> Plan:
    digest = hashlib.sha256(data).hexdigest()
    facts = PlanFacts(size=len(data), sha256=digest, precisions=("fp16",), profiles=3, seconds=1.5)
    return Plan(key=key, facts=facts, data=data, source="built")


def wrapped(inside: bytes) -> bytes:
    """As engines are wrapped: a safetensors file with one tensor."""
    entry = {"engine": {"dtype": "U8", "shape": [len(inside)], "data_offsets": [0, len(inside)]}}
    header = json.dumps(entry).encode().ljust(96)
    return len(header).to_bytes(8, "little") + header + inside


@dataclass
class Fleet:
    """A registry, and members of a fleet that use it."""

    client: Client
    disk: BoundedExecutor
    model: str
    refusals: list[str] = field(default_factory=list)

    def member(self, key: bytes = FLEET, *, offers: bool = True, bytes_max: int = 1 << 20) -> SharedEngines:
        channel = self.client.channel
        return SharedEngines(
            channel,
            key,
            self.disk,
            offers=offers,
            bytes_max=bytes_max,
            refused=self.refusals.append,  # type: ignore[arg-type]
        )

    async def publish(self, data: bytes, *, key: PlanKey = KEY, path: str = FILE) -> None:
        """As anybody may who may write: a version that says to be the engine for a key."""
        blob = await self.client.put(data)
        version = pb.ModelVersion(artifacts=[pb.Artifact(path=path, blob=blob.name)], labels={"engine-key": key.digest})
        await self.client.stub.CreateModelVersion(
            pb.CreateModelVersionRequest(parent=f"models/{self.model}-engines", model_version=version)
        )

    async def versions(self) -> list[pb.ModelVersion]:
        request = pb.ListModelVersionsRequest(parent=f"models/{self.model}-engines")
        return list((await self.client.stub.ListModelVersions(request)).model_versions)


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """One registry for all: every test has a model of its own."""
    with running(tmp_path_factory.mktemp("registry")) as (_, found):
        yield found


@pytest.fixture
async def fleet(address: str, request: pytest.FixtureRequest) -> AsyncIterator[Fleet]:
    async with connected(address) as client:
        disk = BoundedExecutor("disk", workers_max=1)
        model = "m" + hashlib.sha256(request.node.name.encode()).hexdigest()[:8]
        await client.create_model(model)
        yield Fleet(client, disk, model)
        disk.shutdown()


async def test_what_one_member_offers_another_takes_and_it_says_where_it_came_from(fleet: Fleet) -> None:
    assert await fleet.member().fetch(fleet.model, KEY) is None
    blob = await fleet.client.put(onnx_models.add())
    await fleet.client.publish(blob.name, fleet.model)
    await fleet.member().offer(fleet.model, 1, plan())
    found = await fleet.member(offers=False).fetch(fleet.model, KEY)
    assert found is not None
    assert (bytes(found.data), found.facts, found.source) == (bytes(plan().data), plan().facts, "registry")
    (version,) = await fleet.versions()
    assert list(version.lineage.parents) == [f"models/{fleet.model}/versions/1"]
    assert version.labels["engine-target"] == "default capabilities"
    await fleet.member().offer(fleet.model, 1, plan())
    assert len(await fleet.versions()) == 1, "what the fleet has is not offered again"


async def test_another_purpose_is_another_engine(fleet: Fleet) -> None:
    await fleet.member().offer(fleet.model, 1, plan())
    assert await fleet.member().fetch(fleet.model, replace(KEY, version="1.8")) is None
    assert fleet.refusals == []


async def test_an_engine_of_a_stranger_is_refused(fleet: Fleet) -> None:
    """A stranger who may write to the registry, knows the format, and has another key or none."""
    await fleet.member(STRANGER).offer(fleet.model, 1, plan(b"a stranger's code"))
    for data in (b"a stranger's code, bare", sealed(plan(b"z" * 500), STRANGER), sealed(plan(b"z" * 500), b"\0" * 32)):
        await fleet.publish(wrapped(data))
    other = replace(KEY, model="1" * 64)
    await fleet.publish(wrapped(sealed(plan(key=other), FLEET)))
    assert await fleet.member().fetch(fleet.model, KEY) is None
    assert sorted(set(fleet.refusals)) == [
        "it is an engine for something else",
        "its MAC does not hold: it is cut, changed, or made with another key",
    ]
    assert len(fleet.refusals) == 5


async def test_behind_strangers_the_fleets_own_is_found(fleet: Fleet) -> None:
    await fleet.member().offer(fleet.model, 1, plan())
    await fleet.publish(wrapped(sealed(plan(b"a stranger's code"), STRANGER)))
    found = await fleet.member().fetch(fleet.model, KEY)
    assert found is not None
    assert bytes(found.data) == bytes(plan().data)


async def test_files_that_are_too_large_or_of_another_name_are_not_fetched(fleet: Fleet) -> None:
    await fleet.member().offer(fleet.model, 1, plan())
    await fleet.publish(wrapped(sealed(plan(), FLEET)), path="other.safetensors")
    assert await fleet.member(bytes_max=100).fetch(fleet.model, KEY) is None
    assert [text.partition(" ")[0] for text in fleet.refusals] == ["it", "it"]


async def test_offering_is_off_by_default_and_a_registry_that_is_away_stops_nothing(fleet: Fleet) -> None:
    await fleet.member(offers=False).offer(fleet.model, 1, plan())
    with pytest.raises(Exception, match=f"{fleet.model}-engines"):
        await fleet.versions()
    async with connected("127.0.0.1:1") as nobody:
        away = Fleet(nobody, fleet.disk, fleet.model).member()
        assert await away.fetch(fleet.model, KEY) is None
        await away.offer(fleet.model, 1, plan())


async def test_models_of_engines_are_served_by_nobody(fleet: Fleet) -> None:
    await fleet.member().offer(fleet.model, 1, plan())
    changed = asyncio.Event()
    follower = Follower(RegistryClient(fleet.client.channel), changed)  # type: ignore[arg-type]
    task = asyncio.create_task(follower.run())
    async with asyncio.timeout(20):
        while follower.view is None:
            changed.clear()
            await changed.wait()
    task.cancel()
    name = f"{fleet.model}-engines"
    assert name in follower.view.models()
    assert follower.view.numbers(name) == []


async def test_a_server_takes_what_another_built(fleet: Fleet, tmp_path: Path) -> None:
    """Two servers of one fleet and one without the key, over the same registry; the compiler is the real one."""
    try:
        if flavour(load_module()) != "tensorrt_rtx":
            pytest.skip("TensorRT compiles only on a GPU here")
    except EngineError as error:
        pytest.skip(f"TensorRT cannot compile here: {error}")
    source = MemoryRegistry()
    await source.publish(fleet.model, 1, onnx_models.add())
    (tmp_path / "fleet.key").write_bytes(FLEET)
    (tmp_path / "other.key").write_bytes(STRANGER)
    built: list[inference_pb.EngineBuild] = []
    for name, key, offers in (("a", "fleet", True), ("b", "fleet", False), ("c", "other", False)):
        async with engine_server(
            tmp_path / name,
            source,
            registry=fleet.client.channel,  # type: ignore[arg-type]
            takes=True,
            offers=offers,
            share_key_file=tmp_path / f"{key}.key",
        ) as server:
            built.append(await server.built(fleet.model, build_only=True))
    assert [each.source for each in built] == ["built", "registry", "built"]
    assert built[0].sha256 == built[1].sha256
