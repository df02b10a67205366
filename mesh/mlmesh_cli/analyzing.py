"""What `mlmesh analyze` and `mlmesh conditions` look at and print."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import RenderableType
from rich.text import Text

from mlmesh_cli.connection import Connection
from mlmesh_cli.errors import CliError, ExitCode
from mlmesh_cli.render.status import table
from mlmesh_cli.terminal import Terminal
from mlmesh_cli.worlds import files_world, live_world, read_files
from mlmesh_local.resources import ResourceSet
from mlmesh_local.resources.analysis import LEVELS, Message
from mlmesh_local.resources.analysis import analyze as analyze_resources
from mlmesh_local.resources.analysis.reading import read_for_analysis
from mlmesh_local.resources.gateway_api.status import proxy_addresses, resource_statuses

_STYLES = {"Error": "bold red", "Warning": "bold yellow", "Info": "bold cyan"}


async def look(
    state_dir: Path, paths: Sequence[Path] | None, *, live: bool, suppress: Sequence[str]
) -> tuple[Message, ...]:
    """Findings about files, about the running mesh, or about both together. Raises CliError where none runs."""
    resources = ResourceSet()
    refused: tuple[Message, ...] = ()
    if paths is None or live:
        async with Connection.from_environment(state_dir) as connection:
            resources = (await live_world(await connection.control())).world.resources
    if paths is not None:
        documents, _ = read_files(paths)
        resources, refused = read_for_analysis(documents, resources)
    return (*refused, *analyze_resources(resources, suppress=suppress))


def report(terminal: Terminal, found: Sequence[Message], *, show: str, fail: str) -> None:
    """Print findings. Raises CliError (exit code 79) when one is severe enough."""
    shown = [message for message in found if _rank(message) >= LEVELS.index(show)]
    if terminal.json:
        terminal.show("", [_json(message) for message in shown])
    for line in [] if terminal.json else _lines(shown):
        terminal.out.print(line, soft_wrap=True)
    bad = [message for message in found if _rank(message) >= LEVELS.index(fail)]
    if bad:
        count = f"{len(bad)} finding" + ("s" if len(bad) > 1 else "")
        raise CliError(
            f"the analysis has {count} of severity {fail} or worse",
            "https://istio.io/latest/docs/reference/config/analysis/ explains the codes",
            reason="FINDINGS",
            exit_code=ExitCode.FINDINGS,
        )


def _rank(message: Message) -> int:
    return LEVELS.index(message.level)


def _lines(messages: Sequence[Message]) -> list[Text]:
    if not messages:
        return [Text("nothing found")]
    return [
        Text(message.level, style=_STYLES[message.level])
        + Text(str(message).removeprefix(message.level), style="default")
        for message in messages
    ]


def _json(message: Message) -> dict[str, Any]:
    return {
        "code": message.code,
        "name": message.name,
        "level": message.level,
        "origin": message.origin,
        "reference": f"{message.at.source}:{message.at.line}",
        "path": message.at.path,
        "message": message.text,
        "documentationUrl": f"https://istio.io/latest/docs/reference/config/analysis/{message.code.lower()}/",
    }


async def statuses(state_dir: Path, paths: Sequence[Path] | None) -> list[dict[str, Any]]:
    """Kind, name and status of every resource of the Gateway API."""
    if paths is None:
        async with Connection.from_environment(state_dir) as connection:
            world = (await live_world(await connection.control())).world
    else:
        world = files_world(paths).world
    found = resource_statuses(world.resources, proxy_addresses(world.endpoints))
    return [
        {"kind": kind.removeprefix("Kubernetes"), "namespace": namespace, "name": name, "status": status}
        for (kind, namespace, name), status in sorted(found.items())
    ]


def conditions_table(found: Sequence[dict[str, Any]]) -> RenderableType:
    """A row a condition; of a route, those of each parent; of a Gateway, also those of each listener."""
    result = table("resource", "of", "condition", "status", "reason", "message")
    for one in found:
        name = f"{one['kind']} {one['namespace']}/{one['name']}"
        status = one["status"]
        for condition in status.get("conditions", []):
            result.add_row(name, "", *_cells(condition))
        for listener in status.get("listeners", []):
            routes = f"listener {listener['name']} ({listener['attachedRoutes']} routes)"
            for condition in listener["conditions"]:
                result.add_row(name, routes, *_cells(condition))
        for parent in status.get("parents", []):
            ref = parent["parentRef"]
            of = f"{ref['kind']} {ref['name']}" + (f" {ref['sectionName']}" if "sectionName" in ref else "")
            for condition in parent["conditions"]:
                result.add_row(name, of, *_cells(condition))
    return result


def _cells(condition: dict[str, str]) -> tuple[str, str, str, str]:
    return condition["type"], condition["status"], condition["reason"], condition["message"]
