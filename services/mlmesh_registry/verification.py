"""Reading every byte of a version, and saying what was found."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import datetime

from mlmesh_registry import names
from mlmesh_registry.names import AliasName, VersionName
from mlmesh_registry.store import SqlModelStore
from mlmesh_registry.versions import Version

Verify = Callable[[str], Awaitable[bool]]
"""Read a blob, by its SHA-256, and tell whether it has all the bytes that were published."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verified:
    """The version as it is now, paths of files that are not those published, and how many bytes were read."""

    version: Version
    corrupt_paths: tuple[str, ...]
    verified_bytes: int


class Verification:
    """Verifies versions of one registry.

    Args:
        verify: see Verify.
        clock: the present time, timezone-aware UTC.
    """

    def __init__(self, store: SqlModelStore, *, verify: Verify, clock: Callable[[], datetime]) -> None:
        self._store = store
        self._verify = verify
        self._clock = clock

    async def verify(self, name: VersionName | AliasName, *, actor: str) -> Verified:
        """Read every byte of a version. One whose bytes are others is quarantined; no stage is lifted.

        Errors: NotFound (MODEL_NOT_FOUND, MODEL_VERSION_NOT_FOUND, MODEL_ALIAS_NOT_FOUND), NotReady
        (STORAGE_UNAVAILABLE) when they cannot be read now, which says nothing of them.
        """
        version = await self._store.get_version(name)
        number = VersionName(model=version.model, number=version.number)
        began, whole, read_bytes = self._clock(), dict[str, bool](), 0
        for artifact in version.content.artifacts:
            if artifact.sha256 not in whole:
                whole[artifact.sha256] = await self._verify(artifact.sha256)
                read_bytes += artifact.size_bytes
        corrupt = [artifact for artifact in version.content.artifacts if not whole[artifact.sha256]]
        for sha256 in sorted({artifact.sha256 for artifact in corrupt}):
            blob = names.blob_name(sha256)
            await self._store.quarantine_blob(sha256, f"{blob} has not the bytes that were published")
        if corrupt:
            after = await self._store.get_version(number)
        else:
            after = await self._store.record_verified(number, began=began, actor=actor)
        return Verified(
            version=after, corrupt_paths=tuple(artifact.path for artifact in corrupt), verified_bytes=read_bytes
        )
