"""`mlmesh train`."""

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

train_app = typer.Typer(invoke_without_command=True)

_Job = Annotated[str, typer.Argument(metavar="JOB", help="Name of the job, as `mlmesh train list` shows it.")]


_TURN, _FITTING = "Turn and resources", "Fitting"


class _Strategy(StrEnum):
    DDP = "ddp"
    FSDP2 = "fsdp2"


class _Precision(StrEnum):
    FP32 = "fp32"
    BF16 = "bf16"
    FP16 = "fp16"


class _Schedule(StrEnum):
    CONSTANT = "constant"
    ONE_CYCLE = "one-cycle"
    COSINE = "cosine"
    LINEAR = "linear"


@train_app.callback()
def train(
    context: typer.Context,
    *,
    recipe: Annotated[
        str | None, typer.Option("--recipe", "-r", help="What to train; see `mlmesh train recipes`.")
    ] = None,
    dataset: Annotated[
        str | None,
        typer.Option("--dataset", "-d", help="What to train on, such as mnist or houses/1; see `mlmesh datasets`."),
    ] = None,
    setting: Annotated[
        list[str] | None,
        typer.Option("--set", help="Hyperparameter NAME=NUMBER; may be repeated.", metavar="NAME=NUMBER"),
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Model to publish to; default: the data set's name.")
    ] = None,
    alias: Annotated[list[str] | None, typer.Option("--alias", "-a", help="Alias to move to the new version.")] = None,
    publish: Annotated[bool, typer.Option("--publish/--no-publish", help="Register what was trained.")] = True,
    description: Annotated[str, typer.Option(help="What is special about this version.")] = "",
    seed: Annotated[
        int | None, typer.Option(help="Seed of weights, shuffling and split.", min=0, max=2**32 - 1)
    ] = None,
    retries: Annotated[int | None, typer.Option(help="Attempts after the first; -1: none.", min=-1, max=100)] = None,
    priority: Annotated[
        int | None, typer.Option(help="Greater runs first.", min=-100, max=100, rich_help_panel=_TURN)
    ] = None,
    time_limit: Annotated[
        str | None,
        typer.Option(help="Longest time to run, such as 90s, 15m or 2h.", metavar="TIME", rich_help_panel=_TURN),
    ] = None,
    cpus: Annotated[float | None, typer.Option(help="Processors to occupy.", min=0, rich_help_panel=_TURN)] = None,
    memory: Annotated[
        str | None,
        typer.Option(help="Main memory to occupy, such as 4Gi.", metavar="BYTES", rich_help_panel=_TURN),
    ] = None,
    gpus: Annotated[int | None, typer.Option(help="GPUs to occupy.", min=0, rich_help_panel=_TURN)] = None,
    processes: Annotated[
        int | None, typer.Option(help="Processes to spread over.", min=1, max=64, rich_help_panel=_FITTING)
    ] = None,
    nodes: Annotated[
        int | None, typer.Option(help="Machines to spread over.", min=1, max=1024, rich_help_panel=_FITTING)
    ] = None,
    strategy: Annotated[
        _Strategy | None, typer.Option(help="How processes share the model.", rich_help_panel=_FITTING)
    ] = None,
    precision: Annotated[
        _Precision | None, typer.Option(help="Arithmetic of the fitting.", rich_help_panel=_FITTING)
    ] = None,
    schedule: Annotated[
        _Schedule | None, typer.Option(help="Learning rate over time.", rich_help_panel=_FITTING)
    ] = None,
    warmup: Annotated[
        float | None, typer.Option(help="Share of warm-up steps.", min=0, max=0.9, rich_help_panel=_FITTING)
    ] = None,
    accumulate: Annotated[
        int | None, typer.Option(help="Batches a step.", min=1, max=1024, rich_help_panel=_FITTING)
    ] = None,
    clip_norm: Annotated[
        float | None, typer.Option(help="Longest gradient; 0: any.", min=0, rich_help_panel=_FITTING)
    ] = None,
    early_stopping: Annotated[
        int | None,
        typer.Option(
            help="Stop after so many epochs without an improvement.",
            metavar="EPOCHS",
            min=1,
            max=10_000,
            rich_help_panel=_FITTING,
        ),
    ] = None,
    stop_metric: Annotated[
        str | None,
        typer.Option(help="Figure that early stopping watches.", metavar="NAME", rich_help_panel=_FITTING),
    ] = None,
    checkpoint_steps: Annotated[
        int | None, typer.Option(help="Steps between checkpoints; 0: each epoch.", min=0, rich_help_panel=_FITTING)
    ] = None,
    best: Annotated[
        bool | None,
        typer.Option("--best/--last", help="Keep the weights of the best epoch.", rich_help_panel=_FITTING),
    ] = None,
    label: Annotated[
        list[str] | None, typer.Option("--label", help="Free label; may be repeated.", metavar="NAME=VALUE")
    ] = None,
    job: Annotated[
        Path | None, typer.Option("--job", help="JobSpec in YAML or JSON; options override it.", dir_okay=False)
    ] = None,
    detach: Annotated[bool, typer.Option("--detach", help="Submit and do not watch.")] = False,
    logs: Annotated[bool, typer.Option("--logs", help="Also show what the job writes.")] = False,
    state_dir: StateDir = DEFAULT_STATE_DIR,
    output: Output = OutputFormat.TABLE,
) -> None:
    """Train a model: submit a job and watch it to its end. Ctrl-C detaches, the job goes on. Lists jobs, too.

    [bold]Examples[/bold]

      mlmesh train

      mlmesh train --recipe cnn --dataset mnist --set epochs=4 --set width=16 --alias canary

      mlmesh train --processes 2 --precision bf16 --early-stopping 3 --time-limit 1h --priority 10

      mlmesh train --job job.yaml --detach -o json

      mlmesh train list
    """
    if context.invoked_subcommand:
        return
    terminal = Terminal(output)

    async def main() -> None:
        from mlmesh.training.v1 import training_pb2 as pb  # noqa: PLC0415  keeps `mlmesh --help` quick
        from mlmesh_cli.connection import Connection  # noqa: PLC0415
        from mlmesh_cli.datasets import dataset_reference, default_model  # noqa: PLC0415
        from mlmesh_cli.jobs import hyperparameters, read_spec, submit  # noqa: PLC0415
        from mlmesh_cli.render.training import jobs_table  # noqa: PLC0415
        from mlmesh_cli.specs import Wishes, apply  # noqa: PLC0415

        wishes = Wishes(
            seed=seed,
            retries=retries,
            priority=priority,
            time_limit=time_limit,
            cpus=cpus,
            memory=memory,
            gpus=gpus,
            processes=processes,
            nodes=nodes,
            strategy=strategy,
            precision=precision,
            schedule=schedule,
            warmup=warmup,
            accumulate=accumulate,
            clip_norm=clip_norm,
            early_stopping=early_stopping,
            stop_metric=stop_metric,
            checkpoint_steps=checkpoint_steps,
            best=best,
            labels=label or [],
        )
        spec = read_spec(job) if job else pb.JobSpec()
        spec.recipe = recipe or spec.recipe or "cnn"
        spec.dataset = dataset_reference(dataset or spec.dataset or "mnist")
        spec.hyperparameters.update(hyperparameters(setting or []))
        apply(spec, wishes)
        if publish:
            target = spec.publication
            default = target.model or default_model(spec.recipe, spec.dataset)
            target.model = f"models/{model.removeprefix('models/')}" if model else default
            target.aliases.extend(a for a in alias or [] if a not in target.aliases)
            target.description = description or target.description
        else:
            spec.ClearField("publication")
        async with Connection.from_environment(state_dir) as connection:
            stub = await connection.training()
            created = await submit(stub, spec)
            if detach:
                terminal.show(jobs_table([created], datetime.now(UTC)), created)
                return
            await watch_to_end(stub, created.name, terminal, logs=logs)

    run(terminal, main)


