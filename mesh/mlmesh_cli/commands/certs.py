"""`mlmesh certs`."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer

from mlmesh_cli.options import DEFAULT_STATE_DIR, Output, OutputFormat, StateDir
from mlmesh_cli.terminal import Terminal, run

ROTATION_DEADLINE_S = 180.0

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


@certs_app.command("rotate-root")
def rotate_root(
    now: Annotated[
        bool, typer.Option("--now", help="Do not wait for certificates of tools: they stop working at once.")
    ] = False,
    state_dir: StateDir = DEFAULT_STATE_DIR,
    output: Output = OutputFormat.TABLE,
) -> None:
    """Replace the root of the certificate authority while calls go on; none of them fails.

    Every sidecar learns of the new root before it signs anything, and the old root is trusted until nobody needs it:
    certificates from `mlmesh certs issue` go on working for as long as they are valid, unless --now is given. What a
    restart of the mesh interrupts goes on after it.

    [bold]Examples[/bold]

      mlmesh certs rotate-root

      mlmesh certs rotate-root --now
    """
    terminal = Terminal(output)

    async def main() -> None:
        from rich.text import Text  # noqa: PLC0415  keeps `mlmesh --help` quick

        from mlmesh.local.v1 import local_pb2 as pb  # noqa: PLC0415
        from mlmesh_cli.connection import Connection  # noqa: PLC0415

        steps: list[str] = []
        async with Connection.from_environment(state_dir) as connection:
            control = await connection.control()
            async for response in control.RotateRoot(pb.RotateRootRequest(now=now), timeout=ROTATION_DEADLINE_S):
                steps.append(response.message)
                terminal.say(response.message)
        terminal.show(Text("mlmesh certs bundle shows the roots that are trusted", style="green"), {"steps": steps})

    run(terminal, main)


@certs_app.command()
def bundle(
    spiffe: Annotated[
        bool, typer.Option("--spiffe", help="As a SPIFFE bundle (JSON Web Key Set) instead of PEM.")
    ] = False,
    to: Annotated[Path | None, typer.Option("--to", help="File; default standard output.")] = None,
    state_dir: StateDir = DEFAULT_STATE_DIR,
    output: Output = OutputFormat.TABLE,
) -> None:
    """Show the roots that this mesh trusts, for whoever is to trust it.

    [bold]Examples[/bold]

      mlmesh certs bundle --to ca.pem

      mlmesh certs bundle --spiffe
    """
    terminal = Terminal(output)

    async def main() -> None:
        from mlmesh.local.v1 import local_pb2 as pb  # noqa: PLC0415  keeps `mlmesh --help` quick
        from mlmesh_cli.connection import CONTROL_DEADLINE_S, Connection  # noqa: PLC0415

        async with Connection.from_environment(state_dir) as connection:
            control = await connection.control()
            response = await control.GetTrustBundle(pb.GetTrustBundleRequest(), timeout=CONTROL_DEADLINE_S)
        text = response.spiffe_json if spiffe else response.pem
        if to is not None:
            to.write_text(text)
            terminal.say(f"roots of {response.trust_domain} are in {to}")
        elif output is OutputFormat.JSON:
            terminal.show(text, response)
        else:
            terminal.unwrapped(text.rstrip())

    run(terminal, main)
