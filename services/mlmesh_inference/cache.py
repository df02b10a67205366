"""What was fetched, on disk: blobs by digest, versions as folders of links to them, and what the registry last said.

    cache/blobs/<sha256>            verified bytes; `<sha256>.part` is a fetch that was cut
    cache/models/<name>/<version>/  the version's files under their own paths
    cache/registry.json             the registry's last word, for a start without it

Everything here blocks: call it on an executor.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path
from typing import Final

from mlmesh_inference.desired import ModelFile, RegistryView, VersionRecord, from_json, to_json
from mlmesh_runtime.chunks import VerifyingWriter, fsync_directory, sha256_of

KEEP_S: Final = 3600.0
"""Blobs used in the last hour are never swept."""


class ModelCache:
    """Files of a process under `root`, made when missing."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._blobs = root / "blobs"
        self._models = root / "models"
        self._state = root / "registry.json"
        self._blobs.mkdir(parents=True, exist_ok=True)
        self._models.mkdir(parents=True, exist_ok=True)

    def has(self, file: ModelFile) -> bool:
        """Whether the bytes are here and are what they should be. Others under that name are thrown away."""
        path = self._blobs / file.sha256
        if not path.exists():
            return False
        if sha256_of(path) == (file.sha256, file.size):
            path.touch()
            return True
        path.unlink()
        return False

    def writer(self, file: ModelFile) -> VerifyingWriter:
        """Take up or begin a fetch."""
        return VerifyingWriter(self._blobs / file.sha256, file.sha256, file.size)

    def lay_out(self, record: VersionRecord) -> Path:
        """Make the version's folder anew out of blobs that are all here; returns it."""
        folder = self._models / record.model / str(record.version)
        shutil.rmtree(folder, ignore_errors=True)
        for file in record.files:
            path = folder / file.path
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(self._blobs / file.sha256, path)
            except OSError:  # a file system without hard links
                shutil.copyfile(self._blobs / file.sha256, path)
        return folder

    def remove(self, model: str, version: int) -> None:
        """Remove a version's folder; its blobs stay until `sweep`."""
        shutil.rmtree(self._models / model / str(version), ignore_errors=True)

    def sweep(self, keep: set[str], *, now_s: float | None = None) -> list[str]:
        """Delete blobs, and cut fetches, whose digest is not in `keep`; returns the names deleted.

        What was used in the last hour stays: a load that has just begun may count on it.
        """
        before = (time.time() if now_s is None else now_s) - KEEP_S
        deleted = []
        for path in self._blobs.iterdir():
            if path.name.removesuffix(".part") not in keep and path.stat().st_mtime < before:
                path.unlink(missing_ok=True)
                deleted.append(path.name)
        return deleted

    def save(self, view: RegistryView) -> None:
        """Remember what the registry said: whole or not at all."""
        temporary = self._state.with_suffix(".tmp")
        with temporary.open("w") as file:
            json.dump(to_json(view), file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(self._state)
        fsync_directory(self._root)

    def remembered(self) -> RegistryView | None:
        """What the registry said last; None when nothing readable is here."""
        try:
            return from_json(json.loads(self._state.read_text()))
        except (OSError, ValueError, KeyError, TypeError):
            return None
