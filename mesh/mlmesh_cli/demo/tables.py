"""Tables of the story."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.console import RenderableType
from rich.text import Text

from mlmesh.inference.v1 import control_pb2
from mlmesh_cli.demo.traffic import Phase
from mlmesh_cli.render import text as t
from mlmesh_cli.render.status import table


def shift_table(phases: Iterable[Phase], versions: Sequence[str]) -> RenderableType:
    """One row a phase: requests, configured and observed share of the second version, right answers, latencies."""
    first, second = versions
    columns = (">requests", ">failed", ">by v1", ">by v2", ">v2 wanted", ">v2 seen", "")
    result = table("weights", *columns, ">right", ">p50", ">p99")
    for phase in phases:
        answered = phase.answers.total()
        result.add_row(
            phase.name,
            f"{phase.requests:,}",
            _failed(phase),
            f"{phase.answers[first]:,}",
            f"{phase.answers[second]:,}",
            t.percent(phase.share),
            t.percent(phase.observed(second)) if answered else "-",
            t.bar(phase.observed(second), width=10),
            t.percent(phase.right.total() / answered) if answered else "-",
            t.duration(phase.percentile_s(0.5)),
            t.duration(phase.percentile_s(0.99)),
        )
    return result


def traffic_table(phases: Iterable[Phase]) -> RenderableType:
    """One row a phase: requests, failures and latencies."""
    result = table("requests", ">sent", ">failed", ">fastest", ">p50", ">p99")
    for phase in phases:
        latencies = (min(phase.latencies_s, default=0.0), phase.percentile_s(0.5), phase.percentile_s(0.99))
        result.add_row(phase.name, f"{phase.requests:,}", _failed(phase), *(t.duration(value) for value in latencies))
    return result


def _failed(phase: Phase) -> Text:
    return Text(f"{len(phase.failures):,}", style="red" if phase.failures else "green")


def served_table(rows: Iterable[tuple[str, control_pb2.ServedVersion]]) -> RenderableType:
    """One row a version in an inference process: where it stands and which engine runs it."""
    result = table("instance", "model", "state", "engine", ">fetched")
    for instance, served in sorted(rows, key=lambda row: (row[0], row[1].name)):
        ready = served.state == control_pb2.SERVED_STATE_READY
        state = t.enum_name("SERVED_STATE_", control_pb2.ServedState.Name(served.state))
        result.add_row(
            instance,
            t.model_version(served.name),
            Text(state, style="green" if ready else "yellow"),
            served.engine or "-",
            t.size(served.fetched_bytes or served.total_bytes),
        )
    return result


def attempts_table(rows: Iterable[tuple[str, str, str]]) -> RenderableType:
    """What was tried, what came of it, and what it shows."""
    result = table("call", "result", "what it shows")
    for row in rows:
        result.add_row(*row)
    return result
