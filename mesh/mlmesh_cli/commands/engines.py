"""`mlmesh engines`."""

from __future__ import annotations

from contextlib import nullcontext
from datetime import UTC, datetime
from typing import Annotated

import typer

from mlmesh_cli.commands.streams import Addresses
from mlmesh_cli.options import DEFAULT_STATE_DIR, Output, OutputFormat, StateDir
from mlmesh_cli.terminal import Terminal, run

engines_app = typer.Typer(
    name="engines",
    help="What runs models: which engines there are, and compiling them for a GPU.",
    no_args_is_help=True,
)


@engines_app.command("list")
def list_engines(
    address: Addresses = None, state_dir: StateDir = DEFAULT_STATE_DIR, output: Output = OutputFormat.TABLE
) -> None:
    """Show the engines of each inference process, which of them can run there, and what serves each version.

    [bold]Examples[/bold]

      mlmesh engines list

      mlmesh engines list -o json
    """
    terminal = Terminal(output)

    async def main() -> None:
        from mlmesh_cli.connection import Connection  # noqa: PLC0415  keeps `mlmesh --help` quick
        from mlmesh_cli.engines import Processes  # noqa: PLC0415
        from mlmesh_cli.render.engines import engines_dict, engines_view  # noqa: PLC0415

        async with (
            Connection.from_environment(state_dir) as connection,
            Processes(connection, address or ()) as processes,
        ):
            engines = {process.name: await process.engines() for process in processes.all}
            versions = {process.name: await process.versions() for process in processes.all}
        terminal.show(engines_view(engines, versions), engines_dict(engines, versions))

    run(terminal, main)


@engines_app.command()
def build(
    *,
    model: Annotated[
        str,
        typer.Argument(metavar="MODEL[@ALIAS|/VERSION]", help="A version that is served; default: its default one."),
    ],
    engine: Annotated[str, typer.Option("--engine", "-e", help="Engine to build for.")] = "tensorrt",
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Follow the builds to their ends.")] = True,
    build_only: Annotated[bool, typer.Option("--build-only", help="Keep the engine, do not switch to it.")] = False,
    address: Addresses = None,
    state_dir: StateDir = DEFAULT_STATE_DIR,
    output: Output = OutputFormat.TABLE,
) -> None:
    """Compile a version for an engine, on every process that serves it, and switch once it answers as the present one.

    What serves goes on meanwhile. Ctrl-C ends the watching, not the builds.

    [bold]Examples[/bold]

      mlmesh engines build mnist@stable

      mlmesh engines build mnist/3 --build-only --no-wait

      mlmesh engines build mnist --address inference-pods.mlmesh.svc.cluster.local:9000 -o json | jq .builds
    """
    terminal = Terminal(output)

    async def main() -> None:
        from mlmesh_cli.connection import Connection  # noqa: PLC0415  keeps `mlmesh --help` quick
        from mlmesh_cli.engines import HINT, Processes  # noqa: PLC0415
        from mlmesh_cli.errors import CliError  # noqa: PLC0415
        from mlmesh_cli.names import ModelReference, parse_model  # noqa: PLC0415
        from mlmesh_cli.render.engines import BuildProgress, builds_dict, builds_table  # noqa: PLC0415
        from mlmesh_cli.resolving import version_of  # noqa: PLC0415

        reference = parse_model(model)
        async with (
            Connection.from_environment(state_dir) as connection,
            Processes(connection, address or ()) as processes,
        ):
            if reference.alias:
                found = await version_of(await connection.registry(), reference)
                reference = ModelReference(model=reference.model, version=found.name.rpartition("/")[2])
            wanted = await processes.serving(reference)
            progress = BuildProgress(terminal.err) if wait and not terminal.json else None
            with progress or nullcontext():
                builds = await processes.built(
                    wanted,
                    engine,
                    build_only=build_only,
                    wait=wait,
                    told=progress.update if progress else lambda _build: None,
                )
        terminal.show(builds_table(builds, datetime.now(UTC)), builds_dict(builds))
        failed = [each for each in builds if each.operation.HasField("error")]
        if failed:
            raise CliError(
                f"{len(failed)} of {len(builds)} builds have no engine: {failed[0].operation.error.message}",
                HINT,
                reason="BUILD_FAILED",
            )

    run(terminal, main)


@engines_app.command()
def operations(
    *,
    under_way: Annotated[bool, typer.Option("--under-way", help="Only builds that have not ended.")] = False,
    address: Addresses = None,
    state_dir: StateDir = DEFAULT_STATE_DIR,
    output: Output = OutputFormat.TABLE,
) -> None:
    """Show builds: those under way, and how others ended.

    [bold]Examples[/bold]

      mlmesh engines operations

      mlmesh engines operations --under-way -o json | jq '.builds[].metadata.phase'
    """
    terminal = Terminal(output)

    async def main() -> None:
        from mlmesh_cli.connection import Connection  # noqa: PLC0415  keeps `mlmesh --help` quick
        from mlmesh_cli.engines import Processes  # noqa: PLC0415
        from mlmesh_cli.render.engines import builds_dict, builds_table  # noqa: PLC0415

        async with (
            Connection.from_environment(state_dir) as connection,
            Processes(connection, address or ()) as processes,
        ):
            wanted = "done = false" if under_way else ""
            builds = [each for process in processes.all for each in await process.operations(wanted)]
        terminal.show(builds_table(builds, datetime.now(UTC)), builds_dict(builds))

    run(terminal, main)


@engines_app.command()
def cancel(
    operation: Annotated[
        list[str], typer.Argument(metavar="OPERATION...", help="Names, as `mlmesh engines operations` shows them.")
    ],
    address: Addresses = None,
    state_dir: StateDir = DEFAULT_STATE_DIR,
    output: Output = OutputFormat.TABLE,
) -> None:
    """Ask builds to stop. What serves is not touched.

    [bold]Examples[/bold]

      mlmesh engines cancel 4f1c09a2b7d35e88
    """
    terminal = Terminal(output)

    async def main() -> None:
        from mlmesh_cli.connection import Connection  # noqa: PLC0415  keeps `mlmesh --help` quick
        from mlmesh_cli.engines import Processes, operation_name  # noqa: PLC0415

        async with (
            Connection.from_environment(state_dir) as connection,
            Processes(connection, address or ()) as processes,
        ):
            for each in operation:
                name = operation_name(each)
                await processes.cancel(name)
                terminal.show(f"{name} was asked to stop", {"cancelled": name})

    run(terminal, main)
