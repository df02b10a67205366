"""`mlmesh jobs`: the queue, and one job with all that is known of it."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from mlmesh.training.v1 import training_pb2 as pb
from mlmesh_cli.render import text as t
from mlmesh_cli.render.status import table
from mlmesh_cli.render.training import FINAL_STATES, job_view, phase_name, quality, state_text


def queue_table(jobs: Iterable[pb.Job], now: datetime) -> RenderableType:
    """One row a job, in the order given."""
    result = table("job", "state", "at", ">epoch", ">quality", "version", ">ran", "submitted", "asked for")
    for job in jobs:
        progress = f"{job.progress.epoch}/{job.progress.epochs}" if job.progress.epochs else "-"
        result.add_row(
            job.name,
            state_text(job.state),
            standing(job) or "-",
            progress,
            quality(job.evaluation) if job.HasField("evaluation") else "-",
            t.model_version(job.model_version) or "-",
            t.duration(t.seconds(job.run_duration)) if job.HasField("run_duration") else "-",
            t.ago(job.create_time, now),
            demands(job.spec) or "-",
        )
    return result if result.row_count else Text("no such jobs: `mlmesh train` submits one", style="dim")


def standing(job: pb.Job) -> str:
    """What a job is at, in two or three words: its phase, its place in the queue, its attempt."""
    if job.state == pb.JOB_STATE_QUEUED:
        return f"{job.queue_position} ahead" if job.queue_position else "next"
    parts = [phase_name(job.phase)]
    if job.attempts > 1 and job.state not in FINAL_STATES:
        parts.append(f"attempt {job.attempts}")
    return ", ".join(part for part in parts if part)


def demands(spec: pb.JobSpec) -> str:
    """What a job asks for beside the defaults: "priority 5, 2 processes, 4 GiB"."""
    parts = [f"priority {spec.priority}"] if spec.priority else []
    spread, asked = spec.distribution, spec.resources
    if spread.processes > 1:
        strategy = "" if spread.strategy != pb.STRATEGY_FSDP2 else " FSDP2"
        parts.append(f"{spread.processes} processes{strategy}")
    if spread.nodes > 1:
        parts.append(f"{spread.nodes} machines")
    if asked.cpus:
        parts.append(f"{asked.cpus:g} CPUs")
    if asked.memory_bytes:
        parts.append(t.size(asked.memory_bytes))
    if asked.gpus:
        parts.append(f"{asked.gpus} GPUs")
    if spec.HasField("time_limit"):
        parts.append(f"at most {t.duration(t.seconds(spec.time_limit))}")
    return ", ".join(parts)


def attempts_table(job: pb.Job) -> Table:
    """Each attempt that ended, oldest first."""
    result = table(">attempt", "began", ">ran", "ended because", "budget")
    for attempt in job.attempt_history:
        result.add_row(
            str(attempt.number),
            t.clock(attempt.start_time),
            t.duration(max(0.0, t.unix(attempt.end_time) - t.unix(attempt.start_time))),
            attempt.reason or "all was done",
            "charged" if attempt.charged else "-",
        )
    return result


def job_card(job: pb.Job, now: datetime) -> RenderableType:
    """All that is known of a job."""
    spec = job.spec
    facts = Table.grid(padding=(0, 2))
    facts.add_column(style="dim")
    facts.add_column()

    def fact(name: str, value: str) -> None:
        if value:
            facts.add_row(name, value)

    fact("trains", f"{spec.recipe} on {job.resolved_dataset or spec.dataset}, seed {spec.seed}")
    fact("with", ", ".join(f"{name} {value:g}" for name, value in sorted(spec.hyperparameters.items())))
    fact("optimises", spec.optimization.source)
    fact("asks for", demands(spec))
    fact("occupies", occupied(job.resources))
    fact("publishes", _publication(spec))
    fact("study", job.study)
    fact("labels", ", ".join(f"{name}={value}" for name, value in sorted(spec.labels.items())))
    fact("submitted", t.ago(job.create_time, now) + (f" by {job.creator}" if job.creator else ""))
    fact("at", standing(job))
    if job.HasField("run_duration"):
        fact("ran", f"{t.duration(t.seconds(job.run_duration))} in {job.attempts} attempts")
    parts: list[RenderableType] = [job_view(job), facts]
    if job.attempt_history:
        parts.append(attempts_table(job))
    return Group(*parts)


def occupied(resources: pb.Resources) -> str:
    """Resources in words: "2 CPUs, 4.0 GiB, 1 GPUs"."""
    parts = [f"{resources.cpus:.3g} CPUs"] if resources.cpus else []
    if resources.memory_bytes:
        parts.append(t.size(resources.memory_bytes))
    if resources.gpus:
        parts.append(f"{resources.gpus} GPUs")
    return ", ".join(parts)


def _publication(spec: pb.JobSpec) -> str:
    if not spec.HasField("publication"):
        return "nothing"
    aliases = ", ".join(spec.publication.aliases)
    return spec.publication.model + (f" as {aliases}" if aliases else "")
