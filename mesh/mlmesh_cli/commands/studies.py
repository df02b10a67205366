"""`mlmesh studies`."""

from __future__ import annotations

from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mlmesh_cli.options import DEFAULT_STATE_DIR, Output, OutputFormat, StateDir
from mlmesh_cli.terminal import Terminal, run

if TYPE_CHECKING:
    from mlmesh.training.v1 import training_pb2 as pb
    from mlmesh.training.v1.training_pb2_grpc import TrainingServiceAsyncStub

studies_app = typer.Typer(no_args_is_help=True, help="Search hyperparameters: each trial is a job, the best is kept.")

_Study = Annotated[str, typer.Argument(metavar="STUDY", help="Name of the study, as `mlmesh studies list` shows it.")]


class SamplerOption(StrEnum):
    """How values are chosen."""

    TPE = "tpe"
    RANDOM = "random"
    GRID = "grid"


class PrunerOption(StrEnum):
    """When a trial is given up."""

    NONE = "none"
    MEDIAN = "median"
    HYPERBAND = "hyperband"


class DirectionOption(StrEnum):
    """Which values are better."""

    MAXIMIZE = "maximize"
    MINIMIZE = "minimize"


@studies_app.command("run")
def run_study(
    *,
    recipe: Annotated[str | None, typer.Option("--recipe", "-r", help="What to train.")] = None,
    dataset: Annotated[str | None, typer.Option("--dataset", "-d", help="What to train on.")] = None,
    search: Annotated[
        list[str] | None,
        typer.Option(
            "--search",
            "-s",
            help="Hyperparameter to search: NAME=LOW..HIGH[:log|:STEP], NAME=V1,V2,… or NAME (the recipe's bounds).",
            metavar="NAME[=RANGE]",
        ),
    ] = None,
    setting: Annotated[
        list[str] | None,
        typer.Option("--set", help="Hyperparameter NAME=NUMBER of every trial.", metavar="NAME=NUMBER"),
    ] = None,
    sampler: Annotated[SamplerOption | None, typer.Option(help="How values are chosen; default: tpe.")] = None,
    pruner: Annotated[PrunerOption | None, typer.Option(help="When a trial is given up; default: none.")] = None,
    metric: Annotated[str | None, typer.Option(help="Figure to optimise; default: validation_accuracy.")] = None,
    direction: Annotated[DirectionOption | None, typer.Option(help="Which values are better.")] = None,
    trials: Annotated[int | None, typer.Option("--trials", "-n", help="Trials in all.", min=1, max=10000)] = None,
    parallel: Annotated[int | None, typer.Option("--parallel", "-p", help="Trials at once.", min=1, max=64)] = None,
    failures: Annotated[int | None, typer.Option(help="Trials that may fail; -1: none.", min=-1, max=10000)] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of search and training.", min=0, max=2**32 - 1)] = None,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Model to publish the best to; default: the data set's name.")
    ] = None,
    alias: Annotated[list[str] | None, typer.Option("--alias", "-a", help="Alias to move to the best.")] = None,
    publish: Annotated[bool, typer.Option("--publish/--no-publish", help="Register the best trial's model.")] = True,
    study: Annotated[
        Path | None, typer.Option("--study", help="StudySpec in YAML or JSON; options override it.", dir_okay=False)
    ] = None,
    detach: Annotated[bool, typer.Option("--detach", help="Start it and do not watch.")] = False,
    state_dir: StateDir = DEFAULT_STATE_DIR,
    output: Output = OutputFormat.TABLE,
) -> None:
    """Search hyperparameters and watch the trials. Ctrl-C detaches, the study goes on.

    [bold]Examples[/bold]

      mlmesh studies run --search learning_rate --search width=32,64,128

      mlmesh studies run -r mlp -d digits -s learning_rate=1e-4..1e-1:log --pruner hyperband -n 12 -p 2

      mlmesh studies run --study study.yaml --detach -o json
    """
    terminal = Terminal(output)

    async def main() -> None:
        from mlmesh.training.v1 import training_pb2 as pb  # noqa: PLC0415  keeps `mlmesh --help` quick
        from mlmesh_cli import studies  # noqa: PLC0415
        from mlmesh_cli.connection import Connection  # noqa: PLC0415
        from mlmesh_cli.jobs import hyperparameters  # noqa: PLC0415
        from mlmesh_cli.render.studies import studies_table  # noqa: PLC0415

        spec = studies.read_spec(study) if study else pb.StudySpec()
        job = spec.job
        job.recipe = recipe or job.recipe or "mlp"
        job.dataset = dataset or job.dataset or "digits"
        job.hyperparameters.update(hyperparameters(setting or []))
        if seed is not None:
            spec.seed = job.seed = seed
        spec.sampler = pb.Sampler.Value(f"SAMPLER_{sampler.name}") if sampler else spec.sampler
        spec.pruner = pb.Pruner.Value(f"PRUNER_{pruner.name}") if pruner else spec.pruner
        spec.metric = metric or spec.metric
        spec.direction = pb.Direction.Value(f"DIRECTION_{direction.name}") if direction else spec.direction
        spec.trials_max = trials or spec.trials_max
        spec.parallel_max = parallel or spec.parallel_max
        spec.failures_max = spec.failures_max if failures is None else failures
        if publish:
            target = job.publication
            named = job.dataset.removeprefix("models/").partition("/")[0]
            target.model = f"models/{model.removeprefix('models/')}" if model else target.model or f"models/{named}"
            target.aliases.extend(a for a in alias or [] if a not in target.aliases)
        else:
            job.ClearField("publication")
        async with Connection.from_environment(state_dir) as connection:
            stub = await connection.training()
            if search:
                listed = (await stub.ListRecipes(pb.ListRecipesRequest())).recipes
                del spec.dimensions[:]
                spec.dimensions.extend(studies.dimensions(search, studies.hyperparameters_of(listed, job.recipe)))
            created = await studies.submit(stub, spec)
            if detach:
                terminal.show(studies_table([created], datetime.now(UTC)), created)
                return
            await watch_to_end(stub, created.name, terminal)

    run(terminal, main)


