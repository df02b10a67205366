"""`mlmesh models stage | delete | undelete | verify | sign | lineage | gc`: what becomes of versions."""

from __future__ import annotations

from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from mlmesh_cli.commands.models import Reference, models_app
from mlmesh_cli.options import DEFAULT_STATE_DIR, Output, OutputFormat, StateDir
from mlmesh_cli.terminal import Terminal, run

VersionReference = Annotated[
    str, typer.Argument(metavar="MODEL/VERSION", help="Such as mnist/3; MODEL@ALIAS is the version that it points at.")
]
PublicKeys = Annotated[
    list[Path] | None,
    typer.Option(
        "--public-key", help="PEM file of a key that must have signed it; may be repeated.", exists=True, dir_okay=False
    ),
]


class StageName(StrEnum):
    """Stages as people type them."""

    ACTIVE = "active"
    DEPRECATED = "deprecated"
    QUARANTINED = "quarantined"


@models_app.command()
def stage(
    version: VersionReference,
    to: Annotated[StageName, typer.Argument(metavar="STAGE", help="active, deprecated or quarantined.")],
    reason: Annotated[str, typer.Option(help="Why, for people.")] = "",
    state_dir: StateDir = DEFAULT_STATE_DIR,
    output: Output = OutputFormat.TABLE,
) -> None:
    """Say what a version may be used for. No alias moves to a quarantined one, and servers stop serving it.

    [bold]Examples[/bold]

      mlmesh models stage mnist/3 quarantined --reason "trained on leaked labels"

      mlmesh models stage mnist/3 active
    """
    terminal = Terminal(output)

    async def main() -> None:
        from mlmesh.registry.v1 import registry_pb2 as pb  # noqa: PLC0415  keeps `mlmesh --help` quick
        from mlmesh_cli.connection import Connection  # noqa: PLC0415
        from mlmesh_cli.render.models import version_view  # noqa: PLC0415
        from mlmesh_cli.resolving import version_of  # noqa: PLC0415

        async with Connection.from_environment(state_dir) as connection:
            stub = await connection.registry()
            found = await version_of(stub, version)
            request = pb.SetModelVersionStageRequest(
                name=found.name,
                stage=pb.VersionStage.Value(f"VERSION_STAGE_{to.name}"),
                reason=reason,
                etag=found.etag,
            )
            after = (await stub.SetModelVersionStage(request)).model_version
        terminal.show(lambda: version_view(after, datetime.now(UTC)), after)

    run(terminal, main)


@models_app.command()
def delete(
    model: Reference,
    force: Annotated[bool, typer.Option("--force", help="Delete a model with its versions.")] = False,
    state_dir: StateDir = DEFAULT_STATE_DIR,
    output: Output = OutputFormat.TABLE,
) -> None:
    """Delete a version, or a model. Until the time it tells, `undelete` brings it back.

    [bold]Examples[/bold]

      mlmesh models delete mnist/2

      mlmesh models delete mnist --force
    """
    terminal = Terminal(output)

    async def main() -> None:
        from mlmesh_cli.connection import Connection  # noqa: PLC0415  keeps `mlmesh --help` quick
        from mlmesh_cli.names import parse_model  # noqa: PLC0415
        from mlmesh_cli.resolving import deleted, gone_until  # noqa: PLC0415

        async with Connection.from_environment(state_dir) as connection:
            found = await deleted(await connection.registry(), parse_model(model), force=force)
        terminal.show(lambda: gone_until(found, datetime.now(UTC)), found)

    run(terminal, main)


@models_app.command()
def undelete(model: Reference, state_dir: StateDir = DEFAULT_STATE_DIR, output: Output = OutputFormat.TABLE) -> None:
    """Bring a deleted version back, or a model with the versions that were deleted with it.

    [bold]Examples[/bold]

      mlmesh models undelete mnist/2

      mlmesh models undelete mnist
    """
    terminal = Terminal(output)

    async def main() -> None:
        from rich.text import Text  # noqa: PLC0415  keeps `mlmesh --help` quick

        from mlmesh_cli.connection import Connection  # noqa: PLC0415
        from mlmesh_cli.names import parse_model  # noqa: PLC0415
        from mlmesh_cli.resolving import undeleted  # noqa: PLC0415

        async with Connection.from_environment(state_dir) as connection:
            found = await undeleted(await connection.registry(), parse_model(model))
        terminal.show(Text(f"{found.name} is back", style="green"), found)

    run(terminal, main)


