"""How much longer do lists and searches take with 100,000 versions than with 1,000?

Method: two databases of the same kind, one with a hundred times the versions of the other, filled with the rows that
publishing makes (models of 1,000 versions, 6 labels and metrics each, a description, lineage). Each question is asked
of both in turn, in shuffled rounds, by the code that serves ListModelVersions: keys, rows and values included; gRPC is
not. Reported: medians in milliseconds, and the median of the rounds' ratios. A ratio of 1 means that a hundred times
the versions cost nothing.

Asked with SQLite and, where the distribution's PostgreSQL is installed, with that.

    python -m benchmarks registry-search --versions 100000 --rounds 9
"""

from __future__ import annotations

import contextlib
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import sqlalchemy as sa
import typer

from benchmarks.harness import ratio_of_medians, write_results
from mlmesh_registry import rows, tables
from mlmesh_registry.backends import Backend
from mlmesh_registry.listing import plan
from mlmesh_registry.schema import version_schema
from mlmesh_registry.search import Asked, page
from mlmesh_registry.versions import Artifact, Content, Lineage, Version
from tests.support.catalogue import catalogue, fill, model, sha256, version
from tests.support.postgres import migrate_registry, postgres_running, programs

RESULTS = Path("benchmarks/results/registry_search.json")
VERSIONS_A_MODEL = 1000
_WORDS = ("vision", "text", "quantised", "distilled", "nightly", "release", "baseline", "pruned")


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """What is asked: `deep` for the page behind half of the list, `watch` for a page of a watch's present state."""

    name: str
    model: str | None = None
    filter: str = ""
    order_by: str = ""
    deep: bool = False
    size: int = 50
    watch: bool = False


def questions(versions: int) -> Sequence[Question]:
    """The questions for a registry of so many versions."""
    one = f"model-{versions // VERSIONS_A_MODEL // 2:03}"
    parent = f'lineage.parents:"models/{one}/versions/1"'
    return [
        Question(name="newest of all"),
        Question(name="newest of one model", model=one),
        Question(name="newest of all, deep page", deep=True),
        Question(name="newest of one model, deep page", model=one, deep=True),
        Question(name="label that a tenth has", filter="labels.team = vision"),
        Question(name="label that a tenth has, deep page", filter="labels.team = vision", deep=True),
        Question(name="label that one has", filter=f"labels.run = run-{versions // 2}"),
        Question(name="label and metric", filter="labels.team = vision AND metrics.accuracy >= 0.9"),
        Question(name="metric that few reach", filter="metrics.accuracy >= 0.9999"),
        Question(name="metric that most reach", filter="metrics.accuracy >= 0.2"),
        Question(name="best by metric", order_by="metrics.accuracy desc"),
        Question(name="best by metric, deep page", order_by="metrics.accuracy desc", deep=True),
        Question(name="best by metric of one model", model=one, order_by="metrics.accuracy desc"),
        Question(name="best by metric of a label", filter="labels.team = vision", order_by="metrics.accuracy desc"),
        Question(name="children of a version", filter=parent),
        Question(name="job", filter=f"lineage.job = jobs/{versions // 2}"),
        Question(name="stage that few are in", filter="stage = QUARANTINED"),
        Question(name="stage that most are in", filter="stage = ACTIVE"),
        Question(name="alias", filter="aliases:stable"),
        Question(name="time", filter="create_time < 2026-01-01T00:10:00Z"),
        Question(name="oldest first", order_by="create_time"),
        Question(name="oldest first, deep page", order_by="create_time", deep=True),
        Question(name="a watch's present state, 500 from the middle on", watch=True),
        Question(name="a watch's present state of one model, 500", watch=True, model=one),
        Question(name="word that a quarter has", filter="nightly"),
        Question(name="word that nobody has (every description is read)", filter="nowhere"),
        Question(name="label that is not (every version is read)", filter="-labels:team", size=50),
        Question(name="order by label (every version is sorted)", order_by="labels.team"),
    ]


