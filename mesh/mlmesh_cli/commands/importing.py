"""`mlmesh models import`."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated

import typer

from mlmesh_cli.commands.models import models_app
from mlmesh_cli.options import DEFAULT_STATE_DIR, Output, OutputFormat, StateDir
from mlmesh_cli.terminal import Terminal, run


@models_app.command("import")
def import_version(
    *,
    source: Annotated[str, typer.Argument(metavar="NAME/VERSION|NAME@ALIAS", help="The version, as MLflow names it.")],
    server: Annotated[
        str, typer.Option("--mlflow", envvar="MLFLOW_TRACKING_URI", help="Address of the MLflow server.")
    ] = "http://127.0.0.1:5000",
    model: Annotated[str, typer.Option("--as", metavar="MODEL", help="Name of the model here; else MLflow's.")] = "",
    token_variable: Annotated[
        str, typer.Option(metavar="NAME", help="Environment variable that holds the server's bearer token.")
    ] = "MLFLOW_TRACKING_TOKEN",  # noqa: S107  the name of a variable
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only tell what would be made.")] = False,
    state_dir: StateDir = DEFAULT_STATE_DIR,
    output: Output = OutputFormat.TABLE,
) -> None:
    """Take a version over from an MLflow server: its ONNX or safetensors files, tags, aliases, metrics and description.

    Pickles are not taken. Importing the same version again gives the same version. A user name and password are those
    of MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD.

    [bold]Examples[/bold]

      mlmesh models import mnist/3 --mlflow http://127.0.0.1:5000 --dry-run

      mlmesh models import mnist@champion --as mnist
    """
    terminal = Terminal(output)

    async def main() -> None:
        import asyncio  # noqa: PLC0415  keeps `mlmesh --help` quick

        from mlmesh_cli.connection import Connection, environment  # noqa: PLC0415
        from mlmesh_cli.importing import Source, prepare, run_import  # noqa: PLC0415
        from mlmesh_cli.mlflow import MlflowServer  # noqa: PLC0415
        from mlmesh_cli.names import parse_model  # noqa: PLC0415
        from mlmesh_cli.render.imports import import_value, import_view, imported_view  # noqa: PLC0415

        environ = environment()
        mlflow = MlflowServer(
            server,
            token=environ.get(token_variable, ""),
            user=environ.get("MLFLOW_TRACKING_USERNAME", ""),
            password=environ.get("MLFLOW_TRACKING_PASSWORD", ""),
        )
        target = parse_model(model).model if model else ""
        wanted = await asyncio.to_thread(prepare, mlflow, Source.parse(source), target)
        if dry_run:
            terminal.show(lambda: import_view(wanted), import_value(wanted))
            return
        async with Connection.from_environment(state_dir) as connection:
            stub = await connection.registry()
            made, notes, known = await run_import(stub, mlflow, wanted, terminal)
        for note in (*wanted.left_out, *notes):
            terminal.warn(note)
        terminal.show(lambda: imported_view(made, datetime.now(UTC), known=known), made)

    run(terminal, main)