@models_app.command()
def verify(
    version: VersionReference,
    public_key: PublicKeys = None,
    folder: Annotated[
        Path | None, typer.Option(help="Compare the files of this folder, too.", exists=True, file_okay=False)
    ] = None,
    state_dir: StateDir = DEFAULT_STATE_DIR,
    output: Output = OutputFormat.TABLE,
) -> None:
    """Have the registry read every byte of a version, and check its signatures; 1 when something is wrong.

    With --public-key the signature is checked here, with that key, whatever the registry says of it.

    [bold]Examples[/bold]

      mlmesh models verify mnist@stable

      mlmesh models verify mnist/3 --public-key public.pem --folder models/
    """
    terminal = Terminal(output)

    async def main() -> None:
        from mlmesh_cli.connection import Connection  # noqa: PLC0415  keeps `mlmesh --help` quick
        from mlmesh_cli.names import parse_model  # noqa: PLC0415
        from mlmesh_cli.verifying import verified  # noqa: PLC0415

        async with Connection.from_environment(state_dir) as connection:
            stub = await connection.registry()
            await verified(stub, parse_model(version), terminal, public_keys=public_key or [], folder=folder)

    run(terminal, main)


@models_app.command()
def sign(
    *,
    version: VersionReference,
    private_key: Annotated[
        Path, typer.Option("--private-key", help="PEM file; P-256, P-384 or P-521.", exists=True, dir_okay=False)
    ],
    password_file: Annotated[
        Path | None, typer.Option(help="File with the key's password.", exists=True, dir_okay=False)
    ] = None,
    folder: Annotated[
        Path | None,
        typer.Option(help="Sign only if this folder's files are the registry's.", exists=True, file_okay=False),
    ] = None,
    state_dir: StateDir = DEFAULT_STATE_DIR,
    output: Output = OutputFormat.TABLE,
) -> None:
    """Sign the files of a version with a key that the registry trusts. The model-signing tool can verify it, too.

    Without --folder the digests are signed that the registry tells.

    [bold]Examples[/bold]

      mlmesh models sign mnist/3 --private-key key.pem --folder models/
    """
    terminal = Terminal(output)

    async def main() -> None:
        from mlmesh_cli.connection import Connection  # noqa: PLC0415  keeps `mlmesh --help` quick
        from mlmesh_cli.names import parse_model  # noqa: PLC0415
        from mlmesh_cli.render.registry import signatures_table  # noqa: PLC0415
        from mlmesh_cli.signing import load_private_key  # noqa: PLC0415
        from mlmesh_cli.verifying import signed  # noqa: PLC0415

        password = password_file.read_bytes().strip() if password_file else None
        key = load_private_key(private_key, password)
        async with Connection.from_environment(state_dir) as connection:
            made = await signed(await connection.registry(), parse_model(version), key, folder)
        terminal.show(lambda: signatures_table([made], datetime.now(UTC)), made)

    run(terminal, main)


@models_app.command()
def lineage(
    version: VersionReference,
    depth: Annotated[int, typer.Option(help="Generations to show.", min=1, max=20)] = 3,
    state_dir: StateDir = DEFAULT_STATE_DIR,
    output: Output = OutputFormat.TABLE,
) -> None:
    """Show what a version was made from, and what was made from it.

    [bold]Examples[/bold]

      mlmesh models lineage mnist/3

      mlmesh models lineage mnist@stable --depth 5 -o json
    """
    terminal = Terminal(output)

    async def main() -> None:
        from mlmesh_cli.connection import Connection  # noqa: PLC0415  keeps `mlmesh --help` quick
        from mlmesh_cli.lineages import ancestors, descendants  # noqa: PLC0415
        from mlmesh_cli.render.registry import lineage_tree  # noqa: PLC0415
        from mlmesh_cli.resolving import version_of  # noqa: PLC0415
        from mlmesh_cli.terminal import message_dict  # noqa: PLC0415

        async with Connection.from_environment(state_dir) as connection:
            stub = await connection.registry()
            found = await version_of(stub, version)
            parents = await ancestors(stub, found, depth)
            children = await descendants(stub, found, depth)
        value = {
            "model_version": found.name,
            "lineage": message_dict(found.lineage),
            "parents": {name: [*above] for name, above in parents.items()},
            "children": {name: [*below] for name, below in children.items()},
        }
        terminal.show(lambda: lineage_tree(found, parents, children), value)

    run(terminal, main)


@models_app.command()
def gc(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only tell what would be removed.")] = False,
    grace: Annotated[
        float | None, typer.Option("--grace", help="Seconds since bytes came or were last used.", min=0)
    ] = None,
    state_dir: StateDir = DEFAULT_STATE_DIR,
    output: Output = OutputFormat.TABLE,
) -> None:
    """Purge what was deleted long enough ago, and remove bytes that no version uses. The registry also does so itself.

    [bold]Examples[/bold]

      mlmesh models gc --dry-run

      mlmesh models gc --dry-run --grace 0
    """
    terminal = Terminal(output)

    async def main() -> None:
        from mlmesh.registry.v1 import registry_pb2 as pb  # noqa: PLC0415  keeps `mlmesh --help` quick
        from mlmesh_cli.connection import Connection, duration  # noqa: PLC0415
        from mlmesh_cli.render.registry import garbage_view  # noqa: PLC0415

        request = pb.CollectGarbageRequest(dry_run=dry_run, grace=None if grace is None else duration(grace))
        async with Connection.from_environment(state_dir) as connection:
            found = await (await connection.registry()).CollectGarbage(request)
        terminal.show(lambda: garbage_view(found), found)

    run(terminal, main)
