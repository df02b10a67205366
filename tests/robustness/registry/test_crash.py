"""kill -9 at every kind of step of upload and publish: what was acknowledged is there, what is there is whole.

A kill keeps the page cache, so it shows atomicity; durability is shown by the order of system calls.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import grpc
import pytest

from mlmesh.registry.v1 import registry_pb2 as pb
from mlmesh_registry.registry import open_registry
from tests.robustness.registry import story
from tests.support.registry import some_bytes
from tests.support.registry_process import Client, connected, running

needs_strace = pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")

STORY = [sys.executable, story.__file__ or ""]
# Call number N of a kind, counted per thread: within what SQLite does for a migration, uploads, publishing; what the
# registry itself does to files is swept call by call in test_sweep.py.
KILLS = [("fdatasync", 2), ("fdatasync", 12), ("fdatasync", 27), ("pwrite64", 500), ("pwrite64", 750), ("link", 1)]


def _tell(data_dir: Path, repository: Path, *strace: str) -> tuple[int, list[list[Any]]]:
    """Run the story as a program; its exit code and what it acknowledged."""
    done = subprocess.run(
        [*strace, *STORY, str(data_dir)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(repository), os.environ.get("PYTHONPATH", "")])},
        stdout=subprocess.PIPE,
        timeout=60,
        check=False,
    )
    # The last line may be cut: then it was not heard.
    return done.returncode, [json.loads(line) for line in done.stdout.splitlines(keepends=True) if line.endswith(b"\n")]


def _inject(what: str) -> list[str]:
    # Without --seccomp-bpf: strace 6.1 then kills at the first call or never.
    syscall = what.partition(":")[0]
    return ["strace", "-f", "-qq", "-o", "/dev/null", "-e", f"trace={syscall}", "-e", f"inject={what}"]


@needs_strace
@pytest.mark.parametrize(("syscall", "count"), KILLS, ids=str)
async def test_a_kill_at_any_step_loses_and_half_shows_nothing(
    tmp_path: Path, repository: Path, syscall: str, count: int
) -> None:
    data_dir = tmp_path / "data"
    kill = _inject(f"{syscall}:signal=KILL:when={count}")
    code, acknowledged = await asyncio.to_thread(_tell, data_dir, repository, *kill)
    assert code == -9, f"not killed, so nothing was shown: {acknowledged}"
    async with open_registry(data_dir, story.SETTINGS) as registry:
        await story.check(registry, data_dir, acknowledged)
        # The same requests again: done once, whatever had been done before.
        await story.retell(registry, lambda *fact: acknowledged.append(list(fact)))
        assert not [fact for fact in acknowledged if fact[0] == "error"]
        await story.check(registry, data_dir, acknowledged)
        assert (await registry.store.get_model("m")).latest_version == story.VERSIONS


@needs_strace
@pytest.mark.parametrize(("syscall", "count"), [("fsync", 4), ("fdatasync", 9)])
async def test_a_sync_that_fails_is_not_believed(tmp_path: Path, repository: Path, syscall: str, count: int) -> None:
    data_dir = tmp_path / "data"
    fail = _inject(f"{syscall}:error=EIO:when={count}")
    code, acknowledged = await asyncio.to_thread(_tell, data_dir, repository, *fail)
    assert acknowledged[-1] == ["end"], acknowledged
    assert code == 0
    async with open_registry(data_dir, story.SETTINGS) as registry:
        # An upload that was discarded for it was acknowledged in vain; its owner was told so.
        told = [fact for fact in acknowledged if fact[0] != "committed"]
        assert [fact for fact in told if fact[0] == "error"]
        await story.check(registry, data_dir, told)
        assert (await registry.store.get_model("m")).latest_version == story.VERSIONS


@needs_strace
def test_bytes_names_and_rows_reach_the_disk_in_that_order(tmp_path: Path, repository: Path) -> None:
    log = tmp_path / "log"
    strace = ["strace", "-f", "-y", "-qq", "-o", str(log), "-e", "trace=pwrite64,fsync,fdatasync,link,linkat,write"]
    code, acknowledged = _tell(tmp_path / "data", repository, *strace)
    assert (code, acknowledged[-1]) == (0, ["end"])
    calls = [line.split(maxsplit=1)[1] for line in log.read_text(errors="replace").splitlines()]
    blobs = [index for index, call in enumerate(calls) if call.startswith("write(1") and '[\\"blob\\"' in call]
    assert len(blobs) == story.VERSIONS
    for said, digest in zip(blobs, [fact[1] for fact in acknowledged if fact[0] == "blob"], strict=True):
        linked = _last(calls, said, rf"link.*{digest}")
        upload = re.search(r"staging/([0-9a-z]+\.[0-9a-z]+)", calls[linked])
        assert upload is not None
        synced = _last(calls, linked, rf"fsync\(.*staging/{upload[1]}>")
        assert _last(calls, said, rf"pwrite64\(.*staging/{upload[1]}>") < synced < linked
        named = _last(calls, said, rf"fsync\(.*sha256/{digest[:2]}>")
        recorded = _last(calls, said, r"f(data)?sync\(.*registry\.sqlite-wal>")
        assert linked < named < recorded < said


def _last(calls: list[str], before: int, pattern: str) -> int:
    """Index of the last call before another that matches."""
    found = [index for index, call in enumerate(calls[:before]) if re.match(pattern, call)]
    assert found, f"no call like {pattern}"
    return found[-1]


async def test_random_kills_of_a_serving_process_under_load(tmp_path: Path) -> None:
    """Clients over gRPC publish and move aliases; the process is killed at random and started again."""
    chance = random.SystemRandom()
    acknowledged: dict[str, pb.ModelVersion] = {}
    published = 0
    for _ in range(3):
        with running(tmp_path / "data", env={"MLMESH_REGISTRY_COMMIT_BYTES": "100000"}) as (process, address):
            async with connected(address) as client:
                await _everything_is_there(client, acknowledged)
                published += 1
                first = asyncio.Event()
                async with asyncio.TaskGroup() as group:
                    for worker in range(3):
                        group.create_task(_publish_until_killed(client, worker, published, acknowledged, first))
                    await first.wait()
                    await asyncio.sleep(chance.uniform(0, 0.3))
                    process.popen.kill()
                assert await asyncio.to_thread(process.wait) == -9
    with running(tmp_path / "data") as (_, address):
        async with connected(address) as client:
            await _everything_is_there(client, acknowledged)


async def _publish_until_killed(
    client: Client, worker: int, round_: int, acknowledged: dict[str, pb.ModelVersion], first: asyncio.Event
) -> None:
    model_id, count = f"w{worker}", 0
    try:
        await client.create_model(model_id, request_id=model_id)
        while True:
            count += 1
            request_id = f"{worker} {round_} {count}"
            data = some_bytes(request_id, 250_000)
            blob = await client.put(data, request_id=request_id, chunk_bytes=60_000)
            version = await client.publish(blob.name, model_id, request_id=request_id)
            acknowledged[request_id] = version
            first.set()
            # Told twice, done once.
            assert await client.publish(blob.name, model_id, request_id=request_id) == version
    except grpc.aio.AioRpcError as error:
        assert error.code() in {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED}, error  # noqa: PT017


async def _everything_is_there(client: Client, acknowledged: dict[str, pb.ModelVersion]) -> None:
    listed = await client.stub.ListModelVersions(pb.ListModelVersionsRequest(parent="models/-", page_size=1000))
    found = {version.name: version for version in listed.model_versions}
    for version in acknowledged.values():
        assert found[version.name] == version
    for worker in range(3):
        numbers = sorted(int(name.rpartition("/")[2]) for name in found if name.startswith(f"models/w{worker}/"))
        assert numbers == list(range(1, len(numbers) + 1))
    for version in found.values():
        data = await client.get(version.artifacts[0].blob)
        assert len(data) == version.artifacts[0].size_bytes
