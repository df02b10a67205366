"""`mlmesh traces`: a list, and one trace as a waterfall."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.text import Text

from mlmesh.local.v1 import local_pb2 as pb
from mlmesh_cli.render import text as t
from mlmesh_cli.render.status import table

_KIND_STYLES = {"client": "cyan", "server": "green", "internal": "magenta", "producer": "yellow", "consumer": "yellow"}
_TIMELINE_MIN, _TIMELINE_MAX = 20, 60
_LINKS_MAX = 8
# Attributes worth a word, and the word.
_NOTES = (
    ("rpc.grpc.status_code", "grpc"),
    ("grpc.status_code", "grpc"),
    ("mlmesh.model_version", "version"),
    ("mlmesh.batch.rows", "rows"),
    ("mlmesh.batch.requests", "requests"),
    ("upstream_cluster.name", "to"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A span where the waterfall draws it: depth in the tree, start and length in seconds from the first span."""

    span: pb.Span
    depth: int
    offset_s: float
    duration_s: float


def waterfall_rows(spans: Sequence[pb.Span]) -> list[Row]:
    """Spans as a tree, parents before children, siblings by start; a span whose parent is missing is a root."""
    if not spans:
        return []
    known = {span.span_id for span in spans}
    children: dict[str, list[pb.Span]] = defaultdict(list)
    for span in sorted(spans, key=lambda s: (t.unix(s.start_time), s.span_id)):
        children[span.parent_span_id if span.parent_span_id in known else ""].append(span)
    begin = min(t.unix(span.start_time) for span in spans)
    rows: list[Row] = []
    seen: set[str] = set()
    # Spans that are each other's ancestors have no root; they come last, so that none is lost.
    stack = [(span, 0) for span in reversed([*children[""], *spans])]
    while stack:
        span, depth = stack.pop()
        if span.span_id in seen:
            continue
        seen.add(span.span_id)
        offset = t.unix(span.start_time) - begin
        rows.append(Row(span=span, depth=depth, offset_s=offset, duration_s=t.seconds(span.duration)))
        stack += [(child, depth + 1) for child in reversed(children[span.span_id])]
    return rows


def timeline(offset_s: float, duration_s: float, total_s: float, *, width: int, style: str) -> Text:
    """A bar of `width` cells that begins and ends where the span does; at least one cell is drawn."""
    scale = width / total_s if total_s > 0 else 0.0
    first = min(int(offset_s * scale), width - 1)
    last = min(max(round((offset_s + duration_s) * scale), first + 1), width)
    return Text(" " * first) + Text("━" * (last - first), style=style) + Text(" " * (width - last))


def short_name(name: str) -> str:
    """A span's name without the package of its RPC: inference.GRPCInferenceService/X → GRPCInferenceService/X."""
    service, slash, method = name.partition("/")
    return f"{service.rsplit('.', 1)[-1]}/{method}" if slash and method != "*" else name


def _notes(span: pb.Span) -> str:
    found: dict[str, str] = {}
    for attribute, label in _NOTES:
        if attribute in span.attributes:
            found.setdefault(label, span.attributes[attribute])
    if "to" in found:
        # outbound|9000|v1|host: the subset is what the route decided.
        parts = found["to"].split("|")
        found["to"] = (parts[2] or parts[3].split(".")[0]) if len(parts) == 4 else found["to"]
    if span.links:
        found["mates"] = str(len(span.links))
    return " ".join(f"{label}={value}" for label, value in found.items() if value)


class Waterfall:
    """A trace drawn to the width of the terminal: the narrower it is, the less stands beside the timeline.

    Args:
        spans: the spans of one trace, in any order.
    """

    def __init__(self, spans: Sequence[pb.Span]) -> None:
        self.rows = waterfall_rows(spans)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        if not self.rows:
            yield Text("no spans", style="dim")
            return
        sizes = {
            "span": max(len(short_name(row.span.name)) + 2 * row.depth for row in self.rows),
            "service": max(len(row.span.service) for row in self.rows),
            ">start": 8,
            ">took": 8,
            "notes": max(len(_notes(row.span)) for row in self.rows),
        }
        shown = ["span", ">took"]
        for column in ("service", ">start", "notes"):
            with_it = [*shown, column]
            if sum(sizes[c] + 3 for c in with_it) + _TIMELINE_MIN + 3 <= options.max_width:
                shown = with_it
        room = options.max_width - sum(sizes[c] + 3 for c in shown) - 3
        width = max(min(room, _TIMELINE_MAX), _TIMELINE_MIN)
        columns = [c for c in ("span", "service", "timeline", ">start", ">took", "notes") if c in {*shown, "timeline"}]
        result = table(*columns)
        total = max(row.offset_s + row.duration_s for row in self.rows)
        for row in self.rows:
            cells = self._cells(row, total, width)
            result.add_row(*(cells[column] for column in columns))
        yield result

    @staticmethod
    def _cells(row: Row, total_s: float, width: int) -> dict[str, RenderableType]:
        style = "red" if row.span.error else _KIND_STYLES.get(row.span.kind, "default")
        name = "  " * row.depth + short_name(row.span.name)
        return {
            "span": Text(name, style="red" if row.span.error else "default", no_wrap=True),
            "service": Text(row.span.service, style=style, no_wrap=True),
            "timeline": timeline(row.offset_s, row.duration_s, total_s, width=width, style=style),
            ">start": t.duration(row.offset_s) if row.offset_s else "0",
            ">took": t.duration(row.duration_s),
            "notes": Text(_notes(row.span), style="dim", no_wrap=True),
        }


def trace_view(trace: pb.GetTraceResponse) -> RenderableType:
    """A trace with a line above it and its errors below."""
    rows = waterfall_rows(trace.spans)
    total = max((row.offset_s + row.duration_s for row in rows), default=0.0)
    services = len({span.service for span in trace.spans})
    head = Text(f"trace {trace.trace_id}", style="bold")
    head.append(f"  {len(rows)} spans, {services} services, {t.duration(total)}", style="default not bold")
    errors = [Text(f"{row.span.name}: {row.span.error}", style="red") for row in rows if row.span.error]
    return Group(head, Waterfall(trace.spans), *errors, *_links(rows))


def _links(rows: Sequence[Row]) -> list[Text]:
    """Requests of other traces that a span served as well: a batch serves several."""
    found = [(row.span.name, link.partition("/")[0]) for row in rows for link in row.span.links]
    lines = [Text(f"{name} also served trace {trace_id}", style="dim") for name, trace_id in dict.fromkeys(found)]
    more = len(lines) - _LINKS_MAX
    return lines if more <= 0 else [*lines[:_LINKS_MAX], Text(f"and {more} more", style="dim")]


NO_TRACES = "no traces yet: `mlmesh infer` makes one"


def traces_table(traces: Iterable[pb.TraceSummary], now: datetime, none: str = NO_TRACES) -> RenderableType:
    """One row a trace, newest first; `none` where there is no row."""
    result = table("trace", "root", "when", ">took", ">spans", "services", "")
    for trace in traces:
        result.add_row(
            trace.trace_id,
            trace.root_name or "(not arrived yet)",
            t.ago(trace.start_time, now),
            t.duration(t.seconds(trace.duration)),
            str(trace.span_count),
            ", ".join(trace.services),
            Text("error", style="red") if trace.error else "",
        )
    if not result.row_count:
        return Text(none, style="dim")
    return result
