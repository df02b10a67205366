"""PostgreSQL crashes, fills up and comes back; registries die beside one another. Nothing acknowledged is lost."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import pytest

from mlmesh.registry.v1 import registry_pb2 as pb
from mlmesh_runtime.channel import NO_DEADLINE, mesh_error
from mlmesh_runtime.errors import NotReady, Overloaded
from tests.support.postgres import PostgresServer, postgres_running
from tests.support.registry_process import Client, connected, refused, running
from tests.support.server import Process, spawn

DATA = b'{"weights": [1, 2, 3]}'
MIB = 1 << 20
RETRY_S = 0.02


@pytest.fixture
def server() -> Iterator[PostgresServer]:
    """A server of this test's own that syncs to disk, as those who crash must."""
    with postgres_running(durable=True) as started:
        yield started


@contextlib.contextmanager
def registry(tmp_path: Path, url: str) -> Iterator[tuple[Process, str]]:
    """One registry of this test's folder and database."""
    env = {"MLMESH_REGISTRY_DATABASE_URL": url, "MLMESH_REGISTRY_BOOKMARK_S": "0.2"}
    with running(tmp_path / "data", env=env) as found:
        yield found


@dataclass
class Told:
    """What clients were told."""

    acknowledged: dict[str, pb.ModelVersion] = field(default_factory=dict)
    refusals: set[str] = field(default_factory=set)
    news: asyncio.Condition = field(default_factory=asyncio.Condition)

    async def acknowledge(self, request_id: str, version: pb.ModelVersion) -> None:
        async with self.news:
            self.acknowledged[request_id] = version
            self.news.notify_all()

    async def acknowledgements(self, more: int) -> None:
        """Wait for so many more."""
        async with self.news:
            wanted = len(self.acknowledged) + more
            await self.news.wait_for(lambda: len(self.acknowledged) >= wanted)


async def write(clients: Sequence[Client], blob: str, writer: str, told: Told, stop: asyncio.Event) -> None:
    """Publish until told to stop; what was refused for the moment is asked for again, at the next registry in turn."""
    count = turn = 0
    while not stop.is_set():
        request_id = f"{writer} {count}"
        try:
            version = await clients[turn % len(clients)].publish(blob, request_id=request_id)
        except grpc.aio.AioRpcError as error:
            refusal = mesh_error(error)
            assert isinstance(refusal, NotReady), error  # noqa: PT017
            told.refusals.add(refusal.reason)
            turn += 1
            await asyncio.sleep(RETRY_S)
        else:
            await told.acknowledge(request_id, version)
            count += 1


async def watch(clients: Sequence[Client], upto: Callable[[], int | None]) -> list[int]:
    """Follow the log to its end, going on at the next registry in turn when one ends the watch."""
    seen: list[int] = []
    turn = 0
    while True:
        request = pb.WatchModelsRequest(from_revision=seen[-1] + 1 if seen else 1)
        try:
            async for event in clients[turn % len(clients)].stub.WatchModels(request, timeout=NO_DEADLINE):
                if event.WhichOneof("event") != "bookmark":
                    seen.append(event.revision)
                if (last := upto()) is not None and event.revision >= last:
                    return seen
        except grpc.aio.AioRpcError as error:
            assert isinstance(mesh_error(error), NotReady), error  # noqa: PT017
            turn += 1
            await asyncio.sleep(RETRY_S)


async def check(client: Client, told: Told) -> int:
    """Everything acknowledged is there as it was told, once, and nothing is missing in between; the last revision."""
    listed: list[pb.ModelVersion] = []
    token = ""
    while True:
        request = pb.ListModelVersionsRequest(parent="models/m", page_size=1000, page_token=token)
        page = await client.stub.ListModelVersions(request)
        listed += page.model_versions
        if not (token := page.next_page_token):
            break
    found = {version.name: version for version in listed}
    assert sorted(int(name.rpartition("/")[2]) for name in found) == list(range(1, len(found) + 1))
    for version in told.acknowledged.values():
        assert found[version.name] == version
    assert len({version.name for version in told.acknowledged.values()}) == len(told.acknowledged), "done twice"
    model = (await client.stub.GetModel(pb.GetModelRequest(name="models/m"))).model
    assert model.latest_version == len(found)
    return max(version.revision for version in listed)


async def test_the_database_crashes_under_writes(tmp_path: Path, server: PostgresServer) -> None:
    url = server.create()
    told, stop = Told(), asyncio.Event()
    last: int | None = None
    with registry(tmp_path, url) as (first, address), registry(tmp_path, url) as (second, other):
        async with connected(address) as one, connected(other) as two:
            await one.create_model()
            blob = (await one.put(DATA)).name
            async with asyncio.timeout(120), asyncio.TaskGroup() as group:
                watchers = [group.create_task(watch([client], lambda: last)) for client in (one, two)]
                writers = [
                    group.create_task(write([client], blob, f"{client is one} {number}", told, stop))
                    for client in (one, two)
                    for number in range(2)
                ]
                for _ in range(2):
                    await told.acknowledgements(10)
                    await asyncio.to_thread(server.restart)
                await told.acknowledgements(10)
                stop.set()
                await asyncio.wait(writers)
                last = await check(two, told)
                # One more, so that the watchers look.
                assert (await one.create_model("end")).update_time is not None
            assert told.refusals == {"STORAGE_UNAVAILABLE"}
            for watcher in watchers:
                assert watcher.result()[:last] == list(range(1, last + 1))
        assert first.popen.poll() is None
        assert second.popen.poll() is None


