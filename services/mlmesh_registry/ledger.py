"""Which blobs are here and which uploads are under way, in SQL: the truth that files on disk follow.

A blob is visible when it has a row, and gets one only after its bytes are durable. Errors: NotFound (BLOB_NOT_FOUND,
UPLOAD_NOT_FOUND), AlreadyExists (REQUEST_ID_REUSED), InvalidInput, Overloaded (DISK_FULL).
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

import sqlalchemy as sa

from mlmesh_registry import names
from mlmesh_registry.database import Database, Write
from mlmesh_registry.events import from_micros, to_micros
from mlmesh_registry.requests import first_answer, remember
from mlmesh_registry.tables import blobs, uploads
from mlmesh_registry.versions import fingerprint
from mlmesh_runtime.errors import InvalidInput, NotFound


@dataclass(frozen=True, slots=True, kw_only=True)
class Blob:
    """An immutable run of bytes, named by its hex SHA-256."""

    sha256: str
    size_bytes: int

    @property
    def name(self) -> str:
        """Resource name."""
        return names.blob_name(self.sha256)


@dataclass(frozen=True, slots=True, kw_only=True)
class Upload:
    """An upload; `committed_bytes` survive a crash. A finished one has become a blob."""

    id: str
    sha256: str
    size_bytes: int
    committed_bytes: int
    expire_time: datetime
    finished: bool = False

    @property
    def name(self) -> str:
        """Resource name."""
        return names.upload_name(self.id)


class SqlBlobLedger:
    """Rows of uploads and blobs.

    Args:
        upload_ttl_s: an upload that got no bytes for this long is gone.
        new_id: ids of uploads; they must not be guessable, since an id is all it takes to go on with one.
    """

    def __init__(self, database: Database, *, upload_ttl_s: float, new_id: Callable[[], str]) -> None:
        self._database = database
        self._ttl = timedelta(seconds=upload_ttl_s)
        self._new_id = new_id

    async def start(self, sha256: str, size_bytes: int, *, request_id: str, actor: str) -> Upload | Blob:
        """Open an upload, or give the blob when it is here. A repeated request_id finds its upload as it is now."""
        same = fingerprint(sha256, size_bytes)

        def transact(write: Write) -> Upload | Blob:
            answer = first_answer(write, "StartUpload", request_id, same)
            if (blob := _blob(write.connection, sha256)) is not None:
                if blob.size_bytes != size_bytes:
                    raise InvalidInput(
                        f"size_bytes: {size_bytes}, but the blob of that digest has {blob.size_bytes}",
                        field="size_bytes",
                    )
                return blob
            if answer and (first := _upload(write.connection, answer["upload"], write.now)) is not None:
                return first
            upload = Upload(
                id=self._new_id(),
                sha256=sha256,
                size_bytes=size_bytes,
                committed_bytes=0,
                expire_time=write.now + self._ttl,
            )
            write.connection.execute(
                uploads.insert().values(
                    id=upload.id,
                    sha256=sha256,
                    size_bytes=size_bytes,
                    committed_bytes=0,
                    finished=False,
                    create_time=to_micros(write.now),
                    expire_time=to_micros(upload.expire_time),
                    creator=actor,
                )
            )
            remember(write, "StartUpload", request_id, same, {"upload": upload.id})
            return upload

        return await self._database.write(transact, actor=actor)

    async def get(self, upload_id: str, now: datetime) -> Upload:
        """Read an upload; one past its time is not found."""
        found = await self._database.read(lambda connection: _upload(connection, upload_id, now))
        if found is None:
            raise NotFound(f"{names.upload_name(upload_id)} not found, or expired", reason="UPLOAD_NOT_FOUND")
        return found

    async def commit(self, upload_id: str, committed_bytes: int) -> None:
        """Answer for bytes that are on disk, and put the upload's end off."""

        def transact(write: Write) -> None:
            write.connection.execute(
                uploads.update()
                .where(uploads.c.id == upload_id)
                .values(committed_bytes=committed_bytes, expire_time=to_micros(write.now + self._ttl))
            )

        await self._database.write(transact)

    async def finish(self, upload: Upload) -> Blob:
        """Make the upload's blob visible."""

        def transact(write: Write) -> Blob:
            blob = Blob(sha256=upload.sha256, size_bytes=upload.size_bytes)
            if _blob(write.connection, blob.sha256) is None:
                write.connection.execute(
                    blobs.insert().values(
                        sha256=blob.sha256, size_bytes=blob.size_bytes, create_time=to_micros(write.now)
                    )
                )
            # The row stays until it expires, so that a repeated finish gets the same answer.
            write.connection.execute(uploads.update().where(uploads.c.id == upload.id).values(finished=True))
            return blob

        return await self._database.write(transact)

    async def discard(self, upload_ids: Collection[str]) -> None:
        """Forget uploads."""
        await self._database.write(
            lambda write: write.connection.execute(uploads.delete().where(uploads.c.id.in_(upload_ids))).close()
        )

    async def expired(self, now: datetime) -> Collection[str]:
        """Ids of uploads past their time."""
        query = sa.select(uploads.c.id).where(uploads.c.expire_time <= to_micros(now))
        return await self._database.read(lambda connection: set(connection.execute(query).scalars()))

    async def find(self, sha256: str) -> Blob | None:
        """Look a blob up."""
        return await self._database.read(lambda connection: _blob(connection, sha256))

    async def blob(self, sha256: str) -> Blob:
        """Read a blob."""
        if (found := await self.find(sha256)) is None:
            raise NotFound(f"{names.blob_name(sha256)} not found", reason="BLOB_NOT_FOUND")
        return found

    async def known(self) -> tuple[Collection[str], Collection[str]]:
        """SHA-256 of every blob, and ids of every unfinished upload: the files that may be there."""

        def transact(connection: sa.Connection) -> tuple[set[str], set[str]]:
            under_way = sa.select(uploads.c.id).where(uploads.c.finished.is_(False))
            return (
                set(connection.execute(sa.select(blobs.c.sha256)).scalars()),
                set(connection.execute(under_way).scalars()),
            )

        return await self._database.read(transact)


def _blob(connection: sa.Connection, sha256: str) -> Blob | None:
    row: sa.Row[Any] | None = connection.execute(blobs.select().where(blobs.c.sha256 == sha256)).one_or_none()
    return None if row is None else Blob(sha256=row.sha256, size_bytes=row.size_bytes)


def _upload(connection: sa.Connection, upload_id: str, now: datetime) -> Upload | None:
    row: sa.Row[Any] | None = connection.execute(uploads.select().where(uploads.c.id == upload_id)).one_or_none()
    if row is None or row.expire_time <= to_micros(now):
        return None
    return Upload(
        id=row.id,
        sha256=row.sha256,
        size_bytes=row.size_bytes,
        committed_bytes=row.committed_bytes,
        expire_time=from_micros(row.expire_time),
        finished=row.finished,
    )
