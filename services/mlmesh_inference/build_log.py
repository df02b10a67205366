"""Builds on disk, one file each, so that a process that starts again knows what became of them."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from mlmesh_inference.builds import Build, Result
from mlmesh_runtime.chunks import fsync_directory
from mlmesh_runtime.errors import MeshError
from mlmesh_runtime.executors import BoundedExecutor, run_blocking

_LOG = logging.getLogger(__name__)

_ID: Final = re.compile(r"[0-9a-f]{1,64}")


class DiskLog:
    """Files `{id}.json` in a folder, made when missing. A file that cannot be read is passed over.

    Args:
        disk: executor for files.
    """

    def __init__(self, folder: Path, disk: BoundedExecutor) -> None:
        self._folder = folder
        self._disk = disk
        # Threads of the disk's executor may overtake each other; what is written of a build is written in order.
        self._order = asyncio.Lock()

    async def save(self, build: Build) -> None:
        """See builds.Log."""
        try:
            async with self._order:
                await run_blocking(self._disk, self._write, build)
        except (OSError, MeshError) as error:
            _LOG.warning("a build cannot be written down", extra={"build": build.id, "error": str(error)})

    async def forget(self, build_id: str) -> None:
        """See builds.Log."""
        try:
            async with self._order:
                await run_blocking(self._disk, self._path(build_id).unlink, missing_ok=True)
        except (OSError, MeshError) as error:
            _LOG.warning("a build cannot be forgotten", extra={"build": build_id, "error": str(error)})

    async def load(self) -> list[Build]:
        """See builds.Log."""
        return await run_blocking(self._disk, self._read)

    def _path(self, build_id: str) -> Path:
        if not _ID.fullmatch(build_id):  # it names a file
            raise ValueError(f"not the id of a build: {build_id!r}")
        return self._folder / f"{build_id}.json"

    def _write(self, build: Build) -> None:
        path = self._path(build.id)
        self._folder.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".tmp")
        with temporary.open("w") as file:
            json.dump(asdict(build), file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        fsync_directory(self._folder)

    def _read(self) -> list[Build]:
        found = []
        for path in sorted(self._folder.glob("*.json")):
            try:
                build = _from_json(json.loads(path.read_text()))
            except (OSError, ValueError, KeyError, TypeError) as error:
                _LOG.warning("a build on disk cannot be read", extra={"file": path.name, "error": str(error)})
                continue
            if build.id == path.stem:
                found.append(build)
        return found


def _from_json(data: dict[str, Any]) -> Build:
    result = data["result"]
    if result is not None:
        result = Result(**{**result, "precisions": tuple(result["precisions"])})
    return Build(**{**data, "result": result})
