"""`mlmesh models`."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mlmesh_cli.options import DEFAULT_STATE_DIR, Output, OutputFormat, StateDir
from mlmesh_cli.terminal import Terminal, run

if TYPE_CHECKING:
    from mlmesh.registry.v1 import registry_pb2 as pb

models_app = typer.Typer(help="Look at models, publish and download them, move aliases.", no_args_is_help=True)
alias_app = typer.Typer(help="Look at aliases and move them.", no_args_is_help=True)
models_app.add_typer(alias_app, name="alias")

_PAGE = 200
ModelName = Annotated[str, typer.Argument(metavar="MODEL", help="Name of the model, such as mnist.")]
Reference = Annotated[
    str, typer.Argument(metavar="MODEL[/VERSION|@ALIAS]", help="Such as mnist, mnist/3 or mnist@stable.")
]
Limit = Annotated[int, typer.Option("--limit", "-n", help="Most to show; 0: all.", min=0)]
Filter = Annotated[
    str, typer.Option("--filter", "-f", help="Only those that it is true of (AIP-160), such as 'labels.team = vision'.")
]
OrderBy = Annotated[str, typer.Option("--order-by", help="Fields to order by, such as 'metrics.accuracy desc'.")]
Deleted = Annotated[bool, typer.Option("--deleted", help="Deleted ones, too.")]
_Etag = Annotated[str, typer.Option(help="Only if the alias still has this etag; default: the one read just before.")]


async def pages(call: Callable[[str, int], Awaitable[Any]], field: str, limit: int = 0) -> AsyncIterator[Any]:
    """Items of a list, page by page, at most limit (0: all); `call` asks for the page of a token and a size."""
    token, left = "", limit
    while True:
        page = await call(token, min(left, _PAGE) if limit else _PAGE)
        for item in getattr(page, field):
            yield item
        left -= len(getattr(page, field))
        token = page.next_page_token
        if not token or (limit and left <= 0):
            return


@models_app.command("list")
def list_models(
    *,
    where: Filter = "",
    order_by: OrderBy = "",
    deleted: Deleted = False,
    limit: Limit = 100,
    state_dir: StateDir = DEFAULT_STATE_DIR,
    output: Output = OutputFormat.TABLE,
) -> None:
    """List the models and where their aliases point.

    [bold]Examples[/bold]

      mlmesh models list

      mlmesh models list --filter 'kind = MODEL AND labels.team = vision' --order-by 'update_time desc'
    """
    terminal = Terminal(output)

    async def main() -> None:
        from mlmesh.registry.v1 import registry_pb2 as pb  # noqa: PLC0415  keeps `mlmesh --help` quick
        from mlmesh_cli.connection import Connection  # noqa: PLC0415
        from mlmesh_cli.render.models import models_table  # noqa: PLC0415

        async with Connection.from_environment(state_dir) as connection:
            stub = await connection.registry()
            found = pb.ListModelsResponse()
            async for model in pages(
                lambda token, size: stub.ListModels(
                    pb.ListModelsRequest(
                        page_size=size, page_token=token, filter=where, order_by=order_by, show_deleted=deleted
                    )
                ),
                "models",
                limit,
            ):
                found.models.append(model)
            aliases = await _aliases(stub, "models/-")
        terminal.show(models_table(found.models, aliases, datetime.now(UTC)), found)

    run(terminal, main)


async def _aliases(stub: Any, parent: str) -> list[pb.ModelAlias]:
    from mlmesh.registry.v1 import registry_pb2 as pb  # noqa: PLC0415

    found = pages(
        lambda token, size: stub.ListModelAliases(
            pb.ListModelAliasesRequest(parent=parent, page_size=size, page_token=token)
        ),
        "aliases",
    )
    return [alias async for alias in found]


@models_app.command()
def show(model: Reference, state_dir: StateDir = DEFAULT_STATE_DIR, output: Output = OutputFormat.TABLE) -> None:
    """Show a model with its aliases and versions, or all that is known of one version.

    [bold]Examples[/bold]

      mlmesh models show mnist

      mlmesh models show mnist@stable

      mlmesh models show mnist/2 -o json
    """
    terminal = Terminal(output)

    async def main() -> None:
        from mlmesh.registry.v1 import registry_pb2 as pb  # noqa: PLC0415  keeps `mlmesh --help` quick
        from mlmesh_cli.connection import Connection  # noqa: PLC0415
        from mlmesh_cli.names import parse_model  # noqa: PLC0415
        from mlmesh_cli.render.models import model_view, version_view  # noqa: PLC0415
        from mlmesh_cli.terminal import message_dict  # noqa: PLC0415

        reference = parse_model(model)
        now = datetime.now(UTC)
        async with Connection.from_environment(state_dir) as connection:
            stub = await connection.registry()
            if reference.version_name:
                request = pb.GetModelVersionRequest(name=reference.version_name)
                version = (await stub.GetModelVersion(request)).model_version
                terminal.show(version_view(version, now), version)
                return
            found = (await stub.GetModel(pb.GetModelRequest(name=reference.parent))).model
            aliases = await _aliases(stub, reference.parent)
            request_versions = pb.ListModelVersionsRequest(parent=reference.parent, page_size=10)
            versions = (await stub.ListModelVersions(request_versions)).model_versions
        value = {
            "model": message_dict(found),
            "aliases": [message_dict(alias) for alias in aliases],
            "model_versions": [message_dict(version) for version in versions],
        }
        terminal.show(model_view(found, aliases, versions, now), value)

    run(terminal, main)


# Whoever knows other command lines looks for `get`.
models_app.command("get", hidden=True)(show)


@models_app.command()
def versions(
    *,
    model: Annotated[str, typer.Argument(metavar="[MODEL]", help="Only of this model.")] = "",
    where: Filter = "",
    order_by: OrderBy = "",
    deleted: Deleted = False,
    limit: Limit = 100,
    state_dir: StateDir = DEFAULT_STATE_DIR,
    output: Output = OutputFormat.TABLE,
) -> None:
    """List and search the versions of a model, or of all, newest first unless --order-by says otherwise.

    [bold]Examples[/bold]

      mlmesh models versions mnist

      mlmesh models versions mnist --filter 'metrics.accuracy >= 0.9 AND stage = ACTIVE'

      mlmesh models versions --order-by 'metrics.accuracy desc' --limit 10
    """
    terminal = Terminal(output)

    async def main() -> None:
        from mlmesh.registry.v1 import registry_pb2 as pb  # noqa: PLC0415  keeps `mlmesh --help` quick
        from mlmesh_cli.connection import Connection  # noqa: PLC0415
        from mlmesh_cli.names import parse_model  # noqa: PLC0415
        from mlmesh_cli.render.models import versions_table  # noqa: PLC0415

        parent = parse_model(model).parent if model else "models/-"
        async with Connection.from_environment(state_dir) as connection:
            stub = await connection.registry()
            found = pb.ListModelVersionsResponse()
            async for version in pages(
                lambda token, size: stub.ListModelVersions(
                    pb.ListModelVersionsRequest(
                        parent=parent,
                        page_size=size,
                        page_token=token,
                        filter=where,
                        order_by=order_by,
                        show_deleted=deleted,
                    )
                ),
                "model_versions",
                limit,
            ):
                found.model_versions.append(version)
        terminal.show(versions_table(found.model_versions, datetime.now(UTC)), found)

    run(terminal, main)


@alias_app.command("list")
def list_aliases(
    model: Annotated[str, typer.Argument(metavar="[MODEL]", help="Only this model.")] = "",
    state_dir: StateDir = DEFAULT_STATE_DIR,
    output: Output = OutputFormat.TABLE,
) -> None:
    """List aliases with their etags.

    [bold]Examples[/bold]

      mlmesh models alias list mnist
    """
    terminal = Terminal(output)

    async def main() -> None:
        from mlmesh.registry.v1 import registry_pb2 as pb  # noqa: PLC0415  keeps `mlmesh --help` quick
        from mlmesh_cli.connection import Connection  # noqa: PLC0415
        from mlmesh_cli.names import parse_model  # noqa: PLC0415
        from mlmesh_cli.render.models import aliases_table  # noqa: PLC0415

        async with Connection.from_environment(state_dir) as connection:
            aliases = await _aliases(await connection.registry(), parse_model(model).parent if model else "models/-")
        terminal.show(aliases_table(aliases, datetime.now(UTC)), pb.ListModelAliasesResponse(aliases=aliases))

    run(terminal, main)


@alias_app.command("set")
def set_alias(
    *,
    model: ModelName,
    alias: Annotated[str, typer.Argument(help="Name of the alias, such as stable.")],
    version: Annotated[int, typer.Argument(help="Number of the version.", min=1)],
    etag: _Etag = "",
    state_dir: StateDir = DEFAULT_STATE_DIR,
    output: Output = OutputFormat.TABLE,
) -> None:
    """Create an alias, or move it by compare-and-set.

    [bold]Examples[/bold]

      mlmesh models alias set mnist stable 2

      mlmesh models alias set mnist stable 2 --etag 5d41402a
    """
    terminal = Terminal(output)

    async def main() -> None:
        from mlmesh.registry.v1 import registry_pb2 as pb  # noqa: PLC0415  keeps `mlmesh --help` quick
        from mlmesh_cli.connection import Connection  # noqa: PLC0415
        from mlmesh_cli.names import parse_model  # noqa: PLC0415
        from mlmesh_cli.render.models import aliases_table  # noqa: PLC0415

        parent = parse_model(model).parent
        async with Connection.from_environment(state_dir) as connection:
            stub = await connection.registry()
            name = f"{parent}/aliases/{alias}"
            now_etag = etag or next((a.etag for a in await _aliases(stub, parent) if a.name == name), "")
            request = pb.SetModelAliasRequest(name=name, version=f"{parent}/versions/{version}", etag=now_etag)
            moved = (await stub.SetModelAlias(request)).alias
        terminal.show(aliases_table([moved], datetime.now(UTC)), moved)

    run(terminal, main)


@alias_app.command("delete")
def delete_alias(
    model: ModelName,
    alias: Annotated[str, typer.Argument(help="Name of the alias.")],
    etag: _Etag = "",
    state_dir: StateDir = DEFAULT_STATE_DIR,
    output: Output = OutputFormat.TABLE,
) -> None:
    """Delete an alias by compare-and-set. The version stays.

    [bold]Examples[/bold]

      mlmesh models alias delete mnist canary
    """
    terminal = Terminal(output)

    async def main() -> None:
        from rich.text import Text  # noqa: PLC0415  keeps `mlmesh --help` quick

        from mlmesh.registry.v1 import registry_pb2 as pb  # noqa: PLC0415
        from mlmesh_cli.connection import Connection  # noqa: PLC0415
        from mlmesh_cli.errors import CliError  # noqa: PLC0415
        from mlmesh_cli.names import parse_model  # noqa: PLC0415

        parent = parse_model(model).parent
        name = f"{parent}/aliases/{alias}"
        async with Connection.from_environment(state_dir) as connection:
            stub = await connection.registry()
            now_etag = etag or next((a.etag for a in await _aliases(stub, parent) if a.name == name), "")
            if not now_etag:
                hint = f"`mlmesh models alias list {model}` shows its aliases"
                raise CliError(f"{model} has no alias {alias!r}", hint, reason="MODEL_ALIAS_NOT_FOUND")
            await stub.DeleteModelAlias(pb.DeleteModelAliasRequest(name=name, etag=now_etag))
        terminal.show(Text(f"{model}@{alias} deleted", style="green"), {"deleted": name})

    run(terminal, main)


@models_app.command()
def publish(
    *,
    model: ModelName,
    file: Annotated[Path, typer.Argument(help="The ONNX file.", exists=True, dir_okay=False)],
    alias: Annotated[
        list[str] | None, typer.Option("--alias", "-a", help="Alias to move to it; may be repeated.")
    ] = None,
    metric: Annotated[list[str] | None, typer.Option("--metric", help="NAME=NUMBER; may be repeated.")] = None,
    label: Annotated[list[str] | None, typer.Option("--label", help="NAME=VALUE; may be repeated.")] = None,
    description: Annotated[str, typer.Option(help="What is special about this version.")] = "",
    state_dir: StateDir = DEFAULT_STATE_DIR,
    output: Output = OutputFormat.TABLE,
) -> None:
    """Upload an ONNX file and publish it as the next version. The model is created when it does not exist.

    [bold]Examples[/bold]

      mlmesh models publish mnist model.onnx --alias canary --metric accuracy=0.98
    """
    terminal = Terminal(output)

    async def main() -> None:
        from mlmesh_cli.connection import Connection  # noqa: PLC0415  keeps `mlmesh --help` quick
        from mlmesh_cli.names import parse_model  # noqa: PLC0415
        from mlmesh_cli.publishing import Publication, publish_file  # noqa: PLC0415
        from mlmesh_cli.render.models import version_view  # noqa: PLC0415

        wanted = Publication.from_options(
            parse_model(model).model,
            file,
            aliases=alias or [],
            metrics=metric or [],
            labels=label or [],
            description=description,
        )
        async with Connection.from_environment(state_dir) as connection:
            version = await publish_file(await connection.registry(), wanted, terminal)
        terminal.show(version_view(version, datetime.now(UTC)), version)

    run(terminal, main)


@models_app.command()
def download(
    model: Reference,
    to: Annotated[Path, typer.Option("--to", help="Folder for the files.")] = Path(),
    public_key: Annotated[
        list[Path] | None,
        typer.Option(
            "--public-key",
            help="PEM file of a key that must have signed it; may be repeated.",
            exists=True,
            dir_okay=False,
        ),
    ] = None,
    state_dir: StateDir = DEFAULT_STATE_DIR,
    output: Output = OutputFormat.TABLE,
) -> None:
    """Download the files of a version, verified. Without a version: the newest. A cut download goes on when repeated.

    [bold]Examples[/bold]

      mlmesh models download mnist@stable --to models/

      mlmesh models download mnist@stable --to models/ --public-key public.pem
    """
    terminal = Terminal(output)

    async def main() -> None:
        from rich.text import Text  # noqa: PLC0415  keeps `mlmesh --help` quick

        from mlmesh_cli.connection import Connection  # noqa: PLC0415
        from mlmesh_cli.names import parse_model  # noqa: PLC0415
        from mlmesh_cli.publishing import download_version  # noqa: PLC0415
        from mlmesh_cli.verifying import trusted  # noqa: PLC0415

        async with Connection.from_environment(state_dir) as connection:
            stub = await connection.registry()
            reference = parse_model(model)
            if public_key:
                reference = await trusted(stub, reference, public_key)
            version, paths = await download_version(stub, reference, to, terminal)
        lines = Text("\n").join([Text(version.name, style="bold"), *(Text(f"  {path}") for path in paths)])
        terminal.show(lines, {"model_version": version.name, "files": [str(path) for path in paths]})

    run(terminal, main)