def versions_of(count: int) -> Iterator[Version]:
    """Versions as a company has them, spread evenly over models; the same ones every time."""
    pick = random.Random(1)  # noqa: S311  not a secret
    models = max(count // VERSIONS_A_MODEL, 1)
    for index in range(count):
        name, number = f"model-{index % models:03}", index // models + 1
        file = Artifact(path="model.onnx", sha256=sha256(str(index)), size_bytes=pick.randint(1000, 10**9))
        content = Content(
            artifacts=(file, Artifact(path="labels.json", sha256=sha256("labels"), size_bytes=100)),
            metrics={name: pick.random() for name in ("accuracy", "f1_macro", "loss")},
            labels={"team": f"team-{index % 10}" if index % 10 else "vision", "run": f"run-{index}", "branch": "main"},
            lineage=Lineage(
                job=f"jobs/{index}",
                dataset=pick.choice(["mnist", "digits"]),
                code_digest=sha256("code"),
                parents=(f"models/{name}/versions/{1 + number // 50 * 50}",) if number % 50 else (),
            ),
            description=" ".join(pick.sample(_WORDS, 2)) + f" number {index}, trained again",
        )
        stage = "QUARANTINED" if index % 5000 == 7 else "ACTIVE"
        yield version(name, number, models + 1 + index, content, creator="spiffe://trainer", stage=stage)


def fill_with(backend: Backend, count: int) -> None:
    """Store so many versions, with an alias a model."""
    models = max(count // VERSIONS_A_MODEL, 1)
    with backend.write_engine.begin() as connection:
        fill(connection, [model(f"model-{n:03}", n + 1) for n in range(models)], versions_of(count))
        aliases = [
            {
                "model": f"model-{n:03}",
                "alias": "stable",
                "version": 1,
                "update_time": 0,
                "updater": "",
                "revision": models + count + n + 1,
            }
            for n in range(models)
        ]
        connection.execute(tables.aliases.insert(), aliases)
    if backend.write_engine.dialect.name == "postgresql":
        # The server's autovacuum does so by itself within a minute.
        with backend.write_engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            connection.execute(sa.text("ANALYZE"))


def asker(backend: Backend, question: Question) -> Callable[[], int]:
    """A function that asks once and gives how many versions were answered."""
    if question.watch:
        return _watcher(backend, question.model)
    wanted = plan(version_schema(question.model), question.filter, question.order_by, show_deleted=False)
    asked = Asked(size=question.size, filter=question.filter, order_by=question.order_by)
    if question.deep:
        asked = replace(asked, token=_half_way(backend, wanted, asked))

    def ask() -> int:
        with backend.read_engine.begin() as connection:
            keys, _ = page(connection, "list", wanted, asked)
            return len(rows.versions_of(connection, keys))

    return ask


def _watcher(backend: Backend, model_id: str | None) -> Callable[[], int]:
    def ask() -> int:
        with backend.read_engine.begin() as connection:
            head = connection.execute(sa.select(tables.log_head.c.revision)).scalar_one()
            return len(rows.present(connection, model_id, 0 if model_id else head // 2, head, 500))

    return ask


def _half_way(backend: Backend, wanted: Any, asked: Asked) -> str:
    """Token of the page behind half of the list, walked to in pages of the greatest size."""
    tokens = [""]
    with backend.read_engine.begin() as connection:
        while True:
            _, token = page(connection, "list", wanted, replace(asked, size=1000, token=tokens[-1]))
            if not token:
                return tokens[len(tokens) // 2] or page(connection, "list", wanted, asked)[1]
            tokens.append(token)


def measure(small: Backend, large: Backend, sizes: tuple[int, int], rounds: int) -> dict[str, Any]:
    """Median milliseconds of both, and their ratio, by question."""
    askers = {}
    for few, many in zip(questions(sizes[0]), questions(sizes[1]), strict=True):
        askers[many.name] = (asker(small, few), asker(large, many))
    taken: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in askers}
    answered: dict[str, tuple[int, int]] = {}
    order = [*askers]
    for turn in range(rounds + 1):
        random.Random(turn).shuffle(order)  # noqa: S311
        for name in order:
            answered[name] = (0, 0)
            counts = []
            for side, ask in enumerate(askers[name]):
                began = time.perf_counter()
                counts.append(ask())
                if turn:
                    taken[name][side].append((time.perf_counter() - began) * 1e3)
            answered[name] = (counts[0], counts[1])
    return {
        name: {
            "small_ms": round(statistics.median(few), 3),
            "large_ms": round(statistics.median(many), 3),
            "ratio": round(ratio_of_medians(many, few), 2),
            "answered": answered[name],
        }
        for name, (few, many) in taken.items()
    }


@contextlib.contextmanager
def databases(kind: str) -> Iterator[Callable[[str], Backend]]:
    """A function that opens a new database of a kind."""
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="mlmesh-search-")))
        server = stack.enter_context(postgres_running(durable=True)) if kind == "postgresql" else None

        def opened(name: str) -> Backend:
            url = ""
            if server is not None:
                url = server.create()
                migrate_registry(url)
            (folder / name).mkdir()
            return stack.enter_context(catalogue(folder / name, url))

        yield opened


def search(
    versions: Annotated[int, typer.Option(help="Versions in the large registry.")] = 100_000,
    rounds: Annotated[int, typer.Option(help="Rounds, after one that is thrown away.")] = 9,
    database: Annotated[str, typer.Option(help="sqlite, postgresql or both.")] = "both",
) -> None:
    """Fill the databases, ask, print a table and write JSON."""
    kinds = ("sqlite", "postgresql") if database == "both" else (database,)
    results: dict[str, Any] = {"versions": {"small": versions // 100, "large": versions}, "rounds": rounds}
    for kind in kinds:
        if kind == "postgresql" and programs() is None:
            print("postgresql: not installed, left out")
            continue
        with databases(kind) as opened:
            small, large = opened("small"), opened("large")
            began = time.perf_counter()
            fill_with(small, versions // 100)
            fill_with(large, versions)
            print(f"{kind}: filled in {time.perf_counter() - began:.0f} s")
            results[kind] = measure(small, large, (versions // 100, versions), rounds)
        for name, found in results[kind].items():
            print(f"  {name:52} {found['small_ms']:8.2f} ms {found['large_ms']:8.2f} ms   x {found['ratio']}")
    write_results(RESULTS, results)


def main(arguments: list[str]) -> None:
    """Run with these arguments."""
    app = typer.Typer(add_completion=False)
    app.command()(search)
    app(arguments, standalone_mode=False)