async def watch_to_end(stub: TrainingServiceAsyncStub, name: str, terminal: Terminal) -> pb.Study:
    """Shows a study's trials until it ended, then what it found. Raises CliError when it did not succeed."""
    import asyncio  # noqa: PLC0415

    from mlmesh.training.v1 import training_pb2 as pb  # noqa: PLC0415
    from mlmesh_cli.errors import CliError  # noqa: PLC0415
    from mlmesh_cli.render.studies import study_view  # noqa: PLC0415
    from mlmesh_cli.studies import follow  # noqa: PLC0415
    from mlmesh_cli.study_progress import StudyProgress  # noqa: PLC0415

    last = pb.Study()
    try:
        with StudyProgress(terminal.err if terminal.json else terminal.out, name) as progress:
            async for event in follow(stub, name):
                terminal.line(event)
                progress.update(event)
                if event.HasField("study"):
                    last = event.study
    except asyncio.CancelledError:
        terminal.say(f"detached; {name} goes on: `mlmesh studies watch {name}`, `mlmesh studies stop {name}`")
        raise
    if not terminal.json:
        terminal.say(study_view(last))
    if last.state == pb.STUDY_STATE_FAILED:
        raise CliError(
            f"{name} failed: {last.error}", f"`mlmesh studies trials {name}` shows its trials", reason="STUDY_FAILED"
        )
    return last


@studies_app.command("list")
def list_studies(
    count: Annotated[int, typer.Option("--count", "-n", help="Most studies to show.", min=1, max=1000)] = 20,
    state_dir: StateDir = DEFAULT_STATE_DIR,
    output: Output = OutputFormat.TABLE,
) -> None:
    """List studies, newest first.

    [bold]Examples[/bold]

      mlmesh studies list -n 5
    """
    terminal = Terminal(output)

    async def main() -> None:
        from mlmesh.training.v1 import training_pb2 as pb  # noqa: PLC0415  keeps `mlmesh --help` quick
        from mlmesh_cli.connection import Connection  # noqa: PLC0415
        from mlmesh_cli.render.studies import studies_table  # noqa: PLC0415

        async with Connection.from_environment(state_dir) as connection:
            response = await (await connection.training()).ListStudies(pb.ListStudiesRequest(page_size=count))
        terminal.show(studies_table(response.studies, datetime.now(UTC)), response)

    run(terminal, main)


