"""Traces kept on the laptop: spans in SQLite, bounded by the number of traces. Blocking; call it on an executor."""

from __future__ import annotations

import contextlib
import json
import sqlite3
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from mlmesh_runtime.errors import NotFound

TRACES_MAX = 2000
SPANS_PER_TRACE_MAX = 5000
_SCHEMA = """
CREATE TABLE IF NOT EXISTS traces (
    trace_id TEXT PRIMARY KEY, received_ns INTEGER NOT NULL, start_ns INTEGER NOT NULL, end_ns INTEGER NOT NULL,
    span_count INTEGER NOT NULL, error INTEGER NOT NULL
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS traces_by_start ON traces (start_ns);
CREATE TABLE IF NOT EXISTS spans (
    trace_id TEXT NOT NULL, span_id TEXT NOT NULL, parent_span_id TEXT NOT NULL, name TEXT NOT NULL,
    service TEXT NOT NULL, kind TEXT NOT NULL, start_ns INTEGER NOT NULL, end_ns INTEGER NOT NULL,
    attributes TEXT NOT NULL, error TEXT NOT NULL, links TEXT NOT NULL,
    PRIMARY KEY (trace_id, span_id)
) WITHOUT ROWID;
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """A piece of work. Ids are lower-case hex (32 and 16 digits), times are nanoseconds since 1970."""

    trace_id: str
    span_id: str
    parent_span_id: str = ""
    name: str
    service: str = ""
    kind: str = "internal"
    start_ns: int
    end_ns: int
    attributes: Mapping[str, str] = field(default_factory=dict)
    error: str = ""
    links: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceSummary:
    """A trace in a line."""

    trace_id: str
    root_name: str
    start_ns: int
    duration_ns: int
    span_count: int
    error: bool
    services: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceFilter:
    """Which traces are looked for; what is empty, 0 or None asks nothing.

    Conditions on spans (name, service, attributes) are met by one span. An attribute's empty value asks that it is
    there. ``start_ns`` and ``end_ns`` bound when the trace began; a trace that ``errors_only`` finds has one somewhere.
    """

    span_name: str = ""
    service: str = ""
    attributes: Mapping[str, str] = field(default_factory=dict)
    errors_only: bool = False
    min_duration_ns: int = 0
    start_ns: int = 0
    end_ns: int | None = None


class TraceStore:
    """Spans by trace. Spans of a trace may come in any order and from any process; one that comes again counts once.

    ``clock_ns`` gives nanoseconds since 1970: traces that arrived first are dropped first.
    """

    def __init__(self, path: Path | str, *, clock_ns: Callable[[], int], traces_max: int = TRACES_MAX) -> None:
        self._clock_ns = clock_ns
        self._traces_max = traces_max
        self._lock = threading.Lock()
        self._db = _open(path)

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._db.close()

    def add(self, spans: Iterable[Span]) -> int:
        """Keep spans; gives how many were new."""
        added = 0
        with self._lock, self._transaction():
            for span in spans:
                added += self._add(span)
            self._prune()
        return added

    def list_traces(self, count: int, wanted: TraceFilter | None = None) -> list[TraceSummary]:
        """Newest first, at most ``count``."""
        where, arguments = _conditions(wanted or TraceFilter())
        query = (
            "SELECT trace_id, start_ns, end_ns, span_count, error FROM traces "  # noqa: S608  (fixed texts)
            f"WHERE {' AND '.join(where)} ORDER BY start_ns DESC, trace_id LIMIT ?"
        )
        with self._lock:
            rows = self._db.execute(query, (*arguments, count)).fetchall()
            return [self._summary(*row) for row in rows]

    def get_trace(self, trace_id: str) -> list[Span]:
        """The spans of a trace (or of the ``latest`` one) by start time. Raises NotFound (TRACE_NOT_FOUND)."""
        with self._lock:
            if trace_id == "latest":
                row = self._db.execute("SELECT trace_id FROM traces ORDER BY start_ns DESC LIMIT 1").fetchone()
                trace_id = row[0] if row else "latest"
            rows = self._db.execute(
                "SELECT trace_id, span_id, parent_span_id, name, service, kind, start_ns, end_ns, attributes, error, "
                "links FROM spans WHERE trace_id = ? ORDER BY start_ns, end_ns DESC, span_id",
                (trace_id,),
            ).fetchall()
        if not rows:
            raise NotFound(f"no trace {trace_id} is kept", reason="TRACE_NOT_FOUND")
        return [_span(row) for row in rows]

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            self._db.execute("ROLLBACK")
            raise
        self._db.execute("COMMIT")

    def _add(self, span: Span) -> int:
        kept = self._db.execute("SELECT span_count FROM traces WHERE trace_id = ?", (span.trace_id,)).fetchone()
        if kept and kept[0] >= SPANS_PER_TRACE_MAX:
            return 0
        cursor = self._db.execute(
            "INSERT OR IGNORE INTO spans VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (
                span.trace_id, span.span_id, span.parent_span_id, span.name, span.service, span.kind,
                span.start_ns, span.end_ns, json.dumps(dict(span.attributes)), span.error, json.dumps(span.links),
            ),
        )  # fmt: skip
        if not cursor.rowcount:
            return 0
        self._db.execute(
            "INSERT INTO traces VALUES (?, ?, ?, ?, 1, ?) ON CONFLICT (trace_id) DO UPDATE SET "
            "start_ns = min(start_ns, excluded.start_ns), end_ns = max(end_ns, excluded.end_ns), "
            "span_count = span_count + 1, error = max(error, excluded.error)",
            (span.trace_id, self._clock_ns(), span.start_ns, span.end_ns, int(bool(span.error))),
        )
        return 1

    def _prune(self) -> None:
        count = self._db.execute("SELECT count(*) FROM traces").fetchone()[0]
        if count <= self._traces_max:
            return
        old = self._db.execute(
            "SELECT trace_id FROM traces ORDER BY received_ns, start_ns LIMIT ?", (count - self._traces_max,)
        ).fetchall()
        self._db.executemany("DELETE FROM spans WHERE trace_id = ?", old)
        self._db.executemany("DELETE FROM traces WHERE trace_id = ?", old)

    def _summary(self, trace_id: str, start_ns: int, end_ns: int, span_count: int, error: int) -> TraceSummary:
        # A root may not have arrived, or belongs to a caller that sends no spans: then the earliest stands for it.
        root = self._db.execute(
            "SELECT name FROM spans WHERE trace_id = ? ORDER BY parent_span_id != '', start_ns LIMIT 1", (trace_id,)
        ).fetchone()
        services = self._db.execute(
            "SELECT service FROM spans WHERE trace_id = ? GROUP BY service ORDER BY min(start_ns)", (trace_id,)
        ).fetchall()
        return TraceSummary(
            trace_id=trace_id,
            root_name=root[0] if root else "",
            start_ns=start_ns,
            duration_ns=end_ns - start_ns,
            span_count=span_count,
            error=bool(error),
            services=tuple(row[0] for row in services),
        )


def _conditions(wanted: TraceFilter) -> tuple[list[str], list[object]]:
    where = ["end_ns - start_ns >= ?", "start_ns >= ?"]
    arguments: list[object] = [wanted.min_duration_ns, wanted.start_ns]
    if wanted.end_ns is not None:
        where.append("start_ns < ?")
        arguments.append(wanted.end_ns)
    if wanted.errors_only:
        where.append("error = 1")
    of_span: list[str] = []
    values: list[object] = []
    for column, text in (("name", wanted.span_name), ("service", wanted.service)):
        if text:
            of_span.append(f"{column} = ?")
            values.append(text)
    for name, text in wanted.attributes.items():
        is_so = " AND value = ?" if text else ""
        of_span.append(f"EXISTS (SELECT 1 FROM json_each(attributes) WHERE key = ?{is_so})")  # noqa: S608  (fixed texts)
        values += [name, text] if text else [name]
    if of_span:
        where.append(f"trace_id IN (SELECT trace_id FROM spans WHERE {' AND '.join(of_span)})")  # noqa: S608
    return where, [*arguments, *values]


def _open(path: Path | str) -> sqlite3.Connection:
    try:
        return _connect(path)
    except sqlite3.DatabaseError:
        if not isinstance(path, Path):
            raise
        # Traces are observations, not accepted work: a broken file is put aside, the mesh starts.
        for suffix in ("-wal", "-shm"):
            path.with_name(path.name + suffix).unlink(missing_ok=True)
        path.replace(path.with_name(path.name + ".broken"))
        return _connect(path)


def _connect(path: Path | str) -> sqlite3.Connection:
    connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    try:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = OFF")
        connection.executescript(_SCHEMA)
    except BaseException:
        connection.close()
        raise
    return connection


def _span(row: tuple[str, str, str, str, str, str, int, int, str, str, str]) -> Span:
    return Span(
        trace_id=row[0],
        span_id=row[1],
        parent_span_id=row[2],
        name=row[3],
        service=row[4],
        kind=row[5],
        start_ns=row[6],
        end_ns=row[7],
        attributes=json.loads(row[8]),
        error=row[9],
        links=tuple(json.loads(row[10])),
    )
