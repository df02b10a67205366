"""`mlmesh infer`: answers and what they come to."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from mlmesh_cli.inferring import Answer
from mlmesh_cli.render import text as t
from mlmesh_cli.render.status import table
from mlmesh_cli.tensors import Array

_ROWS_MAX = 20


def _preview(array: Array) -> str:
    values = array.ravel()
    shown = ", ".join(f"{v:.4g}" if array.dtype.kind == "f" else str(v) for v in values[:6])
    return f"[{shown}{', …' if values.size > 6 else ''}] {list(array.shape)}"


def answers_table(answers: Sequence[Answer]) -> Table:
    """One row an answer; at most twenty."""
    labelled = any(answer.expected >= 0 for answer in answers)
    classified = any(answer.predicted >= 0 for answer in answers)
    columns = ["input", "version"] + ([">answer", "confidence"] if classified else ["outputs"])
    result = table(*columns, *([">expected", ""] if labelled else []), ">latency")
    for answer in answers[:_ROWS_MAX]:
        if answer.error:
            cells: list[RenderableType] = [answer.name, "-", Text(answer.error, style="red")]
            cells += [""] * (len(result.columns) - 4)
            result.add_row(*cells, t.duration(answer.latency_s))
            continue
        cells = [answer.name, Text(answer.version, style="cyan")]
        if classified:
            bar = t.bar(answer.confidence, width=10, style="green") + Text(f" {t.percent(answer.confidence)}")
            cells += [Text(str(answer.predicted), style="bold"), bar]
        else:
            cells.append("; ".join(f"{name} {_preview(array)}" for name, array in answer.tensors.items()))
        if labelled:
            right = answer.predicted == answer.expected
            cells += [str(answer.expected), Text("✓", style="green") if right else Text("✗", style="red")]
        result.add_row(*cells, t.duration(answer.latency_s))
    return result


def versions_table(answers: Sequence[Answer]) -> Table:
    """What each version answered: count, share, right answers, latencies."""
    done = [answer for answer in answers if not answer.error]
    labelled = any(answer.expected >= 0 for answer in done)
    result = table("version", ">answers", ">share", *([">right"] if labelled else []), ">p50", ">p99")
    for version, count in sorted(Counter(answer.version for answer in done).items()):
        mine = [answer for answer in done if answer.version == version]
        latencies = sorted(answer.latency_s for answer in mine)
        right = [t.percent(sum(a.predicted == a.expected for a in mine) / count)] if labelled else []
        p50, p99 = (latencies[min(int(len(latencies) * q), len(latencies) - 1)] for q in (0.5, 0.99))
        result.add_row(
            Text(version, style="cyan"),
            str(count),
            t.percent(count / len(done)),
            *right,
            t.duration(p50),
            t.duration(p99),
        )
    return result


def answers_view(answers: Sequence[Answer]) -> RenderableType:
    """Answers, and where there are several, what they come to."""
    parts: list[RenderableType] = [answers_table(answers)]
    if len(answers) > _ROWS_MAX:
        parts.append(Text(f"… and {len(answers) - _ROWS_MAX:,} more", style="dim"))
    if len(answers) > 1 and any(not answer.error for answer in answers):
        parts.append(versions_table(answers))
    failed = sum(1 for answer in answers if answer.error)
    if failed:
        parts.append(Text(f"{failed} of {len(answers)} failed", style="red"))
    traced = next((answer.trace_id for answer in answers if answer.trace_id), "")
    if traced:
        parts.append(Text(f"trace: mlmesh traces show {traced}", style="dim"))
    return Group(*parts)