@studies_app.command()
def get(study: _Study, state_dir: StateDir = DEFAULT_STATE_DIR, output: Output = OutputFormat.TABLE) -> None:
    """Show where a study stands and the best it has found.

    [bold]Examples[/bold]

      mlmesh studies get mlp-3f2a9c
    """
    terminal = Terminal(output)

    async def main() -> None:
        from mlmesh.training.v1 import training_pb2 as pb  # noqa: PLC0415  keeps `mlmesh --help` quick
        from mlmesh_cli.connection import Connection  # noqa: PLC0415
        from mlmesh_cli.render.studies import study_view  # noqa: PLC0415
        from mlmesh_cli.studies import study_name  # noqa: PLC0415

        async with Connection.from_environment(state_dir) as connection:
            response = await (await connection.training()).GetStudy(pb.GetStudyRequest(name=study_name(study)))
        terminal.show(study_view(response.study), response)

    run(terminal, main)


@studies_app.command()
def watch(study: _Study, state_dir: StateDir = DEFAULT_STATE_DIR, output: Output = OutputFormat.TABLE) -> None:
    """Watch a study from its first event to its end.

    [bold]Examples[/bold]

      mlmesh studies watch mlp-3f2a9c

      mlmesh studies watch mlp-3f2a9c -o json | jq -c .trial
    """
    terminal = Terminal(output)

    async def main() -> None:
        from mlmesh_cli.connection import Connection  # noqa: PLC0415  keeps `mlmesh --help` quick
        from mlmesh_cli.studies import study_name  # noqa: PLC0415

        async with Connection.from_environment(state_dir) as connection:
            await watch_to_end(await connection.training(), study_name(study), terminal)

    run(terminal, main)


@studies_app.command()
def stop(study: _Study, state_dir: StateDir = DEFAULT_STATE_DIR, output: Output = OutputFormat.TABLE) -> None:
    """Start no further trials and cancel those that run. The best so far is published where that was asked.

    [bold]Examples[/bold]

      mlmesh studies stop mlp-3f2a9c
    """
    terminal = Terminal(output)

    async def main() -> None:
        from mlmesh.training.v1 import training_pb2 as pb  # noqa: PLC0415  keeps `mlmesh --help` quick
        from mlmesh_cli.connection import Connection  # noqa: PLC0415
        from mlmesh_cli.render.studies import study_view  # noqa: PLC0415
        from mlmesh_cli.studies import study_name  # noqa: PLC0415

        async with Connection.from_environment(state_dir) as connection:
            response = await (await connection.training()).StopStudy(pb.StopStudyRequest(name=study_name(study)))
        terminal.show(study_view(response.study), response)

    run(terminal, main)


@studies_app.command()
def trials(study: _Study, state_dir: StateDir = DEFAULT_STATE_DIR, output: Output = OutputFormat.TABLE) -> None:
    """List the trials of a study, the best marked.

    [bold]Examples[/bold]

      mlmesh studies trials mlp-3f2a9c
    """
    terminal = Terminal(output)

    async def main() -> None:
        from mlmesh.training.v1 import training_pb2 as pb  # noqa: PLC0415  keeps `mlmesh --help` quick
        from mlmesh_cli.connection import Connection  # noqa: PLC0415
        from mlmesh_cli.render.studies import trials_table  # noqa: PLC0415
        from mlmesh_cli.studies import all_trials, study_name  # noqa: PLC0415

        async with Connection.from_environment(state_dir) as connection:
            stub = await connection.training()
            known = (await stub.GetStudy(pb.GetStudyRequest(name=study_name(study)))).study
            found = await all_trials(stub, known.name)
        terminal.show(trials_table(found, known), pb.ListTrialsResponse(trials=found))

    run(terminal, main)
