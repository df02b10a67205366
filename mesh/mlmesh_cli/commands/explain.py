"""`mlmesh explain`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from mlmesh_cli.options import DEFAULT_STATE_DIR, Files, Output, OutputFormat, StateDir
from mlmesh_cli.terminal import Terminal, run


def explain(
    *,
    source: Annotated[
        str, typer.Option("--from", help="Workload or instance that calls, such as toolbox.", show_default=False)
    ] = "",
    to: Annotated[
        str, typer.Option("--to", help="HOST[:PORT] as the application writes it, such as inference:9000.")
    ] = "",
    method: Annotated[str, typer.Option("--method", "-m", help="/package.Service/Method, or a path.")] = "/",
    http: Annotated[
        str, typer.Option("--http", help="Method of a call that is not gRPC, such as GET.", show_default=False)
    ] = "",
    header: Annotated[
        list[str] | None,
        typer.Option("--header", "-H", help="NAME=VALUE of the call's metadata; may be repeated.", show_default=False),
    ] = None,
    gateway: Annotated[
        str, typer.Option("--at-gateway", help="Gateway at which the call arrives, by name.", show_default=False)
    ] = "",
    identity: Annotated[
        str, typer.Option("--identity", help="SPIFFE id in the certificate that a client outside shows.")
    ] = "",
    source_ip: Annotated[str, typer.Option("--source-ip", help="Address that the call comes from.")] = "127.0.0.1",
    file: Files = None,
    expect: Annotated[
        list[str] | None,
        typer.Option(
            "--expect", help="FACT=VALUE that must hold, such as subset=v2; else it exits with 1.", show_default=False
        ),
    ] = None,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Also notes, endpoints and what is not used.")] = (
        False
    ),
    state_dir: StateDir = DEFAULT_STATE_DIR,
    output: Output = OutputFormat.TABLE,
) -> None:
    """Tell which rule decides about a call, and why: route, destination, retries, timeout, mTLS, policies, streams.

    It reads the running mesh; with --file, what these files would make of it, without any process.

    [bold]Examples[/bold]

      mlmesh explain --from toolbox --to inference:9000 -m /inference.GRPCInferenceService/ModelInfer

      mlmesh explain --from toolbox --to inference:9000 -m /pkg.Service/Method -H x-user=ada -f manifests/overlays/cpu

      mlmesh explain --from toolbox --to web:8000 --http GET -m /health

      mlmesh explain --at-gateway mlmesh --from toolbox --to inference.mlmesh.svc.cluster.local -m /pkg.Service/Method

      mlmesh explain --from toolbox --to inference:9000 -m /pkg.Service/Method --expect subset=v1 --expect code=OK
    """
    terminal = Terminal(output)
    asked = _Asked(
        source=source,
        to=to,
        method=method,
        http=http,
        headers=header or [],
        gateway=gateway,
        identity=identity,
        source_ip=source_ip,
        expect=expect or [],
    )
    run(terminal, lambda: _explain(terminal, asked, file, state_dir, verbose=verbose))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Asked:
    """A call as it was typed."""

    source: str
    to: str
    method: str
    http: str
    headers: list[str]
    gateway: str
    identity: str
    source_ip: str
    expect: list[str]


async def _explain(
    terminal: Terminal, asked: _Asked, files: list[Path] | None, state_dir: Path, *, verbose: bool
) -> None:
    import time  # noqa: PLC0415  keeps `mlmesh --help` quick

    from mlmesh_cli.errors import CliError  # noqa: PLC0415
    from mlmesh_cli.render.explain import explanation_view  # noqa: PLC0415
    from mlmesh_cli.worlds import look, pairs, split_target  # noqa: PLC0415
    from mlmesh_local.explain import Call, Scene, document, unmet  # noqa: PLC0415
    from mlmesh_local.explain import explain as explain_call  # noqa: PLC0415

    host, port = split_target(asked.to)
    call = Call(
        source=asked.source,
        host=host,
        port=port,
        path=asked.method,
        http=asked.http.upper(),
        headers=pairs(asked.headers, "--header"),
        gateway=asked.gateway,
        identity=asked.identity,
        source_ip=asked.source_ip,
    )
    expectations = pairs(asked.expect, "--expect")
    seen = await look(state_dir, files, sent=True)
    for note in seen.notes:
        terminal.warn(note)
    explanation = explain_call(Scene(seen.world, now_s=time.time(), sent=seen.sent), call)
    failed = unmet(explanation, expectations)
    value = {**document(explanation), "unmet": failed}
    terminal.show(lambda: explanation_view(explanation, verbose=verbose), value)
    if failed:
        raise CliError("; ".join(failed), "the explanation above tells why", reason="NOT_AS_EXPECTED")
