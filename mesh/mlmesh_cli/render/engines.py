"""`mlmesh engines`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from rich.console import Console, Group, RenderableType
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.text import Text

from mlmesh_cli.render import text as t
from mlmesh_cli.render.status import table
from mlmesh_cli.terminal import message_dict

if TYPE_CHECKING:
    from mlmesh.inference.v1 import control_pb2 as pb
    from mlmesh_cli.engines import Build

_STYLES = {"done": "green", "failed": "red", "cancelled": "yellow", "cancelling": "yellow"}


def engines_view(
    engines: Mapping[str, Sequence[pb.Engine]], versions: Mapping[str, Sequence[pb.ServedVersion]]
) -> RenderableType:
    """Engines of each process, and what each version is served by."""
    kinds = table("instance", "engine", "runs", "version", "why")
    for process, listed in engines.items():
        for engine in listed:
            runs = Text("yes", style="green") if engine.available else Text("no", style="dim")
            kinds.add_row(process, engine.name, runs, engine.version or "-", engine.reason)
    served = table("instance", "version", "engine", "precision", "build", "why")
    for process, known in versions.items():
        for version in known:
            served.add_row(
                process,
                t.model_version(version.name),
                version.engine or "-",
                version.precision or "-",
                t.last(version.build_operation) if version.build_operation else "-",
                version.engine_reason or version.error,
            )
    return Group(kinds, served)


def engines_dict(
    engines: Mapping[str, Sequence[pb.Engine]], versions: Mapping[str, Sequence[pb.ServedVersion]]
) -> dict[str, Any]:
    """The same for JSON output."""
    return {
        "processes": [
            {
                "name": process,
                "engines": [message_dict(engine) for engine in listed],
                "served_versions": [message_dict(version) for version in versions.get(process, ())],
            }
            for process, listed in engines.items()
        ]
    }


def builds_table(builds: Sequence[Build], now: datetime) -> RenderableType:
    """One row a build, newest first."""
    result = table("instance", "operation", "version", "engine", "state", "began", "result")
    for build in builds:
        metadata = build.metadata
        result.add_row(
            build.process,
            t.last(build.operation.name),
            t.model_version(metadata.name),
            metadata.engine,
            Text(build.state, style=_STYLES.get(build.state, "")),
            t.ago(metadata.create_time, now),
            outcome(build),
        )
    return result


def builds_dict(builds: Sequence[Build]) -> dict[str, Any]:
    """The same for JSON output."""
    return {"builds": [build_dict(build) for build in builds]}


def build_dict(build: Build) -> dict[str, Any]:
    """One build for JSON output, its parts unpacked."""
    result = build.result
    return {
        "process": build.process,
        "name": build.operation.name,
        "done": build.operation.done,
        "state": build.state,
        "metadata": message_dict(build.metadata),
        "response": None if result is None else message_dict(result),
        "error": build.operation.error.message,
    }


def outcome(build: Build) -> str:
    """What came of a build, or how far it is."""
    result = build.result
    if result is not None:
        took = f" in {t.duration(t.seconds(result.build_duration))}" if result.HasField("build_duration") else ""
        what = f"{t.size(result.size_bytes)}, {'+'.join(result.precisions)}, {result.source}{took}"
        return f"{what}; serves: {result.reason}" if result.serving else f"{what}; not serving: {result.reason}"
    if build.operation.HasField("error"):
        return str(build.operation.error.message)
    metadata = build.metadata
    steps = f" {metadata.steps_done}/{metadata.steps_total}" if metadata.steps_total else ""
    return f"{metadata.phase}{steps}"


class BuildProgress:
    """A bar for each build, fed with what is known of it.

    Args:
        console: where they are drawn.
    """

    def __init__(self, console: Console) -> None:
        self._tasks: dict[tuple[str, str], TaskID] = {}
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=28),
            TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(),
            console=console,
        )

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def update(self, build: Build) -> None:
        """Draw one build as it is."""
        key = (build.process, build.operation.name)
        metadata = build.metadata
        if key not in self._tasks:
            title = f"{t.model_version(metadata.name)} on {build.process}"
            self._tasks[key] = self._progress.add_task(title, total=None, note="")
        note = build.state if build.operation.done else metadata.phase
        total = 1 if build.operation.done else metadata.steps_total or None
        done = 1 if build.operation.done else metadata.steps_done
        self._progress.update(self._tasks[key], note=note, total=total, completed=done)
