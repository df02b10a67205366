"""`mlmesh datasets`."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer

from mlmesh_cli.options import DEFAULT_STATE_DIR, Output, OutputFormat, StateDir
from mlmesh_cli.terminal import Terminal, run

datasets_app = typer.Typer(help="Look at data sets and register new ones.", no_args_is_help=True)


@datasets_app.command("list")
def list_datasets(state_dir: StateDir = DEFAULT_STATE_DIR, output: Output = OutputFormat.TABLE) -> None:
    """List what can be trained on: data sets that installed packages ship, and registered ones.

    [bold]Examples[/bold]

      mlmesh datasets list
    """
    terminal = Terminal(output)

    async def main() -> None:
        from mlmesh_cli.connection import Connection  # noqa: PLC0415  keeps `mlmesh --help` quick
        from mlmesh_cli.datasets import listed  # noqa: PLC0415
        from mlmesh_cli.render.datasets import datasets_view  # noqa: PLC0415
        from mlmesh_cli.terminal import message_dict  # noqa: PLC0415

        async with Connection.from_environment(state_dir) as connection:
            named, models, aliases = await listed(await connection.registry(), await connection.training())
        value = {
            "named": [message_dict(dataset) for dataset in named],
            "registered": [message_dict(model) for model in models],
        }
        terminal.show(datasets_view(named, models, aliases, datetime.now(UTC)), value)

    run(terminal, main)


@datasets_app.command()
def register(
    file: Annotated[Path, typer.Argument(metavar="PATH", help="The file.", exists=True, dir_okay=False)],
    *,
    name: Annotated[str, typer.Option("--name", "-n", help="Name of the data set, such as animals.")],
    kind: Annotated[str, typer.Option("--kind", "-k", help="image, text or tabular.", metavar="KIND")],
    target: Annotated[str, typer.Option(help="Column that is to be told from the others; tabular only.")] = "",
    classes: Annotated[
        str, typer.Option(help="Names of the classes in order, with commas; image only. Default: their numbers.")
    ] = "",
    alias: Annotated[list[str] | None, typer.Option("--alias", "-a", help="Alias to move to it.")] = None,
    label: Annotated[list[str] | None, typer.Option(help="Label NAME=VALUE; may be repeated.")] = None,
    description: Annotated[str, typer.Option(help="What it is and where it comes from.")] = "",
    state_dir: StateDir = DEFAULT_STATE_DIR,
    output: Output = OutputFormat.TABLE,
) -> None:
    """Register a file as a version of a data set: resumable, deduplicated, fingerprinted.

    image: .safetensors with "image" (UINT8 or FP32, [examples, height, width] or [examples, channels, height, width])
    and "target" (INT64, [examples]). text: .jsonl with "text" and "label" in each line, or .csv with these columns.
    tabular: .csv with a header.

    [bold]Examples[/bold]

      mlmesh datasets register houses.csv --name houses --kind tabular --target price

      mlmesh datasets register reviews.jsonl --name reviews --kind text --alias latest

      mlmesh train --recipe regression --dataset houses/1
    """
    terminal = Terminal(output)

    async def main() -> None:
        from mlmesh_cli.connection import Connection  # noqa: PLC0415  keeps `mlmesh --help` quick
        from mlmesh_cli.datasets import Kind, Registration  # noqa: PLC0415
        from mlmesh_cli.datasets import register as registered  # noqa: PLC0415
        from mlmesh_cli.errors import usage_error  # noqa: PLC0415
        from mlmesh_cli.render.models import version_view  # noqa: PLC0415

        if kind not in set(Kind):
            raise usage_error(f"--kind {kind!r}", f"it is one of {', '.join(Kind)}")
        wanted = Registration.from_options(
            file,
            name=name,
            kind=Kind(kind),
            target=target,
            classes=classes,
            aliases=alias or [],
            labels=label or [],
            description=description,
        )
        async with Connection.from_environment(state_dir) as connection:
            version, same = await registered(await connection.registry(), wanted, terminal)
        if same:
            terminal.say("its bytes are those of the version before")
        terminal.show(version_view(version, datetime.now(UTC)), version)

    run(terminal, main)
