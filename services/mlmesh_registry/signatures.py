"""Signatures of versions in SQL: stored once, verified anew each time against the keys trusted then."""

import hashlib
import logging
import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import sqlalchemy as sa

from mlmesh_registry import signing, tables
from mlmesh_registry.database import Database, Write
from mlmesh_registry.events import from_micros, to_micros
from mlmesh_registry.lookups import live_version, version_of
from mlmesh_registry.names import VersionName
from mlmesh_registry.signing import BadKeyError, BadSignatureError, TrustedKeys
from mlmesh_registry.versions import Version
from mlmesh_runtime.errors import InvalidInput, Overloaded

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class VersionSignature:
    """A stored signature, and what became of it.

    Attributes:
        bundle: Sigstore bundle, JSON.
        key_id: of the trusted key that made it, hex; empty where none did.
        problem: why it does not hold; empty where it does.
        create_time: when it was stored.
        creator: SPIFFE id of who stored it, empty outside a mesh.
    """

    bundle: str
    key_id: str
    problem: str
    create_time: datetime
    creator: str


class KeyFolder:
    """Keys of a folder as they are now; read again when a file of it changes. Any thread may ask.

    Errors: BadKeyError, of the first reading only. Later a folder with a bad file trusts no key, which the log tells.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._lock = threading.Lock()
        self._seen = self._state()
        self._keys = signing.load_keys(folder)

    def __call__(self) -> TrustedKeys:
        """Give the keys trusted now."""
        with self._lock:
            state = self._state()
            if state != self._seen:
                self._seen = state
                try:
                    self._keys = signing.load_keys(self._folder)
                except BadKeyError as error:
                    log.error("no signature is trusted until the folder of keys is in order: %s", error)  # noqa: TRY400
                    self._keys = TrustedKeys()
            return self._keys

    def _state(self) -> object:
        try:
            # Kubernetes changes the target of a link, which the stat of what it points at shows.
            return [(path.name, s.st_ino, s.st_mtime_ns, s.st_size) for path, s in _stats(self._folder)]
        except OSError as error:
            return str(error)


def _stats(folder: Path) -> list[tuple[Path, os.stat_result]]:
    return [(path, path.stat()) for path in sorted(folder.iterdir()) if not path.name.startswith(".")]


class Signatures:
    """Signatures of versions. Errors: NotFound (MODEL_VERSION_NOT_FOUND), InvalidInput (SIGNATURE_INVALID)."""

    def __init__(self, database: Database, trusted: Callable[[], TrustedKeys]) -> None:
        self._database = database
        self._trusted = trusted

    async def add(self, name: VersionName, bundle: str, *, actor: str) -> VersionSignature:
        """Store a signature that holds; the same bundle again is told as it was stored first.

        Errors: WrongState (VERSION_DELETED), Overloaded (QUOTA_EXCEEDED) when the version has 16.
        """

        def transact(write: Write) -> VersionSignature:
            version = live_version(write.connection, name)
            try:
                key = signing.verify(bundle, files_of(version), self._trusted())
            except BadSignatureError as error:
                text = f"bundle: {error}"
                raise InvalidInput(text, field="bundle", reason="SIGNATURE_INVALID") from None
            stored = self._stored(write.connection, version)
            if (same := next((each for each in stored if each.bundle == bundle), None)) is not None:
                return same
            if len(stored) >= signing.SIGNATURES_MAX:
                text = f"{name} has {len(stored)} signatures, which is all that a version can have"
                raise Overloaded(text, reason="QUOTA_EXCEEDED", retry_after_s=None)
            digest = hashlib.sha256(bundle.encode()).hexdigest()
            write.connection.execute(
                tables.version_signatures.insert().values(
                    revision=version.revision,
                    digest=digest,
                    position=len(stored) + 1,
                    bundle=bundle,
                    create_time=to_micros(write.now),
                    creator=write.actor,
                )
            )
            write.audit("AddModelVersionSignature", str(name), {"key_id": key, "bundle_sha256": digest})
            return VersionSignature(bundle=bundle, key_id=key, problem="", create_time=write.now, creator=write.actor)

        return await self._database.write(transact, actor=actor)

    async def list(self, name: VersionName) -> Sequence[VersionSignature]:
        """Signatures of a version, oldest first, verified now."""
        return await self._database.read(lambda connection: self._stored(connection, version_of(connection, name)))

    def valid_key_ids(self, connection: sa.Connection, model_id: str, number: int) -> set[str]:
        """Ids of the keys, trusted now, that signed a version. Errors: NotFound."""
        version = version_of(connection, VersionName(model=model_id, number=number))
        return {each.key_id for each in self._stored(connection, version) if each.key_id}

    def _stored(self, connection: sa.Connection, version: Version) -> Sequence[VersionSignature]:
        column = tables.version_signatures.c
        query = tables.version_signatures.select().where(column.revision == version.revision).order_by(column.position)
        found = []
        for row in connection.execute(query):
            key, problem = "", ""
            try:
                key = signing.verify(row.bundle, files_of(version), self._trusted())
            except BadSignatureError as error:
                problem = str(error)
            found.append(
                VersionSignature(
                    bundle=row.bundle,
                    key_id=key,
                    problem=problem,
                    create_time=from_micros(row.create_time),
                    creator=row.creator,
                )
            )
        return found


def files_of(version: Version) -> dict[str, str]:
    """Hex SHA-256 by path."""
    return {artifact.path: artifact.sha256 for artifact in version.content.artifacts}
