"""The ledger keeps what it answered, whole, in order and bounded."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext

from mlmesh_runtime.errors import AlreadyExists, InvalidInput, NotFound, Overloaded, RevisionLost, WrongState
from mlmesh_training import moves, tables
from mlmesh_training.jobs import Job, JobChanged, JobState, LogLine
from mlmesh_training.ledger import LedgerLimits, SqlJobLedger
from mlmesh_training.moves import Decision
from mlmesh_training.options import Resources
from mlmesh_training.paging import page_key, page_token
from mlmesh_training.schedule import Capacity, choose
from tests.support.training import ManualClock, job, spec


def logs(count: int) -> Callable[[Job, datetime], Decision]:
    def decide(job: Job, now: datetime) -> Decision:
        return moves.logged(job, *(LogLine(severity="info", message=str(number)) for number in range(count)))

    return decide


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "training.sqlite"


@pytest.fixture
def commits() -> list[tuple[str, int]]:
    return []


@pytest.fixture
def ledger(path: Path, commits: list[tuple[str, int]]) -> Iterator[SqlJobLedger]:
    opened = SqlJobLedger(
        f"sqlite:///{path}",
        clock=ManualClock(),
        on_commit=lambda uid, sequence: commits.append((uid, sequence)),
        limits=LedgerLimits(queued_jobs_max=5, events_per_job_max=20),
    )
    opened.migrate()
    yield opened
    opened.close()


def test_the_migrations_make_the_tables_that_the_code_uses(ledger: SqlJobLedger, path: Path) -> None:
    engine = sa.create_engine(f"sqlite:///{path}")
    with engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), tables.metadata) == []
    engine.dispose()


def test_migrating_twice_changes_nothing(ledger: SqlJobLedger) -> None:
    created = ledger.create(job())
    ledger.migrate()
    assert ledger.get(created.uid) == created


def test_what_was_created_is_there_after_a_restart(ledger: SqlJobLedger, path: Path) -> None:
    created = ledger.create(job(), request_id="r")
    other = SqlJobLedger(f"sqlite:///{path}", clock=ManualClock())
    assert other.get(created.uid) == created
    assert other.events(created.uid, from_sequence=0, limit=10)[0][0].body == JobChanged(job=created)
    other.close()


def test_the_same_request_is_stored_once_and_answered_as_the_first_time(
    ledger: SqlJobLedger, commits: list[tuple[str, int]]
) -> None:
    first = ledger.create(job("a"), request_id="r")
    ledger.change("a", moves.started)
    assert ledger.create(job("b"), request_id="r") == first
    assert [found.uid for found in ledger.page(size=10)[0]] == ["a"]
    assert commits == [("a", 1), ("a", 2)]


@pytest.mark.parametrize("other", [job("b", spec=spec(seed=8)), job("b", creator="spiffe://x/ns/y/sa/z")], ids=str)
def test_the_same_request_id_with_other_content_is_refused(ledger: SqlJobLedger, other: Job) -> None:
    ledger.create(job("a"), request_id="r")
    with pytest.raises(AlreadyExists) as raised:
        ledger.create(other, request_id="r")
    assert raised.value.reason == "REQUEST_ID_REUSED"


def test_without_a_request_id_every_request_is_a_new_job(ledger: SqlJobLedger) -> None:
    ledger.create(job("a"))
    ledger.create(job("b"))
    assert len(ledger.page(size=10)[0]) == 2


def test_too_many_waiting_jobs_are_refused_and_running_ones_do_not_count(ledger: SqlJobLedger) -> None:
    for number in range(5):
        ledger.create(job(f"j{number}"), request_id=f"r{number}")
    with pytest.raises(Overloaded) as raised:
        ledger.create(job("more"))
    assert raised.value.reason == "QUEUE_FULL"
    # Who was accepted before may still ask again.
    assert ledger.create(job("again"), request_id="r0").uid == "j0"
    ledger.change("j0", moves.started)
    ledger.create(job("more"))


def test_pages_are_newest_first_and_stable(ledger: SqlJobLedger) -> None:
    for number in range(5):
        ledger.create(job(f"j{number}"))
    first, key = ledger.page(size=2)
    ledger.change("j0", moves.started)
    ledger.create(job("new"))
    second, key = ledger.page(size=2, before=page_key(page_token(key)))
    third, key = ledger.page(size=2, before=key)
    assert [found.uid for found in (*first, *second, *third)] == ["j4", "j3", "j2", "j1", "j0"]
    assert page_token(key) == ""


@pytest.mark.parametrize("token", ["x", "before-", "before-x", "before--1", "before-" + "9" * 19, "before-¹"])
def test_foreign_page_tokens_are_refused(token: str) -> None:
    with pytest.raises(InvalidInput):
        page_key(token)


def test_a_decision_that_refuses_changes_nothing(ledger: SqlJobLedger) -> None:
    created = ledger.create(job("a"))
    with pytest.raises(WrongState):
        ledger.change("a", moves.succeeded)
    assert ledger.get("a") == created
    assert len(ledger.events("a", from_sequence=0, limit=10)[0]) == 1


def test_events_carry_the_job_as_it_then_was(ledger: SqlJobLedger) -> None:
    ledger.create(job("a", spec=spec(retries_max=-1)))
    ledger.change("a", moves.started)
    ledger.change("a", lambda job, now: moves.process_died(job, "boom", now))
    found, ended = ledger.events("a", from_sequence=0, limit=10)
    assert ended
    assert [event.sequence for event in found] == [1, 2, 3, 4]
    states = [
        (e.body.job.state, e.body.job.last_sequence) for e in found if isinstance(e.body, JobChanged) and e.body.job
    ]
    assert states == [(JobState.QUEUED, 1), (JobState.RUNNING, 2), (JobState.FAILED, 4)]
    assert ledger.get("a").last_sequence == 4


def test_events_are_read_in_pages_and_from_where_one_stopped(ledger: SqlJobLedger) -> None:
    ledger.create(job("a"))
    ledger.change("a", logs(9))
    first, ended = ledger.events("a", from_sequence=0, limit=4)
    rest, _ = ledger.events("a", from_sequence=5, limit=100)
    assert not ended
    assert [event.sequence for event in (*first, *rest)] == list(range(1, 11))
    assert ledger.events("a", from_sequence=11, limit=4) == ([], False)


def test_old_events_are_dropped_and_asking_for_them_says_so(ledger: SqlJobLedger) -> None:
    ledger.create(job("a"))
    for _ in range(10):
        ledger.change("a", logs(5))
    kept, _ = ledger.events("a", from_sequence=0, limit=1000)
    assert 20 <= len(kept) < 25
    assert kept[-1].sequence == 51
    for lost in (1, kept[0].sequence - 1, 53):
        with pytest.raises(RevisionLost) as raised:
            ledger.events("a", from_sequence=lost, limit=10)
        assert raised.value.reason == "SEQUENCE_LOST"
        assert raised.value.metadata["last_sequence"] == "51"


def test_jobs_run_in_the_order_they_came(ledger: SqlJobLedger) -> None:
    for uid in ("a", "b", "c"):
        ledger.create(job(uid))
    capacity = Capacity(total=Resources(cpus=1.0))
    found = ledger.choose(lambda waiting: choose(waiting, [], capacity), excluding=["a"])
    assert found is not None
    assert found.job.uid == "b"
    ledger.change("b", moves.cancel_requested)
    assert [unfinished.uid for unfinished in ledger.unfinished()] == ["a", "c"]
    assert ledger.choose(lambda waiting: choose(waiting, [], capacity), excluding=["a", "c"]) is None


def test_unknown_jobs_are_not_found(ledger: SqlJobLedger) -> None:
    for call in (
        lambda: ledger.get("x"),
        lambda: ledger.change("x", moves.started),
        lambda: ledger.events("x", from_sequence=0, limit=1),
    ):
        with pytest.raises(NotFound) as raised:
            call()
        assert raised.value.reason == "JOB_NOT_FOUND"


def test_a_full_disk_is_said_and_nothing_is_half_written(ledger: SqlJobLedger) -> None:
    ledger.create(job("a"))
    # SQLite itself reports the limit as it reports a full disk.
    with ledger._database.engine.connect() as connection:
        pages = connection.exec_driver_sql("PRAGMA page_count").scalar_one()
        connection.exec_driver_sql(f"PRAGMA max_page_count={pages}")
    big = dataclasses.replace(spec(), hyperparameters={f"h{n}": 1.0 for n in range(3000)})
    with pytest.raises(Overloaded) as raised:
        ledger.create(dataclasses.replace(job("b"), spec=big))
    assert raised.value.reason == "DISK_FULL"
    assert [found.uid for found in ledger.page(size=10)[0]] == ["a"]
    with ledger._database.engine.connect() as connection:
        connection.exec_driver_sql("PRAGMA max_page_count=100000")
    ledger.create(dataclasses.replace(job("b"), spec=big))
