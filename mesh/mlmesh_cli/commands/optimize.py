"""`mlmesh optimize`."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated

import typer

from mlmesh_cli.options import DEFAULT_STATE_DIR, Output, OutputFormat, StateDir
from mlmesh_cli.terminal import Terminal, run

_HOW = "How (one of them)"


def optimize(
    source: Annotated[str, typer.Argument(metavar="VERSION", help="What to start from, such as mnist@stable.")],
    *,
    int8: Annotated[
        bool, typer.Option("--int8", help="8-bit weights and activations, calibrated.", rich_help_panel=_HOW)
    ] = False,
    fp16: Annotated[
        bool, typer.Option("--fp16", help="Half precision inside, floats at the edges.", rich_help_panel=_HOW)
    ] = False,
    prune: Annotated[
        float | None,
        typer.Option(help="Share of weights to remove.", metavar="SHARE", min=0.01, max=0.99, rich_help_panel=_HOW),
    ] = None,
    two_four: Annotated[
        bool, typer.Option("--two-four", help="Remove two of every four weights.", rich_help_panel=_HOW)
    ] = False,
    distill: Annotated[
        str | None,
        typer.Option(help="Teach a student of this recipe; --set sizes it.", metavar="RECIPE", rich_help_panel=_HOW),
    ] = None,
    max_drop: Annotated[
        float, typer.Option(help="Largest loss of accuracy, or growth of the error, allowed.", min=0, max=1)
    ] = 0.01,
    calibration: Annotated[
        int | None, typer.Option(help="Examples that --int8 is calibrated on.", min=1, max=100_000)
    ] = None,
    epochs: Annotated[int | None, typer.Option(help="Epochs of fine-tuning after pruning.", min=1, max=500)] = None,
    setting: Annotated[
        list[str] | None, typer.Option("--set", help="Hyperparameter of the student.", metavar="NAME=NUMBER")
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Model to publish to; default: that of the source.")
    ] = None,
    alias: Annotated[list[str] | None, typer.Option("--alias", "-a", help="Alias to move to the new version.")] = None,
    detach: Annotated[bool, typer.Option("--detach", help="Submit and do not watch.")] = False,
    logs: Annotated[bool, typer.Option("--logs", help="Also show what the job writes.")] = False,
    state_dir: StateDir = DEFAULT_STATE_DIR,
    output: Output = OutputFormat.TABLE,
) -> None:
    """Make a version smaller or faster, and compare it with what it was. One that lost too much is not published.

    [bold]Examples[/bold]

      mlmesh optimize mnist@stable --int8 --alias canary

      mlmesh optimize mnist/3 --prune 0.6 --max-drop 0.005

      mlmesh optimize mnist@stable --distill mlp --set width=32 --max-drop 0.02
    """
    terminal = Terminal(output)

    async def main() -> None:
        from mlmesh_cli.commands.train import watch_to_end  # noqa: PLC0415  keeps `mlmesh --help` quick
        from mlmesh_cli.connection import Connection  # noqa: PLC0415
        from mlmesh_cli.jobs import hyperparameters, submit  # noqa: PLC0415
        from mlmesh_cli.optimizing import Technique, spec_of  # noqa: PLC0415
        from mlmesh_cli.render.training import jobs_table  # noqa: PLC0415
        from mlmesh_cli.resolving import version_of  # noqa: PLC0415

        technique = Technique.from_options(
            int8=int8,
            fp16=fp16,
            prune=prune,
            two_four=two_four,
            distill=distill,
            calibration=calibration,
            epochs=epochs,
            settings=hyperparameters(setting or []),
        )
        async with Connection.from_environment(state_dir) as connection:
            version = await version_of(await connection.registry(), source)
            spec = spec_of(version, technique, max_drop=max_drop, model=model, aliases=alias or [])
            stub = await connection.training()
            created = await submit(stub, spec)
            if detach:
                terminal.show(jobs_table([created], datetime.now(UTC)), created)
                return
            await watch_to_end(stub, created.name, terminal, logs=logs)

    run(terminal, main)
