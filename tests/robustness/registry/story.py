"""A publisher's story that can be told again after any interruption, and what must hold of a registry at any time.

As a program (`python story.py FOLDER`) it tells the story to a registry of its own and says on stdout what was
acknowledged, one JSON array a line; it is what gets killed.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import Callable
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy.exc import OperationalError

from mlmesh_registry import references
from mlmesh_registry.config import RegistrySettings
from mlmesh_registry.database import Write
from mlmesh_registry.events import Bookmark, to_micros
from mlmesh_registry.ledger import Blob
from mlmesh_registry.registry import Registry, open_registry
from mlmesh_registry.search import Asked
from mlmesh_runtime.errors import Conflict, Corrupt, InvalidInput, NotFound, NotReady
from tests.support.registry import alias, chunk, number, publish, read, sha256, some_bytes

SETTINGS = RegistrySettings(commit_bytes=40_000)
CHUNK = 20_000
VERSIONS = 2
DATA = [some_bytes(each, 110_000) for each in range(VERSIONS)]
# A pickle, which is refused; bytes that are given up on the way; bytes that are uploaded and collected.
FORBIDDEN = b"\x80\x04" + bytes(50_000)
CANCELLED = some_bytes("cancelled", 90_000)
UNWANTED = some_bytes("unwanted", 50_000)

Told = Callable[..., None]


async def tell(registry: Registry, told: Told) -> None:
    """Publish every version and move an alias to each; every step may have been done before."""
    await registry.store.create_model("m", description="", labels={}, request_id="model", actor="")
    told("model")
    for index, data in enumerate(DATA):
        digest = await _upload(registry, data, f"upload {index}", told)
        version = await publish(registry, digest, request_id=f"version {index}")
        told("version", version.number, version.digest)
        await _move(registry, version.number)
        told("alias", version.number)
    await _refused(registry, told)
    await _cancelled(registry, told)
    await _collected(registry, told)


async def _refused(registry: Registry, told: Told) -> None:
    try:
        await _upload(registry, FORBIDDEN, "forbidden", lambda *_: None)
    except InvalidInput as error:
        if error.reason != "FORMAT_NOT_ALLOWED":
            raise
        told("gone", sha256(FORBIDDEN))
    else:
        raise AssertionError("a pickle was let in")


async def _cancelled(registry: Registry, told: Told) -> None:
    started = await registry.artifacts.start(sha256(CANCELLED), len(CANCELLED), request_id="cancelled", actor="")
    assert not isinstance(started, Blob)
    if started.committed_bytes == 0:
        async with registry.artifacts.appending(started.id) as live:
            for at in range(0, 3 * CHUNK, CHUNK):
                await live.append(chunk(CANCELLED[at : at + CHUNK], at))
    await registry.artifacts.cancel(started.id)
    told("cancelled", started.id)


async def _collected(registry: Registry, told: Told) -> None:
    """As garbage is collected, with no grace."""
    digest = await _upload(registry, UNWANTED, "unwanted", lambda *_: None)

    def condemn(write: Write) -> None:
        unused = references.unused(write.connection, to_micros(write.now))
        references.condemn(write, [blob for blob in unused if blob.sha256 == digest])

    await registry.garbage._database.write(condemn)
    told("gone", digest)
    await registry.garbage.remove_condemned()


async def _upload(registry: Registry, data: bytes, request_id: str, told: Told) -> str:
    started = await registry.artifacts.start(sha256(data), len(data), request_id=request_id, actor="")
    if isinstance(started, Blob):
        return started.sha256
    offset = started.committed_bytes
    while offset < len(data):
        # Two streams' worth, so that both kinds of commit happen: by size and by end.
        async with registry.artifacts.appending(started.id) as live:
            for _ in range(3):
                if part := data[offset : offset + CHUNK]:
                    await live.append(chunk(part, offset))
                    offset += len(part)
        told("committed", started.id, offset)
    blob = await registry.artifacts.finish(started.id)
    told("blob", blob.sha256)
    return blob.sha256


async def _move(registry: Registry, version: int) -> None:
    found, _ = await registry.store.list_aliases("m", size=0, token="")
    if found and found[0].version >= version:
        return
    await registry.store.set_alias(alias("stable"), number(version), etag=found[0].etag if found else "", actor="")


async def check(registry: Registry, data_dir: Path, acknowledged: list[list[Any]]) -> None:
    """What must hold: nothing acknowledged is lost, nothing is half visible, nothing is left over, the log is whole."""
    for kind, *facts in acknowledged:
        if kind == "committed":
            await _still_committed(registry, *facts)
        elif kind == "blob":
            assert sha256(await read(registry, facts[0])) == facts[0]
        elif kind == "version":
            assert (await registry.store.get_version(number(facts[0]))).digest == facts[1]
        elif kind == "gone":
            with pytest.raises(NotFound):
                await registry.artifacts.blob(facts[0])
        elif kind == "cancelled":
            with pytest.raises(NotFound):
                await registry.artifacts.upload(facts[0])
        elif kind == "alias":
            assert (await registry.store.get_version(alias("stable"))).number >= facts[0]
    models, _ = await registry.search.list_models(Asked())
    versions, _ = await registry.search.list_versions(None, Asked())
    assert [version.number for version in versions] == list(range(len(versions), 0, -1))
    assert [model.latest_version for model in models] == ([len(versions)] if models else [])
    for version in versions:
        for artifact in version.content.artifacts:
            assert sha256(await read(registry, artifact.sha256)) == artifact.sha256
    await _log_is_whole(registry)
    await _no_leftovers(registry, data_dir)


async def _still_committed(registry: Registry, upload_id: str, committed: int) -> None:
    upload = await registry.artifacts.upload(upload_id)
    assert upload.finished or upload.committed_bytes >= committed


async def _log_is_whole(registry: Registry) -> None:
    revisions: list[int] = []
    async with aclosing(registry.feed.watch(1, None)) as events:
        async for event in events:
            if isinstance(event, Bookmark):
                break
            revisions.append(event.revision)
    assert revisions == list(range(1, await registry.store.head() + 1))


async def _no_leftovers(registry: Registry, data_dir: Path) -> None:
    for path in [path for path in (data_dir / "blobs").rglob("*") if path.is_file()]:
        if path.parent.name == "staging":
            assert not (await registry.artifacts.upload(path.name.partition(".")[0])).finished
        else:
            digest, _, location = path.name.partition(".")
            blob = await registry.artifacts._ledger.find(digest)
            if blob is not None and blob.location == location:
                assert blob.size_bytes == path.stat().st_size
            else:
                # Linked already, and to be finished by whoever goes on.
                assert not (await registry.artifacts.upload(location)).finished


async def retell(registry: Registry, told: Told) -> None:
    """The story by a client that answers every error by trying again; a lost upload starts from its beginning."""
    for _ in range(20):
        try:
            await tell(registry, told)
        except (Conflict, Corrupt, NotFound, NotReady, OSError, OperationalError) as error:
            told("error", type(error).__name__, getattr(error, "reason", ""))
        else:
            return
    raise AssertionError("the story never came to its end")


async def main(data_dir: Path) -> None:
    """Tell it, acknowledging on stdout by one unbuffered write each."""

    def told(*fact: object) -> None:
        os.write(1, json.dumps(fact).encode() + b"\n")

    async with open_registry(data_dir, SETTINGS) as registry:
        told("open")
        await retell(registry, told)
    told("end")


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1])))