async def watch_to_end(
    stub: TrainingServiceAsyncStub, name: str, terminal: Terminal, *, logs: bool, start: int = 0
) -> pb.Job:
    """Shows a job's events until it ended, then what it measured. Raises CliError when it did not succeed."""
    import asyncio  # noqa: PLC0415

    from mlmesh.training.v1 import training_pb2 as pb  # noqa: PLC0415
    from mlmesh_cli.errors import CliError  # noqa: PLC0415
    from mlmesh_cli.jobs import follow  # noqa: PLC0415
    from mlmesh_cli.progress import JobProgress  # noqa: PLC0415
    from mlmesh_cli.render.training import job_view  # noqa: PLC0415

    last = pb.Job()
    try:
        with JobProgress(terminal.err if terminal.json else terminal.out, name, logs=logs) as progress:
            async for event in follow(stub, name, from_sequence=start):
                terminal.line(event)
                progress.update(event)
                if event.HasField("job"):
                    last = event.job
    except asyncio.CancelledError:
        terminal.say(f"detached; {name} goes on: `mlmesh train watch {name}`, `mlmesh jobs cancel {name}`")
        raise
    if not terminal.json:
        terminal.say(job_view(last))
    if last.state != pb.JOB_STATE_SUCCEEDED:
        outcome = "was cancelled" if last.state == pb.JOB_STATE_CANCELLED else f"failed: {last.error}"
        raise CliError(
            f"{name} {outcome}",
            f"`mlmesh train watch {name} --logs` shows what it wrote, `mlmesh jobs retry {name}` tries it again",
            reason="JOB_FAILED",
        )
    return last


