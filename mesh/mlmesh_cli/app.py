"""The `mlmesh` command."""

from __future__ import annotations

import os
from importlib.metadata import version
from typing import Annotated

import typer

from mlmesh_cli.commands import importing, promotion, samples, versions  # noqa: F401  commands of `mlmesh models`
from mlmesh_cli.commands.analyze import analyze, conditions
from mlmesh_cli.commands.apply import apply
from mlmesh_cli.commands.audit import audit_app
from mlmesh_cli.commands.certs import certs_app
from mlmesh_cli.commands.chaos import chaos_app
from mlmesh_cli.commands.config import config_app
from mlmesh_cli.commands.datasets import datasets_app
from mlmesh_cli.commands.delete import delete
from mlmesh_cli.commands.demo import demo
from mlmesh_cli.commands.diffing import diff
from mlmesh_cli.commands.doctor import doctor
from mlmesh_cli.commands.engines import engines_app
from mlmesh_cli.commands.explain import explain
from mlmesh_cli.commands.infer import infer
from mlmesh_cli.commands.jobs import jobs_app
from mlmesh_cli.commands.lifecycle import down, init, status, up
from mlmesh_cli.commands.metrics import metrics
from mlmesh_cli.commands.models import models_app
from mlmesh_cli.commands.optimize import optimize
from mlmesh_cli.commands.quota import quota_app
from mlmesh_cli.commands.routes import routes
from mlmesh_cli.commands.streams import streams_app
from mlmesh_cli.commands.studies import studies_app
from mlmesh_cli.commands.traces import traces_app
from mlmesh_cli.commands.train import train_app
from mlmesh_cli.commands.translating import translate
from mlmesh_cli.commands.xds import xds_app

_EPILOG = (
    "Exit codes: 0 ok, 1 failed, 2 wrong usage, 3 no mesh is running, 130 Ctrl-C. "
    "Every command takes --output json. `mlmesh --install-completion` sets up the shell."
)

app = typer.Typer(
    name="mlmesh",
    help="Train, register and serve models over gRPC inside a service mesh, on a laptop or a cluster.",
    epilog=_EPILOG,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_show_locals=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"mlmesh {version('mlmesh')}")
        raise typer.Exit


@app.callback()
def _root(
    _version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


_MESH, _WORK, _LOOK = "The mesh", "Models", "Looking inside"
app.command(rich_help_panel=_MESH)(init)
app.command(rich_help_panel=_MESH)(up)
app.command(rich_help_panel=_MESH)(down)
app.command(rich_help_panel=_MESH)(status)
app.command(rich_help_panel=_MESH)(apply)
app.command(rich_help_panel=_MESH)(delete)
app.command(rich_help_panel=_MESH)(demo)
app.add_typer(chaos_app, name="chaos", rich_help_panel=_MESH)
app.add_typer(train_app, name="train", rich_help_panel=_WORK)
app.command(rich_help_panel=_WORK)(optimize)
app.add_typer(studies_app, name="studies", rich_help_panel=_WORK)
app.add_typer(jobs_app, name="jobs", rich_help_panel=_WORK)
app.add_typer(models_app, name="models", rich_help_panel=_WORK)
app.add_typer(datasets_app, name="datasets", rich_help_panel=_WORK)
app.add_typer(engines_app, name="engines", rich_help_panel=_WORK)
app.command(rich_help_panel=_WORK)(infer)
app.add_typer(quota_app, name="quota", rich_help_panel=_WORK)
app.add_typer(audit_app, name="audit", rich_help_panel=_LOOK)
app.command(rich_help_panel=_LOOK)(routes)
app.command(rich_help_panel=_LOOK)(metrics)
app.command(rich_help_panel=_LOOK)(explain)
app.command(rich_help_panel=_LOOK)(diff)
app.command(rich_help_panel=_LOOK)(doctor)
app.command(rich_help_panel=_LOOK)(translate)
app.command(rich_help_panel=_LOOK)(analyze)
app.command(rich_help_panel=_LOOK)(conditions)
app.add_typer(config_app, name="config", rich_help_panel=_LOOK)
app.add_typer(streams_app, name="streams", rich_help_panel=_LOOK)
app.add_typer(traces_app, name="traces", rich_help_panel=_LOOK)
app.add_typer(certs_app, name="certs", rich_help_panel=_LOOK)
app.add_typer(xds_app, name="xds", rich_help_panel=_LOOK)


def main() -> None:
    """Entry point of the `mlmesh` script."""
    # gRPC's own log lines ("fork", "ping timeout") belong to no command's output.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    app()
