"""What was stored before there was anything to search by is found by the same as what comes after."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from alembic import command
from alembic.config import Config

import mlmesh_registry
from mlmesh_registry import tables
from mlmesh_registry.backends import Backend
from mlmesh_registry.versions import Artifact, Content, Lineage
from tests.support.catalogue import catalogue, fill, model, sha256, version
from tests.support.postgres import PostgresServer

SEARCHED = (
    tables.version_metrics,
    tables.version_terms,
    tables.version_texts,
    tables.model_terms,
    tables.model_texts,
)


def searched(connection: sa.Connection) -> dict[str, list[Any]]:
    """All that is searched by. Positions only keep rows apart."""
    return {
        table.name: sorted(
            map(tuple, connection.execute(sa.select(*(column for column in table.c if column.name != "position"))))
        )
        for table in SEARCHED
    }


def moved(backend: Backend, how: Any, revision: str) -> None:
    """Take the schema to a revision."""
    config = Config()
    config.set_main_option("script_location", str(Path(mlmesh_registry.__path__[0]) / "migrations"))
    with backend.write_engine.begin() as connection:
        config.attributes["connection"] = connection
        how(config, revision)


@pytest.mark.parametrize("database", ["sqlite", "postgresql"])
def test_what_is_stored_is_indexed_as_if_it_came_now(
    request: pytest.FixtureRequest, tmp_path: Path, database: str
) -> None:
    url = ""
    if database == "postgresql":
        server: PostgresServer = request.getfixturevalue("postgres")
        url = server.create(template=request.getfixturevalue("registry_template"))
    with catalogue(tmp_path, url) as backend:
        versions = (
            version(
                "m",
                number,
                number + 10,
                Content(
                    artifacts=tuple(Artifact(path=f"{n}.txt", sha256=sha256("a")) for n in range(number % 3 + 1)),
                    metrics={"accuracy": number / 7, "ß": -1e300} if number % 2 else {},
                    labels={"team": "vision" * (number % 40), "": "x"} if number % 5 else {},
                    lineage=Lineage(
                        job=f"jobs/{number}",
                        study="studies/1" if number % 4 == 0 else "",
                        source_uri="https://example.org/ü",
                        parents=("models/m/versions/1", "models/m/versions/2") if number == 9 else (),
                    ),
                    description="Straße ÄÖ" if number % 3 else "",
                ),
            )
            # More than the migration reads at once.
            for number in range(1, 1103)
        )
        with backend.write_engine.begin() as connection:
            models = [model("m", 1, description="Größe", labels={"a": "b", "c": "d" * 200}), model("n", 2)]
            fill(connection, models, versions)
            before = searched(connection)
        assert len(before["version_terms"]) > 2000
        moved(backend, command.downgrade, "0002")
        with backend.write_engine.begin() as connection:
            assert not {table.name for table in SEARCHED} & set(sa.inspect(connection).get_table_names())
        moved(backend, command.upgrade, "head")
        with backend.write_engine.begin() as connection:
            assert searched(connection) == before
