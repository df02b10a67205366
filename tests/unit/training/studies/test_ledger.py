"""The ledger of studies keeps what it answered, whole, in order and bounded."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta
from functools import partial
from pathlib import Path

import pytest

from mlmesh_runtime.errors import AlreadyExists, NotFound, Overloaded, RevisionLost, WrongState
from mlmesh_training.database import Database
from mlmesh_training.studies import study as steps
from mlmesh_training.studies.ledger import SqlStudyLedger, StudyLimits
from mlmesh_training.studies.study import Decision, Study, StudyChanged, StudyState, Trial, TrialChanged
from tests.support.studies import study
from tests.support.training import PUBLICATION, ManualClock


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    opened = Database(f"sqlite:///{tmp_path / 'training.sqlite'}")
    opened.migrate()
    yield opened
    opened.close()


@pytest.fixture
def commits() -> list[tuple[str, int]]:
    return []


@pytest.fixture
def ledger(database: Database, commits: list[tuple[str, int]]) -> SqlStudyLedger:
    return SqlStudyLedger(
        database.transaction,
        clock=ManualClock(),
        on_commit=lambda uid, sequence: commits.append((uid, sequence)),
        limits=StudyLimits(studies_max=3, events_per_study_max=20),
    )


def choose(ledger: SqlStudyLedger, uid: str, *, job: str = "") -> Trial:
    number = ledger.change(uid, partial(steps.chosen, hyperparameters={"width": 8.0})).chosen - 1
    return ledger.change_trial(uid, number, partial(steps.begun, job=job or f"{uid}-{number}"))


def measure(ledger: SqlStudyLedger, uid: str, number: int, epoch: int, value: float) -> Trial:
    return ledger.change_trial(uid, number, partial(steps.measured, epoch=epoch, value=value), reading=(epoch, value))


def test_what_was_created_is_there_after_a_restart(ledger: SqlStudyLedger, database: Database) -> None:
    created = ledger.create(study("a", spec={"job": {"publication": PUBLICATION}}), request_id="r")
    other = SqlStudyLedger(database.transaction, clock=ManualClock())
    assert other.get("a") == created
    assert other.events("a", from_sequence=0, limit=10)[0][0].body == StudyChanged(study=created)


def test_the_same_request_is_stored_once_and_answered_as_the_first_time(ledger: SqlStudyLedger) -> None:
    first = ledger.create(study("a"), request_id="r")
    choose(ledger, "a")
    assert ledger.create(study("b"), request_id="r") == first
    assert [found.uid for found in ledger.page(size=10)[0]] == ["a"]
    for other in (study("b", spec={"seed": 9}), study("b", creator="spiffe://x/ns/y/sa/z")):
        with pytest.raises(AlreadyExists) as raised:
            ledger.create(other, request_id="r")
        assert raised.value.reason == "REQUEST_ID_REUSED"


def test_too_many_studies_at_once_are_refused_and_ended_ones_do_not_count(ledger: SqlStudyLedger) -> None:
    for uid in ("a", "b", "c"):
        ledger.create(study(uid), request_id=uid)
    with pytest.raises(Overloaded) as raised:
        ledger.create(study("d"))
    assert raised.value.reason == "STUDIES_TOO_MANY"
    assert ledger.create(study("x"), request_id="a").uid == "a"
    ledger.change("a", steps.stop_requested)
    ledger.change("a", steps.closed)
    ledger.create(study("d"))
    assert [found.uid for found in ledger.unfinished()] == ["b", "c", "d"]


def test_trials_and_their_values_are_kept_and_told_in_order(
    ledger: SqlStudyLedger, commits: list[tuple[str, int]]
) -> None:
    ledger.create(study("a", spec={"parallel_max": 2}))
    for _ in range(2):
        choose(ledger, "a")
    measure(ledger, "a", 0, 1, 0.5)
    measure(ledger, "a", 1, 1, 0.25)
    measure(ledger, "a", 0, 2, 0.75)
    measure(ledger, "a", 0, 2, 0.99)
    ledger.change_trial("a", 0, steps.succeeded)
    known, history = ledger.history("a")
    assert [recorded.values for recorded in history] == [{1: 0.5, 2: 0.75}, {1: 0.25}]
    assert [recorded.trial for recorded in history] == ledger.trials("a", size=10)[0]
    events, ended = ledger.events("a", from_sequence=0, limit=100)
    assert not ended
    assert [event.sequence for event in events] == list(range(1, known.last_sequence + 1))
    kinds = ["study", *["trial", "study"] * 2, *["trial"] * 3, "trial", "study"]
    assert ["study" if isinstance(event.body, StudyChanged) else "trial" for event in events] == kinds
    told = [
        (e.body.trial.number, e.body.trial.value) for e in events if isinstance(e.body, TrialChanged) and e.body.trial
    ]
    assert told == [(0, None), (1, None), (0, 0.5), (1, 0.25), (0, 0.75), (0, 0.75)]
    last = events[-1].body
    assert isinstance(last, StudyChanged)
    assert last.study == known
    assert known.best == history[0].trial
    assert commits[-1] == ("a", known.last_sequence)


def test_a_decision_that_refuses_or_changes_nothing_writes_nothing(
    ledger: SqlStudyLedger, commits: list[tuple[str, int]]
) -> None:
    created = ledger.create(study("a"))
    ledger.change("a", steps.closed)
    ledger.change("a", partial(steps.registered, version=""))

    def refuse(known: Study, now: datetime) -> Decision:
        raise WrongState("no")

    with pytest.raises(WrongState):
        ledger.change("a", refuse)
    assert ledger.get("a") == created
    assert commits == [("a", 1)]


def test_trials_come_in_pages_by_number(ledger: SqlStudyLedger) -> None:
    ledger.create(study("a", spec={"parallel_max": 5}))
    for _ in range(5):
        choose(ledger, "a")
    first, key = ledger.trials("a", size=2)
    assert key is not None
    second, key = ledger.trials("a", size=2, after=key)
    assert key is not None
    third, key = ledger.trials("a", size=2, after=key)
    assert [trial.number for trial in (*first, *second, *third)] == [0, 1, 2, 3, 4]
    assert key is None


def test_files_are_kept_of_running_trials_and_of_the_best_until_it_is_published(ledger: SqlStudyLedger) -> None:
    ledger.create(study("a", spec={"parallel_max": 3, "trials_max": 3, "job": {"publication": PUBLICATION}}))
    for number, value in enumerate((0.5, 0.9, 0.7)):
        choose(ledger, "a", job=f"j{number}")
        measure(ledger, "a", number, 1, value)
    assert [ledger.keeps(f"j{number}") for number in range(3)] == [True, True, True]
    for number in range(3):
        ledger.change_trial("a", number, steps.succeeded)
    assert [ledger.keeps(f"j{number}") for number in range(3)] == [False, True, False]
    assert ledger.change("a", steps.closed).state is StudyState.PUBLISHING
    assert ledger.keeps("j1")
    ledger.change("a", steps.published)
    assert not ledger.keeps("j1")
    assert not ledger.keeps("somebody-elses")


def test_old_events_are_dropped_and_asking_for_them_says_so(ledger: SqlStudyLedger) -> None:
    ledger.create(study("a"))
    choose(ledger, "a")
    for epoch in range(1, 48):
        measure(ledger, "a", 0, epoch, 0.5)
    kept, _ = ledger.events("a", from_sequence=0, limit=1000)
    assert 20 <= len(kept) < 23
    for lost in (1, kept[0].sequence - 1, kept[-1].sequence + 2):
        with pytest.raises(RevisionLost) as raised:
            ledger.events("a", from_sequence=lost, limit=10)
        assert raised.value.reason == "SEQUENCE_LOST"
    # What was measured is kept all the same.
    assert len(ledger.history("a")[1][0].values) == 47


def test_a_study_that_ended_says_so_with_its_last_event(ledger: SqlStudyLedger) -> None:
    ledger.create(study("a"))
    ledger.change("a", steps.stop_requested)
    ledger.change("a", steps.closed)
    assert ledger.events("a", from_sequence=1, limit=2)[1] is False
    assert ledger.events("a", from_sequence=1, limit=3)[1] is True
    assert ledger.events("a", from_sequence=4, limit=3) == ([], True)


def test_pages_of_studies_are_newest_first(ledger: SqlStudyLedger) -> None:
    for uid in ("a", "b", "c"):
        ledger.create(study(uid))
    first, key = ledger.page(size=2)
    second, end = ledger.page(size=2, before=key)
    assert [found.uid for found in (*first, *second)] == ["c", "b", "a"]
    assert end is None


@pytest.mark.parametrize(
    ("old", "finished_max", "left"), [(True, 9, ["c", "b"]), (False, 1, ["c", "b"]), (False, 9, ["c", "b", "a"])]
)
def test_what_ended_is_forgotten_in_time_and_what_runs_is_not(
    ledger: SqlStudyLedger, old: bool, finished_max: int, left: list[str]
) -> None:
    for uid in ("a", "b"):
        ledger.create(study(uid))
        choose(ledger, uid)
        measure(ledger, uid, 0, 1, 0.5)
        ledger.change_trial(uid, 0, steps.succeeded)
        ledger.change(uid, steps.stop_requested)
        ledger.change(uid, steps.closed)
    ledger.create(study("c"))
    ended = ledger.get("b").end_time
    assert ended is not None
    moment = ended if old else ended - timedelta(days=1)
    taken = 0
    while ledger.forget(ended_before=moment, finished_max=finished_max):
        taken += 1
        if taken == 1:
            # Half forgotten it is still read, and says that its events are gone.
            assert ledger.get("a").final
            assert ledger.events("a", from_sequence=0, limit=10) == ([], True)
    assert [found.uid for found in ledger.page(size=10)[0]] == left
    assert len(ledger.history("c")[1]) == 0
    if "a" not in left:
        with pytest.raises(NotFound):
            ledger.get("a")


def test_unknown_studies_are_not_found(ledger: SqlStudyLedger) -> None:
    calls: list[Callable[[], object]] = [
        lambda: ledger.get("x"),
        lambda: ledger.change("x", steps.closed),
        lambda: ledger.trials("x", size=1),
        lambda: ledger.history("x"),
        lambda: ledger.events("x", from_sequence=0, limit=1),
    ]
    for call in calls:
        with pytest.raises(NotFound) as raised:
            call()
        assert raised.value.reason == "STUDY_NOT_FOUND"


def test_a_full_disk_is_said_and_nothing_is_half_written(ledger: SqlStudyLedger, database: Database) -> None:
    ledger.create(study("a"))
    choose(ledger, "a")
    before = ledger.history("a")
    with database.engine.connect() as connection:
        pages = connection.exec_driver_sql("PRAGMA page_count").scalar_one()
        connection.exec_driver_sql(f"PRAGMA max_page_count={pages}")
    big = dataclasses.replace(before[1][0].trial, marks={f"m{number}": 1.0 for number in range(3000)})
    with pytest.raises(Overloaded) as raised:
        ledger.change_trial("a", 0, lambda known, _trial, _now: Decision(study=known, trial=big))
    assert raised.value.reason == "DISK_FULL"
    assert ledger.history("a") == before
