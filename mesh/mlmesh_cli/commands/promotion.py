"""`mlmesh models history | promote | gates`: moving aliases through gates, and looking back."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mlmesh_cli.commands.models import Limit, ModelName, Reference, models_app, pages
from mlmesh_cli.options import DEFAULT_STATE_DIR, Output, OutputFormat, StateDir
from mlmesh_cli.terminal import Terminal, run

if TYPE_CHECKING:
    from mlmesh.registry.v1 import registry_pb2 as pb

gates_app = typer.Typer(help="Conditions that a version must meet before an alias moves to it.", no_args_is_help=True)
models_app.add_typer(gates_app, name="gates")


@models_app.command()
def history(
    model: Reference, limit: Limit = 50, state_dir: StateDir = DEFAULT_STATE_DIR, output: Output = OutputFormat.TABLE
) -> None:
    """Show where aliases pointed, newest first: every move and removal, by whom and why.

    [bold]Examples[/bold]

      mlmesh models history mnist@stable

      mlmesh models history mnist --limit 10
    """
    terminal = Terminal(output)

    async def main() -> None:
        from mlmesh.registry.v1 import registry_pb2 as pb  # noqa: PLC0415  keeps `mlmesh --help` quick
        from mlmesh_cli.connection import Connection  # noqa: PLC0415
        from mlmesh_cli.names import parse_model  # noqa: PLC0415
        from mlmesh_cli.render.registry import moves_table  # noqa: PLC0415

        reference = parse_model(model)
        parent = f"{reference.parent}/aliases/{reference.alias}" if reference.alias else reference.parent
        async with Connection.from_environment(state_dir) as connection:
            stub = await connection.registry()
            found = pb.ListModelAliasMovesResponse()
            async for move in pages(
                lambda token, size: stub.ListModelAliasMoves(
                    pb.ListModelAliasMovesRequest(parent=parent, page_size=size, page_token=token)
                ),
                "moves",
                limit,
            ):
                found.moves.append(move)
        terminal.show(moves_table(found.moves, datetime.now(UTC)), found)

    run(terminal, main)


@models_app.command()
def promote(
    *,
    model: ModelName,
    alias: Annotated[str, typer.Argument(help="Name of the alias, such as stable.")],
    version: Annotated[int, typer.Argument(help="Number of the version.", min=1)],
    reason: Annotated[str, typer.Option(help="Why, for the history.")] = "",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only ask the gates; move nothing.")] = False,
    state_dir: StateDir = DEFAULT_STATE_DIR,
    output: Output = OutputFormat.TABLE,
) -> None:
    """Move an alias to a version when every gate of the model lets it pass, and show what each gate found.

    It exits with 1 when a gate refuses, also with --dry-run.

    [bold]Examples[/bold]

      mlmesh models promote mnist stable 3 --reason "better on digits"

      mlmesh models promote mnist stable 3 --dry-run
    """
    terminal = Terminal(output)

    async def main() -> None:
        from mlmesh_cli.connection import Connection  # noqa: PLC0415  keeps `mlmesh --help` quick
        from mlmesh_cli.names import parse_model  # noqa: PLC0415
        from mlmesh_cli.promoting import Promotion, promoted  # noqa: PLC0415

        wanted = Promotion(parent=parse_model(model).parent, alias=alias, version=version, reason=reason)
        async with Connection.from_environment(state_dir) as connection:
            await promoted(await connection.registry(), wanted, terminal, dry_run=dry_run)

    run(terminal, main)


@gates_app.command("show")
def show_gates(model: ModelName, state_dir: StateDir = DEFAULT_STATE_DIR, output: Output = OutputFormat.TABLE) -> None:
    """Show the gates of a model. With -o json: a file that `gates set` takes.

    [bold]Examples[/bold]

      mlmesh models gates show mnist

      mlmesh models gates show mnist -o json
    """
    terminal = Terminal(output)

    async def main() -> None:
        from mlmesh_cli.connection import Connection  # noqa: PLC0415  keeps `mlmesh --help` quick
        from mlmesh_cli.names import parse_model  # noqa: PLC0415
        from mlmesh_cli.promoting import gates_value  # noqa: PLC0415
        from mlmesh_cli.render.registry import gates_table  # noqa: PLC0415

        async with Connection.from_environment(state_dir) as connection:
            found = await _model(await connection.registry(), parse_model(model).parent)
        terminal.show(gates_table(found.gates), gates_value(found))

    run(terminal, main)


@gates_app.command("set")
def set_gates(
    model: ModelName,
    file: Annotated[Path, typer.Argument(help="YAML or JSON: a list of gates.", exists=True, dir_okay=False)],
    state_dir: StateDir = DEFAULT_STATE_DIR,
    output: Output = OutputFormat.TABLE,
) -> None:
    """Replace the gates of a model with those of a file. An empty list removes them.

    The fields are those of Gate in the registry's contract, such as
    `- {id: accurate, aliases: [stable], metric_bounds: {metric: accuracy, min_value: 0.9}}`.

    [bold]Examples[/bold]

      mlmesh models gates set mnist gates.yaml
    """
    terminal = Terminal(output)

    async def main() -> None:
        from mlmesh.registry.v1 import registry_pb2 as pb  # noqa: PLC0415  keeps `mlmesh --help` quick
        from mlmesh_cli.connection import Connection  # noqa: PLC0415
        from mlmesh_cli.names import parse_model  # noqa: PLC0415
        from mlmesh_cli.promoting import gates_value, read_gates  # noqa: PLC0415
        from mlmesh_cli.render.registry import gates_table  # noqa: PLC0415

        gates = read_gates(file)
        async with Connection.from_environment(state_dir) as connection:
            stub = await connection.registry()
            before = await _model(stub, parse_model(model).parent)
            request = pb.UpdateModelRequest(name=before.name, etag=before.etag, gates=gates)
            after = (await stub.UpdateModel(request)).model
        terminal.show(gates_table(after.gates), gates_value(after))

    run(terminal, main)


async def _model(stub: Any, name: str) -> pb.Model:
    from mlmesh.registry.v1 import registry_pb2 as pb  # noqa: PLC0415

    found: pb.Model = (await stub.GetModel(pb.GetModelRequest(name=name))).model
    return found
