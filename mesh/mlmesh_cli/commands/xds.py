"""`mlmesh xds`."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Annotated

import typer

from mlmesh_cli.options import DEFAULT_STATE_DIR, Output, OutputFormat, StateDir
from mlmesh_cli.terminal import Terminal, run

xds_app = typer.Typer(help="gRPC clients without a sidecar: they dial xds:///host:port.", no_args_is_help=True)


@xds_app.command()
def bootstrap(
    *,
    service_account: Annotated[
        str, typer.Option("--service-account", help="ServiceAccount to be; servers know the client by it.")
    ] = "operator",
    namespace: Annotated[str, typer.Option("--namespace", "-n", help="Namespace of the ServiceAccount.")] = "mlmesh",
    label: Annotated[
        list[str] | None, typer.Option("--label", "-l", help="KEY=VALUE by which rules may select it; may be repeated.")
    ] = None,
    without: Annotated[
        list[str] | None,
        typer.Option(help="Field of Istio to do without rather than be refused, such as mirror; may be repeated."),
    ] = None,
    to: Annotated[
        Path | None, typer.Option("--to", help="Folder for the files; default xds/ in the state folder.")
    ] = None,
    ttl: Annotated[float, typer.Option(help="Hours that the certificate is valid.", min=0.01, max=24)] = 1.0,
    watch: Annotated[
        bool, typer.Option("--watch", help="Stay, and renew the certificate at half of its life.")
    ] = False,
    state_dir: StateDir = DEFAULT_STATE_DIR,
    output: Output = OutputFormat.TABLE,
) -> None:
    """Write the bootstrap and the certificate of a gRPC client that has no sidecar.

    What such a client cannot do (mirrors, rewrites, timeouts, ...) is refused rule by rule: those calls fail with
    UNAVAILABLE and say why, and `mlmesh status` lists it.

    [bold]Examples[/bold]

      mlmesh xds bootstrap --service-account toolbox

      GRPC_XDS_BOOTSTRAP=.mlmesh/xds/toolbox/bootstrap.json python client.py

      mlmesh xds bootstrap --service-account toolbox --without outlierDetection --watch
    """
    terminal = Terminal(output)

    async def main() -> None:
        from rich.text import Text  # noqa: PLC0415  keeps `mlmesh --help` quick

        from mlmesh_cli.connection import Connection  # noqa: PLC0415
        from mlmesh_cli.specs import pairs  # noqa: PLC0415
        from mlmesh_cli.xds_clients import write_bootstrap  # noqa: PLC0415

        folder = (to or state_dir / "xds" / service_account).absolute()
        renew = False
        while True:
            async with Connection.from_environment(state_dir) as connection:
                written = await write_bootstrap(
                    await connection.control(),
                    folder,
                    service_account=service_account,
                    namespace=namespace,
                    labels=pairs("--label", label or []),
                    tolerated=without or [],
                    ttl_s=ttl * 3600,
                    renew=renew,
                )
            if not renew:
                text = f"{written.identity}\nexport GRPC_XDS_BOOTSTRAP={written.bootstrap}"
                terminal.show(Text(text), written.as_dict())
            if not watch:
                return
            renew = True
            await asyncio.sleep(ttl * 1800)

    run(terminal, main)
