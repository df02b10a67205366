"""The training service's own environment variables, beside those of mlmesh_runtime.config."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from mlmesh_runtime.config import ConfigError, Variable

VARIABLES: tuple[Variable, ...] = (
    Variable(name="MLMESH_TRAINING_JOBS_MAX", default="1", meaning="Jobs trained at once; the others wait their turn."),
    Variable(
        name="MLMESH_TRAINING_BACKEND",
        default="local",
        meaning="Where jobs run: local (processes of this machine) or kubernetes.",
    ),
    Variable(
        name="MLMESH_TRAINING_CPUS",
        default="0",
        meaning="Processors that jobs may occupy together; 0 takes those that the service may run on.",
    ),
    Variable(
        name="MLMESH_TRAINING_MEMORY_BYTES",
        default="0",
        meaning="Main memory that jobs may occupy together; 0 takes that of the machine or the control group.",
    ),
    Variable(
        name="MLMESH_TRAINING_GPUS",
        default="0",
        meaning="GPUs that jobs may occupy together; 0 takes those that are there (CUDA_VISIBLE_DEVICES counts).",
    ),
    Variable(
        name="MLMESH_TRAINING_TIME_LIMIT_S",
        default="604800",
        meaning="Seconds that a job's attempts may run, all together, where the job does not say.",
    ),
    Variable(
        name="MLMESH_TRAINING_KEPT_S",
        default="86400",
        meaning="Seconds for which checkpoints of a failed or cancelled job are kept for RetryJob.",
    ),
    Variable(
        name="MLMESH_TRAINING_FINISHED_KEPT_S",
        default="2592000",
        meaning="Seconds after its end at which a job is forgotten, with its events.",
    ),
    Variable(
        name="MLMESH_TRAINING_FINISHED_MAX",
        default="100000",
        meaning="Ended jobs that are kept; beyond that the oldest are forgotten.",
    ),
    Variable(
        name="MLMESH_TRAINING_QUEUE_ITEMS_MAX",
        default="1000",
        meaning="Jobs that may wait or be paused; one more is refused (QUEUE_FULL).",
    ),
    Variable(
        name="MLMESH_TRAINING_EVENTS_PER_JOB_MAX",
        default="100000",
        meaning="Events kept of a job; its oldest are dropped beyond that (SEQUENCE_LOST).",
    ),
    Variable(
        name="MLMESH_TRAINING_THREADS",
        default="0",
        meaning="Threads of torch in a training process; 0 divides the job's processors by its processes.",
    ),
    Variable(
        name="MLMESH_TRAINING_WARM",
        default="1",
        meaning="1: keep one training process ready, torch loaded, so that a job starts at once. 0: save its 0.6 GB.",
    ),
    Variable(
        name="MLMESH_TRAINING_STOP_S",
        default="2",
        meaning="Seconds between asking a training process to end and killing it.",
    ),
    Variable(
        name="MLMESH_TRAINING_SILENCE_S",
        default="300",
        meaning="A training process that says nothing for this many seconds hangs: it is killed and retried.",
    ),
    Variable(
        name="MLMESH_TRAINING_RETRY_S",
        default="1",
        meaning="Seconds before the first retry of a job; doubled for each further one, at most 30.",
    ),
    Variable(
        name="MLMESH_TRAINING_PUBLISH_S",
        default="900",
        meaning="Seconds for which a registry that does not answer is asked, to publish or fetch; then the job fails.",
    ),
    Variable(
        name="MLMESH_TRAINING_STUDIES_MAX",
        default="16",
        meaning="Studies that may run at once; one more is refused (STUDIES_TOO_MANY).",
    ),
    Variable(
        name="MLMESH_TRAINING_EVENTS_PER_STUDY_MAX",
        default="100000",
        meaning="Events kept of a study; its oldest are dropped beyond that (SEQUENCE_LOST).",
    ),
    Variable(
        name="MLMESH_TRAINING_WATCH_STALL_S",
        default="30",
        meaning="A watcher that takes no event for this many seconds is ended (WATCHER_TOO_SLOW).",
    ),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingSettings:
    """What bounds a training service. Times are seconds; the table above says what each means."""

    jobs_max: int = 1
    backend: str = "local"
    cpus: float = 0.0
    memory_bytes: int = 0
    gpus: int = 0
    time_limit_s: float = 604_800.0
    kept_s: float = 86_400.0
    finished_kept_s: float = 2_592_000.0
    finished_max: int = 100_000
    queue_items_max: int = 1000
    events_per_job_max: int = 100_000
    threads: int = 0
    warm: int = 1
    stop_s: float = 2.0
    silence_s: float = 300.0
    retry_s: float = 1.0
    publish_s: float = 900.0
    studies_max: int = 16
    events_per_study_max: int = 100_000
    watch_stall_s: float = 30.0

    @classmethod
    def from_environment(cls, environ: Mapping[str, str]) -> TrainingSettings:
        """Read and check. Raises ConfigError that names the first wrong variable."""
        values: dict[str, int | float | str] = {}
        for variable in VARIABLES:
            field = variable.name.removeprefix("MLMESH_TRAINING_").lower()
            text = environ.get(variable.name, "").strip() or variable.default
            values[field] = _choice(variable.name, text) if field in _CHOICES else _number(variable.name, field, text)
        return cls(**values)  # type: ignore[arg-type]  # each field got the kind that its name asks for


_CHOICES = {"backend": ("local", "kubernetes")}
_ZERO = frozenset({"threads", "retry_s", "warm", "cpus", "memory_bytes", "gpus", "kept_s"})


def _choice(name: str, text: str) -> str:
    choices = _CHOICES[name.removeprefix("MLMESH_TRAINING_").lower()]
    if text not in choices:
        raise ConfigError(f"{name}: expected {' or '.join(choices)}, got {text!r}")
    return text


def _number(name: str, field: str, text: str) -> int | float:
    kind = float if field.endswith("_s") or field == "cpus" else int
    try:
        value = kind(text)
    except ValueError:
        raise ConfigError(f"{name}: expected a number, got {text!r}") from None
    if not (0 if field in _ZERO else 1e-3) <= value < (2**63 if field == "memory_bytes" else 2**31):
        raise ConfigError(f"{name}: expected a number above 0, got {text!r}")
    return value


def trainer_environment(environ: Mapping[str, str]) -> Mapping[str, str]:
    """The environment of training processes: the service's own, less what is none of their business."""
    kept = {name: value for name, value in environ.items() if not name.startswith(("MLMESH_", "OTEL_"))}
    # Threads that wait for each other sleep instead of spinning: on a busy machine that is several times faster.
    return {"OMP_WAIT_POLICY": "PASSIVE", "PYTHONUNBUFFERED": "1", **kept}
