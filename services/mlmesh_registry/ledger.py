"""Which blobs are here and which uploads are under way, in SQL: the truth that files on disk follow.

A blob is visible when it has a row, and gets one only after its bytes are durable. Several processes may work on one
ledger: what is answered as committed is added by compare-and-set, so of two that append to one upload one is told.
Errors: NotFound (BLOB_NOT_FOUND, UPLOAD_NOT_FOUND), AlreadyExists (REQUEST_ID_REUSED), InvalidInput, Overloaded
(DISK_FULL, QUOTA_EXCEEDED), NotReady (STORAGE_UNAVAILABLE).
"""

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

import sqlalchemy as sa

from mlmesh_registry import names, quotas, references
from mlmesh_registry.database import Database, Write
from mlmesh_registry.events import from_micros, to_micros
from mlmesh_registry.requests import first_answer, remember
from mlmesh_registry.tables import blob_blocks, blobs, upload_parts, uploads
from mlmesh_registry.versions import fingerprint
from mlmesh_runtime.errors import Conflict, InvalidInput, NotFound

BLOCK_BYTES = 1 << 20
"""What a digest of a blob's index covers; only the last block of a blob is shorter."""
DIGEST_BYTES = 32
_BLOCKS_PER_ROW = 1024
FORMAT_NONE = "none"
"""Format of blobs that came before formats were looked at, and are none of the allowed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Blob:
    """An immutable run of bytes, named by its hex SHA-256.

    `location` is the upload that brought them; `format` a formats.Format, FORMAT_NONE, or "" while nobody has looked;
    `damaged` when other bytes than those were found in its place.
    """

    sha256: str
    size_bytes: int
    location: str = ""
    format: str = ""
    damaged: bool = False

    @property
    def name(self) -> str:
        """Resource name."""
        return names.blob_name(self.sha256)


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A run of committed bytes of an upload: where it starts, how long it is, and what the store calls it."""

    start: int
    size_bytes: int
    key: str

    @property
    def end(self) -> int:
        """Where the next part starts."""
        return self.start + self.size_bytes


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What was found out about bytes: their format, and the SHA-256 of each block, one after the other."""

    format: str
    digests: bytes


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
        """Open an upload, or give the blob when it is here whole. A repeated request_id finds its upload as it is."""
        same = fingerprint(sha256, size_bytes)

        def transact(write: Write) -> Upload | Blob:
            answer = first_answer(write, "StartUpload", request_id, same)
            if (blob := _blob(write.connection, sha256)) is not None:
                if blob.size_bytes != size_bytes:
                    text = f"size_bytes: {size_bytes}, but the blob of that digest has {blob.size_bytes}"
                    raise InvalidInput(text, field="size_bytes")
                if not blob.damaged:
                    references.wanted(write, sha256)
                    return blob
            first = _upload(write.connection, answer["upload"], write.now) if answer else None
            if first is not None and not first.finished:
                return first
            quotas.check_upload(write, size_bytes)
            upload = Upload(
                id=self._new_id(),
                sha256=sha256,
                size_bytes=size_bytes,
                committed_bytes=0,
                expire_time=write.now + self._ttl,
            )
            _insert(write, upload)
            remember(write, "StartUpload", request_id, same, {"upload": upload.id})
            write.audit("StartUpload", upload.name, {"sha256": sha256, "size_bytes": size_bytes})
            return upload

        return await self._database.write(transact, actor=actor)

    async def get(self, upload_id: str, now: datetime) -> Upload:
        """Read an upload; one past its time is not found."""
        return (await self.parts(upload_id, now))[0]

    async def parts(self, upload_id: str, now: datetime) -> tuple[Upload, Sequence[Part]]:
        """Read an upload with what is committed of it, in order."""

        def transact(connection: sa.Connection) -> tuple[Upload, Sequence[Part]]:
            upload = _upload(connection, upload_id, now)
            if upload is None:
                raise _no_upload(upload_id)
            column = upload_parts.c
            rows = connection.execute(upload_parts.select().where(column.upload == upload_id).order_by(column.start))
            return upload, [Part(start=row.start, size_bytes=row.size_bytes, key=row.key) for row in rows]

        return await self._database.read(transact)

    async def commit(self, upload_id: str, part: Part, *, expected_bytes: int) -> None:
        """Answer for the bytes of a part, new or grown, and put the upload's end off.

        Errors: Conflict (UPLOAD_OFFSET_MISMATCH) when something else than expected_bytes is committed by now.
        """

        def transact(write: Write) -> None:
            upload = _upload(write.connection, upload_id, write.now)
            if upload is None:
                raise _no_upload(upload_id)
            if upload.finished or upload.committed_bytes != expected_bytes:
                raise offset_mismatch("somebody else went on with this upload", upload.committed_bytes)
            here = upload_parts.c.upload == upload_id, upload_parts.c.start == part.start
            write.connection.execute(upload_parts.delete().where(*here))
            write.connection.execute(
                upload_parts.insert().values(
                    upload=upload_id, start=part.start, size_bytes=part.size_bytes, key=part.key
                )
            )
            write.connection.execute(
                uploads.update()
                .where(uploads.c.id == upload_id)
                .values(committed_bytes=part.end, expire_time=to_micros(write.now + self._ttl))
            )

        await self._database.write(transact)

    async def finish(self, upload: Upload, found: Found, *, actor: str) -> tuple[Blob, bool]:
        """Make the upload's blob visible; the one that is here already, unless that is damaged.

        Returns:
            The blob, and whether bytes of it may lie where it is not.
        """

        def transact(write: Write) -> tuple[Blob, bool]:
            now = _upload(write.connection, upload.id, write.now)
            if now is None:
                raise _no_upload(upload.id)
            before = _blob(write.connection, upload.sha256)
            if now.finished and before is None:
                raise _no_upload(upload.id)
            # The row stays until it expires, so that a repeated finish gets the same answer.
            write.connection.execute(uploads.update().where(uploads.c.id == upload.id).values(finished=True))
            write.connection.execute(upload_parts.delete().where(upload_parts.c.upload == upload.id))
            if before is not None and not before.damaged:
                return before, before.location != upload.id
            blob = Blob(sha256=upload.sha256, size_bytes=upload.size_bytes, location=upload.id, format=found.format)
            _put(write, blob, found.digests, new=before is None)
            write.audit("FinishUpload", blob.name, {"size_bytes": blob.size_bytes, "format": blob.format})
            return blob, before is not None

        return await self._database.write(transact, actor=actor)

    async def cancel(self, upload_id: str, *, actor: str) -> None:
        """Forget an upload, if there is one."""

        def transact(write: Write) -> None:
            gone = write.connection.execute(uploads.delete().where(uploads.c.id == upload_id)).rowcount
            if gone:
                write.audit("CancelUpload", names.upload_name(upload_id), {})

        await self._database.write(transact, actor=actor)

    async def discard(self, upload_id: str) -> None:
        """Forget an upload that came to nothing."""
        await self._database.write(
            lambda write: write.connection.execute(uploads.delete().where(uploads.c.id == upload_id)).close()
        )

    async def expire(self, *, busy: Collection[str]) -> Collection[str]:
        """Forget uploads past their time that nobody here is busy with; their ids."""

        def transact(write: Write) -> Collection[str]:
            late = uploads.c.expire_time <= to_micros(write.now)
            found = set(write.connection.execute(sa.select(uploads.c.id).where(late)).scalars()) - set(busy)
            for some in _some(sorted(found)):
                write.connection.execute(uploads.delete().where(uploads.c.id.in_(some)))
            return found

        return await self._database.write(transact)

    async def find(self, sha256: str) -> Blob | None:
        """Look a blob up."""
        return await self._database.read(lambda connection: _blob(connection, sha256))

    async def blob(self, sha256: str) -> Blob:
        """Read a blob."""
        if (found := await self.find(sha256)) is None:
            raise NotFound(f"{names.blob_name(sha256)} not found", reason="BLOB_NOT_FOUND")
        return found

    async def digests(self, blob: Blob, first: int, count: int) -> bytes | None:
        """SHA-256 of blocks [first, first + count); None when nobody has looked at the blob yet."""
        column = blob_blocks.c
        query = blob_blocks.select().where(
            column.sha256 == blob.sha256,
            column.first_block > first - _BLOCKS_PER_ROW,
            column.first_block < first + max(count, 1),
        )

        def transact(connection: sa.Connection) -> bytes | None:
            rows = connection.execute(query.order_by(column.first_block)).all()
            if not rows:
                return None
            skipped = (first - rows[0].first_block) * DIGEST_BYTES
            return b"".join(row.digests for row in rows)[skipped : skipped + count * DIGEST_BYTES]

        return await self._database.read(transact)

    async def unexamined(self) -> Sequence[Blob]:
        """Some blobs that nobody has looked at: they came before formats were."""
        query = blobs.select().where(blobs.c.format == "", blobs.c.damaged.is_(False)).limit(100)
        return await self._database.read(lambda connection: [_from_row(row) for row in connection.execute(query)])

    async def examined(self, blob: Blob, found: Found) -> None:
        """Keep what was found out about a blob that is here already."""

        def transact(write: Write) -> None:
            if _blob(write.connection, blob.sha256) == blob:
                write.connection.execute(
                    blobs.update().where(blobs.c.sha256 == blob.sha256).values(format=found.format)
                )
                _put_digests(write, blob.sha256, found.digests)

        await self._database.write(transact)

    async def judge(self, blob: Blob, *, damaged: bool) -> None:
        """Remember whether the bytes that this blob is at now are its own."""

        def transact(write: Write) -> None:
            here = blobs.c.sha256 == blob.sha256, blobs.c.location == blob.location
            write.connection.execute(blobs.update().where(*here).values(damaged=damaged))

        await self._database.write(transact)

    async def kept(
        self, stored: Iterable[tuple[str, str]], upload_ids: Iterable[str]
    ) -> tuple[Collection[tuple[str, str]], Collection[str]]:
        """Of stored bytes, named by SHA-256 and location, and of uploads: those that are known or on their way.

        Whatever was listed before this was asked and is not in the answer will never be needed.
        """
        places = sorted(set(stored))
        ids = sorted({location for _, location in places} | set(upload_ids))

        def transact(connection: sa.Connection) -> tuple[set[tuple[str, str]], set[str]]:
            known: set[tuple[str, str]] = set()
            for some in _some(sorted({sha256 for sha256, _ in places})):
                query = sa.select(blobs.c.sha256, blobs.c.location).where(blobs.c.sha256.in_(some))
                known.update((row.sha256, row.location) for row in connection.execute(query))
            coming: set[str] = set()
            for some in _some(ids):
                query = sa.select(uploads.c.id).where(uploads.c.id.in_(some), uploads.c.finished.is_(False))
                coming.update(connection.execute(query).scalars())
            known.update(place for place in places if place[1] in coming)
            return known, coming

        return await self._database.read(transact)


def formats_of(connection: sa.Connection, sha256s: Collection[str]) -> dict[str, str]:
    """Formats of blobs by SHA-256, see Blob.format; blobs that are not here are left out."""
    found: dict[str, str] = {}
    for some in _some(sorted(sha256s)):
        query = sa.select(blobs.c.sha256, blobs.c.format).where(blobs.c.sha256.in_(some))
        found.update((row.sha256, row.format) for row in connection.execute(query))
    return found


def offset_mismatch(text: str, expected: int) -> Conflict:
    """Build the error for a chunk that does not continue the upload; GetUpload tells where to go on."""
    return Conflict(text, reason="UPLOAD_OFFSET_MISMATCH", metadata={"expected_offset": str(expected)})


def _no_upload(upload_id: str) -> NotFound:
    return NotFound(f"{names.upload_name(upload_id)} not found, or expired", reason="UPLOAD_NOT_FOUND")


def _insert(write: Write, upload: Upload) -> None:
    write.connection.execute(
        uploads.insert().values(
            id=upload.id,
            sha256=upload.sha256,
            size_bytes=upload.size_bytes,
            committed_bytes=upload.committed_bytes,
            finished=upload.finished,
            create_time=to_micros(write.now),
            expire_time=to_micros(upload.expire_time),
            creator=write.actor,
        )
    )


def _put(write: Write, blob: Blob, digests: bytes, *, new: bool) -> None:
    values = {"format": blob.format, "location": blob.location, "damaged": False}
    if new:
        write.connection.execute(
            blobs.insert().values(
                sha256=blob.sha256, size_bytes=blob.size_bytes, create_time=to_micros(write.now), **values
            )
        )
        references.arrived(write, blob.sha256, blob.size_bytes)
    else:
        write.connection.execute(blobs.update().where(blobs.c.sha256 == blob.sha256).values(**values))
    _put_digests(write, blob.sha256, digests)


def _put_digests(write: Write, sha256: str, digests: bytes) -> None:
    write.connection.execute(blob_blocks.delete().where(blob_blocks.c.sha256 == sha256))
    row_bytes = _BLOCKS_PER_ROW * DIGEST_BYTES
    rows = [
        {"sha256": sha256, "first_block": at // DIGEST_BYTES, "digests": digests[at : at + row_bytes]}
        for at in range(0, max(len(digests), 1), row_bytes)
    ]
    write.connection.execute(blob_blocks.insert(), rows)


def _blob(connection: sa.Connection, sha256: str) -> Blob | None:
    row: sa.Row[Any] | None = connection.execute(blobs.select().where(blobs.c.sha256 == sha256)).one_or_none()
    return None if row is None else _from_row(row)


def _from_row(row: sa.Row[Any]) -> Blob:
    return Blob(
        sha256=row.sha256,
        size_bytes=row.size_bytes,
        location=row.location,
        format=row.format,
        damaged=row.damaged,
    )


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


def _some(items: Sequence[str], most: int = 500) -> Iterable[Sequence[str]]:
    """Databases bound the number of parameters of a statement."""
    return (items[first : first + most] for first in range(0, len(items), most))
