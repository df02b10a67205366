"""How the databases go about the questions that are asked often: by indexes, in order, without reading the list."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import sqlalchemy as sa

from mlmesh_registry import listing
from mlmesh_registry.backends import Backend
from mlmesh_registry.listing import plan
from mlmesh_registry.schema import version_schema
from mlmesh_registry.search import Asked, page
from mlmesh_registry.versions import Artifact, Content, Lineage
from tests.support.catalogue import catalogue, fill, model, sha256, version
from tests.support.postgres import PostgresServer

VERSIONS = 1200


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def filled(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Backend]:
    """A database in which everything is common or rare."""
    url = ""
    if request.param == "postgresql":
        server: PostgresServer = request.getfixturevalue("postgres")
        url = server.create(template=request.getfixturevalue("registry_template"))
    with catalogue(tmp_path_factory.mktemp("plans"), url) as backend:
        with backend.write_engine.begin() as connection:
            fill(
                connection,
                [model("a", 1), model("b", 2)],
                (
                    version(
                        "a" if index % 2 else "b",
                        index // 2 + 1,
                        index + 10,
                        Content(
                            artifacts=(Artifact(path="m", sha256=sha256("m"), size_bytes=index),),
                            labels={"team": "vision", "run": str(index)},
                            metrics={"accuracy": index / VERSIONS},
                            lineage=Lineage(
                                job=f"jobs/{index}", parents=("models/a/versions/1",) if index == 7 else ()
                            ),
                        ),
                        stage="QUARANTINED" if index == 3 else "ACTIVE",
                        creator=f"spiffe://{index % 100}",
                    )
                    for index in range(VERSIONS)
                ),
            )
        if url:
            with backend.write_engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
                connection.execute(sa.text("ANALYZE"))
        yield backend


def plans(backend: Backend, monkeypatch: pytest.MonkeyPatch, model_id: str | None, asked: Asked) -> str:
    """What the database says it does to answer, for a page from the middle of the list where there is one."""
    monkeypatch.setattr(listing, "FEW_KEYS", 20)
    wanted = plan(version_schema(model_id), asked.filter, asked.order_by, show_deleted=False)
    said: list[str] = []

    def explain(conn: Any, cursor: Any, statement: str, parameters: Any, context: Any, many: bool) -> None:
        how = "EXPLAIN QUERY PLAN" if conn.dialect.name == "sqlite" else "EXPLAIN"
        cursor.execute(f"{how} {statement}", parameters)
        said.extend(str(row[-1]) for row in cursor.fetchall())

    with backend.read_engine.begin() as connection:
        _, token = page(connection, "list", wanted, asked)
        if connection.dialect.name == "postgresql":
            # Whole tables of this size are quicker to read than indexes; what counts is that indexes can answer.
            connection.execute(sa.text("SET LOCAL enable_seqscan = off"))
        sa.event.listen(connection, "before_cursor_execute", explain)
        again = Asked(size=asked.size, token=token, filter=asked.filter, order_by=asked.order_by)
        page(connection, "list", wanted, again)
    return "\n".join(said)


COMMON = [
    (None, "", ""),
    ("a", "", ""),
    (None, "labels.team = vision", ""),
    (None, "labels.team = vision AND metrics.accuracy >= 0.1", ""),
    (None, "stage = ACTIVE", ""),
    (None, "", "create_time"),
    ("a", "", "create_time desc"),
    (None, "", "metrics.accuracy desc"),
    ("a", "", "metrics.accuracy desc"),
    ("a", "", "metrics.accuracy"),
    (None, "labels.team = vision", "metrics.accuracy desc"),
    (None, "metrics.accuracy > 0.3", "metrics.accuracy desc"),
    (None, "", "size_bytes desc"),
    ("a", "", "number"),
]


@pytest.mark.parametrize(("model_id", "text", "order"), COMMON)
def test_what_many_meet_is_read_in_order(
    filled: Backend, monkeypatch: pytest.MonkeyPatch, model_id: str | None, text: str, order: str
) -> None:
    """No sorting, no reading of whole tables: the database stops when the page is full."""
    said = plans(filled, monkeypatch, model_id, Asked(size=10, filter=text, order_by=order))
    # What sorts incrementally reads an index that has most of the order.
    said = said.replace("Incremental Sort", "").replace("Presorted Key", "").replace("Sort Key", "")
    for word in ("USE TEMP B-TREE", "Sort", "SCAN versions\n", "Seq Scan on versions", "MATERIALIZE", "Hash"):
        assert word not in said + "\n", said


RARE = [
    ("labels.run = 77", "version_terms"),
    ("labels.run = (77 OR 78) AND stage = ACTIVE", "version_terms"),
    ("lineage.job = jobs/77", "version_terms"),
    ("lineage.parents:models/a/versions/1", "version_terms"),
    ("metrics.accuracy >= 0.995", "version_metrics"),
    ("stage = QUARANTINED", "stage_revision"),
    ("creator = spiffe://77", "creator_revision"),
    ("revision = 77 AND labels.team = vision", "revision"),
    ('labels.run = "11*" AND labels.run = 1199', "version_terms"),
]


@pytest.mark.parametrize(("text", "index"), RARE)
@pytest.mark.parametrize("model_id", [None, "b"])
def test_what_few_meet_is_looked_up(
    filled: Backend, monkeypatch: pytest.MonkeyPatch, model_id: str | None, text: str, index: str
) -> None:
    """The rows that an index names are looked at, and no others; these few may be sorted."""
    said = plans(filled, monkeypatch, model_id, Asked(size=10, filter=text))
    for word in ("SCAN versions", "Seq Scan", "(model=?)"):
        assert word not in said, said
    assert index in said, said
