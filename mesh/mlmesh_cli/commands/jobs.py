"""`mlmesh jobs`: what is queued, runs, rests and has ended, and what may be done with it."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mlmesh_cli.commands.train import watch_to_end
from mlmesh_cli.options import DEFAULT_STATE_DIR, Output, OutputFormat, StateDir
from mlmesh_cli.terminal import Terminal, run

if TYPE_CHECKING:
    from mlmesh.training.v1.training_pb2_grpc import TrainingServiceAsyncStub

jobs_app = typer.Typer(help="Training jobs: list, watch, pause, resume, retry, cancel, delete.", no_args_is_help=True)

_Job = Annotated[str, typer.Argument(metavar="JOB", help="Name of the job, as `mlmesh jobs list` shows it.")]
_Jobs = Annotated[list[str], typer.Argument(metavar="JOB...", help="Names, as `mlmesh jobs list` shows them.")]


class State(StrEnum):
    """States that jobs are listed by."""

    QUEUED = "queued"
    RUNNING = "running"
    RETRYING = "retrying"
    PAUSING = "pausing"
    PAUSED = "paused"
    CANCELLING = "cancelling"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"


@jobs_app.command("list")
def list_jobs(
    *,
    state: Annotated[
        list[State] | None, typer.Option("--state", "-s", help="Only jobs in this state; may be repeated.")
    ] = None,
    study: Annotated[str, typer.Option(help="Only trials of this study.")] = "",
    count: Annotated[int, typer.Option("--count", "-n", help="Most jobs to show.", min=1, max=100_000)] = 20,
    state_dir: StateDir = DEFAULT_STATE_DIR,
    output: Output = OutputFormat.TABLE,
) -> None:
    """List jobs, newest first.

    [bold]Examples[/bold]

      mlmesh jobs list -n 5

      mlmesh jobs list --state queued --state paused -o json
    """
    terminal = Terminal(output)

    async def main() -> None:
        from mlmesh.training.v1 import training_pb2 as pb  # noqa: PLC0415  keeps `mlmesh --help` quick
        from mlmesh_cli.connection import Connection  # noqa: PLC0415
        from mlmesh_cli.render.jobs import queue_table  # noqa: PLC0415

        found = pb.ListJobsResponse()
        async with Connection.from_environment(state_dir) as connection:
            stub = await connection.training()
            request = pb.ListJobsRequest(
                states=[pb.JobState.Value(f"JOB_STATE_{each.upper()}") for each in state or []],
                study=f"studies/{study.removeprefix('studies/')}" if study else "",
            )
            while len(found.jobs) < count:
                request.page_size = min(1000, count - len(found.jobs))
                page = await stub.ListJobs(request)
                found.jobs.extend(page.jobs)
                found.next_page_token = request.page_token = page.next_page_token
                if not page.next_page_token:
                    break
        terminal.show(lambda: queue_table(found.jobs, datetime.now(UTC)), found)

    run(terminal, main)


@jobs_app.command()
def get(job: _Job, state_dir: StateDir = DEFAULT_STATE_DIR, output: Output = OutputFormat.TABLE) -> None:
    """Show all that is known of a job.

    [bold]Examples[/bold]

      mlmesh jobs get cnn-mnist-3f2a9c

      mlmesh jobs get cnn-mnist-3f2a9c -o json | jq .attempt_history
    """
    terminal = Terminal(output)

    async def main() -> None:
        from mlmesh.training.v1 import training_pb2 as pb  # noqa: PLC0415  keeps `mlmesh --help` quick
        from mlmesh_cli.connection import Connection  # noqa: PLC0415
        from mlmesh_cli.jobs import job_name  # noqa: PLC0415
        from mlmesh_cli.render.jobs import job_card  # noqa: PLC0415

        async with Connection.from_environment(state_dir) as connection:
            response = await (await connection.training()).GetJob(pb.GetJobRequest(name=job_name(job)))
        terminal.show(lambda: job_card(response.job, datetime.now(UTC)), response)

    run(terminal, main)


@jobs_app.command()
def watch(
    job: _Job,
    *,
    logs: Annotated[bool, typer.Option("--logs", help="Also show what the job writes.")] = False,
    start: Annotated[int, typer.Option("--from", help="First event, by its sequence; 0: the oldest kept.", min=0)] = 0,
    state_dir: StateDir = DEFAULT_STATE_DIR,
    output: Output = OutputFormat.TABLE,
) -> None:
    """Watch a job to its end. Ctrl-C ends the watching, not the job.

    [bold]Examples[/bold]

      mlmesh jobs watch cnn-mnist-3f2a9c --logs

      mlmesh jobs watch cnn-mnist-3f2a9c --from 120 -o json | jq -c .metrics.values
    """
    terminal = Terminal(output)

    async def main() -> None:
        from mlmesh_cli.connection import Connection  # noqa: PLC0415  keeps `mlmesh --help` quick
        from mlmesh_cli.jobs import job_name  # noqa: PLC0415

        async with Connection.from_environment(state_dir) as connection:
            await watch_to_end(await connection.training(), job_name(job), terminal, logs=logs, start=start)

    run(terminal, main)


@jobs_app.command()
def pause(jobs: _Jobs, state_dir: StateDir = DEFAULT_STATE_DIR, output: Output = OutputFormat.TABLE) -> None:
    """Have jobs write a checkpoint and give back what they occupy.

    [bold]Examples[/bold]

      mlmesh jobs pause cnn-mnist-3f2a9c
    """
    _ask("Pause", jobs, state_dir, output)


@jobs_app.command()
def resume(jobs: _Jobs, state_dir: StateDir = DEFAULT_STATE_DIR, output: Output = OutputFormat.TABLE) -> None:
    """Put paused jobs back into the queue; they go on from their last checkpoint.

    [bold]Examples[/bold]

      mlmesh jobs resume cnn-mnist-3f2a9c
    """
    _ask("Resume", jobs, state_dir, output)


@jobs_app.command()
def retry(jobs: _Jobs, state_dir: StateDir = DEFAULT_STATE_DIR, output: Output = OutputFormat.TABLE) -> None:
    """Put failed or cancelled jobs back into the queue, with a fresh budget of retries and of time.

    [bold]Examples[/bold]

      mlmesh jobs retry cnn-mnist-3f2a9c
    """
    _ask("Retry", jobs, state_dir, output)


@jobs_app.command()
def cancel(jobs: _Jobs, state_dir: StateDir = DEFAULT_STATE_DIR, output: Output = OutputFormat.TABLE) -> None:
    """Ask jobs to stop.

    [bold]Examples[/bold]

      mlmesh jobs cancel cnn-mnist-3f2a9c
    """
    _ask("Cancel", jobs, state_dir, output)


@jobs_app.command()
def delete(jobs: _Jobs, state_dir: StateDir = DEFAULT_STATE_DIR, output: Output = OutputFormat.TABLE) -> None:
    """Forget jobs that have ended, with their events and checkpoints. Versions that they published stay.

    [bold]Examples[/bold]

      mlmesh jobs delete cnn-mnist-3f2a9c
    """
    terminal = Terminal(output)

    async def main() -> None:
        from mlmesh.training.v1 import training_pb2 as pb  # noqa: PLC0415  keeps `mlmesh --help` quick
        from mlmesh_cli.connection import Connection  # noqa: PLC0415
        from mlmesh_cli.jobs import job_name  # noqa: PLC0415

        async with Connection.from_environment(state_dir) as connection:
            stub = await connection.training()
            for job in jobs:
                await stub.DeleteJob(pb.DeleteJobRequest(name=job_name(job)))
                terminal.show(f"{job_name(job)} is deleted", {"deleted": job_name(job)})

    run(terminal, main)


def _ask(what: str, names: list[str], state_dir: Any, output: OutputFormat) -> None:
    """Ask the same of several jobs, and show them as they are then."""
    terminal = Terminal(output)

    async def main() -> None:
        from mlmesh.training.v1 import training_pb2 as pb  # noqa: PLC0415  keeps `mlmesh --help` quick
        from mlmesh_cli.connection import Connection  # noqa: PLC0415
        from mlmesh_cli.jobs import job_name  # noqa: PLC0415
        from mlmesh_cli.render.jobs import queue_table  # noqa: PLC0415

        answered = pb.ListJobsResponse()
        async with Connection.from_environment(state_dir) as connection:
            stub: TrainingServiceAsyncStub = await connection.training()
            call: Callable[..., Any] = getattr(stub, f"{what}Job")
            for name in names:
                request = getattr(pb, f"{what}JobRequest")(name=job_name(name))
                answered.jobs.append((await call(request)).job)
        terminal.show(lambda: queue_table(answered.jobs, datetime.now(UTC)), answered)

    run(terminal, main)
