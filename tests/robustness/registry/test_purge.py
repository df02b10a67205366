"""kill -9 while garbage is collected: whatever is still there is whole, and the next collection ends what was begun."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest

from mlmesh_registry.audit import broken_at
from mlmesh_registry.registry import Registry, open_registry
from mlmesh_registry.search import Asked
from mlmesh_registry.versions import Artifact, Content
from tests.robustness.registry import purge
from tests.support.registry import create_model, number, put, read, sha256

SHARED, OWN, KEPT = b"shared by the purged and the kept", b"of the purged alone", b"of the kept alone"


async def _story(folder: Path) -> None:
    """Two versions and a model that are past their time, and a version that stays."""
    async with open_registry(folder, purge.SETTINGS, clock=lambda: purge.BEGIN) as registry:
        await create_model(registry)
        await create_model(registry, "gone")
        digests = [await put(registry, data) for data in (SHARED, OWN, KEPT)]
        for model_id, parts in (("m", digests[:2]), ("m", digests[::2]), ("gone", digests[:2])):
            artifacts = tuple(Artifact(path=f"{part}.txt", sha256=part) for part in parts)
            await registry.store.create_version(model_id, Content(artifacts=artifacts), request_id="", actor="")
        await registry.store.delete_version(number(1), etag="", actor="")
        await registry.store.delete_model("gone", etag="", force=True, actor="")


async def _check(registry: Registry) -> None:
    versions, _ = await registry.search.list_versions(None, Asked(show_deleted=True))
    for version in versions:
        for artifact in version.content.artifacts:
            assert sha256(await read(registry, artifact.sha256)) == artifact.sha256
    models, _ = await registry.search.list_models(Asked(show_deleted=True))
    everything = await registry.store.get_quota(None)
    assert (everything.versions_used, everything.models_used) == (len(versions), len(models))
    for model in models:
        mine = [version for version in versions if version.model == model.id]
        sizes = {each.sha256: each.size_bytes for version in mine for each in version.content.artifacts}
        quota = await registry.store.get_quota(model.id)
        assert (quota.versions_used, quota.bytes_used) == (len(mine), sum(sizes.values()))
    entries, _ = await registry.store.list_audit(from_sequence=0, resource="", actor="", size=1000, token="")
    assert broken_at(entries) is None


def _kill(folder: Path, repository: Path, step: int) -> int:
    path = os.pathsep.join([str(repository), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, purge.__file__ or "", str(folder), str(step)]
    return subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, timeout=60, check=False).returncode


# After versions lost their rows; after their model did; after a blob lost its row; after its bytes went.
@pytest.mark.parametrize("step", [2, 6, 16, 20])
async def test_a_kill_while_garbage_is_collected_leaves_nothing_half_done(
    tmp_path: Path, repository: Path, step: int
) -> None:
    folder = tmp_path / "data"
    await _story(folder)
    assert await asyncio.to_thread(_kill, folder, repository, step) == -9, "not killed, so nothing was shown"
    async with open_registry(folder, purge.SETTINGS, clock=lambda: purge.LATER) as registry:
        await _check(registry)
        await purge.collect(registry)
        await _check(registry)
    end = purge.LATER + timedelta(days=16)
    async with open_registry(folder, purge.SETTINGS, clock=lambda: end) as registry:
        await purge.collect(registry)
        await _check(registry)
        versions, _ = await registry.search.list_versions(None, Asked(show_deleted=True))
        assert [version.name for version in versions] == ["models/m/versions/2"]
        assert (await registry.store.get_quota(None)).bytes_used == len(SHARED) + len(KEPT)
        left = {path.name.split(".")[0] for path in (folder / "blobs").rglob("*") if path.is_file()}
        assert left == {sha256(SHARED), sha256(KEPT)}
