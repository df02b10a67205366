"""Files that versions share: fetched once, and nobody waits for an error to pass."""

from __future__ import annotations

import asyncio
from pathlib import Path

from mlmesh_inference.catalog import State
from tests.support.registry_source import MemoryRegistry
from tests.unit.inference.test_loader import ADD_1, loader

CONFIG = b"max_batch_size: 4\n"


async def test_versions_that_share_files_are_loaded_side_by_side(tmp_path: Path) -> None:
    source = MemoryRegistry()
    source.hold_downloads = asyncio.Event()
    for model in ("one", "two", "three"):
        await source.publish_files(model, 1, {"model.onnx": ADD_1, "config.pbtxt": CONFIG})
    async with loader(source, tmp_path, "*") as it:
        await it.until(lambda: len(it.catalog.statuses()) == 3)
        source.hold_downloads.set()
        await it.until(lambda: it.synced)
        assert [status.state for status in it.catalog.statuses()] == [State.READY] * 3
        assert [status.error for status in it.heard if status.error] == []
        assert len(source.downloads) == 2
        assert await it.plus(model="two") == 1.0
