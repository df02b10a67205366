"""What an older release stored is there after the migrations, with what is known of it since."""

import json
from contextlib import AsyncExitStack
from datetime import UTC, datetime
from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic import command
from alembic.config import Config

import mlmesh_registry
from mlmesh_registry.config import RegistrySettings
from mlmesh_registry.events import to_micros
from mlmesh_registry.postgresql import parse_url
from mlmesh_registry.registry import open_registry
from mlmesh_registry.search import Asked
from mlmesh_registry.versions import Artifact, Content, digest, manifest
from tests.support.postgres import PostgresServer
from tests.support.registry import alias, number, sha256

TIME = datetime(2025, 6, 1, tzinfo=UTC)
MICROS = to_micros(TIME)
DATA = [b"x" * 1000, b"y" * 10, b"z" * 5]
BIG, SMALL, LOOSE = map(sha256, DATA)
SIZES = {BIG: 1000, SMALL: 10, LOOSE: 5}
CONTENTS = [
    Content(artifacts=(Artifact(path="model.onnx", sha256=BIG, size_bytes=1000),), metrics={"f1": 0.5}),
    Content(
        artifacts=(
            Artifact(path="a.json", sha256=SMALL, size_bytes=10),
            Artifact(path="b.json", sha256=SMALL, size_bytes=10),
            Artifact(path="model.onnx", sha256=BIG, size_bytes=1000),
        )
    ),
]


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """URL of an empty database of this test's own."""
    if request.param == "sqlite":
        (tmp_path / "data").mkdir()
        return f"sqlite:///{tmp_path / 'data' / 'registry.sqlite'}"
    server: PostgresServer = request.getfixturevalue("postgres")
    return server.create()


def first_release(url: str, folder: Path) -> None:
    """A registry as the first release left it: one model, two versions, an alias, a blob that nobody used."""
    for data in DATA:
        path = folder / "blobs" / "sha256" / sha256(data)[:2] / sha256(data)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    engine = sa.create_engine(url if url.startswith("sqlite") else parse_url(url))
    config = Config()
    config.set_main_option("script_location", str(Path(mlmesh_registry.__path__[0]) / "migrations"))
    with engine.begin() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, "0001")
        rows: list[tuple[str, dict[str, object]]] = [
            (
                "models",
                {
                    "id": "m",
                    "description": "words",
                    "labels": '{"team":"vision"}',
                    "create_time": MICROS,
                    "update_time": MICROS,
                    "creator": "spiffe://a",
                    "updater": "spiffe://a",
                    "revision": 1,
                    "latest_version": 2,
                },
            )
        ]
        rows += [("blobs", {"sha256": name, "size_bytes": size, "create_time": MICROS}) for name, size in SIZES.items()]
        for count, content in enumerate(CONTENTS, 1):
            version = {
                "model": "m",
                "number": count,
                "digest": digest(content),
                "manifest": json.dumps(manifest(content)),
                "create_time": MICROS,
                "creator": "spiffe://b",
                "revision": count + 1,
            }
            rows.append(("versions", version))
            for name in {artifact.sha256 for artifact in content.artifacts}:
                rows.append(("version_blobs", {"model": "m", "number": count, "sha256": name}))
        moved = {
            "model": "m",
            "alias": "stable",
            "version": 1,
            "update_time": MICROS,
            "updater": "spiffe://c",
            "revision": 4,
        }
        rows.append(("aliases", moved))
        for table, values in rows:
            columns = [sa.column(name) for name in values]
            connection.execute(sa.table(table, *columns).insert().values(**values))
        connection.execute(sa.text("UPDATE log_head SET revision = 4"))
    engine.dispose()


async def test_what_an_older_release_stored_is_told_with_what_is_known_since(url: str, tmp_path: Path) -> None:
    first_release(url, tmp_path / "data")
    settings = RegistrySettings(database_url="" if url.startswith("sqlite") else url)
    async with AsyncExitStack() as stack:
        registry = await stack.enter_async_context(open_registry(tmp_path / "data", settings, clock=lambda: TIME))
        store = registry.store
        model = await store.get_model("m")
        assert (model.kind, model.gates, model.delete_time, model.etag) == ("MODEL", (), None, "r1")
        for count, content in enumerate(CONTENTS, 1):
            version = await store.get_version(number(count))
            assert (version.content, version.digest) == (content, digest(content))
            assert (version.stage, version.etag, version.verify_time) == ("ACTIVE", f"r{count + 1}", None)
        assert (await store.get_version(number(2))).size_bytes == 1020
        listed, _ = await registry.search.list_versions("m", Asked(order_by="size_bytes desc"))
        assert [version.number for version in listed] == [2, 1]
        told = await store.present_state(None, after=0, upto=4, limit=10)
        assert [(change.revision, change.time, change.actor) for change in told] == [
            (revision, TIME, actor)
            for revision, actor in ((1, "spiffe://a"), (2, "spiffe://b"), (3, "spiffe://b"), (4, "spiffe://c"))
        ]
        (move,), _ = await store.list_moves("m", "stable", size=0, token="")
        assert (move.from_version, move.to_version, move.actor, move.revision) == (None, 1, "spiffe://c", 4)
        mine, everything = await store.get_quota("m"), await store.get_quota(None)
        assert (mine.bytes_used, mine.versions_used) == (1010, 2)
        assert (everything.bytes_used, everything.versions_used, everything.models_used) == (1015, 2, 1)
        foreseen = await registry.garbage.collect(grace=None, dry_run=True)
        assert foreseen.blobs == []
        # It goes on as if it had always been so.
        moved = await store.set_alias(alias("stable"), number(2), etag="r4", actor="")
        assert moved.revision == 5
        assert (await store.set_stage(number(1), "DEPRECATED", reason="", etag="r2", actor="")).meta_revision == 6
        assert (await store.list_audit(from_sequence=0, resource="", actor="", size=0, token=""))[0][0].sequence == 1


async def test_a_blob_that_nobody_used_has_been_unused_since_it_came(url: str, tmp_path: Path) -> None:
    first_release(url, tmp_path / "data")
    later = datetime(2026, 1, 1, tzinfo=UTC)
    settings = RegistrySettings(database_url="" if url.startswith("sqlite") else url)
    async with open_registry(tmp_path / "data", settings, clock=lambda: later) as registry:
        foreseen = await registry.garbage.collect(grace=None, dry_run=True)
        assert (foreseen.blobs, foreseen.freed_bytes) == ([f"blobs/sha256-{LOOSE}"], 5)
