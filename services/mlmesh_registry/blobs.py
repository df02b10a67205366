"""The port to wherever bytes rest. Implementations are synchronous, for an executor, and safe to share by processes.

Bytes are content-addressed and written once: every arrival gets a place of its own, made of its digest and the id of
the upload that brought it. So nothing that is removed can be what somebody else is bringing, and no lock is needed.
Paths are made of digests and of ids that registries drew, never of names that came from outside.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from mlmesh_registry.inspection import Inspection
from mlmesh_registry.ledger import Blob, Found, Part, Upload
from mlmesh_runtime.errors import Corrupt, NotReady


class Staging(Protocol):
    """Bytes of one upload, written in order by one process from the `committed` end of it on.

    Attributes:
        written: where the next byte goes, in the whole.
        committed: where the next byte that is not on disk and recorded is.
    """

    written: int
    committed: int

    def write(self, data: bytes) -> None:
        """Add bytes. Errors: Overloaded (DISK_FULL); then nothing was added."""

    def sync(self) -> Part:
        """Make everything written durable; the part that it is in. Bytes may be written meanwhile.

        Errors: Overloaded (DISK_FULL), NotReady (STORAGE_UNAVAILABLE); OSError when the disk failed, after which nobody
        knows which pages reached it. After any of them this staging must not be used again.
        """

    def close(self) -> None:
        """Let go of what is not committed. Safe to call twice."""


class Reading(Protocol):
    """A blob that is being read."""

    def read(self, start: int, end: int) -> bytes:
        """Bytes [start, end). Errors: Corrupt (BLOB_CORRUPT), NotReady (STORAGE_UNAVAILABLE)."""

    def close(self) -> None:
        """Let go."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """Something that lies in the store: a blob's bytes, or (sha256 "") bytes of an upload under way."""

    key: str
    sha256: str
    upload_id: str


class Blobs(Protocol):
    """Where bytes rest.

    Attributes:
        inspects_as_written: whether bytes can be looked at when they come, and not again when they are admitted.
        commit_bytes_max: most bytes that are worth holding back before they are made durable.
        read_bytes: how much to ask for at a time, a multiple of ledger.BLOCK_BYTES.

    Errors of every method: Overloaded (DISK_FULL), NotReady (STORAGE_UNAVAILABLE).
    """

    inspects_as_written: bool
    commit_bytes_max: int
    read_bytes: int

    def stage(self, upload: Upload, parts: Sequence[Part]) -> Staging:
        """Go on with an upload. Errors: Corrupt (BLOB_CORRUPT) when committed bytes are gone."""

    def admit(self, upload: Upload, parts: Sequence[Part], inspection: Inspection) -> Found:
        """Put the bytes of an upload where its blob belongs, durably. The staged ones stay.

        What the inspection has not seen of them is shown to it first, and nothing is there before it agreed. Errors:
        Corrupt (DIGEST_MISMATCH; BLOB_CORRUPT when committed bytes are gone), InvalidInput (FORMAT_NOT_ALLOWED).
        """

    def drop(self, upload_id: str) -> None:
        """Remove the staged bytes of an upload, if any."""

    def open(self, blob: Blob) -> Reading:
        """Begin to read. Errors: Corrupt (BLOB_CORRUPT) when its bytes are gone, cut or too many."""

    def of(self, sha256: str) -> Sequence[Stored]:
        """Everything that lies at places of a digest."""

    def stored(self) -> Iterator[Sequence[Stored]]:
        """Everything that lies here, some at a time."""

    def remove(self, stored: Stored) -> None:
        """Remove; no error when it is gone."""


def corrupt(blob: Blob, what: str) -> Corrupt:
    """Build the error for a blob that is not what was stored."""
    return Corrupt(f"{blob.name}: {what}", reason="BLOB_CORRUPT")


def lost(upload_id: str) -> Corrupt:
    """Build the error for committed bytes that are not there any more."""
    return Corrupt(f"uploads/{upload_id}: committed bytes of it are gone", reason="BLOB_CORRUPT")


def unavailable(what: str) -> NotReady:
    """Build the error for a store that does not answer, or is not the one it was."""
    return NotReady(f"the store of blobs is not available: {what}", reason="STORAGE_UNAVAILABLE")
