"""Large files go in and out of a registry that does not grow with them. See benchmarks for 2 GiB, and for S3."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from mlmesh.registry.v1 import registry_pb2 as pb
from tests.support.registry import sha256, some_bytes
from tests.support.registry_process import connected, pieces, running

MIB = 1 << 20
ABOVE_IDLE_MIB = 100


@contextmanager
def bounded(pid: int) -> Iterator[None]:
    """What a process holds in the block is within the bound above what it held before."""
    process, done, peak = psutil.Process(pid), threading.Event(), 0
    idle = process.memory_info().rss

    def sample() -> None:
        nonlocal peak
        while not done.wait(0.01):
            peak = max(peak, process.memory_info().rss)

    sampler = threading.Thread(target=sample)
    sampler.start()
    try:
        yield
    finally:
        done.set()
        sampler.join()
    assert peak
    assert (peak - idle) / MIB < ABOVE_IDLE_MIB


async def test_memory_is_not_a_matter_of_size(tmp_path: Path) -> None:
    data = some_bytes("large", 192 * MIB)
    with running(tmp_path / "data") as (process, address):
        async with connected(address) as client:
            await client.put(b"something before")
            upload = (await client.start(data)).upload
            with bounded(process.pid):
                await client.send(upload.name, pieces(data))
                blob = (await client.stub.FinishUpload(pb.FinishUploadRequest(name=upload.name))).blob
            with bounded(process.pid):
                assert sha256(await client.get(blob.name)) == sha256(data)