@train_app.command("list")
def list_jobs(
    count: Annotated[int, typer.Option("--count", "-n", help="Most jobs to show.", min=1, max=1000)] = 20,
    state_dir: StateDir = DEFAULT_STATE_DIR,
    output: Output = OutputFormat.TABLE,
) -> None:
    """List jobs, newest first.

    [bold]Examples[/bold]

      mlmesh train list -n 5
    """
    terminal = Terminal(output)

    async def main() -> None:
        from mlmesh.training.v1 import training_pb2 as pb  # noqa: PLC0415  keeps `mlmesh --help` quick
        from mlmesh_cli.connection import Connection  # noqa: PLC0415
        from mlmesh_cli.render.training import jobs_table  # noqa: PLC0415

        async with Connection.from_environment(state_dir) as connection:
            response = await (await connection.training()).ListJobs(pb.ListJobsRequest(page_size=count))
        terminal.show(jobs_table(response.jobs, datetime.now(UTC)), response)

    run(terminal, main)


@train_app.command()
def watch(
    job: _Job,
    logs: Annotated[bool, typer.Option("--logs", help="Also show what the job writes.")] = False,
    state_dir: StateDir = DEFAULT_STATE_DIR,
    output: Output = OutputFormat.TABLE,
) -> None:
    """Watch a job from its first event to its end.

    [bold]Examples[/bold]

      mlmesh train watch jobs/3f2a9c --logs

      mlmesh train watch 3f2a9c -o json | jq -c .metrics.values
    """
    terminal = Terminal(output)

    async def main() -> None:
        from mlmesh_cli.connection import Connection  # noqa: PLC0415  keeps `mlmesh --help` quick
        from mlmesh_cli.jobs import job_name  # noqa: PLC0415

        async with Connection.from_environment(state_dir) as connection:
            await watch_to_end(await connection.training(), job_name(job), terminal, logs=logs)

    run(terminal, main)


@train_app.command()
def cancel(job: _Job, state_dir: StateDir = DEFAULT_STATE_DIR, output: Output = OutputFormat.TABLE) -> None:
    """Ask a job to stop.

    [bold]Examples[/bold]

      mlmesh train cancel jobs/3f2a9c
    """
    terminal = Terminal(output)

    async def main() -> None:
        from mlmesh.training.v1 import training_pb2 as pb  # noqa: PLC0415  keeps `mlmesh --help` quick
        from mlmesh_cli.connection import Connection  # noqa: PLC0415
        from mlmesh_cli.jobs import job_name  # noqa: PLC0415
        from mlmesh_cli.render.training import jobs_table  # noqa: PLC0415

        async with Connection.from_environment(state_dir) as connection:
            response = await (await connection.training()).CancelJob(pb.CancelJobRequest(name=job_name(job)))
        terminal.show(jobs_table([response.job], datetime.now(UTC)), response)

    run(terminal, main)


@train_app.command()
def recipes(state_dir: StateDir = DEFAULT_STATE_DIR, output: Output = OutputFormat.TABLE) -> None:
    """Show what can be trained, and with which hyperparameters.

    [bold]Examples[/bold]

      mlmesh train recipes
    """
    terminal = Terminal(output)

    async def main() -> None:
        from mlmesh.training.v1 import training_pb2 as pb  # noqa: PLC0415  keeps `mlmesh --help` quick
        from mlmesh_cli.connection import Connection  # noqa: PLC0415
        from mlmesh_cli.render.training import recipes_view  # noqa: PLC0415

        async with Connection.from_environment(state_dir) as connection:
            response = await (await connection.training()).ListRecipes(pb.ListRecipesRequest())
        terminal.show(recipes_view(response.recipes), response)

    run(terminal, main)
