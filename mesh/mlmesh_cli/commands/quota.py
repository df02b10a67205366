"""`mlmesh quota`: how much the registry may hold."""

from __future__ import annotations

from typing import Annotated

import typer

from mlmesh_cli.options import DEFAULT_STATE_DIR, Output, OutputFormat, StateDir
from mlmesh_cli.terminal import Terminal, run

quota_app = typer.Typer(help="How much a model, or the whole registry, may hold and holds.", no_args_is_help=True)

_Scope = Annotated[str, typer.Argument(metavar="[MODEL]", help="Of this model; else of the whole registry.")]


@quota_app.command("show")
def show_quota(
    model: _Scope = "", state_dir: StateDir = DEFAULT_STATE_DIR, output: Output = OutputFormat.TABLE
) -> None:
    """Show limits and use.

    [bold]Examples[/bold]

      mlmesh quota show

      mlmesh quota show mnist
    """
    terminal = Terminal(output)

    async def main() -> None:
        from mlmesh.registry.v1 import registry_pb2 as pb  # noqa: PLC0415  keeps `mlmesh --help` quick
        from mlmesh_cli.connection import Connection  # noqa: PLC0415
        from mlmesh_cli.names import parse_model  # noqa: PLC0415
        from mlmesh_cli.render.registry import quota_table  # noqa: PLC0415

        name = parse_model(model).parent if model else "models/-"
        async with Connection.from_environment(state_dir) as connection:
            quota = (await (await connection.registry()).GetQuota(pb.GetQuotaRequest(name=name))).quota
        terminal.show(lambda: quota_table([quota]), quota)

    run(terminal, main)


@quota_app.command("set")
def set_quota(
    *,
    model: _Scope = "",
    size: Annotated[str, typer.Option("--bytes", help="Most bytes of files, such as 500MiB or 2TiB; 0: any.")] = "",
    versions: Annotated[int | None, typer.Option(help="Most versions; 0: any.", min=0)] = None,
    models: Annotated[int | None, typer.Option(help="Most models, of the whole registry; 0: any.", min=0)] = None,
    state_dir: StateDir = DEFAULT_STATE_DIR,
    output: Output = OutputFormat.TABLE,
) -> None:
    """Change limits; those not named stay. What is stored already stays, too.

    [bold]Examples[/bold]

      mlmesh quota set --bytes 2TiB --models 500

      mlmesh quota set mnist --bytes 10GiB --versions 100
    """
    terminal = Terminal(output)

    async def main() -> None:
        from mlmesh.registry.v1 import registry_pb2 as pb  # noqa: PLC0415  keeps `mlmesh --help` quick
        from mlmesh_cli.connection import Connection  # noqa: PLC0415
        from mlmesh_cli.errors import usage_error  # noqa: PLC0415
        from mlmesh_cli.names import parse_model, parse_size  # noqa: PLC0415
        from mlmesh_cli.render.registry import quota_table  # noqa: PLC0415

        name = parse_model(model).parent if model else "models/-"
        if not size and versions is None and models is None:
            raise usage_error("no limit is named", "such as --bytes 10GiB or --versions 100")
        async with Connection.from_environment(state_dir) as connection:
            stub = await connection.registry()
            before = (await stub.GetQuota(pb.GetQuotaRequest(name=name))).quota
            wanted = pb.Quota(
                name=name,
                bytes_max=parse_size(size) if size else before.bytes_max,
                versions_max=before.versions_max if versions is None else versions,
                models_max=before.models_max if models is None else models,
            )
            quota = (await stub.SetQuota(pb.SetQuotaRequest(quota=wanted, etag=before.etag))).quota
        terminal.show(lambda: quota_table([quota]), quota)

    run(terminal, main)
