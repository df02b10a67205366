"""Filters and orders in real databases: what they find is what a plain reading of them finds, however pages are cut."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mlmesh_registry import listing, rows, tables
from mlmesh_registry.backends import Backend
from mlmesh_registry.filter import parse
from mlmesh_registry.listing import plan
from mlmesh_registry.ordering import parse_order
from mlmesh_registry.paging import make_token
from mlmesh_registry.schema import Schema, model_schema, version_schema
from mlmesh_registry.search import Asked, page
from mlmesh_registry.versions import Artifact, Content, Lineage, Version
from mlmesh_runtime.errors import InvalidInput
from tests.support.catalogue import BEGIN, catalogue, fill, model, sha256, version
from tests.support.naive_search import holds, ordered
from tests.support.postgres import PostgresServer

LONG = "x" * 110
TEXTS = [
    "vision",
    "Vision",
    "vi",
    "",
    "a*b",
    "äö",
    "ÄÖ ẞ",
    'it\'s "so"',
    "\\",
    "%_",
    LONG + "1",
    LONG + "2",
    "\U0010ffff",
]
MODELS = ["alpha", "beta", "b-2"]
JOBS = ["", "jobs/1", "jobs/2", "jobs/ü"]
WORDS = ["", "Straße one", "STRASSE two", "one % two", "beta"]
METRICS = [0.1, 0.5, 0.9, -1.0, 1e-9, 1e300, 0.0]
ALIASES = ["stable", "canary", "c-1"]


def some_versions(seed: int) -> Sequence[Version]:
    """Versions that have and lack everything, with few different values, so that filters meet some of them."""
    pick = random.Random(seed)  # noqa: S311  not a secret
    made: list[Version] = []
    for revision in range(10, 70):
        name = pick.choice(MODELS)
        number = 1 + sum(each.model == name for each in made)
        size = pick.choice([1, 10, 2**40])
        content = Content(
            artifacts=tuple(
                Artifact(path=path, sha256=sha256(path), size_bytes=size)
                for path in pick.sample(["model.onnx", "a/b.json", "c.txt"], pick.randint(1, 3))
            ),
            metrics={key: pick.choice(METRICS) for key in ("accuracy", "a.b") if pick.random() < 0.7},
            labels={key: pick.choice(TEXTS) for key in ("team", "x.y", "k k") if pick.random() < 0.6},
            lineage=Lineage(
                job=pick.choice(JOBS),
                dataset=pick.choice(["", "mnist"]),
                study=pick.choice(["", "studies/1"]),
                parents=tuple(f"models/alpha/versions/{n}" for n in pick.sample([1, 2, 3], pick.randint(0, 2))),
            ),
            description=pick.choice(WORDS),
        )
        deleted = BEGIN + timedelta(days=1) if pick.random() < 0.1 else None
        fields = {
            "create_time": BEGIN + timedelta(seconds=pick.choice([1, 2, 2.000001, 60])),
            "creator": pick.choice(["", "spiffe://a", "spiffe://b"]),
            "stage": pick.choice(["ACTIVE", "ACTIVE", "DEPRECATED", "QUARANTINED"]),
            "verify_time": pick.choice([None, BEGIN, BEGIN + timedelta(seconds=1)]),
            "delete_time": deleted,
            "purge_time": deleted,
        }
        made.append(version(name, number, revision, content, **fields))
    return made


class World:
    """A database with versions and models in it, and the same as values."""

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        pick = random.Random(7)  # noqa: S311
        models = [
            model(
                name,
                revision,
                description=pick.choice(WORDS),
                labels={"team": pick.choice(TEXTS)} if pick.random() < 0.7 else {},
                kind=pick.choice(["MODEL", "DATASET"]),
                latest_version=pick.randint(0, 3),
            )
            for revision, name in enumerate([*MODELS, "c", "d-1", "d1", "e"], 1)
        ]
        with backend.write_engine.begin() as connection:
            fill(connection, models, some_versions(3))
            for number, alias in enumerate(ALIASES, 1):
                for name in MODELS[:2]:
                    row = {"model": name, "alias": alias, "version": number, "update_time": 0, "updater": ""}
                    connection.execute(tables.aliases.insert(), {**row, "revision": 100 + number + 10 * len(name)})
            keys = connection.execute(sa.select(tables.versions.c.revision)).scalars().all()
            self.versions = rows.versions_of(connection, keys)
            self.models = rows.models_of(connection, [each.id for each in models])

    def found(self, schema: Schema, asked: Asked) -> list[Any]:
        """Keys on all pages of a list."""
        wanted = plan(schema, asked.filter, asked.order_by, show_deleted=asked.show_deleted)
        keys: list[Any] = []
        token = ""
        while True:
            one = Asked(
                size=asked.size,
                token=token,
                filter=asked.filter,
                order_by=asked.order_by,
                show_deleted=asked.show_deleted,
            )
            with self.backend.read_engine.begin() as connection:
                more, token = page(connection, "list", wanted, one)
            keys += more
            if not token:
                return keys
            assert len(more) == asked.size
            assert len(token) <= 512


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    url = ""
    if request.param == "postgresql":
        server: PostgresServer = request.getfixturevalue("postgres")
        url = server.create(template=request.getfixturevalue("registry_template"))
    with catalogue(tmp_path_factory.mktemp("catalogue"), url) as backend:
        yield World(backend)


def quoted(text: str) -> str:
    """Text as a filter's string."""
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"').replace("*", "\\*") + '"'


