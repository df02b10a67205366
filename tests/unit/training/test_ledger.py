"""The ledger keeps what it answered, whole, in order and bounded."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta
from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext

from mlmesh_runtime.errors import AlreadyExists, InvalidInput, NotFound, Overloaded, RevisionLost, WrongState
from mlmesh_training import documents, moves, tables
from mlmesh_training.database import Database
from mlmesh_training.jobs import Job, JobChanged, JobState, LogLine
from mlmesh_training.ledger import LedgerLimits, SqlJobLedger
from mlmesh_training.moves import Decision
from mlmesh_training.options import Resources
from mlmesh_training.paging import page_key, page_token
from mlmesh_training.schedule import Capacity, choose
from tests.support.queues import migrated
from tests.support.training import START, ManualClock, job, spec


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


def test_pages_by_state_and_study_are_newest_first_and_whole(ledger: SqlJobLedger) -> None:
    for number in range(9):
        ledger.create(job(f"j{number}", study="studies/a" if number % 2 else ""))
        if number % 3 == 0:
            ledger.change(f"j{number}", moves.cancel_requested)
        elif number % 3 == 1:
            ledger.change(f"j{number}", moves.started)

    def found(size: int, *states: JobState, study: str = "") -> list[str]:
        uids: list[str] = []
        before = None
        while True:
            page, before = ledger.page(size=size, before=before, states=states, study=study)
            uids += [each.uid for each in page]
            if before is None:
                return uids

    for size in (1, 2, 100):
        assert found(size, JobState.CANCELLED) == ["j6", "j3", "j0"]
        assert found(size, JobState.CANCELLED, JobState.RUNNING) == ["j7", "j6", "j4", "j3", "j1", "j0"]
        assert found(size, study="studies/a") == ["j7", "j5", "j3", "j1"]
        assert found(size, JobState.QUEUED, study="studies/a") == ["j5"]
        assert found(size, JobState.PAUSED) == found(size, study="studies/b") == []


@pytest.fixture(scope="module")
def crowded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SqlJobLedger]:
    """A ledger with 100,000 jobs, nearly all of them ended."""
    path = tmp_path_factory.mktemp("crowded") / "training.sqlite"
    path.write_bytes(migrated())
    ledger = SqlJobLedger(f"sqlite:///{path}", clock=ManualClock())
    ended = dataclasses.replace(job(), state=JobState.SUCCEEDED, end_time=START)
    document = documents.dumps(documents.job_document(ended))
    with ledger.transaction() as connection:
        connection.exec_driver_sql(
            """
            WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 100000)
            INSERT INTO jobs (uid, state, request_digest, first_sequence, last_sequence, document, study, end_time)
            SELECT 'j' || i, CASE WHEN i % 10000 = 0 THEN 'FAILED' ELSE 'SUCCEEDED' END, '', 1, 1, ?,
                   CASE WHEN i % 100 = 0 THEN 'studies/a' ELSE '' END, printf('2026-01-02T%08d', i)
            FROM n
            """,
            (document,),
        )
    yield ledger
    ledger.close()


LOOKS: dict[str, Callable[[SqlJobLedger], object]] = {
    "first page": lambda ledger: ledger.page(size=50),
    "deep page": lambda ledger: ledger.page(size=50, before=50_000),
    "of one state": lambda ledger: ledger.page(size=50, states=[JobState.SUCCEEDED]),
    "of a rare state": lambda ledger: ledger.page(size=50, states=[JobState.FAILED, JobState.QUEUED]),
    "of a study": lambda ledger: ledger.page(size=50, study="studies/a"),
    "of a study and a state": lambda ledger: ledger.page(size=50, study="studies/a", states=[JobState.FAILED]),
    "the next to run": lambda ledger: ledger.choose(lambda waiting: None, excluding=()),
    "unfinished": lambda ledger: ledger.unfinished(),
    "files that may go": lambda ledger: ledger.expiry.idle(ended_before=START, limit=100),
    "files that are needed": lambda ledger: ledger.expiry.kept(),
}


@pytest.mark.parametrize("look", LOOKS)
def test_at_a_hundred_thousand_jobs_an_index_answers_each_look(crowded: SqlJobLedger, look: str) -> None:
    statements: list[tuple[str, object]] = []

    def heard(_connection: object, _cursor: object, statement: str, parameters: object, *_rest: object) -> None:
        statements.append((statement, parameters))

    engine = crowded._database.engine
    sa.event.listen(engine, "before_cursor_execute", heard)
    try:
        LOOKS[look](crowded)
    finally:
        sa.event.remove(engine, "before_cursor_execute", heard)
    with engine.connect() as connection:
        for statement, parameters in statements:
            if not statement.startswith("SELECT"):
                continue
            plan = [row.detail for row in connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {statement}", parameters)]
            # Walking the primary key from one end, up to a limit, is no search but reads no more than it gives.
            scans = [step for step in plan if step.startswith("SCAN") and not step.startswith("SCAN jobs")]
            assert scans == [], (statement, plan)
            if "LIMIT" in statement or "WHERE" in statement:
                assert not any("TEMP B-TREE FOR ORDER BY" in step for step in plan if "number DESC" in statement), plan
            assert "SCAN jobs" not in plan or "LIMIT" in statement, (statement, plan)


def test_the_oldest_go_first_and_a_deletion_is_seen_at_once(
    ledger: SqlJobLedger, commits: list[tuple[str, int]]
) -> None:
    for number in range(4):
        ledger.create(job(f"j{number}"))
        ledger.change(f"j{number}", logs(7))
        if number != 1:
            ledger.change(f"j{number}", moves.cancel_requested)
    expiry = ledger.expiry
    never, always = START - timedelta(days=1), START + timedelta(days=1)
    assert expiry.expired(ended_before=never, finished_max=3, limit=10) == []
    assert expiry.expired(ended_before=never, finished_max=1, limit=10) == ["j0", "j2"]
    assert expiry.expired(ended_before=always, finished_max=3, limit=2) == ["j0", "j2"]
    with pytest.raises(WrongState):
        expiry.delete("j1")
    expiry.delete("j0")
    assert commits[-1] == ("j0", 0)
    with pytest.raises(NotFound):
        ledger.events("j0", from_sequence=1, limit=1)
    found = expiry.doomed()
    assert found is not None
    number, uid = found
    assert uid == "j0"
    steps = []
    while dropped := expiry.drop_events(number, limit=4):
        steps.append(dropped)
    assert steps == [4, 4, 1]
    expiry.forget(number)
    assert expiry.doomed() is None
    # The others' events are theirs.
    assert len(ledger.events("j2", from_sequence=1, limit=100)[0]) == 9
    # A name that was deleted may come again, and has a history of its own.
    ledger.create(job("j0"))
    assert [event.sequence for event in ledger.events("j0", from_sequence=0, limit=10)[0]] == [1]


def test_paused_jobs_count_as_waiting_and_a_retry_needs_room(ledger: SqlJobLedger) -> None:
    ledger.create(job("failed"))
    ledger.change("failed", moves.cancel_requested)
    for number in range(5):
        ledger.create(job(f"j{number}"))
        ledger.change(f"j{number}", moves.pause_requested)
    for call in (lambda: ledger.create(job("more")), lambda: ledger.change("failed", moves.retry_requested)):
        with pytest.raises(Overloaded) as raised:
            call()
        assert raised.value.reason == "QUEUE_FULL"
    # What waits already may go on.
    assert ledger.change("j0", moves.resume_requested).state is JobState.QUEUED


def test_who_is_passed_is_remembered_until_it_runs(ledger: SqlJobLedger) -> None:
    small = Capacity(total=Resources(cpus=2.0, memory_bytes=100), jobs_max=2)
    ledger.create(job("large", spec=spec(resources=Resources(cpus=2.0))))
    for number in range(2):
        ledger.create(job(f"j{number}", spec=spec(resources=Resources(cpus=1.0))))
        choice = ledger.choose(lambda waiting: choose(waiting, [Resources(cpus=1.0)], small), excluding=())
        assert choice is not None
        assert choice.job.uid == f"j{number}"
        ledger.change(f"j{number}", moves.started)
    choice = ledger.choose(lambda waiting: choose(waiting, [], small), excluding=())
    assert choice is not None
    assert (choice.job.uid, choice.job.passed) == ("large", 2)
    ledger.change("large", moves.started)
    ledger.change("large", lambda job, now: moves.process_died(job, "x", now))
    choice = ledger.choose(lambda waiting: choose(waiting, [], small), excluding=())
    assert choice is not None
    assert (choice.job.retrying, choice.job.passed) == (True, 0)


def test_a_ledger_of_the_first_version_is_brought_up_to_date(tmp_path: Path) -> None:
    path = tmp_path / "l.sqlite"
    database = Database(f"sqlite:///{path}")
    config = Config()
    config.set_main_option("script_location", str(Path(documents.__file__).parent / "migrations"))
    old = {name: value for name, value in documents.job_document(job("a")).items() if name in OLD_FIELDS}
    ended = {**old, "uid": "b", "state": "FAILED", "end_time": START.isoformat()}
    with database.transaction() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, "0001")
        for number, document in enumerate([old, ended], 1):
            connection.exec_driver_sql(
                "INSERT INTO jobs VALUES (?, ?, ?, ?, ?, 1, 1, ?)",
                (number, document["uid"], document["state"], f"r{number}", OLD_DIGEST, documents.dumps(document)),
            )
            connection.exec_driver_sql(
                "INSERT INTO events VALUES (?, 1, ?, 'job', ?)",
                (number, START.isoformat(), documents.dumps({**document, "last_sequence": 1})),
            )
    database.migrate()
    database.close()
    ledger = SqlJobLedger(f"sqlite:///{path}", clock=ManualClock())
    assert ledger.get("a") == job("a")
    # Who asked before asks again, and is known.
    assert ledger.create(job("other"), request_id="r1").uid == "a"
    assert ledger.expiry.expired(ended_before=START + timedelta(days=1), finished_max=9, limit=9) == ["b"]
    assert len(ledger.events("b", from_sequence=0, limit=9)[0]) == 1
    ledger.close()
    database = Database(f"sqlite:///{path}")
    with database.transaction() as connection:
        config.attributes["connection"] = connection
        command.downgrade(config, "0001")
    database.close()


OLD_FIELDS = frozenset(
    {
        *("uid", "spec", "hyperparameters", "create_time", "creator", "state", "phase", "progress", "evaluation"),
        *("trained", "registering", "model_version", "attempts", "failures", "interruptions", "error"),
        *("start_time", "end_time", "last_sequence"),
    }
)
OLD_DIGEST = hashlib.sha256(
    b'{"creator":"","spec":{"dataset":"digits","hyperparameters":{"epochs":2.0},"publication":null,"recipe":"cnn",'
    b'"retries_max":0,"seed":7}}'
).hexdigest()
