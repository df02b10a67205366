"""Where a registry in this process keeps its bytes, for tests that look behind it: a folder, or a real S3 bucket."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import obstore
import pytest

from mlmesh_registry.blobs import Blobs, Stored
from mlmesh_registry.folder import FolderBlobs
from mlmesh_registry.objects import ObjectBlobs, open_store
from tests.support.s3 import S3Server


class FolderPlace:
    """The registry's folder."""

    url = ""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def blobs(self) -> Blobs:
        """Another process's view of it."""
        return FolderBlobs(self.folder)

    def write(self, key: str, data: bytes) -> None:
        """Put these bytes there instead, as a disk might."""
        path = self.folder / key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


class BucketPlace:
    """A bucket of the test's own."""

    def __init__(self, url: str) -> None:
        self.url = url
        self._store: Any = open_store(url, "test")

    def blobs(self) -> Blobs:
        """Another process's view of it."""
        return ObjectBlobs(self._store)

    def write(self, key: str, data: bytes) -> None:
        """Put these bytes there instead, as a person might."""
        obstore.put(self._store, key, data, use_multipart=False)


Place = FolderPlace | BucketPlace


def new_place(kind: str, tmp_path: Path, s3: S3Server | None, monkeypatch: pytest.MonkeyPatch) -> Place:
    """A place of a kind: "folder" or "s3"."""
    if kind == "folder":
        return FolderPlace(tmp_path / "data" / "blobs")
    assert s3 is not None
    return BucketPlace(s3.bucket(monkeypatch))


def lying(place: Place) -> Sequence[Stored]:
    """Everything that lies there, by key."""
    return sorted((each for page in place.blobs().stored() for each in page), key=lambda each: each.key)


def only(place: Place, sha256: str) -> str:
    """Key of the one thing that lies at places of a digest."""
    (found,) = place.blobs().of(sha256)
    return found.key


def remove(place: Place, key: str) -> None:
    """Take something away."""
    place.blobs().remove(Stored(key=key, sha256="", upload_id=""))
