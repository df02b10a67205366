"""`mlmesh diff`."""

from __future__ import annotations

import traceback
from pathlib import Path
from typing import Annotated

import typer

from mlmesh_cli.errors import ExitCode
from mlmesh_cli.options import DEFAULT_STATE_DIR, Files, Output, OutputFormat, StateDir
from mlmesh_cli.terminal import Terminal, run

DIFFERENT, TROUBLE = 1, 2


def diff(
    *,
    file: Files = None,
    against: Annotated[
        list[Path] | None,
        typer.Option(
            "--against", help="Compare with these files, without a mesh; may be repeated.", show_default=False
        ),
    ] = None,
    prune: Annotated[
        bool, typer.Option("--prune", help="As if active resources that are not in these files were removed.")
    ] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Also the JSON of what Envoys are told.")] = False,
    state_dir: StateDir = DEFAULT_STATE_DIR,
    output: Output = OutputFormat.TABLE,
) -> None:
    """Show what applying files would change: resources, what each proxy is told, and what becomes of open streams.

    It exits with 0 when nothing differs, 1 when something does, and more than 1 when it cannot tell.

    [bold]Examples[/bold]

      mlmesh diff -f mesh/istio/virtualservice.yaml

      mlmesh diff -f new/mesh --prune --verbose

      mlmesh diff -f manifests/overlays/prod --against manifests/overlays/cpu -o json
    """
    terminal = Terminal(output)
    found: list[bool] = []

    async def main() -> None:
        from mlmesh_cli.errors import usage_error  # noqa: PLC0415  keeps `mlmesh --help` quick
        from mlmesh_cli.render.diffing import difference_view  # noqa: PLC0415
        from mlmesh_cli.worlds import files_world, look, read_files  # noqa: PLC0415
        from mlmesh_local.differing import compare, document  # noqa: PLC0415
        from mlmesh_local.offline import following_world, only_for_processes  # noqa: PLC0415
        from mlmesh_local.resources import ResourceSet, load_resources  # noqa: PLC0415

        if not file:
            raise usage_error("nothing to compare", "name a YAML file or a folder: mlmesh diff -f mesh/istio")
        documents, notes = read_files(file)
        before = files_world(against) if against else await look(state_dir, None)
        # Against files, both sides are whole: what is in one only was created or deleted.
        # A running mesh would refuse what it cannot run, and so is it told here.
        incoming = load_resources(documents, overlook=only_for_processes) if against else load_resources(documents)
        applied = (ResourceSet() if against else before.world.resources).apply(incoming, prune=prune)
        for note in (*notes, *before.notes, *applied.warnings):
            terminal.warn(note)
        difference = compare(before.world, following_world(before.world, applied.resources))
        found.append(not difference.empty)
        value = {**document(difference), "warnings": [*notes, *applied.warnings]}
        terminal.show(lambda: difference_view(difference, verbose=verbose), value)

    try:
        run(terminal, main)
    except typer.Exit as ended:
        # 1 says that something differs, as diff(1) does.
        raise typer.Exit(TROUBLE if ended.exit_code == ExitCode.FAILED else ended.exit_code) from None
    except Exception:
        # Python would exit with 1, which is no defect here.
        traceback.print_exc()
        raise typer.Exit(TROUBLE) from None
    if any(found):
        raise typer.Exit(DIFFERENT)
