"""The ledger of studies: every accepted study, its trials and all that happened to them, in the jobs' database.

The same promises as the ledger of jobs: when a method returns, what it wrote survives kill -9 and power loss; events
have sequences without gap and are bounded. All methods block; run them on the one thread of the jobs' ledger.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

import sqlalchemy as sa

from mlmesh_runtime.errors import AlreadyExists, NotFound, Overloaded, RevisionLost
from mlmesh_training import tables
from mlmesh_training.documents import dumps, read_time
from mlmesh_training.studies import documents
from mlmesh_training.studies.study import (
    FINAL,
    Decision,
    Event,
    EventBody,
    Recorded,
    Study,
    StudyChanged,
    StudySpec,
    Trial,
    TrialState,
)

# Of a study that is forgotten, so many at a time: whoever waits for the ledger does not wait long.
_FORGOTTEN_EVENTS = 2000
_FORGOTTEN_TRIALS = 50


@dataclass(frozen=True, slots=True, kw_only=True)
class StudyLimits:
    """Bounds of the ledger of studies."""

    studies_max: int = 16
    """Studies that may run at once; one more is refused with STUDIES_TOO_MANY."""
    events_per_study_max: int = 100_000
    """Events kept of a study; its oldest are dropped beyond that."""


class SqlStudyLedger:
    """Studies, trials and events in a database.

    Args:
        transaction: opens a transaction on the migrated database of the jobs' ledger.
        clock: the present time, timezone-aware UTC.
        on_commit: called after each commit, on the calling thread, with the uid and the last sequence.

    Errors of every method: Overloaded (DISK_FULL) when there is no room; nothing was changed then.
    """

    def __init__(
        self,
        transaction: Callable[[], AbstractContextManager[sa.Connection]],
        *,
        clock: Callable[[], datetime],
        on_commit: Callable[[str, int], None] = lambda _uid, _sequence: None,
        limits: StudyLimits = StudyLimits(),
    ) -> None:
        self._transaction = transaction
        self._clock = clock
        self._on_commit = on_commit
        self._limits = limits

    def earlier(self, spec: StudySpec, *, creator: str, request_id: str) -> Study | None:
        """What the same request stored before, as it was answered then. Errors: AlreadyExists (REQUEST_ID_REUSED)."""
        if not request_id:
            return None
        with self._transaction() as connection:
            return self._earlier(connection, request_id, _digest(spec, creator))

    def create(self, study: Study, *, request_id: str = "") -> Study:
        """Store a new study with its first event, or return what the same request stored before.

        Errors: AlreadyExists (REQUEST_ID_REUSED) when the request id came with other content or from another caller,
        Overloaded (STUDIES_TOO_MANY).
        """
        digest = _digest(study.spec, study.creator)
        first = replace(study, last_sequence=1)
        with self._transaction() as connection:
            if request_id and (earlier := self._earlier(connection, request_id, digest)):
                return earlier
            running = sa.select(sa.func.count()).where(tables.studies.c.state.not_in(FINAL))
            if connection.execute(running).scalar_one() >= self._limits.studies_max:
                raise Overloaded(
                    f"{self._limits.studies_max} studies run already", reason="STUDIES_TOO_MANY", retry_after_s=60.0
                )
            number = connection.execute(
                tables.studies.insert()
                .values(
                    uid=study.uid,
                    state=study.state,
                    request_id=request_id or None,
                    request_digest=digest,
                    first_sequence=1,
                    last_sequence=1,
                    document=dumps(documents.study_document(first)),
                )
                .returning(tables.studies.c.number)
            ).scalar_one()
            self._insert(
                connection, number, [Event(sequence=1, time=study.create_time, body=StudyChanged(study=first))]
            )
        self._on_commit(study.uid, 1)
        return first

    def get(self, uid: str) -> Study:
        """Read one study. Errors: NotFound (STUDY_NOT_FOUND)."""
        with self._transaction() as connection:
            return _study(self._row(connection, uid))

    def page(self, *, size: int, before: int | None = None) -> tuple[Sequence[Study], int | None]:
        """Studies newest first, at most size, older than number `before`; and the next `before`, None at the end."""
        statement = sa.select(tables.studies).order_by(tables.studies.c.number.desc()).limit(size + 1)
        if before is not None:
            statement = statement.where(tables.studies.c.number < before)
        with self._transaction() as connection:
            rows = connection.execute(statement).all()
        return [_study(row) for row in rows[:size]], (rows[size - 1].number if len(rows) > size else None)

    def unfinished(self) -> Sequence[Study]:
        """All studies that have not ended, oldest first."""
        columns = tables.studies.c
        statement = sa.select(tables.studies).where(columns.state.not_in(FINAL)).order_by(columns.number)
        with self._transaction() as connection:
            return [_study(row) for row in connection.execute(statement)]

    def change(self, uid: str, decide: Callable[[Study, datetime], Decision]) -> Study:
        """Read a study, decide, write what was decided: all in one transaction. Returns the study as stored.

        Errors: NotFound (STUDY_NOT_FOUND), and what `decide` raises; then nothing is changed.
        """
        with self._transaction() as connection:
            row = self._row(connection, uid)
            study, last = self._write(connection, row, None, lambda study, _trial, now: decide(study, now))
        if last:
            self._on_commit(uid, last)
        return study

    def change_trial(
        self,
        uid: str,
        number: int,
        decide: Callable[[Study, Trial, datetime], Decision],
        *,
        reading: tuple[int, float] | None = None,
    ) -> Trial:
        """Move a trial, and its study with it, in one transaction. Returns the trial as stored.

        Args:
            reading: an epoch and its value, to be kept as the trial's when the decision takes it over.

        Errors: NotFound (STUDY_NOT_FOUND), KeyError when there is no such trial, and what `decide` raises; then
        nothing is changed.
        """
        with self._transaction() as connection:
            row = self._row(connection, uid)
            columns = tables.trials.c
            found = connection.execute(
                sa.select(tables.trials).where(columns.study == row.number, columns.number == number)
            ).one_or_none()
            if found is None:
                raise KeyError(f"studies/{uid} has no trial {number}")
            before = _trial(found)
            decided: list[Trial] = []

            def deciding(study: Study, _trial: Trial | None, now: datetime) -> Decision:
                decision = decide(study, before, now)
                decided.append(decision.trial or before)
                return decision

            _, last = self._write(connection, row, before, deciding)
            (after,) = decided
            if reading is not None and after.epoch == reading[0] != before.epoch:
                connection.execute(
                    tables.trial_values.insert().values(
                        study=row.number, trial=number, epoch=reading[0], value=reading[1]
                    )
                )
        if last:
            self._on_commit(uid, last)
        return after

    def trials(self, uid: str, *, size: int, after: int = -1) -> tuple[Sequence[Trial], int | None]:
        """Trials by number, at most size, from `after` on; and the next `after`, None at the end.

        Errors: NotFound (STUDY_NOT_FOUND).
        """
        columns = tables.trials.c
        with self._transaction() as connection:
            row = self._row(connection, uid)
            found = connection.execute(
                sa.select(tables.trials)
                .where(columns.study == row.number, columns.number > after)
                .order_by(columns.number)
                .limit(size + 1)
            ).all()
        return [_trial(each) for each in found[:size]], (found[size - 1].number if len(found) > size else None)

    def history(self, uid: str) -> tuple[Study, Sequence[Recorded]]:
        """A study and all of its trials by number, with their values after each epoch, as of one moment."""
        columns, values = tables.trials.c, tables.trial_values.c
        with self._transaction() as connection:
            row = self._row(connection, uid)
            found = connection.execute(
                sa.select(tables.trials).where(columns.study == row.number).order_by(columns.number)
            ).all()
            readings: dict[int, dict[int, float]] = {}
            for reading in connection.execute(
                sa.select(values.trial, values.epoch, values.value).where(values.study == row.number)
            ):
                readings.setdefault(reading.trial, {})[reading.epoch] = reading.value
        return _study(row), [Recorded(trial=_trial(each), values=readings.get(each.number, {})) for each in found]

    def keeps(self, job: str) -> bool:
        """Whether a study may still need the files of this job (its uid)."""
        trials, studies = tables.trials.c, tables.studies.c
        statement = (
            sa.select(tables.trials.c.state.label("trial_state"), tables.studies)
            .join(tables.studies, studies.number == trials.study)
            .where(trials.job == job, studies.state.not_in(FINAL))
        )
        with self._transaction() as connection:
            row = connection.execute(statement).one_or_none()
        return row is not None and (row.trial_state == TrialState.RUNNING or _study(row).keeps(job))

    def forget(self, *, ended_before: datetime, finished_max: int) -> bool:
        """Take a bounded step towards forgetting the oldest study that ended before a time, or is one too many.

        Its events go first, then its values, then it. False when there is nothing to forget.
        """
        studies, events, values = tables.studies.c, tables.study_events.c, tables.trial_values.c
        ended = sa.select(studies.number).where(studies.end_time.is_not(None))
        with self._transaction() as connection:
            too_many = ended.order_by(studies.end_time.desc(), studies.number.desc()).offset(finished_max).limit(1)
            too_old = ended.where(studies.end_time < ended_before.isoformat()).order_by(studies.end_time).limit(1)
            number = connection.execute(too_old).scalar() or connection.execute(too_many).scalar()
            if number is None:
                return False
            first = connection.execute(sa.select(sa.func.min(events.sequence)).where(events.study == number)).scalar()
            if first is not None:
                told = sa.update(tables.studies).where(studies.number == number)
                connection.execute(told.values(first_sequence=studies.last_sequence + 1))
                some = events.sequence < first + _FORGOTTEN_EVENTS
                connection.execute(tables.study_events.delete().where(events.study == number, some))
                return True
            trial = connection.execute(sa.select(sa.func.min(values.trial)).where(values.study == number)).scalar()
            if trial is not None:
                some = values.trial < trial + _FORGOTTEN_TRIALS
                connection.execute(tables.trial_values.delete().where(values.study == number, some))
                return True
            connection.execute(tables.trials.delete().where(tables.trials.c.study == number))
            connection.execute(tables.studies.delete().where(studies.number == number))
        return True

    def events(self, uid: str, *, from_sequence: int, limit: int) -> tuple[Sequence[Event], bool]:
        """Events from a sequence on, at most limit; and whether the study has ended and these are its last.

        Sequence 0 is the oldest event kept. Errors: NotFound (STUDY_NOT_FOUND), RevisionLost (SEQUENCE_LOST) when
        from_sequence is no longer kept or was never reached.
        """
        columns = tables.study_events.c
        with self._transaction() as connection:
            row = self._row(connection, uid)
            start = from_sequence or row.first_sequence
            if not row.first_sequence <= start <= row.last_sequence + 1:
                raise RevisionLost(
                    f"studies/{uid} has events {row.first_sequence} to {row.last_sequence}, not {from_sequence}",
                    reason="SEQUENCE_LOST",
                    metadata={"first_sequence": str(row.first_sequence), "last_sequence": str(row.last_sequence)},
                )
            found = connection.execute(
                sa.select(tables.study_events)
                .where(columns.study == row.number, columns.sequence >= start)
                .order_by(columns.sequence)
                .limit(limit)
            ).all()
        reached = found[-1].sequence if found else start - 1
        study = json.loads(row.document)
        return [_event(entry, study) for entry in found], row.state in FINAL and reached == row.last_sequence

    def _write(
        self,
        connection: sa.Connection,
        row: sa.Row[Any],
        trial: Trial | None,
        decide: Callable[[Study, Trial | None, datetime], Decision],
    ) -> tuple[Study, int]:
        """Decide and write. The study as stored, and its last sequence, 0 when nothing changed."""
        before, now = _study(row), self._clock()
        decision = decide(before, trial, now)
        if decision.study == before and decision.trial == trial and not decision.events:
            return before, 0
        after = replace(decision.study, last_sequence=before.last_sequence + len(decision.events))
        entries = [
            Event(sequence=sequence, time=now, body=_filled(body, replace(after, last_sequence=sequence), decision))
            for sequence, body in enumerate(decision.events, before.last_sequence + 1)
        ]
        self._insert(connection, row.number, entries)
        if decision.trial is not None and decision.trial != trial:
            self._put_trial(connection, row.number, decision.trial, new=trial is None)
        connection.execute(
            tables.studies.update()
            .where(tables.studies.c.number == row.number)
            .values(
                state=after.state,
                first_sequence=self._trimmed(connection, row, after.last_sequence),
                last_sequence=after.last_sequence,
                end_time=None if after.end_time is None else after.end_time.isoformat(),
                document=dumps(documents.study_document(after)),
            )
        )
        return after, after.last_sequence

    def _put_trial(self, connection: sa.Connection, study: int, trial: Trial, *, new: bool) -> None:
        values: Mapping[str, Any] = {
            "state": trial.state,
            "job": trial.job or None,
            "document": dumps(documents.trial_document(trial)),
        }
        if new:
            connection.execute(tables.trials.insert().values(study=study, number=trial.number, **values))
        else:
            columns = tables.trials.c
            statement = tables.trials.update().where(columns.study == study, columns.number == trial.number)
            connection.execute(statement.values(**values))

    def _earlier(self, connection: sa.Connection, request_id: str, digest: str) -> Study | None:
        found = sa.select(tables.studies).where(tables.studies.c.request_id == request_id)
        row = connection.execute(found).one_or_none()
        if row is None:
            return None
        if row.request_digest != digest:
            raise AlreadyExists(f"request_id {request_id!r} was used for another study", reason="REQUEST_ID_REUSED")
        now = _study(row)
        # The first answer again: the study as it was when it was accepted.
        return Study(
            uid=now.uid,
            spec=now.spec,
            axes=now.axes,
            metric=now.metric,
            direction=now.direction,
            trials_max=now.trials_max,
            epochs_max=now.epochs_max,
            dataset=now.dataset,
            source=now.source,
            create_time=now.create_time,
            creator=now.creator,
            last_sequence=1,
        )

    def _row(self, connection: sa.Connection, uid: str) -> sa.Row[Any]:
        row = connection.execute(sa.select(tables.studies).where(tables.studies.c.uid == uid)).one_or_none()
        if row is None:
            raise NotFound(f"no study 'studies/{uid}'", reason="STUDY_NOT_FOUND")
        return row

    def _insert(self, connection: sa.Connection, number: int, entries: Sequence[Event]) -> None:
        rows = []
        for entry in entries:
            kind, document = documents.body_document(entry.body)
            rows.append(
                {
                    "study": number,
                    "sequence": entry.sequence,
                    "time": entry.time.isoformat(),
                    "kind": kind,
                    "document": dumps(document),
                }
            )
        if rows:
            connection.execute(tables.study_events.insert(), rows)

    def _trimmed(self, connection: sa.Connection, row: sa.Row[Any], last: int) -> int:
        """Drop the oldest events beyond the bound, a tenth at a time; return the first sequence kept."""
        most = self._limits.events_per_study_max
        if last - row.first_sequence < most + most // 10:
            return int(row.first_sequence)
        first = last - most + 1
        columns = tables.study_events.c
        connection.execute(tables.study_events.delete().where(columns.study == row.number, columns.sequence < first))
        return first


def _digest(spec: StudySpec, creator: str) -> str:
    """SHA-256 over who asked for what."""
    asked = {"spec": documents.spec_document(spec), "creator": creator}
    return hashlib.sha256(dumps(asked).encode()).hexdigest()


def _filled(body: EventBody, study: Study, decision: Decision) -> EventBody:
    if isinstance(body, StudyChanged):
        return StudyChanged(study=study)
    return replace(body, trial=decision.trial)


def _study(row: sa.Row[Any]) -> Study:
    return documents.read_study(json.loads(row.document))


def _trial(row: sa.Row[Any]) -> Trial:
    return documents.read_trial(json.loads(row.document))


def _event(row: sa.Row[Any], study: Mapping[str, Any]) -> Event:
    return Event(
        sequence=row.sequence,
        time=read_time(row.time),
        body=documents.read_body(row.kind, json.loads(row.document), study),
    )
