"""`mlmesh infer`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mlmesh_cli.options import DEFAULT_STATE_DIR, Output, OutputFormat, StateDir
from mlmesh_cli.terminal import Terminal, run

if TYPE_CHECKING:
    from mlmesh_cli.inferring import Metadata
    from mlmesh_cli.names import ModelReference
    from open_inference.grpc_service_pb2_grpc import GRPCInferenceServiceAsyncStub


def infer(
    *,
    model: Annotated[
        str, typer.Argument(metavar="MODEL[/VERSION]", help="Such as mnist; the mesh chooses the version.")
    ] = "mnist",
    index: Annotated[int, typer.Option("--index", "-i", help="Number of the first image of the data set.", min=0)] = 0,
    count: Annotated[int, typer.Option("--count", "-n", help="Requests to send.", min=1, max=1_000_000)] = 1,
    dataset: Annotated[
        str, typer.Option("--dataset", "-d", help="mnist or digits; default: what fits the model.")
    ] = "",
    input_file: Annotated[
        Path | None,
        typer.Option("--input", help="Tensor in .npy or JSON instead of images.", exists=True, dir_okay=False),
    ] = None,
    image: Annotated[
        list[Path] | None,
        typer.Option("--image", help="PNG or JPEG file; may be repeated.", exists=True, dir_okay=False),
    ] = None,
    text: Annotated[list[str] | None, typer.Option("--text", help="A text; may be repeated.")] = None,
    audio: Annotated[
        list[Path] | None, typer.Option("--audio", help="WAV file; may be repeated.", exists=True, dir_okay=False)
    ] = None,
    stream: Annotated[bool, typer.Option("--stream", "-s", help="Send all over one stream.")] = False,
    header: Annotated[list[str] | None, typer.Option("--header", "-H", help="NAME=VALUE; may be repeated.")] = None,
    concurrency: Annotated[
        int, typer.Option("--concurrency", "-c", help="Requests in flight at once.", min=1, max=1000)
    ] = 1,
    timeout: Annotated[float, typer.Option(help="Deadline of each request, seconds.", min=0.001)] = 10.0,
    state_dir: StateDir = DEFAULT_STATE_DIR,
    output: Output = OutputFormat.TABLE,
) -> None:
    """Ask a model through the mesh and show which version answered.

    [bold]Examples[/bold]

      mlmesh infer mnist --index 42

      mlmesh infer mnist --count 1000 --concurrency 16

      mlmesh infer mnist --stream --count 100 --header x-user=ada

      mlmesh infer mnist --input image.npy -o json

      mlmesh infer ocr --image receipt.png

      mlmesh infer minilm --text "a cat on a mat" --text "the stock market"

      mlmesh infer voice --audio call.wav
    """
    terminal = Terminal(output)

    async def _media(
        stub: GRPCInferenceServiceAsyncStub,
        reference: ModelReference,
        metadata: Metadata,
        *files: Sequence[Any],
    ) -> None:
        from mlmesh_cli.errors import CliError  # noqa: PLC0415
        from mlmesh_cli.media import ask, given  # noqa: PLC0415
        from mlmesh_cli.render.media import heard_view  # noqa: PLC0415

        heard = await ask(stub, reference, given(*files), metadata=metadata, timeout_s=max(timeout, 60.0))
        terminal.show(heard_view(heard), {"answers": [each.as_dict() for each in heard]})
        failed = [each for each in heard if each.error]
        if failed:
            raise CliError(
                f"{len(failed)} of {len(heard)} failed, the first with {failed[0].error}", reason="REQUESTS_FAILED"
            )

    async def main() -> None:
        from mlmesh_cli.connection import Connection  # noqa: PLC0415  keeps `mlmesh --help` quick
        from mlmesh_cli.errors import CliError  # noqa: PLC0415
        from mlmesh_cli.inferring import infer_stream, infer_unary  # noqa: PLC0415
        from mlmesh_cli.names import parse_model, parse_pairs  # noqa: PLC0415
        from mlmesh_cli.queries import queries_for  # noqa: PLC0415
        from mlmesh_cli.render.inference import answers_view  # noqa: PLC0415
        from mlmesh_cli.tracing import exporting  # noqa: PLC0415

        reference = parse_model(model)
        headers = parse_pairs(header or [], "--header")
        metadata = tuple((name.lower(), value) for name, value in headers.items())
        async with Connection.from_environment(state_dir) as connection:
            stub = await connection.inference()
            if image or text or audio:
                await _media(stub, reference, metadata, image or [], text or [], audio or [])
                return
            queries = await queries_for(
                stub, reference, metadata, start=index, count=count, dataset=dataset, input_file=input_file
            )
            async with exporting(await connection.otlp_endpoint()):
                if stream:
                    answers = await infer_stream(
                        await connection.inference_client(),
                        queries,
                        metadata=metadata,
                        in_flight=max(concurrency, 8),
                        each=lambda a: terminal.line(a.as_dict()),
                    )
                else:
                    answers = await infer_unary(
                        stub,
                        queries,
                        metadata=metadata,
                        timeout_s=timeout,
                        concurrency=concurrency,
                        each=lambda a: terminal.line(a.as_dict()),
                    )
        if not terminal.json:
            terminal.say(answers_view(answers))
        failed = [answer for answer in answers if answer.error]
        if failed:
            raise CliError(
                f"{len(failed)} of {len(answers)} requests failed, the first with {failed[0].error}",
                "`mlmesh status` shows what is ready, `mlmesh routes` where requests go",
                reason="REQUESTS_FAILED",
            )

    run(terminal, main)
