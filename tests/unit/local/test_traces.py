from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest

from mlmesh_local.traces import Span, TraceFilter, TraceStore
from mlmesh_runtime.errors import NotFound

ONE, TWO, THREE = "1" * 32, "2" * 32, "3" * 32


@pytest.fixture
def store(tmp_path: Path) -> Iterator[TraceStore]:
    ticks = itertools.count()
    opened = TraceStore(tmp_path / "traces.sqlite", clock_ns=lambda: next(ticks), traces_max=2)
    yield opened
    opened.close()


def span(trace_id: str, span_id: str, *, parent: str = "", start: int = 0, end: int = 10, **more: object) -> Span:
    values: dict[str, object] = {"name": f"span {span_id}", "service": "a"} | more
    return Span(trace_id=trace_id, span_id=span_id, parent_span_id=parent, start_ns=start, end_ns=end, **values)  # type: ignore[arg-type]


def test_a_trace_comes_back_by_start_time_whatever_the_order_of_arrival(store: TraceStore) -> None:
    late = span(ONE, "b", parent="a", start=5, end=7, attributes={"k": "v"}, links=(f"{TWO}/c",), kind="server")
    early = span(ONE, "a", start=1, end=9)
    assert store.add([late]) == 1
    assert store.add([early]) == 1
    assert store.get_trace(ONE) == [early, late]


def test_a_span_that_comes_again_counts_once(store: TraceStore) -> None:
    assert store.add([span(ONE, "a"), span(ONE, "a")]) == 1
    assert store.add([span(ONE, "a")]) == 0
    (summary,) = store.list_traces(10)
    assert summary.span_count == 1


def test_a_summary_tells_root_duration_error_and_services_in_order(store: TraceStore) -> None:
    store.add(
        [
            span(ONE, "b", parent="a", start=5, end=30, service="registry", error="no disk"),
            span(ONE, "a", start=1, end=20, service="gateway", name="Get"),
        ]
    )
    (summary,) = store.list_traces(10)
    assert (summary.root_name, summary.start_ns, summary.duration_ns) == ("Get", 1, 29)
    assert (summary.error, summary.services) == (True, ("gateway", "registry"))


def test_newest_first_and_filtered(store: TraceStore) -> None:
    store.add([span(ONE, "a", start=1, end=2, error="x"), span(TWO, "b", start=3, end=4, name="wanted")])
    assert [trace.trace_id for trace in store.list_traces(10)] == [TWO, ONE]
    assert [trace.trace_id for trace in store.list_traces(1)] == [TWO]
    assert [trace.trace_id for trace in store.list_traces(10, TraceFilter(errors_only=True))] == [ONE]
    assert [trace.trace_id for trace in store.list_traces(10, TraceFilter(span_name="wanted"))] == [TWO]
    assert store.get_trace("latest")[0].trace_id == TWO


def test_the_trace_that_arrived_first_goes_first(store: TraceStore) -> None:
    for trace_id in (THREE, ONE, TWO):
        store.add([span(trace_id, "a")])
    assert {trace.trace_id for trace in store.list_traces(10)} == {ONE, TWO}
    with pytest.raises(NotFound) as missing:
        store.get_trace(THREE)
    assert missing.value.reason == "TRACE_NOT_FOUND"


def test_no_trace_yet(store: TraceStore) -> None:
    assert store.list_traces(10) == []
    with pytest.raises(NotFound):
        store.get_trace("latest")


def test_traces_are_kept_over_a_restart_and_a_broken_file_is_put_aside(tmp_path: Path) -> None:
    path = tmp_path / "traces.sqlite"
    for _ in range(2):
        store = TraceStore(path, clock_ns=lambda: 0)
        store.add([span(ONE, "a")])
        assert len(store.get_trace(ONE)) == 1
        store.close()
    path.write_bytes(b"not a database" * 1000)
    store = TraceStore(path, clock_ns=lambda: 0)
    assert store.list_traces(10) == []
    store.close()
    assert path.with_name("traces.sqlite.broken").exists()


def test_traces_are_found_by_service_attribute_duration_and_time(store: TraceStore) -> None:
    odd = 'a."b\\'
    store.add([span(ONE, "a", start=10, end=20, service="client", attributes={"guid:x-request-id": "7", odd: "x"})])
    store.add([span(TWO, "b", start=30, end=90, service="server"), span(TWO, "c", start=31, end=40, service="client")])

    def found(**wanted: object) -> list[str]:
        return [trace.trace_id for trace in store.list_traces(10, TraceFilter(**wanted))]  # type: ignore[arg-type]

    assert found(service="client") == [TWO, ONE]
    assert found(attributes={"guid:x-request-id": "7"}) == [ONE]
    assert found(attributes={odd: ""}) == [ONE]
    assert found(attributes={"guid:x-request-id": "8"}) == []
    # One span meets all conditions on spans.
    assert found(service="server", span_name="span c") == []
    assert found(min_duration_ns=11) == [TWO]
    assert found(start_ns=30) == [TWO]
    assert found(end_ns=30) == [ONE]