TEXT_VALUES = st.one_of(
    st.sampled_from([quoted(text) for text in TEXTS]),
    st.sampled_from(['"vi*"', '"*on"', '"*i*"', "*", f'"{LONG}*"', '"*"', "vision", '"\\*"', '"*\\"so\\""']),
    st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=5).map(quoted),
)
NUMBERS = st.sampled_from(["0.1", "0.5", ".9", "-1", "1e-9", "1e300", "0", "-0.0", "+2"])
TIMES = st.sampled_from(
    ["2026-01-01T00:00:00Z", "2026-01-01T00:00:02Z", "2026-01-01T01:00:02.000001+01:00", '"2026-01-01T00:01:00Z"']
)
ANY_OPERATOR = st.sampled_from(["=", "!=", "<", "<=", ">", ">=", ":"])
LABEL = st.sampled_from(["labels.team", "labels.x.y", 'labels."x.y"', 'labels."k k"', "labels.nothing"])


def compared(fields: st.SearchStrategy[str], values: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    """Comparisons of some fields with some values; orderings do not go with stars."""

    def spelled(field: str, how: str, value: str) -> str:
        bare = value.replace("\\*", "")
        if how in ("<", "<=", ">", ">=") and "*" in bare:
            how = "="
        return f"{field} {how} {value}"

    return st.builds(spelled, fields, ANY_OPERATOR, values)


def has(fields: st.SearchStrategy[str], values: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    return st.builds(lambda field, value: f"{field}:{value}", fields, values)


TERMS = st.one_of(
    compared(LABEL, TEXT_VALUES),
    compared(st.sampled_from(["metrics.accuracy", "metrics.a.b", 'metrics."a.b"', "metrics.none"]), NUMBERS),
    has(st.sampled_from(["metrics.accuracy", "metrics.none", "labels.team", "verify_time"]), st.just("*")),
    compared(st.sampled_from(["model", "creator", "lineage.job", "lineage.dataset", "lineage.study"]), TEXT_VALUES),
    compared(st.sampled_from(["lineage.job"]), st.sampled_from(['"jobs/1"', "jobs/1", '"jobs/*"', '"*ü"'])),
    compared(st.just("model"), st.sampled_from(["alpha", "beta", '"b*"', '"*a"'])),
    compared(st.just("name"), st.sampled_from(["models/alpha/versions/1", '"*/versions/2"', '"models/b*"'])),
    compared(st.sampled_from(["number", "size_bytes", "revision"]), st.sampled_from(["1", "2", "-3", "11", "30"])),
    compared(st.sampled_from(["create_time", "verify_time", "delete_time"]), TIMES),
    st.builds("stage{}{}".format, st.sampled_from([" = ", "!=", ":"]), st.sampled_from(["ACTIVE", '"DEPRECATED"'])),
    compared(st.just("description"), st.one_of(TEXT_VALUES, st.sampled_from(['"strasse*"', "ONE", '"*two"', '"%"']))),
    has(st.just("labels"), st.sampled_from(["team", '"k k"', "x.y", "*", "nothing"])),
    has(st.just("metrics"), st.sampled_from(["accuracy", "a.b", "*", "nothing"])),
    has(st.just("aliases"), st.sampled_from(["stable", "canary", '"c*"', "*", "nothing"])),
    has(st.just("lineage.parents"), st.sampled_from(["models/alpha/versions/1", '"*/3"', "*", "nothing"])),
    has(st.just("artifacts.path"), st.sampled_from(["model.onnx", '"a/*"', "*", '"*.txt"'])),
    st.sampled_from(["STRASSE", "straße", "one", "beta", '"%"', '"one % two"', "ph", '""', "alpha.x"]),
)  # fmt: skip
FILTERS = st.recursive(
    TERMS,
    lambda inner: st.one_of(
        st.builds("{} AND {}".format, inner, inner),
        st.builds("({} OR {})".format, inner, inner),
        st.builds("({} {})".format, inner, inner),
        st.builds("NOT ({})".format, inner),
        st.builds("-{}".format, TERMS),
    ),
    max_leaves=5,
)
SORTED_BY = [
    "metrics.accuracy", "metrics.a.b", "labels.team", "create_time", "creator", "number", "size_bytes", "model",
    "verify_time", "lineage.job", "stage", "revision",
]  # fmt: skip
SORTED = st.lists(
    st.tuples(st.sampled_from(SORTED_BY), st.sampled_from(["", " desc", " asc"])),
    max_size=3,
    unique_by=lambda pair: pair[0],
).map(lambda pairs: ", ".join(field + direction for field, direction in pairs))

PATIENT = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


@PATIENT
@given(
    text=st.one_of(st.just(""), FILTERS),
    order=SORTED,
    scope=st.sampled_from([None, None, "alpha", "b-2"]),
    show_deleted=st.booleans(),
    size=st.sampled_from([1, 3, 7, 1000]),
    few=st.sampled_from([0, 3, 2000]),
)
def test_versions_are_found_as_a_plain_reading_finds_them(
    world: World, text: str, order: str, scope: str | None, show_deleted: bool, size: int, few: int
) -> None:
    if size == 1 and order == "" and text == "":
        size = 3
    asked = Asked(size=size, filter=text, order_by=order, show_deleted=show_deleted)
    with pytest.MonkeyPatch.context() as patch:
        # How many rows are few decides which way the database goes, and must decide nothing else.
        patch.setattr(listing, "FEW_KEYS", few)
        found = world.found(version_schema(scope), asked)
    expression = parse(text)
    expected = [
        each
        for each in world.versions
        if (scope in (None, each.model)) and (show_deleted or each.delete_time is None) and holds(expression, each)
    ]
    orders = [(each.path, each.descending) for each in parse_order(order)]
    assert found == [each.revision for each in ordered(expected, orders, newest_first=True)]


MODEL_TERMS = st.one_of(
    compared(st.just("labels.team"), TEXT_VALUES),
    compared(st.sampled_from(["id", "name"]), st.sampled_from(["alpha", '"models/d*"', '"d*"', "e", '"*-*"'])),
    compared(st.just("latest_version"), st.sampled_from(["0", "1", "2"])),
    compared(st.sampled_from(["create_time", "update_time", "delete_time"]), TIMES),
    compared(st.just("description"), TEXT_VALUES),
    st.sampled_from(["kind = MODEL", "kind != DATASET", "labels:team", "labels:*", "beta"]),
)


@PATIENT
@given(
    text=st.one_of(MODEL_TERMS, st.builds("-{} OR NOT {}".format, MODEL_TERMS, MODEL_TERMS)),
    order=st.sampled_from(["", "id desc", "latest_version desc, create_time", "labels.team", "kind, update_time desc"]),
    size=st.sampled_from([1, 3, 1000]),
)
def test_models_are_found_as_a_plain_reading_finds_them(world: World, text: str, order: str, size: int) -> None:
    found = world.found(model_schema(), Asked(size=size, filter=text, order_by=order))
    expected = [each for each in world.models if holds(parse(text), each)]
    orders = [(each.path, each.descending) for each in parse_order(order)]
    assert found == [each.id for each in ordered(expected, orders, newest_first=False)]


def refusal(call: Callable[..., Any], *arguments: Any) -> InvalidInput | None:
    """The refusal of a call, None where it was answered. Any other error is one."""
    try:
        call(*arguments)
    except InvalidInput as error:
        return error
    return None


ATTACKS = [
    "' OR 1=1 --", '"; DROP TABLE versions; --', "') UNION SELECT manifest FROM versions --", "\\' OR \\'\\'=\\'",
    "1); DELETE FROM models; --", "%' OR '1'='1", "{}", ":model", "$1", "?", "%s", "%(model)s", "\x1b[2J", "\u202e",
]  # fmt: skip


@pytest.mark.parametrize("attack", ATTACKS)
def test_what_is_asked_for_stays_text(world: World, attack: str) -> None:
    """Nothing of a filter or an order reaches the database but as a value."""
    schema = version_schema(None)
    for field in ("labels.team", "creator", "description", "lineage.job", f"labels.{quoted(attack)}"):
        assert world.found(schema, Asked(size=1000, filter=f"{field} = {quoted(attack)}")) == []
        assert world.found(schema, Asked(size=1000, filter=f"{field}:{quoted(attack)} AND model = none")) == []
    for raw in (attack, f"labels.team = {attack}", f"stage = {attack}"):
        refused = refusal(world.found, schema, Asked(size=1000, filter=raw))
        assert refused is None or refused.reason == "INVALID_FILTER"
        assert refused is None or refused.message.isprintable()
    for order in (attack, f"labels.{attack}", f'metrics."{attack}" desc'):
        refused = refusal(world.found, schema, Asked(size=1000, order_by=order))
        assert refused is None or refused.field == "order_by"
    with world.backend.read_engine.begin() as connection:
        count = connection.execute(sa.select(sa.func.count()).select_from(tables.versions)).scalar_one()
    assert count == len(world.versions)


@given(place=st.recursive(st.none() | st.booleans() | st.floats() | st.integers() | st.text(), st.lists))
@PATIENT
def test_a_place_that_somebody_made_up_is_refused_or_harmless(world: World, place: Any) -> None:
    """Tokens are not secret: whoever writes one of their own learns nothing and breaks nothing."""
    asked = Asked(size=3, filter="metrics.accuracy > 0", order_by="metrics.accuracy desc, labels.team")
    query = json.dumps(["list", asked.filter, asked.order_by, asked.show_deleted])
    token = make_token(query, json.dumps(place))
    wanted = plan(version_schema(None), asked.filter, asked.order_by, show_deleted=False)
    one = Asked(size=3, token=token, filter=asked.filter, order_by=asked.order_by)
    with world.backend.read_engine.begin() as connection:
        refused = refusal(page, connection, "list", wanted, one)
    assert refused is None or refused.field == "page_token"


def test_a_token_is_good_for_its_own_filter_and_order_only(world: World) -> None:
    asked = Asked(size=2, filter="stage = ACTIVE", order_by="number")
    wanted = plan(version_schema(None), asked.filter, asked.order_by, show_deleted=False)
    with world.backend.read_engine.begin() as connection:
        _, token = page(connection, "list", wanted, asked)
        for other in (
            Asked(size=2, token=token, filter="stage = ACTIVE"),
            Asked(size=2, token=token, order_by="number"),
            Asked(size=2, token=token, filter="stage = ACTIVE", order_by="number", show_deleted=True),
        ):
            with pytest.raises(InvalidInput):
                page(connection, "list", wanted, other)


def test_a_row_that_long_labels_pointed_at_and_that_is_gone_ends_the_walk(tmp_path: Path) -> None:
    with catalogue(tmp_path) as backend:
        content = [Content(artifacts=(), labels={"k": letter * 4000}) for letter in "abc"]
        with backend.write_engine.begin() as connection:
            fill(connection, [model("m", 1)], [version("m", n, n + 1, c) for n, c in enumerate(content, 1)])
        wanted = plan(version_schema(None), "", "labels.k", show_deleted=False)
        with backend.write_engine.begin() as connection:
            keys, token = page(connection, "list", wanted, Asked(size=1, order_by="labels.k"))
            assert (keys, len(token) < 512) == ([2], True)
            assert page(connection, "list", wanted, Asked(size=1, order_by="labels.k", token=token))[0] == [3]
            connection.execute(tables.versions.delete().where(tables.versions.c.revision == 2))
            # What was searched by went with it.
            assert connection.execute(sa.select(tables.version_terms.c.revision)).scalars().all() == [3, 4]
            with pytest.raises(InvalidInput, match="gone"):
                page(connection, "list", wanted, Asked(size=1, order_by="labels.k", token=token))