async def test_one_of_two_registries_is_killed_under_writes(tmp_path: Path, server: PostgresServer) -> None:
    url = server.create()
    told, stop = Told(), asyncio.Event()
    last: int | None = None
    with registry(tmp_path, url) as (first, address), registry(tmp_path, url) as (_, other):
        async with connected(address) as one, connected(other) as two:
            await one.create_model()
            blob = (await one.put(DATA)).name
            async with asyncio.timeout(120), asyncio.TaskGroup() as group:
                watchers = [group.create_task(watch(clients, lambda: last)) for clients in ([one, two], [two, one])]
                writers = [group.create_task(write([one, two], blob, str(each), told, stop)) for each in range(4)]
                await told.acknowledgements(12)
                first.popen.kill()
                await told.acknowledgements(12)
                stop.set()
                await asyncio.wait(writers)
                last = await check(two, told)
                await two.create_model("end")
            for watcher in watchers:
                assert watcher.result()[:last] == list(range(1, last + 1))
            # It comes back beside the other, and to what the other wrote meanwhile.
            with registry(tmp_path, url) as (_, again):
                async with connected(again) as back:
                    assert await check(back, told) == last
                    assert await back.get(blob) == DATA


async def test_a_database_that_is_away_is_waited_for(tmp_path: Path, server: PostgresServer) -> None:
    url = server.create()
    server.stop()
    env = {
        "MLMESH_LISTEN": "127.0.0.1:0",
        "MLMESH_DATA_DIR": str(tmp_path / "data"),
        "MLMESH_REGISTRY_DATABASE_URL": url,
        "MLMESH_REGISTRY_BOOKMARK_S": "0.1",
    }
    with spawn("-m", "mlmesh_registry", env=env) as process:
        await asyncio.to_thread(process.wait_for, lambda entry: entry.get("event") == "the database does not answer")
        server.start()
        async with connected(await asyncio.to_thread(process.listening)) as client:
            await client.create_model()
            events = aiter(client.stub.WatchModels(pb.WatchModelsRequest(), timeout=NO_DEADLINE))
            assert (await anext(events)).model.name == "models/m"
            assert (await anext(events)).WhichOneof("event") == "bookmark"
            server.stop(signal.SIGINT)
            async with refused(NotReady, "STORAGE_UNAVAILABLE"):
                await client.create_model("n")
            async with refused(NotReady, "STORAGE_UNAVAILABLE"):
                await client.stub.ListModels(pb.ListModelsRequest())
            # Who watches and has seen everything goes on watching.
            for _ in range(3):
                assert (await anext(events)).WhichOneof("event") == "bookmark"
            server.start()
            await client.create_model("n")
            while (event := await anext(events)).WhichOneof("event") == "bookmark":
                pass
            assert event.model.name == "models/n"
        assert process.popen.poll() is None
        lines = process.log()
        assert lines.count("the database answers again") >= 1
        assert "Traceback" not in lines


@pytest.fixture
def small_disk() -> Iterator[Path]:
    """A file system of 24 MiB that the server can write to."""
    with tempfile.TemporaryDirectory(prefix="mlmesh-disk-") as name:
        Path(name).chmod(0o755)
        mounting = ["mount", "-t", "tmpfs", "-o", "size=24m,mode=0777", "tmpfs", name]
        try:
            mounted = subprocess.run(mounting, capture_output=True, check=False).returncode == 0
        except FileNotFoundError:
            mounted = False
        if not mounted:
            pytest.skip("a small file system needs the right to mount one")
        try:
            yield Path(name)
        finally:
            subprocess.run(["umount", "-l", name], check=True)


async def test_the_database_has_no_room_and_then_room_again(
    tmp_path: Path, small_disk: Path, postgres: PostgresServer
) -> None:
    url = postgres.create_in(small_disk)
    with registry(tmp_path, url) as (process, address):
        async with connected(address) as client:
            etag = (await client.create_model()).etag
            ballast = small_disk / "ballast"
            with ballast.open("wb", buffering=0) as file, contextlib.suppress(OSError):
                while True:
                    file.write(bytes(64 * 1024))
            async with refused(Overloaded, "DISK_FULL"):
                for count in range(1000):
                    request = pb.UpdateModelRequest(name="models/m", description=f"{count} " + "x" * 60_000, etag=etag)
                    etag = (await client.stub.UpdateModel(request)).model.etag
            found = (await client.stub.GetModel(pb.GetModelRequest(name="models/m"))).model
            assert found.etag == etag
            ballast.unlink()
            after = (await client.stub.UpdateModel(request)).model
            # The number that the refused change would have had.
            assert int(after.etag[1:]) == int(etag[1:]) + 1
        assert process.popen.poll() is None
    postgres.drop(url)
