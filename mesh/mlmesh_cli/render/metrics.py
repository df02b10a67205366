"""`mlmesh metrics`: a row a group of calls."""

from __future__ import annotations

from collections.abc import Mapping

import grpc
from rich.console import Group, RenderableType
from rich.text import Text

from mlmesh.local.v1 import local_pb2 as pb
from mlmesh_cli.render import text as t
from mlmesh_cli.render.status import table

_CODES = {str(code.value[0]): code.name for code in grpc.StatusCode}
_SHORT = {
    "source_workload": "from",
    "destination_service_name": "service",
    "destination_workload": "to",
    "grpc_response_status": "grpc",
    "response_code": "http",
    "destination_version": "version",
}


def metrics_view(response: pb.GetMetricsResponse) -> RenderableType:
    """Rates, shares, errors by status and latencies of each group."""
    window = t.duration(t.seconds(response.window))
    if not response.groups:
        return Text(f"no calls ended in the last {window}", style="dim")
    # A mapping has no order: labels are shown in that of their names, callers before the called.
    labels = sorted(response.groups[0].labels, key=lambda name: (not name.startswith("source"), name))
    result = table(
        *(_SHORT.get(name, name) for name in labels),
        ">requests", ">per second", ">share", ">errors", "failed with", ">p50", ">p90", ">p99", ">messages in, out",
    )  # fmt: skip
    for group in response.groups:
        messages = f"{group.request_messages:,}, {group.response_messages:,}" if group.response_messages else "-"
        result.add_row(
            *(group.labels[name] or "-" for name in labels),
            f"{group.requests:,}",
            f"{group.rate:.1f}",
            t.percent(group.share),
            Text(t.percent(group.errors / group.requests), style=_style(group.errors)) if group.requests else "-",
            _failures(group.statuses),
            t.duration(t.seconds(group.p50)) if group.requests else "-",
            t.duration(t.seconds(group.p90)) if group.requests else "-",
            t.duration(t.seconds(group.p99)) if group.requests else "-",
            messages,
        )
    return Group(result, Text(f"the last {window}", style="dim"))


def _style(errors: int) -> str:
    return "red" if errors else "green"


def _failures(statuses: Mapping[str, int]) -> str:
    failed = {status: count for status, count in statuses.items() if not _is_ok(status)}
    return ", ".join(f"{_CODES.get(status, status)} {count:,}" for status, count in sorted(failed.items())) or "-"


def _is_ok(status: str) -> bool:
    return status == "0" or (status.startswith("http ") and status[5:] < "500" and status != "http 0")
