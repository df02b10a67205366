"""The training service's own environment variables, beside those of mlmesh_runtime.config."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from mlmesh_runtime.config import ConfigError, Variable

VARIABLES: tuple[Variable, ...] = (
    Variable(name="MLMESH_TRAINING_JOBS_MAX", default="1", meaning="Jobs trained at once; the others wait their turn."),
    Variable(
        name="MLMESH_TRAINING_QUEUE_ITEMS_MAX",
        default="1000",
        meaning="Jobs that may wait; one more is refused (QUEUE_FULL).",
    ),
    Variable(
        name="MLMESH_TRAINING_EVENTS_PER_JOB_MAX",
        default="100000",
        meaning="Events kept of a job; its oldest are dropped beyond that (SEQUENCE_LOST).",
    ),
    Variable(
        name="MLMESH_TRAINING_THREADS",
        default="0",
        meaning="Threads of torch in a training process; 0 takes all processors it may run on.",
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
        meaning="Seconds for which a trained model is offered to a registry that does not answer; then the job fails.",
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
    queue_items_max: int = 1000
    events_per_job_max: int = 100_000
    threads: int = 0
    warm: int = 1
    stop_s: float = 2.0
    silence_s: float = 300.0
    retry_s: float = 1.0
    publish_s: float = 900.0
    watch_stall_s: float = 30.0

    @classmethod
    def from_environment(cls, environ: Mapping[str, str]) -> TrainingSettings:
        """Read and check. Raises ConfigError that names the first wrong variable."""
        values: dict[str, int | float] = {}
        for variable in VARIABLES:
            field = variable.name.removeprefix("MLMESH_TRAINING_").lower()
            kind = float if field.endswith("_s") else int
            text = environ.get(variable.name, "").strip() or variable.default
            try:
                value = kind(text)
            except ValueError:
                raise ConfigError(f"{variable.name}: expected a number, got {text!r}") from None
            least = 0 if field in {"threads", "retry_s", "warm"} else 1e-3
            if not least <= value < 2**31:
                raise ConfigError(f"{variable.name}: expected a number above 0, got {text!r}")
            values[field] = value
        return cls(**values)  # type: ignore[arg-type]  # each field got the kind that its name asks for


def trainer_environment(environ: Mapping[str, str]) -> Mapping[str, str]:
    """The environment of training processes: the service's own, less what is none of their business."""
    kept = {name: value for name, value in environ.items() if not name.startswith(("MLMESH_", "OTEL_"))}
    # Threads that wait for each other sleep instead of spinning: on a busy machine that is several times faster.
    return {"OMP_WAIT_POLICY": "PASSIVE", "PYTHONUNBUFFERED": "1", **kept}
