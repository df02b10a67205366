"""`mlmesh audit`: who changed what in the registry."""

from __future__ import annotations

from typing import Annotated

import typer

from mlmesh_cli.commands.models import Limit, pages
from mlmesh_cli.options import DEFAULT_STATE_DIR, Output, OutputFormat, StateDir
from mlmesh_cli.terminal import Terminal, run

audit_app = typer.Typer(help="Who changed what in the registry, in a log that shows tampering.", no_args_is_help=True)


@audit_app.command("list")
def list_entries(
    *,
    resource: Annotated[str, typer.Option(help="Only this resource and what is below it, such as models/mnist.")] = "",
    actor: Annotated[str, typer.Option(help="Only changes by this SPIFFE id.")] = "",
    since: Annotated[int, typer.Option("--from", help="First entry, by its number.", min=0)] = 0,
    limit: Limit = 50,
    state_dir: StateDir = DEFAULT_STATE_DIR,
    output: Output = OutputFormat.TABLE,
) -> None:
    """List changes, oldest first.

    [bold]Examples[/bold]

      mlmesh audit list --resource models/mnist

      mlmesh audit list --from 1000 --limit 0 -o json
    """
    terminal = Terminal(output)

    async def main() -> None:
        from mlmesh.registry.v1 import registry_pb2 as pb  # noqa: PLC0415  keeps `mlmesh --help` quick
        from mlmesh_cli.connection import Connection  # noqa: PLC0415
        from mlmesh_cli.render.registry import audit_table  # noqa: PLC0415

        async with Connection.from_environment(state_dir) as connection:
            stub = await connection.registry()
            found = pb.ListAuditEntriesResponse()
            async for entry in pages(
                lambda token, size: stub.ListAuditEntries(
                    pb.ListAuditEntriesRequest(
                        from_sequence=since, page_size=size, page_token=token, resource=resource, actor=actor
                    )
                ),
                "entries",
                limit,
            ):
                found.entries.append(entry)
        terminal.show(lambda: audit_table(found.entries), found)

    run(terminal, main)


@audit_app.command("verify")
def verify_entries(
    remembered: Annotated[
        str, typer.Option(metavar="NUMBER:DIGEST", help="An entry noted earlier: it must still be there, the same.")
    ] = "",
    state_dir: StateDir = DEFAULT_STATE_DIR,
    output: Output = OutputFormat.TABLE,
) -> None:
    """Recompute every digest of the log here, and the chain that they make. It exits with 1 where an entry was changed.

    What was cut off at the end does not show: note the last entry that it prints, and give it the next time.

    [bold]Examples[/bold]

      mlmesh audit verify

      mlmesh audit verify --remembered 1042:5f41e96d7bd1dd33f65a74c943bd628ec8e74787eb7e114ccc64ce681eec4479
    """
    terminal = Terminal(output)

    async def main() -> None:
        from mlmesh_cli.auditing import Noted, verified_log  # noqa: PLC0415  keeps `mlmesh --help` quick
        from mlmesh_cli.connection import Connection  # noqa: PLC0415

        noted = Noted.parse(remembered) if remembered else None
        async with Connection.from_environment(state_dir) as connection:
            await verified_log(await connection.registry(), terminal, noted)

    run(terminal, main)
