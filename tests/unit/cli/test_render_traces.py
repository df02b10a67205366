from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from mlmesh.local.v1 import local_pb2 as pb
from mlmesh_cli.render import traces as view
from tests.support.cli import NOW, at, span
from tests.unit.cli.conftest import text_of


def _trace() -> list[pb.Span]:
    return [
        span("engine", "server", start_s=0.004, took_s=0.002, service="inference"),
        span("client", start_s=0, took_s=0.010, service="mlmesh-cli", kind="client"),
        span("sidecar", "client", start_s=0.001, took_s=0.008, service="toolbox", kind="client"),
        span("server", "sidecar", start_s=0.002, took_s=0.006, service="inference", kind="server"),
        span("queue", "server", start_s=0.003, took_s=0.001, service="inference"),
    ]


def test_children_follow_their_parents_in_order_of_start() -> None:
    rows = view.waterfall_rows(_trace())
    assert [(row.span.name, row.depth) for row in rows] == [
        ("client", 0),
        ("sidecar", 1),
        ("server", 2),
        ("queue", 3),
        ("engine", 3),
    ]
    assert round(rows[4].offset_s, 6) == 0.004


def test_a_span_whose_parent_never_came_is_a_root() -> None:
    rows = view.waterfall_rows([span("late", "missing", start_s=1), span("first", start_s=0)])
    assert [(row.span.name, row.depth) for row in rows] == [("first", 0), ("late", 0)]


def test_spans_that_are_their_own_ancestors_neither_hang_nor_vanish() -> None:
    rows = view.waterfall_rows([span("a", "b"), span("b", "a"), span("c")])
    assert sorted(row.span.name for row in rows) == ["a", "b", "c"]


@given(
    st.floats(min_value=0, max_value=1),
    st.floats(min_value=0, max_value=1),
    st.floats(min_value=1e-9, max_value=2),
    st.integers(min_value=1, max_value=200),
)
def test_a_timeline_fills_its_width_and_shows_at_least_one_cell(
    offset_s: float, took_s: float, total_s: float, width: int
) -> None:
    drawn = view.timeline(offset_s, took_s, max(total_s, offset_s + took_s), width=width, style="cyan").plain
    assert len(drawn) == width
    assert drawn.count("━") >= 1


def test_the_waterfall_draws_later_spans_further_right() -> None:
    text = text_of(view.trace_view(pb.GetTraceResponse(trace_id="ab" * 16, spans=_trace())))
    lines = {
        name: line for line in text.splitlines() for name in ("client", "queue", "engine") if name in line.split()[:1]
    }
    starts = {name: line.index("━") for name, line in lines.items()}
    assert starts["client"] < starts["queue"] < starts["engine"]
    assert lines["client"].count("━") > 3 * lines["engine"].count("━")
    assert "5 spans, 3 services, 10 ms" in text


def test_errors_and_links_are_told() -> None:
    failed = span("server", error="UNAVAILABLE", links=["t/s"], attributes={"rpc.grpc.status_code": "14"})
    text = text_of(view.trace_view(pb.GetTraceResponse(trace_id="cd" * 16, spans=[failed])))
    assert "server: UNAVAILABLE" in text
    assert "grpc=14" in text
    assert "mates=1" in text


def test_the_waterfall_fits_a_narrow_terminal() -> None:
    text = text_of(view.trace_view(pb.GetTraceResponse(trace_id="ab" * 16, spans=_trace())), width=80)
    assert max(len(line) for line in text.splitlines()) <= 80
    assert "━" in text


def test_an_empty_list_says_how_to_get_a_trace() -> None:
    assert "mlmesh infer" in text_of(view.traces_table([], NOW))
    assert text_of(view.traces_table([], NOW, "no trace is like that")).strip() == "no trace is like that"


def test_traces_are_listed_whole() -> None:
    summary = pb.TraceSummary(trace_id="ab" * 16, root_name="mlmesh infer", start_time=at(-5), span_count=9, error=True)
    summary.duration.FromMilliseconds(12)
    summary.services.extend(["mlmesh-cli", "toolbox"])
    text = text_of(view.traces_table([summary], NOW))
    for wanted in ("ab" * 16, "mlmesh infer", "5 s ago", "12 ms", "mlmesh-cli, toolbox", "error"):
        assert wanted in text


def test_requests_of_other_traces_that_a_batch_served_are_named() -> None:
    batch = span("batch")
    batch.links.extend(f"{number:032x}/{1:016x}" for number in range(10))
    lines = text_of(view.trace_view(pb.GetTraceResponse(trace_id="ab" * 16, spans=[batch]))).splitlines()
    assert f"batch also served trace {0:032x}" in {line.strip() for line in lines}
    assert lines[-1].strip() == "and 2 more"
