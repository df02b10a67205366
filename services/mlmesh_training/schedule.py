"""Which job runs next. Pure.

The order: jobs that were running before and are to be retried, then by priority, greater first, then in the order of
acceptance. The first in the order that fits into what is free is started, so a small job may pass a larger one that
does not fit yet. Nothing that runs is ever taken away for another (no preemption).

The bound: a job is passed at most PASSES_MAX times by jobs that come after it in the order. Then none after it starts
until it has; as everything that runs ends (its time limit sees to that), so much will be free. Only jobs of a higher
priority, which come before it, may still hold it up: that is what priorities ask for. A job that does not fit into all
that there is (it was accepted when there was more) waits without holding anybody up.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from mlmesh_runtime.errors import FieldViolation, InvalidInput
from mlmesh_training.jobs import JobSpec
from mlmesh_training.options import Resources

PASSES_MAX = 16
_CPUS_ROUNDING = 1e-6


@dataclass(frozen=True, slots=True, kw_only=True)
class Capacity:
    """What a service may occupy with jobs.

    Attributes:
        total: all of it; `gpus` are numbered from 0.
        jobs_max: jobs trained at once.
        threads: of torch in each process; 0 divides the processors up.
        nodes_max: machines that one job may be spread over.
        shares: whether a job that asks for nothing occupies a fair share. On a cluster, which counts for itself, it
            occupies nothing here.
    """

    total: Resources
    jobs_max: int = 1
    threads: int = 0
    nodes_max: int = 1
    shares: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Waiting:
    """A job that waits.

    Attributes:
        number: in the order of acceptance.
        asked: what it asks for; 0 takes the default.
        processes: that it is spread over.
        retrying: it was running before.
        light: only publishing is left, which occupies nothing.
        passed: how often a job after it was started before it.
    """

    uid: str
    number: int
    priority: int = 0
    asked: Resources = field(default_factory=Resources)
    processes: int = 1
    retrying: bool = False
    light: bool = False
    passed: int = 0

    @property
    def place(self) -> tuple[bool, int, int]:
        """Less is earlier."""
        return (not self.retrying, -self.priority, self.number)


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """The job to start, what it occupies, and who was passed by it."""

    job: Waiting
    resources: Resources
    passed: tuple[Waiting, ...] = ()


def choose(waiting: Sequence[Waiting], running: Sequence[Resources], capacity: Capacity) -> Choice | None:
    """The next job to start, None when none can.

    Args:
        running: what each job that trains now occupies.
    """
    order = sorted(waiting, key=lambda job: job.place)
    if light := next((job for job in order if job.light), None):
        return Choice(job=light, resources=Resources())
    passed: list[Waiting] = []
    for job in order:
        resources = occupied(job.asked, job.processes, capacity)
        if len(running) < capacity.jobs_max and fits([*running, resources], capacity.total):
            return Choice(job=job, resources=resources, passed=tuple(passed))
        if not fits([resources], capacity.total):
            continue
        if job.passed >= PASSES_MAX:
            return None
        passed.append(job)
    return None


def fits(wanted: Sequence[Resources], total: Resources) -> bool:
    """Whether all of these fit at once."""
    return (
        sum(each.cpus for each in wanted) <= total.cpus + _CPUS_ROUNDING
        and sum(each.memory_bytes for each in wanted) <= total.memory_bytes
        and sum(each.gpus for each in wanted) <= total.gpus
    )


def occupied(asked: Resources, processes: int, capacity: Capacity) -> Resources:
    """What a job occupies, defaults filled in.

    Without a wish it is a fair share: of processors the threads of its processes where those are set, else, as of main
    memory, the part that lets `jobs_max` such jobs run at once. No GPU. A default never is more than there is.
    """
    if not capacity.shares:
        return asked
    total = capacity.total
    cpus = float(capacity.threads * processes) if capacity.threads else total.cpus / capacity.jobs_max
    return Resources(
        cpus=asked.cpus or min(cpus, total.cpus),
        memory_bytes=asked.memory_bytes or total.memory_bytes // capacity.jobs_max,
        gpus=asked.gpus,
    )


def threads(spec: JobSpec, resources: Resources, capacity: Capacity) -> int:
    """Threads of torch in each process of a job: an equal share of its processors, unless the service says."""
    if capacity.threads and not spec.resources.cpus:
        return capacity.threads
    return max(1, int(resources.cpus + _CPUS_ROUNDING) // spec.distribution.processes)


def check(spec: JobSpec, capacity: Capacity) -> None:
    """Whether a job can ever run here. Errors: InvalidInput (RESOURCES_TOO_LARGE, INVALID_FIELD)."""
    total, asked, spread = capacity.total, spec.resources, spec.distribution
    wrong = [
        FieldViolation(field=f"spec.{name}", description=f"{wanted:.15g} is more than the {most:.15g} of this service")
        for name, wanted, most in (
            ("resources.cpus", asked.cpus, total.cpus),
            ("resources.memory_bytes", asked.memory_bytes, total.memory_bytes),
            ("resources.gpus", asked.gpus, total.gpus),
            ("distribution.nodes", spread.nodes, capacity.nodes_max),
        )
        if wanted > most
    ]
    if wrong:
        text = "; ".join(f"{violation.field}: {violation.description}" for violation in wrong)
        raise InvalidInput(text, field=wrong[0].field, violations=wrong, reason="RESOURCES_TOO_LARGE")
    if spread.processes % spread.nodes:
        raise InvalidInput(
            f"spec.distribution.processes: {spread.processes} do not spread evenly over {spread.nodes} machines",
            field="spec.distribution.processes",
        )
