"""`mlmesh certs`."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer

from mlmesh_cli.options import DEFAULT_STATE_DIR, Output, OutputFormat, StateDir
from mlmesh_cli.terminal import Terminal, run

certs_app = typer.Typer(help="Look at certificates, issue some for tools, rotate them.", no_args_is_help=True)


@certs_app.command("list")
def list_certificates(state_dir: StateDir = DEFAULT_STATE_DIR, output: Output = OutputFormat.TABLE) -> None:
    """List the certificate that each sidecar holds.

    [bold]Examples[/bold]

      mlmesh certs list

      mlmesh certs list -o json
    """
    terminal = Terminal(output)

    async def main() -> None:
        from mlmesh_cli.connection import Connection  # noqa: PLC0415  keeps `mlmesh --help` quick
        from mlmesh_cli.render.status import certificate_rows, certificates_table  # noqa: PLC0415

        async with Connection.from_environment(state_dir) as connection:
            status = await connection.status()
        terminal.show(certificates_table(status, datetime.now(UTC)), certificate_rows(status))

    run(terminal, main)


@certs_app.command()
def issue(
    service_account: Annotated[
        str, typer.Argument(help="ServiceAccount to be: operator may call everything.")
    ] = "operator",
    to: Annotated[
        Path | None, typer.Option("--to", help="Folder for the files; default certs/ in the state folder.")
    ] = None,
    ttl: Annotated[float, typer.Option(help="Hours of validity.", min=0.01, max=24)] = 1.0,
    state_dir: StateDir = DEFAULT_STATE_DIR,
    output: Output = OutputFormat.TABLE,
) -> None:
    """Issue a certificate and write cert.pem, key.pem and ca.pem, to call with grpcurl or any client.

    [bold]Examples[/bold]

      mlmesh certs issue

      mlmesh certs issue inference --to /tmp/as-inference --ttl 0.5
    """
    terminal = Terminal(output)

    async def main() -> None:
        from mlmesh_cli.certificates import write_certificate  # noqa: PLC0415  keeps `mlmesh --help` quick
        from mlmesh_cli.connection import Connection  # noqa: PLC0415
        from mlmesh_cli.render.status import grpcurl_example, issued_view  # noqa: PLC0415

        folder = to or state_dir / "certs" / service_account
        async with Connection.from_environment(state_dir) as connection:
            written = await write_certificate(await connection.control(), service_account, folder, ttl_s=ttl * 3600)
            status = await connection.status()
        gateway = next((g.address for g in status.gateways if g.tls_mode == "MUTUAL"), "")
        terminal.show(issued_view(written, datetime.now(UTC)), written.as_dict())
        if gateway:
            terminal.say("try it:")
            terminal.unwrapped(f"  {grpcurl_example(written, gateway)}")

    run(terminal, main)


@certs_app.command()
def rotate(state_dir: StateDir = DEFAULT_STATE_DIR, output: Output = OutputFormat.TABLE) -> None:
    """Give every sidecar a new certificate now. Open streams go on.

    [bold]Examples[/bold]

      mlmesh certs rotate
    """
    terminal = Terminal(output)

    async def main() -> None:
        from rich.text import Text  # noqa: PLC0415  keeps `mlmesh --help` quick

        from mlmesh.local.v1 import local_pb2 as pb  # noqa: PLC0415
        from mlmesh_cli.connection import Connection  # noqa: PLC0415

        async with Connection.from_environment(state_dir) as connection:
            response = await (await connection.control()).RotateCertificates(pb.RotateCertificatesRequest(), timeout=30)
        terminal.show(Text(f"{response.rotated} certificates rotated", style="green"), response)

    run(terminal, main)
