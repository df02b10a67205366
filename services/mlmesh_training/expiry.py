"""How ended jobs leave the ledger: in steps that are short and may be the last before a crash.

A deleted job is gone for everybody at once; that its events and files are still to go is noted in the same transaction.
All methods block.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from datetime import datetime

import sqlalchemy as sa

from mlmesh_runtime.errors import NotFound
from mlmesh_training import documents, moves, tables
from mlmesh_training.jobs import FINAL, JobState


class SqlExpiry:
    """Deletes jobs of a ledger.

    Args:
        transaction: opens a transaction on the migrated database.
        on_commit: called after a deletion, on the calling thread, with the uid and 0.
    """

    def __init__(
        self,
        transaction: Callable[[], AbstractContextManager[sa.Connection]],
        *,
        on_commit: Callable[[str, int], None] = lambda _uid, _sequence: None,
    ) -> None:
        self._transaction = transaction
        self._on_commit = on_commit

    def kept(self) -> set[str]:
        """Jobs whose files are needed: all that have not ended, and the ended ones that may go on."""
        columns = tables.jobs.c
        present = [state for state in JobState if state not in FINAL]
        with self._transaction() as connection:
            found = connection.execute(
                sa.select(columns.uid).where(columns.state.in_(present) | columns.files.is_(True))
            )
            return set(found.scalars())

    def idle(self, *, ended_before: datetime, limit: int) -> Sequence[str]:
        """Ended jobs whose files may go: those that succeeded, and others that ended before a moment; oldest first."""
        columns = tables.jobs.c
        statement = (
            sa.select(columns.uid)
            .where(
                columns.files.is_(True),
                columns.end_time.is_not(None),
                (columns.state == JobState.SUCCEEDED) | (columns.end_time < ended_before.isoformat()),
            )
            .order_by(columns.end_time)
            .limit(limit)
        )
        with self._transaction() as connection:
            return connection.execute(statement).scalars().all()

    def expired(self, *, ended_before: datetime, finished_max: int, limit: int) -> Sequence[str]:
        """Ended jobs that are to go, oldest first: those that ended before a moment or are too many."""
        columns = tables.jobs.c
        oldest = sa.select(columns.uid, columns.end_time).where(columns.end_time.is_not(None))
        with self._transaction() as connection:
            ended = connection.execute(sa.select(sa.func.count()).where(columns.end_time.is_not(None))).scalar_one()
            rows = connection.execute(oldest.order_by(columns.end_time).limit(limit)).all()
        bound = ended_before.isoformat()
        return [row.uid for place, row in enumerate(rows) if row.end_time < bound or place < ended - finished_max]

    def delete(self, uid: str) -> None:
        """Delete an ended job. Errors: NotFound (JOB_NOT_FOUND), WrongState (JOB_NOT_FINISHED)."""
        columns = tables.jobs.c
        with self._transaction() as connection:
            row = connection.execute(
                sa.select(columns.number, columns.document).where(columns.uid == uid)
            ).one_or_none()
            if row is None:
                raise NotFound(f"no job 'jobs/{uid}'", reason="JOB_NOT_FOUND")
            moves.deletable(documents.read_job(json.loads(row.document)))
            connection.execute(tables.jobs.delete().where(columns.number == row.number))
            connection.execute(tables.doomed.insert().values(number=row.number, uid=uid))
        self._on_commit(uid, 0)

    def doomed(self) -> tuple[int, str] | None:
        """A deleted job of which something may still be there: its number and uid."""
        with self._transaction() as connection:
            row = connection.execute(sa.select(tables.doomed).order_by(tables.doomed.c.number).limit(1)).one_or_none()
        return None if row is None else (row.number, row.uid)

    def drop_events(self, number: int, *, limit: int) -> int:
        """Remove events of a deleted job, oldest first, at most limit; how many there were."""
        columns = tables.events.c
        with self._transaction() as connection:
            sequences = (
                connection.execute(
                    sa.select(columns.sequence).where(columns.job == number).order_by(columns.sequence).limit(limit)
                )
                .scalars()
                .all()
            )
            if sequences:
                connection.execute(
                    tables.events.delete().where(columns.job == number, columns.sequence <= sequences[-1])
                )
        return len(sequences)

    def forget(self, number: int) -> None:
        """Nothing of a deleted job is left."""
        with self._transaction() as connection:
            connection.execute(tables.doomed.delete().where(tables.doomed.c.number == number))
