"""`mlmesh demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Option

from mlmesh_cli.commands.lifecycle import ControlPlane, ControlPlaneChoice, IstiodProgram
from mlmesh_cli.options import Output, OutputFormat
from mlmesh_cli.terminal import Terminal, run


def demo(
    *,
    fast: Annotated[bool, Option("--fast", help="The same story on 8x8 digits with fewer requests.")] = False,
    keep: Annotated[bool, Option("--keep", help="Leave the mesh running at the end.")] = False,
    state_dir: Annotated[
        Path | None, Option("--state-dir", help="State folder; default: a temporary one, removed at the end.")
    ] = None,
    gateway_address: Annotated[str, Option(help="HOST:PORT of the ingress gateway besides its own, or none.")] = "none",
    control_plane: ControlPlaneChoice = ControlPlane.MLMESH,
    istiod: IstiodProgram = "",
    output: Output = OutputFormat.TABLE,
) -> None:
    """Tell the whole story: train two models, serve both, move traffic between them, break things, look inside.

    Every claim is checked; the exit code is 0 only when all of them held. Nothing is left running.

    [bold]Examples[/bold]

      mlmesh demo

      mlmesh demo --fast -o json

      mlmesh demo --keep --state-dir .mlmesh

      mlmesh demo --fast --control-plane istiod --istiod .tools/bin/pilot-discovery
    """
    terminal = Terminal(output)

    async def main() -> None:
        from mlmesh_cli.demo.director import tell  # noqa: PLC0415  keeps `mlmesh --help` quick
        from mlmesh_cli.demo.story import FAST, FULL  # noqa: PLC0415

        scale = FAST if fast else FULL
        await tell(
            terminal,
            scale,
            state_dir=state_dir,
            keep=keep,
            gateway_address=gateway_address,
            control_plane=control_plane.value,
            istiod=istiod,
        )

    run(terminal, main)
