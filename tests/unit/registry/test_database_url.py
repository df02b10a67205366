"""URLs of databases: what is refused, and that no refusal shows a password."""

import dataclasses

import pytest

from mlmesh_registry.config import RegistrySettings
from mlmesh_registry.postgresql import PostgresBackend, may_come_back, parse_url
from mlmesh_runtime.config import ConfigError

SECRET = "hunter-2"


def test_a_url_is_taken_apart() -> None:
    url = parse_url(f"postgresql://someone:{SECRET}%40x@db.example:5433/models?sslmode=verify-full")
    assert (url.username, url.password, url.host, url.port, url.database) == (
        "someone",
        SECRET + "@x",
        "db.example",
        5433,
        "models",
    )
    assert url.query == {"sslmode": "verify-full"}


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (f"mysql://someone:{SECRET}@db/models", "expected postgresql://"),
        (f"someone:{SECRET}@db/models", "expected postgresql://"),
        (f"postgresql://someone:{SECRET}@db:port/models", "expected postgresql://"),
        (f"postgresql://someone:{SECRET}@{SECRET}@db/models", "percent-encoded"),
        (f"postgresql://someone:{SECRET}@db", "names no database"),
        (f"sqlite:///{SECRET}", "expected postgresql://"),
        (SECRET, "expected postgresql://"),
    ],
)
def test_a_wrong_url_is_named_and_not_shown(text: str, told: str) -> None:
    with pytest.raises(ConfigError, match="MLMESH_REGISTRY_DATABASE_URL") as refused:
        parse_url(text)
    assert told in str(refused.value)
    assert SECRET not in str(refused.value)
    # Nor in what a traceback would show of it.
    assert refused.value.__cause__ is None
    assert refused.value.__suppress_context__ or refused.value.__context__ is None


def test_settings_do_not_show_it_either() -> None:
    settings = RegistrySettings.from_environment({"MLMESH_REGISTRY_DATABASE_URL": f"postgresql://u:{SECRET}@h/d"})
    assert settings.database_url == f"postgresql://u:{SECRET}@h/d"
    assert SECRET not in repr(settings)
    assert dataclasses.replace(settings, database_url="") == RegistrySettings()


@pytest.mark.parametrize(
    ("refusal", "passes"),
    [
        ('connection to server on socket "/x" failed: No such file or directory', True),
        ('connection to server at "db", port 5432 failed: Connection refused', True),
        ('connection to server at "db" failed: FATAL:  the database system is starting up', True),
        ('connection to server at "db" failed: FATAL:  sorry, too many clients already', True),
        ('connection to server at "db" failed: FATAL:  password authentication failed for user "u"', False),
        ('connection to server at "db" failed: FATAL:  database "nowhere" does not exist', False),
    ],
)
def test_what_a_start_waits_for(refusal: str, passes: bool) -> None:
    assert may_come_back(refusal) == passes


def test_bounds_of_a_connection_can_be_set_in_the_url() -> None:
    backend = PostgresBackend(parse_url("postgresql://u@h/d?connect_timeout=60"))
    _, given = backend.write_engine.dialect.create_connect_args(backend.write_engine.url)
    assert (given["connect_timeout"], given["keepalives_idle"]) == ("60", "10")
    assert SECRET not in repr(backend.write_engine)
